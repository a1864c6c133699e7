"""docs/uncertainty.md: what its first lines and the row in docs/results.md say is what its tables say."""

from __future__ import annotations

import re

import pytest
from markdown_tables import tables
from paths import ROOT

from benchmarks.paper.__main__ import BEYOND, beyond
from benchmarks.uncertainty.__main__ import PREAMBLE

PAGE = (ROOT / "docs" / "uncertainty.md").read_text()
SAID = " ".join(PAGE.split("## What is computed")[0].split())


TEN, _, FOUND, _, FEW = tables(PAGE)


def of(table, row, column, digits=2):
    """A mean, rounded further; of several rows their range, where they differ."""
    rows = row if isinstance(row, tuple) else (row,)
    columns = column if isinstance(column, tuple) else (column,)
    means = sorted(float(table[r, c].split(" ")[0]) for r in rows for c in columns)
    shown = [f"{m:.{digits}f}" for m in (means[0], means[-1])]
    return shown[0] if len(means) == 1 else f"{shown[0]} to {shown[1]}"


def forecast(row, column="AUROC of errors", digits=2):
    return of(TEN, row, column, digits)


def finds(row, column):
    return of(FOUND, row, column)


PARTS = "expected entropy", "chain information", "parameter information"
SURER = "accuracy on the surer half"
ONE, FIVE, VOTES, SGLD = (
    "all chains, one adapter", "all chains, five adapters", "votes of 32 chains", "all chains, five samples of SGLD",
)  # fmt: skip


def few(row):
    return of(FEW, row, "2", 3)


def test_the_page_begins_with_what_the_command_writes():
    hours = re.search(r"([\d.]+) core-hours", PAGE)
    assert hours and PAGE.startswith(PREAMBLE.format(seeds=5, hours=float(hours[1])))


@pytest.mark.parametrize(
    "sentence",
    [
        f"AUROC of its own errors is {forecast(ONE)} by all chains of one adapter and {forecast(FIVE)} of five, "
        f"{forecast(VOTES)} by self-consistency votes, {forecast('one chain')} by one chain, "
        f"{forecast('direct, one adapter')} by the direct answer of one adapter and "
        f"{forecast('direct, five adapters')} of five",
        f"{forecast(FIVE, SURER, 1)}% right with five adapters, {forecast(VOTES, SURER, 1)} by votes, "
        f"{forecast('direct, one adapter', SURER, 1)} directly",
        f"32 chains of p(z|x) are better than 32 of the guide ({forecast('mean of 32 chains')} and "
        f"{forecast('32 chains of the guide')})",
        f"({forecast(SGLD)}, with the best log score of all, {forecast(SGLD, 'log score')})",
        f"ECE is {forecast(ONE, 'ECE')} with 10 labels, where chance alone would give "
        f"{forecast(ONE, 'ECE by chance')}, and {forecast('direct, one adapter', 'ECE')} for the direct answer",
        f"(kinds without a label {finds(PARTS[2], 'unlearnt kinds')}), but so do expected entropy and chain "
        f"information ({finds(PARTS[0], 'unlearnt kinds')}, {finds(PARTS[1], 'unlearnt kinds')}), and each part finds "
        f"errors as well as their sum ({finds(PARTS, 'errors')})",
        "No part of five adapters' entropy separates shuffled sentences, or sentences of three kinds, well from test "
        f"sentences ({finds(PARTS, ('three kinds', 'word order'))}; three kinds by samples of SGLD "
        f"{finds('samples of SGLD: parameter information', 'three kinds')})",
        f"Expected entropy finds idle words ({finds(PARTS[0], 'idle words')})",
        "log p(x) of the language model finds all three "
        f"({finds('-log p(x), no answer asked', ('three kinds', 'word order', 'idle words'))}) and no errors "
        f"({finds('-log p(x), no answer asked', 'errors')})",
        f"parameter information comes out at {few('parameter information, plug-in, mean')} nats instead of "
        f"{of(FEW, 'parameter information, plug-in, mean', 'all', 3)}, chain information at "
        f"{few('chain information, plug-in, mean')} instead of "
        f"{of(FEW, 'chain information, plug-in, mean', 'all', 3)}",
        f"The jackknife gives {few('parameter information, jackknife, mean')} and "
        f"{few('chain information, jackknife, mean')}",
        f"disagree little, by {of(FEW, 'parameter information, plug-in, mean', 'all', 2)} nats",
    ],
)
def test_what_the_first_lines_say_is_in_the_tables(sentence):
    assert sentence in SAID


def test_no_prediction_has_a_better_log_score_than_the_one_that_is_said_to():
    scores = {row: float(cell.split(" ")[0]) for (row, c), cell in TEN.items() if c == "log score" and cell[0] == "-"}
    assert max(scores, key=lambda row: scores[row]) == SGLD


def test_the_claims_are_counted():
    verdicts = re.findall(r"^- \*.*?\*: \*\*(seen|not seen)\*\*", PAGE, re.MULTILINE)
    assert len(verdicts) == 15 and "with fifteen claims" in SAID
    assert verdicts[:8].count("seen") == 2 and "of eight such comparisons two hold at 95%, both at 50 labels" in SAID
    assert all("50 labels" in line for line in PAGE.splitlines() if line.startswith("- *chains") and "**seen**" in line)


def test_what_is_said_of_the_pretrained_model_is_in_its_records():
    """On the page of its results, which is made from them."""
    page = (ROOT / "docs" / "results-pretrained.md").read_text().split("## Uncertainty of the labels")[1]
    (table, *_) = (
        dict((row.split(" | ")[0].strip("| "), row.split(" | ")) for row in block.splitlines())
        for block in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    )
    said = " ".join(PAGE.split("## On SmolLM2")[1].split("## ")[0].split())

    def area(row):
        assert table[row][1:3] == ["entropy", "300"]
        return table[row][4]

    chains, direct = "10 labels, 10 chains of GFlowNet + EM", "10 labels, direct"
    assert f"untrained {area('untrained, 10 chains')} by chains, {area('untrained, direct')} by the direct" in said
    assert f"10 labels {area(chains)} by chains of GFlowNet + EM, which are right on {table[chains][3]}%, and " in said
    assert f"{area(direct)} by the direct answers of supervised adapters, right on {table[direct][3]}%." in said
    assert page.count("know their errors better than the direct answer*: **not seen**") == 2


def test_the_row_in_the_results_says_the_same():
    five = "direct answers, five adapters each, 10 labels"
    gain = re.search(rf"{five}\*.*?AUROC ([+-][\d.]+) ± ([\d.]+)", PAGE)
    assert gain
    said = dict((name, found) for name, _, found in BEYOND)["uncertainty"]
    assert said.startswith(
        f"AUROC of its errors {forecast(FIVE)} by all chains of five adapters, {forecast('direct, five adapters')} by "
        f"their direct answers (10 labels, five seeds: {float(gain[1]):+.2f} ± {float(gain[2]):.2f})"
    )
    page = (ROOT / "docs" / "results.md").read_text().splitlines()
    rows = [row for row in beyond().splitlines() if "{" not in row]  # the others: test_study_pages.py
    assert len(rows) == 4 and all(row in page for row in rows)
