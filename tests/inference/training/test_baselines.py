"""The baselines: training ends where mathematics says, prompting answers, and trainers keep house."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from five_sigma import assert_counts
from four_texts import One
from problems import PROBLEMS, VOCAB, A, Y
from tasks import Task
from tiny import tiny_lm

from lmppl.distributions import Completion
from lmppl.inference import (
    Enumeration,
    Importance,
    PolicyGradient,
    Prompting,
    ReweightedWakeSleep,
    SiteMismatch,
    SupervisedFineTuning,
    compare,
    dreams,
    few_shot,
)
from lmppl.inference.core.query import Query
from lmppl.inference.training.densities import Drawn, log_likelihood


@pytest.mark.parametrize("problem", PROBLEMS)
def test_at_the_posterior_every_particle_weighs_the_evidence(lm, problem):
    """Plates, several texts, ordinary latents, factors: u = log Z, so all weights are 1/N and all advantages 0."""
    found = PROBLEMS[problem](lm)
    densities = Drawn(Query(found.model, found.posterior(1.0)), 6).densities()
    exact = Importance(found.model, found.posterior(1.0), 3).run()  # of u that does not vary
    assert densities.u.shape == (6, *exact.log_evidence.shape)
    assert (densities.u - exact.log_evidence).abs().max() < 1e-8
    assert (densities.log_p <= densities.log_prior + 1e-9).all() or "far apart" in problem


# Training -------------------------------------------------------------------------------------------------------------


def told(one: One, n: int = 16):
    """Batches of supervised fine-tuning: n fresh draws of the exact posterior of each observation."""

    def batches(step: int):
        y = Y.repeat(n, 1)
        return y, {"z": one.support[torch.multinomial(one.posteriors[one.row(y)], 1)[:, 0]]}

    return batches


TRAINERS = {
    "REINFORCE": {"kind": PolicyGradient},
    "PPO": {"kind": PolicyGradient, "algorithm": "ppo"},
    "wake": {"kind": ReweightedWakeSleep},
    "supervised": {"kind": SupervisedFineTuning},
}


@pytest.mark.parametrize("name", TRAINERS)
def test_training_reaches_the_exact_posterior(lm, name):
    """Two observations, 16 particles, 80 steps (PPO: of 4 epochs): from a TV above 0.4 to below 0.06."""
    one = One(lm)
    at = one.row(Y)
    assert float(one.total_variations()[at].min()) > 0.4
    trainer = one.trainer(**TRAINERS[name])
    trainer.fit(told(one) if name == "supervised" else [(Y,)], 80, warmup=5, progress=False)
    assert float(one.total_variations()[at].max()) < 0.06
    answers = []
    for algorithm in (trainer, Importance(one.model, one.guide)):
        pyro.set_rng_seed(1)
        answers.append(algorithm.run(Y))
    assert torch.equal(answers[0].log_weights, answers[1].log_weights)


def test_sleep_reaches_the_posterior_of_every_dream(lm):
    """On average over y ~ p; 64 dreams a step."""
    one = One(lm)
    p_y = (one.log_prior + one.log_likelihoods).exp().sum(-1)
    assert float(p_y.sum()) == pytest.approx(1.0) and float((p_y * one.total_variations()).sum()) > 0.35
    trainer = one.trainer(ReweightedWakeSleep, wake=0.0, sleep=1.0, simulate=dreams(one.model))
    trainer.fit([(Y[:1].repeat(64, 1),)], 80, warmup=5, progress=False)
    assert float((p_y * one.total_variations()).sum()) < 0.06


def test_reward_only_collapses_on_a_mode():
    """kl=0: the expected reward exceeds the posterior's own, the entropy is lost, and q is far from the posterior."""
    one = One(tiny_lm(vocab=VOCAB))  # whose posterior has an entropy to lose
    trainer = one.trainer(PolicyGradient, algorithm="ppo", reward="joint", kl=0.0)
    trainer.fit([(one.y,)], 50, warmup=5, progress=False)
    at = one.row(one.y)[0]
    p, q = one.posteriors[at], one.logits.detach()[at].softmax(-1)
    entropy, reward = [-(x * x.log()).sum() for x in (p, q)], [(x * one.reward("joint", 1.0)).sum() for x in (p, q)]
    assert entropy[0] > 1.0 and entropy[1] < 0.1
    assert reward[1] > reward[0] + 0.3
    assert one.total_variations()[at] > 0.45


# Supervised fine-tuning -----------------------------------------------------------------------------------------------


def test_supervised_loss_is_the_mean_cross_entropy():
    task = Task(dtype=torch.float64)
    z = task.lm.encode(["b", "ab"], stop="eos")
    expected = -task.q_of(*task.args).log_prob(z).mean().item()
    default = task.trainer(SupervisedFineTuning).step(*task.args, {"z": z})
    assert default["loss"] == pytest.approx(expected, abs=1e-10)
    task = Task(dtype=torch.float64)
    split = task.trainer(SupervisedFineTuning, examples=lambda x, z, y: ((x, y), {"z": z}))
    assert split.step(task.args[0], z, task.args[1])["loss"] == pytest.approx(expected, abs=1e-10)


def test_values_that_do_not_fit_the_guide_are_refused():
    task = Task()
    z = task.lm.encode(["b", "ab"], stop="eos")
    for values, name in (({}, "'z'"), ({"z": z, "w": z}, "'w'")):
        with pytest.raises(SiteMismatch, match=name):
            log_likelihood(Query(task.model, task.guide, task.args), values)
    with pytest.raises(ValueError, match="stop token"):
        log_likelihood(Query(task.model, task.guide, task.args), {"z": task.lm.encode(["abc", "a"], stop="eos")})


# Prompting ------------------------------------------------------------------------------------------------------------


def test_prompting_answers_with_its_draws_alone():
    task = Task()
    exact = Enumeration(task.model).run(*task.args)
    n = 4000
    before = task.lm.tokens_scored
    posterior = Prompting(task.model, task.guide, n).run(*task.args)
    asked = task.lm.tokens_scored - before
    with torch.no_grad():
        q = task.q_of(*task.args).log_prob(exact.values["z"]).exp()  # (K, 2)
    assert posterior.log_evidence.isnan().all() and torch.allclose(posterior.probabilities, torch.tensor(1 / n))
    counts = (posterior.samples["z"][:, None] == exact.values["z"][None]).all(-1).double().sum(0)
    for i in range(2):
        assert_counts(counts[:, i], q[:, i], n, rare=20, cells=6)
    before = task.lm.tokens_scored
    task.q_of(*task.args).expand((n, 2)).sample()
    assert asked == task.lm.tokens_scored - before  # the model's own densities cost nothing
    again = posterior.resample(50)
    assert torch.allclose(again.probabilities, torch.tensor(1 / 50))
    assert sum(p for _, p in posterior.table("z", index=0)) == pytest.approx(1.0)


def test_weighted_prompting_is_importance_sampling():
    task = Task()
    answers = []
    for algorithm in (Prompting(task.model, task.guide, 20, weighted=True), Importance(task.model, task.guide, 20)):
        pyro.set_rng_seed(1)
        answers.append(algorithm.run(*task.args))
    assert torch.equal(answers[0].log_weights, answers[1].log_weights)
    assert torch.equal(answers[0].samples["z"], answers[1].samples["z"])


def test_compare_takes_draws_without_evidence():
    task = Task()
    exact = Enumeration(task.model)
    row = compare(task.model, {"prompted": Prompting(task.model, task.guide, 500)}, *task.args, exact=exact)["prompted"]
    assert row.log_evidence is None and row.log_evidence_error is None
    assert not row.training_tokens and row.query_tokens > 0
    noise = 0.5 * math.sqrt(len(exact.run(*task.args).log_weights) / 500)  # E TV of N draws <= sqrt(K / N) / 2
    assert row.draws_tv == pytest.approx(row.density_tv, abs=2 * noise)


def test_few_shot_puts_answered_questions_first(lm):
    template = few_shot("{x} {{?}} ", [({"x": "b"}, "{a}"), ({"x": "a"}, ".")], separator="\n")
    assert template.format(x="X") == "b {?} {a}\na {?} .\nX {?} "
    short = few_shot("{x}.", [({"x": "a"}, "b")], separator="")
    assert lm.decode(lm.fill(short, x=torch.tensor([[A], [A + 1]]))) == ["a.ba.", "a.bb."]
    for examples in ([], [({"y": "b"}, "a")]):
        with pytest.raises(ValueError, match="examples"):
            few_shot("{x}", examples)


# The contract of trainers ---------------------------------------------------------------------------------------------

EVERY = {
    **TRAINERS,
    "sleep": {"kind": ReweightedWakeSleep, "wake": 0.5, "sleep": 0.5},
    "dreamt examples": {"kind": SupervisedFineTuning},
}


def made(name: str, task: Task):
    found = {"sleep": {"simulate": dreams(task.model)}, "dreamt examples": {"examples": dreams(task.model)}}
    return task.trainer(**EVERY[name], **found.get(name, {}))


def batch_of(name: str, task: Task):
    z = task.lm.encode(["b", "ab"], stop="eos")
    return (*task.args, {"z": z}) if name == "supervised" else task.args


@pytest.mark.parametrize("name", EVERY)
def test_a_resumed_run_repeats_an_uninterrupted_one(name, tmp_path):
    whole, first, second = Task(), Task(), Task()
    settings = {"progress": False, "seed": 5}
    expected = made(name, whole).fit([batch_of(name, whole)], 4, **settings)

    def interrupt(step, metrics):
        if step == 2:
            raise KeyboardInterrupt

    settings |= {"checkpoint": tmp_path / "c", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        made(name, first).fit([batch_of(name, first)], 4, callback=interrupt, **settings)
    rest = made(name, second).fit([batch_of(name, second)], 4, **settings)
    assert rest == expected[2:]
    for a, b in zip(whole.q.trainable_parameters(), second.q.trainable_parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", EVERY)
def test_training_tokens_count_what_went_through_the_network(name):
    task = Task()
    trainer = made(name, task)
    trainer.step(*batch_of(name, task))
    before, counted = task.lm.tokens_scored, trainer.training_tokens
    trainer.step(*batch_of(name, task))
    assert trainer.training_tokens - counted == task.lm.tokens_scored - before > 0


@pytest.mark.parametrize("name", ["REINFORCE", "PPO", "wake", "sleep"])
def test_a_loss_that_is_not_finite_updates_nothing(name):
    task = Task()
    trainer = made(name, task)
    before = [p.clone() for p in task.q.trainable_parameters()]

    def model(x, y):
        with pyro.plate("stories", len(x)):
            pyro.sample("z", Completion(task.lm, x, max_tokens=2))
            pyro.factor("f", torch.full((len(x),), float("inf")))

    trainer.model = model
    with pytest.raises(ValueError, match="site 'f': its log-probability is inf"):
        trainer.step(*task.args)
    assert all(torch.equal(a, b) for a, b in zip(before, task.q.trainable_parameters(), strict=True))


def observes_elsewhere(t: Task):
    def model(x, y):
        with pyro.plate("stories", len(x)):
            z = pyro.sample("z", Completion(t.lm, x, max_tokens=2))
            pyro.sample("y", Completion(t.lm, t.lm.join(x, z), max_tokens=4), obs=y.clone())

    return dreams(model)(*t.args)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda t: t.trainer(ReweightedWakeSleep, sleep=0.5), "simulate"),
        (lambda t: t.trainer(ReweightedWakeSleep, wake=0.0), "wake"),
        (lambda t: t.trainer(ReweightedWakeSleep, wake=-1.0), "wake"),
        (lambda t: t.trainer(ReweightedWakeSleep, num_particles=0), "num_particles"),
        (lambda t: t.trainer(PolicyGradient, algorithm="a2c"), "algorithm"),
        (lambda t: t.trainer(PolicyGradient, reward="bleu"), "reward"),
        (lambda t: t.trainer(PolicyGradient, baseline="value"), "baseline"),
        (lambda t: t.trainer(PolicyGradient, kl=-0.1), "kl"),
        (lambda t: t.trainer(PolicyGradient, epochs=2), "epochs"),
        (lambda t: t.trainer(PolicyGradient, algorithm="ppo", epochs=0), "epochs"),
        (lambda t: t.trainer(PolicyGradient, clip_ratio=0.0), "clip_ratio"),
        (lambda t: t.trainer(PolicyGradient, num_particles=1), "num_particles"),
        (lambda t: t.trainer(PolicyGradient, reward_temperature=0.0), "reward_temperature"),
        (lambda t: t.trainer(SupervisedFineTuning).step(*t.args), "examples"),
        (lambda t: Prompting(t.model, t.guide, 0), "num_particles"),
        (lambda t: Prompting(t.model, t.guide).run(*t.args, num_particles=0), "num_particles"),
        (observes_elsewhere, "simulate"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call(Task())
