"""Decoding: cached steps are uncached steps, a shared prompt is read once, and what does not fit is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from packing import V, gather
from reference import Plain, tokens
from tiny import ARCHITECTURES, tiny_lm

from lmppl.distributions import Completion, NextToken
from lmppl.engine import room
from lmppl.engine.decoding import Decoder
from lmppl.engine.recomputing import Recomputing, decoder
from lmppl.engine.scoring import score, supports_trees
from lmppl.text import PAD

# Decoding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_cache_with_room_is_a_cache(arch, monkeypatch):
    """The same logits with reorderings in between; and within the room, keys stay where they are."""
    lm = tiny_lm(arch, vocab=V)
    decoder(lm, torch.tensor([[2, 3]]), torch.tensor([0]))  # the trial is over
    monkeypatch.setattr(room, "ROOM", 3)
    contexts, index = torch.tensor([[2, 3, 4, 5], [5, 3, PAD, PAD]]), torch.tensor([0, 1, 1])
    found, places = [], []
    for few in (0, 1000):
        monkeypatch.setattr(room, "FEW", few)
        steps = Decoder(lm, contexts, index)
        logits = []
        for t in range(9):
            steps.step(torch.tensor([2, 3, 4]).roll(t))
            if few == 0:
                places.append(steps.cache.layers[0].keys.data_ptr())
            if t == 5:
                steps.select(torch.tensor([2, 0, 0]))
            logits.append(steps.logits)
        found.append(torch.stack(logits))
    assert torch.equal(*found)
    assert [len(list(same)) for _, same in itertools.groupby(places)] == [4, 2, 3]  # one token and room for three


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
            assert (steps.logits[r] - loop.logits(prompt, z)).abs().max() < 1e-4
        drawn = torch.randint(V, (len(rows),), generator=g)
        steps.step(drawn)
        rows = [(prompt, (*z, v)) for (prompt, z), v in zip(rows, drawn.tolist(), strict=True)]
        if t in (1, 3):
            order = torch.randint(len(rows), (len(rows) - t // 2,), generator=g)
            steps.select(order)
            rows = [rows[i] for i in order.tolist()]
    for r, (prompt, z) in enumerate(rows):
        assert (steps.logits[r] - loop.logits(prompt, z)).abs().max() < 1e-4


def test_a_shared_prompt_is_prefilled_once():
    lm = tiny_lm(vocab=V)
    before = lm.tokens_scored
    Decoder(lm, torch.tensor([[2, 3, 4]]), torch.zeros(50, dtype=torch.long))
    assert lm.tokens_scored - before == 3


def test_trials_are_not_counted():
    lm = tiny_lm(vocab=V)
    supports_trees(lm)
    decoder(lm, torch.tensor([[2, 3]]), torch.tensor([0]))
    assert lm.tokens_scored == 2


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
    lm = tiny_lm(vocab=V)
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
