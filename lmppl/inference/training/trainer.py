"""`Trainer`: what every algorithm that trains a guide shares.  A subclass defines one update."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch
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
    r"""Trains the parameters of a guide: the base class of `GFlowNet` and all other trainers.

    .. math:: q(z) \to p(z \mid y), \qquad u(z) = \log p(z, y) - \log q(z)

    A subclass defines one update from one batch, `update`.  `fit` makes many, with a learning-rate schedule, clipping,
    a log and checkpoints.  `run` then returns the posterior, by importance sampling from the trained guide.

    :param model: a Pyro program.
    :param guide: a Pyro program with the model's latent sites.
    :param optimizer: a torch optimiser over all trainable parameters of the guide, and over none of the model.  Freeze
        what is not to be trained: ``parameter.requires_grad_(False)``.
    :param clip: the largest norm of the gradient of an update; a larger gradient is scaled down to it.
    :param max_plate_nesting: how many axes the plates of model and guide take; None: found from a run of both that
        calls no network.

    Attributes: ``training_tokens``, the number of tokens that all steps so far have sent through the network, and
    ``history``, the metrics of every step of the last `fit` (of one that an exception has ended, too).

    :raises ValueError: for a ``clip`` that is not positive and an optimiser whose step needs a closure (LBFGS); in
        `step` and `fit`, where the optimiser holds parameters of the model, or not all of the guide's.

    Example::

        class Simple(Trainer):
            def update(self, query, step):
                model, guide, args, kwargs = query.given
                loss = VarGrad(num_particles=8).differentiable_loss(model, guide, *args, **kwargs)
                return {"loss": loss.item(), "grad_norm": self.descend(loss)}

        trainer = Simple(model, guide, optimizer=optimizer)
        trainer.fit(batches, steps=100)
        posterior = trainer.run(x, y, num_particles=64)
    """

    guide: Program
    draws = 64  # particles of a posterior, see `sized`

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
        self._steps = 0  # updates made by `step`: the argument of schedules
        self._networks: dict[Programs, list[Any]] = {}
        self._dims: dict[Programs, int] = {}
        self._unchecked: Owners | None = None  # None once the optimiser is known to hold what a loss reaches
        self._watched: dict[Programs, frozenset[int]] = {}  # and the ids of Pyro's parameters then
        self._descent = Descent()
        self._alike = False  # whether all processes have the same parameters

    @abstractmethod
    def update(self, query: Query, step: int) -> dict[str, float]:
        """Makes one update of the parameters.  Subclasses define it.

        :param query: model, guide and a batch, ``query.args``; `arguments` of the batch is what model and guide are
            called with.
        :param step: the number of the update, from 0.
        :returns: the metrics by name, numbers, "loss" among them.
        """

    def arguments(self, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of model and guide in a batch.

        :param batch: an item of the ``batches`` of `fit`.
        :param kwargs: the keyword arguments of `step`.
        :returns: the batch, unless a subclass has batches that hold more.
        """
        return batch

    def descend(self, loss: Tensor) -> float:
        """Makes one step of the optimiser that lowers this loss.

        In a `fit` with ``accumulate=k`` it lowers the mean of the losses of k batches, at the last of them.

        :param loss: a scalar with gradient.
        :returns: the norm of the gradient before clipping; NaN for a batch that only adds its gradient.
        :raises FloatingPointError: where the loss or its gradient is not finite; the parameters are then unchanged.
        :raises ValueError: where the optimiser does not hold all parameters that the loss reaches.
        """
        if self._unchecked is not None:
            self._unchecked.check_loss(loss, self.parameters)
            self._unchecked = None
        return self._descent.down(loss, self.optimizer, self.parameters, self.clip)

    @property
    def accumulates(self) -> bool:
        """Whether `fit` may make one update of several batches: whether `update` calls `descend` once."""
        return True

    def watch(self, query: Query, optimizer: str = "optimizer") -> None:
        """Refuses an optimiser that holds parameters of the model, or not all of the guide's.

        The next loss is checked, too.  For another task's guide than the trainer's own, a warning names what the
        optimiser does not hold.

        :param query: model, guide and the arguments that they are called with.
        :param optimizer: what error messages call the optimiser.
        :raises ValueError: with the names of the parameters.
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
        sharded = any(distributed.is_sharded(p) for p in self.parameters)  # autograd sees the gathered ones
        self._unchecked = None if sharded else owners

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors that the optimiser holds."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def optimizers(self) -> list[Optimizer]:
        """All optimisers whose learning rates `fit` schedules and whose state it saves."""
        return [self.optimizer]

    @property
    def density(self) -> Program:
        """The program whose density approximates the posterior: the guide."""
        return self.guide

    def step(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Makes one update, without the schedule, log and checkpoints of `fit`.

        On several processes each takes its part of the observations, as in `fit`.

        :param args: a batch: what model and guide are called with, for most trainers.
        :param kwargs: keyword arguments of model and guide.
        :returns: the metrics of the update, "loss" and "grad_norm" among them.
        :raises FloatingPointError: where the loss or its gradient is not finite; the parameters are then unchanged.
        :raises ValueError: where the optimiser holds parameters of the model, or not all of the guide's.
        :raises RuntimeError: inside ``torch.no_grad()`` or ``torch.inference_mode()``.
        """
        self._steps += 1
        return self._counted(self._query(*args, **kwargs), self._steps - 1)

    def _query(self, *args: Any, **kwargs: Any) -> Query:
        """The query of the trainer's own programs."""
        return Query(self.model, self.guide, args, kwargs, self.max_plate_nesting)

    def _called(self, query: Query) -> Query:
        """The query of a batch, with the arguments that model and guide are called with."""
        return replace(query, args=self.arguments(query.args, dict(query.kwargs)))

    def _counted(self, query: Query, step: int) -> dict[str, float]:
        """`update` with this process's part of a batch; counts the tokens."""
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "step and fit: they need gradients, which are off here; call them outside torch.no_grad() and "
                "torch.inference_mode()"
            )
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
        """`evaluate`, each process on its part of the observations."""
        dim = self._plate(self._query(*args), lambda query: replace(query, args=query.args[: len(args)]))
        given = () if exact_sample is None or distributed.world().size == 1 else (dict(exact_sample),)
        with distributed.shard((*args, *given), dim, few=True) as own:
            exact = {} if exact_sample is None else {"exact_sample": own[-1] if given else exact_sample}
            return distributed.average(self.evaluate(*own[: len(args)], num_particles=draws, **exact))

    def _judged(self, args: tuple[Any, ...]) -> dict[str, float]:
        """`judge`, each process on its part of the observations."""
        with distributed.shard(args, self._plate(self._query(*args), lambda query: query), few=True) as own:
            return distributed.average(self.judge(*own))

    def _plate(self, query: Query, called: Callable[[Query], Query]) -> Callable[[tuple[Any, ...], Part], int]:
        """A function that returns the axis of the observations' plate; it is found once for each pair of programs."""
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
        """Makes ``steps`` updates, with warm-up and decay of the learning rate, a log, checkpoints and a progress bar.

        A step whose loss or gradient is not finite updates nothing: its metrics are the loss, NaN, and "skipped", 1 (in
        the log null and 1), and a warning gives the reason.  After `MOST_SKIPPED` such steps in a row training ends
        with an error.

        After two steps it tells what all of them will cost, in tokens and time: above the progress bar, and to the
        logger "lmppl" at the level INFO.  At the end a warning tells where the guide is not the posterior (most of the
        last training draws were impossible; on ``held_out`` a small ESS, a large k-hat, or mass that the guide misses,
        all in the log's last line), and what to try.

        When started by `torchrun`, give every process the same batches: each takes its part of the observations, the
        first axis of every argument.  Metrics and gradients are those of the whole batch.  Only the first process
        writes and shows progress; ``callback`` is called on all.  See docs/scale.md, and docs/training.md for every
        option.

        :param batches: tuples of arguments, taken in turn; a `DataLoader`; a torch `Dataset` of observations (shuffled,
            and collated by torch's ``default_collate``); any other iterable, which is read again when it ends (an
            iterator cannot be); or a function of the step.  Or several ``(model, guide, batches)`` that share the
            parameters: these take turns, one step each.
        :param steps: how many updates in all, those before the checkpoint that is resumed included.
        :param seed: each step draws from a generator seeded by (seed, step), so that a resumed run repeats an
            uninterrupted one.  The caller's generator is left unchanged.
        :param warmup: steps in which the learning rate rises to the optimiser's, at most half of all; then it falls
            linearly to zero.  Without effect where a ``scheduler`` is given.
        :param held_out: the arguments of model and guide for validation: on them the guide is judged every
            ``evaluate_every`` steps and at the last one, see `evaluate`.  The metric ``verdict`` is "converged",
            "improving" or "suspect: " with the reason.
        :param evaluate_every: steps between two evaluations.
        :param log: a file that gets a JSON line for every step.  A resumed run first removes the lines after its
            checkpoint, so that the log is that of an uninterrupted run.
        :param checkpoint: a directory.  It is written at the beginning, every ``checkpoint_every`` steps, at the end,
            and on SIGINT or SIGTERM (which then end the program; a second one ends it at once).  Where it holds a
            checkpoint, training resumes from it, with all state of the optimisers.  Other files in it are left alone.
        :param checkpoint_every: steps between two checkpoints.
        :param progress: show steps, rate, time left and figures on standard error: a bar on a terminal and in a
            notebook, else a plain line every ten seconds.
        :param callback: a function of the step and its metrics, called before they are logged.  What it adds to them
            (numbers, strings, what JSON can hold) is logged, too.  It ends training by raising `StopTraining` (or
            StopIteration): the step counts, its checkpoint is written, and `fit` returns.  After any other exception
            the guide stays as the step left it, and the metrics so far are in the log and in ``history``.
        :param identity: what else identifies the run, {"model": "infilling", ...}, numbers and strings.  A checkpoint
            is resumed only by a run with the same identity, trainer and settings, names of programs, seed, data,
            language model (base weights that are not trained) and optimisers.  The number of steps may differ.
        :param batch_size: observations in a batch, where ``batches`` is a Dataset; None: 8.
        :param scheduler: a learning-rate scheduler of torch (or transformers) over the trainer's optimiser, or one for
            each of several, in place of the built-in warm-up and decay.  It is stepped after every update, saved and
            restored.
        :param accumulate: k: each update takes k batches, and its gradient is their mean; so are the metrics.  Where
            ``batches`` is a function, its argument is then the number of the batch.
        :param stop: an `EarlyStopping`, or another function like ``callback``, called after it.
        :param trackers: where else to send the metrics: names that accelerate knows, ["tensorboard"], whose files go to
            a folder "trackers" beside the log, or instances of its ``GeneralTracker``.
        :param exact_sample: exact draws of the posterior of ``held_out``: latents (*plates, ...) by site, e.g. those
            from which `simulate` drew the observations, or an exact `Posterior`.  They give an upper bound of log Z.
        :returns: the metrics of every step made by this call.

        :raises ValueError: where checkpoint or log belong to another run, are damaged or are other files (nothing is
            then changed); where there are no batches; where the optimiser holds parameters of the model, or not all of
            the guide's.
        :raises FloatingPointError: where `MOST_SKIPPED` steps in a row updated nothing.
        :raises ImportError: for a tracker that is not installed.
        :raises LockedError: an OSError, where another process writes the same log or checkpoint.

        Example::

            history = gflownet.fit(batches, 1000, held_out=(x, y), log="run.jsonl", checkpoint="run")
            history[-1]["held_out_sd_u"]  # zero at the posterior
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
                f"accumulate: {type(self).__name__} with these settings makes several updates from one batch, each "
                "with a new gradient; use larger batches instead"
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
        """Compares the guide with the posterior by more draws than `evaluate`; `fit` calls it at the end.

        :param args: the arguments of model and guide.
        :returns: ``held_out_khat``, ``held_out_missed`` and ``held_out_lacking``, see `loop.verdict.judge`.
        """
        return judge(self._query(*args))

    def _refuse(self, tasks: list[Task], seed: int) -> None:
        """Refuses a wrong optimiser before anything is written."""
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
        """What a checkpoint must hold beside the optimiser and its parameters.

        :returns: tensors by name, and a dict that JSON can hold.
        """
        return {}, {}

    def restore(self, tensors: dict[str, Tensor], own: dict[str, Any]) -> None:
        """Restores what `state` returned.

        :param tensors: the tensors by name.
        :param own: the dict.
        """
        return None

    def evaluate(
        self, *args: Any, num_particles: int = LOOK, exact_sample: ExactSample | None = None, **kwargs: Any
    ) -> dict[str, float]:
        """Compares the guide with the posterior, from N draws of the guide and N/2 draws of the model's latents.

        :param args: the arguments of model and guide.
        :param num_particles: N, the draws of the guide.
        :param exact_sample: exact draws of the posterior of these observations, as in `fit`; None: there are none.
        :param kwargs: keyword arguments of model and guide.
        :returns: means over observations, the names beginning with ``held_out_``:

            - ``sd_u``, the standard deviation of u, zero at the posterior; ``ess``, the effective sample size as a
              share of N; ``impossible``, the share of the guide's draws whose reward is zero; ``khat``, the median of
              Pareto k-hat, absent where it is undefined;
            - ``log_z``, the log evidence in nats from the guide's draws, too low on average; ``log_z_model``, likewise
              from the model's draws; with ``exact_sample`` also ``log_z_above``, too high on average, and ``gap``, its
              distance from ``log_z``;
            - ``missed``, the share of the evidence that the model's draws find and the guide's do not; zero unless
              certain;
            - ``length``, the mean number of tokens before the stop, and ``stop``, the guide's mean probability of
              stopping where its texts stopped; both over all texts, and absent where no latent text has a stop.

        Example::

            found = gflownet.evaluate(x, y, num_particles=64)
            found["held_out_sd_u"], found["held_out_log_z"]
        """
        return examine(self._query(*args, **kwargs), num_particles, exact_sample)

    def sized(self, num_particles: int) -> Self:
        """The same trainer, whose `run` uses this many particles by default.

        :param num_particles: at least 1.
        :returns: a copy that shares model, guide and optimiser.
        """
        at_least(1, num_particles=num_particles)
        other = copy.copy(self)
        other.draws = num_particles
        return other

    def run(self, *args: Any, num_particles: int | None = None, **kwargs: Any) -> Posterior:
        """The posterior given these arguments, by importance sampling from the guide with its present parameters.

        :param args: the arguments of model and guide.
        :param num_particles: the number of particles; None: 64, or that of `sized`.
        :param kwargs: keyword arguments of model and guide.
        :returns: a `Posterior` with weighted particles.
        :raises SiteMismatch: where model and guide have different latent sites.
        """
        n, nesting = self.draws if num_particles is None else num_particles, self.max_plate_nesting
        return Importance(self.model, self.guide, n, max_plate_nesting=nesting).run(*args, **kwargs)
