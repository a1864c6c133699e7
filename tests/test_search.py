"""Draws found by the model itself: what is resampled, when, and that hard conditions are learned by default."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from five_sigma import assert_counts
from looser_guides import D, prior
from problems import adapted

from lmppl.inference import GFlowNet, OnPolicy, Searched, Tempered
from lmppl.inference.gflownet.exploration import Source

P = torch.tensor([0.03, 0.27, 0.3, 0.4])
LIKES = torch.tensor([[0.5, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])  # (observation, k): the second one has nothing


def model():
    with pyro.plate("data", 2) as i:
        k = pyro.sample("k", dist.Categorical(P))
        pyro.factor("f", LIKES[i, k].log())


def guide():
    with pyro.plate("data", 2):
        pyro.sample("k", dist.Categorical(torch.tensor([0.0, 0.0, 0.0, 1.0])))


def drawn(impossible: float, n: int = 4000) -> torch.Tensor:
    pyro.set_rng_seed(0)
    source = Source(model, guide, (), {}, nesting=1, impossible=impossible)
    return Searched(OnPolicy(), tries=4).draw(source, n)["k"]


def test_half_of_the_particles_are_draws_of_the_posterior():
    """P(k) = 0.015, 0.27 over 0.285; the other half, and observations for which nothing is possible, are as before."""
    k = drawn(0.3)
    assert k.shape == (4000, 2) and bool((k[:2000] == 3).all()) and bool((k[:, 1] == 3).all())
    assert_counts(torch.bincount(k[2000:, 0], minlength=4), torch.tensor([0.015, 0.27, 0.0, 0.0]) / 0.285, 2000)


def test_nothing_is_searched_where_draws_are_possible():
    assert bool((drawn(0.2) == 3).all())


def test_latent_sites_of_the_guide_alone_stop_the_search():
    def wider():
        pyro.sample("h", dist.Bernoulli(0.5), infer={"is_auxiliary": True})
        guide()

    source = Source(model, wider, (), {}, nesting=1, impossible=1.0)
    found = Searched(OnPolicy()).draw(source, 10)
    assert found.keys() == {"h", "k"} and bool((found["k"] == 3).all())


@pytest.mark.parametrize("value", [0, 1.5])
def test_arguments(value):
    with pytest.raises(ValueError, match="tries: must be at least 1"):
        Searched(Tempered(), tries=value)


def test_a_condition_that_few_texts_satisfy_is_searched_from_then_on_and_remembered():
    """A text with "d" in two places: few draws; the trainer's state carries that it is hard."""
    q = adapted(prior().lm)

    def text():
        z = pyro.sample("z", prior(max_tokens=4, min_tokens=4))
        pyro.factor("hard", torch.where((z == D).sum(-1) >= 2, 0.0, -torch.inf))

    def writer():
        pyro.sample("z", prior(lm=q, max_tokens=4, min_tokens=4))

    gflownet = GFlowNet(text, writer, optimizer=torch.optim.SGD(q.trainable_parameters(), lr=1e-3))
    pyro.set_rng_seed(0)
    first, second = gflownet.step(), gflownet.step()
    assert first["impossible"] > 0.5 >= second["impossible"]
    assert gflownet.state()[1]["impossible"] == first["impossible"]
    gflownet.restore({}, {"impossible": 0.0})
    assert gflownet.step()["impossible"] > 0.5
