"""Fixtures for all tests."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch
from hypothesis import settings
from plate_of_three import exact, particles  # noqa: F401  fixtures of the tests of posteriors
from problems import VOCAB
from tiny import tiny_lm

from lmppl import LanguageModel

pytest.register_assert_rewrite("brute_force", "contracts", "five_sigma")

# Compilation of a first kernel on a busy core takes longer than any default deadline.
settings.register_profile("lmppl", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("lmppl")
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """On the first import of a day arviz writes a file; processes that do so at once trip over one another."""
    if config.getoption("numprocesses", None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import arviz  # noqa: F401


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    """Every test starts from the same seed and an empty parameter store, with validation on."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """The language model that `problems` are made with, a new one for each file."""
    return tiny_lm("gpt2", vocab=VOCAB, dtype=torch.float64)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """A trained checkpoint from outside the package: $LMPPL_TEST_CHECKPOINT, else ../shared/lms/stories."""
    beside = Path(__file__).parents[2] / "shared" / "lms" / "stories"
    path = Path(os.environ.get("LMPPL_TEST_CHECKPOINT", beside))
    if not (path / "config.json").is_file():
        pytest.skip(f"no checkpoint at {path}; set LMPPL_TEST_CHECKPOINT")
    return path


@pytest.fixture
def stories(checkpoint: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(checkpoint)
