"""The paper's experiments on a pretrained model: the command, on a tiny one, and short studies."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import paper_pretrained
from benchmarks.paper_pretrained import Place, __main__, continuation, on_checkpoint, random_number
from lmppl import LanguageModel, embedded
from lmppl.embedded.numbers import FIXED
from lmppl.models import RandomNumber
from lmppl.models.continuation import embedded_prompts
from lmppl.models.programs.random_number import tensors

NUMBERS = embedded.path("numbers")


def of(study, lm, data=None, seed=0):
    """Every cell of a study, once and short."""
    return {cell: [study.run(cell, seed, True, lm, data)] for cell in study.cells}


def states(study, results):
    """A report of these results: no figure that is not one, and a verdict or more."""
    text = study.report(results)
    assert "nan" not in text and "seen**" in text
    return text


def test_the_random_number_runs_on_any_language_model():
    results = of(random_number.STUDY, LanguageModel.embedded("numbers"))
    assert results[random_number.PRIOR][0]["forward"] == pytest.approx(2.1533, abs=1e-3)
    for found in results.values():
        assert sum(found[0]["q"]) == pytest.approx(found[0]["valid"], rel=1e-5)
    assert all(results[cell][0]["tokens"] > 0 for cell in random_number.CELLS[1:])
    text = states(random_number.STUDY, results)
    assert all(f"| {cell} |" in text for cell in random_number.CELLS)
    states(random_number.STUDY, {random_number.PRIOR: results[random_number.PRIOR]})  # of what there is


def test_answers_that_are_invalid_keep_their_proportions():
    lm = LanguageModel.embedded("numbers", dtype=torch.float64)
    task, z = RandomNumber(lm, invalid=-6.0), lm.encode(["42.", "7.", "007", "0."])[:, None]
    asked = tensors([FIXED])
    from pyro import condition, poutine

    def log_joint(text):
        return poutine.trace(condition(task.model, {"z": text})).get_trace(*asked).log_prob_sum().item()

    log_p = task.completion(lm, *asked).log_prob(z)[:, 0]
    assert [log_joint(text) for text in z] == pytest.approx([0.0, 0.0, log_p[2].item() - 6.0, 0.0], abs=1e-9)


@pytest.fixture
def stories(tmp_path, monkeypatch):
    """The embedded stories' language model, and a folder of data with their beginnings."""
    monkeypatch.setattr(continuation, "LIMIT", {"max_tokens": 5})
    monkeypatch.setattr(continuation, "TEST", 2)
    (tmp_path / "prompts").mkdir()
    lines = [p.replace("\n", " ") for part in embedded_prompts() for p in part][:12]
    (tmp_path / "prompts" / "prompts.txt").write_text("\n".join(lines))
    return LanguageModel.embedded("stories"), tmp_path


def test_continuation_runs_on_any_language_model(stories):
    results = of(continuation.STUDY, *stories)
    text = states(continuation.STUDY, results)
    assert all(f"| {family} |" in text for family in ("greedy", "nucleus", "power sampling", "SMC", "GFlowNet"))
    states(continuation.STUDY, {cell: results[cell] for cell in ("decoding", "T=0.9")})
    states(continuation.STUDY, {"T=0.9": results["T=0.9"]})


def test_texts_of_a_continuation_have_plain_tokens_alone(stories):
    """By every method; so log p, of which the mask is a part, is finite."""
    lm, data = stories
    for cell in ("decoding", continuation.POWER, "T=0.8"):
        for row in continuation.run(cell, 0, True, lm, data)["rows"]:
            assert all(torch.tensor(row["each"]["log_likelihood"]).isfinite()), row["family"]
            assert not any("\n" in text for text in row["texts"])


def test_a_unit_counts_its_tokens():
    study = on_checkpoint(random_number.STUDY)
    found = study.run(random_number.PRIOR, 0, True, Place(NUMBERS))
    assert 101 < found["scored"] < 1000


@pytest.mark.parametrize(
    "given, says",
    [
        (["--lm", "nowhere"], "--lm: there is no checkpoint at nowhere"),
        (["--lm", str(NUMBERS), "--only", "dice"], "no experiment is called dice"),
    ],
)
def test_what_is_absent_is_named(given, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["paper_pretrained", *given])
    with pytest.raises(SystemExit) as exit:
        __main__.main()
    assert exit.value.code == 2 and says in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", [s.name for s in paper_pretrained.STUDIES if not s.needs])
def test_a_study_runs_on_a_pretrained_model(name, smollm2_lm):
    (study,) = (s for s in (random_number.STUDY,) if s.name == name)
    states(study, of(study, smollm2_lm))
