"""Mixtures and products of texts: every text of small random language models, by plain loops; u corrects a product."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Law, Plain, tokens
from tiny import adapter, flat_lm, tiny_lm

from lmppl.distributions import AutoregressiveText, Completion, TextMixture, TextProduct
from lmppl.distributions.token_steps import TokenSteps
from lmppl.inference import SMC, Enumeration, Importance, MetropolisHastings
from lmppl.inference.core.query import Query
from lmppl.inference.judging.quality import draw_quality
from lmppl.testing import TextContract, support

MAX_TOKENS = 2
LM = flat_lm(vocab=5)  # eos, ".", a, b, c
OTHER = adapter(LM, 1, std=0.5)


def two(lm, prompts=("a", "bc"), **options):
    return Completion(lm, lm.encode(list(prompts)), **{"max_tokens": MAX_TOKENS, "stop": "."} | options)


class Letters(AutoregressiveText):
    """A component that is no language model: "a" as often as "b", and as an end; never a "c" and never an eos."""

    def next_logits(self, prefix, element):
        return torch.tensor([-math.inf, 0.0, 0.0, 0.0, -math.inf], dtype=torch.double).expand(len(prefix), 5)


class TestMixture(TextContract):
    def distribution(self):
        logits = torch.tensor([[0.3, -0.5, 1.0], [2.0, 0.1, -1.0]], dtype=torch.double)
        letters = Letters(["", ".", "a", "b", "c"], max_tokens=MAX_TOKENS, stop=1)
        return TextMixture([two(LM), two(OTHER, ("c", "a"), temperature=1.5), letters], logits)


class TestProduct(TextContract):
    def distribution(self):
        powers = torch.tensor([[1.0, 1.0, -1.0], [0.5, 2.0, 0.3]], dtype=torch.double)
        return TextProduct([two(OTHER), two(OTHER, ("c", "a"), max_tokens=3), two(LM)], powers)


class TestRulesOfTheComponents(TextContract):
    """One writes no "a", one has a text of a token or more, one has a longer text."""

    def distribution(self):
        a = int(LM.encode("a"))
        allowed = torch.arange(5) != a
        return TextMixture([two(LM, allowed=allowed), two(OTHER, min_tokens=1, max_tokens=3)], torch.zeros(2).double())


numbers = st.lists(st.floats(-2.0, 2.0, allow_nan=False), min_size=3, max_size=3)


def laws(seed):
    """Three completions of random networks, and log p of their texts' prefixes and stops by plain loops."""
    lms = [flat_lm(vocab=4, seed=seed + k) for k in range(3)]
    fns = [Completion(lm, lm.encode("ab"[: 1 + k % 2]), max_tokens=MAX_TOKENS, stop=".") for k, lm in enumerate(lms)]
    plain = [Law(Plain(f.lm), tokens(f.prompt), MAX_TOKENS, stops=(int(f.stop),)) for f in fns]
    return fns, plain


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), numbers)
def test_a_mixture_is_the_sum_over_its_components(seed, logits):
    fns, plain = laws(seed)
    d = TextMixture(fns, torch.tensor(logits, dtype=torch.double))
    total = sum(map(math.exp, logits))
    supports = [law.support() for law in plain]
    for z in support(d):
        p = sum(math.exp(x) / total * math.exp(s[tokens(z)]) for x, s in zip(logits, supports, strict=True))
        assert d.log_prob(z).item() == pytest.approx(math.log(p), abs=1e-5)
    steps = d.token_steps(torch.Size([1]))  # the next token, by all texts that go on so
    before = 0.0
    for v in (2, 3):
        next_log_p = steps.log_probs()[0]
        for w in range(4):
            begins = tuple([*steps.prefix[0].tolist(), w])
            mass = sum(
                math.exp(x) / total * sum(math.exp(p) for z, p in s.items() if z[: len(begins)] == begins)
                for x, s in zip(logits, supports, strict=True)
            )
            assert next_log_p[w].exp().item() * math.exp(before) == pytest.approx(mass, abs=1e-6)
        before += next_log_p[v].item()
        steps.append(torch.tensor([v]))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), numbers)
def test_a_product_is_normalised_token_by_token(seed, powers):
    """By loops over the tokens of every text, from each component's own conditionals."""
    fns, plain = laws(seed)
    supports = [law.support() for law in plain]

    def next_token(s, begun):
        """Of one component, by summing over all of its texts."""
        mass = [sum(math.exp(p) for z, p in s.items() if z[: len(begun) + 1] == (*begun, w)) for w in range(4)]
        return [m / sum(mass) for m in mass]

    d = TextProduct(fns, torch.tensor(powers, dtype=torch.double))
    every = support(d)
    assert d.log_prob(every).logsumexp(0).abs() < 1e-6
    for z, found in zip(every, d.log_prob(every), strict=True):
        log_p = 0.0
        for t, v in enumerate(tokens(z)):
            of = [next_token(s, tokens(z)[:t]) for s in supports]
            weights = [
                math.prod(own[w] ** a for own, a in zip(of, powers, strict=True))
                if all(own[w] > 0 for own in of)
                else 0.0
                for w in range(4)
            ]
            log_p += math.log(weights[v] / sum(weights))
        assert found.item() == pytest.approx(log_p, abs=1e-4)


def test_one_component_is_itself():
    (own, mixed, product) = (
        two(OTHER),
        TextMixture([two(OTHER)], torch.zeros(1)),
        TextProduct([two(OTHER)], torch.ones(1)),
    )
    every = support(own)[:, None]
    for d in (mixed, product, TextProduct([two(OTHER), two(LM), two(LM)], torch.tensor([1.0, 0.7, -0.7]))):
        assert (d.log_prob(every) - own.log_prob(every)).abs().max() < 1e-6


@pytest.mark.parametrize("said", ["a", "ab", ".a", "a.b", "abc.", ""])
def test_a_text_without_its_stop_or_with_more_behind_it_is_impossible(said):
    z = LM.encode(said) if said else torch.full((1,), -1)
    for d in (TextProduct([two(LM), two(OTHER)], torch.ones(2)), TextMixture([two(LM), two(OTHER)], torch.zeros(2))):
        assert bool((d.log_prob(z) == -math.inf).all())
        assert bool(d.log_prob(LM.encode("a", stop=".")).isfinite().all())


def test_where_one_can_write_nothing():
    """A product of what shares no text is a dead end; a mixture goes on with what can."""
    a, b = (torch.tensor([False, True, own == "a", own == "b", False]) for own in "ab")
    one, other = (two(LM, allowed=allowed, min_tokens=1) for allowed in (a, b))
    product = TextProduct([one, other], torch.ones(2))
    z, log_p = (x for x in pyro_draw(product))
    assert bool((z == -1).all()) and bool((log_p == -math.inf).all())
    assert bool((product.log_prob(support(one)[:, None]) == -math.inf).all())
    mixture = TextMixture([one, other], torch.zeros(2))
    mixed = LM.encode("ab", stop=".")
    assert mixture.log_prob(LM.encode("aa", stop=".")).isfinite().all() and not mixture.log_prob(mixed).isfinite().any()


def pyro_draw(d):
    from lmppl.inference.core.sites import text_of

    return text_of(d).draw()


def test_weights_and_components_get_the_gradient():
    """By finite differences of the logits; the adapter's by autograd through each component apart."""
    logits = torch.tensor([0.2, -0.7], dtype=torch.double, requires_grad=True)
    z = two(OTHER).sample()
    d = TextMixture([two(LM), two(OTHER)], logits)
    d.log_prob(z).sum().backward()
    for k in range(2):
        step = torch.zeros(2).double().index_fill(0, torch.tensor(k), 1e-5)
        ends = [TextMixture([two(LM), two(OTHER)], logits.detach() + s).log_prob(z).sum() for s in (step, -step)]
        assert logits.grad[k].item() == pytest.approx(((ends[0] - ends[1]) / 2e-5).item(), abs=1e-6)
    share = (two(OTHER).log_prob(z) + logits.log_softmax(0)[1] - d.log_prob(z)).exp().detach()
    expected = torch.autograd.grad((share * two(OTHER).log_prob(z)).sum(), OTHER.trainable_parameters())
    found = [p.grad for p in OTHER.trainable_parameters()]
    assert all((a - b).abs().max() < 1e-9 for a, b in zip(found, expected, strict=True))
    OTHER.zero_grad()


def target(x):
    with pyro.plate("x", 2):
        z = pyro.sample("z", two(LM))
        pyro.factor("first", 1.5 * (z[..., 0] == 2).double())
        pyro.factor("again", 1.5 * (z[..., 1] == 2).double())


PROPOSALS = {
    "mixture": lambda: TextMixture([two(OTHER), two(LM)], torch.zeros(2).double()),
    "product": lambda: TextProduct([two(OTHER), two(LM, ("c", "a")), two(LM)], torch.tensor([0.4, -0.3, 0.9]).double()),
}


@pytest.mark.parametrize("kind", PROPOSALS)
@pytest.mark.parametrize("algorithm", ["importance", "smc", "mcmc"])
def test_u_corrects_it(kind, algorithm):
    """The posterior of two factors by each sampler, a composition as its proposal.

    The second moment of its weights is summed over all texts; the evidence is within 5 of the standard errors that it
    gives, the total variation of the draws below its expectation's bound and 5 standard errors.  Of the 4,000 draws of
    100 chains a quarter are counted.
    """

    def guide(x):
        with pyro.plate("x", 2):
            pyro.sample("z", PROPOSALS[kind]())

    pyro.set_rng_seed(0)
    exact = Enumeration(target).run(0)
    z, n = exact.samples["z"], 4000
    log_q = PROPOSALS[kind]().log_prob(z).detach()
    moment = ((2 * exact.log_weights - log_q).logsumexp(0) - 2 * exact.log_evidence).exp()  # of weights of mean 1
    assert bool((moment < 10).all()), "the test says little"
    if algorithm == "mcmc":
        found, n = MetropolisHastings(target, guide, num_chains=100, num_samples=40, warmup=40).run(0), n // 4
    else:
        found = {"importance": Importance, "smc": SMC}[algorithm](target, guide, num_particles=n).run(0)
        ratio = (found.log_evidence - exact.log_evidence).exp()
        assert bool(((ratio - 1).abs() < 5 * (moment / n).sqrt()).all())
    most = 0.5 * (len(z) * moment / n).sqrt() + 5 * 0.5 * (moment / n).sqrt()
    tv = draw_quality(exact, found)
    assert bool((tv < most).all()), (tv, most)


def test_the_target_reads_what_a_component_has_read():
    """In SMC the model's text has the prompt and network of a component, whose logits it takes."""
    share = PROPOSALS["product"]().token_steps()
    steps = two(LM).token_steps(share=share)
    assert isinstance(steps, TokenSteps) and steps._share is share.parts[2]
    assert two(LM, ("b", "bc")).token_steps(share=share)._share is None
    letters = Letters(["", ".", "a", "b", "c"], (2,), max_tokens=MAX_TOKENS, stop=1)
    assert two(LM).token_steps(share=letters.token_steps())._share is None
    before = LM.tokens_scored
    both = [s.score(torch.tensor([2, 3])) for s in (share, steps)]
    for s in (share, steps):
        s.append(torch.tensor([2, 3]))
    both += [s.score(torch.tensor([2, 3])) for s in (share, steps)]
    plain = two(LM).token_steps()
    assert (plain.score(torch.tensor([2, 3])) - both[1]).abs().max() < 1e-9
    assert LM.tokens_scored > before


def test_texts_that_begin_alike_are_read_once():
    d = TextProduct([two(LM, max_tokens=3)], torch.ones(1))
    every = support(d)[:, None]
    before = LM.tokens_scored
    d.log_prob(every)
    assert LM.tokens_scored - before < 0.7 * every[:, 0].ge(0).sum() * 2


def test_the_networks_of_all_components_are_counted():
    other = flat_lm(vocab=5, seed=7)

    def guide():
        pyro.sample("z", TextProduct([two(LM), two(other)], torch.ones(2)).to_event(1))

    assert Query(guide, None).networks == [LM.network, other.network]


def test_arguments_out_of_range():
    for components in ([], [torch.distributions.Normal(0, 1)]):
        with pytest.raises(ValueError, match="components"):
            TextMixture(components, torch.zeros(len(components)))
    with pytest.raises(ValueError, match="logits"):
        TextMixture([two(LM)], torch.zeros(2))
    with pytest.raises(ValueError, match="powers"):
        TextProduct([two(LM)], torch.tensor(1.0))
    with pytest.raises(ValueError, match="powers: expected finite"):
        TextProduct([two(LM)], torch.tensor([math.nan]))
    for other in (two(LM, stop="eos"), two(tiny_lm(vocab=6))):
        with pytest.raises(ValueError, match="components: their tokens or stops differ"):
            TextProduct([two(LM), other], torch.ones(2))
    with pytest.raises(ValueError, match="stop token"):
        TextProduct([two(LM, stop=None)], torch.ones(1))
    with pytest.raises(ValueError, match="do not broadcast"):
        TextProduct([two(LM)], torch.ones(3, 1))
    for wrong in ([0.0, 0.0], torch.tensor([0, 0]), torch.tensor([0.0, math.nan]), torch.tensor([-math.inf] * 2)):
        with pytest.raises(ValueError, match="logits: expected"):
            TextMixture([two(LM), two(LM)], wrong)
    with pytest.raises(ValueError, match="powers: expected a tensor"):
        TextProduct([two(LM)], [1.0])


@pytest.mark.parametrize("kind", [TextMixture, TextProduct])
def test_a_damaged_network_is_no_text(kind):
    damaged = flat_lm(vocab=5, seed=3)
    for p in damaged.model.parameters():
        p.data.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        kind([two(LM), two(damaged)], torch.ones(2)).sample()


@pytest.mark.parametrize("kind", [TextMixture, TextProduct])
@pytest.mark.parametrize("guided", ["by a component", "by a mixture"])
def test_smc_of_a_composed_text_under_a_guide_that_shares_its_network(kind, guided):
    """Nothing is observed, so that the evidence estimates 1 without bias; the guide's steps append first."""
    other = flat_lm(vocab=5, seed=1)

    def model():
        with pyro.plate("prompts", 2):
            pyro.sample("z", kind([two(LM), two(other)], torch.ones(2)))

    def guide():
        mixed = TextMixture([two(LM), two(other)], torch.tensor([0.0, 1.0]))
        with pyro.plate("prompts", 2):
            pyro.sample("z", two(LM) if guided == "by a component" else mixed)

    pyro.set_rng_seed(0)
    found = torch.stack([SMC(model, guide, num_particles=100).run().log_evidence for _ in range(40)]).exp()
    assert ((found.mean(0) - 1).abs() < 5 * found.std(0) / 40**0.5).all()
