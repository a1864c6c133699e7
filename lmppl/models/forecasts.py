"""Scores of predicted probabilities, and of measures of uncertainty that should tell which predictions are wrong.

Probabilities are (C, B), of C answers to each of B questions; y (B,) are the true answers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hits(probabilities: Tensor, y: Tensor) -> Tensor:
    """Whether the most probable answer is the true one, (B,): 1, 0, or 1 / k where k answers share the maximum."""
    best = _checked(probabilities, y) == probabilities.double().amax(0)
    return best.gather(0, y[None])[0] / best.sum(0).double()


def log_score(probabilities: Tensor, y: Tensor) -> float:
    """The mean of log p(y), nats; for a coin -0.69."""
    return float(_checked(probabilities, y).gather(0, y[None]).log().mean())


def brier_score(probabilities: Tensor, y: Tensor) -> float:
    r"""The mean of :math:`\sum_c (p_c - 1[c = y])^2`, 0 to 2; for a coin 0.5.  Brier 1950."""
    p = _checked(probabilities, y)
    return float((p - torch.nn.functional.one_hot(y, len(p)).T).square().sum(0).mean())


def calibration_error(probabilities: Tensor, y: Tensor, bins: int = 10) -> float:
    r"""ECE: the distance between the probability of the most probable answer and the share that is right, 0 to 1.

    .. math:: \sum_b \frac{n_b}{B} \, \Big| \frac1{n_b} \sum_{i \in b} (\max_c p_{ic} - hit_i) \Big|

    over ``bins`` equal bins of that probability between 1 / C and 1 (the upper end belongs to the last).  With few
    questions in a bin it is above 0 for a calibrated forecast, too.

    Source: Naeini et al. 2015.
    """
    confidence, least = _checked(probabilities, y).amax(0), 1 / len(probabilities)
    index = ((confidence - least) / (1 - least) * bins).long().clamp(0, bins - 1)
    gaps = torch.zeros(bins, dtype=confidence.dtype, device=y.device)
    return float(gaps.index_add(0, index, confidence - hits(probabilities, y)).abs().sum() / len(y))


def auroc(scores: Tensor, events: Tensor) -> float:
    r"""The area under the ROC curve: how often a score is higher where the event occurs than where it does not.

    .. math:: P(s_+ > s_-) + \tfrac12 P(s_+ = s_-)

    over all pairs of one of each kind; 0.5 is no better than chance.

    :param scores: (B,), higher where the event is expected.
    :param events: (B,), true where it occurs.
    :raises ValueError: where the event occurs everywhere or nowhere, and for scores that are NaN.
    """
    _scored(scores, events, "events")
    with_event, without = scores[events.bool()], scores[~events.bool()].sort().values
    if not len(with_event) or not len(without):
        raise ValueError(f"events: {len(with_event)} of {len(scores)} occur; expected some of both kinds")
    below, up_to = (torch.searchsorted(without, with_event, right=right) for right in (False, True))
    return float((below + up_to).double().mean() / (2 * len(without)))


def risk_coverage(scores: Tensor, wrong: Tensor) -> Tensor:
    """The share of wrong answers among the k questions with the lowest scores, for k = 1 to B: (B,).

    Its mean is the area under the risk-coverage curve (AURC; Geifman and El-Yaniv 2017), and 1 minus its last entry is
    the accuracy.  Among questions with equal scores it is the mean over their orders.

    :param scores: (B,), higher where less certain.
    :param wrong: (B,), 1 or true where the answer is wrong, else 0 or false.
    :raises ValueError: for scores that are NaN.
    """
    _scored(scores, wrong, "wrong")
    _, kind, counts = torch.unique(scores, sorted=True, return_inverse=True, return_counts=True)
    share = torch.zeros(len(counts), dtype=torch.float64, device=scores.device).index_add(0, kind, wrong.double())
    expected = (share / counts).repeat_interleave(counts)
    return expected.cumsum(0) / torch.arange(1, len(scores) + 1, device=scores.device)


def selective_accuracy(scores: Tensor, wrong: Tensor, coverage: float) -> float:
    """The accuracy on the share ``coverage`` of the questions, in (0, 1], that have the lowest scores.

    :raises ValueError: for another ``coverage``, and as `risk_coverage`.
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage: expected a share in (0, 1], got {coverage}")
    risk = risk_coverage(scores, wrong)
    return 1 - float(risk[max(1, round(coverage * len(risk))) - 1])


def _checked(probabilities: Tensor, y: Tensor) -> Tensor:
    if probabilities.dim() != 2 or y.shape != probabilities.shape[1:] or not len(y):
        shapes = tuple(probabilities.shape), tuple(y.shape)
        raise ValueError(f"probabilities, y: expected shapes (C, B) and (B,), got {shapes[0]} and {shapes[1]}")
    p = probabilities.double()
    if not bool(((p >= 0) & ((p.sum(0) - 1).abs() < 1e-4)).all()):
        raise ValueError("probabilities: expected numbers that sum to one over the answers, axis 0")
    return p


def _scored(scores: Tensor, events: Tensor, name: str) -> None:
    if scores.dim() != 1 or events.shape != scores.shape or not len(scores):
        raise ValueError(f"scores, {name}: expected one of each, got {tuple(scores.shape)} and {tuple(events.shape)}")
    if bool(scores.isnan().any()):
        raise ValueError("scores: some are NaN")
