"""Checks which parameters an optimiser holds: all that the guide trains, and none of the target's."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor

from ...core import programs
from ...core.programs import Program, parameters_of
from ...core.query import Query
from ...core.sites import lm_of

SHOWN = 4  # names in a message
FREEZE = "or freeze what is not to train, parameter.requires_grad_(False)"


@dataclass(frozen=True)
class Owners:
    """The parameters of a guide and of its target, by id; ``names`` has names of other parameters, too."""

    guide: Mapping[int, Tensor]  # its language models' adapters and Pyro's parameters, without the target's
    target: Mapping[int, Tensor]
    names: Mapping[int, str]
    hidden: bool = False  # whether the target has sites other than texts of language models

    @classmethod
    def of(cls, query: Query) -> Owners:
        """From a sketch of both programs, which calls no network.  Pyro's parameters exist afterwards."""
        (q, p), (model, guide, *_) = query.sketches, query.given
        target = _by_id(parameters_of(p)) | _by_id(own_parameters(model, guide).values())
        names = {id(value): name for name, value in (own_parameters(guide) | own_parameters(model)).items()}
        for trace in (p, q):
            for node in programs.scored(trace).values():
                if (lm := lm_of(node["fn"])) is not None:
                    names |= {id(value): name for name, value in lm.model.named_parameters()}
        names |= {id(value.unconstrained()): name for name, value in pyro.get_param_store().items()}
        trained = {i: x for i, x in _by_id(trainable_of(q)).items() if i not in target}
        hidden = any(lm_of(node["fn"]) is None for node in programs.scored(p).values())
        return cls(trained, target, names, hidden)

    def check_target(self, held: Iterable[Tensor], optimizer: str = "optimizer") -> None:
        """Refuses an optimiser that holds a parameter of the target.

        :raises ValueError: with the names of the parameters.
        """
        found = _by_id(held)
        if wrong := [found[i] for i in found if i in self.target]:
            raise ValueError(
                f"{optimizer}: it holds {self._told(wrong)} of the model, which training must not change; give "
                "it the guide's only, those of its adapter: q = lm.with_adapter(...), q.trainable_parameters()"
            )

    def check_guide(self, held: Iterable[Tensor], optimizer: str = "optimizer") -> None:
        """Refuses an optimiser that does not hold all parameters that are known to be the guide's.

        :raises ValueError: with the names of the parameters.
        """
        self._check_all(self.guide, _by_id(held), optimizer)

    def check_loss(self, loss: Tensor, held: Iterable[Tensor], optimizer: str = "optimizer") -> None:
        """Refuses an optimiser that does not hold all parameters that this loss of the guide trains.

        :raises ValueError: with the names that are known.
        """
        wanted = {i: x for i, x in _by_id(reached(loss)).items() if i not in self.target}
        found = _by_id(held)
        if not any(i in found for i in wanted):
            self._refuse_all(wanted, found, optimizer, "the guide")
        self._check_all(wanted, found, optimizer)

    def check_model(self, trained: Iterable[Tensor], held: Iterable[Tensor], optimizer: str) -> None:
        """Refuses an optimiser of the *model* that does not hold all of ``trained``, or no parameter of the model.

        A factor, or a distribution without a language model, may depend on parameters that a sketch does not show.
        Where there is one, parameters of unknown origin are accepted, and the loss is checked instead.
        """
        found = _by_id(held)
        if not self.hidden and not any(i in self.target for i in found) and all(i in self.names for i in found):
            self._refuse_all(self.target, found, optimizer, "the model")
        self._check_all(_by_id(trained), found, optimizer, "the model")

    def _check_all(
        self, wanted: Mapping[int, Tensor], found: Mapping[int, Tensor], optimizer: str, whose: str = "the guide"
    ) -> None:
        missing = {i: x for i, x in wanted.items() if i not in found}
        if not missing:
            return
        if len(missing) == len(wanted):
            self._refuse_all(wanted, found, optimizer, whose)
        raise ValueError(
            f"{optimizer}: it does not hold {self._told(missing.values())} of {whose}; add them, "
            'optimizer.add_param_group({"params": [...]}) (of a pyro.param: pyro.param(name).unconstrained()), '
            f"{FREEZE}"
        )

    def _refuse_all(
        self, wanted: Mapping[int, Tensor], found: Mapping[int, Tensor], optimizer: str, whose: str
    ) -> NoReturn:
        raise ValueError(
            f"{optimizer}: it holds {self._told(found.values())}, but none of {whose}'s own, "
            f"{self._told(wanted.values())}; give it those, q.trainable_parameters() of a language model with an "
            f"adapter, {FREEZE}"
        )

    def _told(self, parameters: Iterable[Tensor]) -> str:
        """How many parameters, and the names of the first ones."""
        given = list(parameters)
        known = self.names
        names = [repr(known[id(x)]) if id(x) in known else f"a tensor of shape {tuple(x.shape)}" for x in given[:SHOWN]]
        more = f" and {len(given) - SHOWN} more" if len(given) > SHOWN else ""
        return f"{len(given)} parameter{'s' * (len(given) != 1)} ({', '.join(names)}{more})"


def reached(loss: Tensor) -> list[Tensor]:
    """The parameters to which a backward pass of this loss would give a gradient."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    todo: list[Any] = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # a leaf
            found[id(node.variable)] = node.variable
        todo += [n for n, _ in node.next_functions]
    return list(found.values())


def trainable_of(trace: Trace) -> list[Tensor]:
    """The trainable parameters of a program: those of its language models, and Pyro's."""
    found: list[Tensor] = []
    for node in trace.nodes.values():
        if node["type"] == "param" and isinstance(node["value"], Tensor):
            value = node["value"]
            found.append(value.unconstrained() if hasattr(value, "unconstrained") else value)
        elif node["type"] == "sample" and (lm := lm_of(node["fn"])) is not None:
            found += lm.trainable_parameters()
    return [x for x in found if x.requires_grad]


def own_parameters(program: Program, other: Program | None = None) -> dict[str, Tensor]:
    """A module's own parameters without those of language models; none where it is ``other``'s module, too."""
    owner = _owner(program)
    if owner is None or (other is not None and _owner(other) is owner):
        return {}
    views = [m for m in owner.modules() if hasattr(m, "trainable_parameters")]
    inside = {id(x) for view in views for m in view.modules() for x in m.parameters(recurse=False)}
    return {name: x for name, x in owner.named_parameters() if id(x) not in inside}


def _owner(program: Any) -> torch.nn.Module | None:
    """The module that a program is, or whose method it is."""
    while isinstance(program, functools.partial):
        program = program.func
    owner = program if isinstance(program, torch.nn.Module) else getattr(program, "__self__", None)
    return owner if isinstance(owner, torch.nn.Module) else None


def _by_id(parameters: Iterable[Tensor]) -> dict[int, Tensor]:
    return {id(x): x for x in parameters}
