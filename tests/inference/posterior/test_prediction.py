"""Prediction from posteriors: candidates, votes, entropies and draws, against enumeration and plain loops."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plate_of_three import LABELS, P, Q, X, Y, answer, model, prior
from precision import single
from torch import Tensor

from lmppl import text
from lmppl.distributions import NextToken
from lmppl.inference import Importance, Posterior, ZeroEvidence
from lmppl.inference.posterior.predictive import Prediction


def by_hand(posterior: Posterior) -> Tensor:
    """log p(y_c | x, z_n), (C, N, 3), by one call a candidate."""
    y = P.encode(LABELS, stop="eos")
    return torch.stack([answer(X, posterior.samples["z"]).log_prob(c) for c in y])


@torch.no_grad()
@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_candidates_are_averaged_with_the_weights(exact, particles, observed, as_text):
    for posterior in (exact, particles):
        candidates = P.encode(LABELS, stop="eos") if as_text else LABELS
        found = posterior.predict(model, candidates, X, Y if observed else None)
        expected, w = by_hand(posterior), posterior.probabilities
        assert found.names == LABELS and found.log_probs.shape == expected.shape
        torch.testing.assert_close(found.log_probs, expected)
        p = (w * expected.exp()).sum(1)
        torch.testing.assert_close(found.log_prob.exp(), p)
        torch.testing.assert_close(found.probabilities, p / p.sum(0))
        best = expected.argmax(0)
        vote = torch.stack([(w * (best == c)).sum(0) for c in range(3)])
        torch.testing.assert_close(found.vote, vote)


@torch.no_grad()
def test_with_every_answer_as_candidate_the_prediction_is_enumerated(exact):
    """y given x and the first observation: p(y2 | x, y) = sum_z p(z, y, y2) / p(y)."""
    everything = answer(X[0], P.encode("")).enumerate_support()
    found = exact.predict(model, everything, X, None)
    torch.testing.assert_close(found.log_prob.exp().sum(0), torch.ones(3, dtype=torch.float64))
    z = prior(X).enumerate_support()  # (K, 3, E)
    inner = prior(X).log_prob(z) + answer(X, z).log_prob(Y)
    both = inner + answer(X, z).log_prob(everything[:, None, None])  # (C, K, 3)
    log_p = both.logsumexp(1) - inner.logsumexp(0)
    torch.testing.assert_close(found.log_prob, log_p)
    torch.testing.assert_close(found.entropy, -(log_p.exp() * log_p).sum(0))
    # I(z; y2) = sum p(z, y2) log p(z, y2) / p(z) p(y2), from the joint alone.
    log_zy = both - inner.logsumexp(0)
    information = log_zy.exp() * (log_zy - log_zy.logsumexp(0) - log_zy.logsumexp(1, keepdim=True))
    torch.testing.assert_close(found.mutual_information, information.sum((0, 1)))


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 10_000))
def test_entropy_splits_into_its_expected_and_its_mutual_part(C, N, seed):
    g = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(C, N, 2, generator=g, dtype=torch.float64) * 3
    log_probs[torch.rand(C, N, 2, generator=g) < 0.2] = -torch.inf
    log_probs[0, 0] = -1.0  # something is possible
    found = Prediction(["?"] * C, log_probs, torch.randn(N, 2, generator=g, dtype=torch.float64).log_softmax(0))
    torch.testing.assert_close(found.entropy, found.expected_entropy + found.mutual_information)
    torch.testing.assert_close(found.probabilities.sum(0), torch.ones(2, dtype=torch.float64))
    assert bool((found.mutual_information > -1e-12).all()) and bool((found.expected_entropy > -1e-12).all())
    possible = (log_probs > -torch.inf).any(0)
    torch.testing.assert_close(found.vote.sum(0), (found.log_weights.exp() * possible).sum(0))


def test_ties_share_a_vote_and_nothing_possible_is_zero_evidence():
    log_weights = torch.tensor([0.25, 0.75]).log()
    found = Prediction(["a", "b"], torch.tensor([[-1.0, -2.0], [-1.0, -1.0]]), log_weights)
    assert found.vote.tolist() == pytest.approx([0.125, 0.875])
    with pytest.raises(ZeroEvidence):
        _ = Prediction(["a", "b"], torch.full((2, 2), -torch.inf), log_weights).probabilities


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["prior", "guide"])
def test_candidates_under_the_prior_and_the_guide(particles, sampler):
    n = 2000
    found = particles.predict(model, LABELS, X, None, sampler=sampler, num_particles=n)
    fn = prior(X) if sampler == "prior" else prior(X, Q, temperature=1.5)
    z = fn.enumerate_support()
    y = P.encode(LABELS, stop="eos")
    truth = torch.stack([(fn.log_prob(z) + answer(X, z).log_prob(c)).logsumexp(0).exp() for c in y])
    error = found.log_probs.exp().std(1) / n**0.5
    assert bool(((found.log_prob.exp() - truth).abs() < 5 * error).all())


def test_ordinary_sites_and_single_tokens_as_candidates():
    slopes = torch.tensor([0.0, 0.3, -1.0], dtype=torch.float64)

    def program(z_is_known=None):
        z = pyro.sample("z", prior(X[0]))
        pyro.sample("t", NextToken(P, P.join(X[0], z)))
        pyro.sample("k", dist.Categorical(logits=text.length(z)[..., None] * slopes))

    posterior = Importance(program, num_particles=30).run()
    found = posterior.predict(program, ["a", "b"], site="t")
    z, w = posterior.samples["z"], posterior.probabilities
    p = (NextToken(P, P.join(X[0], z)).logits.exp().detach() * w[:, None]).sum(0)
    assert found.log_prob.exp().tolist() == pytest.approx([float(p[P.token_id("a")]), float(p[P.token_id("b")])])
    found = posterior.predict(program, torch.arange(3), site="k")
    p = ((text.length(z)[:, None] * slopes).softmax(-1) * w[:, None]).sum(0)
    # Nothing is weighed here: the weights are all 1 / 30, in single precision.
    assert found.probabilities.tolist() == pytest.approx(p.tolist(), rel=single())
    assert found.names == ["0", "1", "2"]
    for bad, said in (
        (lambda: posterior.predict(program, ["a"], site="k"), "candidates"),
        (lambda: posterior.predict(program, [], site="k"), "candidates"),
        (lambda: posterior.predict(program, ["a"], site="q"), "site: 'q'"),
        (lambda: posterior.predict(program, ["a"], site="t", sampler="guide"), "without a guide"),
        (lambda: posterior.predict(program, ["a"], site="t", sampler="x"), "sampler"),
    ):
        with pytest.raises(ValueError, match=said):
            bad()


@torch.no_grad()
def test_predictive_uses_the_weights(exact, particles):
    for posterior in (exact, particles):
        found = posterior.predictive(model, X, Y)
        expected = answer(X, posterior.samples["z"]).log_prob(Y)
        torch.testing.assert_close(found.log_probs["y"], expected)
        torch.testing.assert_close(found.log_prob("y").exp(), (posterior.probabilities * expected.exp()).sum(0))
        assert dict(found.table("z", 0)) == pytest.approx(dict(posterior.table("z", 0)))
    with pytest.raises(ValueError, match="observed sites"):
        found.log_prob("z")


@torch.no_grad()
def test_the_vote_over_a_sampled_site_is_the_posterior_predictive(particles):
    many = particles.predictive(model, X, None, num_particles=3000)
    y = P.encode("b", stop="eos")
    truth = float((particles.probabilities[:, 1] * answer(X, particles.samples["z"]).log_prob(y)[:, 1].exp()).sum())
    share = dict(many.table("y", 1))["b"]
    assert abs(share - truth) < 5 * math.sqrt(truth * (1 - truth) / 3000) + 1 / 3000


@torch.no_grad()
def test_a_model_that_joins_the_plates_gets_joint_draws(particles):
    """Weights of one element say nothing of joint particles: these are resampled, and the answer is a product."""

    def joined():
        with pyro.plate("data", 3):
            z = pyro.sample("z", prior(X))
        pyro.factor("all", (text.length(z) - 2).sum(-1, keepdim=True).double())

    n = 4000
    found = particles.predictive(joined, num_particles=n)
    assert found.log_probs["all"].shape == (n,)
    truth = (particles.probabilities * (text.length(particles.samples["z"]) - 2).double().exp()).sum(0).prod()
    value = found.log_probs["all"].exp()
    assert abs(float(value.mean() - truth)) < 5 * float(value.std()) / n**0.5
    log_weights = particles.predictive(joined).log_weights
    torch.testing.assert_close(log_weights, torch.full((60,), -math.log(60), dtype=torch.float64))


@torch.no_grad()
def test_a_shared_latent_predicts_in_a_deeper_plate():
    def shared():
        z = pyro.sample("z", prior(X[0]))
        pyro.sample("y", answer(X[0], z), obs=Y[0])

    def deeper(questions):
        z = pyro.sample("z", prior(X[0]))
        with pyro.plate("questions", 3):
            pyro.sample("w", answer(questions, z), obs=Y)

    posterior = Importance(shared, num_particles=40).run()
    z, w = posterior.samples["z"], posterior.probabilities
    found = posterior.predict(deeper, LABELS, X, site="w")
    expected = answer(X, z[:, None]).log_prob(P.encode(LABELS, stop="eos")[:, None, None])  # (C, N, 3)
    torch.testing.assert_close(found.log_probs, expected)
    torch.testing.assert_close(found.log_weights.exp(), w[:, None].expand(-1, 3))
