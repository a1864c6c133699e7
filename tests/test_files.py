"""What is saved is whole or not there, nothing of others is replaced, and damaged or foreign files are refused."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import peft
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from paths import ROOT, SCRIPTS
from safetensors.torch import save_file
from tiny import tiny_lm

from lmppl import files
from lmppl.inference import Importance, Posterior
from lmppl.inference.judging.comparison import Comparison, Row
from lmppl.inference.training.loop import checkpoint
from lmppl.locks import LockedError, locked

LORA = peft.LoraConfig(r=2, target_modules="all-linear")


@pytest.fixture(scope="module")
def survived(tmp_path_factory):
    """What `killed_script` found."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{SCRIPTS}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(SCRIPTS / "killed_script.py"), str(tmp_path_factory.mktemp("killed"))]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-5000:]
    return dict(json.loads(line) for line in run.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "base", "posterior", "checkpoint"])
def test_a_save_killed_before_any_system_call_leaves_the_old_or_the_new(survived, kind):
    found = survived[kind]
    assert found.keys() - {"calls"} <= {
        "old", "new", "first nothing", "first new", "peft sees old", "peft sees nothing", "peft sees new",
    }  # fmt: skip
    assert found["old"] > 15 and found["new"] > 5 and found["first nothing"] > 15 and found["calls"] > 20


@pytest.mark.slow
def test_training_killed_before_any_system_call_goes_on_as_if_it_had_not_been(survived):
    assert survived["training"]["killed"] > 50 and survived["training"]["whole"] == 1


@pytest.mark.slow
def test_signals_save_before_they_end_a_run(survived):
    assert survived["SIGTERM"] == [143, 3, True] and survived["SIGINT"] == [130, 3, True]


@pytest.mark.slow
def test_two_writers_and_a_reader_of_one_directory_do_not_meet(survived):
    assert survived["at once"] == [0, False, ["lmppl.json", "training.json", "training.safetensors"]]


# -- nothing of others' ------------------------------------------------------------------------------------------------


def optimizer(*shapes: int, kind=torch.optim.SGD, **kwargs) -> torch.optim.Optimizer:
    return kind([torch.nn.Parameter(torch.ones(n)) for n in shapes], lr=0.1, **kwargs)


def model() -> None:
    pyro.sample("k", dist.Normal(0.0, 1.0))


SAVERS = {
    "adapter_config.json": lambda path: tiny_lm().with_adapter(LORA).save_pretrained(path),
    "adapter_model.safetensors": lambda path: tiny_lm().with_adapter(LORA).save_pretrained(path),
    "config.json": lambda path: tiny_lm().save_pretrained(path),
    "training.json": lambda path: checkpoint.save(path, optimizer(3), 1, {}),
    "posterior.safetensors": lambda path: Importance(model, num_particles=3).run().save(path),
    "comparison.png": lambda path: Comparison([Row("a", ess=0.5)]).save(path),
}


@pytest.mark.parametrize("name", SAVERS)
def test_only_what_the_package_wrote_is_replaced(tmp_path, name):
    save, there = SAVERS[name], tmp_path / "there"
    save(there)
    (there / "thesis.txt").write_text("years of work")
    save(there)
    assert (there / "thesis.txt").read_text() == "years of work"
    names = {path.name for path in there.iterdir()}
    (there / name).write_text("changed")
    with pytest.raises(ValueError, match=re.escape(f"{there / name} was not written by lmppl, or was changed")):
        save(there)
    assert (there / name).read_text() == "changed" and {path.name for path in there.iterdir()} == names
    other = tmp_path / "other"
    other.mkdir()
    (other / name).write_text("mine")
    with pytest.raises(ValueError, match="other"):
        save(other)
    assert [(path.name, path.read_text()) for path in other.iterdir()] == [(name, "mine")]


def test_files_that_a_new_save_does_not_have_are_removed_if_they_are_as_they_were(tmp_path):
    def save(*names):
        with files.writing(tmp_path, "letters") as folder:
            for name in names:
                (folder / name).write_text(name)

    save("a", "b", "c")
    (tmp_path / "c").write_text("changed")
    save("a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "lmppl.json"]
    assert files.manifest(tmp_path).keys() == {"a"}


def test_a_figure_replaces_a_figure_only(tmp_path):
    for suffix in ("png", "pdf", "svg"):
        path = tmp_path / f"a.{suffix}"
        for width in (2, 3):
            files.save_figure(Figure(figsize=(width, 1)), path)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        content = path.read_bytes()
        assert content.startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix])
        path.write_bytes(b"mine")
        with pytest.raises(ValueError, match=f"{path} exists and is not a figure"):
            files.save_figure(Figure(), path)
        assert path.read_bytes() == b"mine"
        path.unlink()


def test_a_lock_says_who_holds_it_and_ends_with_the_process(tmp_path):
    path = tmp_path / ".lock"
    holder = (
        "import sys; from pathlib import Path; from lmppl.locks import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    says = f"{tmp_path} is in use by process {process.pid} on .* since 2"
    with pytest.raises(LockedError, match=says), locked(path, wait=0.05):
        pass
    process.kill()
    process.communicate()
    assert path.exists()
    with locked(path, wait=0), pytest.raises(LockedError, match=f"process {os.getpid()}"), locked(path, wait=0):
        pass
    assert not list(tmp_path.iterdir())


# -- damaged and foreign files -----------------------------------------------------------------------------------------


def broken(path: Path, how: str) -> None:
    """Damage a file; its directory has no manifest, which would notice, but where that is what is asked."""
    content = path.read_bytes()
    if how != "one bit":
        (path.parent / "lmppl.json").unlink()
    if how == "pickled":
        path.write_bytes(pickle.dumps({"a": torch.ones(2)}))
    elif how == "foreign" and path.suffix == ".json":
        path.write_text('{"years": "of work"}')
    elif how == "foreign":
        save_file({"years": torch.ones(2)}, path)
    else:
        cuts = {"empty": b"", "truncated": content[: len(content) // 2], "noise": bytes(range(256)) * 4}
        cuts["one bit"] = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        path.write_bytes(cuts[how])


LOADERS = {
    "adapter": (SAVERS["adapter_config.json"], tiny_lm().with_adapter),
    "checkpoint": (SAVERS["training.json"], lambda path: checkpoint.load(path, optimizer(3))),
    "posterior": (SAVERS["posterior.safetensors"], Posterior.load),
}


@pytest.mark.parametrize("how", ["empty", "truncated", "noise", "pickled", "foreign", "one bit", "missing"])
@pytest.mark.parametrize("kind", LOADERS)
def test_what_cannot_be_read_is_named(tmp_path, kind, how):
    save, load = LOADERS[kind]
    save(tmp_path / "whole")
    for name in [path.name for path in (tmp_path / "whole").iterdir() if path.name != "lmppl.json"]:
        there = tmp_path / name
        save(there)
        if how == "missing":
            (there / name).unlink()
        else:
            broken(there / name, how)
        with pytest.raises(ValueError, match=name) as caught:
            load(there)
        assert "\n" not in str(caught.value)


def test_pickled_weights_are_not_read(tmp_path):
    tiny_lm().with_adapter(LORA).save_pretrained(tmp_path)
    (tmp_path / "lmppl.json").unlink()
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"a": torch.ones(2)}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="no adapter_model.safetensors"):
        tiny_lm().with_adapter(tmp_path)


def test_a_checkpoint_with_a_parameter_that_is_not_finite_is_not_written(tmp_path):
    good = optimizer(2)
    checkpoint.save(tmp_path, good, 1, {})
    with torch.no_grad():
        good.param_groups[0]["params"][0][1] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        checkpoint.save(tmp_path, good, 2, {})
    found = optimizer(2)
    assert checkpoint.load(tmp_path, found)[0]["step"] == 1


# -- optimisers --------------------------------------------------------------------------------------------------------


class Counting(torch.optim.SGD):
    """Keeps more than most: a count and a tensor in its groups, an integer tensor and a list in its states."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["span"] = (group["k"], torch.tensor(group["k"] / 3, dtype=torch.float64))
            for p in group["params"]:
                self.state[p]["seen"] = self.state[p].get("seen", torch.zeros(2, dtype=torch.int64)) + 1
                self.state[p]["past"] = [*self.state[p].get("past", []), p.detach().clone(), None, "x"]
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.LBFGS, Counting])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_that_an_optimizer_keeps_comes_back(tmp_path, kind, dtype):
    """Three steps, saved, taken up by an optimiser that was built otherwise: its fourth is that of the first."""

    def made(lr):
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=dtype))
        return p, kind([p], lr=lr)

    def step(p, owner):
        def loss():
            owner.zero_grad()
            value = (p**4).sum() / 10
            value.backward()
            return value

        loss()
        owner.step(loss)

    p, owner = made(0.1)
    for _ in range(3):
        step(p, owner)
    checkpoint.save(tmp_path, owner, 3, {})
    q, other = made(0.7)
    checkpoint.load(tmp_path, other)
    assert other.param_groups[0]["lr"] == 0.1 and torch.equal(p, q)
    for key, value in owner.state[p].items():
        found = other.state[q][key]
        if isinstance(value, torch.Tensor):
            assert found.dtype == value.dtype and torch.equal(found, value)
    if kind is Counting:
        assert other.param_groups[0]["k"] == 3 and other.param_groups[0]["span"] == owner.param_groups[0]["span"]
        assert other.state[q]["past"][1:3] == [None, "x"] and len(other.state[q]["past"]) == 9
    for pair in ((p, owner), (q, other)):
        step(*pair)
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: optimizer(3, 2, kind=torch.optim.Adam), "the optimizer is Adam here and SGD there"),
        (lambda: optimizer(3), "the optimizer holds parameters"),
        (lambda: optimizer(3, 4), "the optimizer holds parameters"),
        (lambda: [optimizer(3, 2), optimizer(1)], "2 optimizers here and 1 there"),
    ],
)
def test_another_optimizer_is_refused_and_left_as_it_was(tmp_path, other, says):
    saved = optimizer(3, 2)
    with torch.no_grad():
        saved.param_groups[0]["params"][0].fill_(7.0)
    checkpoint.save(tmp_path, saved, 1, {})
    found = other()
    with pytest.raises(ValueError, match=says):
        checkpoint.load(tmp_path, found)
    first = found[0] if isinstance(found, list) else found
    assert first.param_groups[0]["params"][0].tolist() == [1.0] * 3


def test_what_no_file_can_hold_is_named(tmp_path):
    odd = optimizer(1)
    odd.param_groups[0]["helper"] = object()
    with pytest.raises(ValueError, match="helper, a object"):
        checkpoint.save(tmp_path, odd, 1, {})
    assert not list(tmp_path.iterdir())


def test_a_figure_without_an_ending_is_a_png_as_in_matplotlib(tmp_path):
    for width in (2, 3):
        files.save_figure(Figure(figsize=(width, 1)), tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_lock_does_not_follow_a_link(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / ".lock").symlink_to("thesis.txt")
    with pytest.raises(OSError), locked(tmp_path / ".lock"):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_manifest_that_is_none_is_named(tmp_path):
    Importance(model, num_particles=3).run().save(tmp_path / "p")
    (tmp_path / "p" / "lmppl.json").unlink()
    (tmp_path / "p" / "lmppl.json").mkdir()
    with pytest.raises(ValueError, match=r"lmppl\.json is damaged"):
        Posterior.load(tmp_path / "p")
