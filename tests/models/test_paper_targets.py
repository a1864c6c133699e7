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


def states(text: str, claims: int) -> None:
    """A verdict a claim, and no figure that is not one."""
    assert text.count("seen**") == claims and "| GFlowNet | " in text and "nan" not in text
