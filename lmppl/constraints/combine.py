"""`every`: the intersection of constraints."""

from __future__ import annotations

import torch
from torch import Tensor

from .check import Check
from .masks import Constraint, PrefixConstraint, allowed_at, keeps


def every(*constraints: Constraint) -> Constraint:
    r"""Returns the constraint that allows a token if all of these allow it.

    .. math:: c(v \mid prefix) = \prod_i c_i(v \mid prefix)

    Each constraint looks one token ahead on its own. So a token may pass all of them and yet lead to a prefix after
    which no token passes, a `DeadEnd`. A `Check` among them is called only for tokens that the others allow.

    :param constraints: masks (V,) or functions of the prefix, at least one of them a mask or from `lmppl.constraints`.
    :returns: a constraint.
    :raises ValueError: if no constraint is given, masks have different sizes or no token in common, or the size of the
        vocabulary is unknown.

        >>> both = every(regex(lm, r"( [a-z]+)+\.", stop="."), ban(lm, " apple"))
        >>> d = Completion(lm, x, max_tokens=9, stop=".", allowed=both)
    """
    masks = [c for c in constraints if isinstance(c, Tensor)]
    functions = [c for c in constraints if not isinstance(c, Tensor)]
    sizes = {len(m) for m in masks} | {c.vocab_size for c in functions if isinstance(c, PrefixConstraint)}
    if len(sizes) != 1 or any(m.dtype != torch.bool or m.dim() != 1 for m in masks):
        raise ValueError(
            "constraints: expected masks (V,) of one size and functions, at least one of them a mask or one of "
            f"lmppl.constraints; the sizes found are {sorted(sizes)}"
        )
    together: list[Constraint] = [torch.stack(masks).all(0)] if masks else []
    if masks and not bool(torch.stack(masks).all(0).any()):
        raise ValueError("constraints: the masks have no token in common")
    checks = [c for c in functions if isinstance(c, Check)]
    cheap = together + [c for c in functions if not isinstance(c, Check)]
    cheap += [c.within for c in checks if c.within is not None]
    both = cheap[0] if len(cheap) == 1 else Every(cheap, sizes.pop()) if cheap else None
    if not checks:
        assert both is not None
        return both
    return checks[0].joined(checks[1:], within=both)


class Every(PrefixConstraint):
    """The result of `every` for constraints that depend on the prefix. A whole text must satisfy each of them."""

    def __init__(self, parts: list[Constraint], vocab_size: int):
        self.parts, self.vocab_size = parts, vocab_size

    def __call__(self, prefix: Tensor) -> Tensor:
        mask = torch.ones(*prefix.shape[:-1], self.vocab_size, dtype=torch.bool, device=prefix.device)
        for part in self.parts:
            mask = mask & allowed_at(part, prefix, self.vocab_size)
        return mask

    def accepts(self, text: Tensor) -> Tensor:
        kept = torch.ones(text.shape[:-1], dtype=torch.bool, device=text.device)
        for part in self.parts:
            kept = kept & _accepts(part, text, self.vocab_size)
        return kept


def _accepts(part: Constraint, text: Tensor, vocab_size: int) -> Tensor:
    return part.accepts(text) if isinstance(part, PrefixConstraint) else keeps(part, text, vocab_size)
