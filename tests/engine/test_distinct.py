"""Each distinct (prompt, text) goes through the network once, whatever latents chose it, with the same numbers."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import packing
from tiny import tiny_lm

from lmppl import text
from lmppl.distributions import Completion, NextToken
from lmppl.engine import distinct
from lmppl.inference import Importance
from lmppl.rows import covering, distinct_rows, first_equal

LM = tiny_lm(vocab=7, seed=0, dtype=torch.float64, max_length=64)
PROMPTS = torch.tensor([[2, 3, 4, -1], [2, 3, 5, 6], [6, 1, -1, -1]])
TEXTS = torch.tensor([[3, 2, 0], [4, 0, -1], [0, -1, -1], [3, 5, 0]])


def tokens_of(prompts, texts) -> int:
    """The tokens of every distinct pair, without those of a text's two that predict nothing: its last one, and one
    before a stop that is certain.
    """
    read = [[token for token in t if token != text.PAD][:-1][:1] for t in texts.tolist()]
    pairs = {(*p, "then", *t) for p, t in zip(prompts.tolist(), read, strict=True)}
    return sum(sum(token not in (text.PAD, "then") for token in pair) for pair in pairs)


def counted(lm, compute):
    compute()  # what is tried once
    before = lm.tokens_scored
    found = compute()
    return found, lm.tokens_scored - before


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 60), st.integers(0, 10_000))
def test_the_first_equal_row(values, columns, rows, seed):
    found = torch.randint(-1, values, (rows, columns), generator=torch.Generator().manual_seed(seed))
    expected = [found.tolist().index(row) for row in found.tolist()]
    assert first_equal(found).tolist() == expected


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 60), st.integers(0, 10_000))
def test_the_longest_text_that_begins_with_each(kinds, width, number, seed):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(kinds, (number, width), generator=g)
    rows = rows.masked_fill(torch.arange(width) >= torch.randint(1, width + 1, (number, 1), generator=g), text.PAD)
    found = [tuple(token for token in row if token != text.PAD) for row in rows.tolist()]
    for i, n in zip(found, covering(rows).tolist(), strict=True):
        longer = [each for each in found if each[: len(i)] == i]
        assert n == next(k for k, each in enumerate(found) if each in longer and len(each) == max(map(len, longer)))


@pytest.mark.parametrize("dtype", [torch.long, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 300])
def test_distinct_rows_are_those_of_torch(rows, dtype):
    for values in (2, 2**40):
        found = torch.randint(-1, values, (rows, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
        for a, b in zip(distinct_rows(found), torch.unique(found, dim=0, return_inverse=True), strict=True):
            assert torch.equal(a, b)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(0, 10_000))
def test_a_grid_has_each_distinct_row_once(P, N, B, kinds, seed):
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(kinds, (P * N * B,), generator=g)
    same, length = first_equal(kind[:, None]), torch.randint(1, 9, (kinds,), generator=g)[kind]
    rows = torch.arange(P * N * B).view(P, N, B)
    grid = distinct.grid(rows.where(same.view(P, N, B) == rows, -1), length)
    assert sorted(grid[grid >= 0].tolist()) == sorted(set(same.tolist()))
    assert bool((grid[0, 0] >= 0).all())
    where = torch.arange(P * N * B).view(P, N, B)  # a row stays under its own b
    for b in range(grid.shape[2]):
        own = set(grid[..., b][grid[..., b] >= 0].tolist())
        assert any(own <= set(where[..., i].flatten().tolist()) for i in range(B))
    rows = torch.arange(1, 10).expand(len(kind), -1).where(torch.arange(9) < length[:, None], text.PAD)
    assert torch.equal(text.length(distinct.at(rows, grid)).amax(0), distinct_lengths(grid, length))


def distinct_lengths(grid, length):
    """The longest row of each column, 0 where there is none."""
    return torch.where(grid >= 0, length[grid], 0).amax(0)


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shape", [(400,), (20, 20), (5, 8, 10)])
def test_tokens_are_those_of_the_distinct_pairs(packed, shape):
    g = torch.Generator().manual_seed(0)
    for P, T in ((1, 4), (2, 3), (3, 4), (3, 1)):
        p, t = torch.randint(P, shape, generator=g), torch.randint(T, shape, generator=g)
        prompts, texts = PROMPTS[p], TEXTS[t]
        with packing(packed):
            found, cost = counted(LM, lambda x=prompts, z=texts: Completion(LM, x, max_tokens=2).log_prob(z))
        most = tokens_of(prompts.flatten(0, -2), texts.flatten(0, -2))
        assert cost <= most if packed else cost == most
        table = torch.stack([Completion(LM, x, max_tokens=2).log_prob(TEXTS) for x in PROMPTS])
        torch.testing.assert_close(found, table[p, t])
        for i in range(P):
            for j in range(T):
                equal = found[(p == i) & (t == j)]
                assert bool((equal == equal[:1]).all())  # not only close


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.booleans(), st.booleans(), st.integers(30, 2000))
def test_any_arrangement_scores_as_one_row_alone(seed, packed, grad, budget):
    g = torch.Generator().manual_seed(seed)
    shape = tuple(torch.randint(1, 5, (3,), generator=g).tolist())
    p, t = torch.randint(3, shape, generator=g), torch.randint(4, shape, generator=g)
    before, LM.token_budget = LM.token_budget, budget
    try:
        with packing(packed), torch.set_grad_enabled(grad):
            found = Completion(LM, PROMPTS[p], max_tokens=2).prefix_log_probs(TEXTS[t])
    finally:
        LM.token_budget = before
    with torch.no_grad():
        alone = [[Completion(LM, x, max_tokens=2).prefix_log_probs(z) for z in TEXTS] for x in PROMPTS]
    expected = torch.stack([torch.stack(row) for row in alone])[p, t]
    torch.testing.assert_close(found.detach(), expected)


@pytest.mark.parametrize("packed", [True, False])
def test_a_repeated_row_has_its_gradient_as_often(packed):
    lm = tiny_lm(vocab=7, seed=0, dtype=torch.float64)
    p, t = torch.tensor([0, 0, 1, 0, 2, 1]), torch.tensor([1, 1, 0, 1, 3, 0])
    weight = torch.tensor([1.0, -2.0, 3.0, 0.5, 1.5, 2.0], dtype=torch.float64)
    with packing(packed):
        (weight * Completion(lm, PROMPTS[p], max_tokens=2).log_prob(TEXTS[t])).sum().backward()
    found = [w.grad.clone() for w in lm.parameters()]
    lm.zero_grad()
    for w, i, j in zip(weight, p, t, strict=True):
        (w * Completion(lm, PROMPTS[i], max_tokens=2).log_prob(TEXTS[j])).backward()
    for mine, w in zip(found, lm.parameters(), strict=True):
        torch.testing.assert_close(mine, w.grad)


def test_rows_that_differ_in_their_rules_alone_are_read_once_and_scored_apart():
    limits, temperature = torch.tensor([1, 2, 1, 2]), torch.tensor([1.0, 1.0, 2.0, 1.0], requires_grad=True)
    prompt, value = PROMPTS[:1].expand(4, -1), torch.tensor([3, 0])
    d = Completion(LM, prompt, max_tokens=limits, temperature=temperature)
    found, cost = counted(LM, lambda: d.log_prob(value))
    assert cost == 3 + 1
    rules = zip(limits.tolist(), temperature.tolist(), strict=True)
    single = [Completion(LM, PROMPTS[0], max_tokens=m, temperature=s).log_prob(value) for m, s in rules]
    torch.testing.assert_close(found, torch.stack(single))
    gradient = torch.autograd.grad(found.sum(), temperature)[0]
    assert gradient[1] == gradient[3] != 0  # each row's own, though they are equal
    with torch.no_grad():
        eps = torch.tensor(1e-5, dtype=torch.float64)
        up, down = (Completion(LM, PROMPTS[0], max_tokens=1, temperature=2 + e).log_prob(value) for e in (eps, -eps))
    assert float(gradient[2]) == pytest.approx(float((up - down) / (2 * eps)), rel=1e-4)


@torch.no_grad()
def test_next_tokens_read_each_context_once():
    contexts = PROMPTS[torch.randint(3, (50, 4), generator=torch.Generator().manual_seed(0))]
    found, cost = counted(LM, lambda: NextToken(LM, contexts).logits)
    assert found.shape == (50, 4, 7) and cost <= 3 + 4 + 2


def test_topics_that_choose_prompts_cost_as_many_texts_as_there_are():
    """k_d ~ Categorical, document d ~ LM(prompt of k_d): 3 prompts and 4 documents, 200 particles."""

    def model():
        with pyro.plate("documents", 4):
            k = pyro.sample("k", dist.Categorical(torch.ones(3)))
            pyro.sample("d", Completion(LM, PROMPTS[k], max_tokens=2), obs=TEXTS)

    pairs = tokens_of(PROMPTS.repeat_interleave(4, 0), TEXTS.repeat(3, 1))
    with pyro.validation_enabled(False):
        pyro.set_rng_seed(0)
        posterior, cost = counted(LM, lambda: Importance(model, num_particles=200).run())
    assert cost <= pairs
    with torch.no_grad():
        exact = torch.stack([Completion(LM, x, max_tokens=2).log_prob(TEXTS) for x in PROMPTS]).logsumexp(0)
    assert posterior.log_evidence.tolist() == pytest.approx((exact - torch.tensor(3.0).log()).tolist(), abs=0.5)
