"""The random number: the truth by hand, the digit LM's gates, a short training, and the command line."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from functools import partial
from statistics import mean

import pytest
import torch
from precision import single
from pyro import condition, poutine
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.paper import random_number as paper
from lmppl import LanguageModel, cli, embedded
from lmppl.distributions import Completion
from lmppl.embedded import Bounds
from lmppl.inference import Enumeration, Importance, VarGrad
from lmppl.inference.judging.quality import density_quality
from lmppl.models import EXPERIMENTS, RandomNumber, Recipe
from lmppl.models.programs.random_number import number_in, tensors
from lmppl.models.random_number import (
    BOUNDS_RECIPE,
    FIXED_RECIPE,
    early_prior,
    experiment,
    read_bounds,
)
from worlds import build, numbers

PAIRS = [Bounds(0, 100), Bounds(37, 52)]


@pytest.fixture(scope="module")
def lm():
    return LanguageModel.embedded("numbers", dtype=torch.float64)


def log_priors(lm, pair):
    """log p(n) of every valid number, by scoring its digits."""
    answers = [f"{n}." for n in range(pair.a, pair.b + 1)]
    return Completion(lm, lm.encode(pair.prompt), max_tokens=3, stop=(".", "eos")).log_prob(lm.encode(answers))


@pytest.mark.parametrize("target", ["uniform", "valid"])
def test_enumeration_is_the_truth_by_hand(lm, target):
    exact = Enumeration(RandomNumber(lm, target=target).digits).run(*tensors(PAIRS))
    assert not exact.unexplored.any()
    for i, pair in enumerate(PAIRS):
        log_p = log_priors(lm, pair).detach().double()
        by_hand = torch.zeros_like(log_p) if target == "uniform" else log_p
        assert exact.log_evidence[i].item() == pytest.approx(by_hand.logsumexp(0).item(), abs=1e-9)
        found = {number_in(s): p for s, p in exact.table("z", i) if p > 0}
        assert set(found) == set(range(pair.a, pair.b + 1))
        truth = by_hand.softmax(0)
        for n, p in found.items():
            assert p == pytest.approx(truth[n - pair.a].item(), rel=1e-9)


def test_the_digits_have_the_joint_of_the_model(lm):
    """Enumerating a program restricted to digits leaves nothing out: where both can be, their joints agree."""
    for target in ("uniform", "valid"):
        task = RandomNumber(lm, target=target)
        exact = Enumeration(task.digits).run(*tensors(PAIRS))
        drawn = Importance(task.model, num_particles=4000).run(*tensors(PAIRS))
        u = drawn.log_weights + math.log(4000)  # log p(z, valid) - log p(z), whose exponential has the evidence as mean
        error = u.exp().std(0) / 4000**0.5
        assert ((u.exp().mean(0) - exact.log_evidence.exp()).abs() < 5 * error).all(), (target, error)


@pytest.mark.parametrize("target", ["uniform", "valid"])
def test_of_too_many_answers_the_invalid_ones_keep_their_proportions(target):
    """Of 1,000 words there are e^20.7 answers, and a floor of 18 nats would leave them more mass than the numbers."""
    small = LanguageModel.embedded("numbers", dtype=torch.float64)
    small.model.resize_token_embeddings(1000, mean_resizing=False)
    lm = LanguageModel(small.model, small.tokenizer)
    e, pair = experiment(lm, target=target), Bounds(0, 100)
    z = lm.encode(["42.", "007", "4.", "0"])[:, None]
    trace = poutine.trace(condition(e.model, {"z": z})).get_trace(*tensors([pair]))
    trace.compute_log_prob()
    found = sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample")[:, 0]
    of = Completion(lm, lm.encode(pair.prompt), max_tokens=3, stop=(".", "eos")).log_prob(z[:, 0])
    factor = {"uniform": -6.0, "valid": -12.0}[target]
    valid = torch.zeros_like(of) if target == "uniform" else of
    torch.testing.assert_close(found, torch.stack([valid[0], of[1] + factor, valid[2], of[3] + factor]))
    assert f"e^{factor:g} p(z)" in e.target and "e^" not in experiment(target=target).target


def test_what_is_a_valid_number(lm):
    answers = ["0.", "7.", "07.", "100.", "101.", ".", "4", "random.", "42."]
    task = RandomNumber(lm)
    a, b = tensors([Bounds(0, 100)])
    valid = task.valid(lm.encode(answers)[:, None], a, b)[:, 0]
    assert [s for s, v in zip(answers, valid.tolist(), strict=True) if v] == ["0.", "7.", "100.", "42."]
    hidden = torch.cat([lm.encode("4"), lm.encode("", stop="eos"), lm.encode("2.")])
    assert task.valid(hidden[None, None], a, b).item()  # it reads as 42 ...
    completion = Completion(lm, lm.encode([PAIRS[0].prompt]), max_tokens=3, stop=(".", "eos"))
    assert completion.log_prob(hidden).item() == -math.inf  # ... and cannot be said


def test_no_pair_is_in_two_splits():
    splits = [set(embedded.data("numbers", s)) for s in ("train", "validation", "test")]
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]
    everything = set().union(*splits)
    assert numbers.FIXED not in everything and len(everything) == sum(map(len, splits)) == 92 * 93 // 2 - 1
    assert min(len(s) for s in splits) > 400
    with pytest.raises(ValueError, match="split='dev'"):
        embedded.data("numbers", "dev")


def test_the_gates_hold(lm):
    path = embedded.path("numbers")
    assert sum(file.stat().st_size for file in path.iterdir()) < 4e5
    model, words = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval(),
        AutoTokenizer.from_pretrained(path),
    )
    report = numbers.report(model, words, 8)
    assert report.passed, report
    for pair in PAIRS:  # the gates' plain passes say what the package says
        plain = numbers.log_prior(model, words, pair)
        torch.testing.assert_close(plain, log_priors(lm, pair).detach(), atol=1e-2, rtol=0)


def test_half_of_the_corpus_is_valid():
    from random import Random

    random, n, pair = Random(0), 10_000, Bounds(10, 60)
    said = [number_in(numbers.answer(random, *pair) + ".") for _ in range(n)]
    valid = sum(pair.a <= m <= pair.b for m in said)
    assert abs(valid - n * numbers.VALID) < 5 * (n * 0.25) ** 0.5


def test_a_short_training_lowers_the_divergence(lm):
    """To less than a third of the language model's own in 40 steps."""
    recipe = Recipe(steps=40, observations=1, particles=64, objective=FIXED_RECIPE.objective, learning_rate=2e-3)
    made = experiment(recipe=recipe)
    exact = made.exact.run(*made.test)

    def divergence():
        return density_quality(exact, made.guide, made.test, {}).forward_kl.item()

    before = divergence()
    assert before == pytest.approx(2.15, abs=0.01)
    made.gflownet().fit(made.batches, recipe.steps, progress=False)
    assert divergence() < before / 3


def on_unseen_bounds(**changes):
    """Means over eight validation pairs after training on the training pairs."""
    made = experiment(recipe=replace(BOUNDS_RECIPE, **changes), unseen=True)
    made.gflownet().fit(made.batches, made.recipe.steps, progress=False)
    log_q = [paper.log_probs(made.lm, made.guide_lm, pair) for pair in embedded.data("numbers", "validation")[:8]]
    found = [paper.divergences(torch.zeros_like(q).log_softmax(0), q) for q in log_q]
    return {key: mean(f[key] for f in found) for key in found[0]}


@pytest.mark.slow
def test_unseen_bounds_are_blurred_rather_than_lost():
    """After thirty steps a square loss is nearer to valid and farther from uniform: it has lost the edges."""
    squared = partial(VarGrad, floor=12.0, exploration=early_prior(150))
    small = {"steps": 30, "observations": 16, "particles": 12}
    linex, square = on_unseen_bounds(**small), on_unseen_bounds(**small, objective=squared)
    assert linex["forward"] < 0.8 and linex["forward"] < 0.6 * square["forward"]
    assert linex["valid"] < square["valid"]


def test_an_adapted_head_is_saved_and_read_back(tmp_path):
    """The head is tied to the embedding: its adapter, and only that, goes to the file; the base stays as it was."""
    made = experiment()
    prior = log_priors(made.lm, numbers.FIXED)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.guide_lm.trainable_parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    made.guide_lm.save_pretrained(tmp_path)
    again = experiment(checkpoint=tmp_path)
    told, read = (log_priors(e.guide_lm, numbers.FIXED) for e in (made, again))
    torch.testing.assert_close(told, read)
    assert (told - prior).abs().max() > 0.1
    torch.testing.assert_close(log_priors(made.lm, numbers.FIXED), prior)


@pytest.mark.parametrize("valid", [1.0, 0.25])
def test_divergences_split_into_validity_and_shape(valid):
    """KL(p || q) = -log q(valid) + KL(p || q(. | valid)), and both vanish at the target."""
    log_p = torch.randn(11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(0)
    log_r = torch.randn(11, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(0)
    found = paper.divergences(log_p, log_r + math.log(valid))
    shape = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=log_p), torch.distributions.Categorical(logits=log_r)
    )
    assert found["forward"] == pytest.approx(-math.log(valid) + shape.item(), abs=1e-12)
    assert found["valid"] == pytest.approx(valid)
    at_target = paper.divergences(log_p, log_p)
    assert abs(at_target["forward"]) < 1e-12 and abs(at_target["reverse"]) < 1e-12
    missed = paper.divergences(log_p, log_r.index_fill(0, torch.tensor([3]), -math.inf))
    assert missed["forward"] is None and math.isfinite(missed["reverse"])


@pytest.mark.slow
def test_a_short_version_of_the_study(lm, tmp_path):
    torch.manual_seed(0)
    found = {cell: [paper.run(cell, 0, True)] for cell in paper.CELLS}
    prior = found[paper.PRIOR][0]
    model, words = (
        AutoModelForCausalLM.from_pretrained(embedded.path("numbers")).eval(),
        AutoTokenizer.from_pretrained(embedded.path("numbers")),
    )
    plain = numbers.log_prior(model, words, numbers.FIXED).double()
    assert prior["forward"] == pytest.approx((-math.log(101) - plain).mean().item(), abs=1e-2)
    assert prior["valid"] == pytest.approx(plain.exp().sum().item(), abs=1e-3) and prior["tokens"] == 0
    weighted = found[paper.WEIGHTED][0]
    assert weighted["valid"] == pytest.approx(1.0) and weighted["reverse"] < prior["reverse"]
    assert found[paper.GFLOWNET][0]["valid"] > prior["valid"] + 0.1  # validity comes first, 100 much later
    for cell in (paper.GFLOWNET, paper.MATCHED, paper.REWARD, paper.SUPERVISED):
        assert sum(found[cell][0]["q"]) == pytest.approx(found[cell][0]["valid"]) and found[cell][0]["tokens"] > 0
    assert found[paper.BOUNDS][0]["largest"] >= found[paper.BOUNDS][0]["forward"]
    page = paper.report(found)
    assert page.count("not seen") >= 2  # fifteen steps suffice for neither figure of the paper
    paper.plot(found, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 10_000


def test_the_command_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bounds.txt").write_text("20 31\n")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lmppl", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, capfd.readouterr().err

    run("compare", "random_number", "--data", "bounds.txt", "--steps", "2", "--particles", "8")
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert result["unexplored"] == 0
    enumeration = result["rows"][-1]
    assert enumeration["log_evidence"] == pytest.approx(math.log(12), abs=single(math.log(12)))
    run("sample", "random_number", "--data", "bounds.txt", "--checkpoint", "out/adapter", "--particles", "8")
    assert "between 20 and 31" in capfd.readouterr().out
    assert {"random_number", "random_number_bounds", "random_number_valid"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("text", ["", "1\n", "5 3\n", "-1 4\n", "a b\n"])
def test_a_file_that_holds_no_bounds(tmp_path, text):
    (tmp_path / "bounds.txt").write_text(text)
    with pytest.raises(ValueError, match="data: .*bounds.txt"):
        read_bounds(tmp_path / "bounds.txt")


def test_arguments_out_of_range(lm):
    with pytest.raises(ValueError, match="target"):
        RandomNumber(lm, target="normal")
    with pytest.raises(ValueError, match="guide_lm"):
        RandomNumber(lm).guide(*tensors(PAIRS))


def test_the_seed_decides_the_weights(tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        build.main(["numbers", "--seed", str(seed), "--steps", "2", "--check", "0", "--out", str(tmp_path / out)])
        torch.rand(1)  # the caller's random state plays no part
    a, b, c = (AutoModelForCausalLM.from_pretrained(tmp_path / out).state_dict() for out in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)
