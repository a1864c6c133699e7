"""The studies of explicit targets, short: what holds after three steps too."""

from __future__ import annotations

import pytest

from benchmarks.paper import STUDIES

STUDY = {study.name: study for study in STUDIES}


def short(name: str) -> dict[str, list[dict]]:
    """Every cell of a study, once."""
    return {cell: [STUDY[name].run(cell, 0, True)] for cell in STUDY[name].cells}


@pytest.mark.slow
def test_the_language_model_satisfies_as_often_as_the_evidence_says():
    found = short("constrained")
    for constraint in ("lexical", "regex"):
        (sampling,) = found[f"{constraint}-sampling"]
        assert sampling["language model"]["inside"] == pytest.approx(sampling["evidence"], rel=1e-3)
        # TV to a conditional is the mass outside, where q is p itself.
        assert sampling["language model"]["tv"] == pytest.approx(1 - sampling["evidence"], rel=1e-3)
        assert sampling["locally masked"]["inside"] == pytest.approx(1.0, abs=1e-3)
    assert found["lexical-sampling"][0]["importance sampling"]["ess"] < 0.1
    states(STUDY["constrained"].report(found), claims=3)


@pytest.mark.slow
def test_all_of_the_contrastive_target_is_counted():
    found = short("contrastive")
    (sampling,) = found["sampling"]
    assert sampling["language model"]["inside"] == pytest.approx(1.0, abs=1e-3)
    assert all(z > -1e-3 for z in sampling["log_z"])  # b D_a is not negative
    for cell in ("GFlowNet", "PPO"):
        (trained,) = found[cell]
        assert trained["inside"] == pytest.approx(1.0, abs=1e-3) and 0 < trained["tv"] < 1
        assert trained["target_perplexity"] > 100
    states(STUDY["contrastive"].report(found), claims=2)


@pytest.mark.slow
def test_every_row_of_the_preferences_is_a_distribution_of_all_texts():
    """Masses add up to one; no power of one utility is the language model; the first is the exact row of power 1."""
    found = short("preferences")
    (exact,) = found["exact"]
    figures = [exact[name] for name in exact if isinstance(exact[name], dict)] + exact["swept"]
    for f in [*figures, *(runs[0] for cell, runs in found.items() if cell != "exact")]:
        assert sum(map(sum, f["cells"])) == pytest.approx(1.0, abs=1e-3) and 0 <= f["tv"] < 1
    assert exact["exact mixture"]["tv"] == pytest.approx(0.0, abs=1e-9)
    assert exact["language model"]["preferred"] == pytest.approx([0.5] * 3, abs=1e-3)
    tilted = {f["tilt"]: f for f in exact["swept"]}
    assert tilted[0.0]["tv"] == pytest.approx(exact["language model"]["tv"], abs=1e-3)
    assert tilted[1.0]["tv"] == pytest.approx(exact["one utility, exact"]["tv"])
    assert exact["one utility, nearest power, exact"]["tv"] == min(f["tv"] for f in exact["swept"])
    told = STUDY["preferences"].report(found)
    assert told.count("seen**") == 3 and "| GFlowNet for each taste | " in told and "nan" not in told


@pytest.mark.slow
def test_the_thoughts_are_held_against_exact_figures():
    """A search of more children comes closer to the posterior; figures in their range; a verdict a claim."""
    found = short("thoughts")
    (exact,) = found["searched"]
    tv = [exact["small"][str(k)]["tv"] for k in (1, 2, 4, 8, 16, 64)]
    assert tv == sorted(tv, reverse=True) and tv[-1] < 0.05 and exact["small"]["None"]["tv"] == 0
    (bounds,) = found["bounds"]
    assert bounds["unexplored"] == pytest.approx(0.0, abs=1e-9)
    for point in found["trees, weighed"][0]["curve"]:
        assert all(0 <= m <= 1 for m in point["mass"]) and 0 <= point["vote"] <= 1
    for point in found["samplers"][0]["importance sampling"]["curve"]:
        assert 0 <= point["tv"] <= 1 and point["error"] >= 0
    told = STUDY["thoughts"].report(found)
    assert told.count("seen**") == 6 and "nan" not in told


def states(text: str, claims: int) -> None:
    """A verdict a claim, and no figure that is not one."""
    assert text.count("seen**") == claims and "| GFlowNet | " in text and "nan" not in text
