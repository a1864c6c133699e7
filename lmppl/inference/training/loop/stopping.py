"""How training ends before its last step: by a callback, or when a metric no longer improves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...core.arguments import at_least, is_number
from ...processes import distributed

Callback: TypeAlias = Callable[[int, dict[str, Any]], None]
LARGER = ("ess", "log_evidence", "log_z", "elbo", "reward", "accuracy")  # in names of metrics of which more is better


class StopTraining(StopIteration):
    """Raised by a callback of `Trainer.fit` to end training after this step, as if it had been the last one.

    Example::

        def callback(step, metrics):
            if metrics["sd_u"] < 0.05:
                raise StopTraining

        gflownet.fit(batches, 1000, callback=callback)
    """


class EarlyStopping:
    """Ends training when a metric has not improved in ``patience`` evaluations: ``fit(..., stop=EarlyStopping(...))``.

    An evaluation is a step whose metrics contain the figure; those on held-out observations come every
    ``evaluate_every`` steps.  NaN is no improvement.

    :param figure: the name of a metric, "held_out_sd_u", "held_out_log_evidence", "loss", or one that a callback adds.
    :param patience: how many evaluations in a row without improvement end training.
    :param least: an evaluation is an improvement if it is better than the best one so far by more than this.
    :param larger: whether larger is better; None: it is for ESS, log evidence, log Z, ELBO, rewards and accuracy, and
        smaller is better for all other metrics.
    :param best: restore the parameters of the best evaluation when `fit` ends, after its last step, too.  The
        optimiser, and the checkpoint from which a longer run resumes, stay those of the last step.

    Attributes: ``best_step`` and ``best_value``, those of the best evaluation.  With a checkpoint a resumed run
    continues to count, and a run that has ended early makes no further step unless ``patience`` is raised.

    :raises ValueError: for arguments out of their range; in `fit`, where there is no such metric, or the figure is a
        held-out one and ``held_out`` is not given.

    Example::

        gflownet.fit(batches, 5000, held_out=(x, y), stop=EarlyStopping("held_out_sd_u", patience=3, least=0.01))
    """

    def __init__(
        self,
        figure: str = "held_out_sd_u",
        *,
        patience: int = 3,
        least: float = 0.0,
        larger: bool | None = None,
        best: bool = False,
    ):
        if not isinstance(figure, str):
            raise ValueError(f"figure: expected the name of a metric, got {figure!r}")
        at_least(1, patience=patience)
        is_number("a number that is not negative", lambda x: x >= 0, least=least)
        self.figure, self.patience, self.least, self.best = figure, patience, float(least), best
        self.larger = any(name in figure for name in LARGER) if larger is None else larger
        self.reset()

    def reset(self) -> None:
        """Forgets all evaluations so far; `fit` calls it before it begins."""
        self.best_value, self.best_step, self.waited = -math.inf if self.larger else math.inf, -1, 0

    @property
    def ended(self) -> bool:
        """Whether training ends now: whether ``patience`` evaluations in a row brought no improvement."""
        return self.waited >= self.patience

    def __call__(self, step: int, metrics: dict[str, Any]) -> None:
        """Reads the metrics of a step; raises `StopTraining` when patience has run out."""
        if self.figure not in metrics:
            if any(name.startswith("held_out") for name in metrics):
                raise ValueError(f"stop: there is no metric {self.figure!r} among {sorted(metrics)}")
            return
        value = float(metrics[self.figure])
        gain = value - self.best_value if self.larger else self.best_value - value
        if gain > self.least or (self.best_step < 0 and math.isfinite(value)):
            self.best_value, self.best_step, self.waited = value, step, 0
            return
        self.waited += 1
        if self.ended:
            raise StopTraining


class Stops:
    """The callback and the stopping rule of one `fit`, and the parameters of the best evaluation."""

    def __init__(self, callback: Callback | None, stop: Callback | None, parameters: Sequence[Tensor], held_out: bool):
        for name, given in (("callback", callback), ("stop", stop)):
            if given is not None and (not callable(given) or given is EarlyStopping):
                raise ValueError(f"{name}: expected a function of the step and its metrics, got {given!r}")
        self.rule = stop if isinstance(stop, EarlyStopping) else None
        if self.rule is not None:
            if self.rule.figure.startswith("held_out") and not held_out:
                raise ValueError(f"stop: {self.rule.figure!r} is measured on held_out=, which is not given")
            self.rule.reset()
        self.calls = [given for given in (callback, stop) if given is not None]
        self.parameters, self.kept = parameters, list[Tensor]()

    @property
    def ended(self) -> bool:
        """Whether the rule had already ended the run that is resumed."""
        return self.rule is not None and self.rule.ended

    def __call__(self, step: int, metrics: dict[str, Any]) -> bool:
        """Whether training ends here; on several processes all end when one of them does."""
        stopped = False
        for call in self.calls:
            try:
                call(step, metrics)
            except StopIteration:
                stopped = True
        if self.rule is not None and self.rule.best and self.rule.best_step == step:
            self.kept = [p.detach().clone() for p in self.parameters]
        return bool(self.calls) and (not distributed.agree(stopped) or stopped)

    @torch.no_grad()
    def finish(self) -> None:
        """Restores the parameters of the best evaluation, where this was requested."""
        for p, value in zip(self.parameters, self.kept, strict=False):
            p.copy_(value)

    def state(self) -> Any:
        """What a checkpoint keeps; None where there is nothing to keep."""
        if self.rule is None:
            return None
        best = [distributed.whole(value).cpu() for value in self.kept]
        return [self.rule.best_value, self.rule.best_step, self.rule.waited, best]

    def restore(self, state: Any) -> None:
        """Restores what `state` returned."""
        if self.rule is not None:
            self.rule.best_value, self.rule.best_step, self.rule.waited, best = state
            self.kept = [distributed.like(p, v).to(p.device) for p, v in zip(self.parameters, best, strict=False)]
