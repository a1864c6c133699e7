"""docs/preferences.md, transfer.md and thoughts.md: the figures of their text are those of docs/results.md."""

from __future__ import annotations

import re
from decimal import Decimal

import pytest
from markdown_tables import mean, rounds_to, says, section, tables
from paths import ROOT

from benchmarks.paper import STUDIES, __main__, preferences, runner, thoughts, transfer
from benchmarks.paper.__main__ import BEYOND, beyond
from benchmarks.paper.study import Told

RESULTS = (ROOT / "docs" / "results.md").read_text()
RECORDS = __main__.RECORDS
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("preferences", "transfer", "thoughts")}
SECTIONS = {s.name: section(RESULTS, s.title) for s in STUDIES if s.name in PAGES}


def number(name: str, pattern: str) -> Decimal:
    """The number in a sentence of a section of docs/results.md."""
    found = re.search(pattern, SECTIONS[name])
    assert found, pattern
    return mean(found[1])


def seeds(name: str) -> Decimal:
    """How many seeds the section says that it has; all five if it says nothing."""
    found = re.search(
        r"^(?:Not complete: |Not complete\. Seeds that have run, of 5: )?(\d)\b", SECTIONS[name], re.MULTILINE
    )
    return Decimal(found[1]) if found else Decimal(5)


# -- preferences ---------------------------------------------------------------------------------------------------

(METHODS,) = tables(SECTIONS["preferences"])
MAJORITY, SECOND, MINORITY = "old cake", "new cake", "small ball"


def method(row: str, column: str = "TV to the mixture") -> Decimal:
    return mean(METHODS[row, column])


def choices(row: str, kind: str) -> Decimal:
    return 100 * method(row, f"chosen by: {kind}")


def tokens(row: str) -> Decimal:
    return method(row, "training tokens") / 1000


ONE = preferences.FITTED, preferences.POOLED, preferences.MATCHED


@pytest.mark.parametrize(
    ("row", "of"),
    [
        ("exact mixture", (preferences.MIXTURE,)),
        ("GFlowNet that is told the taste", (preferences.GFLOWNET,)),
        ("language model", (preferences.PRIOR,)),
        ("one utility fitted to all: exact; GFlowNet; PPO with matched KL", ONE),
        ("the same to the power that comes nearest (1.75), exact", (preferences.NEAREST,)),
        ("a number for every sort of text, fitted to the same choices, exact", (preferences.SORTS,)),
        ("the mean of the kinds' utilities, exact", (preferences.MEAN,)),
        ("PPO, one utility, reward only", (preferences.REWARD,)),
        ("DPO on the choices", (preferences.DPO,)),
    ],
)
def test_the_table_of_the_preferences(row, of):
    (table,) = tables(PAGES["preferences"])
    for name, shown in zip(of, table[row, "TV to the mixture"].split("; "), strict=True):
        assert rounds_to(method(name), shown)
        for column, kind in (("has all that 60% like", MAJORITY), ("30%", SECOND), ("10%", MINORITY)):
            assert rounds_to(method(name, f"all of: {kind}"), table[row, column])


@pytest.mark.parametrize(
    ("sentence", "values"),
    [
        ("means of {} seeds", [seeds("preferences")]),
        (
            "the worst is at a total variation of {}",
            [number("preferences", r"for the worst of all tastes ([\d.]+)")],
        ),
        (
            "leaves {} of the mixture's {} texts",
            [method(preferences.REWARD, "effective texts"), method(preferences.MIXTURE, "effective texts")],
        ),
        ("with such numbers fitted to them the TV is {}", [method(preferences.SORTS)]),
        ("the mean utility is at {} and", [method(preferences.MEAN)]),
        (
            "({} nats for food, {} for old things",
            [number("preferences", r"cake ([\d.]+), ball"), number("preferences", r"old ([\d.]+), new")],
        ),
        ("{}% of the texts are not what the majority likes", [100 - 100 * method(ONE[0], f"all of: {MAJORITY}")]),
        (
            "to one of the language model in {}%, against {}% under one utility; the majority in {}% against {}%",
            [choices(row, kind) for kind in (MINORITY, MAJORITY) for row in (preferences.MIXTURE, ONE[0])],
        ),
        (
            "with probability {}, under one utility {}",
            [
                number("preferences", r"smallest kind likes: exact mixture ([\d.]+)"),
                number("preferences", r"one utility, exact ([\d.]+)\. The smallest cosine"),
            ],
        ),
        ("PPO for the reward pleases the majority in {}%", [choices(preferences.REWARD, MAJORITY)]),
        (
            "{} steps for the guide of all tastes, {} for the GFlowNet of one utility, {} for either PPO, {} for DPO",
            [Decimal(preferences.STEPS[c]) for c in (*preferences.CELLS[1:3], preferences.REWARD, preferences.DPO)],
        ),
        ("{}, {}, {}, {} and {} thousand tokens", [tokens(cell) for cell in preferences.CELLS[1:]]),
        (
            "its claim ({} to {}; half of the mixture's is {})",
            [
                number("preferences", r"The largest of a seed: GFlowNet, one utility ([\d.]+)"),
                number("preferences", r"DPO ([\d.]+)\.\n"),
                number("preferences", r"The share of texts for it is ([\d.]+) in the mixture") / 2,
            ],
        ),
        ("(cosines of {}; the study prints them)", [number("preferences", r"language model is ([\d.]+); between")]),
        ("({} and more; `Preferences(names=...)`)", [number("preferences", r"reads instead it is ([\d.]+\d)")]),
    ],
)
def test_what_is_said_of_the_preferences(sentence, values):
    assert says(PAGES["preferences"], sentence, *values)


def test_words_for_figures_of_the_preferences():
    text = " ".join(PAGES["preferences"].split())
    assert "(TV below 0.001)" in text and method(preferences.OF_MIXTURE) < Decimal("0.001")
    share = method(preferences.MEAN, f"all of: {MINORITY}") / method(preferences.MIXTURE, f"all of: {MINORITY}")
    assert "a tenth of the minority's texts" in text and rounds_to(share, "0.1")


# -- transfer ------------------------------------------------------------------------------------------------------

FAMILIES, LEARNED, PROPOSALS = tables(SECTIONS["transfer"])
MANY, INFILLING, SCRATCH = (transfer.STARTS[cell] for cell in (transfer.MANY, transfer.SINGLE, transfer.SCRATCH))
(ENDS,) = (text for text in SECTIONS["transfer"].split("\n\n") if text.startswith("| target |"))


def learned(target: str, start: str, column: int) -> str:
    (row,) = (line for line in ENDS.splitlines() if line.startswith(f"| {target} | {start} |"))
    return row.split(" | ")[column].strip(" |")


def proposal(name: str, column: str = "TV of q") -> Decimal:
    return mean(PROPOSALS[transfer.SHOWN.get(name, name), column])


def both(*names: str) -> list[Decimal]:
    """TV and ESS/N of proposals."""
    return [proposal(name, column) for name in names for column in ("TV of q", "ESS/N")]


_, EVEN, ODD = transfer.ALONE
MIXTURE, OVER_PRIOR, PRODUCT, SUM = transfer.COMPOSED


@pytest.mark.parametrize("family", ["infilling", "reverse", "lexical", "tempered", "two endings"])
def test_the_table_of_the_transfer(family):
    table, row = tables(PAGES["transfer"])[0], family + " (never trained)" * (family == "two endings")
    columns = {
        "language model": "language model, seen",
        "one guide": "guide, seen",
        "on new verbs, words, temperatures": "guide, new",
    }
    for ours, column in columns.items():
        shown = table[family + ", never trained" * (family == "two endings"), ours]
        assert rounds_to(mean(FAMILIES[row, column]), shown)


@pytest.mark.parametrize(
    ("sentence", "values"),
    [
        ("after {} training tokens", [number("transfer", r"training read ([\d,]+) tokens")]),
        ("Told two endings at once it is at {}", [mean(FAMILIES["two endings (never trained)", "guide, seen"])]),
        ("it is at {} (ESS/N {}), with nothing trained", both(transfer.PARTS)),
        ("their product over the prior is at {}, with ESS/N {}", both(OVER_PRIOR)),
        (
            "Each alone is at {} and {}, with {} and {}",
            [proposal(name, column) for column in ("TV of q", "ESS/N") for name in (EVEN, ODD)],
        ),
        ("their mixture is at {} with {}", both(MIXTURE)),
        ("Without dividing by the prior it has {}", [proposal(PRODUCT, "ESS/N")]),
        ("is like one guide alone ({}, {})", both(SUM)),
        ("new words take {} training tokens to a TV of 0.05", [mean(learned("new words", MANY, 4))]),
        (
            "from scratch none does (more than {} tokens)",
            [mean(learned("new words", SCRATCH, 4).removeprefix("more than "))],
        ),
        (
            "{} from this guide, {} from infilling, {} from scratch",
            [mean(learned("two endings", start, 3)) for start in (MANY, INFILLING, SCRATCH)],
        ),
        (
            "took {} core-hours and {} million tokens",
            [
                number("transfer", r"scored, ([\d.]+) core-hours"),
                number("transfer", r"work, ([\d,]+) tokens") / 1_000_000,
            ],
        ),
    ],
)
def test_what_is_said_of_the_transfer(sentence, values):
    assert says(PAGES["transfer"], sentence, *values)


def test_words_for_figures_of_the_transfer():
    text = " ".join(PAGES["transfer"].split())
    assert "from a guide of infilling one seed of three comes so near" in text.lower()
    assert learned("new words", INFILLING, 4) == "1 of 3 seeds"
    assert "No start reaches this for two endings" in text
    assert all(learned("two endings", start, 4).startswith("more than") for start in (MANY, INFILLING, SCRATCH))
    near = [family for family, column in FAMILIES if column == "guide, seen" and mean(FAMILIES[family, column]) <= 0.05]
    assert "only reverse and lexical come so near" in text and near == ["reverse", "lexical"]


# -- thoughts ------------------------------------------------------------------------------------------------------

SMALL, LARGE, SEARCH = tables(SECTIONS["thoughts"])
FEW, SOME, MOST = thoughts.LARGE_BUDGETS


def vote(row: str, budget: int) -> Decimal:
    return mean(LARGE[row, f"{budget} tokens: vote"])


def error(row: str, budget: int) -> Decimal:
    return mean(LARGE[row, f"{budget}: error"])


def search(children: int) -> Decimal:
    return mean(SEARCH[str(children), "TV, large world"])


TREES, WEIGHED, PLAIN, CHAINS, SMC = (
    thoughts.TREES, thoughts.WEIGHED, thoughts.PLAIN, thoughts.CHAINS, thoughts.SMC_CHAINS,
)  # fmt: skip


@pytest.mark.parametrize("row", ["importance sampling", "SMC", "Metropolis", "GFlowNet"])
def test_the_small_table_of_the_thoughts(row):
    sites = ["Metropolis, a site", "Metropolis, a branch"]
    of = {"Metropolis": sites, "GFlowNet": [thoughts.GUIDED, thoughts.SMC_GUIDED]}
    table = next(t for t in tables(PAGES["thoughts"]) if ("SMC", "400") in t)
    for column, ours in (("150 tokens a question", "TV, 150 tokens"), ("400", "TV, 400 tokens")):
        (shown,) = (cell for (name, c), cell in table.items() if name.startswith(row) and c == column)
        for name, figure in zip(of.get(row, [row]), shown.split("; "), strict=True):
            assert rounds_to(mean(SMALL[name, ours]), figure)


@pytest.mark.parametrize("row", thoughts.ASKED)
def test_the_large_table_of_the_thoughts(row):
    table = next(t for t in tables(PAGES["thoughts"]) if (row, "vote is right") in t)
    for column, of in (("vote is right", vote), ("error of the mass on the right answer", error)):
        for budget, figure in zip(thoughts.LARGE_BUDGETS, table[row, column].split(", "), strict=True):
            assert rounds_to(of(row, budget), figure)


EXACT = (
    number("thoughts", r"weight of the right answer; ([\d.]+\d) for the exact posterior"),
    number("thoughts", r"largest weight is right; ([\d.]+\d) for the exact posterior"),
)


@pytest.mark.parametrize(
    ("sentence", "values"),
    [
        (
            "trees of four children vote right in {}, plain chains in {} (SMC over chains {})",
            [vote(name, FEW) for name in (TREES, PLAIN, SMC)],
        ),
        ("the TV is {} with four children, {} with 64", [search(4), search(64)]),
        (
            "SMC over the steps of chains is best ({} against {} for weighted trees)",
            [error(SMC, MOST), error(WEIGHED, MOST)],
        ),
        ("The exact posterior has {} on the right answer, and its vote is right in {}", [*EXACT]),
        (
            "with 32 draws {} before training, {} after it",
            [number("thoughts", r"it is ([\d.]+) before training"), number("thoughts", r"and ([\d.]+) after it")],
        ),
        ("takes 38 seconds and {} tokens", [number("thoughts", r"GFlowNet read ([\d,]+) tokens")]),
        ("the exact vote is right in {}", [EXACT[1]]),
        ("Up to 1,000 tokens it is not ({})", [vote(PLAIN, MOST)]),
        ("than weighted ones ({} against {})", [vote(TREES, MOST), vote(WEIGHED, MOST)]),
        ("estimate of the posterior ({} against {})", [error(WEIGHED, MOST), error(TREES, MOST)]),
        ("the search comes to a TV of {} and stays there", [search(64)]),
    ],
)
def test_what_is_said_of_the_thoughts(sentence, values):
    assert says(PAGES["thoughts"], sentence, *values)


@pytest.mark.parametrize(
    ("sentence", "budget", "rows"),
    [
        ("an error of {} and {} against {} to {}", FEW, ((WEIGHED, TREES), (PLAIN, CHAINS, SMC))),
        ("trees and weighted chains are level ({} to {})", SOME, ((TREES, WEIGHED, CHAINS, SMC),)),
    ],
)
def test_ranges_of_the_thoughts(sentence, budget, rows):
    first, *others = ([error(name, budget) for name in names] for names in rows)
    values = [first[0], first[1], min(others[0]), max(others[0])] if others else [min(first), max(first)]
    assert says(PAGES["thoughts"], sentence, *values)


def test_the_claims_of_the_thoughts_are_counted():
    assert "Two of six claims were seen" in " ".join(PAGES["thoughts"].split())
    assert (SECTIONS["thoughts"].count("**seen**"), SECTIONS["thoughts"].count("**not seen**")) == (2, 4)


# -- the first lines of docs/results.md ----------------------------------------------------------------------------

FOUND = {name: found for name, _, found in BEYOND if name in PAGES}
ROWS = {name: next(r for r in RESULTS.splitlines() if r.startswith(f"| [{name}.md]")).split(" | ")[2] for name in PAGES}
SEEN = [mean(FAMILIES[family, "guide, seen"]) for family in transfer.TRAINED]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (
            "preferences",
            [
                *(method(row) for row in (preferences.GFLOWNET, preferences.FITTED, preferences.NEAREST)),
                *(
                    method(row, f"all of: {MINORITY}")
                    for row in (preferences.MIXTURE, preferences.GFLOWNET, preferences.FITTED, preferences.NEAREST)
                ),
            ],
        ),
        (
            "transfer",
            [
                *(min(SEEN), max(SEEN), mean(FAMILIES["lexical", "guide, new"])),
                *(mean(FAMILIES["two endings (never trained)", "guide, seen"]), proposal(transfer.PARTS)),
            ],
        ),
        (
            "thoughts",
            [
                *(Decimal(FEW), vote(TREES, FEW), vote(PLAIN, FEW), *map(Decimal, thoughts.LARGE_BUDGETS)),
                *(error(name, budget) for name in (WEIGHED, SMC) for budget in thoughts.LARGE_BUDGETS),
                *(Decimal(64), search(64)),
            ],
        ),
    ],
)
def test_the_row_of_a_study_has_the_figures_of_its_section(name, values):
    figures = re.sub(r"\{thoughts_error_\w+\}", "{}, {}, {}", FOUND[name])  # one figure for each number of tokens
    sentence = re.sub(r"\{\w+\}", "{}", figures)
    assert says(ROWS[name], sentence, *values, seeds(name))


@pytest.mark.parametrize("name", PAGES)
def test_the_row_of_a_study_is_what_its_records_say(name):
    study = next(s for s in STUDIES if s.name == name)
    assert study.told is not None
    told = study.told(runner.section(study, runner.kept_of(study, 5, RECORDS), 5)[1])
    assert FOUND[name].format_map(Told(told)) == ROWS[name].removesuffix(" |")


def test_a_study_without_records_has_dashes_for_its_figures(tmp_path):
    runner.page(STUDIES, beyond(), 5, tmp_path, tmp_path / "results.md")
    rows = (tmp_path / "results.md").read_text().splitlines()
    for name in PAGES:
        row = next(r for r in rows if r.startswith(f"| [{name}.md]"))
        assert "–" in row and "{" not in row
