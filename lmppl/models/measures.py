"""Measures of generated texts from the literature: overlap with a reference, likelihood, diversity."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from .. import text
from ..distributions import Completion
from ..language_model import LanguageModel

Encoder: TypeAlias = Callable[[str], Tensor]  # from a text to a vector for each of its tokens, (L, D)


def words(string: str) -> list[str]:
    """Words and punctuation marks, separately.

    >>> words(" He found it.")
    ['He', 'found', 'it', '.']
    """
    return re.findall(r"\w+|[^\w\s]", string)


def bleu(candidates: Sequence[str], references: Sequence[str]) -> float:
    r"""BLEU-4 of a corpus of pairs, 0 to 1, without smoothing.

    .. math:: \min(1, e^{1 - r/c}) \Big(\prod_{n=1}^4 p_n\Big)^{1/4}

    with p_n the share of the candidates' n-grams that occur in their references (clipped), c and r the numbers of words
    of all candidates and references.

    :raises ValueError: for lists of different lengths.
    :raises ImportError: without nltk, ``pip install pyro-lmppl[measures]``.

    Source: Papineni et al. 2002; computed by nltk.
    """
    return _overlap("bleu_score", "corpus_bleu", candidates, references)


def gleu(candidates: Sequence[str], references: Sequence[str]) -> float:
    """GLEU-4 of a corpus of pairs, 0 to 1: shared n-grams, n = 1 to 4, over those of the side that has more.

    Errors as for `bleu`.  Source: Wu et al. 2016; computed by nltk.
    """
    return _overlap("gleu_score", "corpus_gleu", candidates, references)


def _overlap(module: str, function: str, candidates: Sequence[str], references: Sequence[str]) -> float:
    from importlib import import_module

    _paired(candidates, references)
    score = getattr(import_module(f"nltk.translate.{module}"), function)
    with warnings.catch_warnings():  # nltk warns where no 4-gram is shared; a score of 0 is no error
        warnings.simplefilter("ignore")
        return float(score([[words(r)] for r in references], [words(c) for c in candidates]))


def _paired(candidates: Sequence[str], references: Sequence[str]) -> None:
    if len(candidates) != len(references) or not candidates:
        raise ValueError(f"references: {len(references)} for {len(candidates)} candidates; each needs one")


def bert_score(candidates: Sequence[str], references: Sequence[str], encoder: Encoder, baseline: float = 0.0) -> Tensor:
    r"""BERTScore's F1 of each pair, (N,): every token is matched with the most similar one of the other text.

    .. math:: P = \frac1{|c|} \sum_{i \in c} \max_{j \in r} \cos(c_i, r_j), \quad
              R = \frac1{|r|} \sum_{j \in r} \max_{i \in c} \cos(c_i, r_j), \quad F = \frac{2PR}{P + R}

    :param encoder: a function from a text to a vector for each token, e.g. `hidden_states`.
    :param baseline: b in the rescaled (F - b) / (1 - b), the mean F of unrelated texts.
    :raises ValueError: for lists of different lengths.

    Source: Zhang et al. 2020, without idf weights.
    """
    _paired(candidates, references)
    known = {s: normalize(encoder(s), dim=-1) for s in {*candidates, *references}}  # (L, D)
    scores = []
    for candidate, reference in zip(candidates, references, strict=True):
        cosine = known[candidate] @ known[reference].T  # (candidate's tokens, reference's)
        if not cosine.numel():
            scores.append(0.0)
            continue
        precision, recall = float(cosine.amax(1).mean()), float(cosine.amax(0).mean())
        scores.append(2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0)
    return (torch.tensor(scores) - baseline) / (1 - baseline)


def hidden_states(path: str | Path, layer: int = -1) -> Encoder:
    """An encoder: the hidden states of the Hugging Face encoder or language model in the directory ``path``.

    Special tokens are left out, and nothing is downloaded.

    :param layer: 0: the embeddings; -1: the last layer.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
    network: Any = AutoModel.from_pretrained(path, local_files_only=True).eval()

    @torch.no_grad()
    def encode(string: str) -> Tensor:
        given = tokenizer(string, return_tensors="pt", return_special_tokens_mask=True)
        ordinary = given.pop("special_tokens_mask")[0] == 0
        states = network(given["input_ids"], output_hidden_states=True).hidden_states[layer][0]
        return states[ordinary].float()

    return encode


@torch.no_grad()
def story_log_likelihood(lm: LanguageModel, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
    """log p(x z y) of whole stories under ``lm`` from its start: x (B, Lx), z (n, B, E), y (B, Ly) -> (n, B), nats.

    It is the probability that a text begins with x z y, whatever method wrote z.
    """
    told = lm.join(x, z, y)
    return Completion(lm, lm.encode(""), max_tokens=text.length(told), stop=None).log_prob(told)


def distinct(z: Tensor) -> Tensor:
    """The share of distinct texts among the texts of each prompt: (n, B, E) -> (B,)."""
    return torch.tensor([len(torch.unique(column, dim=0)) / len(z) for column in z.unbind(1)])


def edit_distance(z: Tensor) -> Tensor:
    """The mean normalised edit distance, in tokens, between the texts of each prompt: (n, B, E) -> (B,); 0 to 1.

    :raises ValueError: for fewer than two texts.
    """
    n = len(z)
    if n < 2:
        raise ValueError(f"z: {n} texts have no pairs")
    means = []
    for column in z.unbind(1):
        rows = [[i for i in ids if i != text.PAD] for ids in column.tolist()]
        means.append(float(cdist(rows, rows, scorer=Levenshtein.normalized_distance).sum()) / (n * (n - 1)))
    return torch.tensor(means)
