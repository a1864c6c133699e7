"""The commands of docs/command_line.md run as they are written, and what they print and write is what the page says."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest
from paths import ROOT

import lmppl
from lmppl import cli
from lmppl.catalogue import MODELS
from lmppl.command_options import Failure
from lmppl.command_output import Output
from lmppl.command_record import Record, commands
from lmppl.command_report import report, write_report
from lmppl.files import manifest, writing
from lmppl.inference.judging.comparison import Comparison, Point, Row

PAGE = (ROOT / "docs" / "command_line.md").read_text()
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f]")


class Run(NamedTuple):
    returncode: int
    out: str
    err: str


def lmppl_command(line: str) -> Run:
    """Run a line as a shell would, in this process."""
    words = shlex.split(line)
    file = words[words.index(">") + 1] if ">" in words else None
    words = words[: words.index(">")] if file else words
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = words
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = before
    if file:
        Path(file).write_text(out.getvalue())
    return Run(int(stop.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Where the commands of the page have run, one after the other."""
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def runs(there) -> dict[str, Run]:
    """The page's commands, by what they are."""
    blocks = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    assert len(lines) == 8
    with contextlib.chdir(there):
        return {line: lmppl_command(line) for line in lines}


@pytest.fixture
def named(runs):
    def one(*words: str, without: str = "--quiet") -> Run:
        (line,) = [line for line in runs if all(w in line for w in words) and without not in line]
        return runs[line]

    return one


def test_the_commands_of_the_page_run(runs):
    for line, run in runs.items():
        assert run.returncode == 0, (line, run.err)
        assert run.out or ">" in line, line


def test_progress_is_on_standard_error_in_plain_lines_and_results_are_on_standard_output(named):
    run = named("lmppl train")
    assert not CONTROL.search(run.out + run.err)
    *_, last = re.findall(r"^GFlowNet: \d+/.*$", run.err, re.MULTILINE)  # one, in less than ten seconds
    figures = r"\w+, log Z -?\d+\.\d\d, loss [\d.]+, sd_u [\d.]+( \(.*\))?"
    figures = rf"20/20 \[\d\d:\d\d<00:00, +[\d.]+(step/s|s/step), {figures}\]"
    assert re.fullmatch(f"GFlowNet: {figures}", last), last
    shown = re.findall(r"^    (GFlowNet: .*)$", PAGE, re.MULTILINE)
    assert re.fullmatch(f"GFlowNet: {figures}", shown[-1])  # the page's example is such a line
    assert "20 steps: about " in run.err and "GFlowNet" not in run.out
    assert re.search(r"^[\d,]+ tokens; adapter in out/numbers/adapter$", run.out, re.MULTILINE)
    assert re.search(r"^Total variation on unseen observations: \d\.\d{3}$", run.out, re.MULTILINE)
    assert re.search(r"^Comparing: 4/4 \[", named("lmppl compare").err, re.MULTILINE)


def test_quiet_prints_the_results_alone(runs, named):
    quiet = named("lmppl train", "--quiet", without=">")
    assert quiet.err == "" and quiet.out == named("lmppl train").out  # taken up, with no step left
    assert named("--json", without="sample").err == ""


def test_quiet_silences_warnings_too_while_it_lasts(caplog):
    logger = logging.getLogger("lmppl")
    with Output(quiet=True).quietly():
        logger.warning("the guide is not the posterior")
        warnings.warn("a library's", stacklevel=1)
    assert caplog.text == ""
    with Output().quietly():
        logger.warning("the guide is not the posterior")
    assert "not the posterior" in caplog.text


def test_a_table_is_as_wide_as_it_is(named):
    run = named("lmppl compare")
    assert not CONTROL.search(run.out) and "…" not in run.out
    for title in ("Draws: weighted particles against the exact posterior", "Cost: tokens through the network"):
        assert title in run.out.splitlines()
    (note,) = [line for line in run.out.splitlines() if line.startswith("Every TV is to the enumerated posterior")]
    assert len(note) > 100 and note.endswith(".")
    models = named("lmppl list").out
    assert all(entry.infers in models for entry in MODELS.values())


# -- JSON --------------------------------------------------------------------------------------------------------------


def documented(header: str) -> set[str]:
    """The fields that a table of the page names, under the paragraph that begins with a header."""
    table = PAGE[PAGE.index(header) :]
    table = table[table.index("\n| ") :].split("\n\n")[0]
    return {name for row in table.splitlines()[3:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_json_is_the_comparison_that_was_saved(runs, there):
    found = json.loads((there / "comparison.json").read_text(), parse_constant=lambda x: pytest.fail(x))
    saved = json.loads((there / "out" / "compared" / "comparison.json").read_text())
    assert {name: found[name] for name in saved} == saved
    (entry,) = commands(there / "out" / "compared")
    assert {name: found[name] for name in entry} == entry
    assert found["format"] == "lmppl comparison 1" and found["seed"] == 0 and found["status"] == "finished"
    assert [row["name"] for row in found["rows"]] == ["GFlowNet", "exact posterior, 16 draws", "enumeration"]
    row = found["rows"][0]
    assert 0 < row["density_tv"] < 1 and row["num_particles"] == 16 and not row["reference"]
    assert set(found) == documented("Numbers that are not finite") | documented("`command.json` has the field")
    assert set(row) == documented("`comparison.json` has `rows`")


def test_json_has_no_number_that_is_none():
    infinite = Comparison([Row("a", reverse_kl=float("inf"), khat=float("nan"))])
    assert [infinite.to_json()["rows"][0][name] for name in ("reverse_kl", "khat")] == [None, None]


# -- command.json ------------------------------------------------------------------------------------------------------


def test_a_directory_says_which_command_wrote_it(runs, there):
    (trained,) = commands(there / "out" / "numbers")
    line = "lmppl train random_number --steps 20 --out out/numbers --quiet"
    assert trained["argv"] == line.split() and trained["command"] == "train"
    assert trained["settings"] | {"model": "random_number", "steps": 20, "seed": 0, "set": []} == trained["settings"]
    assert not {"quiet", "json", "help"} & set(trained["settings"])
    assert trained["versions"]["lmppl"] == lmppl.__version__ and {"torch", "pyro"} <= set(trained["versions"])
    assert trained["status"] == "finished" and len(trained["resumed"]) == 1
    assert trained["started"] <= trained["resumed"][0] <= trained["finished"]
    assert set(trained) == documented("`command.json` has the field")
    assert set(trained["results"]) == {"steps", "training_tokens", "verdict", "density_tv"}
    text = (there / "out" / "numbers" / "command.json").read_text()
    assert str(there) not in text and "command.json" in manifest(there / "out" / "numbers")


def test_a_result_that_is_not_finite_is_recorded_as_none(tmp_path):
    with Record(tmp_path, "train", {"seed": 0}) as record:
        record.results |= {"density_tv": float("nan"), "steps": 3}
    (entry,) = commands(tmp_path)
    assert entry["results"] == {"density_tv": None, "steps": 3} and entry["status"] == "finished"
    assert "total variation, unseen observations not defined" in self_contained(write_report(tmp_path)).text


def test_every_file_is_on_the_page(runs, there):
    for run in ("numbers", "compared"):
        names = {path.name for path in (there / "out" / run).iterdir() if path.name[0] != "."}
        table = PAGE[PAGE.index("| file |") :].split("\n\n")[0]
        listed = set(re.findall(r"`([\w.]+)/?`", table))
        assert names - listed == set(), run


def test_two_commands_of_one_directory_have_an_entry_each(tmp_path):
    for command in ("train", "compare", "train"):
        with Record(tmp_path, command, {"seed": 3}):
            pass
    assert [(entry["command"], entry["seed"]) for entry in commands(tmp_path)] == [("compare", 3), ("train", 3)]


def test_a_command_that_is_refused_leaves_the_record_and_one_that_fails_says_why(tmp_path):
    with pytest.raises(ValueError), Record(tmp_path, "train", {}):
        raise ValueError("refused")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError), Record(tmp_path, "train", {}) as record:
        record.begin()
        assert commands(tmp_path)[0]["status"] == "running"
        raise ValueError("a reason\nin two lines")
    assert commands(tmp_path)[0]["status"] == "failed: a reason in two lines"
    with pytest.raises(KeyboardInterrupt), Record(tmp_path, "train", {}, resumes=True) as record:
        record.begin()
        raise KeyboardInterrupt
    (entry,) = commands(tmp_path)
    assert entry["status"] == "interrupted" and entry["finished"] is None and len(entry["resumed"]) == 1


def test_somebody_elses_record_is_not_replaced(tmp_path):
    (tmp_path / "command.json").write_text("{}")
    with contextlib.chdir(tmp_path.parent):
        for command in ("train random_number --steps 1", "compare random_number --steps 1"):
            run = lmppl_command(f"lmppl {command} --out {tmp_path.name}")
            assert run.returncode == 1 and "command.json was not written by lmppl" in run.err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("command.json", "{}")]
    assert lmppl_command(f"lmppl report {tmp_path}").returncode == 1


def test_a_run_that_is_interrupted_says_so_and_is_taken_up(tmp_path, monkeypatch):
    """Ctrl-C exits with 130 after a checkpoint; the same command goes on, and the record tells both."""
    replace = os.replace

    def pressed(source, target):
        replace(source, target)
        if str(target).endswith("training/training.json") and json.loads(Path(target).read_text())["step"] == 1:
            signal.raise_signal(signal.SIGINT)

    line = "lmppl train random_number --steps 3 --checkpoint-every 1 --out run"
    with contextlib.chdir(tmp_path):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", pressed)
            assert lmppl_command(line).returncode == 130
        signal.signal(signal.SIGINT, before)
        (first,) = commands(tmp_path / "run")
        assert first["status"] == "interrupted" and first["argv"] == line.split() and first["finished"] is None
        assert lmppl_command("lmppl report run").returncode == 0
        page = Page(tmp_path / "run" / "report.html")
        assert "unfinished: it was interrupted" in page.text and "The run of train has not ended" in page.text
        assert lmppl_command(line.replace("--steps 3", "--steps 3 --seed 1")).returncode == 1  # of another run
        assert commands(tmp_path / "run") == [first]
        assert lmppl_command(line).returncode == 0
        (second,) = commands(tmp_path / "run")
    assert second["status"] == "finished" and second["started"] == first["started"]
    assert len(second["resumed"]) == 1 and second["seconds"] > first["seconds"]


# -- the report --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What is on a page: its text, its elements with their attributes, and what it would load."""

    EMPTY = {"meta", "link", "img", "br", "hr", "input"}

    def __init__(self, path: Path):
        super().__init__()
        self.words: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(path.read_text())
        assert self.open == [], self.open  # every element is closed
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def loaded(self) -> list[str]:
        names = {"src", "href", "xlink:href", "action", "data", "srcset", "poster"}
        found = [value or "" for _, attributes in self.elements for name, value in attributes.items() if name in names]
        return [value for value in found if not value.startswith(("#", "data:"))]


def self_contained(path: Path) -> Page:
    page, text = Page(path), path.read_text()
    assert page.loaded == [] and not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert "@import" not in text and not re.search(r"url\(\s*['\"]?(?!#)", text)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert len(text) < 2_000_000 and "prefers-color-scheme: dark" in text
    return page


def test_a_report_of_a_training(runs, there):
    out = there / "out" / "numbers"
    page = self_contained(out / "report.html")
    (entry,) = commands(out)
    last = json.loads((out / "run.jsonl").read_text().splitlines()[-1])
    assert "lmppl train random_number" in page.text and "finished" in page.text and "unfinished" not in page.text
    assert "seed 0" in page.text and "steps 20" in page.text and "checkpoint_every 100" in page.text
    assert " ".join(entry["argv"]).removesuffix(" --quiet") in page.text
    assert all(f"{name} {version}" in page.text for name, version in entry["versions"].items())
    assert f"ESS / N {last['held_out_ess']:.3f}" in page.text and last["verdict"] in page.text
    assert f"{entry['results']['training_tokens']:,}" in page.text
    samples = json.loads((out / "samples.json").read_text())
    assert all(row["text"].strip() in page.text for row in samples[0]["texts"])
    assert [tag for tag, _ in page.elements].count("svg") == 1
    assert {"sd(u), nats; 0 at the posterior", "loss", "training draws", "held out"} <= set(map(str.strip, page.words))


def test_a_report_of_a_comparison(runs, there):
    out = there / "out" / "compared"
    page = self_contained(out / "report.html")
    saved = json.loads((out / "comparison.json").read_text())
    for row in saved["rows"]:
        assert row["name"] in page.text
    assert f"{saved['rows'][0]['density_tv']:.3f}" in page.text
    assert all(" ".join(note.split()) in page.text for note in saved["notes"])
    assert [tag for tag, _ in page.elements].count("svg") == 1  # the bars; nothing was trained
    assert "TV of draws to the exact posterior" in map(str.strip, page.words)
    assert out.joinpath("report.html").name in manifest(out)


HOSTILE = "<script>alert('x')</script><img src=http://example.com/a.png onerror=1>&amp; {{ 7 * 7 }}"


def test_texts_are_shown_as_they_are(tmp_path):
    """Whatever a language model writes, or a user types, is text on the page."""
    with Record(tmp_path, "train", {"model": HOSTILE, "set": [HOSTILE], "seed": 0}) as record:
        record.results["shown"] = HOSTILE
        record.entry["argv"] = ["lmppl", "train", HOSTILE]
    Comparison([Row("<i>a&lt;", ess=0.5, draws_tv=0.2), Row("b", ess=0.7, draws_tv=0.1)], notes=[HOSTILE]).save(
        tmp_path
    )
    texts = [{"text": HOSTILE, "probability": 0.5, "exact": None}]
    with writing(tmp_path, "samples") as fresh:
        (fresh / "samples.json").write_text(json.dumps([{"observation": HOSTILE, "texts": texts}]))
    page = self_contained(write_report(tmp_path))
    assert page.text.count(HOSTILE) >= 7 and "49" not in page.text
    assert page.text.count("<i>a&lt;") == 4  # in two tables and two panels
    assert not [tag for tag, _ in page.elements if tag in ("img", "script")]


def test_a_long_text_is_cut_and_a_large_picture_is_named(tmp_path):
    rows = [{"text": "word " * 10_000, "probability": 0.5, "exact": 0.25}] * 6
    with writing(tmp_path, "samples") as fresh:
        (fresh / "samples.json").write_text(json.dumps([{"observation": "x", "texts": rows}] * 16))
    with writing(tmp_path, "pictures") as fresh:
        (fresh / "large.png").write_bytes(b"\x89PNG" * 500_000)
        (fresh / "small.png").write_bytes(b"\x89PNG")
    (tmp_path / "run.jsonl").write_text(
        "".join(f'{{"step": {i}, "loss": {i}.5, "sd_u": null}}\n' for i in range(9_000))
    )
    page = self_contained(write_report(tmp_path))
    assert "Too large for this page: large.png." in page.text and "9,000 steps in the log." in page.text
    assert "No command is recorded in this directory" in page.text and "exact 0.250" in page.text
    assert [a["alt"] for tag, a in page.elements if tag == "img"] == ["small.png"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "there is no run of train or compare here"),
        ({"other.txt": "x"}, "there is no run of train or compare here"),
        ({"run.jsonl": "years of work\n"}, "run.jsonl: it is no log of a training"),
        ({"run.jsonl": '{"step": 0}\n', "samples.json": "{"}, "samples.json: it is no JSON"),
        ({"comparison.json": "{}"}, "comparison.json: it is no comparison of this version"),
        ({"comparison.json": '{"rows": [{"nme": 1}], "curves": []}'}, "comparison.json: it is no comparison"),
        ({"comparison.json": "[" * 100_000}, "comparison.json: it is no JSON"),
        (
            {"comparison.json": json.dumps(Comparison([]).to_json() | {"rows": [{"name": "a", "ess": "x"}]})},
            "comparison.json: it is no comparison",
        ),
        ({"run.jsonl": "[1]\n"}, "run.jsonl: it is no log of a training"),
        ({"run.jsonl": '{"loss": 1}\n'}, "run.jsonl: it is no log of a training"),
        ({"run.jsonl": '{"step": 0, "loss": "x"}\n{"step": 1, "loss": 1}\n'}, "run.jsonl: it is no log of a training"),
        ({"run.jsonl": '{"step": 0}\n', "samples.json": '{"a": 1}'}, "samples.json: it is no samples"),
        (
            {"run.jsonl": '{"step": 0}\n', "samples.json": '[{"observation": "x", "texts": [{}]}]'},
            "samples.json: it is no",
        ),
        ({"command.json": '{"format": "lmppl command 1", "commands": [1]}'}, "command.json: it is no record"),
        (
            {"command.json": '{"format": "lmppl command 1", "commands": [{"status": "finished", "settings": {}}]}'},
            "command.json: it is no record",
        ),
        ({"command.json": '{"format": "other"}'}, "command.json is no record of a command of lmppl"),
        ({"run.jsonl": '{"step": 0, "loss": 1.0}\n', "report.html": "mine"}, "report.html was not written by lmppl"),
    ],
)
def test_a_directory_that_is_no_run_is_refused(tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    run = lmppl_command(f"lmppl report {tmp_path}")
    assert run.returncode == 1 and said in run.err and run.err.count("\n") == 1, run.err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files
    with pytest.raises(Failure, match="there is no such directory"):
        report(tmp_path / "nowhere")


def test_a_comparison_whose_curves_have_no_finite_figure_has_a_report(tmp_path):
    point = {"name": "a", "budget": 1, "num_particles": 1, "query_tokens": 9.0, "seconds": 1.0, "draws_tv": None}
    curves = [Point(**point, log_evidence_error=float("inf"))]
    Comparison([Row("a", ess=0.5)], curves=curves).save(tmp_path)
    page = self_contained(write_report(tmp_path))
    assert [tag for tag, _ in page.elements].count("svg") == 1  # the bars


def test_a_picture_that_is_a_link_is_not_in_the_report(tmp_path):
    """What it leads to may be secret, and the page is made to be sent."""
    (tmp_path / "secret").write_bytes(b"secret")
    out = tmp_path / "out"
    with writing(out, "picture") as fresh:
        (fresh / "a.png").write_bytes(b"\x89PNG")
    (out / "run.jsonl").write_text('{"step": 0}\n')
    (out / "a.png").unlink()
    (out / "a.png").symlink_to(tmp_path / "secret")
    assert not [tag for tag, _ in self_contained(write_report(out)).elements if tag == "img"]


def test_a_log_that_is_being_written_has_a_report(tmp_path):
    (tmp_path / "run.jsonl").write_text('{"step": 0, "loss": 2.0}\n{"step": 1, "lo')
    page = self_contained(write_report(tmp_path))
    assert "1 steps in the log." in page.text and "There has been no evaluation on held-out observations." in page.text


# -- completion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("lmppl tr", ["train"]),
        ("lmppl re", ["report"]),
        ("lmppl compare inf", ["infilling"]),
        ("lmppl train ", list(MODELS)),
        ("lmppl train nonsense", []),
        (
            "lmppl compare infilling --algorithms smc,",
            ["smc,importance", "smc,gflownet", "smc,mcmc", "smc,wake-sleep", "smc,ppo"],
        ),
        ("lmppl compare infilling --algorithms g", ["gflownet"]),
        ("lmppl train continuation --set ", ["temperature=", "max_tokens="]),
        ("lmppl sample infilling --setting ", ["posterior", "paper"]),
        ("lmppl train infilling --dtype b", ["bfloat16"]),
    ],
)
def test_the_shell_completes(monkeypatch, line, completed):
    words = line.split(" ")
    monkeypatch.setenv("_LMPPL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    assert [name for name in lmppl_command("lmppl").out.splitlines() if name] == completed


def test_the_script_of_completion_is_shown(monkeypatch):
    monkeypatch.setattr("shellingham.detect_shell", lambda *args: ("bash", "/bin/bash"))  # a test may run in none
    run = lmppl_command("lmppl --show-completion")
    assert run.returncode == 0 and "_LMPPL_COMPLETE=complete_bash" in run.out and "lmppl" in run.out


def test_the_exit_codes_are_in_the_help():
    said = " ".join(lmppl_command("lmppl --help").out.split())
    assert " ".join(cli.EXIT_CODES.split()) in said
    codes = re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)
    assert codes == ["0", "1", "2", "130", "143"] and all(code in cli.EXIT_CODES for code in codes)
