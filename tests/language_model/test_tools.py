"""Tools: the law of texts with inserted tokens against plain loops, draws from it, and tokenizers that write them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pyro
import pytest
import torch
from problems import adapted
from reference import tokens
from tiny import GPT2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tool_law import (
    LM,
    ONE,
    PLAIN,
    RULES,
    TOOLS,
    ZERO,
    ToolLaw,
    always,
    calculator,
    completion,
    exact,
    law,
    make_lm,
    spelled,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lmppl import text
from lmppl.distributions import Completion
from lmppl.distributions.insertions import Insertions
from lmppl.text import PAD
from lmppl.tools import Calculator
from lmppl.vocabulary import Vocabulary

# With two stops "0" is one of them, and tools that write it are refused.
CASES = [(t, r) for t in TOOLS for r in RULES if r != "two stops"] + [("ones", "two stops")]

# -- the law ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tools", "rules"), CASES)
def test_the_law_is_the_plain_loops(tools, rules):
    """Every string of the vocabulary: the same log-probabilities, -inf elsewhere; they sum to one."""
    fn, truth = completion(tools, rules), exact(tools, rules)
    everything = Completion(LM, "1", max_tokens=4, stop=RULES[rules].get("stop", "eos")).enumerate_support()
    with torch.no_grad():
        log_p = fn.log_prob(everything)
    expected = torch.tensor([truth.get(tokens(z), -torch.inf) for z in everything], dtype=torch.float64)
    assert torch.equal(log_p > -torch.inf, expected > -torch.inf)
    assert torch.allclose(log_p.exp(), expected.exp(), atol=1e-12)
    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    assert {tokens(z) for z in fn.enumerate_support()} == set(truth)


@pytest.mark.parametrize(("tools", "rules"), CASES)
def test_prefix_scores_are_the_plain_loops(tools, rules):
    fn, truth = completion(tools, rules), exact(tools, rules)
    rows = torch.stack([text.pad(torch.tensor(z), fn.event_shape[0]) for z in truth])
    with torch.no_grad():
        found = fn.prefix_scores(rows)
    by_loops = law(tools, rules)
    width = found.log_probs.shape[-1]
    for z, log_p, log_stop in zip(truth, *found, strict=True):
        expected = by_loops.prefix_log_probs(z, width) if by_loops.stops else [-torch.inf] * width
        assert torch.allclose(log_p.exp(), torch.tensor(expected, dtype=torch.float64).exp(), atol=1e-12)
        for t in range(len(z) - 1 if by_loops.stops else 0):
            if by_loops.pending(z[:t]) and t < by_loops.max_tokens:  # within an insertion nothing can stop
                assert log_stop[t] == log_p[t] == -torch.inf
            else:
                assert log_stop[t].exp() == pytest.approx(math.exp(by_loops.step(z[:t])[z[-1]]))


@pytest.mark.parametrize("tools", [t for t in TOOLS if t != "none"])
def test_inserted_tokens_add_nothing_and_the_others_are_the_language_models(tools):
    fn, free = completion(tools), completion("none")
    z, by_loops = fn.enumerate_support(), law(tools)
    with torch.no_grad():
        by_token, plain = fn.token_log_probs(z), free.token_log_probs(z)
    inserted = torch.tensor(
        [[t < min(len(tokens(r)), 4) and bool(by_loops.pending(tokens(r)[:t])) for t in range(5)] for r in z]
    )
    assert inserted.any() and (by_token[inserted] == 0).all()
    assert torch.equal(by_token[~inserted], plain[~inserted])
    assert torch.equal(fn.log_prob(z), by_token.sum(-1))


def test_a_wrong_result_is_impossible_and_gradients_stay_finite():
    lm = adapted(make_lm())
    fn = Completion(lm, "1", max_tokens=6, tools=[calculator])
    right, wrong, unfinished = LM.encode(["9+1=100", "9+1=110", "9+1=1"], stop="eos")
    assert fn.log_prob(right) > -torch.inf
    assert fn.log_prob(wrong) == fn.log_prob(unfinished) == -torch.inf
    grads = torch.autograd.grad(fn.log_prob(torch.stack([right, wrong])).sum(), lm.trainable_parameters())
    only_right = torch.autograd.grad(fn.log_prob(right), lm.trainable_parameters())
    assert all(bool(g.isfinite().all()) for g in grads) and any(bool(g.any()) for g in only_right)
    # All of it inserted: nothing to learn from.
    certain = Completion(lm, "1", max_tokens=4, tools=[always]).log_prob(LM.encode("1010", stop="eos"))
    assert certain == 0 and not any(bool(g.any()) for g in torch.autograd.grad(certain, lm.trainable_parameters()))


def test_limits_by_row_and_a_batch_of_prompts():
    """An insertion is cut at each row's own limit."""
    limits = torch.tensor([2, 3, 4])
    fn = Completion(LM, ["1", "0", "01"], max_tokens=limits, tools=TOOLS["two tools"])
    z = fn.enumerate_support()
    with torch.no_grad():
        log_p = fn.log_prob(z)  # (K, 3)
    for row, (limit, prompt) in enumerate(zip(limits.tolist(), [(ONE,), (ZERO,), (ZERO, ONE)], strict=True)):
        truth = ToolLaw(PLAIN, prompt, limit, tools=TOOLS["two tools"]).tree()
        assert {tokens(v) for v in z[log_p[:, row] > -torch.inf, row]} == set(truth)
        expected = torch.tensor([truth.get(tokens(v), -torch.inf) for v in z[:, row]], dtype=torch.float64)
        assert torch.allclose(log_p[:, row].exp(), expected.exp(), atol=1e-12)
    assert (log_p > -torch.inf).any(1).all()


# -- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tools", "rules"), CASES)
def test_samples_follow_the_law(tools, rules):
    """Frequencies of 4,000 draws within 5 standard errors; log-probabilities as scored afterwards, and as replayed."""
    pyro.set_rng_seed(1)
    fn, truth, n = completion(tools, rules), exact(tools, rules), 4000
    z, log_p = fn.sample_and_log_prob((n,))
    assert torch.allclose(log_p.exp(), fn.log_prob(z).exp())
    drawn = [tokens(v) for v in z]
    assert set(drawn) <= set(truth)
    for value, log_prob in truth.items():
        p = torch.tensor(log_prob).exp().item()
        assert abs(drawn.count(value) / n - p) <= 5 * (p * (1 - p) / n) ** 0.5 + 1 / n


def test_every_sum_in_a_sample_is_right():
    pyro.set_rng_seed(0)
    z = Completion(LM, "", max_tokens=12, min_tokens=12, temperature=4.0, tools=[calculator]).sample((500,))
    sums = 0
    for s in spelled(z):
        for i in (i for i, c in enumerate(s[:-2]) if c == "="):
            result = calculator(s[: i + 1])
            if result == "10":
                sums += 1
                assert s[i + 1 : i + 3] == result
    assert sums > 100


@pytest.mark.parametrize("keep", range(6))
def test_regrowing_from_within_an_insertion(keep):
    """9+ | 1 = | 1 0 | ..: kept tokens stay, the rest of an insertion follows for certain."""
    fn = completion("two tools", max_tokens=5)
    old = LM.encode("9+1=101", stop="eos")
    pyro.set_rng_seed(2)
    new, log_new = fn.regrow(old.expand(200, -1), keep)
    assert torch.equal(new[:, :keep], old[:keep].expand(200, -1))
    assert torch.allclose(log_new, fn.token_log_probs(new)[:, keep:].sum(-1), atol=1e-9)
    if 0 < keep < 4:
        assert (new[:, :4] == old[:4]).all()
        free = Completion(LM, "19+1=10", max_tokens=1)
        assert torch.allclose(log_new, free.log_prob(new[:, 4:]), atol=1e-9)


def test_broadening_leaves_insertions_as_they_are():
    fn = completion("calculator", max_tokens=5).broadened(temperature=2.0, epsilon=0.2)
    z = fn.enumerate_support()
    with torch.no_grad():
        assert fn.log_prob(z).exp().sum().item() == pytest.approx(1.0, abs=1e-9)
        by_token = fn.token_log_probs(LM.encode("9+1=10", stop="eos"))
    assert by_token[2] == by_token[3] == 0 and (by_token[[0, 1, 4]] < 0).all()


def test_the_cost_is_reading():
    """What an unfinished row needs is read once, inserted or not: the prompt, and every token but the last two."""
    fn = Completion(LM, "1", max_tokens=6, tools=[calculator])
    pyro.set_rng_seed(0)
    before = LM.tokens_scored
    z = fn.sample((200,))
    read = text.length(z).clamp(max=5)  # a stop too, beside rows that go on; nothing at the limit
    assert LM.tokens_scored - before == 1 + read.sum()
    costs = []
    for scorer in (fn, Completion(LM, "1", max_tokens=6)):
        before = LM.tokens_scored
        scorer.log_prob(z)
        costs.append(LM.tokens_scored - before)
    assert costs[0] == costs[1]


def test_tools_are_asked_once_about_each_prefix():
    asked: list[str] = []

    def tool(so_far: str) -> str | None:
        asked.append(so_far)
        return calculator(so_far)

    fn = Completion(LM, "1", max_tokens=5, tools=[tool])
    z = fn.sample((300,))
    fn.expand((7,)).log_prob(z[:, None])
    fn.broadened(2.0).prefix_scores(z)
    assert 10 < len(asked) == len(set(asked))
    assert "9+1=" in asked and "9+1=1" not in asked  # an insertion is under way


# -- bad tools -------------------------------------------------------------------------------------------------------


def test_bad_tools_are_refused():
    with pytest.raises(ValueError, match="tools: expected functions"):
        Completion(LM, "1", max_tokens=3, tools=["calculator"])
    with pytest.raises(ValueError, match="tools: .* returned 7 for ''"):
        Completion(LM, "1", max_tokens=3, tools=[lambda s: 7]).sample()
    with pytest.raises(ValueError, match="tools: .* a stop of this text"):
        Completion(LM, "1", max_tokens=3, stop=["eos", "0"], tools=[always]).sample()
    for kwargs in ({"trigger": ""}, {"format": "x"}, {"format": "{}{}"}, {"max_length": 0}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            Calculator(**kwargs)


def test_a_tool_with_a_trigger_is_asked_only_after_it():
    asked = {"with": [], "without": []}

    def without(so_far: str) -> str | None:
        asked["without"].append(so_far)
        return calculator(so_far)

    class With:
        trigger = "="

        def __call__(self, so_far: str) -> str | None:
            asked["with"].append(so_far)
            return calculator(so_far)

    one, other = (Completion(LM, "1", max_tokens=6, tools=[tool]) for tool in (With(), without))
    pyro.set_rng_seed(0)
    z = other.sample((200,))
    assert torch.equal(one.log_prob(z), other.log_prob(z)) and bool(one.log_prob(z).isfinite().all())
    assert set(asked["with"]) == {s for s in asked["without"] if s.endswith("=")} != set()


@pytest.mark.skipif(not GPT2.is_dir(), reason=f"no tokenizer in {GPT2}")
def test_the_ending_of_a_text_by_its_last_token():
    tokenizer = AutoTokenizer.from_pretrained(GPT2)
    vocabulary = Vocabulary(tokenizer, None, len(tokenizer))
    generator = torch.Generator().manual_seed(0)
    known = 0
    for row in torch.randint(len(tokenizer), (500, 3), generator=generator).tolist():
        ending = vocabulary.ending(row[-1])
        assert not ending or vocabulary.decode(row).endswith(ending)
        known += bool(ending)
    assert known > 450 and vocabulary.ending(tokenizer.eos_token_id) == ""
    partial = tokenizer("\N{ABACUS}")["input_ids"]
    assert len(partial) > 1 and vocabulary.ending(partial[-1]) == ""


# -- tokenizers ------------------------------------------------------------------------------------------------------


def inserted(tokenizer: PreTrainedTokenizerFast, so_far: str) -> tuple[list[int], str]:
    """What the calculator inserts after a text, as tokens, and the text with it."""
    vocabulary = Vocabulary(tokenizer, None, len(tokenizer))
    prefix = vocabulary.encode([so_far])[0]
    watch = Insertions(SimpleNamespace(vocabulary=vocabulary), [calculator], torch.tensor([], dtype=torch.long))
    found: list[int] = []
    while (token := int(watch(torch.tensor([[*prefix, *found]]))[0, -1])) != PAD:
        found.append(token)
    return found, vocabulary.decode([*prefix, *found])


def words(*vocabulary: str, pre, decoder) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}))
    backend.pre_tokenizer = pre
    if decoder is not None:
        backend.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=vocabulary[0], clean_up_tokenization_spaces=False
    )


def test_a_tokenizer_that_puts_spaces_before_what_it_encodes():
    """As Llama's: "7" by itself would be " 7", so that it is encoded as a piece."""
    pieces = ["<eos>", "▁", *"0123456789+=", "▁7", "▁3"]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "7"), ("▁", "3")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert tokenizer("7", add_special_tokens=False)["input_ids"] == [pieces.index("▁7")]
    assert inserted(tokenizer, "3+4=") == ([pieces.index("7")], "3+4=7")


def test_a_tokenizer_whose_decoder_puts_spaces_between_words():
    tokenizer = words("<eos>", "3", "4", "7", "+", "=", pre=pre_tokenizers.Whitespace(), decoder=None)
    assert inserted(tokenizer, "3+4=") == ([3], " 3 + 4 = 7")


def test_what_the_tokenizer_cannot_write_is_not_inserted():
    tokenizer = words("<eos>", "3", "4", "+", "=", pre=pre_tokenizers.Split("", "isolated"), decoder=decoders.Fuse())
    assert inserted(tokenizer, "3+4=") == ([], "3+4=")


@pytest.mark.skipif(not GPT2.is_dir(), reason=f"no tokenizer in {GPT2}")
@pytest.mark.parametrize(
    ("so_far", "whole"),
    [("6 - 0 =, 6 - 4 =", "6 - 0 =, 6 - 4 = 2"), ("4 - 9 =", "4 - 9 = -5"), ("1234*5678=", "1234*5678=7006652")],
)
def test_gpt2s_tokenizer(so_far, whole):
    tokenizer = AutoTokenizer.from_pretrained(GPT2)
    found, spelled = inserted(tokenizer, so_far)
    assert spelled == whole
    assert found == tokenizer(whole[len(so_far) :])["input_ids"]
