"""`AutoregressiveText`: a text distribution from one function keeps all promises."""

from __future__ import annotations

import itertools
import math

import pyro
import pytest
import torch
from hidden_chain import LETTERS, LONGEST, Chain, every_text

from lmppl.distributions import AutoregressiveText, DeadEnd
from lmppl.distributions.protocols import Stepwise, Terminable
from lmppl.inference import Enumeration
from lmppl.testing import TextContract


class ByFunction(AutoregressiveText):
    """The hidden chain of `hidden_chain`, its states summed over anew for each token."""

    def __init__(self, chain: Chain):
        self.begin, self.move, self.write = (x.softmax(-1) for x in (chain.begin, chain.move, chain.write))
        super().__init__(["", *LETTERS], self.begin.shape[:-1], max_tokens=LONGEST, stop=0)

    def next_logits(self, prefix, element):
        state = self.begin[element]
        for token in prefix.unbind(1):
            state = (state * self.write.T[token]) @ self.move
        return (state @ self.write).log()


class Repeats(AutoregressiveText):
    """Letters of which none comes twice in a row; "." and "!" end a text, and element 1 of the batch likes "a"."""

    def __init__(self, **options):
        super().__init__(["a", "b", ".", "!"], (2,), **{"max_tokens": 3, "stop": [2, 3]} | options)

    def next_logits(self, prefix, element):
        logits = torch.tensor([[0.0, 0.5, 1.0, -1.0], [2.0, 0.0, 0.0, -0.5]], dtype=torch.double)[element]
        if prefix.shape[1]:
            logits = logits.masked_fill(torch.arange(4) == prefix[:, -1:], -torch.inf)
        return logits


class TestHiddenChain(TextContract):
    def distribution(self):
        with torch.no_grad():
            return ByFunction(Chain(0, elements=2))


class TestSeveralStops(TextContract):
    def distribution(self):
        return Repeats()


class TestNoStop(TextContract):
    def distribution(self):
        return Repeats(stop=None)


def test_it_is_the_distribution_written_by_hand():
    """log p, its prefix scores and gradients, of every text."""
    chain, texts = Chain(0, elements=2), every_text()[:, None]
    by_function, by_hand = ByFunction(chain), chain()
    assert isinstance(by_function, Stepwise) and isinstance(by_function, Terminable)
    grads = []
    for fn in (by_function, by_hand):
        log_p = fn.log_prob(texts)
        grads.append(
            torch.autograd.grad((log_p * torch.linspace(0, 1, len(texts))[:, None]).sum(), [*chain.parameters()])
        )
    assert torch.allclose(by_function.log_prob(texts), by_hand.log_prob(texts))
    assert all(torch.allclose(a, b) for a, b in zip(*grads, strict=True))
    for a, b in zip(by_function.prefix_scores(texts), by_hand.prefix_scores(texts), strict=True):
        there = by_hand.prefix_scores(texts).log_probs > -torch.inf
        assert torch.allclose(a[there], b[there])


class Letters(AutoregressiveText):
    def next_logits(self, prefix, element):
        return torch.tensor([0.5, 1 / 3, 1 / 6]).log().expand(len(prefix), 3)


def test_one_text_without_a_batch():
    one = Letters(["", "a", "b"], max_tokens=2, stop=0)
    assert one.batch_shape == () and one.sample().shape == (3,) and one.expand((4, 1)).sample().shape == (4, 1, 3)
    z = torch.tensor([[1, 2, 0], [0, -1, -1]])
    assert one.decode(z) == ["ab", ""] and one.log_prob(z).exp().tolist() == pytest.approx([1 / 18, 1 / 2])
    assert one.prefix_scores(z[0]).log_probs.exp().tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 18])


def test_stops_keep_their_proportions_at_the_limit():
    d = Repeats(max_tokens=1)
    p = {stop: d.log_prob(torch.tensor([0, stop]))[1].exp().item() for stop in (2, 3)}
    assert p[2] / p[3] == pytest.approx(math.exp(0.5))
    assert sum(p.values()) == pytest.approx(math.exp(2) / (math.exp(2) + 1 + 1 + math.exp(-0.5)))


def test_what_is_no_text_of_it():
    d = Repeats()
    for impossible in ([0, 0, 2], [0, 1], [2, 0], [0, 1, 0, 1, 2], []):
        value = torch.tensor(impossible, dtype=torch.long)
        assert bool((d.log_prob(value) == -torch.inf).all()), impossible
    for malformed in ([4], [0, -1, 2], [-2]):
        with pytest.raises(ValueError, match="value"):
            d.log_prob(torch.tensor(malformed))


class Stuck(Repeats):
    """After "bb" nothing follows."""

    def next_logits(self, prefix, element):
        stuck = (prefix == 1).sum(1, keepdim=True) > 1
        return torch.zeros(len(prefix), 4, dtype=torch.double).masked_fill(stuck, -torch.inf)


def test_a_text_that_cannot_go_on_has_weight_zero_and_is_no_draw():
    def model():
        with pyro.plate("data", 2):
            pyro.sample("z", Stuck(max_tokens=2))

    texts = [(*body, s) for n in range(3) for body in itertools.product((0, 1), repeat=n) for s in (2, 3)]
    total = sum((1 / 4) ** min(len(z), 2) * (1 / 2 if len(z) == 3 else 1) for z in texts if z[:2] != (1, 1))
    assert total == pytest.approx(1 - 1 / 16)
    assert Enumeration(model).run().log_evidence.exp().tolist() == pytest.approx([total] * 2)
    with pytest.raises(DeadEnd, match="nothing can follow the text 'bb'"):
        Stuck(max_tokens=2).sample((200,))


@pytest.mark.parametrize(
    ("options", "named"),
    [({"stop": 4}, "stop"), ({"stop": []}, "stop"), ({"stop": None, "max_tokens": 0}, "max_tokens")],
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=f"^{named}: "):
        Repeats(**options)


def test_bad_logits_are_named():
    class Wrong(Repeats):
        def next_logits(self, prefix, element):
            return torch.zeros(3)

    with pytest.raises(ValueError, match=r"next_logits: expected logits \(2, 4\), got \(3,\)"):
        Wrong().sample()
    with pytest.raises(NotImplementedError, match="next_logits"):
        AutoregressiveText(["a"], max_tokens=1, stop=0).sample()
