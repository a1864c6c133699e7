"""`VariationalEM`: infers latents with the model's parameters fixed, then raises the likelihood over the parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.optim import Optimizer

from ..core import programs
from ..core.arguments import steps_by_itself
from ..core.programs import Program, Substitute, parameters_of
from ..core.query import Query
from ..posterior.algorithm import on, sized
from ..posterior.posterior import Posterior
from ..processes import distributed
from .loop.ownership import Owners, trainable_of
from .surrogate import Surrogate, frozen_but, subsampling
from .trainer import Task, Trainer

MOST_HALVINGS = 40


class VariationalEM(Trainer):
    r"""Learns the parameters theta of a model together with the posterior of its latents.

    .. math:: \log p_\theta(y) \ge E_q[\log p_\theta(z, y) - \log q(z)]

    E-step: q approaches p(z | y) with theta fixed, by any algorithm of the package.  M-step: the optimiser raises

    .. math:: Q(\theta) = \sum_i s_i \sum_n w_{ni} \log p_\theta(z_{ni}, y_i)

    with the particles z and the normalised weights w of the E-step fixed.  i runs over the elements of the kept plates
    (those that enclose every site); an element of a subsample counts :math:`s_i` = full size / size times.  With an
    exact posterior the gradient of Q is that of log p(y) (Fisher's identity), and with ``backtrack=True`` log p(y)
    never falls.

    :param model: a Pyro program with trainable parameters.
    :param guide: the guide that a training E-step trains; None: the E-step's own, if it has one.
    :param e_step: a `Trainer` (`GFlowNet`, `ReweightedWakeSleep`, ...), which makes ``e_steps`` updates a round and
        whose guide then draws ``num_particles``; or any algorithm with ``.run(*args) -> Posterior`` (`Enumeration`,
        `SMC`, `Importance`, `MetropolisHastings`).
    :param m_optimizer: a torch optimiser over theta.  If likelihood and guide share one base network, give each its own
        adapter.
    :param e_steps: updates of a training E-step in a round.
    :param m_steps: updates of theta in a round, on the same particles.
    :param num_particles: how many particles a trained guide draws for each observation.
    :param weighted: whether a trained guide's particles have importance weights, :math:`w_n \propto e^{u(z_n)}`.  Then
        the M-step corrects for what the guide has not learned yet: its gradient tends to that of log p(y) as N grows,
        whatever q is.  False: w = 1/N as in Hu et al. 2024, the gradient of the ELBO; for guides so far off that one
        particle has all the weight.
    :param backtrack: halve each step of the optimiser until Q does not fall; at worst theta stays.
    :param exact: an algorithm, such as `Enumeration(model)`, whose log evidence is logged as ``log_likelihood``.
    :param clip: the largest norm of the M-step's gradient; by default there is none.
    :param max_particles: how many particles the M-step scores at a time; it bounds the memory.
    :param max_plate_nesting: how many axes the plates of model and guide take; None: found from a run of both that
        calls no network.

    ``step`` is one round.  Its metrics are sums over the data before the M-step: ``surrogate`` (Q); ``log_evidence``
    (exact with `Enumeration`; the importance-weighted bound with a trained guide); ``elbo`` (the mean of u over the
    guide's draws, else ``log_evidence``); ``gap`` (``log_likelihood``, else ``log_evidence``, minus ``elbo``);
    ``grad_norm``; with ``backtrack`` also ``gain``, that of Q, and ``halvings``.  The metrics of a training E-step have
    the prefix ``e_``.  What the E-step does not estimate is left out.

    ``fit`` is that of `Trainer`: the learning rates of both optimisers decay to zero, and both are in the checkpoint.
    When theta changes, a replay buffer of the E-step discards its stored rewards.

    :raises ValueError: where E-step and M-step would change each other's parameters, where the model does not depend on
        theta, and for a subsampled plate that does not enclose every site.
    :raises FloatingPointError: where Q or its gradient is not finite; that step changes nothing.

    Sources: Neal and Hinton 1998, "A view of the EM algorithm"; Hu et al. 2024, Section 3.4; Burda et al. 2016 for the
    weights.

    Example::

        q = lm.with_adapter(LoraConfig(r=16, target_modules="all-linear"))
        p = lm.with_adapter(LoraConfig(r=16, target_modules="all-linear"))

        def model(x, y):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", Completion(lm, x, max_tokens=5))
                pyro.sample("y", Completion(p, p.join(x, z), max_tokens=1), obs=y)

        def guide(x, y):
            with pyro.plate("data", len(x)):
                pyro.sample("z", Completion(q, q.join(y, x), max_tokens=5))

        e_step = GFlowNet(model, guide, optimizer=torch.optim.AdamW(q.trainable_parameters(), lr=1e-3))
        em = VariationalEM(model, guide, e_step, torch.optim.AdamW(p.trainable_parameters(), lr=1e-3), e_steps=4)
        em.fit(batches, steps=200)
        em.run(x, y).predict(model, [" subjective", " objective"], x_new, None, sampler="prior")
    """

    def __init__(
        self,
        model: Program,
        guide: Program | None,
        e_step: Any,
        m_optimizer: Optimizer,
        *,
        e_steps: int = 1,
        m_steps: int = 1,
        num_particles: int = 16,
        weighted: bool = True,
        backtrack: bool = False,
        exact: Any = None,
        clip: float = math.inf,
        max_particles: int = 256,
        max_plate_nesting: int | None = None,
    ):
        steps_by_itself(m_optimizer=m_optimizer)
        for name, algorithm in {"e_step": e_step, "exact": exact}.items():
            if algorithm is not None or name == "e_step":
                _check(name, algorithm, model)
        own = getattr(e_step, "guide", None)
        if guide is not None and own is not None and guide != own:
            raise ValueError("guide: it differs from the guide that e_step was built with")
        counts = dict(e_steps=e_steps, m_steps=m_steps, num_particles=num_particles, max_particles=max_particles)
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name}: must be at least 1, got {count}")
        if not weighted and not isinstance(e_step, Trainer):
            raise ValueError("weighted: False is possible only where e_step is a Trainer")
        super().__init__(
            model, guide or own or model, optimizer=m_optimizer, clip=clip, max_plate_nesting=max_plate_nesting
        )
        self.e_step, self.exact = e_step, exact
        self.e_steps, self.m_steps = e_steps, m_steps
        self.num_particles, self.max_particles = num_particles, max_particles
        self.weighted, self.backtrack = weighted, backtrack

    def update(self, query: Query, step: int) -> dict[str, float]:
        """One round: the updates of a training E-step, its posterior, and the M-step.

        :param query: model, guide and a batch.
        :param step: the number of the round, from 0.
        :returns: the metrics of the round.
        """
        metrics: dict[str, float] = {}
        called = self._called(query)
        sketch = self._sketch(called)
        if isinstance(self.e_step, Trainer):
            own = replace(query, max_plate_nesting=self.e_step.max_plate_nesting)
            for k in range(self.e_steps):
                found = self.e_step.update(own, step * self.e_steps + k)
            metrics = {f"e_{name}": value for name, value in found.items()}
        chosen = {n: s["value"] for n, s in sketch.nodes.items() if s["type"] == "sample" and site_is_subsample(s)}
        pinned = replace(called, model=_pinned(called.model, chosen), guide=_pinned(called.proposal, chosen))
        posterior = self._infer(self.e_step, pinned)
        metrics |= self._evidence(posterior, sketch, pinned)
        log_weights = posterior.log_weights
        if not self.weighted:
            log_weights = torch.where(log_weights > -torch.inf, 0.0, log_weights)
        surrogate = Surrogate.of(pinned, posterior, log_weights, subsampling(sketch, posterior.sites.plates))
        return metrics | self._ascend(surrogate, parameters_of(sketch))

    def _sketch(self, query: Query) -> Trace:
        """The model's trace on its subsamples, without a call of the network; checks who changes which parameters."""
        pair = query.sketch(particles=1)
        q, p = pair.proposal, pair.model
        if isinstance(self.e_step, Trainer):
            theta, phi = _ids(self.parameters), _ids(self.e_step.parameters)
            if (theta & phi) | (theta & _ids(parameters_of(q))):
                raise ValueError(
                    "m_optimizer: it holds parameters of the guide, so that the M-step would change q; give the "
                    "likelihood an adapter of its own: lm.with_adapter(config)"
                )
            if phi & _ids(parameters_of(p)):
                raise ValueError(
                    "e_step: its optimizer holds parameters of the model, so that the E-step would change p; give the "
                    "guide an adapter of its own: lm.with_adapter(config)"
                )
        return p

    def _infer(self, algorithm: Any, query: Query) -> Posterior:
        """The algorithm's posterior for this model and, if the algorithm has a guide, this guide."""
        algorithm = on(algorithm, query.model, query.guide)
        if isinstance(algorithm, Trainer):
            algorithm = algorithm.sized(self.num_particles)
        with torch.no_grad():
            posterior: Posterior = algorithm.run(*query.args, **query.kwargs)
        return posterior

    def _evidence(self, posterior: Posterior, sketch: Trace, query: Query) -> dict[str, float]:
        """Bounds and estimates of log p(y), summed over the data; undefined ones are left out."""

        def total(x: Tensor) -> float:
            return distributed.total(x.sum().item() * subsampling(sketch, posterior.sites.plates))

        found = {"log_evidence": total(posterior.log_evidence)}
        found["elbo"] = found["log_evidence"]
        if isinstance(self.e_step, Trainer):
            found["elbo"] = total(posterior.log_weights.mean(0) + math.log(posterior.num_particles))
        if self.exact is not None:
            found["log_likelihood"] = total(self._infer(self.exact, query).log_evidence)
        found["gap"] = found.get("log_likelihood", found["log_evidence"]) - found["elbo"]
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def _ascend(self, surrogate: Surrogate, known: list[Tensor]) -> dict[str, float]:
        """The M-step."""
        metrics: dict[str, float] = {}
        halvings, start = 0, distributed.total(surrogate.value(self.max_particles)) if self.backtrack else math.nan
        now = start
        for _ in range(self.m_steps):
            self.optimizer.zero_grad(set_to_none=True)
            with frozen_but(known, self.parameters):
                value = distributed.total(surrogate.backward(self.parameters, self.max_particles))
            distributed.sum_gradients(self.parameters)
            norm = distributed.whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.clip))
            if not (math.isfinite(value) and bool(norm.isfinite())):
                self.optimizer.zero_grad(set_to_none=True)
                raise FloatingPointError(f"Q is {value}, its gradient's norm {norm.item()}; nothing was updated")
            before = [p.detach().clone() for p in self.parameters] if self.backtrack else []
            self.optimizer.step()
            if self.backtrack:
                now, halved = self._halve(surrogate, now, before)
                halvings += halved
            metrics = {"loss": -value, "surrogate": value, "grad_norm": norm.item()} | metrics
        if self.backtrack:
            metrics |= {"gain": now - start, "halvings": float(halvings)}
        return metrics

    @torch.no_grad()
    def _halve(self, surrogate: Surrogate, value: float, before: list[Tensor]) -> tuple[float, int]:
        """Halves the step from ``before`` until Q is at least ``value``; returns this Q and the number of halvings."""
        way = [p - old for p, old in zip(self.parameters, before, strict=True)]
        for halvings in range(MOST_HALVINGS):
            found = distributed.total(surrogate.value(self.max_particles))
            if found >= value:
                return found, halvings
            for p, old, whole in zip(self.parameters, before, way, strict=True):
                p.copy_(old + whole * 0.5 ** (halvings + 1))
        for p, old in zip(self.parameters, before, strict=True):
            p.copy_(old)
        return value, MOST_HALVINGS

    # -- as a Trainer --------------------------------------------------------------------------------------------------

    def watch(self, query: Query, optimizer: str = "m_optimizer") -> None:
        """Refuses a wrong optimiser of the E-step, and an M-step's that holds only a part of what is learned.

        The M-step's optimiser must hold all trainable parameters of an adapter of the model or none of them, and all of
        Pyro's parameters in the model.

        :param query: model, guide and the arguments that they are called with.
        :param optimizer: what error messages call the M-step's optimiser.
        :raises ValueError: with the names of the parameters.
        """
        with torch.no_grad(), torch.random.fork_rng():
            self._sketch(query)  # refuses parameters that both would change
        if isinstance(self.e_step, Trainer):
            self.e_step.watch(query, "e_step: its optimizer")
        theta = _ids(self.parameters)
        q, p = query.sketches
        lms = {id(lm): lm for lm in programs.language_models(p).values()}
        views = [lm.trainable_parameters() for lm in lms.values()]
        begun = [x for own in views if theta & _ids(own) for x in own]
        shared = set() if query.guide == query.model else _ids(trainable_of(q))
        stored = [x for x in trainable_of(p) if id(x) in _ids(programs.stored()) - shared]
        Owners.of(query).check_model([*begun, *stored], self.parameters, optimizer)

    @property
    def optimizers(self) -> list[Optimizer]:
        """The M-step's optimiser, and those of a training E-step."""
        return [self.optimizer, *(self.e_step.optimizers if isinstance(self.e_step, Trainer) else [])]

    @property
    def density(self) -> Program:
        """The program whose density approximates the posterior, where the E-step has one."""
        found: Program = self.e_step.density
        return found

    def arguments(self, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        return self.e_step.arguments(batch, kwargs) if isinstance(self.e_step, Trainer) else batch

    def fit(self, batches: Any, steps: int, *, warmup: int = 0, **kwargs: Any) -> list[dict[str, float]]:
        """Makes ``steps`` rounds, each on one batch.

        :param batches: as in `Trainer.fit`.
        :param steps: how many rounds in all.
        :param warmup: as in `Trainer.fit`; here 0 by default.
        :param kwargs: the other arguments of `Trainer.fit`.
        :returns: the metrics of every round.
        """
        return super().fit(batches, steps, warmup=warmup, **kwargs)

    def on(self, model: Program, guide: Program | None = None) -> VariationalEM:
        other = super().on(model, guide)
        if self.guide is self.model:  # there is no guide
            other.guide = model
        other.e_step = on(self.e_step, model, guide)
        return other

    def sized(self, num_particles: int) -> VariationalEM:
        other = copy.copy(self)
        other.e_step = sized(self.e_step, num_particles)
        return other

    def run(self, *args: Any, num_particles: int | None = None, **kwargs: Any) -> Posterior:
        """The E-step's posterior given these arguments, at the model's present parameters.

        :param args: the arguments of model and guide.
        :param num_particles: the number of particles; None: the E-step's own.
        :param kwargs: keyword arguments of model and guide.
        :returns: a `Posterior`.
        """
        draws = {} if num_particles is None else {"num_particles": num_particles}
        posterior: Posterior = self.e_step.run(*args, **draws, **kwargs)
        return posterior

    @property
    def accumulates(self) -> bool:
        """False: `fit` does not accumulate batches, because a round makes several updates."""
        return False

    def evaluate(
        self, *args: Any, num_particles: int = 64, exact_sample: Any = None, **kwargs: Any
    ) -> dict[str, float]:
        """The log evidence of these observations; for a training E-step also the figures of `Trainer.evaluate`.

        :param args: the arguments of model and guide.
        :param num_particles: draws of a trained guide.
        :param exact_sample: as in `Trainer.evaluate`.
        :param kwargs: keyword arguments of model and guide.
        :returns: ``held_out_log_evidence`` in nats, summed over the observations, and the metrics of
            `Trainer.evaluate`.
        """
        if not isinstance(self.e_step, Trainer):
            return {"held_out_log_evidence": distributed.total(self.run(*args, **kwargs).log_evidence.sum().item())}
        found = distributed.total(self.run(*args, num_particles=num_particles, **kwargs).log_evidence.sum().item())
        options: dict[str, Any] = {"num_particles": num_particles, "exact_sample": exact_sample}
        return {"held_out_log_evidence": found, **super().evaluate(*args, **options, **kwargs)}

    def judge(self, *args: Any) -> dict[str, float]:
        return super().judge(*args) if isinstance(self.e_step, Trainer) else {}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.e_step.state() if isinstance(self.e_step, Trainer) else ({}, {})

    def restore(self, tensors: dict[str, Tensor], own: dict[str, Any]) -> None:
        if isinstance(self.e_step, Trainer):
            self.e_step.restore(tensors, own)

    def _tasks(self, batches: Any) -> list[Task]:
        if isinstance(self.e_step, Trainer):
            self.e_step._tasks(batches)  # its replay buffer needs to know them
        return super()._tasks(batches)


def _pinned(program: Program, subsamples: Mapping[str, Tensor]) -> Program:
    """The program with these subsamples of its plates."""

    def pinned(*args: Any, **kwargs: Any) -> Any:
        with Substitute(subsamples):
            return program(*args, **kwargs)

    return pinned


def _ids(parameters: list[Tensor]) -> set[int]:
    return {id(p) for p in parameters}


def _check(name: str, algorithm: Any, model: Program) -> None:
    if not callable(getattr(algorithm, "run", None)):
        raise ValueError(
            f"{name}: expected a Trainer or an algorithm with .run(*args) -> Posterior, got {type(algorithm).__name__}"
        )
    if getattr(algorithm, "model", None) != model:
        raise ValueError(f"{name}: it was built with another model")
