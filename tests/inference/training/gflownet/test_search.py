"""Draws found by the model itself: what is resampled, when, and that hard conditions are learned by default."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from five_sigma import assert_counts
from looser_guides import A, D, prior
from problems import adapted

from lmppl.inference import GFlowNet, HardVarGrad, OnPolicy, Searched, Tempered
from lmppl.inference.training.gflownet.exploration import Memory, Source

P = torch.tensor([0.03, 0.27, 0.3, 0.4])
EOS = prior().lm.tokenizer.eos_token_id
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
    source = Source(model, guide, (), {}, max_plate_nesting=1, memory=Memory(impossible))
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

    source = Source(model, wider, (), {}, max_plate_nesting=1, memory=Memory(1.0))
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
    assert gflownet.state()[1]["memory"]["impossible"] == first["impossible"]
    gflownet.restore({}, {"memory": {"impossible": 0.0}})
    assert gflownet.step()["impossible"] > 0.5


def trainer(likes: torch.Tensor) -> GFlowNet:
    """k ~ Categorical(P) in a plate, likes (observation, k) its probabilities; a guide that begins with the last k."""
    logits = torch.nn.Parameter(torch.tensor([0.0, 0.0, 0.0, 20.0]).repeat(len(likes), 1))

    def model():
        with pyro.plate("data", len(likes)) as i:
            k = pyro.sample("k", dist.Categorical(P))
            pyro.factor("f", likes[i, k].log())

    def guide():
        with pyro.plate("data", len(likes)):
            pyro.sample("k", dist.Categorical(logits=logits))

    return GFlowNet(model, guide, optimizer=torch.optim.SGD([logits], lr=0.0), num_particles=8)


def test_one_hard_observation_among_easy_ones_is_enough():
    """An eighth of the draws is impossible, all of them one observation's: the next step has some for each."""
    likes = torch.ones(8, 4)
    likes[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    hard = trainer(likes)
    pyro.set_rng_seed(0)
    assert [hard.step()["impossible"] for _ in range(2)] == [1 / 8, 1 / 16]


def test_searches_that_find_nothing_rest_longer_and_longer():
    """Among 100 steps after the first, those without a rest are 1, 3, 7, 15, 31 and 63 apart."""
    hopeless = trainer(torch.zeros(2, 4))
    searched = []
    for step in range(100):
        before = hopeless.objective.memory.fruitless
        assert hopeless.step()["impossible"] == 1.0
        if hopeless.objective.memory.fruitless > before:
            searched.append(step)
    assert searched == [1, 3, 7, 15, 31, 63]


def test_what_is_remembered_is_the_trainers_own():
    """Two trainers of one objective do not tell one another that draws are impossible."""
    shared = HardVarGrad(num_particles=8)
    first, second = trainer(torch.zeros(2, 4)), trainer(torch.ones(2, 4))
    one, two = (GFlowNet(t.model, t.guide, shared, optimizer=t.optimizer) for t in (first, second))
    one.step()
    assert (one.objective.memory.impossible, two.objective.memory.impossible) == (1.0, 0.0)


def test_texts_that_could_not_go_on_are_not_found():
    """A text that writes "a" before its last token is at a dead end: impossible, though no factor says so."""

    def only(prefix: torch.Tensor) -> torch.Tensor:
        allowed = torch.ones(*prefix.shape[:-1], prior().lm.vocab_size, dtype=torch.bool)
        return allowed & ~(prefix == A).any(-1)[..., None]

    def program():
        pyro.sample("z", prior(max_tokens=3, min_tokens=2, allowed=only))

    pyro.set_rng_seed(0)
    source = Source(program, program, (), {}, max_plate_nesting=0, memory=Memory(1.0))
    whole = (Searched(OnPolicy()).draw(source, 200)["z"] == EOS).any(-1)
    assert not bool(whole[:100].all()) and bool(whole[100:].all())
