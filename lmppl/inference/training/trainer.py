"""`Trainer`: what every algorithm that trains a guide shares; each says only how to make one update."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeAlias

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ...randomness import Part, forked
from ..core import programs
from ..core.arguments import at_least, is_integer, is_path, is_program, steps_by_itself
from ..core.programs import Program
from ..core.query import Query
from ..posterior.algorithm import Sampler
from ..posterior.posterior import Posterior
from ..processes import distributed
from ..processes.sharded import plate_of
from ..samplers.importance import Importance
from ..samplers.smc.bounds import ExactSample
from .loop.batches import Batches, Task, is_task, readable
from .loop.cost import Spent
from .loop.descent import Descent
from .loop.evaluation import LOOK, Looks, check_exact, examine
from .loop.evaluation import standard_deviation as standard_deviation
from .loop.identity import settings
from .loop.loop import MOST_SKIPPED as MOST_SKIPPED
from .loop.loop import Loop
from .loop.ownership import Owners
from .loop.rates import Rates, Scheduled, Warmed
from .loop.record import Record
from .loop.saving import Saving, data_and_networks, seeded
from .loop.stopping import Callback, EarlyStopping, Stops
from .loop.stopping import StopTraining as StopTraining
from .loop.trackers import DIRECTORY, Trackers
from .loop.verdict import judge, warn

Programs: TypeAlias = tuple[Program, Program | None]  # model and guide

logger = logging.getLogger("lmppl")


class Trainer(Sampler, ABC):
    """Updates a guide's parameters; owns the loop, the clipping, the log, the checkpoints and the count of tokens.

    :param model: a Pyro program.
    :param guide: a Pyro program with the model's latent sites, whose trainable parameters the optimiser holds.
    :param optimizer: a torch optimiser over all of them, and nothing of the model; what is not to train is frozen,
        ``parameter.requires_grad_(False)``.
    :param clip: the largest gradient norm.
    :param max_plate_nesting: guessed where not given.

    ``training_tokens`` counts the tokens that its steps have sent through the network; ``history`` has the metrics of
    every step of the last `fit`, also of one that an exception has ended.
    """

    guide: Program
    draws = 64  # particles of an answer, see `sized`

    def __init__(
        self,
        model: Program,
        guide: Program,
        *,
        optimizer: Optimizer,
        clip: float = 1.0,
        max_plate_nesting: int | None = None,
    ):
        steps_by_itself(optimizer=optimizer)
        is_program(model=model, guide=guide)
        if not clip > 0:
            raise ValueError(f"clip: must be positive, got {clip}")
        self.model, self.guide, self.optimizer, self.clip = model, guide, optimizer, clip
        self.max_plate_nesting = max_plate_nesting
        self.training_tokens = 0
        self.history: list[dict[str, float]] = []
        self._steps = 0  # taken by `step`, one by one: what schedules are asked about
        self._networks: dict[Programs, list[Any]] = {}
        self._dims: dict[Programs, int] = {}
        self._unchecked: Owners | None = None  # until the optimiser is seen to hold what a loss reaches
        self._watched: dict[Programs, frozenset[int]] = {}  # with which of Pyro's parameters
        self._descent = Descent()
        self._alike = False  # whether all processes are known to have the same parameters

    @abstractmethod
    def update(self, query: Query, step: int) -> dict[str, float]:
        """One update of the parameters; its metrics, "loss" among them.

        ``query.args`` are a batch; what model and guide are called with is `arguments` of it.
        """

    def arguments(self, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Of a batch, what model and guide are called with."""
        return batch

    def descend(self, loss: Tensor) -> float:
        """One step of the optimiser down this loss; the norm of its gradient before clipping.

        In a `fit` that accumulates, down the mean of the losses of several batches: NaN until the last one.

        :raises FloatingPointError: where the loss or its gradient is not finite; the parameters are then as before.
        :raises ValueError: where the optimiser does not hold what the loss reaches.
        """
        if self._unchecked is not None:
            self._unchecked.check_loss(loss, self.parameters)
            self._unchecked = None
        return self._descent.down(loss, self.optimizer, self.parameters, self.clip)

    @property
    def accumulates(self) -> bool:
        """Whether an update may be of several batches: whether `update` calls `descend` once."""
        return True

    def watch(self, query: Query, optimizer: str = "optimizer") -> None:
        """Refuse an optimiser that holds parameters of the model, or not all of the guide's; the next loss tells more.

        Of another task's guide than the trainer's own, a warning says what is not held.

        ``query.args`` are what model and guide are called with; ``optimizer`` is what a message calls it.

        :raises ValueError: with their names.
        """
        owners = Owners.of(query)
        owners.check_target(self.parameters, optimizer)
        self._unchecked = None
        try:
            owners.check_guide(self.parameters, optimizer)
        except ValueError as error:
            if query.guide == self.guide:
                raise
            logger.warning("a task does not train: %s", error)
            return
        sharded = any(distributed.is_sharded(p) for p in self.parameters)  # autograd knows these by what is gathered
        self._unchecked = None if sharded else owners

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimiser holds."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def optimizers(self) -> list[Optimizer]:
        """All whose learning rates `fit` schedules and whose state it saves."""
        return [self.optimizer]

    @property
    def density(self) -> Program:
        """The program whose density approximates the posterior."""
        return self.guide

    def step(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """One update on the observations ``args``; what there is to know of it.

        On several processes each has its part of them, as in `fit`.

        :raises FloatingPointError: where the loss or its gradient is not finite; the parameters are then as before.
        :raises ValueError: where the optimiser holds parameters of the model, or not all of the guide's.
        """
        self._steps += 1
        return self._counted(self._query(*args, **kwargs), self._steps - 1)

    def _query(self, *args: Any, **kwargs: Any) -> Query:
        """Of the trainer's own programs."""
        return Query(self.model, self.guide, args, kwargs, self.max_plate_nesting)

    def _called(self, query: Query) -> Query:
        """Of a batch, the query with what model and guide are called with."""
        return replace(query, args=self.arguments(query.args, dict(query.kwargs)))

    def _counted(self, query: Query, step: int) -> dict[str, float]:
        """`update` with this process's part of a batch, the tokens counted."""
        query, both = replace(query, max_plate_nesting=self.max_plate_nesting), (query.model, query.guide)
        with distributed.shard(query.args, self._plate(query, self._called)) as own:
            query = replace(query, args=own)
            if not self._alike:
                distributed.broadcast([p for o in self.optimizers for g in o.param_groups for p in g["params"]])
                self._alike = True
            if both not in self._networks:
                self._networks[both] = self._called(query).networks
            if self._watched.get(both) != frozenset(map(id, programs.stored())):
                self.watch(self._called(query))
                self._watched[both] = frozenset(map(id, programs.stored()))
            networks = self._networks[both]
            before = sum(network.tokens_scored for network in networks)
            metrics = self.update(query, step)
            self.training_tokens += distributed.total(sum(network.tokens_scored for network in networks) - before)
            return distributed.average(metrics)

    def _held_out(self, args: tuple[Any, ...], draws: int, exact_sample: Any = None) -> dict[str, float]:
        """`evaluate`, each process on its part."""
        dim = self._plate(self._query(*args), lambda query: replace(query, args=query.args[: len(args)]))
        given = () if exact_sample is None or distributed.world().size == 1 else (dict(exact_sample),)
        with distributed.shard((*args, *given), dim, few=True) as own:
            exact = {} if exact_sample is None else {"exact_sample": own[-1] if given else exact_sample}
            return distributed.average(self.evaluate(*own[: len(args)], num_particles=draws, **exact))

    def _judged(self, args: tuple[Any, ...]) -> dict[str, float]:
        """`judge`, each process on its part."""
        with distributed.shard(args, self._plate(self._query(*args), lambda query: query), few=True) as own:
            return distributed.average(self.judge(*own))

    def _plate(self, query: Query, called: Callable[[Query], Query]) -> Callable[[tuple[Any, ...], Part], int]:
        """What finds the axis of the observations' plate, once for each pair of programs."""
        both = query.model, query.guide

        def dim(own: tuple[Any, ...], part: Part) -> int:
            if both not in self._dims:
                self._dims[both] = plate_of(lambda: called(replace(query, args=own)), lambda: called(query), part)
            return self._dims[both]

        return dim

    def fit(
        self,
        batches: Batches | Sequence[Task],
        steps: int,
        *,
        seed: int = 0,
        warmup: int = 20,
        held_out: tuple[Any, ...] | None = None,
        evaluate_every: int = 50,
        log: str | Path | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 100,
        progress: bool = True,
        callback: Callback | None = None,
        identity: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
        accumulate: int = 1,
        stop: EarlyStopping | Callback | None = None,
        trackers: Sequence[Any] | None = None,
        exact_sample: ExactSample | None = None,
    ) -> list[dict[str, float]]:
        """``steps`` updates: the learning rate rises to what was set in ``warmup`` steps, then falls on a line to zero.

        A step whose loss or gradient is not finite updates nothing: its metrics are the loss, NaN, and "skipped", 1
        (in the log null and 1), and a warning says why.  `MOST_SKIPPED` of them in a row end the training.

        Started by `torchrun`, every process is given the same batches and takes its part of each one's observations,
        the first axis of every argument; metrics and gradients are those of the whole batch, and the first process
        alone writes and shows progress (``callback`` is called on all). See docs/scale.md, and docs/training.md for
        every option.

        :param batches: tuples of arguments, taken in turn; a `DataLoader`, a torch `Dataset` of observations (shuffled,
            and put together by torch's own collation), or anything else to iterate over, read again when it ends (an
            iterator cannot be); or a function of the step.  Or several ``(model, guide, batches)`` that share the
            parameters, whose steps take turns.
        :param warmup: at most half of the steps; without a say where there is a ``scheduler``.
        :param seed: each step draws from a generator seeded by (seed, step), so that a resumed run repeats an
            uninterrupted one; the caller's generator is left as it was.
        :param held_out: arguments on which the guide is judged every ``evaluate_every`` steps, see `evaluate`; its
            ``verdict`` is "converged", "improving" or "suspect: ", and why.
        :param log: a file that gets a JSON line every step; a resumed run cuts off what was not saved, so that its log
            is that of an uninterrupted run.
        :param checkpoint: a directory, written every ``checkpoint_every`` steps, at the beginning, at the end and on
            SIGINT or SIGTERM (which then end the program; a second one does so at once), and resumed from where it
            exists: with everything that the optimisers keep.  Other files in it are left alone.
        :param callback: called with the step and its metrics before they are logged; what it adds to them (numbers,
            strings, what JSON can hold) is logged too.  It ends the training by raising `StopTraining` (or
            StopIteration): the step counts, its checkpoint is written, and `fit` returns.  After any other exception
            the guide is as the step left it, and the metrics so far are in the log and in ``history``.
        :param identity: what else the run is of, {"model": "infilling", ...}, numbers and strings.  A checkpoint is
            taken up by a run of the same identity, trainer and settings, programs by their names, seed, data, language
            model (base weights that do not train) and optimisers; by any other number of steps.
        :param batch_size: observations a batch, where a Dataset has them; 8 by default.
        :param scheduler: one of torch's (transformers' are) over the trainer's optimiser, or one for each of several,
            stepped after every update, saved and restored; in place of the built-in warm-up and decay.
        :param accumulate: k batches an update, whose gradient is their mean; a function of the step is then one of the
            number of the batch.  Metrics are means, too.
        :param stop: an `EarlyStopping`, or another function like ``callback``, called after it.
        :param trackers: what shows the metrics, too: names that accelerate knows, ["tensorboard"], whose files go to a
            folder "trackers" beside the log, or instances of its ``GeneralTracker``.
        :param exact_sample: latents of ``held_out`` that are exact draws of its posterior, (*plates, ...) by site, the
            ones that `simulate` drew it with for instance, or an exact `Posterior`: log Z is then bounded from above.
        :returns: the metrics of every step run by this call.

        After two steps it says what all of them will cost, in tokens and time: above the progress bar, and to the
        logger "lmppl" at the level INFO.

        At the end a warning says where the guide is not the posterior (most of the last training draws were impossible;
        on ``held_out`` a small ESS, a large k-hat, or mass that the guide misses, all in the log's last line), and what
        to try.

        :raises ValueError: where checkpoint or log are of another run, damaged, or no such files (nothing is changed);
            where there are no batches; where the optimiser holds parameters of the model, or not all of the guide's.
        :raises FloatingPointError: where nothing was updated in `MOST_SKIPPED` steps in a row.
        :raises ImportError: for a tracker that is not installed.
        :raises LockedError: an OSError, where another process trains into them.
        """
        is_integer(seed=seed)
        at_least(
            1, steps=steps, evaluate_every=evaluate_every, checkpoint_every=checkpoint_every, accumulate=accumulate
        )
        at_least(0, warmup=warmup)
        is_path(**{name: path for name, path in (("log", log), ("checkpoint", checkpoint)) if path is not None})
        if held_out is not None and not isinstance(held_out, tuple | list):
            raise ValueError(f"held_out: expected the arguments of model and guide, a tuple (x, y), got {held_out!r}")
        check_exact(exact_sample, held_out)
        for name, value in (identity or {}).items():
            if not isinstance(value, bool | int | float | str | None):
                raise ValueError(f"identity: expected numbers and strings, got {value!r} for {name!r}")
        if accumulate > 1 and not self.accumulates:
            raise ValueError(
                f"accumulate: {type(self).__name__} as it is set makes several updates of one batch, each of its own "
                "gradient; give larger batches instead"
            )
        held = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        stops = Stops(callback, stop, held, held_out is not None)
        of: dict[str, Any] = {**(identity or {}), **settings(self), "seed": seed}
        rates: Rates = Warmed(self.optimizers, steps, warmup)
        if scheduler is not None:
            rates = scheduled = Scheduled(scheduler, self.optimizers)
            of["scheduler"] = scheduled.names
        if accumulate > 1:
            of["accumulate"] = accumulate
        kind = type(self).__name__
        where = Path(log or checkpoint or "run").absolute().parent / DIRECTORY
        shown = Trackers(trackers, where, kind, {**of, "steps": steps})
        tasks = self._tasks(readable(batches, seed, batch_size))
        self.history = []
        if checkpoint is not None:
            self._refuse(tasks, seed)
        asked = tuple(held_out or ())
        evaluate = None if held_out is None else lambda draws: self._held_out(asked, draws, exact_sample)
        looks = Looks(evaluate, lambda: self._judged(asked), evaluate_every, steps)
        spent = Spent(lambda: self.training_tokens)
        with Record(log, checkpoint) as record, shown, forked():
            if record.where is not None:
                of |= data_and_networks(self, tasks, seed)
            saving = Saving(self, record, of, {"scheduler": rates, "stop": stops, "looks": looks})
            with spent.on(spent.saves):
                start = saving.take_up()
            Loop(
                self._counted, self._descent, tasks, steps, seed, accumulate, rates, looks, stops, record, saving,
                shown, self.history, checkpoint_every, spent, stop is not None,
            ).run(start, kind, progress)  # fmt: skip
        if self.history:
            warn(kind, self.history)
        return self.history

    def judge(self, *args: Any) -> dict[str, float]:
        """How near the guide is to the posterior of these observations, see `verdict.judge`."""
        return judge(self._query(*args))

    def _refuse(self, tasks: list[Task], seed: int) -> None:
        """Refuse a wrong optimiser before anything is written."""
        with forked():
            for task in tasks:
                seeded(seed, 0)
                self.watch(self._called(task.query(0)))

    def _tasks(self, batches: Any) -> list[Task]:
        if callable(batches):
            return [Task(self.model, self.guide, batches)]
        if len(batches) and all(map(is_task, batches)):
            return [Task(*b) for b in batches]
        return [Task(self.model, self.guide, batches)]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint must hold beside the optimiser and its parameters."""
        return {}, {}

    def restore(self, tensors: dict[str, Tensor], own: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        return None

    def evaluate(
        self, *args: Any, num_particles: int = LOOK, exact_sample: ExactSample | None = None, **kwargs: Any
    ) -> dict[str, float]:
        """How near the guide is to the posterior, from its own draws and half as many of the model's latents.

        Means over observations, each name after ``held_out_``:

        - ``sd_u``, zero at the posterior; ``ess``, of N; ``impossible``, the share of the guide's draws of reward zero;
          ``khat``, the median of Pareto k-hat, absent where undefined;
        - ``log_z`` in nats, too low on average, by the guide's draws; ``log_z_model``, likewise, by the model's;
          ``log_z_above``, too high on average, and ``gap``, its distance from ``log_z``, where an exact draw of the
          posterior is given;
        - ``missed``, the share of the evidence that the model's draws find and the guide's do not, zero unless sure;
        - ``length``, the mean number of tokens before the stop, ``stop``, the guide's mean probability of stopping
          where its texts did stop; both over all texts, and absent where no latent text has a stop.
        """
        return examine(self._query(*args, **kwargs), num_particles, exact_sample)

    def sized(self, num_particles: int) -> Self:
        """The same trainer, whose answers have this many particles where `run` is not told otherwise."""
        at_least(1, num_particles=num_particles)
        other = copy.copy(self)
        other.draws = num_particles
        return other

    def run(self, *args: Any, num_particles: int | None = None, **kwargs: Any) -> Posterior:
        """The posterior given ``args``, by importance sampling from the guide as it now is; 64 particles by default."""
        n, nesting = self.draws if num_particles is None else num_particles, self.max_plate_nesting
        return Importance(self.model, self.guide, n, max_plate_nesting=nesting).run(*args, **kwargs)
