"""Arithmetic: the corpus and its gates, the calculator inside the model, votes and chains by hand, and the study."""

from __future__ import annotations

import json
from dataclasses import replace
from math import log
from random import Random

import pyro
import pytest
import torch
from paths import SHARED
from precision import single
from pyro import poutine
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.paper import arithmetic as study
from lmppl import LanguageModel, embedded
from lmppl.embedded import Question
from lmppl.embedded.arithmetic import MAX_TOKENS, SPLITS
from lmppl.inference import Enumeration, Importance
from lmppl.models import Arithmetic
from lmppl.models.arithmetic import (
    RECIPE,
    Prediction,
    experiment,
    is_right,
    read_file,
    read_questions,
    score,
    teach,
)
from lmppl.models.programs.arithmetic import number_in
from lmppl.tools import Calculator
from worlds import arithmetic as corpus
from worlds import build

REAL = SHARED / "data" / "arithmetic"
real_files = pytest.mark.skipif(not REAL.is_dir(), reason=f"no arithmetic files in {REAL}")
SUM = Question((6, 0, 4), "--")


@pytest.fixture(scope="module")
def lm():
    return LanguageModel.embedded("arithmetic", dtype=torch.float64)


@pytest.fixture(scope="module")
def plain():
    path = embedded.path("arithmetic")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval(), AutoTokenizer.from_pretrained(path)


# -- corpus and language model ---------------------------------------------------------------------------------------


def test_a_question_in_words(lm):
    assert SUM.x + SUM.chain + SUM.y == "Question: 6 - 0 - 4 = ? Answer: 6 - 0 = 6, 6 - 4 = 2. The answer is 2."
    below = Question((3, 9, 9), "--")
    for text in (SUM.x + SUM.chain + SUM.y, below.x + below.chain + below.y):
        assert lm.decode(lm.encode(text)) == text
    assert [lm.decode(t[None]) for t in lm.encode(below.chain)] == (
        [" 3", " -", " 9", " =", " -6", ",", " -6", " -", " 9", " =", " -15", "."]
    )
    five = lm.encode([q.chain for q in embedded.data("arithmetic", "test_5")])
    assert five.shape[-1] == MAX_TOKENS + 1  # its stop


def test_no_question_is_in_two_splits():
    splits = {name: embedded.data("arithmetic", name) for name in SPLITS}
    everything = [q for questions in splits.values() for q in questions]
    assert len(everything) == len(set(everything)) == 50 + 1000 + 200 + 3000
    for name, operands in {"rationales": {3, 4}, "train": {3, 4}, "test_3": {3}, "test_4": {4}, "test_5": {5}}.items():
        assert {len(q.operands) for q in splits[name]} == operands
    with pytest.raises(ValueError, match="split='test'"):
        embedded.data("arithmetic", "test")


def test_how_often_the_corpus_is_right():
    """Of two operands, a chain is right with probability p / (1 - dropped - stop); of four, p^3 / (1 - no step)."""
    random, n, p = Random(0), 20_000, corpus.STEPS
    skipped = p["dropped"]
    none = {2: skipped + p["stop"], 4: skipped**3 + p["stop"] * (1 + skipped + skipped**2)}
    for operands in (2, 4):
        right = 0
        for _ in range(n):
            q = corpus.draw(random, operands)
            right += corpus.written(q.operands[0], corpus.chain(random, q)) == q.chain
        expected = p["correct"] ** (operands - 1) / (1 - none[operands])
        assert abs(right / n - expected) < 5 * (expected * (1 - expected) / n) ** 0.5
    assert sum(p.values()) == pytest.approx(1)


@pytest.mark.slow
def test_the_gates_hold(plain):
    report = corpus.report(*plain)
    assert report.passed, report


def test_modes_are_found_by_a_coarse_search_too(plain):
    assert sum(file.stat().st_size for file in embedded.path("arithmetic").iterdir()) < 1e6
    question = embedded.data("arithmetic", "test_4")[0]
    coarse, fine = (corpus.explore(*plain, question, least) for least in (corpus.COARSE, 2e-3))
    assert coarse.mode == fine.mode == question.chain
    assert (coarse.log_prior + coarse.log_likelihood).max().exp() > corpus.COARSE  # which certifies it
    assert set(coarse.chains) < set(fine.chains) and fine.log_prior.exp().sum() < 1


def test_the_seed_decides_the_weights(tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        build.main(["arithmetic", "--seed", str(seed), "--steps", "1", "--check", "0", "--out", str(tmp_path / out)])
    a, b, c = (AutoModelForCausalLM.from_pretrained(tmp_path / out).state_dict() for out in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


# -- the model -------------------------------------------------------------------------------------------------------


def test_the_joint_is_that_of_plain_forward_passes(lm, plain):
    """Every chain that plain passes find, with its prior and likelihood, and the posterior's mode."""
    question = embedded.data("arithmetic", "validation")[0]
    found = corpus.explore(*plain, question, least=2e-3)
    assert len(found.chains) > 20
    task = Arithmetic(lm)
    x, y = task.encode([question])
    z = lm.encode(found.chains)[:, None]  # (chain, 1, L)
    torch.testing.assert_close(task.chain(lm, x).log_prob(z)[:, 0], found.log_prior.double(), atol=single(10), rtol=0)
    joint = [poutine.trace(poutine.condition(task.model, {"z": one})).get_trace(x, y).log_prob_sum() for one in z[:5]]
    expected = (found.log_prior + found.log_likelihood)[:5]
    torch.testing.assert_close(torch.stack(joint), expected.double(), atol=single(10), rtol=0)
    exact = Enumeration(task.model, mass=0.5).run(x, y)
    assert exact.table("z", 0)[0][0] == found.mode
    low, high = (bound.exp().item() for bound in exact.log_evidence_bounds)
    explored = (found.log_prior + found.log_likelihood).exp().sum().item()
    assert low <= explored + (1 - found.log_prior.exp().sum().item()) + 1e-3 and explored <= high + 1e-3


def test_the_calculators_tokens_are_certain_in_model_and_guide(lm):
    task = Arithmetic(lm, RECIPE.guide_lm(lm))
    question = Question((3, 9, 9, 1), "--+")
    x, y = task.encode([question])
    z = task.chains([question])
    results = (z == lm.token_id(" =")).nonzero()[:, 1] + 1
    assert lm.decode(z[0, results]) == " -6 -15 -14"
    wrong = z.clone()
    wrong[0, results[0]] = lm.token_id(" 6")
    for network in (lm, task.guide_lm):
        q = task.chain(network, x)
        assert (q.token_log_probs(z)[0, results] == 0).all()
        assert q.log_prob(z).isfinite().all() and q.log_prob(wrong).item() == -torch.inf
    for program in (task.model, task.guide):  # replayed
        run = poutine.trace(poutine.condition(program, {"z": wrong})).get_trace(x, y)
        assert run.nodes["z"]["fn"].log_prob(wrong).item() == -torch.inf
    torch.manual_seed(0)
    for given in task.predict(embedded.data("arithmetic", "test_5")[:20], lm):  # drawn
        for chain, _ in given:
            for step in chain.removesuffix(".").split(","):
                if (parts := step.split("=")) and len(parts) == 2 and parts[1]:
                    assert Calculator()(parts[0] + "=") == parts[1]


def test_a_guide_that_reads_the_answer(lm):
    task = Arithmetic(lm, lm, sees_answer=True)
    x, y = task.encode([SUM])
    q = poutine.trace(task.guide).get_trace(x, y).nodes["z"]["fn"]
    assert lm.decode(q.prompt[0]) == SUM.y + SUM.x
    with pytest.raises(ValueError, match="sees_answer"):
        task.predict([SUM])
    with pytest.raises(ValueError, match="guide_lm"):
        Arithmetic(lm).guide(x, y)


def test_the_papers_setting_squares_the_joint():
    posterior, paper = (experiment(setting=s, warm_start=0) for s in ("posterior", "paper"))
    x, y = (a[:1] for a in posterior.test)
    z = posterior.exact.run(x, y).samples["z"][:3]

    def joint(e):
        return Importance(poutine.condition(e.model, {"z": z[0]}), num_particles=1).run(x, y).log_evidence

    assert joint(paper).item() == pytest.approx(2 * joint(posterior).item(), rel=single())
    assert "0.5" in paper.target and posterior.target == "the posterior"
    with pytest.raises(ValueError, match="setting"):
        experiment(setting="posteriori")


# -- votes and chains by hand ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chain", "right"),
    [
        (" 6 - 0 = 6, 6 - 4 = 2.", True),
        ("6-0=6,6-4=2", True),
        (" 6 - 4 = 2.", False),
        (" 6 + 0 = 6, 6 - 4 = 2.", False),
        (" 6 - 0 = 6, 6 - 4 = 3.", False),
        (" 6 - 4 = 2, 2 - 0 = 2.", False),
        (" 6 - 0 = 6, 6 - 4 = 2, 2 + 0 = 2.", False),
        (" 6 - 0 = 6, 6 - 4 =.", False),
        (".", False),
    ],
)
def test_which_chains_are_right(chain, right):
    assert is_right(SUM, chain) == right


def test_the_right_chain_is_right():
    for name in ("test_3", "test_4", "test_5"):
        assert all(is_right(q, q.chain) for q in embedded.data("arithmetic", name)[:200])


def test_votes():
    right, lucky, wrong, none = (
        Prediction(SUM.chain, 2),
        Prediction(" 6 - 4 = 2.", 2),
        Prediction(" 6 + 4 = 10.", 10),
        Prediction(".", None),
    )
    found = score([SUM, SUM, SUM], [[right, lucky, wrong], [wrong, wrong, right], [none, none, lucky]])
    assert found == pytest.approx((2 / 3, 4 / 9, 2 / 4))
    assert [number_in(s) for s in (" 12.", " -4.", "7", ".", " 1 2.", " so.")] == [12, -4, 7, None, None, None]


def test_single_answers_are_right_as_often_as_enumeration_says(lm):
    """In expectation sum_z p(z | x) p(y | x z): between what is explored and that with all the rest."""
    questions, votes = [q for q in embedded.data("arithmetic", "validation") if len(q.operands) == 3][:4], 400
    task = Arithmetic(lm)
    exact = Enumeration(task.model, mass=0.96).run(*task.encode(questions))
    low = exact.log_evidence.exp()
    torch.manual_seed(0)
    drawn = score(questions, task.predict(questions, votes=votes)).single
    error = (low * (1 - low) / votes).sum().sqrt().item() / len(questions)
    assert low.mean().item() - 5 * error < drawn < (low + exact.unexplored).mean().item() + 5 * error


# -- training --------------------------------------------------------------------------------------------------------


def test_supervision_teaches_what_is_told(lm):
    task = Arithmetic(lm, RECIPE.guide_lm(lm, 1))
    told, unseen = (embedded.data("arithmetic", name)[:40] for name in ("rationales", "validation"))
    x, _ = task.encode(unseen)

    def of_right_chains():
        with torch.no_grad():
            return task.chain(task.guide_lm, x).log_prob(task.chains(unseen)).mean().item()

    before = of_right_chains()
    teach(task, told, task.chains(told), 30, recipe=RECIPE)
    assert of_right_chains() > before + 0.5 * log(1 / 0.35)  # half a step's worth of nats, on questions it never saw


def test_the_buffer_starts_with_the_rationales():
    e = experiment(warm_start=0, recipe=replace(RECIPE, particles=4))
    gflownet = e.gflownet()
    assert len(gflownet.replay) == 50
    x, y, _ = e.demonstrations
    metrics = gflownet.step(x[:4], y[:4])
    assert metrics["replayed"] == 1  # a quarter of four
    pyro.set_rng_seed(0)
    assert len(gflownet.replay) > 50


# -- the paper's files -----------------------------------------------------------------------------------------------


@real_files
def test_the_papers_files():
    four, three = read_questions(REAL)
    assert [len(part) for part in four[:3]] == [50, 950, 50]
    known = {*four.rationales, *four.train, *four.held_out}
    assert len(known) == 1050 and not known & {*four.test, *three}
    assert len(three) == len(set(three)) == 374 and len(four.test) == len(set(four.test)) == 443  # of 500 each
    assert {len(q.operands) for q in known} == {3, 4}


@real_files
def test_the_papers_files_with_a_language_model_of_ones_own(checkpoint):
    lm = LanguageModel.from_pretrained(checkpoint)
    e = experiment(lm, REAL, recipe=replace(RECIPE, particles=4, observations=2), warm_start=1)
    gflownet = e.gflownet()
    gflownet.fit(e.batches, 2, progress=False, warmup=0)
    x, y = (a[:2] for a in e.test)
    found = gflownet.run(x, y, num_particles=4)
    assert found.log_evidence.isfinite().all()


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"str_query": "Question: 6 * 4 = ? Answer:", "num_sol": 24},
        {"str_query": "Question: 6 - 4 = ? Answer:", "num_sol": 3},
        {"str_query": "Question: 6 - 4 = ? Answer:", "num_sol": 2, "str_rationale": "4 - 6 ="},
        None,
    ],
)
def test_files_that_hold_something_else(tmp_path, entry):
    path = tmp_path / "train_50.json"
    path.write_text(json.dumps([entry] if entry is not None else []))
    with pytest.raises(ValueError, match=r"data: .*train_50\.json"):
        read_file(path)


def test_another_language_model_needs_data(lm):
    with pytest.raises(ValueError, match="data"):
        experiment(lm)


# -- the study -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chain", "kind"),
    [
        (" 6 - 0 = 6, 6 - 4 = 2.", "right"),
        (" 6 + 0 = 6, 6 - 4 = 2.", "zeros"),
        (" 6 - 4 = 2.", "zeros"),
        (" 6 - 4 = 2, 2 - 0 = 2.", "zeros"),
        (" 6 - 1 = 5, 5 - 3 = 2.", "luck"),
        (" 6 - 0 = 6, 6 + 4 = 10.", None),
        (" 6 + 6 = 12.", None),
    ],
)
def test_kinds_of_chains(chain, kind):
    assert study.kind(SUM, chain) == kind


@pytest.mark.slow
def test_a_short_study():
    results = {cell: [study.run(cell, 0, True)] * 2 for cell in study.CELLS}
    for cell, (found, _) in results.items():
        shares = {k: v for k, v in found.items() if k.split()[0] in ("vote", "single", "total_variation")}
        assert all(0 <= v <= 1 for v in shares.values()) and len(shares) > 0, cell
    exact, prior = results["exact"][0], results["prompting"][0]
    assert exact["single 4"] > 0.9 and prior["single 4"] < 0.5  # it knows the answer
    assert exact["unexplored"] <= 1 - study.SHORT_MASS
    assert sum(exact[kind] for kind in study.KINDS) > 0.9 and prior["right"] < 0.5
    assert prior["total_variation"] > 0.5
    text = study.report(results)
    assert text.count("\n|") == len(study.CELLS) + 2 and text.count("**") == 14
