"""Tokens that several sites of a program share go through a network once, and the numbers are each site's own."""

from __future__ import annotations

import functools
from unittest import mock

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import gather, packing, spied
from tiny import adapter, tiny_lm

from lmppl import text
from lmppl.distributions import Completion
from lmppl.engine.prompts import prompts
from lmppl.engine.scoring import Request, score_together
from lmppl.engine.tuning import TUNING
from lmppl.inference import GFlowNet, Importance, MetropolisHastings, VarGrad
from lmppl.inference.core import programs
from lmppl.inference.core.query import Query
from lmppl.inference.core.weights import balance, log_density, log_density_of_latents, site_log_prob, weigh

pytestmark = pytest.mark.usefixtures("double_precision")
V, B, N, LX, LZ, LY = 20, 2, 8, 6, 5, 4


def network(arch: str = "llama"):
    """A language model that keeps no prompts, whose trials are made."""
    lm = tiny_lm(arch, vocab=V)
    prompts(lm.network).capacity = 0
    return lm


def ids(*shape: int, seed: int, low: int = 2, high: int = V) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


# Latents differ in their first token, and observations are spelled otherwise, so that nothing is shared by chance.
X, Y = ids(B, LX, seed=0), ids(2, B, LY, seed=1, low=15)
Z = torch.cat([2 + torch.arange(N)[:, None, None].expand(N, B, 1), ids(N, B, LZ - 1, seed=2, high=15)], -1)
Y[1, :, 0] = 15 + (Y[0, :, 0] - 14) % 5


def program(lm, observations: int = 1, stop=None, latents: int = 1):
    """Texts z after x, in the model or chain of a guide, and ``observations`` texts that follow them."""

    def run():
        context = X
        with pyro.plate("data", B):
            for i in range(latents):
                z = pyro.sample(f"z{i}", Completion(lm, context, max_tokens=LZ, stop=stop))
                context = lm.join(context, z)
            for i in range(observations):
                pyro.sample(f"y{i}", Completion(lm, context, max_tokens=LY, stop=None), obs=Y[i])

    return run


def frozen(lm, compute) -> int:
    """The tokens that the network without an adapter reads in parallel."""
    read, forward = [], type(lm).forward

    def spy(self, input_ids, *, tokens=None, **kwargs):
        if not self.has_adapter and not kwargs.get("use_cache", True):
            read.append(input_ids.numel() if tokens is None else tokens)
        return forward(self, input_ids, tokens=tokens, **kwargs)

    type(lm).forward = spy
    try:
        compute()
    finally:
        type(lm).forward = forward
    return sum(read)


def traced(run, **values):
    query = Query(run, None, max_plate_nesting=1)
    pair = query.at(values, particles=N)
    return pair.model, pair.plates()


# The exact number of tokens -------------------------------------------------------------------------------------------

TREE = B * (LX + N * (LZ + LY - 1))  # the last token of y predicts nothing


@torch.no_grad()
@pytest.mark.parametrize(
    ("packed", "observations", "expected"),
    [
        (True, 1, TREE),
        (True, 2, TREE + B * N * (LY - 1)),
        (False, 1, B * N * (LX + LZ + LY - 1)),
        (False, 2, 2 * B * N * (LX + LZ + LY - 1)),
    ],
)
def test_prompt_and_latent_are_read_once_whatever_follows_them(packed, observations, expected):
    lm = network()
    trace, plates = traced(program(lm, observations), z0=Z)
    with packing(packed):
        assert frozen(lm, lambda: log_density(trace, plates)) == expected


@pytest.mark.parametrize(("packed", "expected"), [(True, TREE), (False, B * N * (LX + LZ + LY - 1))])
def test_the_texts_of_a_chain_are_read_once_with_gradient(packed, expected):
    """A guide that draws z1 after z0; z1 is as long as an observation here."""
    q = adapter(network(), seed=0)
    trace, plates = traced(program(q, observations=0, latents=2), z0=Z, z1=Y[0].expand(N, -1, -1))
    with packing(packed):
        before = q.tokens_scored
        log_q = log_density_of_latents(trace, plates)
        assert q.tokens_scored - before == expected and log_q.requires_grad


@pytest.mark.parametrize("num_prefixes", [None, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_a_text_whose_prefixes_are_observed_costs_nothing_beside_them(packed, num_prefixes):
    lm = network()
    query = Query(program(lm, stop="eos"), program(adapter(lm, seed=0), 0, stop="eos"), max_plate_nesting=1)
    z = torch.cat([Z, torch.zeros(N, B, 1, dtype=torch.long)], -1)
    drawn = query.at({"z0": z}, particles=N).proposal
    with packing(packed):
        read = frozen(lm, lambda: balance(query, drawn, N, "z0", num_prefixes))
    P = LZ + 1 if num_prefixes is None else num_prefixes
    if packed:  # all particles share the row of the empty prefix
        assert read == B * (LX + LY - 1 + N * (LZ + (P - 1) * (LY - 1)))
    elif num_prefixes is None:
        assert read == B * (LX + LY - 1 + N * sum(LX + t + LY - 1 for t in range(1, P)))


@pytest.mark.parametrize("method", ["VarGrad", "Importance", "MetropolisHastings"])
def test_an_algorithm_reads_its_latents_once(method):
    """What is drawn may be shorter, or shared: never more than each prompt, latent and observation."""
    lm = network()
    q = adapter(lm, seed=0)
    model, guide = program(lm), program(q, observations=0)
    with packing(True):
        if method == "VarGrad":
            optimizer = torch.optim.SGD(q.trainable_parameters(), lr=0.0)
            objective = VarGrad(max_plate_nesting=1)
            read = frozen(lm, GFlowNet(model, guide, objective, optimizer=optimizer, num_particles=N).step)
        elif method == "Importance":
            read = frozen(lm, Importance(model, guide, num_particles=N, max_plate_nesting=1).run)
        else:
            chains = [
                MetropolisHastings(model, guide, num_chains=N, num_samples=n, warmup=0, max_plate_nesting=1)
                for n in (3, 4)
            ]
            two, three = (frozen(lm, chain.run) for chain in chains)
            read = three - two
    assert B * LX < read <= TREE


# The numbers ----------------------------------------------------------------------------------------------------------

LM = {arch: adapter(network(arch), seed=1, r=2) for arch in ("gpt2", "qwen3")}


@st.composite
def programs_of_texts(draw):
    """Two or three texts, each after x and some of those before it, in a plate or before it, drawn or observed."""
    sites = []
    for i in range(draw(st.integers(2, 3))):
        sites.append(
            {
                "after": [j for j in range(i) if draw(st.booleans())],
                "plate": draw(st.booleans()) or any(sites[j]["plate"] for j in range(i)),
                "observed": draw(st.booleans()),
                "stop": draw(st.sampled_from([None, "eos", "."])),
                "temperature": draw(st.sampled_from([1.0, 0.7])),
                "prompt": draw(st.booleans()),
                "seed": draw(st.integers(0, 3)),
            }
        )
    return sites


def written(lm, sites):
    def run():
        def site(i, plated):
            rules = sites[i]
            context = X if plated else X[0]
            context = lm.join(context if rules["prompt"] else context[..., :1], *(found[j] for j in rules["after"]))
            d = Completion(lm, context, max_tokens=3, stop=rules["stop"], temperature=rules["temperature"])
            value = ids(*d.batch_shape[-1:], 3, seed=rules["seed"], low=1, high=5) if rules["observed"] else None
            if value is not None and rules["stop"] is not None:
                value = text.cat(value.masked_fill(value == 1, 2), torch.tensor([0 if rules["stop"] == "eos" else 1]))
            found[i] = pyro.sample(f"z{i}", d, obs=value)

        found: dict[int, torch.Tensor] = {}
        outside = [i for i, rules in enumerate(sites) if not rules["plate"]]
        for i in outside:
            site(i, False)
        with pyro.plate("data", B):
            for i in range(len(sites)):
                if i not in outside:
                    site(i, True)

    return run


@settings(max_examples=30)
@given(programs_of_texts(), st.sampled_from(sorted(LM)), st.booleans(), st.booleans(), st.integers(1, 4))
def test_any_program_has_the_density_of_its_sites(sites, arch, packed, budgeted, n):
    lm = LM[arch]
    lm.token_budget = 40 if budgeted else 16_384
    query = Query(written(lm, sites), None, max_plate_nesting=1)
    with torch.no_grad():
        pair = query.run(programs.Draw(), particles=n)
    trace, plates = pair.model, pair.plates()
    with packing(packed):
        together = log_density(trace, plates)
        alone = sum(site_log_prob(node, plates) for node in programs.scored(trace).values())
        grads = [torch.autograd.grad(x.sum(), lm.trainable_parameters()) for x in (together, alone)]
        with torch.no_grad():
            again = log_density(trace, plates)
    assert (together - alone).abs().max() < 1e-12 * (1 + alone.abs().max())
    assert (again - alone).abs().max() < 1e-12 * (1 + alone.abs().max())
    assert all((a - b).abs().max() < 1e-10 * (1 + b.abs().max()) for a, b in zip(*grads, strict=True))


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 4), st.booleans())
def test_requests_together_are_answered_as_alone_and_cost_no_more(seed, number, trees):
    lm = NETWORK
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 4, (3, 4), generator=g)
    requests = []
    for _ in range(number):
        shape = [n for n in (2, 3, 2) if int(torch.randint(2, (), generator=g))]
        context = text.cat(
            *(words[torch.randint(3, shape, generator=g)] for _ in range(int(torch.randint(1, 4, (), generator=g))))
        )
        value = torch.randint(1, 4, (*shape, int(torch.randint(1, 5, (), generator=g))), generator=g)
        requests.append(Request(lm, context, value, gather(value)))
    before, TUNING.worthwhile = TUNING.worthwhile, 1.0 if trees else -1.0
    try:
        with torch.no_grad(), spied(lm) as spent:
            together = score_together(requests)
        with torch.no_grad(), spied(lm) as separately:
            alone = [score_together([request])[0] for request in requests]
    finally:
        TUNING.worthwhile = before
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(together, alone, strict=True))
    assert sum(spent) <= sum(separately)


NETWORK = network()


class Twice(Completion):
    """Its density is the square of a completion's; it looks like the method that it overrides."""

    @functools.wraps(Completion.log_prob)
    def log_prob(self, value):
        return 2 * super().log_prob(value)


class Mocked(Completion):
    """Its density is whatever an object says that has all attributes."""

    log_prob = mock.MagicMock(return_value=torch.tensor(-3.0))


def test_a_density_that_was_written_anew_is_asked():
    lm, y = network(), Y[0, 0]
    expected = 2 * Completion(lm, X[0], max_tokens=LY, stop=None).log_prob(y), torch.tensor(-3.0)
    for kind, log_p in zip((Twice, Mocked), expected, strict=True):

        def model(kind=kind):
            pyro.sample("y", kind(lm, X[0], max_tokens=LY, stop=None), obs=y)

        torch.testing.assert_close(weigh(Query(model, None, ()), 1).u[0].double(), log_p.double())
