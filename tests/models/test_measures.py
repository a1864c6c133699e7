"""Measures of generated texts, against values computed by hand and likelihoods by plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from precision import single
from reference import Law, Plain, tokens
from tiny import flat_lm

from lmppl import embedded
from lmppl.models import measures

KNIFE, OTHER = " He found the small knife.", "He took the small knife."


def test_overlap_by_hand():
    """5 of 6 words, 3 of 5 pairs, 2 of 4 triples and 1 of 3 quadruples are shared."""
    pytest.importorskip("nltk")
    assert measures.bleu([KNIFE], [OTHER]) == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert measures.gleu([KNIFE], [OTHER]) == pytest.approx((5 + 3 + 2 + 1) / (6 + 5 + 4 + 3))
    assert measures.bleu([OTHER], [OTHER]) == measures.gleu([OTHER], [OTHER]) == 1
    assert measures.bleu(["She ran."], [OTHER]) < 1e-3  # nothing in common but the full stop, and no warning
    # Counts of a corpus are added before they are divided; brevity is the corpus's.
    both = measures.bleu([KNIFE, OTHER], [OTHER, OTHER])
    assert both == pytest.approx((11 / 12 * 8 / 10 * 6 / 8 * 4 / 6) ** 0.25)
    short = measures.bleu(["He took the small"], [OTHER])
    assert short == pytest.approx(math.exp(1 - 6 / 4))
    with pytest.raises(ValueError, match="references: 1 for 2"):
        measures.bleu([KNIFE, OTHER], [OTHER])


def test_bert_score_by_hand():
    """Candidate a b, reference a c c, with cos(a, b) = 0, cos(b, c) = 0.6, cos(a, c) = 0.8 on unit vectors."""
    vectors = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [0.8, 0.6]}

    def encoder(string: str) -> torch.Tensor:
        return 3 * torch.tensor([vectors[w] for w in string.split()])  # lengths do not matter

    precision, recall = (1 + 0.6) / 2, (1 + 0.8 + 0.8) / 3
    expected = 2 * precision * recall / (precision + recall)
    found = measures.bert_score(["a b", "c a"], ["a c c", "a c"], encoder)
    assert found.tolist() == pytest.approx([expected, 1.0], abs=single())
    rescaled = measures.bert_score(["a b", "c a"], ["a c c", "a c"], encoder, baseline=0.6)
    assert rescaled.tolist() == pytest.approx([(expected - 0.6) / 0.4, 1.0], abs=single(1 / 0.4))


def test_bert_score_with_the_hidden_states_of_a_checkpoint():
    """The same text scores 1; of others, the one that shares more words with the reference scores higher."""
    encoder = measures.hidden_states(embedded.path("stories"))
    assert len(encoder(KNIFE)) == 6
    score = measures.bert_score([KNIFE, OTHER, " She locked it."], [KNIFE] * 3, encoder)
    assert float(score[0]) == pytest.approx(1, abs=single())
    assert 1 > float(score[1]) > float(score[2])


def test_the_likelihood_of_a_story_is_that_of_plain_loops():
    lm = flat_lm(vocab=6)
    x, y = lm.encode(["a", "bc"]), lm.encode(["c.", "b"])
    z = torch.stack([lm.encode(["ab.", "c."]), lm.encode([".", "bba"])[:, : lm.encode("ab.").shape[-1]]])
    found = measures.story_log_likelihood(lm, x, z, y)
    plain = Plain(lm)
    for n in range(2):
        for i in range(2):
            told = tokens(x[i]) + tokens(z[n, i]) + tokens(y[i])
            assert float(found[n, i]) == pytest.approx(Law(plain, (), len(told), stops=()).log_prob(told), abs=1e-9)


def test_diversity_by_hand():
    z = torch.tensor([[[5, 6, 0]], [[5, 6, 0]], [[5, 0, -1]], [[7, 8, 0]]])  # (4, 1, 3)
    assert measures.distinct(z).tolist() == [0.75]
    pairs = [0, 1 / 3, 2 / 3, 1 / 3, 2 / 3, 2 / 3]  # each pair's edits over the longer length
    assert float(measures.edit_distance(z)) == pytest.approx(sum(pairs) / 6)
    with pytest.raises(ValueError, match="no pairs"):
        measures.edit_distance(z[:1])
