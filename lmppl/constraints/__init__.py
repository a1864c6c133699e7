"""Constraints on which token may come next: masks *inside* a distribution, which is renormalised token by token.

A constraint is a function ``prefix (..., t) -> BoolTensor (..., V)`` of the tokens drawn so far. One that ignores them
is just a ``BoolTensor (V,)``. Pass it as ``Completion(..., allowed=constraint)``.

A condition on the whole text is a `pyro.factor` in the model, and a different distribution: a mask gives the mass of a
forbidden token to the allowed tokens at the same place, a condition gives it to all allowed texts. A mask is a good
proposal for a condition. `docs/constraints.md` shows both.
"""

from .check import Check
from .combine import every
from .grammars import Grammar, grammar, json_schema, regex, without, words
from .masks import Constraint, PrefixConstraint, allowed_at, ban, checked, only
from .reach import reaches
from .slots import Slots

__all__ = [
    "Check",
    "Constraint",
    "Grammar",
    "PrefixConstraint",
    "Slots",
    "allowed_at",
    "ban",
    "checked",
    "every",
    "grammar",
    "json_schema",
    "only",
    "reaches",
    "regex",
    "without",
    "words",
]
