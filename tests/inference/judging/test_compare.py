"""Measures of quality against hand-computed numbers, and the comparison's table, plot and file."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import time
from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from tiny import flat_lm

from lmppl.distributions import Completion
from lmppl.inference import SMC, Enumeration, Importance, MetropolisHastings, compare
from lmppl.inference.judging.compare import Meter, particles_within
from lmppl.inference.judging.quality import density_quality, draw_quality, modes_drawn, outside_mass
from lmppl.inference.posterior.algorithm import sized


@pytest.fixture(scope="module")
def task():
    lm = flat_lm(seed=2)
    args = (lm.encode(["abc", "d"]), lm.encode(["ca", "ed"], stop="eos"))

    def model(x, y):
        with pyro.plate("stories", len(x)):
            z = pyro.sample("z", Completion(lm, x, max_tokens=2))
            pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=3), obs=y)

    def guide(x, y):
        with pyro.plate("stories", len(x)):
            pyro.sample("z", Completion(lm, x, max_tokens=2, temperature=1.3))

    return lm, model, guide, args, Enumeration(model).run(*args)


def test_density_quality_is_the_sum_over_the_support(task):
    lm, model, guide, (x, y), exact = task
    q = Completion(lm, x, max_tokens=2, temperature=1.3)
    support = q.enumerate_support()
    log_q = q.log_prob(support)
    log_p = Completion(lm, x, max_tokens=2).log_prob(support)
    log_p = log_p + Completion(lm, lm.join(x, support), max_tokens=3).log_prob(y)
    log_p = log_p.log_softmax(0)
    quality = density_quality(exact, guide, (x, y), {})
    assert torch.allclose(quality.total_variation, 0.5 * (log_q.exp() - log_p.exp()).abs().sum(0), atol=1e-9)
    assert torch.allclose(quality.forward_kl, (log_p.exp() * (log_p - log_q)).sum(0), atol=1e-9)
    assert torch.allclose(quality.reverse_kl, (log_q.exp() * (log_q - log_p)).sum(0), atol=1e-9)


def test_mass_outside_an_incomplete_enumeration_counts_in_full(task):
    lm, model, guide, (x, y), exact = task
    part = Enumeration(model, mass=0.5).run(x, y)
    support = Completion(lm, x, max_tokens=2).enumerate_support()
    q = Completion(lm, x, max_tokens=2, temperature=1.3).log_prob(support).exp()
    log_p = part.log_prob({"z": support})
    p = log_p.exp().nan_to_num(0.0)  # NaN: not looked at
    assert bool((p == 0).any()) and torch.allclose(p.sum(0), torch.ones(2).double(), atol=1e-9)
    tv = density_quality(part, guide, (x, y), {}).total_variation
    assert torch.allclose(tv, 0.5 * (q - p).abs().sum(0), atol=1e-9)


def test_a_divergence_is_infinite_where_the_posterior_is_zero_and_finite_within(task):
    """A hard factor: KL(q, p) = inf; the share of q there, and KL(q(.|S), p) over the rest, by hand."""
    lm, _, guide, (x, y), _ = task

    def hard(x, y):
        with pyro.plate("stories", len(x)):
            z = pyro.sample("z", Completion(lm, x, max_tokens=2))
            pyro.factor("no a", torch.where(z[..., 0] == lm.token_id("a"), -torch.inf, 0.0))

    exact = Enumeration(hard).run(x, y)
    support = Completion(lm, x, max_tokens=2).enumerate_support()
    log_q = Completion(lm, x, max_tokens=2, temperature=1.3).log_prob(support).detach()
    log_p = Completion(lm, x, max_tokens=2).log_prob(support).detach()
    ruled_out = support[..., 0] == lm.token_id("a")
    log_p = log_p.masked_fill(ruled_out, -torch.inf).log_softmax(0)
    quality = density_quality(exact, guide, (x, y), {})
    q_out = (log_q.exp() * ruled_out).sum(0)
    assert torch.allclose(quality.outside, q_out, atol=1e-9) and bool((q_out > 0.01).all())
    assert bool((quality.reverse_kl == torch.inf).all()) and bool(quality.forward_kl.isfinite().all())
    log_in = log_q.masked_fill(ruled_out, -torch.inf).log_softmax(0)
    expected = (log_in.exp() * (log_in - log_p)).masked_fill(ruled_out, 0.0).sum(0)
    assert torch.allclose(quality.reverse_kl_inside, expected, atol=1e-9) and bool((expected > 0).all())
    # A guide that can write longer texts leaves a complete enumeration; what an incomplete one skipped is not known.
    longer = density_quality(Enumeration(task[1]).run(x, y), task[1], (x, y), {})
    assert bool((longer.reverse_kl >= 0).all()) and bool((longer.outside < 1e-9).all())
    part = density_quality(Enumeration(task[1], mass=0.5).run(x, y), guide, (x, y), {})
    assert torch.equal(part.reverse_kl, part.reverse_kl_inside) and bool((part.outside > 0.1).all())

    result = compare(hard, {"guide": Importance(hard, guide)}, x, y, exact=exact, seeds=2)
    row, saved = result["guide"], result.to_json()["rows"][0]
    assert row.reverse_kl == torch.inf and saved["reverse_kl"] is None
    assert saved["density_outside"] == pytest.approx(float(q_out.mean()))
    assert saved["reverse_kl_inside"] == pytest.approx(float(expected.mean()))
    json.dumps(result.to_json(), allow_nan=False)
    assert "inf" in result.markdown() and "KL(q,p) within" in result.markdown()


def test_draw_quality(task):
    _, model, _, args, exact = task
    assert float(draw_quality(exact, exact).abs().max()) < 1e-9
    one = exact.resample(1)  # one draw z: TV = 1 - p(z)
    at = one.samples["z"]
    p = exact.log_prob({"z": at}).exp()[0]
    assert torch.allclose(draw_quality(exact, one), 1 - p, atol=1e-9)
    errors = [float(draw_quality(exact, exact.resample(n)).mean()) for n in (10, 100, 10_000)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02  # systematic draws: at most support / 2N


def test_compare_counts_tokens_and_keeps_the_truth_beside(task, tmp_path):
    lm, model, guide, args, _ = task
    algorithms = {
        "prior": Importance(model, num_particles=200),
        "guide": Importance(model, guide, num_particles=200),
        "SMC": SMC(model, guide, num_particles=50),
    }
    seen = []
    result = compare(model, algorithms, *args, exact=Enumeration(model), repetitions=2, progress=seen.append)
    assert seen == ["enumeration", "prior", "guide", "SMC"]
    assert [r.name for r in result.rows] == [
        *algorithms,
        *(f"exact posterior, {n} draws" for n in (50, 200)),
        "enumeration",
    ]
    truth = result["enumeration"].log_evidence
    for name in algorithms:
        row = result[name]
        assert abs(row.log_evidence - truth) < row.log_evidence_error + 1e-6  # |mean error| <= mean |error|
        assert 0 < row.ess <= 1 + 1e-6 and row.query_tokens > 0
    assert result["SMC"].density_tv is None  # draws only
    assert result["prior"].density_tv == pytest.approx(
        float(density_quality(Enumeration(model).run(*args), model, args, {}).total_variation.mean()), abs=1e-9
    )
    before = lm.tokens_scored
    Importance(model, guide, num_particles=200).run(*args)
    assert result["guide"].query_tokens == pytest.approx((lm.tokens_scored - before) / 2, rel=0.1)
    result.save(tmp_path)
    saved = json.loads((tmp_path / "comparison.json").read_text())
    assert [r["name"] for r in saved["rows"]] == [r.name for r in result.rows]
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    console = Console(width=80, record=True, file=io.StringIO())
    result.print(console)
    printed = console.export_text()
    assert "…" not in printed and f"{result['SMC'].log_evidence:.3f}" in printed


def test_the_tokens_of_a_guide_with_a_network_of_its_own_are_counted(task):
    """Same prompts and limits: what the guide's network reads comes on top of what the model's reads."""
    lm, model, guide, args, _ = task
    other = flat_lm(seed=5)

    def stranger(x, y):
        with pyro.plate("stories", len(x)):
            pyro.sample("z", Completion(other, x, max_tokens=2))

    before = lm.tokens_scored + other.tokens_scored
    result = compare(model, {"stranger": Importance(model, stranger, num_particles=40)}, *args)
    counted = lm.tokens_scored + other.tokens_scored - before
    assert other.tokens_scored > 0 and result["stranger"].query_tokens * 2 == pytest.approx(counted)


def test_without_a_truth_the_comparison_says_so(task):
    _, model, _, args, _ = task
    result = compare(model, {"prior": Importance(model, num_particles=50)}, *args)
    assert len(result.rows) == 1 and result.rows[0].log_evidence_error is None and result.rows[0].ess is not None
    assert "no exact posterior" in result.notes[0]


def test_a_comparison_of_nothing_is_refused(task):
    _, model, _, args, _ = task
    with pytest.raises(ValueError, match="algorithms: expected at least one"):
        compare(model, {}, *args)


def test_outside_mass_is_the_weight_of_values_that_the_enumeration_lacks(task):
    _, model, _, args, exact = task
    part = Enumeration(model, mass=0.5).run(*args)
    assert torch.equal(outside_mass(exact, exact), torch.zeros(2).double())
    inside = exact.log_prob({"z": part.samples["z"]}).exp() * (part.log_weights > -torch.inf)
    assert torch.allclose(outside_mass(part, exact), 1 - inside.sum(0), atol=1e-9)


def test_modes_are_the_probable_texts_of_the_posterior(task):
    """By hand: of the texts with p >= 0.02, how many are drawn, and to how many q gives a tenth of p."""
    _, model, guide, args, exact = task
    drawn = exact.resample(6, "multinomial")
    q = Completion(task[0], args[0], max_tokens=2, temperature=1.3).log_prob(exact.samples["z"]).exp()
    for i in range(2):
        modes = {t for t, p in exact.table("z", i) if p >= 0.02}
        found = modes & {t for t, _ in drawn.table("z", i)}
        assert float(modes_drawn(exact, drawn)[i]) == pytest.approx(len(found) / len(modes))
        p = exact.probabilities[:, i]
        expected = ((p >= 0.02) & (q[:, i] >= p / 10)).sum() / (p >= 0.02).sum()
        assert float(density_quality(exact, guide, args, {}).modes[i]) == pytest.approx(float(expected))


def test_seeds_make_and_measure_each_algorithm_anew(task):
    _, model, guide, args, exact = task
    made = []

    def make(seed):
        made.append(seed)
        return Importance(model, guide, num_particles=50)

    runs = {"made": make, "given": Importance(model, guide, num_particles=50)}
    result = compare(model, runs, *args, exact=exact, seeds=[3, 5, 8], repetitions=2)
    assert made == [3, 5, 8]
    row, errors, evidence = result["given"], [], []
    for seed in (3, 5, 8):
        pyro.set_rng_seed(seed)
        answers = torch.stack([runs["given"].run(*args).log_evidence for _ in range(2)])
        evidence.append(answers)
        errors.append((answers - exact.log_evidence).abs().double().mean())
    errors = torch.stack(errors)
    assert row.log_evidence_error == pytest.approx(float(errors.mean()), rel=1e-9)
    assert row.sd["log_evidence_error"] == pytest.approx(float(errors.std()), rel=1e-4)
    assert row.log_evidence_sd == pytest.approx(float(torch.cat(evidence).std(0).mean()), rel=1e-9)
    assert result["made"] == dataclasses.replace(row, name="made", seconds=result["made"].seconds)
    assert f"{row.log_evidence_error:.3f} ± {row.sd['log_evidence_error']:.3f}" in result.markdown()


@pytest.mark.parametrize("unit", ["tokens", "seconds"])
def test_budgets_buy_particles(task, tmp_path, unit, monkeypatch):
    lm, model, guide, args, exact = task
    monkeypatch.setattr(
        time, "perf_counter", lambda: 1e-3 * lm.tokens_scored
    )  # a network that reads 1,000 tokens a second
    budgets = [200, 3000] if unit == "tokens" else [0.2, 3.0]
    algorithms = {"prior": Importance(model), "SMC": SMC(model, guide)}
    result = compare(model, algorithms, *args, exact=exact, seeds=1, budgets=budgets, unit=unit)
    assert [(p.name, p.budget) for p in result.curves] == [(n, b) for n in algorithms for b in budgets]
    for few, many in (result.curves[:2], result.curves[2:]):
        assert few.num_particles < many.num_particles
        # Texts have random lengths, so that a run costs what the pilot said within a fifth or so.
        assert few.query_tokens == pytest.approx(200, rel=0.3) and many.query_tokens == pytest.approx(3000, rel=0.3)
        assert many.seconds == pytest.approx(1e-3 * many.query_tokens)
        assert 0 <= many.draws_tv <= 1 and many.log_evidence_error >= 0
    assert algorithms["prior"].num_particles == 64  # the algorithm given is left as it was
    result.save(tmp_path)
    assert (tmp_path / "budget.png").read_bytes()[:4] == b"\x89PNG"
    assert len(json.loads((tmp_path / "comparison.json").read_text())["curves"]) == 4


def test_a_plot_shows_what_there_is_and_sets_references_apart(task, tmp_path, monkeypatch):
    """Every bar has a figure; references come last, in one grey, and have no panel to themselves."""
    _, model, guide, args, exact = task
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *args, **kwargs: (drawn.append(f), save(f, *args, **kwargs)))
    algorithms = {"SMC": SMC(model, guide, num_particles=20), "guide": Importance(model, guide, num_particles=20)}
    result = compare(model, algorithms, *args, exact=exact, budgets=[300])
    assert [row.reference for row in result.rows] == [False, False, True, True]
    result.rows[0].log_evidence_error = torch.inf
    result.plot(tmp_path / "bars.png")
    panels = {axis.get_title(): axis for axis in drawn[0].axes}
    draws, density, evidence, ess = panels.values()
    for axis, names in (
        (draws, [row.name for row in result.rows]),
        (density, ["guide"]),
        (evidence, ["SMC", "guide", "enumeration"]),
        (ess, ["SMC", "guide"]),
    ):
        assert [label.get_text() for label in axis.get_yticklabels()] == names and len(axis.patches) == len(names)
        algorithms = [bar.get_facecolor() for bar in axis.patches if not bar.get_hatch()]
        assert len(algorithms) == sum(name in ("SMC", "guide") for name in names) == len(set(algorithms))
    assert " inf" in [t.get_text() for t in evidence.texts]
    for row in [*result.rows, *result.curves]:
        row.name = row.name.replace("SMC", r"$\frac$")  # no formula
    result.plot(tmp_path / "dollars.png")
    result.plot_budget(tmp_path / "budget.png")
    assert len(drawn[2].axes) == 2
    untrue = compare(model, {"SMC": SMC(model)}, *args, budgets=[300])
    untrue.save(tmp_path)  # no truth: no curve
    with pytest.raises(ValueError, match="there is no curve"):
        untrue.plot_budget(tmp_path / "budget.png")


def test_every_algorithm_gets_the_tokens_of_a_budget(task):
    """Markov chains too, whose warm-up alone would cost more; and texts that repeat, which are read once."""
    lm, model, guide, args, _ = task
    algorithms = {"MCMC": MetropolisHastings(model), "prior": Importance(model), "SMC": SMC(model, guide)}
    meter = Meter([lm.network])
    for budget in (150, 600):
        for name, algorithm in algorithms.items():
            n = particles_within(algorithm, budget, meter, args=args, checks=3)
            spent = meter(partial(sized(algorithm, n).run, *args))[1] / 2
            assert spent == pytest.approx(budget, rel=0.25), (name, n)
    fewer = sized(algorithms["MCMC"], 40)
    assert (fewer.num_chains, fewer.num_samples, fewer.warmup) == (4, 10, 4)
    assert sized(algorithms["MCMC"], 3).num_chains == 3 and algorithms["MCMC"].num_samples == 250


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"unit": "hours"}, "unit"),
        ({"budgets": [0]}, "budgets"),
        ({"repetitions": 0}, "repetitions"),
        ({"seeds": []}, "seeds"),
    ],
)
def test_bad_arguments_are_named(task, options, name):
    _, model, _, args, _ = task
    with pytest.raises(ValueError, match=name):
        compare(model, {"prior": Importance(model)}, *args, **options)


class Costly:
    """An algorithm that does nothing; a meter says what it cost."""

    num_particles = 1

    def run(self):
        return Importance(lambda: None, num_particles=1).run()


@pytest.mark.parametrize(
    ("cost", "within"),
    [
        (lambda n: 3 * n, 0.05),
        (lambda n: 50 + 2 * n, 0.05),
        (lambda n: 40 * n**0.5, 0.1),
        (lambda n: 200 * (1 - 2.7 ** (-n / 30)), 0.05),
        (lambda n: 3 * n + n % 5 * 7, 0.15),
        (lambda n: 60 if n < 8 else 370, 0.51),  # 121 cannot be had: not three times as much
    ],
)
def test_the_particles_that_cost_the_nearest_to_a_budget_are_found(cost, within):
    """Of the runs that were made, where costs jump too: a line through the last two may lead anywhere."""
    tried = {}

    def meter(run):
        n = run.func.__self__.num_particles
        tried[n] = cost(n)
        return run(), tried[n], 0.0

    n = particles_within(Costly(), 121, meter, pilots=(16, 64), checks=3)
    assert len(tried) <= 5 and abs(tried[n] - 121) == min(abs(c - 121) for c in tried.values())
    assert tried[n] == pytest.approx(121, rel=within)


def hard_number() -> None:
    """Posterior (2/3, 1/3, 0, 0) of four numbers."""
    k = pyro.sample("k", dist.Categorical(torch.full((4,), 0.25)))
    pyro.factor("hard", torch.tensor([0.0, -math.log(2), -torch.inf, -torch.inf])[k])


def number(*p: float) -> Callable[[], None]:
    def guide() -> None:
        pyro.sample("k", dist.Categorical(torch.tensor(p)))

    return guide


@pytest.mark.parametrize(("p", "divergence"), [((2 / 3, 1 / 3, 0, 0), 0.0), ((2 / 3, 1 / 3 - 1e-5, 1e-5, 0), math.inf)])
def test_a_zero_that_a_distribution_writes_as_rounding_is_no_mass(p, divergence):
    quality = density_quality(Enumeration(hard_number).run(), number(*p), (), {})
    assert quality.reverse_kl == pytest.approx(divergence, abs=1e-6)


def test_an_exact_posterior_of_draws_is_merged_by_value():
    """Half of the absolute differences between q and the shares of 1,000 draws, whatever their order."""
    draws = Enumeration(hard_number).run().resample(1000, "multinomial")
    share = float((draws.samples["k"] == 0).double().mean())
    quality = density_quality(draws, number(0.5, 0.3, 0.2, 0.0), (), {})
    expected = 0.5 * (abs(share - 0.5) + abs(1 - share - 0.3) + 0.2)
    assert float(quality.total_variation) == pytest.approx(expected, abs=1e-6)
    assert float(quality.outside) == pytest.approx(0.2, abs=1e-6) and bool(quality.reverse_kl.isfinite())
