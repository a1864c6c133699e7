"""`Unmasking`: paths of a masked language model, held against one forward pass for each step of each path."""

from __future__ import annotations

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tiny_masked import ARCHITECTURES, masked_lm, plain_paths

from lmppl import text
from lmppl.distributions import Unmasking
from lmppl.distributions.protocols import Stepwise
from lmppl.distributions.unmasking import ORDERS
from lmppl.inference.core.sites import text_of
from lmppl.testing import TextContract, support
from lmppl.text import PAD

LM = masked_lm(vocab=5)  # pad, mask, a, b, c: four words a hole
FRAMED = masked_lm(vocab=7, framed=True)
A, B, C = LM.encode("abc").tolist()


def two_canvases(lm):
    """A text with two holes apart, and a longer one with one hole: padding, and paths of two lengths."""
    return (
        text.pad(lm.join(lm.gap(1), "b", lm.gap(1)), 4)[None]
        .repeat(2, 1)
        .index_copy(0, torch.tensor([1]), lm.join("ca", lm.gap(1), "c")[None])
    )


class TestRandomOrder(TextContract):
    def distribution(self):
        return Unmasking(LM, two_canvases(LM))


class TestFramedAndLearned(TextContract):
    def distribution(self):
        return Unmasking(FRAMED, two_canvases(FRAMED), order="learned")


class TestLeftToRight(TextContract):
    def distribution(self):
        return Unmasking(LM, LM.join(LM.encode(["a", "b"]), LM.gap(3)), order="left-to-right")


class TestRulesOfEachElement(TextContract):
    def distribution(self):
        allowed = torch.ones(2, 2, 5, dtype=torch.bool)
        allowed[0, 0, [0, A]] = False
        allowed[1, 1] = torch.arange(5) == C
        temperature = torch.tensor([0.7, 1.5], dtype=torch.double)
        d = Unmasking(LM, LM.gap(2), order="confidence", allowed=allowed, temperature=temperature)
        return d.broadened(epsilon=torch.tensor([0.0, 0.3], dtype=torch.double))


def symbols(lm, canvas, paths):
    """Plain paths, (position, word) by step, as values (K, n)."""
    holes = [i for i, token in enumerate(canvas) if token == lm.mask_id]
    at = torch.tensor([[[holes.index(i), w] for i, w in path] for path in paths])
    return at[..., 0] * lm.vocab_size + at[..., 1]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_path_has_the_probability_of_plain_passes(arch, order):
    """Beside a longer canvas, whose padding must not be read."""
    lm = masked_lm(arch, vocab=7, framed=True)
    canvas = lm.join("a", lm.gap(1), "b", lm.gap(1))
    d = Unmasking(lm, torch.stack([text.pad(canvas, 6), lm.join("abcabc"[:5], lm.gap(1))]), order=order)
    with torch.no_grad():
        plain = plain_paths(lm, canvas.tolist(), order)
        found = d.log_prob(symbols(lm, canvas.tolist(), plain)[:, None])[:, 0]
    expected = torch.stack([*plain.values()])
    possible = expected > -torch.inf
    assert len(plain) == 2 * 36 and bool((found[~possible] == -torch.inf).all())
    assert (found - expected)[possible].abs().max() < 1e-9
    assert expected.logsumexp(0).abs() < 1e-9


@settings(max_examples=12)
@given(st.integers(0, 10**6), st.lists(st.booleans(), min_size=1, max_size=4).filter(any), st.sampled_from([*ORDERS]))
def test_paths_sum_to_one_and_to_the_text(seed, masks, order):
    """Of random networks: the sum over subsets of holes is that over all paths."""
    lm = masked_lm(vocab=4, seed=seed)
    canvas = [lm.mask_id if m else 2 + i % 2 for i, m in enumerate(masks)]
    d = Unmasking(lm, torch.tensor(canvas), order=order)
    with torch.no_grad():
        plain = plain_paths(lm, canvas, order)
        assert torch.stack([*plain.values()]).logsumexp(0).abs() < 1e-9
        path = symbols(lm, canvas, plain)
        assert (d.log_prob(path).exp() - torch.stack([*plain.values()]).exp()).abs().max() < 1e-9
        by_text = {}
        for words, log_p in zip(d.words(path).tolist(), plain.values(), strict=True):
            by_text.setdefault(tuple(words), []).append(log_p)
        words = torch.tensor([*by_text])
        expected = torch.stack([torch.stack(each).logsumexp(0) for each in by_text.values()])
        assert (d.text_log_prob(words) - expected).abs().max() < 1e-9
        assert bool((d.text_log_prob(d.words(path)) >= d.log_prob(path) - 1e-9).all())


def test_texts_of_several_canvases_sum_to_one():
    """Elements of a batch that have other numbers of holes, and rules of their own."""
    d = TestRulesOfEachElement().distribution()
    every = torch.cartesian_prod(*[torch.arange(5)] * 2)
    assert d.text_log_prob(every[:, None]).logsumexp(0).abs().max() < 1e-9
    d = Unmasking(LM, two_canvases(LM))
    assert d.text_log_prob(every[:, None])[:, 0].logsumexp(0).abs() < 1e-9
    single = text.pad(torch.arange(5)[:, None], 2)
    assert d.text_log_prob(single[:, None])[:, 1].logsumexp(0).abs() < 1e-9
    assert bool((d.text_log_prob(single[:, None])[:, 0] == -torch.inf).all())
    assert bool((d.text_log_prob(every[:, None])[:, 1] == -torch.inf).all())
    with pytest.raises(ValueError, match=r"words: 17 holes"):
        Unmasking(LM, LM.gap(17)).text_log_prob(torch.full((17,), A))


def adapted(lm, seed=0):
    view = lm.with_adapter(LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in view.trainable_parameters():
            p.normal_(std=0.3, generator=generator)
    return view


@given(st.integers(0, 2**16))
def test_from_left_to_right_a_text_has_one_path(seed):
    """Its probability is the sum over subsets of the same order, given as a function; also with more than 16 holes."""
    g = torch.Generator().manual_seed(seed)
    canvas = two_canvases(LM)
    summed = Unmasking(LM, canvas, order=ORDERS["left-to-right"])
    d = Unmasking(LM, canvas, order="left-to-right")
    words = torch.tensor([A, B, C, PAD])[torch.randint(3, (6, 2, 3), generator=g)]
    words[:, 0, 2] = words[:, 1, 1:] = PAD
    words[4, 1, 1] = words[5, 0, 2] = A  # one too many
    words[3, 0, 1] = PAD  # one too few
    found, expected = d.text_log_prob(words), summed.text_log_prob(words)
    assert (found[3:] == -torch.inf).tolist() == [[True, False], [False, True], [True, False]]
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    long = Unmasking(LM, LM.gap(17), order="left-to-right")
    path = long.sample()
    torch.testing.assert_close(long.text_log_prob(long.words(path)), long.log_prob(path))


@pytest.mark.parametrize("order", ["random", "confidence", "learned"])
@pytest.mark.parametrize("budget", [16_384, 8])
def test_the_gradient_is_that_of_plain_passes(order, budget):
    """Also where most states are read again in the backward pass; the base gets none."""
    view = adapted(masked_lm(vocab=5))
    canvas = [A, view.mask_id, B, view.mask_id, view.mask_id]
    plain = plain_paths(view, canvas, order)
    chosen = [p for i, p in enumerate(plain) if i % 37 == 0]
    weights = torch.linspace(-1, 1, len(chosen)).double()
    by_hand = (weights * torch.stack([plain[p] for p in chosen])).sum()
    expected = torch.autograd.grad(by_hand, view.trainable_parameters())
    d = Unmasking(view, torch.tensor(canvas), order=order)
    view.token_budget = budget
    other = view.with_adapter(LoraConfig(r=2, target_modules="all-linear"))
    loss = (weights * d.log_prob(symbols(view, canvas, chosen))).sum()
    other.forward(torch.tensor([[A]]))  # another adapter is on when the backward pass comes
    before = view.tokens_scored
    loss.backward()
    assert (view.tokens_scored > before) == (budget == 8)  # what exceeds the budget was not kept
    for p, grad in zip(view.trainable_parameters(), expected, strict=True):
        assert torch.allclose(p.grad, grad, atol=1e-9)
    assert all(p.grad is None for p in [*view.network.base_parameters, *other.trainable_parameters()])


def test_the_gradient_of_a_text_is_that_of_all_its_paths():
    view = adapted(masked_lm(vocab=4))
    d = Unmasking(view, view.gap(3), order="learned")
    every = support(d)
    words = torch.tensor([2, 3, 2])
    own = every[(d.words(every) == words).all(-1)]
    assert len(own) == 6
    expected = torch.autograd.grad(d.log_prob(own).logsumexp(0), view.trainable_parameters())
    found = torch.autograd.grad(d.text_log_prob(words), view.trainable_parameters())
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("budget", [16_384, 7])
def test_equal_states_are_read_once_and_no_pass_is_larger_than_the_budget(budget):
    lm = masked_lm(vocab=5)
    lm.token_budget = budget
    d = Unmasking(lm, lm.join("ab", lm.gap(2)))
    most = []
    lm.model.register_forward_pre_hook(lambda m, args, kwargs: most.append(args[0].numel()), with_kwargs=True)
    pyro.set_rng_seed(0)
    z = d.sample((100,))
    second = {tuple(row) for row in d.fill(text.pad(z[:, :1], 2)).tolist()}
    before, _ = lm.tokens_scored, most.clear()
    with torch.no_grad():
        log_p = d.log_prob(z)
    assert lm.tokens_scored - before == 4 * (1 + len(second)) and max(most) <= max(4, budget)
    lm.token_budget = 16_384
    assert (log_p - d.log_prob(z)).abs().max() < 1e-12


def test_what_was_drawn_has_the_probability_that_it_was_drawn_with():
    d = Unmasking(FRAMED, two_canvases(FRAMED), order="confidence").expand((50, 2))
    pyro.set_rng_seed(0)
    value, log_prob = text_of(d).draw()
    assert isinstance(text_of(d).fn, Stepwise) and (d.log_prob(value) - log_prob).abs().max() < 1e-9


def test_rows_are_chosen_between_a_draw_and_a_score():
    """Rows that differ in canvas and in what was drawn, repeated and left out, after the network was asked."""
    d = Unmasking(LM, two_canvases(LM))
    steps = d.token_steps(torch.Size([3, 2]))
    steps.append(d.sample((3,)).flatten(0, 1)[:, 0])
    before, index = steps.log_probs(), torch.tensor([4, 2, 2, 0])
    assert (before[[0, 2, 4]].logsumexp(1).abs() < 1e-9).all() and bool(steps.ended[[1, 3, 5]].all())
    steps.select(index)
    assert torch.equal(steps.log_probs(), before[index]) and not bool(steps.ended.any())
    symbol = before[index].argmax(1)
    assert torch.equal(steps.score(symbol), before[index].gather(1, symbol[:, None])[:, 0])


def test_a_path_fills_its_canvas():
    lm = LM
    d = Unmasking(lm, lm.join(lm.gap(1), "a", lm.gap(2)))
    path = d.symbols(torch.tensor([2, 0, 1]), torch.tensor([C, B, A]))
    assert path.tolist() == [2 * 5 + C, B, 5 + A]
    assert lm.decode(d.fill(path)) == "baac" and d.decode(path) == "bac" and d.words(path).tolist() == [B, A, C]
    begun = text.pad(path[:1], 3)
    assert d.fill(begun).tolist() == [1, A, 1, C] and d.decode(begun) == "c"
    assert d.words(begun).tolist() == [PAD, PAD, C]
    both = Unmasking(lm, two_canvases(lm))
    paths = both.sample((3,))
    filled = both.fill(paths)
    assert filled.shape == (3, 2, 4) and not bool((filled == lm.mask_id).any())
    assert lm.decode(filled[0, 1])[:2] == "ca" and int(filled[0, 0, 3]) == PAD
    assert both.max_tokens.tolist() == [2, 1] and bool((text.length(paths) == both.max_tokens).all())
    assert bool(both.log_prob(both.placeholder()).isfinite().all())
    assert bool(Unmasking(lm, two_canvases(lm), order="left-to-right").log_prob(both.placeholder()).isfinite().all())


def test_what_is_no_path_of_it():
    d = Unmasking(LM, LM.join("a", LM.gap(2)))
    good = d.symbols(torch.tensor([1, 0]), torch.tensor([A, B]))
    assert bool(d.log_prob(good).isfinite())
    for impossible in (
        [A, B],  # hole 0 twice
        [A],
        [],
        [A, 5 + B, A],
        [LM.mask_id, 5 + B],  # the mask is no word
        [5 + A, LM.mask_id],
    ):
        assert d.log_prob(torch.tensor(impossible, dtype=torch.long)) == -torch.inf, impossible
    assert d.log_prob(text.pad(good, 4)) == d.log_prob(good)
    for malformed in ([10, 1], [-2], [PAD, A]):
        with pytest.raises(ValueError, match="value"):
            d.log_prob(torch.tensor(malformed))


def test_temperature_allowed_and_epsilon_are_as_they_say():
    """Of one hole, and word by word in an element of its own of a batch."""
    canvas = LM.join("a", LM.gap(1), "b")
    words = torch.tensor([w for w in range(5) if w != LM.mask_id])
    log_p = Unmasking(LM, canvas).log_prob(words[:, None]).detach()
    hot = Unmasking(LM, canvas, temperature=torch.tensor([1.0, 3.0], dtype=torch.double))
    assert torch.allclose(hot.log_prob(words[:, None, None]), torch.stack([log_p, (log_p / 3).log_softmax(0)], 1))
    only = (words == A) | (words == C)
    few = Unmasking(LM, canvas, allowed=torch.isin(torch.arange(5), torch.tensor([A, C])), temperature=2.0)
    expected = (log_p / 2).masked_fill(~only, -torch.inf).log_softmax(0)
    assert torch.allclose(few.log_prob(words[:, None]), expected)
    broader = few.broadened(temperature=1.5, epsilon=0.25)
    narrow = (log_p / 3).masked_fill(~only, -torch.inf).softmax(0)
    assert torch.allclose(broader.log_prob(words[:, None]).exp(), 0.75 * narrow + 0.25 * only / 2)


def test_an_order_of_ones_own():
    lm, canvas = LM, LM.gap(3)

    def backwards(log_words, stay, open):
        return torch.arange(3.0).double() * 1000 + torch.zeros_like(stay)

    path = torch.tensor([2 * 5 + A, 5 + B, C])
    mirrored = Unmasking(lm, canvas, order=backwards)
    assert bool(mirrored.log_prob(path) > -100) and bool(mirrored.log_prob(path.flip(0)) < -500)
    with pytest.raises(ValueError, match="order: it gives no open hole"):
        Unmasking(lm, canvas, order=lambda w, stay, open: torch.full_like(stay, -torch.inf)).sample()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"canvas": torch.tensor([2, 3])}, "canvas: it has no mask token"),
        ({"canvas": torch.tensor([2, 9])}, "canvas"),
        ({"canvas": LM.gap(33)}, "canvas: 33 tokens"),
        ({"order": "by heart"}, "order: expected one of 'random'"),
        ({"allowed": torch.ones(4, dtype=torch.bool)}, "allowed: expected a BoolTensor"),
        ({"allowed": torch.ones(3, 5, dtype=torch.bool)}, "allowed: expected a BoolTensor"),
        ({"allowed": torch.arange(5) == 1}, "allowed: it allows no word for some hole"),
        ({"temperature": 0.0}, "temperature"),
        ({"lm": "bert"}, "lm: expected a MaskedLanguageModel, got 'bert'"),
    ],
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        Unmasking(**{"lm": LM, "canvas": LM.gap(2)} | options).sample()
