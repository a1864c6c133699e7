"""The command line: a short comparison end to end, and a user's mistakes, each one line and a nonzero exit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from lmppl import cli
from lmppl.command_options import experiment_of, own_device

FILE = "adapter_model.safetensors"
STORIES = "Tom had a dog. The dog was big. They ran to the park.\nMia saw a cat. It was in a tree. She smiled at it.\n"


class Run(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def lmppl(tmp_path, monkeypatch, capfd):
    """Run the command line in this process, below ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> Run:
        monkeypatch.setattr(sys, "argv", ["lmppl", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return Run(int(stop.value.code or 0), *capfd.readouterr())

    return run


def test_list_names_the_models(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lmppl", "list"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "infilling" in run.stdout


@pytest.mark.slow
def test_compare_train_and_sample(tmp_path, lmppl):
    run = lmppl("compare", "infilling", "--steps", "3", "--particles", "8", "--out", "out")
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    names = [row["name"] for row in result["rows"]]
    assert names[0] == "GFlowNet" and names[-1] == "enumeration" and "exact posterior, 8 draws" in names
    gflownet = result["rows"][0]
    assert gflownet["density_tv"] > 0.5  # three steps: the guide was not taught the answer
    assert gflownet["training_tokens"] > 0 and result["unexplored"] < 0.005
    for name in ("comparison.png", "training.png", "samples.txt", "run.jsonl", "adapter/adapter_config.json"):
        assert (tmp_path / "out" / name).stat().st_size > 0, name
    run = lmppl("sample", "infilling", "--checkpoint", "out/adapter", "--observations", "1")
    assert run.returncode == 0 and "[...]" in run.stdout
    for steps in ("2", "4"):  # the second call resumes
        run = lmppl("train", "infilling", "--steps", steps, "--out", "train")
        assert run.returncode == 0, run.stderr
    lines = (tmp_path / "train" / "run.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]


def test_train_is_taken_up_by_its_own_command_only_and_touches_nothing_else(tmp_path, lmppl):
    """Checkpoints come as often as --checkpoint-every says; another seed, model or file in the way changes nothing."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    run = lmppl("train", "random_number", "--steps", "2", "--checkpoint-every", "1", "--out", "out")
    assert run.returncode == 0, run.stderr
    assert (out / "thesis.txt").read_text() == "years of work"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for other, says in (
        (["random_number", "--seed", "1"], "seed is 1 here and 0 there"),
        (["infilling"], "model is 'infilling' here and 'random_number' there"),
        (["random_number", "--setting", "paper"], "setting is 'paper' here and 'posterior' there"),
    ):
        run = lmppl("train", *other, "--steps", "3", "--out", "out")
        assert run.returncode == 1 and says in run.stderr and len(run.stderr.strip().splitlines()) == 1, run.stderr
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    for name in ("training.png", "run.jsonl", "adapter/adapter_config.json", "training/training.json"):
        there = tmp_path / name.replace("/", "-")
        (there / name).parent.mkdir(parents=True)
        (there / name).write_text("years of work")
        run = lmppl("train", "random_number", "--steps", "1", "--out", str(there))
        assert run.returncode == 1 and name in run.stderr, run.stderr
        assert [path.read_text() for path in there.rglob("*") if path.is_file()] == ["years of work"]


def test_checkpoint_every_says_how_often(lmppl, monkeypatch):
    saved, replace = [], os.replace

    def seen(source, target):
        replace(source, target)
        if str(target).endswith("training/training.json"):
            saved.append(json.loads(Path(target).read_text())["step"])

    monkeypatch.setattr(os, "replace", seen)
    run = lmppl("train", "random_number", "--steps", "5", "--checkpoint-every", "2", "--out", "out")
    assert run.returncode == 0 and saved == [0, 2, 4, 5], run.stderr
    assert lmppl("train", "random_number", "--checkpoint-every", "0").returncode != 0


def test_train_within_a_budget_is_taken_up_by_the_same_command(tmp_path, lmppl):
    """What was chosen is in the checkpoint, and is not chosen anew."""

    def fit() -> tuple[list[str], dict]:
        run = lmppl("train", "random_number", "--budget", "0.15", "--out", "out")
        assert run.returncode == 0, run.stderr
        chosen = [line for line in run.stderr.splitlines() if line.startswith("0.15 minutes: ")]
        return chosen, json.loads((tmp_path / "out" / "training" / "training.json").read_text())

    (chosen,), state = fit()
    steps, particles = state["of"]["budget steps"], state["of"]["budget particles"]
    assert f"{steps:,} steps of 1 x {particles} draws" in chosen and state["step"] == steps
    assert state["of"]["objective.num_particles"] == particles
    assert len((tmp_path / "out" / "run.jsonl").read_text().splitlines()) == steps
    assert fit() == ([chosen], state)
    for other, said in (
        (["--budget", "0.06"], "with --budget 0.15"), ([], "with --budget 0.15"), (["--steps", "3"], "--budget 0.15"),
    ):  # fmt: skip
        run = lmppl("train", "random_number", *other, "--out", "out")
        assert run.returncode == 1 and said in run.stderr and run.stderr.count("\n") == 1, run.stderr
    run = lmppl("train", "random_number", "--steps", "1", "--out", "plain")
    assert run.returncode == 0, run.stderr
    run = lmppl("train", "random_number", "--budget", "0.15", "--out", "plain")
    assert run.returncode == 1 and "was begun without --budget" in run.stderr, run.stderr


@pytest.mark.slow
def test_compare_within_a_budget_says_what_it_will_cost(tmp_path, lmppl):
    options = ["--particles", "16", "--algorithms", "gflownet,wake-sleep"]
    run = lmppl("compare", "random_number", "--budget", "0.5", *options)
    assert run.returncode == 0, run.stderr
    lines = run.stderr.splitlines()
    assert [line.split(",")[0] for line in lines if " draws (observations x particles)" in line] == [
        "gflownet", "wake-sleep",
    ]  # fmt: skip
    (said,) = [line for line in lines if line.startswith("Comparing, 4 runs of each algorithm: about ")]
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    tokens = sum(4 * row["query_tokens"] for row in rows if not row["reference"])
    foretold = said.split("about ")[1].split(" tokens")[0].replace(",", "")
    assert float(foretold) == pytest.approx(tokens, rel=0.15)  # particles are found to 5%, and draws differ


def test_compare_shows_what_an_experiment_has_besides(tmp_path, lmppl):
    """The entropy of answers, its parts, and their picture."""
    own = ["--set", "count=1", "--set", "members=2"]
    run = lmppl("compare", "uncertainty", "--steps", "1", "--particles", "4", "--algorithms", "gflownet", *own)
    assert run.returncode == 0, run.stderr
    assert "Answers of 2 adapters, 1 labels each, to 300 unseen sentences: " in run.stdout
    assert "parameter information" in run.stdout and "uncertainty.png" in run.stdout
    assert (tmp_path / "out" / "uncertainty.png").stat().st_size > 10_000


@pytest.mark.slow
def test_continuation_runs_likewise(tmp_path, checkpoint, lmppl):
    run = lmppl("compare", "continuation", "--steps", "2", "--particles", "4", "--algorithms", "gflownet")
    assert run.returncode == 0 and "Target: p(z|x)^(1/T), T = 0.8." in run.stdout, run.stderr
    row = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"][0]
    assert 0.03 < row["density_tv"] < 0.1  # two steps: still the language model itself
    run = lmppl("sample", "continuation", "--checkpoint", "out/adapter", "--observations", "1", "--particles", "4")
    assert run.returncode == 0 and "Story:" in run.stdout
    (tmp_path / "prompts.txt").write_text("Tom had a dog.\nMia saw a cat.\n\nThe sun was hot.\n")
    run = lmppl(
        "train", "continuation", "--lm", str(checkpoint), "--data", "prompts.txt", "--steps", "2", "--out", "train"
    )
    assert run.returncode == 0 and (tmp_path / "train" / "adapter" / "adapter_config.json").is_file(), run.stderr


@pytest.mark.slow
def test_a_setting_and_the_options_of_a_model(lmppl):
    options = ["--steps", "1", "--particles", "4", "--algorithms", "gflownet"]
    run = lmppl("compare", "infilling", "--setting", "paper", *options)
    assert run.returncode == 0 and "power 1 / 0.85, the paper's setting" in " ".join(run.stdout.split()), run.stderr
    run = lmppl("compare", "continuation", "--set", "temperature=[0.9, 0.5]", "--set", "max_tokens=4", *options)
    assert run.returncode == 0 and "T = 0.9, 0.5." in run.stdout, run.stderr


@pytest.mark.slow
def test_further_algorithms_train_guides_of_their_own(tmp_path, lmppl):
    options = ["--steps", "2", "--particles", "32", "--algorithms", "mcmc,wake-sleep,ppo"]
    run = lmppl("compare", "random_number", *options)
    assert run.returncode == 0, run.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]}
    assert list(rows)[:3] == ["MCMC (prior, regrowth)", "wake-sleep", "ppo"] and rows["enumeration"]
    assert rows["MCMC (prior, regrowth)"]["log_evidence"] is None  # Metropolis does not estimate it
    for name in ("wake-sleep", "ppo"):
        assert rows[name]["training_tokens"] > 0 and rows[name]["density_tv"] > 0.1, name  # two steps
        assert len((tmp_path / "out" / name / "run.jsonl").read_text().splitlines()) == 2
    adapters = [load_file(tmp_path / "out" / name / "adapter" / FILE) for name in ("wake-sleep", "ppo")]
    assert any(not torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])
    assert not (tmp_path / "out" / "run.jsonl").exists()  # no GFlowNet was asked for


@pytest.mark.parametrize("device, own", [("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_each_process_has_a_gpu_of_its_own(device, own, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_device(device) == device
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device(device) == own


def test_dtype_is_that_of_the_language_model(tmp_path, checkpoint):
    (tmp_path / "stories.txt").write_text(STORIES)
    found = experiment_of(
        "infilling", str(checkpoint), tmp_path / "stories.txt", 0, "posterior", None, "cpu", "bfloat16"
    )
    assert found.lm.dtype == torch.bfloat16
    assert {p.dtype for p in found.guide_lm.trainable_parameters()} == {torch.float32}


@pytest.mark.slow
def test_another_checkpoint_with_stories_of_ones_own(tmp_path, checkpoint, lmppl):
    (tmp_path / "stories.txt").write_text(STORIES)
    run = lmppl(
        "compare", "infilling", "--lm", str(checkpoint), "--data", "stories.txt", "--steps", "2", "--particles", "8",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "no exact posterior" in run.stdout
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]}
    assert "enumeration" not in rows
    assert all(row["log_evidence"] is not None and row["ess"] > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["compare", "nonsense"], "nonsense"),
        (["compare", "infilling", "--algorithms", "magic"], "magic"),
        (["compare", "infilling", "--lm", "no/such/model", "--data", "stories.txt"], "no/such/model"),
        (["compare", "infilling", "--lm", ".", "--data", "stories.txt"], "no language model"),
        (["compare", "infilling", "--data", "missing.txt"], "--data missing.txt: there is no"),
        (["compare", "infilling", "--data", "empty.txt"], "no story"),
        (["compare", "infilling", "--data", "two.txt"], "line 1"),
        (["compare", "infilling", "--data", "stories.txt"], "cannot be encoded"),  # not the embedded LM's words
        (["sample", "infilling", "--checkpoint", "nowhere"], "nowhere"),
        (["train", "continuation", "--data", "empty.txt"], "no prompt"),
        (["train", "infilling", "--setting", "papers"], "papers"),
        (["train", "infilling", "--set", "temperature=0.9"], "template"),  # the one that there is
        (["train", "continuation", "--set", "temperature"], "NAME=VALUE"),
        (["train", "continuation", "--set", "temperature=-1"], "temperature"),
        (["compare", "infilling", "--device", "nowhere"], "--device nowhere"),
        (["train", "infilling", "--device", "cuda:99"], "--device cuda:99"),
        (["train", "infilling", "--lm", ".", "--dtype", "int8"], "--dtype int8"),
        (["train", "infilling", "--dtype", "bfloat16"], "together with --lm"),
        (["train", "infilling", "--data", "."], "data: . is a directory"),
        (["train", "infilling", "--seed", str(10**30)], "at most 43 bits"),
        (["train", "infilling", "--lm", "", "--data", "stories.txt"], "--lm: it is empty"),
        (["train", "continuation", "--set", "temperature=true"], "a number or several, as [0.8, 0.9]"),
        (["train", "infilling", "--budget", "10", "--steps", "5"], "--budget and --steps: each says how long to train"),
        (["compare", "infilling", "--budget", "10", "--quick"], "--budget and --quick: each says how long to train"),
        (["train", "infilling", "--budget", "0"], "--budget 0: expected minutes, a positive number"),
        (["train", "infilling", "--budget", "nan"], "--budget nan: expected minutes, a positive number"),
        (["train", "infilling", "--budget", "1e308"], "--budget 1e+308: expected minutes, a positive number"),
        (["train", "random_number", "--budget", "0.0001"], "minutes: 0.0001 are too few: a step of 1 x 4 draws takes"),
        (["compare", "infilling", "--budget", "10", "--algorithms", "smc"], "--budget 10: nothing is trained here"),
    ],
)
def test_a_mistake_is_one_line_and_a_nonzero_exit(tmp_path, lmppl, arguments, word):
    (tmp_path / "stories.txt").write_text(STORIES)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "two.txt").write_text("One. Two.\n")
    before = sorted(tmp_path.iterdir())
    run = lmppl(*arguments)
    assert run.returncode != 0
    errors = [line for line in run.stderr.splitlines() if line.strip()]
    assert len(errors) == 1 and errors[0].startswith("error:") and word in errors[0], run.stderr
    assert sorted(tmp_path.iterdir()) == before  # nothing half-written


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare"], ["Missing argument 'model'", "compare --help"]),
        (["compar", "infilling"], ["No such command 'compar'", "Did you mean 'compare'?"]),
        (["--frob"], ["No such option: --frob"]),
        (["list", "infilling"], ["unexpected extra argument", "infilling"]),
        (["train", "infilling", "--steps", "1e3"], ["--steps", "integer", "'1e3'", "train --help"]),
        (["train", "infilling", "--seed=2.5"], ["--seed", "integer", "'2.5'"]),
        (["train", "infilling", "--budget", "2h"], ["--budget", "'2h'", "train --help"]),
        (["compare", "infilling", "--threads", "0"], ["--threads", "'0'", "1"]),
        (["compare", "infilling", "--particles", "-3"], ["--particles", "'-3'"]),
        (["sample", "infilling"], ["Missing option '--checkpoint'"]),
        (["sample", "infilling", "--checkpoint"], ["--checkpoint", "requires an argument"]),
    ],
)
def test_a_wrong_usage_is_one_line_too_and_names_what_was_given(lmppl, arguments, words):
    run = lmppl(*arguments)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
    assert all(word in run.stderr for word in words), run.stderr


def test_without_arguments_the_help_is_shown(lmppl):
    run = lmppl()
    assert "compare" in run.stdout and run.stderr == ""


def test_what_a_text_says_is_no_order_to_the_terminal():
    from lmppl.command_results import sample_text

    shown = sample_text(
        [{"observation": "x", "texts": [{"text": "\x1b[31mred\n\there", "probability": 1.0, "exact": None}]}]
    )
    assert "\x1b" not in shown and r"\x1b[31mred" in shown and "\n\there" in shown
