"""Text tensors against plain Python lists."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_lm

from lmppl import text
from lmppl.text import PAD

tokens = st.lists(st.integers(0, 4), max_size=5)


def tensor(rows: list[list[int]], width: int | None = None) -> torch.Tensor:
    width = max(map(len, rows), default=0) if width is None else width
    return torch.tensor([r + [PAD] * (width - len(r)) for r in rows], dtype=torch.long).reshape(len(rows), width)


def lists(t: torch.Tensor) -> list[list[int]]:
    return [[i for i in row if i != PAD] for row in t.reshape(t.shape[:-1].numel(), t.shape[-1]).tolist()]


@given(st.lists(tokens, min_size=1, max_size=4), st.integers(0, 3))
def test_length_counts_the_tokens(rows, excess):
    t = tensor(rows, max(map(len, rows)) + excess)
    assert text.length(t).tolist() == [len(r) for r in rows]


@given(st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=4), st.integers(0, 2))
def test_cat_is_concatenation_of_lists(triples, excess):
    columns = [list(column) for column in zip(*triples, strict=True)]
    joined = text.cat(*(tensor(c, max(map(len, c)) + excess) for c in columns))
    assert lists(joined) == [a + b + c for a, b, c in triples]
    assert torch.equal(joined, tensor(lists(joined)))  # right-padded, and as wide as the longest


@given(st.lists(tokens, min_size=1, max_size=3), st.lists(tokens, min_size=1, max_size=3), tokens)
def test_cat_broadcasts_leading_axes(a, b, c):
    joined = text.cat(tensor(a)[:, None], tensor(b), tensor([c])[0])
    assert joined.shape[:-1] == (len(a), len(b))
    assert lists(joined) == [x + y + c for x, y in itertools.product(a, b)]


def test_cat_drops_padding_anywhere():
    t = torch.tensor([[PAD, 3, PAD, 4], [1, PAD, PAD, 2]])
    assert text.cat(t).tolist() == [[3, 4], [1, 2]]


def test_cat_of_empty_texts():
    empty = torch.zeros(2, 0, dtype=torch.long)
    assert text.cat(empty, empty).shape == (2, 0)
    assert text.cat(torch.zeros(0, 3, dtype=torch.long), torch.tensor([1])).shape[0] == 0
    assert text.cat(torch.full((2, 3), PAD), empty).shape == (2, 0)


def test_cat_says_which_shapes_do_not_broadcast():
    with pytest.raises(ValueError, match=r"\(2, 1\), \(3, 1\)"):
        text.cat(torch.zeros(2, 1, dtype=torch.long), torch.zeros(3, 1, dtype=torch.long))


def ended_prefixes(z: list[int], stop: int) -> list[list[int]]:
    content = z[: z.index(stop)] if stop in z else z
    return [content[:t] + [stop] for t in range(len(content) + 1)]


@given(st.lists(tokens, min_size=1, max_size=4), st.integers(0, 4), st.integers(0, 2))
def test_prefixes_are_slices_that_end(rows, stop, excess):
    t = tensor(rows, max(map(len, rows)) + excess)
    p = text.prefixes(t, stop)
    expected = [ended_prefixes(r, stop) for r in rows]
    longest = max(len(e) for e in expected)
    assert p.shape == (max(t.shape[-1], longest), len(rows), max(t.shape[-1], longest))
    for i, e in enumerate(expected):
        whole = e + [e[-1]] * (len(p) - len(e))
        assert lists(p[:, i]) == whole


@given(st.lists(st.tuples(tokens, st.integers(0, 4)), min_size=1, max_size=4))
def test_prefixes_end_with_each_texts_own_stop(pairs):
    rows, stops = [r for r, _ in pairs], torch.tensor([s for _, s in pairs])
    together = text.prefixes(tensor(rows), stops)
    for i, (row, stop) in enumerate(pairs):
        alone = text.prefixes(tensor([row]), stop)
        assert text.equal(together[: len(alone), i], alone[:, 0]).all()


def test_a_completion_keeps_its_width():
    value = torch.tensor([[5, 6, 7, 0], [5, 0, PAD, PAD]])  # max_tokens = 3
    assert text.prefixes(value, 0).shape == (4, 2, 4)
    assert text.prefixes(value.expand(3, 1, 2, 4), torch.zeros(2, dtype=torch.long)).shape == (4, 3, 1, 2, 4)


@given(tokens, tokens, st.integers(0, 2), st.integers(0, 2))
def test_equal_ignores_width(a, b, more_a, more_b):
    same = text.equal(tensor([a], len(a) + more_a)[0], tensor([b], len(b) + more_b)[0])
    assert same.shape == () and bool(same) == (a == b)


def test_equal_broadcasts():
    a, b = torch.tensor([[1], [2]]), torch.tensor([[1, PAD], [2, PAD], [2, 3]])
    assert text.equal(a[:, None], b).tolist() == [[True, False, False], [False, True, False]]


def test_pad_widens_cuts_padding_and_refuses_to_cut_tokens():
    t = torch.tensor([[1, 2, PAD], [1, PAD, PAD]])
    assert torch.equal(text.pad(text.pad(t, 5), 2), t[:, :2])
    with pytest.raises(ValueError, match="width=1"):
        text.pad(t, 1)


@given(st.lists(st.text("abc", max_size=3), min_size=1, max_size=8))
def test_map_calls_once_per_distinct_string(strings):
    lm = LM
    seen: list[str] = []

    def count(s: str) -> int:
        seen.append(s)
        return s.count("a")

    t = lm.encode(strings, stop="eos").expand(2, 1, -1, -1)
    counts = text.map(count, t, lm)
    assert counts.shape == (2, 1, len(strings))
    assert counts[1, 0].tolist() == [s.count("a") for s in strings]
    assert sorted(seen) == sorted(set(strings))


LM = tiny_lm()


def test_map_takes_what_the_function_returns():
    t = LM.encode(["a", "b", "a"])
    assert text.map(lambda s: s == "a", t, LM).tolist() == [True, False, True]
    assert text.map(lambda s: 0.5 if s == "a" else 0, t, LM).tolist() == [0.5, 0.0, 0.5]
    weight = torch.ones(2, requires_grad=True)
    vectors = text.map(lambda s: weight * len(s), t, LM)
    assert vectors.shape == (3, 2)
    vectors.sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [3.0, 3.0]
    assert text.map(len, t[:0], LM).shape == (0,)
    assert text.map(len, torch.zeros(2, 0, dtype=torch.long), LM).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (torch.tensor([1.0]), "LongTensor"),
        ("a", "LongTensor"),
        (torch.tensor(3), "LongTensor"),
        (torch.tensor([-2]), "-2"),
        (torch.tensor([9]), "outside the vocabulary of 8"),
        (torch.tensor([1, PAD, 2]), "padding before a token"),
    ],
)
def test_validate_names_the_argument(bad, why):
    with pytest.raises(ValueError, match=f"prompt .*{why}"):
        text.validate(bad, "prompt", 8)
    text.validate(torch.tensor([[7, 0], [PAD, PAD]]), "prompt", 8)
