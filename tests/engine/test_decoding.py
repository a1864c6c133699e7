"""Decoding: cached steps are uncached steps, a shared prompt is read once, and what does not fit is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packing import V, gather
from reference import Plain, tokens
from tiny import ARCHITECTURES, tiny_lm
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from lmppl.distributions import Completion, NextToken
from lmppl.engine.decoding import Decoder
from lmppl.engine.reading import supports_trees
from lmppl.engine.recomputing import Recomputing, decoder
from lmppl.engine.scoring import score
from lmppl.engine.shared_prompts import SharedPrompts
from lmppl.engine.tuning import TUNING
from lmppl.text import PAD

pytestmark = pytest.mark.usefixtures("double_precision")

# Decoding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_cache_with_room_is_a_cache(arch, monkeypatch):
    """The same logits with reorderings in between; and within the room, keys stay where they are."""
    lm = tiny_lm(arch, vocab=V)
    decoder(lm, torch.tensor([[2, 3]]), torch.tensor([0]))  # the trial is over
    monkeypatch.setattr(TUNING, "room", 3)
    contexts, index = torch.tensor([[2, 3, 4, 5], [5, 3, PAD, PAD]]), torch.tensor([0, 1, 1])
    found, places = [], []
    for few in (0, 1000):
        monkeypatch.setattr(TUNING, "sooner_copied", few)
        steps = Decoder(lm, contexts, index)
        logits = []
        for t in range(9):
            steps.step(torch.tensor([2, 3, 4]).roll(t))
            if few == 0:
                places.append(steps.cache.layers[0].keys)  # kept, so that no other gets its address
            if t == 5:
                steps.select(torch.tensor([2, 0, 0]))
            logits.append(steps.logits)
        found.append(torch.stack(logits))
    assert torch.equal(*found)
    assert [len(list(same)) for _, same in itertools.groupby(x.data_ptr() for x in places)] == [
        4,
        2,
        3,
    ]  # one token and room for three


@pytest.mark.parametrize("kind", [Decoder, Recomputing, decoder])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cached_steps_are_uncached_steps(arch, kind):
    """Unequal prompts, steps, repeats and reorderings in between: every row predicts what its own tokens predict."""
    lm = tiny_lm(arch, vocab=V)
    loop = Plain(lm)
    g = torch.Generator().manual_seed(0)
    contexts = torch.tensor([[2, 3, 4, 5], [5, PAD, PAD, PAD], [3, 2, PAD, PAD]])
    index = torch.tensor([0, 1, 1, 2, 0])
    steps = kind(lm, contexts, index)
    rows = [(tokens(contexts[i]), ()) for i in index.tolist()]
    for t in range(5):
        for r, (prompt, z) in enumerate(rows):
            assert (steps.logits[r] - loop.logits(prompt, z)).abs().max() < 1e-9
        drawn = torch.randint(V, (len(rows),), generator=g)
        steps.step(drawn)
        rows = [(prompt, (*z, v)) for (prompt, z), v in zip(rows, drawn.tolist(), strict=True)]
        if t in (1, 3):
            order = torch.randint(len(rows), (len(rows) - t // 2,), generator=g)
            steps.select(order)
            rows = [rows[i] for i in order.tolist()]
    for r, (prompt, z) in enumerate(rows):
        assert (steps.logits[r] - loop.logits(prompt, z)).abs().max() < 1e-9


def test_a_shared_prompt_is_prefilled_once():
    lm = tiny_lm(vocab=V)
    before = lm.tokens_scored
    Decoder(lm, torch.tensor([[2, 3, 4]]), torch.zeros(50, dtype=torch.long))
    assert lm.tokens_scored - before == 3


def test_trials_are_not_counted():
    lm = tiny_lm(vocab=V, tried=False)
    supports_trees(lm)
    decoder(lm, torch.tensor([[2, 3]]), torch.tensor([0]))
    assert lm.tokens_scored == 2


class Searches(TorchFunctionMode):
    """In how many rows at once tokens are searched for, each draw by draw."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.searchsorted:
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("allowed", [None, [0, 3, 4], "of the prefix"])
def test_rows_are_drawn_a_few_at_a_time(allowed, monkeypatch):
    """From the same numbers the same texts, with rules that are each row's own, and the same scores."""
    lm, at_once = tiny_lm(vocab=V), []
    limits, temperature = torch.tensor([2, 4, 3]), torch.tensor([0.5, 1.0, 2.0])
    if allowed == "of the prefix":  # no token twice in a row

        def allowed(prefix):
            mask = torch.ones(*prefix.shape[:-1], V, dtype=torch.bool)
            return mask if prefix.shape[-1] == 0 else mask.scatter(-1, prefix[..., -1:], False)

    drawn = []
    for most in (2**25, 7 * V):
        monkeypatch.setattr(TUNING, "looked_at", most)
        for d in (
            Completion(lm, torch.tensor([[2, 3]] * 3), max_tokens=limits, temperature=temperature, allowed=allowed),
            Completion(lm, torch.tensor([[2, 3]] * 3), max_tokens=3, allowed=allowed),
        ):
            torch.manual_seed(0)
            with Searches() as searches:
                z, log_prob = d.sample_and_log_prob((8,))
            at_once += searches.rows
            steps = d.token_steps(torch.Size((8, 3)))
            drawn.append((z, log_prob, steps.score(z[..., 0].flatten())))
        assert max(at_once) == (24 if most == 2**25 else 7)
        at_once.clear()
    for found, expected in zip(drawn[2:], drawn[:2], strict=True):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


# Shared prompts -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_rows_are_grouped_by_prompt_and_back(index, random):
    """Every row meets its own prompt, whichever rows are left; prompts without rows are gone."""
    cache = DynamicCache()
    numbers = torch.arange(4.0).view(4, 1, 1, 1)
    cache.update(numbers, 10 * numbers, 0)
    prompts = SharedPrompts(cache, torch.tensor(index), None)
    for _ in range(2):
        keys, values = prompts.layers[0]
        assert sorted(keys.flatten().tolist()) == sorted(set(index))
        x = torch.tensor(index).view(-1, 1, 1, 1, 1).float()  # (R, H, G, T, D)
        own = prompts.group(x) == keys[:, :, None, None]
        assert bool(prompts.ungroup(own).all()) and torch.equal(values, 10 * keys)
        r = torch.arange(len(index)).view(-1, 1, 1, 1, 1)
        assert torch.equal(prompts.ungroup(prompts.group(r)), r)
        rows = [random.randrange(len(index)) for _ in range(random.randint(1, 9))]
        index = [index[r] for r in rows]
        prompts.select(torch.tensor(rows))


def test_a_prompt_of_many_rows_is_kept_once(monkeypatch):
    """From where it pays; the logits are those of rows with a copy each."""
    lm = tiny_lm(vocab=V)
    contexts, index = torch.tensor([[2, 3, 4, 5], [5, 3, PAD, PAD]]), torch.tensor([0, 1, 1, 0, 0])
    decoder(lm, contexts, index)
    monkeypatch.setattr(TUNING, "repeated", 12)
    shared, apart = Decoder(lm, contexts, index), Decoder(lm, contexts, index[:-1])
    assert shared.prompts is not None and apart.prompts is None  # 12 tokens repeated, and 8
    shared.select(torch.arange(4))
    for t in range(4):
        for each in (shared, apart):
            each.step(torch.tensor([2, 3, 4, 5]).roll(t))
            each.select(torch.tensor([2, 1, 0, 2]))
        assert (shared.logits - apart.logits).abs().max() < 1e-9
    assert shared.cache.get_seq_length() == 4 and apart.cache.get_seq_length() == 8
    assert [x.shape[0] for x in shared.prompts.layers[0]] == [2, 2]
    shared.select(torch.tensor([1, 1]))
    assert [x.shape[0] for x in shared.prompts.layers[0]] == [1, 1]


# Bad input ------------------------------------------------------------------------------------------------------------


def test_a_text_longer_than_the_context_names_the_prompt():
    lm = tiny_lm(vocab=V, max_length=8)
    with pytest.raises(ValueError, match="^prompt"):
        Completion(lm, torch.full((6,), 2), max_tokens=3)
    with pytest.raises(ValueError, match="^prompt"):
        score(lm, torch.full((6,), 2), torch.full((4,), 3), gather(torch.full((4,), 3)))
    with pytest.raises(ValueError, match="^context"):
        NextToken(lm, torch.full((9,), 2))
    assert Completion(lm, torch.full((5,), 2), max_tokens=3).sample().shape == (4,)


@pytest.mark.parametrize("add_bos", [False, True])
def test_bos_counts_towards_the_context(add_bos):
    lm = tiny_lm(vocab=V, max_length=8, add_bos=add_bos)
    prompt = torch.full((5,), 3)
    if add_bos:
        with pytest.raises(ValueError, match="^prompt"):
            Completion(lm, prompt, max_tokens=3)
    fits = Completion(lm, prompt, max_tokens=3 - add_bos)
    assert fits.log_prob(fits.sample((20,))).isfinite().all()


@pytest.mark.parametrize("what", ["sample", "log_prob", "prefix_log_probs", "NextToken"])
def test_nan_logits_raise(what):
    lm = tiny_lm(vocab=V, tried=False)
    with torch.no_grad():
        lm.model.transformer.ln_f.weight.fill_(torch.nan)
    prompt, value = torch.tensor([2, 3]), torch.tensor([3, 0])
    d = Completion(lm, prompt, max_tokens=2)
    calls = {
        "sample": d.sample,
        "log_prob": lambda: d.log_prob(value),
        "prefix_log_probs": lambda: d.prefix_log_probs(value),
        "NextToken": lambda: NextToken(lm, prompt).sample(),
    }
    with pytest.raises(ValueError, match="NaN"):
        calls[what]()
