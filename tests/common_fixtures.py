"""Fixtures for all tests, and how each of them starts."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pyro
import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from paths import SHARED
from plate_of_three import exact, particles  # noqa: F401  fixtures of the tests of posteriors
from precision import double
from problems import VOCAB
from tiny import flat_lm

from lmppl import LanguageModel
from lmppl.pretrained import SMOLLM2

# On the first import of a day arviz writes a file; processes that do so at once trip over one another.
with FileLock(Path(tempfile.gettempdir()) / "lmppl-tests-arviz.lock"), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz  # noqa: F401

# Compilation of a first kernel on a busy core takes longer than any default deadline.
settings.register_profile("lmppl", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("lmppl")
torch.set_num_threads(1)
if not torch.cuda.is_available():  # torch would write down the stack of every seed, for a device that never comes
    torch.cuda.manual_seed_all = torch.xpu.manual_seed_all = torch.mtia.manual_seed_all = lambda seed: None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("pretrained"):
        pretrained_or_skip()


def pretrained_or_skip() -> Path:
    path = Path(os.environ.get("LMPPL_SMOLLM2") or SMOLLM2.default_directory)
    if not (path / "config.json").is_file():
        pytest.skip(f"no pretrained model at {path}; run `make test-pretrained`")
    return path


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    """Every test starts from the same seed and an empty parameter store, with validation on."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield


@pytest.fixture
def double_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """`double`, but for tests that are given a dtype."""
    with nullcontext() if "dtype" in request.fixturenames else double():
        yield


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """The language model that `problems` are made with, a new one for each file."""
    return flat_lm("gpt2", vocab=VOCAB, dtype=torch.float64)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """A trained checkpoint from outside the package: $LMPPL_TEST_CHECKPOINT, else ../shared/lms/stories."""
    beside = SHARED / "lms" / "stories"
    path = Path(os.environ.get("LMPPL_TEST_CHECKPOINT", beside))
    if not (path / "config.json").is_file():
        pytest.skip(f"no checkpoint at {path}; set LMPPL_TEST_CHECKPOINT")
    return path


@pytest.fixture
def stories(checkpoint: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: $LMPPL_SMOLLM2, else where `make smollm2` puts it."""
    return pretrained_or_skip()


@pytest.fixture(scope="module")
def smollm2_lm(smollm2: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(smollm2)
