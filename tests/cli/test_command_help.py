"""What the command line says before it computes: it is light, complete, and shown as it is meant."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest
from paths import ROOT

import lmppl
from lmppl import cli
from lmppl.catalogue import MODELS
from lmppl.command_options import COMMON
from lmppl.models import (
    EXPERIMENTS,
    arithmetic,
    classifier,
    continuation,
    contrastive,
    infilling,
    preferences,
    random_number,
    thoughts,
    transfer,
)
from lmppl.models.subjectivity import read_sentences

COMMANDS = "compare", "train", "sample"


def light(*arguments: str) -> str:
    """What a command prints, in a process of its own that must import none of the heavy libraries."""
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['lmppl', *{list(arguments)!r}]\n"
        "try:\n    runpy.run_module('lmppl', run_name='__main__')\n"
        "except SystemExit as stop:\n    code = stop.code\n"
        "heavy = {'torch', 'transformers', 'pyro', 'peft', 'numpy', 'matplotlib', 'arviz'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["compare", "train", "sample", "list", "--version"]),
        (["--version"], [lmppl.__version__]),
        (["list"], MODELS),
        (["compare", "--help"], ["--algorithms", "--data", *MODELS]),
        (["train", "contrastive", "--help"], ["<tab>", *MODELS["contrastive"].options]),
        (["sample", "subjectivity", "--help"], ["JSONL", "label_text"]),
    ],
)
def test_help_imports_nothing_heavy(arguments, words):
    said = light(*arguments)
    assert all(word in said for word in words)


@pytest.fixture
def page(monkeypatch, capsys):
    """A help page, its lines joined as a reader joins them."""
    monkeypatch.setenv("COLUMNS", "200")

    def read(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lmppl", *arguments, "--help"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    return read


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_models_page_has_its_data_and_its_options_as_they_are_written(page, command, name):
    said, entry = page(command, name), MODELS[name]
    shown = [entry.infers, entry.data, entry.example.replace("\t", "<tab>"), *entry.options.values()]
    assert all(" ".join(text.split()) in said for text in shown)
    assert all(f"--set {option}=" in said for option in entry.options)
    assert "`" not in said and "[/" not in said  # no markup is left over


@pytest.mark.parametrize("command", [(), *((c,) for c in COMMANDS), ("list",)])
def test_a_commands_page_has_no_markup_left_over(page, command):
    said = page(*command)
    assert "`" not in said and "[/" not in said


def test_the_catalogue_says_what_the_models_say_themselves():
    assert list(MODELS) == list(EXPERIMENTS)
    for name, make in EXPERIMENTS.items():
        assert MODELS[name].infers == (make.__doc__ or "").strip().splitlines()[0]
        assert list(MODELS[name].options) == [p for p in inspect.signature(make).parameters if p not in COMMON]


def test_the_examples_are_data(tmp_path):
    readers = {
        "infilling": infilling.read_stories,
        "reverse": infilling.read_stories,
        "continuation": continuation.read_prompts,
        "constrained": continuation.read_prompts,
        "contrastive": contrastive.read_pairs,
        "preferences": preferences.read_choices,
        "transfer": transfer.read_tasks,
        "random_number": random_number.read_bounds,
        "random_number_valid": random_number.read_bounds,
        "subjectivity": read_sentences,
        "arithmetic": arithmetic.read_file,
        "thoughts": thoughts.read_questions,
    }
    assert set(readers) <= {name for name, entry in MODELS.items() if entry.example}
    for name, read in readers.items():
        (tmp_path / name).write_text(MODELS[name].example)
        assert len(read(tmp_path / name)) == 1
    (tmp_path / "labelled").write_text("0\tTom had a dog.\n")
    assert classifier.read_labelled(tmp_path / "labelled") == (["Tom had a dog."], [False])


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["compare", "infiling"], "infilling"),
        (["train", "subjectivty"], "subjectivity"),
        (["sample", "arithmatic", "--checkpoint", "x"], "arithmetic"),
        (["compare", "infilling", "--algorithms", "smc,gflownets"], "gflownet"),
    ],
)
def test_the_nearest_name_is_offered(monkeypatch, capsys, arguments, near):
    monkeypatch.setattr(sys, "argv", ["lmppl", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error:") and line.endswith(f"Did you mean {near!r}?")


def test_an_error_is_shown_as_it_is(monkeypatch, capsys):
    """Brackets, which rich takes for styles, and a closing one, at which it fails."""
    monkeypatch.setattr(sys, "argv", ["lmppl", "compare", "infilling", "--algorithms", "[test][/][0;1]:smile:"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "'[test][/][0;1]:smile:' is none of" in capsys.readouterr().err


def in_a_process_of_its_own(program: str) -> str:
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_packages_names_are_known_before_anything_is_imported():
    program = """
import json, sys
import lmppl
names = dir(lmppl)
try:
    lmppl.nonsense
except AttributeError as error:
    print(json.dumps([names, str(error), hasattr(lmppl, "__main__"), "torch" in sys.modules]))
"""
    names, error, runs, heavy = json.loads(in_a_process_of_its_own(program))
    assert {"LanguageModel", "check", "text", "inference", "__version__"} <= set(names)
    assert error == "module 'lmppl' has no attribute 'nonsense'" and not runs and not heavy


THERE = """
import lmppl
from lmppl import check, text, LanguageModel
assert lmppl.check is check and callable(check)
assert lmppl.distributions.Completion and lmppl.models.EXPERIMENTS and lmppl.text is text
"""


def test_the_packages_names_are_there_when_asked_for(monkeypatch):
    """Also where they have not been asked for before."""
    for name in ("check", "text", "LanguageModel", "distributions", "models"):
        monkeypatch.delitem(vars(lmppl), name, raising=False)
    exec(THERE, {})


@pytest.mark.slow
def test_the_packages_names_are_there_in_a_process_of_its_own():
    in_a_process_of_its_own(THERE)
