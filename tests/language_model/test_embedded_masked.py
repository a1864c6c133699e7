"""The embedded masked story LM: what it reads, which words are masked, and what the shipped weights must show."""

from __future__ import annotations

from random import Random

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from lmppl import LanguageModel, MaskedLanguageModel, embedded
from worlds import masked_stories as corpus


@pytest.fixture(scope="module")
def words():
    return AutoTokenizer.from_pretrained(embedded.path("masked_stories"))


def test_its_words_are_those_of_the_causal_one():
    masked, causal = MaskedLanguageModel.embedded("masked_stories"), LanguageModel.embedded("stories")
    ids = causal.tokenizer.get_vocab()
    assert masked.tokenizer.get_vocab() == ids | {"<mask>": len(ids)} and masked.mask_id == len(ids)
    assert sum(file.stat().st_size for file in embedded.path("masked_stories").iterdir()) < 1e6


def test_every_number_of_masked_words_is_as_likely(words):
    """Rows are stories or their first two sentences; of the n words of the sentences chosen, k evenly from 1..n."""
    stream = corpus.rows(Random(0), words.encode, corpus.LONGEST)
    batch = torch.tensor([next(stream) for _ in range(8000)])
    torch.manual_seed(0)
    masked, real = corpus.masks(batch, words), batch != words.eos_token_id
    assert not bool((masked & ~real).any()) and bool(masked.any(1).all())
    (stop,) = words.encode(".")
    sentences = (batch == stop).sum(1)
    assert {2, 3} == set(sentences.tolist())
    assert abs(float((sentences == 2).double().mean()) - 0.5) < 5 * 0.5 / 8000**0.5
    first = masked[:, :6].any(1) & ~masked[:, 6:].any(1)  # words of the first sentence alone
    count = masked[first].sum(1).bincount(minlength=7)[1:].double()
    # It alone is chosen with probability 1/4 of two sentences and 1/12 of three; then 1..6 of its words are as likely.
    # Where others are chosen too, few masked words may all be its own, six hardly ever.
    alone = 8000 * (1 / 4 + 1 / 12) / 2 / 6
    assert bool((count > alone - 5 * alone**0.5).all()) and count[5] < alone + 5 * alone**0.5 + 5


def test_gates_hold_on_test_stories(words):
    model = AutoModelForMaskedLM.from_pretrained(embedded.path("masked_stories")).eval()
    found = corpus.report(model, words, embedded.data("stories", "test")[:32])
    assert found.passed, str(found)
    assert 0.7 < found["offered"].value < 0.98
