"""The runner of the paper's experiments: what it keeps, what it does again, what its page says."""

import json
import math
import sys

import pytest
import torch
from scipy.stats import ttest_rel

from benchmarks import paper
from benchmarks.paper import STUDIES, __main__, runner
from benchmarks.paper.study import Study, markdown, paired, spread, verdict

RUNS: list[tuple[str, int]] = []


def toss(cell, seed, short):
    RUNS.append((cell, seed))
    if cell == "broken":
        raise RuntimeError("this cell fails")
    return {"mean": torch.rand(()).item(), "infinite": None}


def report(results):
    return markdown(("cell", "mean"), [(c, spread(runs, "mean")) for c, runs in results.items()])


class HerePool:
    """Runs work where it is submitted: the studies of a test exist in this process alone."""

    def __init__(self, jobs, mp_context):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def submit(self, work, *args):
        from concurrent.futures import Future

        future = Future()
        try:
            future.set_result(work(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the command on one study with these cells; its exit status and page."""
    monkeypatch.setattr(runner, "ProcessPoolExecutor", HerePool)

    def command(*cells, seeds=2, paired=True):
        RUNS.clear()
        monkeypatch.setattr(paper, "STUDIES", (Study("coin", "A coin", cells, toss, report, paired=paired),))
        out = tmp_path / "results.md"
        monkeypatch.setattr(
            sys, "argv", ["paper", "--seeds", str(seeds), "--runs", str(tmp_path / "runs"), "--out", str(out)]
        )
        with pytest.raises(SystemExit) as exit:
            __main__.main()
        return exit.value.code, out.read_text()

    return command


def test_what_was_run_is_kept_and_only_the_rest_is_run(run, tmp_path):
    status, page = run("heads", seeds=1)
    assert not status and RUNS == [("heads", 0)]
    torch.manual_seed(0)
    assert f"{torch.rand(()).item():.3f}" in page  # the seed is set before each cell
    status, longer = run("heads", "tails", seeds=2)
    assert not status and RUNS == [("tails", 0), ("heads", 1), ("tails", 1)]
    assert run("heads", "tails", seeds=2) == (False, longer) and RUNS == []
    kept = json.loads((tmp_path / "runs" / "coin" / "heads.1.json").read_text())["found"]
    assert set(kept) == {"mean", "infinite"}


def test_a_cell_that_fails_stops_no_other_and_the_page_says_what_lacks(run, capsys):
    status, page = run("broken", "heads", seeds=1)
    assert status and "this cell fails" in capsys.readouterr().err
    assert RUNS == [("broken", 0), ("heads", 0)]
    assert "Not complete: 0 of 1 seeds have run." in page and "| heads |" not in page


def test_a_study_that_is_not_paired_shows_what_there_is_of_each_cell(run):
    run("heads", seeds=2, paired=False)
    _, page = run("broken", "heads", seeds=2, paired=False)
    assert (
        "Not complete. Seeds that have run, of 2: broken 0; heads 2." in page
        and "| heads |" in page
        and "| broken |" not in page
    )
    assert "2 seeds." in run("heads", seeds=2, paired=False)[1] and RUNS == []


def test_a_report_gets_the_cells_of_the_studies_beside_it(tmp_path):
    first, second = (
        Study(name, name, ("heads",), toss, report, beside=beside)
        for name, beside in (("coin", ()), ("die", ("coin",)))
    )
    for study, value in ((first, 0.25), (second, 0.5)):
        path = runner.path_of(study, "heads", 0, tmp_path)
        path.parent.mkdir()
        path.write_text(json.dumps({"seconds": 1.0, "found": {"mean": value}}))
    runner.page((first, second), "", 1, tmp_path, tmp_path / "page.md")
    ours, theirs = (tmp_path / "page.md").read_text().split("## die")
    assert "| heads | 0.250 |" in ours and ":" not in ours
    assert "| heads | 0.500 |" in theirs and "| coin: heads | 0.250 |" in theirs


def test_an_unknown_experiment_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["paper", "--only", "coins"])
    with pytest.raises(SystemExit):
        __main__.main()
    assert "no experiment is called coins" in capsys.readouterr().err


def test_paired_is_the_interval_of_a_paired_t_test():
    ours, theirs = [0.9, 0.7, 0.8, 0.95], [0.6, 0.65, 0.9, 0.5]
    mean, half = paired(ours, theirs)
    interval = ttest_rel(ours, theirs).confidence_interval(0.95)
    assert mean - half == pytest.approx(interval.low) and mean + half == pytest.approx(interval.high)
    assert paired([1.0], [0.5]) == (0.5, math.inf)


def test_figures_as_they_are_shown():
    runs = [{"tv": 0.02, "kl": 1e-5, "far": None}, {"tv": 0.04, "kl": 3e-5, "far": 1.0}]
    assert spread(runs, "tv") == "0.030 (0.014)"
    assert spread(runs, "tv", 1, 100) == "3.0 (1.4)"
    assert spread(runs[:1], "kl") == "1.0e-05"
    assert spread(runs, "far") == "infinite"
    assert verdict("It leads", None, "No rival.") == "- *It leads*: **not testable here**. No rival.\n"


def test_names_of_studies_and_cells_can_be_files():
    names = [s.name for s in STUDIES]
    assert len(set(names)) == len(names)
    for study in STUDIES:
        assert len(set(study.cells)) == len(study.cells) and not any("/" in c for c in study.cells)


def test_the_table_of_claims_lists_what_was_not_seen():
    seen, missed, open_ = (verdict(c, s, "because") for c, s in (("a", True), ("b, c", False), ("d", None)))
    one = f"## One\n\ntext\n{seen}{missed}{open_}"
    table = runner.claims([one, "## None\n\n- *a*: no verdict", f"## Two\n\n{seen}"])
    assert table.splitlines()[2:] == ["| One | 1 of 3 | b, c; d (not testable here) |", "| Two | 1 of 1 |  |"]
