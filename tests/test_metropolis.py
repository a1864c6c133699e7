"""Metropolis: kernels against transition matrices by plain loops, chains against enumeration, `Completion.regrow`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from reference import Law, Plain, Tokens, tokens
from tiny import tiny_lm
from torch import Tensor

from lmppl import text
from lmppl.distributions import Completion
from lmppl.engine.prompts import prompts
from lmppl.inference import Enumeration, MetropolisHastings, ZeroEvidence
from lmppl.inference.metropolis.kernels import Setting, accept, independence, regrow
from lmppl.text import PAD

EOS, DOT, A, B = range(4)
LM = tiny_lm(vocab=4, dtype=torch.float64)
OTHER = tiny_lm("llama", vocab=4, seed=1, dtype=torch.float64)
PLAIN, PLAIN_OTHER = Plain(LM), Plain(OTHER)


def no_repeat(prefix: Tensor) -> Tensor:
    """A constraint on prefixes: no token twice in a row."""
    mask = torch.ones(*prefix.shape[:-1], 4, dtype=torch.bool)
    return mask if prefix.shape[-1] == 0 else mask.scatter(-1, prefix[..., -1:], False)


# -- Completion.regrow -----------------------------------------------------------------------------------------------

PROMPTS = torch.tensor([[A, PAD], [B, A]])
CASES = {
    "eos": {},
    "several stops": {"stop": ["eos", "."], "min_tokens": 1},
    "no stop": {"stop": None, "max_tokens": torch.tensor([2, 3])},
    "rows": {"max_tokens": torch.tensor([1, 3]), "min_tokens": torch.tensor([0, 2]), "stop": "."},
    "temperature": {"temperature": torch.tensor([0.6, 2.0])},
    "mask": {"allowed": [EOS, A, B]},
    "callable": {"allowed": no_repeat},
}


def completion(case: str, lm=LM, prompt: Tensor = PROMPTS) -> Completion:
    return Completion(lm, prompt, **{"max_tokens": 3, **CASES[case]})


def suffix(d: Completion, value: Tensor, keep: Tensor) -> Tensor:
    """log p of the tokens from ``keep`` on."""
    by_token = d.token_log_probs(value)
    return torch.where(torch.arange(value.shape[-1]) >= keep[..., None], by_token, 0.0).sum(-1).detach()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_regrow_keeps_what_it_should_and_scores_the_rest(case, arch):
    lm = tiny_lm(arch, vocab=4, dtype=torch.float64)
    d = completion(case, lm).expand((50, 2))
    old = d.sample()
    keep = torch.randint(0, 6, (50, 2))
    new, log_prob = d.regrow(old, keep)
    assert new.shape == old.shape and log_prob.shape == keep.shape
    column = torch.arange(old.shape[-1])
    assert bool((new == old)[column < keep[..., None]].all())
    assert d.support.check(new).all() and d.log_prob(new).isfinite().all()
    torch.testing.assert_close(log_prob, suffix(d, new, keep))
    untouched = keep >= text.length(old)
    assert bool(text.equal(new, old)[untouched].all()) and bool((log_prob[untouched] == 0).all())
    assert not bool(text.equal(new, old)[keep == 0].all())


@pytest.mark.parametrize("case", CASES)
def test_regrow_from_the_start_is_a_fresh_draw(case):
    d = completion(case)
    pyro.set_rng_seed(3)
    fresh, log_fresh = d.sample_and_log_prob((20,))
    old = d.sample((20,))
    pyro.set_rng_seed(3)
    new, log_prob = d.regrow(old, 0)
    assert torch.equal(new, fresh) and torch.equal(log_prob, log_fresh)


@pytest.mark.parametrize("case", CASES)
def test_regrow_draws_from_the_law_given_what_is_kept(case):
    """Frequencies within 5 standard errors of p(z) / p(what is kept), for every text and every cut."""
    n, d = 4000, completion(case)
    support = d.enumerate_support()  # (K, 2, E)
    log_p = d.log_prob(support).detach()
    old = d.sample((1,))
    for keep in range(3):
        new, _ = d.regrow(old.expand(n, -1, -1), keep)
        for b in range(2):
            shares = (support[:, b, :keep] == old[0, b, :keep]).all(-1)
            p = log_p[:, b].masked_fill(~shares, -torch.inf).softmax(0)
            count = (new[:, None, b] == support[:, b]).all(-1).sum(0)
            assert_counts(count, p, n)


def assert_counts(count: Tensor, p: Tensor, n: int) -> None:
    """Counts of n draws within 5 standard deviations of n p; cells that expect fewer than 10 are taken together."""
    count, p = count.double(), p.double()
    assert int(count.sum()) == n and bool((count[p == 0] == 0).all())
    rare = p * n < 10
    count = torch.cat([count[~rare], count[rare].sum()[None]])
    p = torch.cat([p[~rare], p[rare].sum()[None]])
    slack = torch.where(p * n < 10, 5.0, 0.0)  # a Poisson tail is longer than a normal one
    assert bool(((count - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + slack + 1e-9).all()), (count, n * p)


def test_regrow_gives_the_same_texts_in_chunks():
    lm = tiny_lm(vocab=4)
    d = completion("several stops", lm).expand((30, 2))
    old, keep = d.sample(), torch.randint(0, 4, (30, 2))
    whole = None
    for lm.token_budget in (100_000, 60, 1):
        pyro.set_rng_seed(5)
        new, log_prob = d.regrow(old, keep)
        whole = (new, log_prob) if whole is None else whole
        assert torch.equal(new, whole[0])
        torch.testing.assert_close(log_prob, whole[1], rtol=0, atol=1e-5)


def test_regrow_costs_no_more_than_a_fresh_draw():
    lm = tiny_lm(vocab=4)
    d = Completion(lm, torch.randint(1, 4, (30,)), max_tokens=8, min_tokens=8).expand((16,))
    prompts(lm.network).capacity = 0  # each prompt is read anew
    old, passes = d.sample(), []
    d.regrow(old, 6)  # what is tried once per network has been tried
    lm.model.register_forward_hook(lambda *_: passes.append(1))

    def cost(keep) -> tuple[int, int]:
        before, _ = lm.tokens_scored, passes.clear()
        d.regrow(old, keep)
        return lm.tokens_scored - before, len(passes)

    # The prompt once, and seven tokens a text: nothing follows the eighth but a certain stop.
    fresh = 30 + 16 * 7
    assert cost(0) == (fresh, 8)
    assert cost(torch.arange(16) % 9) == (fresh, 8)
    assert cost(6) == (fresh, 3)  # prompt, what is kept, the seventh token
    assert cost(8 + torch.arange(16) % 2) == (30, 1)
    assert cost(9) == (0, 0)


def test_regrow_of_a_prefix_that_has_not_ended_goes_on():
    d = Completion(LM, "a", max_tokens=3, min_tokens=3)
    new, _ = d.regrow(torch.tensor([A, B]), 5)
    assert tokens(new)[:2] == (A, B) and len(tokens(new)) == 4


@pytest.mark.parametrize("keep", [-1, 1.0, True, 4])
def test_regrow_names_bad_arguments(keep):
    with pytest.raises(ValueError, match="keep"):
        Completion(LM, "a", max_tokens=2).regrow(torch.tensor([A, B, A, A]), keep)


# -- transition matrices by plain loops ------------------------------------------------------------------------------

State = tuple[Tokens, ...]
Proposals = Callable[[State], Iterator[tuple[State, float, float]]]  # z', k(z' | z), k(z | z') / k(z' | z)


def transition_matrix(states: list[State], log_target: dict[State, float], proposals: Proposals) -> Tensor:
    K = torch.zeros(len(states), len(states), dtype=torch.float64)
    number = {z: i for i, z in enumerate(states)}
    for z, i in number.items():
        for new, k, ratio in proposals(z):
            difference = log_target[new] - log_target[z]
            K[i, number[new]] += k * min(1.0, math.exp(difference) * ratio)
        K[i, i] += 1 - K[i].sum()
    return K


def ending(law: Law, z: Tokens, t: int) -> float:
    """q(z_{>t} | z_{<=t})."""
    return math.exp(sum(float(law.next(z[:s])[z[s]]) for s in range(t, len(z))))


def regrown(law: Law) -> Callable[[Tokens], Iterator[tuple[Tokens, float, float]]]:
    support = list(law.support())

    def proposals(z: Tokens) -> Iterator[tuple[Tokens, float, float]]:
        for t in range(len(z)):
            for new in support:
                if new[:t] == z[:t]:
                    there = ending(law, new, t) / len(z)
                    back = ending(law, z, t) / len(new)
                    yield new, there, back / there

    return proposals


def at_site(i: int, proposals: Callable[[Tokens], Iterator[tuple[Tokens, float, float]]]) -> Proposals:
    def joint(z: State) -> Iterator[tuple[State, float, float]]:
        for new, k, ratio in proposals(z[i]):
            yield (*z[:i], new, *z[i + 1 :]), k, ratio

    return joint


def both(first: Proposals, second: Proposals) -> Proposals:
    """Two independent proposals for different parts of the state, accepted or rejected together."""

    def joint(z: State) -> Iterator[tuple[State, float, float]]:
        for one, k1, r1 in first(z):
            for two, k2, r2 in second(one):
                yield two, k1 * k2, r1 * r2

    return joint


def assert_invariant(states: list[State], log_target: dict[State, float], K: Tensor) -> None:
    p = torch.tensor([log_target[z] for z in states], dtype=torch.float64).softmax(0)
    assert float((p @ K - p).abs().max()) < 1e-10
    assert float((K.sum(1) - 1).abs().max()) < 1e-12 and float(K.min()) >= -1e-12
    assert float((p[:, None] * K - (p[:, None] * K).T).abs().max()) < 1e-10  # detailed balance


def as_values(states: list[State], part: int, width: int) -> Tensor:
    return torch.stack([text.pad(torch.tensor(z[part]), width) for z in states])


def assert_moves(states: list[State], K: Tensor, new: list[Tensor], each: int) -> None:
    """The frequencies of new states, ``each`` runs from every state, against the rows of the matrix."""
    number = {z: i for i, z in enumerate(states)}
    rows = zip(*(x.tolist() for x in new), strict=True)
    found = torch.tensor([number[tuple(tuple(t for t in part if t != PAD) for part in row)] for row in rows])
    for i, ends in enumerate(found.view(len(states), each)):
        assert_counts(torch.bincount(ends, minlength=len(states)), K[i], each)


SEEN = (A, EOS)


def likelihood(z: Tensor, prompt: Tensor | str = "") -> Completion:
    return Completion(LM, LM.join(prompt, z), max_tokens=2, temperature=1.5)


def log_likelihood(z: Tokens, prompt: Tokens = ()) -> float:
    """Of ``SEEN``; an eos inside a prompt is dropped."""
    return Law(PLAIN, prompt + tuple(t for t in z if t != EOS), 2, temperature=1.5).log_prob(SEEN)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("rules", [{"max_tokens": 2}, {"max_tokens": 2, "stops": (EOS, DOT)}])
def test_regrowth_is_its_transition_matrix(rules, guided, temperature):
    """p, q and the likelihood are three different laws."""
    stop = {"stop": list(rules.get("stops", (EOS,)))}

    def model():
        z = pyro.sample("z", Completion(LM, "b", max_tokens=2, **stop))
        pyro.sample("y", likelihood(z), obs=torch.tensor(SEEN))

    def guide():
        pyro.sample("z", Completion(OTHER, "a", max_tokens=2, temperature=1.7, **stop))

    p = Law(PLAIN, (B,), **rules)
    q = Law(PLAIN_OTHER, (A,), temperature=1.7, **rules) if guided else p
    log_joint = {(z,): log_p + log_likelihood(z) for z, log_p in p.support().items()}
    states, target = list(log_joint), {z: x / temperature for z, x in log_joint.items()}
    K = transition_matrix(states, target, at_site(0, regrown(q)))
    assert_invariant(states, target, K)

    each = 1000
    z = as_values(states, 0, 3).repeat_interleave(each, 0)
    log_p = torch.tensor(list(log_joint.values()), dtype=torch.float64).repeat_interleave(each)
    moved = regrow(model, guide if guided else None, (), {}, {"z": z}, log_p, nesting=0, temperature=temperature)
    assert_moves(states, K, [moved.values["z"]], each)
    again = Completion(LM, "b", max_tokens=2, **stop).log_prob(moved.values["z"])
    torch.testing.assert_close(moved.log_p, again + likelihood(moved.values["z"]).log_prob(torch.tensor(SEEN)))
    assert bool(text.equal(moved.values["z"], z)[~moved.accepted].all())


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True])
def test_texts_in_a_plate_that_is_not_kept_move_together(guided):
    def texts(lm, prompt, temperature=1.0):
        with pyro.plate("parts", 2):
            return pyro.sample("z", Completion(lm, prompt, max_tokens=1, temperature=temperature))

    def model():
        z = texts(LM, PROMPTS)
        pyro.factor("same", 1.5 * text.equal(z[..., :1, :], z[..., 1:, :]))

    def guide():
        texts(OTHER, PROMPTS[:1], 2.0)

    p = [Law(PLAIN, (A,), 1), Law(PLAIN, (B, A), 1)]
    q = [Law(PLAIN_OTHER, (A,), 1, temperature=2.0)] * 2 if guided else p
    target = {
        (z, w): a + b + 1.5 * (z == w) for z, a in p[0].support().items() for w, b in p[1].support().items()
    }  # fmt: skip
    states = list(target)
    K = transition_matrix(states, target, both(*[at_site(i, regrown(q[i])) for i in range(2)]))
    assert_invariant(states, target, K)
    each = 1000
    z = torch.stack([as_values(states, i, 2) for i in range(2)], 1).repeat_interleave(each, 0)
    log_p = torch.tensor(list(target.values()), dtype=torch.float64).repeat_interleave(each)
    moved = regrow(model, guide if guided else None, (), {}, {"z": z}, log_p, nesting=1)
    assert_moves(states, K, list(moved.values["z"].unbind(1)), each)


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("move", ["k", "z", "independence"])
def test_a_categorical_before_a_text_that_it_masks(move, guided):
    """k = 0 masks the text, which then follows q: the target is p(k) q(z) there, p(k) p(z)^s p(y | z) elsewhere."""
    probs, guess = torch.tensor([[0.4, 0.6], [0.7, 0.3]], dtype=torch.float64)
    prompts = LM.encode(["a", "b"])

    def program(lm, probs, scale, temperature=1.0):
        k = pyro.sample("k", dist.Categorical(probs))
        with poutine.mask(mask=k == 1), poutine.scale(scale=scale):
            return k, pyro.sample("z", Completion(lm, prompts[k], max_tokens=1, temperature=temperature))

    def model():
        k, z = program(LM, probs, 0.5)
        pyro.factor("seen", torch.where(k == 1, likelihood(z).log_prob(torch.tensor(SEEN)), -2.0))

    def guide():
        program(OTHER, guess, 3.0, 1.5)

    of = [Law(PLAIN, (x,), 1) for x in (A, B)]
    q = [Law(PLAIN_OTHER, (x,), 1, temperature=1.5) for x in (A, B)] if guided else of
    support = list(of[0].support())
    q_k = guess if guided else probs
    target = {
        ((k,), z): math.log(probs[k]) + (0.5 * of[1].log_prob(z) + log_likelihood(z) if k else q[0].log_prob(z) - 2.0)
        for k in range(2)
        for z in support
    }

    def proposals(state: State) -> Iterator[tuple[State, float, float]]:
        ((k,), z) = state
        if move == "z":
            yield from at_site(1, regrown(q[k]))(state)
        for new in range(2):
            if move == "k":
                yield ((new,), z), float(q_k[new]), float(q_k[k] / q_k[new])
            elif move == "independence":
                for w in support:
                    there = float(q_k[new]) * math.exp(q[new].log_prob(w))
                    yield ((new,), w), there, float(q_k[k]) * math.exp(q[k].log_prob(z)) / there

    states = list(target)
    K = transition_matrix(states, target, proposals)
    assert_invariant(states, target, K)
    each = 2000
    values = {"k": torch.tensor([s[0][0] for s in states]), "z": as_values(states, 1, 2)}
    values = {name: v.repeat_interleave(each, 0) for name, v in values.items()}
    log_p = torch.tensor(list(target.values()), dtype=torch.float64).repeat_interleave(each)
    if move == "independence":
        setting = Setting(model, guide if guided else None, (), {}, 0, len(log_p))
        new = independence(setting, values, None, {})
        accepted = accept(log_p, new.density.joint, new.log_ratio)
        found = {n: torch.where(accepted.view(-1, *[1] * (v.dim() - 1)), new.values[n], v) for n, v in values.items()}
    else:
        found = regrow(model, guide if guided else None, (), {}, values, log_p, nesting=0, site=move).values
    assert_moves(states, K, [found["k"][:, None], found["z"]], each)


# -- chains against enumeration --------------------------------------------------------------------------------------


@st.composite
def programs(draw) -> tuple[Callable, Callable | None, list[str]]:
    """A small model, perhaps a guide, and the model's latent sites."""
    p, q = (tiny_lm(draw(st.sampled_from(["gpt2", "llama"])), vocab=4, seed=draw(st.integers(0, 99))) for _ in range(2))
    x = p.encode(draw(st.lists(st.text("ab", max_size=3), min_size=2, max_size=2)))
    y = p.encode(draw(st.lists(st.text("ab", max_size=2), min_size=2, max_size=2)), stop="eos")
    plate, second, before, guided = (draw(st.booleans()) for _ in range(4))
    rules = {
        "max_tokens": draw(st.integers(1, 2)),
        "stop": draw(st.sampled_from(["eos", ["eos", "."]])),
        "min_tokens": draw(st.integers(0, 1)),
    }
    if not plate:
        x, y = x[0], y[0]
    probs = torch.tensor([0.3, 0.7])

    def program(lm, probs, temperature):
        k = pyro.sample("k", dist.Categorical(probs)) if before else torch.tensor(1)
        prompt = LM.join(x, LM.encode(["b", ""])[k])
        z = pyro.sample("z", Completion(lm, prompt, **{**rules, "temperature": temperature}))
        w = pyro.sample("w", Completion(lm, LM.join(z, prompt), max_tokens=1, temperature=2.5)) if second else x
        return z, w

    def data():
        return pyro.plate("data", 2) if plate else poutine.scale(scale=1.0)

    def model():
        with data():
            z, w = program(p, probs, 2.5)
            pyro.sample("y", Completion(p, LM.join(z, w), max_tokens=2, temperature=2.5), obs=y)
            pyro.factor("short", -0.5 * text.length(z))

    def guide():
        with data():
            program(q, probs.flip(0), 3.0)

    return model, guide if guided else None, ["k"] * before + ["z"] + ["w"] * second


@settings(max_examples=5)
@given(
    programs(),
    st.sampled_from(["regrowth", "independence", {"regrowth": 2.0, "independence": 1.0}]),
    st.sampled_from([None, [1.0, 3.0], [1.0, 2.0, math.inf]]),
)
def test_chains_end_at_the_enumerated_posterior(programs, moves, temperatures):
    """The last states of 500 chains are independent draws, their joint frequencies within 5 standard errors."""
    model, guide, sites = programs
    exact = Enumeration(model).run()
    chains = MetropolisHastings(
        model, guide, num_chains=500, num_samples=1, warmup=30, moves=moves, temperatures=temperatures
    ).run()
    assert chains.log_weights.shape == (500, *exact.log_evidence.shape)
    elements = range(exact.log_evidence.numel()) if exact.log_evidence.dim() else [None]
    for i in elements:
        truth, found = dict(exact.table(sites, i)), dict(chains.table(sites, i))
        assert found.keys() <= truth.keys()
        p = torch.tensor(list(truth.values()), dtype=torch.float64)
        count = torch.tensor([500 * found.get(key, 0.0) for key in truth]).round()
        assert_counts(count, p, 500)


def test_what_a_run_answers():
    x = LM.encode(["ab", "b"])

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", Completion(LM, x, max_tokens=2, temperature=2.0))
            pyro.factor("like", 1.0 * (z == A).any(-1))

    chains = MetropolisHastings(model, num_chains=3, num_samples=40, warmup=5).run()
    assert chains.samples["z"].shape == (120, 2, 3) and chains.log_joint.shape == (3, 40, 2)
    assert torch.allclose(chains.log_weights, torch.full((120, 2), -math.log(120), dtype=torch.float64))
    assert bool(chains.log_evidence.isnan().all()) and bool(chains.khat.isnan().all())
    z = chains.samples["z"]
    log_joint = Completion(LM, x, max_tokens=2, temperature=2.0).log_prob(z) + 1.0 * (z == A).any(-1)
    torch.testing.assert_close(chains.log_joint, log_joint.detach().view(3, 40, 2))
    draws = chains.resample(50)
    assert draws.log_weights.exp().sum(0).tolist() == pytest.approx([1.0, 1.0])
    assert sum(p for _, p in chains.table("z", 0)) == pytest.approx(1.0)
    # A chain's neighbours in time differ by one move of one text: both share the cut's prefix or are the same.
    changed = (chains.log_joint[:, 1:] != chains.log_joint[:, :-1]).double().mean((0, 1))
    assert bool((changed <= chains.acceptance["regrowth"] + 1e-9).all())
    with pytest.raises(ValueError, match="subsampled"):
        MetropolisHastings(subsampled).run()


def subsampled():
    pyro.factor("outside", torch.tensor(0.0))
    with pyro.plate("data", 5, subsample_size=2):
        pyro.sample("z", Completion(LM, "a", max_tokens=1))


def test_each_move_costs_two_passes_over_the_text_and_one_over_what_follows():
    """Regrowing it, scoring the ending it had, and the observation after the new one; the prompt once in each."""
    lm = tiny_lm(vocab=4)
    prompt = torch.randint(1, 4, (20,))

    def model():
        z = pyro.sample("z", Completion(lm, prompt, max_tokens=4))
        pyro.sample("y", Completion(lm, lm.join(z, "ab"), max_tokens=3), obs=lm.encode("aba", stop="eos"))

    def cost(warmup: int) -> int:
        before = lm.tokens_scored
        MetropolisHastings(model, num_chains=32, num_samples=1, warmup=warmup).run()
        return lm.tokens_scored - before

    seen = 32 * (4 + 2 + 3)  # z without its stop, "ab", and the observed text without its last token
    assert cost(20) - cost(10) <= 10 * (2 * (20 + 32 * 4) + seen)


# -- tempering, zeros and diagnostics --------------------------------------------------------------------------------


def test_tempered_chains_reach_a_mode_that_others_do_not():
    """A wide basin around the prior's favourite text, and a narrow one, of larger mass, around its opposite.

    After 100 moves from the prior, the plain transition matrix has 25% of untempered chains in the second basin, whose
    posterior mass is 97%.
    """
    prior = Completion(LM, "ab", max_tokens=8, stop=None, allowed=[A, B], temperature=4.0)
    support = prior.enumerate_support()  # (256, 8)
    log_prior, by_token = prior.log_prob(support).detach(), prior.token_log_probs(support).detach()
    home = support[log_prior.argmax()]
    away = A + B - home  # no token in common with the first mode

    def score(z: Tensor) -> Tensor:
        near, far = ((z == mode).sum(-1).double() for mode in (home, away))
        return torch.maximum(2.0 * near, 7.0 * far - 33.5)

    def model():
        pyro.factor("two modes", score(pyro.sample("z", prior)))

    def in_second_basin(z: Tensor) -> Tensor:
        return (z == away).sum(-1) > 5

    moves, chains = 100, 150
    target = log_prior + score(support)
    p, K = target.softmax(0), torch.zeros(256, 256, dtype=torch.float64)
    for t in range(8):
        shares = (support[:, None, :t] == support[:, :t]).all(-1)
        log_q = by_token[:, t:].sum(-1)  # (256): of each text's ending
        alpha = (target - target[:, None] + log_q[:, None] - log_q).clamp(max=0).exp()
        K += torch.where(shares, log_q.exp() * alpha, 0.0) / 8
    K += torch.diag(1 - K.sum(1))
    assert float((p @ K - p).abs().max()) < 1e-10
    truth = float(p[in_second_basin(support)].sum())
    expected = float((log_prior.exp() @ torch.linalg.matrix_power(K, moves))[in_second_basin(support)].sum())
    assert truth > 0.95 and expected < 0.3

    def found(temperatures) -> float:
        run = MetropolisHastings(
            model, num_chains=chains, num_samples=1, warmup=moves - 1, temperatures=temperatures
        ).run()  # fmt: skip
        return float(in_second_basin(run.samples["z"]).double().mean())

    error = math.sqrt(expected * (1 - expected) / chains)
    assert abs(found(None) - expected) < 5 * error
    assert found([1, 2, 4, 20]) > expected + 5 * math.sqrt(0.25 / chains)


@pytest.mark.parametrize("moves", ["regrowth", "independence"])
def test_chains_that_start_at_probability_zero(moves):
    """The prior seldom says "b" twice, and in the second plate element nothing is possible."""

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", Completion(LM, "a", max_tokens=2, temperature=2.0))
            hard = torch.where((z == B).sum(-1) == 2, 0.0, -torch.inf)
            pyro.factor("hard", torch.stack([hard[..., 0], torch.full_like(hard[..., 0], -torch.inf)], -1))

    chains = MetropolisHastings(model, num_chains=20, num_samples=30, warmup=0, moves=moves).run()
    possible = (chains.samples["z"][:, 0] == B).sum(-1) == 2
    assert 0.1 < float(possible.double().mean()) < 1
    assert bool((chains.log_weights[:, 0].isfinite() == possible).all())
    assert float(chains.log_weights[:, 0].logsumexp(0)) == pytest.approx(0, abs=1e-5)
    of_chain = possible.view(20, 30).int()
    assert bool((of_chain.diff(dim=1) >= 0).all())  # no chain goes back
    assert chains.table("z", 0) == [("bb", pytest.approx(1.0))]
    assert chains.log_evidence[0].isnan() and chains.log_evidence[1] == -torch.inf
    assert chains.ess[0] > 0 and chains.ess[1] == 0
    with pytest.raises(ZeroEvidence):
        chains.table("z", 1)


def mixing(slope: float):
    """Texts of one token repeated are rewarded, the more alike the more: between them lies a valley."""

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample(
                "z", Completion(LM, PROMPTS, max_tokens=8, min_tokens=7, allowed=[A, B, EOS], temperature=10.0)
            )  # fmt: skip
            a, b = ((z == token).sum(-1) for token in (A, B))
            pyro.factor("alike", slope * torch.maximum(a, b) + torch.where(a < b, 1.0, 0.0))

    return model


@pytest.mark.parametrize(("slope", "moves"), [(0.0, "independence"), (15.0, "regrowth")])
def test_rhat_and_ess_are_those_of_arviz(slope, moves):
    """Independent draws mix; chains in the valleys' two sides do not."""
    chains = MetropolisHastings(mixing(slope), num_chains=6, num_samples=100, warmup=50, moves=moves).run()
    lengths = text.length(chains.samples["z"]).view(6, 100, 2)
    for i in range(2):
        for name, x in [("log_joint", chains.log_joint), ("length(z)", lengths)]:
            if bool((x[..., i] == x[0, 0, i]).all()):
                assert chains.rhat[name][i].isnan() and chains.mcmc_ess[name][i].isnan()
                continue
            draws = x[..., i].double().numpy()
            assert float(chains.rhat[name][i]) == pytest.approx(arviz.rhat(draws), rel=1e-12)
            assert float(chains.mcmc_ess[name][i]) == pytest.approx(arviz.ess(draws), rel=1e-12)
    ess = torch.stack(list(chains.mcmc_ess.values()))
    assert torch.equal(chains.ess, ess.nan_to_num(nan=torch.inf).amin(0))
    if moves == "independence":
        assert float(chains.acceptance["independence"].min()) > 0.3
        assert float(chains.rhat["log_joint"].max()) < 1.03 and float(chains.ess.min()) > 100
    else:
        mode = ((chains.samples["z"] == A).sum(-1) > 4).view(6, 100, 2).double().mean(1)  # (chain, plate)
        assert float(mode[:, 0].min()) < 0.2 and float(mode[:, 0].max()) > 0.8
        assert float(chains.rhat["log_joint"][0]) > 1.5 and float(chains.ess[0]) < 20


def test_diagnostics_that_are_not_defined():
    short = MetropolisHastings(mixing(0.0), num_chains=1, num_samples=3, warmup=0).run()
    assert bool(short.rhat["log_joint"].isnan().all()) and bool(short.ess.isnan().all())


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_chains": 0},
        {"num_samples": 0},
        {"warmup": -1},
        {"thin": 0},
        {"moves": "gibbs"},
        {"moves": {"regrowth": 0.0}},
        {"temperatures": [2.0, 4.0]},
        {"temperatures": [1.0, 1.0]},
    ],
)
def test_arguments_are_named_in_errors(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MetropolisHastings(mixing(0.0), **wrong)


def test_a_model_without_latents_is_named():
    lm = tiny_lm(vocab=5)
    text = torch.tensor([[2, 0]])
    with pytest.raises(ValueError, match="model: it has no latent site"):
        MetropolisHastings(lambda: pyro.sample("y", Completion(lm, text[:, :1], max_tokens=1), obs=text)).run()
