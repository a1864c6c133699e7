"""Metropolis kernels against transition matrices by plain loops: invariance, detailed balance, frequencies of moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from five_sigma import assert_counts
from problems import DOT, EOS, A, B
from problems import X as PROMPTS
from pyro import poutine
from reference import Law, Plain, Tokens
from tiny import flat_lm
from torch import Tensor

from lmppl import text
from lmppl.distributions import Completion
from lmppl.inference.core.query import Query
from lmppl.inference.samplers.metropolis.kernels import accept, independence, regrow, regrowth, select
from lmppl.text import PAD

LM = flat_lm(vocab=4, dtype=torch.float64)
OTHER = flat_lm("llama", vocab=4, seed=1, dtype=torch.float64)
PLAIN, PLAIN_OTHER = Plain(LM), Plain(OTHER)

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
    return math.exp(sum(law.step(z[:s])[z[s]] for s in range(t, len(z))))


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
    moved = regrow(Query(model, guide if guided else None), {"z": z}, log_p, temperature=temperature)
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
    moved = regrow(Query(model, guide if guided else None), {"z": z}, log_p)
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
    query = Query(model, guide if guided else None)
    if move == "independence":
        new = independence(query, len(log_p), values, None, {})
        accepted = accept(log_p, new.density.joint, new.log_ratio)
        found = {n: torch.where(accepted.view(-1, *[1] * (v.dim() - 1)), new.values[n], v) for n, v in values.items()}
    else:
        found = regrow(query, values, log_p, site=move).values
    assert_moves(states, K, [found["k"][:, None], found["z"]], each)


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True])
def test_a_branch_is_its_transition_matrix(guided):
    """A number k of texts, a text z from a cut on, and what follows it: w, of one token or, where k = 0, of none."""
    probs, guess = torch.tensor([[0.4, 0.6], [0.7, 0.3]], dtype=torch.float64)

    def program(lm, probs, temperature=1.0):
        k = pyro.sample("k", dist.Categorical(probs))
        z = pyro.sample("z", Completion(lm, "b", max_tokens=1, temperature=temperature))
        return z, pyro.sample("w", Completion(lm, LM.join("a", z), max_tokens=k, temperature=temperature))

    def model():
        z, w = program(LM, probs)
        pyro.sample("y", likelihood(LM.join(z, w)), obs=torch.tensor(SEEN))

    def guide():
        program(OTHER, guess, 1.7)

    def inner(z: Tokens) -> Tokens:
        return tuple(t for t in z if t != EOS)

    p_z = Law(PLAIN, (B,), 1)
    q_z = Law(PLAIN_OTHER, (B,), 1, temperature=1.7) if guided else p_z
    q_k = guess if guided else probs

    @cache
    def of(z: Tokens, k: int, guide: bool) -> Law:
        plain, temperature = (PLAIN_OTHER, 1.7) if guide and guided else (PLAIN, 1.0)
        return Law(plain, (A, *inner(z)), k, temperature=temperature)

    target = {
        ((k,), z, w): math.log(probs[k]) + a + b + log_likelihood(inner(z) + inner(w))
        for k in range(2)
        for z, a in p_z.support().items()
        for w, b in of(z, k, False).support().items()
    }

    def after(site: str) -> Proposals:
        def proposals(state: State) -> Iterator[tuple[State, float, float]]:
            ((k,), z, w) = state
            back = math.exp(of(z, k, True).log_prob(w))
            if site == "k":
                firsts = [
                    (new, x, float(q_k[new]) * math.exp(log_q), float(q_k[k]) * math.exp(q_z.log_prob(z)))
                    for new in range(2)
                    for x, log_q in q_z.support().items()
                ]
            else:
                firsts = [(k, x, there, there * ratio) for x, there, ratio in regrown(q_z)(z)]
            for new, x, there, first_back in firsts:
                for v, log_q in of(x, new, True).support().items():
                    yield ((new,), x, v), there * math.exp(log_q), first_back * back / (there * math.exp(log_q))

        return proposals

    states, each = list(target), 1500
    values = {"k": torch.tensor([s[0][0] for s in states]), "z": as_values(states, 1, 2), "w": as_values(states, 2, 2)}
    values = {name: v.repeat_interleave(each, 0) for name, v in values.items()}
    log_p = torch.tensor(list(target.values()), dtype=torch.float64).repeat_interleave(each)
    for site, later in {"k": ["z", "w"], "z": ["w"]}.items():
        K = transition_matrix(states, target, after(site))
        assert_invariant(states, target, K)
        new = regrowth(Query(model, guide if guided else None), len(log_p), values, site, later)
        accepted = accept(log_p, new.density.joint, new.log_ratio)
        found = select(new.plates, accepted, new.values, values)
        assert_moves(states, K, [found["k"][:, None], found["z"], found["w"]], each)
