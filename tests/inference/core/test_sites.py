"""A text is a text under masks, `.to_event` and `.expand`, and whoever wrote its distribution."""

from __future__ import annotations

from functools import partial

import hidden_chain
import pyro
import pytest
import torch
from five_sigma import assert_counts, evidence_within
from hidden_chain import Chain, every_text, probability
from pyro import poutine
from tiny import flat_lm

from lmppl import text
from lmppl.distributions import Completion
from lmppl.inference import (
    SMC,
    AutoGuide,
    DetailedBalance,
    Enumeration,
    GFlowNet,
    Importance,
    MetropolisHastings,
    PooledVarGrad,
    SubTB,
    VarGrad,
)
from lmppl.inference.core.sites import text_of
from lmppl.testing import TextContract

LM = flat_lm("gpt2", vocab=5)
X = torch.tensor([[2, 3], [4, 2]])


def completion(x=X, **rules) -> Completion:
    return Completion(LM, x, **{"max_tokens": 3, **rules})


def likes(z: torch.Tensor, token: int = 3) -> torch.Tensor:
    """A factor of each text: 1.5 nats for each of its tokens that is ``token``."""
    return 1.5 * (z == token).sum(-1)


# -- masks, events, expansions -------------------------------------------------------------------------------------

KEPT = torch.tensor([True, False])


def in_plate(wrap=lambda d: d):
    with pyro.plate("data", 2):
        z = pyro.sample("z", wrap(completion()))
        pyro.factor("f", likes(z))


def masked_by_handler():
    with pyro.plate("data", 2):
        with poutine.mask(mask=KEPT):
            z = pyro.sample("z", completion())
        pyro.factor("f", likes(z))


ALIKE = {
    "all of a mask": (partial(in_plate, lambda d: d.mask(torch.tensor([True, True]))), in_plate),
    "mask": (partial(in_plate, lambda d: d.mask(KEPT)), masked_by_handler),
    "two masks": (partial(in_plate, lambda d: d.mask(KEPT).mask(True)), masked_by_handler),
    "expanded mask": (partial(in_plate, lambda d: d.mask(KEPT).expand((2,))), masked_by_handler),
}


def seeded(run, seed: int = 3):
    pyro.set_rng_seed(seed)
    return run()


def loss_of(objective, program):
    return seeded(lambda: objective.loss_and_balances(program, poutine.block(program, hide=["f"])))


def assert_same_loss(objective, first, second) -> None:
    (a, of_a), (b, of_b) = (loss_of(objective, program) for program in (first, second))
    assert torch.allclose(a, b) and [x.site for x in of_a] == [x.site for x in of_b]
    assert all(torch.equal(x.valid, y.valid) for x, y in zip(of_a, of_b, strict=True))


def name_of(objective) -> str:
    return type(objective).__name__


def assert_same_run(a, b) -> None:
    """Draw for draw: values, weights, resamplings, strings."""
    assert torch.equal(a.samples["z"], b.samples["z"]) and torch.allclose(a.log_weights, b.log_weights)
    assert a.strings("z") == b.strings("z")
    both = zip(getattr(a, "ancestry", ()), getattr(b, "ancestry", ()), strict=True)
    assert all(torch.equal(x.chosen, y.chosen) and x.token == y.token for x, y in both)


SAMPLERS = (
    partial(Importance, num_particles=16),
    partial(SMC, num_particles=16, ess_threshold=1.0),
    partial(SMC, num_particles=16, twist="stop"),
    partial(SMC, num_particles=16, twist="flow"),
    partial(MetropolisHastings, num_chains=8, num_samples=4, warmup=4),
)


@pytest.mark.parametrize("name", ALIKE)
def test_a_wrapped_text_is_the_text_to_every_sampler(name):
    """Draw for draw: weights, evidence and resamplings of SMC, strings and tables."""
    wrapped, plain = ALIKE[name]
    for make in (*SAMPLERS, Enumeration):
        a, b = (seeded(lambda p=p, make=make: make(p).run()) for p in (wrapped, plain))
        assert_same_run(a, b)
        assert dict(a.table("z", 0)) == pytest.approx(dict(b.table("z", 0)))
    assert max(e.token for e in seeded(SMC(wrapped, num_particles=16, twist="stop").run).ancestry) > 0


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("objective", [VarGrad(), SubTB(), DetailedBalance(), PooledVarGrad()], ids=name_of)
def test_objectives_see_the_prefixes_of_a_wrapped_text(name, objective):
    """Model and guide wrapped: the same loss, over the same prefixes."""
    assert_same_loss(objective, *ALIKE[name])


def loose(mask=None):
    """Two texts that are weighed together, in a plate that is not kept."""
    with pyro.plate("texts", 2), poutine.mask(mask=mask):
        z = pyro.sample("z", completion())
    pyro.factor("f", likes(z).sum(-1, keepdim=True))


def stacked(wrap):
    """The two texts as one value."""
    z = pyro.sample("z", wrap(completion()))
    pyro.factor("f", likes(z).sum(-1))


ALL = torch.tensor([True, True])
STACKED = {
    "to_event": (partial(stacked, lambda d: d.to_event(1)), partial(loose, ALL)),
    "mask within": (partial(stacked, lambda d: d.mask(KEPT).to_event(1)), partial(loose, KEPT)),
    "mask without": (partial(stacked, lambda d: d.to_event(1).mask(torch.tensor(True))), partial(loose, ALL)),
}


@pytest.mark.parametrize("name", STACKED)
def test_several_texts_of_one_value_are_those_of_a_plate(name):
    wrapped, plain = STACKED[name]
    for make in SAMPLERS:
        a, b = (seeded(lambda p=p, make=make: make(p).run()) for p in (wrapped, plain))
        assert a.samples["z"].shape == (len(a.samples["z"]), 2, 4)
        assert_same_run(a, b)
        assert a.table("z") == b.table("z")
    for objective in (VarGrad(), SubTB(), PooledVarGrad()):
        assert_same_loss(objective, wrapped, plain)


def test_several_texts_of_one_value_are_not_enumerated():
    with pytest.raises(ValueError, match="site 'z': its value is several texts"):
        Enumeration(STACKED["to_event"][0]).run()


@pytest.mark.parametrize("wrap", [lambda d: d.mask(torch.tensor([True, True])), lambda d: d.mask(True)])
def test_an_automatic_guide_writes_wrapped_texts(wrap):
    from peft import LoraConfig

    guide = AutoGuide(partial(in_plate, wrap), LoraConfig(r=2, target_modules="all-linear"), args=())
    trace = poutine.trace(guide).get_trace()
    assert text_of(trace.nodes["z"]["fn"]).fn.lm is guide.lm("z")


# -- somebody else's distribution ------------------------------------------------------------------------------------

CHAIN, GUIDE = Chain(0, elements=2), Chain(1, elements=2)
TEXTS = every_text()


def chain_model():
    with pyro.plate("data", 2):
        z = pyro.sample("z", CHAIN())
        pyro.factor("f", likes(z, token=2) - 0.5 * text.length(z))


def chain_guide():
    with pyro.plate("data", 2):
        pyro.sample("z", GUIDE())


@torch.no_grad()
def exact() -> tuple[torch.Tensor, torch.Tensor]:
    """log Z (2,) and the posterior of every text (K, 2), by plain loops."""
    parameters = [[x.softmax(-1) for x in (CHAIN.begin[k], CHAIN.move, CHAIN.write)] for k in range(2)]
    words = [[t for t in row.tolist() if t > 0] for row in TEXTS]
    prior = torch.tensor([[probability(*p, word) for p in parameters] for word in words], dtype=torch.double)
    joint = prior.log() + (1.5 * (TEXTS == 2).sum(-1) - 0.5 * text.length(TEXTS))[:, None]
    return joint.logsumexp(0), joint.softmax(0)


class TestHiddenChain(TextContract):
    def distribution(self):
        with torch.no_grad():
            return CHAIN()


@torch.no_grad()
def test_the_forward_algorithm_is_the_sum_over_paths():
    log_z, _ = exact()
    assert CHAIN().log_prob(TEXTS[:, None]).exp().sum(0) == pytest.approx([1.0, 1.0])
    scored = CHAIN().log_prob(TEXTS[:, None]) + (likes(TEXTS, 2) - 0.5 * text.length(TEXTS))[:, None]
    assert torch.allclose(scored.logsumexp(0), log_z)


def test_a_foreign_text_is_enumerated():
    log_z, posterior = exact()
    found = Enumeration(chain_model).run()
    assert torch.allclose(found.log_evidence, log_z, atol=1e-12)
    assert torch.allclose(found.log_prob(TEXTS[:, None]).exp(), posterior, atol=1e-12)
    strings = dict(found.table("z", 1))
    assert strings["ab"] == pytest.approx(float(posterior[(torch.tensor([1, 2, 0, -1]) == TEXTS).all(-1), 1]))


@pytest.mark.parametrize("guide", [None, chain_guide], ids=["prior", "guide"])
@pytest.mark.parametrize("twist", [None, "stop", "flow"])
def test_a_foreign_text_grows_in_smc(guide, twist):
    log_z, _ = exact()
    smc = SMC(chain_model, guide, num_particles=32, ess_threshold=0.9, twist=twist)
    runs = [seeded(smc.run, seed) for seed in range(60)]
    evidence_within(torch.cat([r.log_evidence - log_z for r in runs]), torch.tensor(0.0).double())
    if twist is not None or guide is not None:
        assert {e.token for r in runs for e in r.ancestry} >= {1, 2}  # inside the text


@pytest.mark.parametrize("moves", ["regrowth", "independence"])
def test_a_foreign_text_is_moved_by_metropolis(moves):
    _, posterior = exact()
    pyro.set_rng_seed(0)
    n = 4000
    algorithm = MetropolisHastings(chain_model, num_chains=n, num_samples=1, warmup=40, moves={moves: 1.0})
    found = algorithm.run().samples["z"]
    for k in range(2):
        same = (found[:, k].reshape(n, 1, -1) == TEXTS).all(-1).sum(0)
        assert_counts(same, posterior[:, k], n, cells=8)


OBJECTIVES = [kind(num_particles=64) for kind in (SubTB, DetailedBalance, PooledVarGrad)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
def test_objectives_cut_a_foreign_text(objective):
    """u of every stopped prefix by hand; a guide that is the posterior has a loss of zero."""
    pyro.set_rng_seed(0)
    _, (b,) = objective.loss_and_balances(chain_model, chain_guide)
    assert b.site == "z" and b.u.shape[0] == hidden_chain.LONGEST + 1
    values = b.guide.nodes["z"]["value"]  # (P, particle, 2, L)
    with torch.no_grad():
        u = CHAIN().log_prob(values) + likes(values, 2) - 0.5 * text.length(values) - GUIDE().log_prob(values)
    assert torch.allclose(b.u[b.valid], u[b.valid]) and bool(b.valid.any(1).all())


def test_a_foreign_text_learns_by_its_prefixes():
    """A chain learns to be another chain."""

    def model():
        with pyro.plate("data", 2):
            pyro.sample("z", CHAIN())

    pyro.set_rng_seed(0)
    own = Chain(1, elements=2)

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", own())

    optimizer = torch.optim.Adam(own.parameters(), lr=0.05)
    GFlowNet(model, guide, SubTB(num_particles=32), optimizer=optimizer).fit([()], 200, progress=False)
    with torch.no_grad():
        p, q = (chain().log_prob(TEXTS[:, None]).exp() for chain in (CHAIN, own))
    assert float((p - q).abs().sum(0).max()) / 2 < 0.02


def test_a_foreign_text_is_a_text_when_it_is_expanded_masked_and_stacked():
    one = Chain(0)(0)
    site = text_of(one.expand((5, 3)).mask(torch.tensor([True, False, True])).to_event(1).expand((4, 5)))
    assert site.shape == (4, 5, 3) and site.stacked == 1 and site.fn is one
    value, log_prob = seeded(site.draw)
    assert value.shape == (4, 5, 3, 4) and torch.allclose(log_prob, one.log_prob(value))
    whole = one.expand((5, 3)).mask(torch.tensor([True, False, True])).to_event(1).log_prob(value)
    assert torch.allclose(site.lift(log_prob), whole)
