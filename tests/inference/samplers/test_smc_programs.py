"""SMC between sites of any kind: it resamples wherever weights have changed, and its evidence is unbiased."""

from __future__ import annotations

import math
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from five_sigma import within
from looser_guides import RUNS, D, evidence, prior, proposal
from programs_by_hand import contains
from pyro import poutine
from torch import Tensor

from lmppl.inference import SMC, Importance, Sandwich
from lmppl.inference.core.resampling import SCHEMES

STEPS = 5
MOVE, SEEN = torch.tensor([0.3, 0.7]), torch.tensor([0.05, 0.9])


def hidden_markov(kind: str, guided: bool = False, steps: int = STEPS):
    """(model, guide, evidence): states s_i that are observed once each; the runs are a kept plate."""

    def state(s, guide: bool):
        p = MOVE[s.long()]
        p = 0.3 + 0.5 * p if guide else p
        return dist.Categorical(torch.stack([1 - p, p], -1)) if kind == "categorical" else dist.Bernoulli(p)

    def program(guide: bool):
        steps_ = pyro.plate("steps", steps) if kind == "sequential plate" else range(steps)
        with pyro.plate("runs", RUNS):
            s = torch.tensor(0)
            for i in pyro.markov(steps_) if kind == "markov" else steps_:
                s = pyro.sample(f"s_{i}", state(s, guide))
                if guide:
                    continue
                if kind == "factors":
                    pyro.factor(f"y_{i}", SEEN[s.long()].log())
                else:
                    pyro.sample(f"y_{i}", dist.Bernoulli(SEEN[s.long()]), obs=torch.tensor(1.0))

    move = torch.stack([1 - MOVE, MOVE], -1)
    alpha = torch.tensor([1.0, 0.0])
    for _ in range(steps):
        alpha = (alpha @ move) * SEEN
    return lambda: program(False), (lambda: program(True)) if guided else None, float(alpha.sum())


@pytest.mark.parametrize("kind", ["bernoulli", "categorical", "factors", "sequential plate", "markov"])
@pytest.mark.parametrize("guided", [False, True])
def test_hidden_markov_models(kind, guided):
    """Unbiased, and closer than importance sampling with as many particles."""
    model, guide, exact = hidden_markov(kind, guided)
    found = SMC(model, guide, 16).run()
    within(found.log_evidence.exp(), exact)
    importance = Importance(model, guide, 16).run().log_evidence.exp()
    assert float(found.log_evidence.exp().std()) < (0.8 if guided else 0.7) * float(importance.std())
    assert {e.site for e in found.ancestry} <= {f"s_{i}" for i in range(1, STEPS)} and len(found.ancestry) >= 2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_every_scheme(scheme, threshold):
    model, _, exact = hidden_markov("bernoulli")
    within(SMC(model, None, 8, threshold, scheme).run().log_evidence.exp(), exact)


def test_expectations_of_early_and_late_states():
    """E sum_n W_n s_i = Z E[s_i | y], by enumeration of the 2^5 paths."""
    model, _, _ = hidden_markov("bernoulli")
    exact = torch.zeros(STEPS)
    for path in product((0, 1), repeat=STEPS):
        p, before = 1.0, 0
        for s in path:
            p *= float(MOVE[before] if s else 1 - MOVE[before]) * float(SEEN[s])
            before = s
        exact += p * torch.tensor(path)
    posterior = SMC(model, None, 16).run()
    for i in range(STEPS):
        within((posterior.log_weights.exp() * posterior.samples[f"s_{i}"]).sum(0), exact[i])


@pytest.mark.parametrize("guided", [False, True])
def test_real_states_against_the_kalman_filter(guided):
    """x_i ~ N(x_{i-1}, 1), y_i ~ N(x_i, 1/2): log Z by the filter's recursion."""
    y = [0.5, 1.5, 1.0, 2.5]

    def program(guide: bool):
        with pyro.plate("runs", RUNS):
            x = torch.tensor(0.0)
            for i, seen in enumerate(y):
                if guide:
                    x = pyro.sample(f"x_{i}", dist.Normal(0.6 * x + 0.3 * seen, 1.0))
                else:
                    x = pyro.sample(f"x_{i}", dist.Normal(x, 1.0))
                    pyro.sample(f"y_{i}", dist.Normal(x, 0.5), obs=torch.tensor(seen))

    mean, variance, log_z = 0.0, 0.0, 0.0
    for seen in y:
        variance += 1.0
        total = variance + 0.25
        log_z += -0.5 * math.log(2 * math.pi * total) - 0.5 * (seen - mean) ** 2 / total
        mean, variance = mean + variance / total * (seen - mean), variance * 0.25 / total
    guide = (lambda: program(True)) if guided else None
    within(SMC(lambda: program(False), guide, 32).run().log_evidence.exp(), math.exp(log_z))


def test_each_datum_is_resampled_by_itself():
    """An element whose observations say nothing keeps its particles; the others are resampled."""
    seen = torch.tensor([[0.5, 0.5], [0.05, 0.9], [0.9, 0.02]])  # (datum, state)

    def model():
        with pyro.plate("data", 3) as datum:
            s = torch.zeros((), dtype=torch.long)
            for i in range(3):
                s = pyro.sample(f"s_{i}", dist.Categorical(torch.tensor([[0.7, 0.3], [0.3, 0.7]])[s]))
                pyro.factor(f"f_{i}", seen[datum, s].log())

    posterior = SMC(model, None, 4000, 0.9).run()
    exact = []
    for row in seen:
        alpha = torch.tensor([1.0, 0.0])
        for _ in range(3):
            alpha = (alpha @ torch.tensor([[0.7, 0.3], [0.3, 0.7]])) * row
        exact.append(float(alpha.sum()))
    assert posterior.log_evidence.exp().tolist() == pytest.approx(exact, rel=0.1)
    stay = torch.arange(4000)
    assert all(torch.equal(event.chosen[:, 0], stay) for event in posterior.ancestry)
    assert not any(torch.equal(event.chosen[:, 1], stay) for event in posterior.ancestry)


@pytest.mark.parametrize("guided", [False, True])
def test_sites_in_a_plate_that_is_not_kept_are_joint(guided):
    """Words of documents: topics in a plate of words, resampled between documents, under a prior of all of them."""
    words = torch.tensor([[0, 0, 1], [2, 2, 1]])
    of_topic = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.2, 0.7]])
    weights = torch.tensor([0.3, 0.7])

    def program(guide: bool):
        with pyro.plate("runs", RUNS, dim=-2):
            w = pyro.sample("w", dist.Bernoulli(0.5))
            p = torch.where(w == 1, *weights)
            for d in range(2):
                with pyro.plate(f"words_{d}", 3, dim=-1):
                    likely = torch.tensor([0.2, 0.5, 0.9])[words[d]] if guide else p
                    topic = pyro.sample(f"t_{d}", dist.Bernoulli(likely.expand(torch.broadcast_shapes(p.shape, (3,)))))
                    if not guide:
                        pyro.sample(f"y_{d}", dist.Categorical(of_topic[topic.long()]), obs=words[d])

    exact = 0.0
    for p in weights.tolist():
        exact += 0.5 * math.prod(float((1 - p) * of_topic[0, word] + p * of_topic[1, word]) for word in words.flatten())
    posterior = SMC(lambda: program(False), (lambda: program(True)) if guided else None, 24).run()
    assert posterior.log_weights.shape == (24, RUNS) and any(e.site == "t_1" for e in posterior.ancestry)
    within(posterior.log_evidence.exp(), exact)


@pytest.mark.parametrize("styles", [False, True])
def test_documents_with_a_topic_each_word_by_word(styles):
    """p(words) = sum_k p_k prod_i phi_{k, w_i}, of each document; or with a style, drawn half way, for the rest."""
    words = torch.tensor([[0, 0, 1, 0, 2, 0], [2, 2, 1, 2, 2, 1], [0, 2, 1, 1, 0, 2]])  # (document, word)
    topics = torch.tensor([0.5, 0.3, 0.2])
    phi = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.2, 0.7], [0.2, 0.6, 0.2]])
    mix = torch.tensor([0.1, 0.6]) if styles else torch.zeros(2)  # how much of a style's words are any words

    def model():
        with pyro.plate("runs", RUNS, dim=-2), pyro.plate("documents", 3, dim=-1):
            k, even = pyro.sample("topic", dist.Categorical(topics)), torch.zeros(())
            for i in range(words.shape[1]):
                if styles and i == 3:
                    even = mix[pyro.sample("style", dist.Bernoulli(0.5)).long()]
                p = (1 - even[..., None]) * phi[k] + even[..., None] / 3
                pyro.sample(f"w_{i}", dist.Categorical(p), obs=words[:, i])

    posterior = SMC(model, None, 24, 0.9).run()
    assert posterior.log_weights.shape == (24, RUNS, 3)
    assert {e.site for e in posterior.ancestry} == ({"style"} if styles else set())
    for d, document in enumerate(words):
        rest = torch.stack([((1 - m) * phi[:, document[3:]] + m / 3).prod(-1) for m in mix]).mean(0)
        exact = float((topics * phi[:, document[:3]].prod(-1) * rest).sum())
        within(posterior.log_evidence[:, d].exp(), exact)


@pytest.mark.parametrize("twist", [None, "stop", "flow"])
@pytest.mark.parametrize("guided", [False, True])
def test_texts_and_other_sites_in_turn(twist, guided):
    """k, a factor, l, a factor, a text, a factor of all, m, a factor."""
    likes = torch.tensor([0.1, 2.0])

    def program(guide: bool):
        with pyro.plate("runs", RUNS):
            p = 0.4 if guide else 0.5
            k = pyro.sample("k", dist.Bernoulli(p))
            if not guide:
                pyro.factor("of_k", likes[k.long()].log())
            m = pyro.sample("l", dist.Bernoulli(p + 0.2 * k))
            if not guide:
                pyro.factor("of_l", likes[m.long()].log())
            z = pyro.sample("z", proposal(max_tokens=2) if guide else prior(max_tokens=2))
            if not guide:
                pyro.factor("of_z", 1.5 * contains(z, D) * k)
            last = pyro.sample("last", dist.Bernoulli(p))
            if not guide:
                pyro.factor("of_last", 1.0 * last * contains(z, D))

    exact = 0.0
    for k, m, last in product((0, 1), repeat=3):
        p = 0.5 + 0.2 * k
        rest = evidence(prior(max_tokens=2), lambda z, k=k, last=last: (1.5 * k + 1.0 * last) * contains(z, D))
        exact += 0.25 * (p if m else 1 - p) * float(likes[k] * likes[m]) * rest
    posterior = SMC(lambda: program(False), (lambda: program(True)) if guided else None, 16, twist=twist).run()
    within(posterior.log_evidence.exp(), exact)
    assert {e.site for e in posterior.ancestry} >= ({"l", "z"} if twist is None else {"z"})


def test_a_guide_in_another_order_runs_ahead():
    """The guide draws b before a, and c in the light of both; what lies ahead of a resampling is drawn anew."""

    def model():
        with pyro.plate("runs", RUNS):
            a = pyro.sample("a", dist.Bernoulli(0.5))
            pyro.factor("of_a", 2.5 * a)
            b = pyro.sample("b", dist.Bernoulli(0.3 + 0.4 * a))
            pyro.factor("of_b", -2.5 * b)
            c = pyro.sample("c", dist.Bernoulli(0.5))
            pyro.factor("of_c", 1.0 * (c == b))

    def guide():
        with pyro.plate("runs", RUNS):
            b = pyro.sample("b", dist.Bernoulli(0.4))
            a = pyro.sample("a", dist.Bernoulli(0.4 + 0.2 * b))
            pyro.sample("c", dist.Bernoulli(0.3 + 0.2 * a + 0.2 * b))

    exact = 0.0
    for a, b, c in product((0, 1), repeat=3):
        p = 0.3 + 0.4 * a
        exact += 0.25 * (p if b else 1 - p) * math.exp(2.5 * a - 2.5 * b + (c == b))
    for threshold in (0.5, 1.0):
        posterior = SMC(model, guide, 8, threshold).run()
        within(posterior.log_evidence.exp(), exact)
        assert posterior.ancestry


@pytest.mark.parametrize("guided", [False, True])
def test_a_number_of_sites_that_is_latent_by_a_mask(guided):
    """k ~ uniform on 0..3 states are there; the loop goes over 3 of them, under the mask i < k."""

    def program(guide: bool):
        with pyro.plate("runs", RUNS):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.1, 0.2, 0.3, 0.4] if guide else [0.25] * 4)))
            for i in range(3):
                with poutine.mask(mask=i < k):
                    s = pyro.sample(f"s_{i}", dist.Bernoulli(0.6 if guide else 0.4))
                    if not guide:
                        pyro.sample(f"y_{i}", dist.Bernoulli(torch.where(s == 1, 0.9, 0.2)), obs=torch.tensor(1.0))

    exact = sum(0.25 * (0.4 * 0.9 + 0.6 * 0.2) ** k for k in range(4))
    posterior = SMC(lambda: program(False), (lambda: program(True)) if guided else None, 16, 0.9).run()
    within(posterior.log_evidence.exp(), exact)
    assert len(posterior.ancestry) >= 2


@pytest.mark.parametrize("twist", [None, "flow"])
def test_a_number_of_texts_that_is_latent_by_a_mask(twist):
    def model():
        with pyro.plate("runs", RUNS):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            for i in range(2):
                with poutine.mask(mask=i < k):
                    z = pyro.sample(f"z_{i}", prior(max_tokens=2))
                    pyro.factor(f"f_{i}", 1.5 * contains(z, D) - 1.0)

    one = evidence(prior(max_tokens=2), lambda z: 1.5 * contains(z, D) - 1.0)
    within(SMC(model, None, 12, 0.9, twist=twist).run().log_evidence.exp(), 0.2 + 0.3 * one + 0.5 * one**2)


def test_a_loop_over_a_latent_number_says_what_to_write():
    def model():
        k = pyro.sample("k", dist.Categorical(torch.ones(4)))
        for i in range(int(k)):
            pyro.sample(f"s_{i}", dist.Bernoulli(0.5))

    def index():
        k = pyro.sample("k", dist.Categorical(torch.ones(4)))
        for i in range(k):
            pyro.sample(f"s_{i}", dist.Bernoulli(0.5))

    for program in (model, index):
        with pytest.raises(ValueError, match=r"range\(.*k\).*poutine\.mask\(mask=i < k\)"):
            SMC(program).run()


# -- what it costs ---------------------------------------------------------------------------------------------------


class Counted(dist.Bernoulli):
    """Counts how often it is asked for a density of an observation."""

    calls = 0

    def log_prob(self, value: Tensor) -> Tensor:
        Counted.calls += 1
        return super().log_prob(value)


@pytest.mark.parametrize("guided", [False, True])
def test_a_program_runs_once_more_for_every_resampling_and_nothing_is_scored_twice(guided):
    runs, steps = [0, 0], 30

    def program(guide: bool):
        runs[guide] += 1
        s = torch.tensor(0)
        for i in range(steps):
            s = pyro.sample(f"s_{i}", dist.Bernoulli(MOVE[s.long()]))
            if not guide:
                with poutine.mask(mask=True):
                    pyro.sample(f"y_{i}", Counted(SEEN[s.long()]), obs=torch.tensor(1.0))

    Counted.calls = 0
    with pyro.validation_enabled(False):  # one particle is scored again by itself
        posterior = SMC(lambda: program(False), (lambda: program(True)) if guided else None, 64).run()
    resamplings = len(posterior.ancestry)
    assert 3 < resamplings < steps
    assert runs[0] == 1 + 1 + resamplings  # a sketch, and the run
    assert runs[1] == (2 + resamplings if guided else 0)


# -- bounds from both sides ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("hard", [False, True])
def test_conditional_runs_have_the_unbiased_inverse(guided, hard):
    """E[1 / Z-hat] = P(Z-hat > 0) / Z, where hard factors let a run find nothing."""

    def program(guide: bool):
        with pyro.plate("runs", RUNS):
            s = torch.tensor(0)
            for i in range(3):
                s = pyro.sample(f"s_{i}", dist.Bernoulli(0.5 if guide else MOVE[s.long()]))
                if not guide:
                    pyro.factor(f"y_{i}", torch.where(s == 1, 0.0, -torch.inf if hard and i == 2 else -3.0))

    move = torch.stack([1 - MOVE, MOVE], -1)
    alpha = torch.tensor([1.0, 0.0])
    for i in range(3):
        alpha = (alpha @ move) * torch.tensor([0.0 if hard and i == 2 else math.exp(-3.0), 1.0])
    model, guide, exact = lambda: program(False), (lambda: program(True)) if guided else None, float(alpha.sum())
    drawn = SMC(model, None, 2000).run().resample(1)  # as good as exact, one for each run
    bounds = Sandwich(model, guide, 3, 0.9).run(exact_sample=drawn.values)
    alive = float((bounds.lowers > -torch.inf).double().mean())
    inverse = (math.log(exact) - bounds.uppers[0]).exp()
    error = float(inverse.std()) / RUNS**0.5
    assert abs(float(inverse.mean()) - alive) < 5 * (error + (alive * (1 - alive) / RUNS) ** 0.5) + 1e-6
    assert (alive < 0.97) == hard
