"""`Completion`: it normalises under every combination of its rules; what it computes, and how often."""

from __future__ import annotations

import math
from functools import cache
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from contracts import DOT, EOS, VOCAB, A, B, C, after, after_mask, assert_follows, small_adapter
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from reference import Law, Plain, Tokens, tokens
from tiny import tiny_lm

from lmppl import constraints, text
from lmppl.distributions import Completion, DeadEnd
from lmppl.text import PAD

STOPS = {"eos": ("eos", (EOS,)), "string": (".", (DOT,)), "id": (A, (A,)), "several": (["eos", "."], (EOS, DOT))}
STOPS["none"] = (None, ())
ALLOWED = {
    "any": (None, None),
    "mask": (torch.tensor([True, True, True, True, False]), lambda _: {EOS, DOT, A, B}),
    "ids": ([DOT, A, C], lambda _: {DOT, A, C}),
    "callable": (after_mask, after),
}

# Normalisation, in every combination ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["pad is eos", "pad apart", "adds bos"])
def plain(request) -> Plain:
    if request.param == "adds bos":
        return Plain(tiny_lm("llama", vocab=VOCAB + 1, pad_is_eos=True, add_bos=True))
    return Plain(tiny_lm("gpt2", vocab=VOCAB + 1, pad_is_eos=request.param == "pad is eos"))


@pytest.mark.parametrize("allowed", ALLOWED)
@pytest.mark.parametrize("stop", STOPS)
def test_normalised_in_every_combination(stop, allowed):
    """min_tokens x max_tokens x stop x allowed x temperature; prompts of unequal length, one of them empty."""
    plain = _shared_plain()
    prompts: list[Tokens] = [(), (A, B, C)]
    prompt = torch.tensor([[PAD] * 3, [A, B, C]])
    given_stop, stops = STOPS[stop]
    given_allowed, law_allowed = ALLOWED[allowed]
    minima = (0, 1, torch.tensor([1, 0]))
    maxima = (1, 2, torch.tensor([2, 1]))
    temperatures = (1.0, 0.7, torch.tensor([0.5, 2.0]))
    for low, high, heat in product(minima, maxima, temperatures):
        d = Completion(
            plain.lm,
            prompt,
            min_tokens=low,
            max_tokens=high,
            stop=given_stop,
            allowed=given_allowed,
            temperature=heat,
        )
        rows = [[float(torch.as_tensor(x).expand(2)[i]) for x in (low, high, heat)] for i in range(2)]
        laws = [
            Law(plain, p, int(h), int(lo), stops, law_allowed, t) for p, (lo, h, t) in zip(prompts, rows, strict=True)
        ]
        assert_follows(d, laws)


@cache
def _shared_plain() -> Plain:
    """One network for all combinations."""
    return Plain(tiny_lm("gpt2", vocab=VOCAB))


@pytest.mark.parametrize("stop", STOPS)
def test_normalised_for_every_tokenizer(plain, stop):
    given_stop = STOPS[stop][0]
    stops = tuple(plain.lm.stop_ids(given_stop).tolist())  # the ids of "." and the letters depend on the tokenizer
    d = Completion(plain.lm, torch.tensor([[PAD, PAD], [A, PAD]]), max_tokens=2, stop=given_stop)
    assert_follows(d, [Law(plain, p, 2, 0, stops) for p in ((), (A,))])


def test_no_tokens_at_all():
    plain = _shared_plain()
    d = Completion(plain.lm, torch.tensor([[A]]), max_tokens=0, stop=["eos", "."])
    assert_follows(d, [Law(plain, (A,), 0, 0, (EOS, DOT))])
    empty = Completion(plain.lm, torch.tensor([A]), max_tokens=0, stop=None)
    value, drawn = empty.sample_and_log_prob()
    assert empty.event_shape == (0,) and empty.log_prob(value) == drawn == 0.0
    assert empty.log_prob(value).dtype == drawn.dtype == plain.lm.dtype
    assert empty.log_prob(torch.tensor([A])) == -math.inf


def test_at_the_limit_stop_is_certain_and_several_share():
    plain = _shared_plain()
    law = Law(plain, (A,), 2, 0, (EOS, DOT))
    one = Completion(plain.lm, torch.tensor([A]), max_tokens=2)
    assert one.token_log_probs(torch.tensor([B, C, EOS]))[2] == 0.0
    two = Completion(plain.lm, torch.tensor([A]), max_tokens=2, stop=["eos", "."])
    share = [two.token_log_probs(torch.tensor([B, C, s]))[2].exp().item() for s in (EOS, DOT)]
    logits = plain.logits((A, B, C))
    assert sum(share) == pytest.approx(1, abs=1e-9)
    assert share[0] / share[1] == pytest.approx(float((logits[EOS] - logits[DOT]).exp()), rel=1e-9)
    assert share[0] == pytest.approx(float(law.next((B, C))[EOS].exp()), abs=1e-9)


def test_a_constraint_keeps_forbidden_stops_out_even_at_the_limit():
    lm = tiny_lm(vocab=VOCAB)
    d = Completion(lm, torch.tensor([A]), max_tokens=2, stop=["eos", "."], allowed=constraints.ban(lm, ["."]))
    drawn = d.sample((50,))
    assert not (drawn == DOT).any() and (drawn == EOS).any(-1).all()


def test_tempering_tokens_is_not_tempering_the_sequence():
    """Per token: p(z_t)^(1/T) renormalised at each step.  Per sequence: p(z)^(1/T) renormalised over all texts."""
    plain, T = _shared_plain(), 2.0
    d = Completion(plain.lm, torch.tensor([[A]]), max_tokens=2, temperature=T)
    assert_follows(d, [Law(plain, (A,), 2, temperature=T)])
    base = Law(plain, (A,), 2).support()
    z = math.log(sum(math.exp(p / T) for p in base.values()))
    whole = {k: p / T - z for k, p in base.items()}
    per_token = Law(plain, (A,), 2, temperature=T).support()
    assert sum(abs(math.exp(whole[k]) - math.exp(per_token[k])) for k in base) / 2 > 0.02  # total variation

    def tempered(value):
        with poutine.scale(scale=1 / T):
            pyro.sample("z", Completion(plain.lm, torch.tensor([A]), max_tokens=2), obs=value)

    for k in list(base)[:5]:
        value = torch.tensor(k)
        assert poutine.trace(tempered).get_trace(value).log_prob_sum().item() == pytest.approx(base[k] / T, abs=1e-9)


# What is computed, and how often --------------------------------------------------------------------------------------


def test_a_shared_prompt_is_sent_through_the_network_once():
    lm = tiny_lm(vocab=VOCAB)
    prompt = torch.randint(1, VOCAB, (30,), generator=torch.Generator().manual_seed(0))
    d = Completion(lm, prompt, max_tokens=3)

    def sampled():
        with pyro.plate("particles", 16):
            return pyro.sample("z", Completion(lm, prompt, max_tokens=3))

    before = lm.tokens_scored
    z = sampled()
    assert lm.tokens_scored - before <= 30 + 16 * 3
    before = lm.tokens_scored
    d.expand((16,)).log_prob(z)
    assert lm.tokens_scored - before <= 30 + 16 * 4


def test_a_site_that_does_not_depend_on_particles_is_scored_once():
    lm = tiny_lm(vocab=VOCAB)
    observed = torch.tensor([A, B, EOS])

    def model():
        with pyro.plate("particles", 100):
            pyro.sample("y", Completion(lm, torch.tensor([C]), max_tokens=3), obs=observed)

    trace = poutine.trace(model).get_trace()
    before = lm.tokens_scored
    trace.compute_log_prob()
    assert trace.nodes["y"]["log_prob"].shape == (100,)
    assert lm.tokens_scored - before <= 3


def test_an_observation_narrower_than_the_event():
    lm = tiny_lm(vocab=VOCAB)
    d = Completion(lm, lm.encode(["a", "bc"]), max_tokens=7)
    y = lm.encode(["ab", "c"], stop="eos")
    assert (d.log_prob(y) - d.log_prob(text.pad(y, 8))).abs().max() == 0
    for i, prompt in enumerate([(A,), (B, C)]):
        assert d.log_prob(y)[i].item() == pytest.approx(Law(Plain(lm), prompt, 7).log_prob(tokens(y[i])), abs=1e-9)


def test_text_begins_with():
    """stop=None with a tensor max_tokens: the probability that the text begins with y."""
    lm = tiny_lm(vocab=VOCAB)
    prompt = lm.encode("a")
    y = lm.encode(["ab", "c"])
    begins = Completion(lm, prompt, max_tokens=text.length(y), stop=None)
    whole = Completion(lm, prompt, max_tokens=4, stop=None)
    support = whole.enumerate_support()
    for i in range(2):
        n = int(text.length(y[i]))
        mass = whole.log_prob(support)[(support[:, :n] == y[i, :n]).all(-1)].logsumexp(0)
        assert begins.log_prob(y)[i].item() == pytest.approx(mass.item(), abs=1e-9)


@given(st.lists(st.integers(0, 4), min_size=0, max_size=6), st.integers(0, 3), st.integers(0, 3))
def test_any_value_has_the_probability_of_a_loop(ids, low, extra):
    plain = _shared_plain()
    d = Completion(plain.lm, torch.tensor([A]), min_tokens=low, max_tokens=low + extra, stop=["eos", "."])
    law = Law(plain, (A,), low + extra, low, (EOS, DOT))
    value = torch.tensor(ids, dtype=torch.long)
    assert d.log_prob(value).item() == pytest.approx(law.log_prob(tuple(ids)), abs=1e-9)


def test_a_dead_end_is_impossible_in_scoring_and_an_error_in_sampling():
    """A constraint that permits nothing after "a": texts through it are impossible, and no gradient is NaN."""
    lm = tiny_lm(vocab=VOCAB)
    guide = small_adapter(lm)

    def narrow(prefix):
        mask = torch.ones(*prefix.shape[:-1], VOCAB, dtype=torch.bool)
        return mask & ~(prefix == A).any(-1, keepdim=True) if prefix.shape[-1] else mask

    d = Completion(guide, torch.tensor([B]), max_tokens=3, allowed=narrow)
    z = torch.tensor([[A, B, EOS], [B, C, EOS], [B, A, EOS]])
    log_prob = d.log_prob(z)
    assert log_prob.isfinite().tolist() == [False, True, False]
    log_prob[1].backward()
    assert all(p.grad.isfinite().all() for p in guide.trainable_parameters())
    with pytest.raises(DeadEnd, match="allowed"):
        d.sample((200,))


def test_a_constraint_is_asked_about_unfinished_texts_only():
    lm = tiny_lm(vocab=VOCAB)

    def strict(prefix):
        assert not ((prefix == PAD) | (prefix == EOS)).any() and prefix.shape[-1] < 3
        return torch.ones(VOCAB, dtype=torch.bool)

    d = Completion(lm, torch.tensor([B]), max_tokens=3, allowed=strict)
    z = d.sample((50,))
    free = Completion(lm, torch.tensor([B]), max_tokens=3)
    assert (d.log_prob(z) - free.log_prob(z)).abs().max() < 1e-9


def test_temperature_is_trainable():
    lm = tiny_lm(vocab=VOCAB)
    heat = torch.tensor(1.0, requires_grad=True)
    z = torch.tensor([A, B, EOS])
    Completion(lm, torch.tensor([B]), max_tokens=2, temperature=heat).log_prob(z).backward()
    step = 1e-2
    up, down = (
        Completion(lm, torch.tensor([B]), max_tokens=2, temperature=1 + s).log_prob(z).item() for s in (step, -step)
    )
    assert heat.grad.item() == pytest.approx((up - down) / (2 * step), rel=2e-2)


def test_svi_trains_an_adapter_registered_with_pyro():
    """The SVI path: trainable adapter parameters registered one by one; the ELBO rises towards the evidence."""
    lm = tiny_lm(vocab=VOCAB)
    guide_lm = lm.with_adapter(LoraConfig(r=4, target_modules="all-linear"), name="guide")

    def model():
        z = pyro.sample("z", Completion(lm, torch.tensor([B]), max_tokens=1))
        pyro.factor("f", torch.where(z[..., 0] == C, 0.0, -5.0))

    def guide():
        for i, p in enumerate(guide_lm.trainable_parameters()):
            pyro.param(f"guide_{i}", p)
        pyro.sample("z", Completion(guide_lm, torch.tensor([B]), max_tokens=1))

    optimizer = pyro.optim.Adam({"lr": 3e-2})
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, optimizer, loss=elbo)
    p, q = (Completion(net, torch.tensor([B]), max_tokens=1) for net in (lm, guide_lm))
    z = p.enumerate_support()
    log_joint = p.log_prob(z).detach() + torch.where(z[:, 0] == C, 0.0, -5.0)

    def divergence():
        with torch.no_grad():
            log_q = q.log_prob(z)
            return (log_q.exp() * (log_q - log_joint.log_softmax(0))).sum().item()

    before = divergence()
    for _ in range(60):
        svi.step()
    assert divergence() < 0.1 * before


def test_enumeration_by_pyro():
    """A text site can be enumerated in parallel: TraceEnum_ELBO gives the evidence without sampling."""
    lm, one = tiny_lm(vocab=VOCAB), torch.ones((), dtype=torch.float64)

    @pyro.infer.config_enumerate
    def model():
        z = pyro.sample("z", Completion(lm, torch.tensor([B]), max_tokens=2))
        pyro.sample("y", dist.Normal(text.length(z).double(), one), obs=1.5 * one)

    d = Completion(lm, torch.tensor([B]), max_tokens=2)
    z = d.enumerate_support()
    exact = (d.log_prob(z) + dist.Normal(text.length(z).double(), one).log_prob(1.5 * one)).logsumexp(0)
    loss = pyro.infer.TraceEnum_ELBO(max_plate_nesting=0).loss(model, lambda: None)
    assert -loss == pytest.approx(exact.item(), abs=1e-9)


def test_a_batch_of_nothing():
    lm = tiny_lm(vocab=VOCAB)
    d = Completion(lm, torch.zeros(0, 3, dtype=torch.long), max_tokens=2)
    z = d.sample((4,))
    assert z.shape == (4, 0, 3) and d.log_prob(z).shape == (4, 0) and d.prefix_log_probs(z).shape == (4, 0, 3)


def test_rows_may_use_the_context_to_its_end():
    """A long prompt with a small limit beside a short prompt with a large one: each fits by itself."""
    lm = tiny_lm(vocab=VOCAB, max_length=12)
    prompt = torch.tensor([[A, B] * 5, [A] + [PAD] * 9])
    d = Completion(lm, prompt, max_tokens=torch.tensor([2, 11]), min_tokens=torch.tensor([0, 11]))
    z, log_prob = d.sample_and_log_prob((3,))
    assert (text.length(z[:, 1]) == 12).all()
    assert (d.log_prob(z) - log_prob).abs().max() < 1e-9


@pytest.mark.parametrize(
    "rule", [{"max_tokens": [1, 2, 3]}, {"temperature": [0.5, 1.0, 2.0]}, {"min_tokens": [0, 1, 2]}]
)
def test_rules_may_have_axes_that_neither_prompt_nor_value_has(rule):
    (name, numbers), lm = next(iter(rule.items())), tiny_lm(vocab=6)
    value, prompt = torch.tensor([[[2, 0, PAD, PAD]], [[3, 3, 0, PAD]]]), torch.tensor([2, 3])

    def log_prob(number):
        return Completion(lm, prompt, **({"max_tokens": 3} | {name: number})).log_prob(value)

    alone = torch.cat([log_prob(n) for n in numbers], 1)  # (value, rule)
    torch.testing.assert_close(log_prob(torch.tensor(numbers)), alone, rtol=0, atol=1e-12)


def test_broader_rows_and_others_have_finite_gradients_where_tokens_are_barred():
    """With epsilon 0 in a row, a barred token has log(0 + 0), whose derivative is none."""
    lm = tiny_lm(dtype=torch.float64)
    allowed = torch.arange(lm.vocab_size) != 3
    d = Completion(lm, torch.tensor([2]), max_tokens=3, allowed=allowed)
    value, weights = torch.tensor([4, 5, 0]), lm.trainable_parameters()
    epsilon = torch.tensor([0.25, 0.0], dtype=torch.float64)
    both = torch.autograd.grad(d.broadened(epsilon=epsilon).log_prob(value).sum(), weights, allow_unused=True)
    first = torch.autograd.grad(d.broadened(epsilon=epsilon[0]).log_prob(value), weights, allow_unused=True)
    second = torch.autograd.grad(d.log_prob(value), weights, allow_unused=True)
    for a, b, c in zip(both, first, second, strict=True):
        assert (a is None and b is None and c is None) or (a - b - c).abs().max() < 1e-12
