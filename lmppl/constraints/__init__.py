"""Constraints on which token may come next, masked *inside* a distribution (a proposal, renormalised token by token).

A constraint is a function ``prefix (..., t) -> BoolTensor (..., V)`` of the tokens drawn so far, or simply a
``BoolTensor (V,)`` for one that ignores them.  A condition on the whole text is something else, a `pyro.factor` in the
model: masking gives each token's mass to its allowed siblings, conditioning gives it to all allowed texts.
`docs/constraints.md` shows both.
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
