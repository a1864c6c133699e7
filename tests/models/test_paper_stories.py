"""The studies on the story language model: short runs, and by hand what their claims are computed from."""

from __future__ import annotations

import pytest
import torch
from precision import single

from benchmarks.paper import continuation, infilling, reverse
from lmppl import LanguageModel, embedded
from lmppl.inference import Enumeration
from lmppl.models import continuation as continuation_model
from lmppl.models import infilling as infilling_model


def short(study):
    return {cell: [study.run(cell, 0, True)] for cell in study.cells}


@pytest.mark.slow
def test_a_short_continuation():
    results = short(continuation.STUDY)
    rows = continuation.gathered(results)
    exact = [rows[continuation.EXACT, f"T = {t:g}"][0] for t in continuation.TEMPERATURES]  # colder and colder
    assert all(a["lm_tv"] < b["lm_tv"] for a, b in zip(exact, exact[1:], strict=False))
    # Tempering tokens leads away from the tempered sequence, see docs/continuation.md.
    assert all(r["token_temperature_tv"] > r["lm_tv"] for r in exact)
    assert exact[-1]["log_likelihood"] > exact[0]["log_likelihood"] + 0.5
    guides = [rows[continuation.GUIDE, f"T = {t:g}"][0]["tv"] for t in continuation.TEMPERATURES]
    assert guides[0] < 0.3 < guides[-1]  # hardly trained, they are the language model, near the mild targets alone
    assert rows["greedy", ""][0]["distance"] == 0 and rows["greedy", ""][0]["distinct"] == 1 / 8
    assert continuation.STUDY.report(results).count("**not seen**") == 4  # nothing is settled by one seed


def test_an_exact_target_is_the_enumeration_of_the_tempered_model():
    e = continuation_model.experiment(temperature=0.5)
    args = tuple(a[:2] for a in e.test)
    direct = Enumeration(e.model, mass=continuation.SHORT_MASS).run(*args)
    found = continuation.target(0.5, 2)
    assert found.log_evidence.tolist() == pytest.approx(direct.log_evidence.tolist(), rel=single())
    e = infilling_model.experiment(setting="paper")
    direct = e.exact.run(*(a[:4] for a in e.test))
    found = infilling.truth(4, infilling_model.PAPER_TEMPERATURE)
    assert found.log_evidence.tolist() == pytest.approx(direct.log_evidence.tolist(), rel=single())
    assert torch.allclose(found.probabilities, direct.probabilities, rtol=0, atol=single(10))


def point(log_likelihood, distance, family="usual", setting="", **others):
    return {"log_likelihood": log_likelihood, "distance": distance, "family": family, "setting": setting} | others


def test_diversity_at_equal_likelihood_by_hand():
    curve = [point(-5, 0.2), point(-7, 0.6), point(-6, 0.5)]
    at = [continuation.diversity_at(curve, u) for u in (-7.5, -7, -6.5, -6, -5.25, -5, -4.9)]
    assert at[:-1] == pytest.approx([0.6, 0.6, 0.55, 0.5, 0.275, 0.2]) and at[-1] is None
    two = [0, 0.02]  # seeds
    rows = {
        (continuation.GUIDE, f"T = {i}"): [point(p["log_likelihood"], p["distance"] + d) for d in two]
        for i, p in enumerate(curve)
    }
    usual = {"dull": (-6.5, 0.3), "lively": (-6.5, 0.8), "sharp": (-4, 0.1), "alike": (-6.5, 0.55)}
    rows |= {(name, ""): [point(u, d + s) for s in two] for name, (u, d) in usual.items()}
    found = continuation.versus(rows)
    assert found == {"behind": ["dull"], "ahead": ["lively"], "even": ["alike"], "beyond": ["sharp"]}


@pytest.mark.slow
def test_a_short_infilling():
    pytest.importorskip("nltk")
    results = short(infilling.STUDY)
    prior, exact = results[infilling.PRIOR][0], results[infilling.EXACT][0]
    assert prior["tv"] > 0.9 and exact["tv"] == 0 < exact["tv_paper"] < 0.1
    assert exact["story"] > prior["story"] + 5  # most middles of the prior do not fit the ending
    for key in ("bleu", "gleu", "bert"):
        assert exact[key] > prior[key]
    assert all(results[cell][0]["tv"] > 0.8 for cell in (infilling.ASKED, infilling.GUIDE, infilling.TEMPERED))
    assert "the posterior p(z|x, y)" in infilling.STUDY.report(results)


@pytest.mark.slow
def test_a_short_reverse():
    results = short(reverse.STUDY)
    prior, exact = results[reverse.PRIOR][0], results[reverse.EXACT][0]
    assert 0.4 < prior["tv"] < 0.7 and exact["tv"] == 0
    assert exact["draws_tv"] < prior["draws_tv"] and exact["story"] > prior["story"]
    assert exact["unexplored"] < 0.0025
    assert "TV at most 0.05" in reverse.STUDY.report(results)


def test_a_draw_that_is_no_text_resembles_another_story():
    lm = LanguageModel.embedded("stories")
    told = [s.z for s in embedded.data("stories", "test")[:2]]
    assert not infilling.spelled(lm, "HeShe.") and not infilling.spelled(lm, "") and infilling.spelled(lm, told[0])
    assert infilling.resemblance(lm, told, told) == pytest.approx(1.0, abs=1e-3)
    assert infilling.resemblance(lm, [told[0], "HeShe."], told) == pytest.approx(0.5, abs=1e-3)
