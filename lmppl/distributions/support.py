"""The support of a distribution over texts: as a constraint on values, and as the list of all texts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints as torch_constraints

from .. import text
from .rules import Rules

_ENUMERABLE = 1_000_000


class Texts(torch_constraints.Constraint):
    """The support of a distribution over texts: ids of a vocabulary, padded on the right."""

    is_discrete = True
    event_dim = 1

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def check(self, value: Tensor) -> Tensor:
        """Returns whether values (..., L) are well-formed texts, BoolTensor (...)."""
        inside = (value == text.PAD) | ((value >= 0) & (value < self.vocab_size))
        gap = (value[..., :-1] == text.PAD) & (value[..., 1:] != text.PAD)
        return inside.all(-1) & ~gap.any(-1)


def every_text(rules: Rules) -> Tensor:
    """Returns every text that the rules of some row may draw, (K, E).

    :raises ValueError: if there are more than a million.
    """
    ids = torch.arange(rules.vocab_size, device=rules.stop.device)
    if isinstance(rules.allowed, Tensor) and rules.insertions is None:
        ids = ids[rules.allowed]
    content, stops = ids[~rules.is_stop(ids)], rules.stop.numel()
    shortest, longest = int((rules.min_tokens if stops else rules.max_tokens).min()), int(rules.max_tokens.max())
    strings = rules.strings
    # The fewest tokens of a text that a stop string ends; ``min_tokens`` does not apply to what a tool inserts.
    earliest = 1 if rules.insertions is not None else int(rules.min_tokens.min()) + 1
    fewest = shortest if strings is None else min(shortest, earliest)
    count = sum(len(content) ** n * max(1, stops) for n in range(fewest, longest + 1))
    if count > _ENUMERABLE:
        raise ValueError(f"enumerate_support: {count:,} texts; use inference.Enumeration(mass=...) instead")
    blocks = []
    for n in range(fewest, longest + 1):
        body = torch.cartesian_prod(*[content] * n) if n else content.new_empty(1, 0)
        body = body.reshape(len(content) ** n, n)
        if strings is not None:
            ends = strings.ends(body)
            body, ended = body[~ends[:, :-1].any(1)], ends[:, -1:].any(1)[~ends[:, :-1].any(1)]
            if n >= earliest:
                blocks.append(text.pad(body[ended], longest + (1 if stops else 0)))
            body = body[~ended]
        if n < shortest:
            continue
        if stops:
            body = torch.cat([body.repeat(stops, 1), rules.stop.repeat_interleave(len(body))[:, None]], 1)
        blocks.append(text.pad(body, longest + (1 if stops else 0)))
    support = torch.cat(blocks)
    return support if rules.insertions is None else support[_agrees(rules, support)]


def _agrees(rules: Rules, value: Tensor) -> Tensor:
    """Returns whether texts (K, L) contain what tools insert, and are otherwise allowed, BoolTensor (K,).

    An insertion may be cut off by the limit, and by nothing else.
    """
    assert rules.insertions is not None
    inserted = rules.insertions(value)[:, :-1]
    stops = rules.is_stop(value)
    free = stops | (rules.allowed[value.clamp(min=0)] if isinstance(rules.allowed, Tensor) else True)
    cut = stops & torch.isin(torch.arange(value.shape[1], device=value.device), rules.max_tokens)
    agrees = torch.where(inserted == text.PAD, free, inserted == value)
    return (agrees | cut | (value == text.PAD)).all(-1)
