"""`compare`: several algorithms on one model, compared with the truth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import pyro
import torch
from torch import Tensor

from ...engine.prompts import prompts
from ...progress import progress as shown_progress
from ..core.arguments import at_least, is_program
from ..core.programs import Program
from ..core.query import Query
from ..posterior.algorithm import posterior_of, sized
from ..posterior.posterior import Posterior
from ..samplers.smc.smc import Sequential
from .comparison import Comparison, Point, Row, averaged
from .quality import density_quality, draw_quality, modes_drawn

MOST_PARTICLES = 1_000_000
PILOTS = 32, 128  # particles


class Answers(Protocol):
    """What `compare` needs from an algorithm."""

    def run(self, *args: Any, **kwargs: Any) -> Posterior: ...


Factory: TypeAlias = Callable[[int], Answers]


def compare(
    model: Program,
    algorithms: Mapping[str, Answers | Factory],
    *args: Any,
    exact: Any = None,
    exact_tokens: float | None = None,
    guides: Mapping[str, Program] | None = None,
    repetitions: int = 1,
    seeds: int | Sequence[int] | None = None,
    budgets: Sequence[float] = (),
    unit: str = "tokens",
    progress: bool | Callable[[str], None] | None = None,
    **kwargs: Any,
) -> Comparison:
    r"""Runs several algorithms on one model, and compares their posteriors with the exact one, and their cost.

    For each algorithm the result has the total variation of its draws to the exact posterior,
    :math:`TV = \frac12 \sum_z |p(z) - \hat p(z)|`, the log evidence and its error in nats, ESS / N and k-hat, the total
    variation and KL divergences of a guide's density, and tokens through the network per query, where a query is the
    posterior of one plate element.

    :param model: a Pyro program.
    :param algorithms: algorithms by name, objects with ``run(*args) -> Posterior``; or functions of the seed that build
        (and train) one, called once per seed.
    :param args: the arguments of ``run``, and ``kwargs``.
    :param kwargs: keyword arguments of ``run``.
    :param exact: the exact `Posterior`, or an `Enumeration` that computes it; None: figures that need it are left out.
    :param exact_tokens: the tokens that a given exact posterior cost.
    :param guides: programs whose *density* is compared, by the name of their algorithm.  By default it is the
        algorithm's own ``density``, which importance sampling and trained guides have, and SMC does not.
    :param repetitions: runs of each algorithm per seed, to average over.
    :param seeds: the number of seeds (0, 1, ...), or a list of seeds; figures are means over seeds with their standard
        deviation.  None: one run with the caller's random state.
    :param budgets: costs per query, in ``unit``.  Each algorithm also runs with as many particles as each budget buys,
        which gives curves of quality against cost.
    :param unit: the unit of the budgets, "tokens" (through the network) or "seconds".
    :param progress: True shows how many runs are done, their rate and the time left, on standard error; a function is
        called with the name of each algorithm before it runs; None shows nothing.
    :returns: a `Comparison`.
    :raises ValueError: for no algorithms, seeds or repetitions, an unknown unit, a budget that is not positive, and an
        ``exact`` that is no posterior.

    Example::

        samplers = {"prior": Importance(model, num_particles=64), "SMC": SMC(model, num_particles=64)}
        compare(model, samplers, x, y, exact=Enumeration(model)).print()
    """
    is_program(model=model)
    if unit not in ("tokens", "seconds"):
        raise ValueError(f"unit: expected 'tokens' or 'seconds', got {unit!r}")
    if not isinstance(algorithms, Mapping) or not all(hasattr(a, "run") or callable(a) for a in algorithms.values()):
        raise ValueError(f"algorithms: expected a dict of algorithms, or of functions of the seed, got {algorithms!r}")
    if not algorithms:
        raise ValueError("algorithms: expected at least one, got none")
    if exact is not None and not isinstance(exact, Posterior) and not hasattr(exact, "run"):
        raise ValueError(f"exact: expected a Posterior or an Enumeration, got {exact!r}")
    if unknown := set(guides or ()) - set(algorithms):
        raise ValueError(f"guides: {sorted(unknown)} are none of the algorithms {list(algorithms)}")
    if not isinstance(budgets, Sequence) or not all(b > 0 for b in budgets):
        raise ValueError(f"budgets: expected a list of positive numbers, got {budgets!r}")
    chosen: list[int | None] = [None] if seeds is None else list(range(seeds) if isinstance(seeds, int) else seeds)
    at_least(1, repetitions=repetitions)
    if not chosen:
        raise ValueError(f"seeds: expected at least one, got {seeds}")
    meter = Meter(Query(model, None, args, kwargs).networks)
    truth: Posterior | None = exact if isinstance(exact, Posterior) or exact is None else None
    if exact is not None and truth is None:
        _tell(progress, "enumeration")
        truth, exact_tokens, _ = meter(lambda: exact.run(*args, **kwargs))
    rows: list[Row] = []
    curves: list[Point] = []
    runs = len(algorithms) * len(chosen) * (repetitions + len(budgets))
    with shown_progress("Comparing", runs, unit="run", shown=progress is True) as bar:
        for name, given in algorithms.items():
            _tell(progress, name)
            told = partial(bar.update, f"{name}; {_figure(rows[-1])}" if rows else name)
            query = Query(model, (guides or {}).get(name), args, kwargs)
            of_seeds, points = [], []
            evidence = []
            for seed in chosen:
                if seed is not None:
                    pyro.set_rng_seed(seed)
                algorithm: Any = given if hasattr(given, "run") else given(seed or 0)
                if (guide := getattr(algorithm, "guide", None)) is not None:  # it may have a network of its own
                    meter.watch(Query(guide, None, args, kwargs).networks)
                row, estimates = _measure(name, algorithm, meter, repetitions, truth, query, told)
                of_seeds.append(row)
                evidence += estimates
                points.append([_point(name, algorithm, meter, b, unit, truth, query, told) for b in budgets])
            row = averaged(of_seeds)
            if len(evidence) > 1:
                row.log_evidence_sd = _mean(torch.stack(evidence).std(0))
            rows.append(row)
            curves += [_averaged_point(list(same)) for same in zip(*points, strict=True)]
    if truth is not None:
        exact_tokens = None if exact_tokens is None else exact_tokens / truth.log_evidence.numel()
        for n in sorted({row.num_particles for row in rows if row.num_particles}):
            draws = [truth.resample(n, "multinomial") for _ in range(8)]
            tv, modes = (_mean(torch.stack([f(truth, d) for d in draws])) for f in (draw_quality, modes_drawn))
            name = f"exact posterior, {n} draws"
            rows.append(Row(name, num_particles=n, draws_tv=tv, draws_modes=modes, reference=True))
        log_z = _mean(truth.log_evidence)
        exactly: dict[str, Any] = {"draws_tv": 0.0, "log_evidence": log_z, "log_evidence_error": 0.0}
        rows.append(Row("enumeration", query_tokens=exact_tokens, reference=True, **exactly))
        for row in rows:
            if row.training_tokens and exact_tokens and row.query_tokens and exact_tokens > row.query_tokens:
                row.break_even = row.training_tokens / (exact_tokens - row.query_tokens)
    result = Comparison(rows, unexplored=_unexplored(truth), curves=curves, unit=unit)
    for row in rows:
        if row.suspect:
            result.notes.append(
                f"{row.name}: suspect in {row.suspect:.0%} of its runs, which depend on too few particles; "
                "ESS/N and k-hat may not show it."
            )
    if truth is None:
        result.notes.append(
            "There is no exact posterior here: the evidence is an estimate; ESS and k-hat show its quality."
        )
    elif result.unexplored is not None:
        result.notes.append(f"Prior mass left out of the enumeration: {result.unexplored:.2g} on average.")
    return result


class Meter:
    """Runs a function and returns its result with its cost in tokens and seconds, reading the prompts included.

    ``last`` is the cost of the last run.
    """

    def __init__(self, networks: list[Any]):
        self.networks: dict[int, Any] = {}
        self.last = 0, 0.0
        self.watch(networks)

    def watch(self, networks: list[Any]) -> None:
        """Counts the tokens of these networks too."""
        self.networks |= {id(n): n for n in networks}

    @property
    def tokens(self) -> int:
        return sum(n.tokens_scored for n in self.networks.values())

    def __call__(self, run: Callable[[], Any]) -> tuple[Any, int, float]:
        for network in self.networks.values():
            prompts(network).forget()
        tokens, start = self.tokens, time.perf_counter()
        answer = run()
        self.last = self.tokens - tokens, time.perf_counter() - start
        return answer, *self.last


def _measure(
    name: str,
    algorithm: Answers,
    meter: Meter,
    repetitions: int,
    truth: Posterior | None,
    query: Query,
    told: Callable[[], None],
) -> tuple[Row, list[Tensor]]:
    """The figures of one seed, and its estimates of log Z, (*plates) each; ``told`` is called after each run."""

    def answer() -> Posterior:
        found = posterior_of(algorithm, query.args, query.kwargs)
        told()
        return found

    answers, tokens, seconds = meter(lambda: [answer() for _ in range(repetitions)])
    queries = repetitions * answers[0].log_evidence.numel()
    row = Row(name, num_particles=answers[0].num_particles)
    row.query_tokens, row.seconds = tokens / queries, seconds / queries
    row.training_tokens = getattr(algorithm, "training_tokens", None) or None
    evidence = [a.log_evidence for a in answers]
    row.log_evidence = _mean(torch.stack(evidence))
    if row.log_evidence is not None:  # without evidence, the weights are no importance weights
        row.ess = _mean(torch.stack([a.ess / a.num_particles for a in answers]))
        khat = torch.stack([a.khat for a in answers])
        row.khat = _mean(khat[khat.isfinite()])
        ways = [a for a in answers if isinstance(a, Sequential)]
        if ways:
            row.min_ess = _mean(torch.stack([a.min_ess / a.num_particles for a in ways]))
            row.survival = _mean(torch.stack([a.survival for a in ways]))
            row.suspect = _mean(torch.stack([a.suspect for a in ways]))
    if truth is not None:
        row.log_evidence_error = _mean((torch.stack(evidence) - truth.log_evidence).abs())
        alive = [a for a in answers if bool((a.log_weights.amax(0) > -torch.inf).all())]
        if alive:
            row.draws_tv = _mean(torch.stack([draw_quality(truth, a) for a in alive]))
            row.draws_modes = _mean(torch.stack([modes_drawn(truth, a) for a in alive]))
        guide = query.guide or getattr(algorithm, "density", None)
        if guide is not None:
            quality = density_quality(truth, guide, query.args, dict(query.kwargs))
            row.density_tv, row.forward_kl, row.reverse_kl, row.density_modes = (_mean(x) for x in quality[:4])
            row.density_outside, row.reverse_kl_inside = _mean(quality.outside), _mean(quality.reverse_kl_inside)
    return row, [] if row.log_evidence is None else evidence


def particles_within(
    algorithm: Answers,
    budget: float,
    meter: Meter,
    unit: str = "tokens",
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    pilots: tuple[int, int] = PILOTS,
    checks: int = 0,
) -> int:
    """The number of particles whose cost per query is about ``budget``.

    A line through the costs of two small runs, with ``pilots`` particles, gives a first number.  Equal texts are read
    once, so later particles cost less than the first.  So up to ``checks`` further runs correct a number whose cost is
    off by 5% or more; the result is the number, of all that were run, whose cost is nearest to the budget.
    """

    def cost(n: int) -> float:
        answer, tokens, seconds = meter(partial(sized(algorithm, n).run, *args, **(kwargs or {})))
        return (tokens if unit == "tokens" else seconds) / answer.log_evidence.numel()

    (few, less), (n, spent) = ((k, cost(k)) for k in pilots)
    tried = {few: less, n: spent}
    for _ in range(max(1, checks)):
        each = (spent - less) / (n - few) if n != few else 0.0
        each = each if each > 0 else spent / n
        few, less, n = n, spent, max(1, min(MOST_PARTICLES, round(n + (budget - spent) / each)))
        if not checks:
            return n
        below = max((k for k in tried if tried[k] <= budget), default=0)
        above = min((k for k in tried if tried[k] > budget), default=MOST_PARTICLES + 1)
        if not below < n < above and above - below > 1:
            n = (below + above) // 2  # the line leads outside the known interval
        if n in tried:
            break
        tried[n] = spent = cost(n)
        if abs(spent / budget - 1) < 0.05:
            break
    return min(tried, key=lambda k: abs(tried[k] - budget))


def _point(
    name: str,
    algorithm: Answers,
    meter: Meter,
    budget: float,
    unit: str,
    truth: Posterior | None,
    query: Query,
    told: Callable[[], None],
) -> Point:
    """The quality of the algorithm with as many particles as the budget buys."""
    n = particles_within(algorithm, budget, meter, unit, query.args, dict(query.kwargs), checks=3)
    answer, tokens, seconds = meter(partial(sized(algorithm, n).run, *query.args, **query.kwargs))
    queries = answer.log_evidence.numel()
    point = Point(name, budget, n, tokens / queries, seconds / queries, None, None)
    if truth is not None:
        point.log_evidence_error = _mean((answer.log_evidence - truth.log_evidence).abs())
        if bool((answer.log_weights.amax(0) > -torch.inf).all()):
            point.draws_tv = _mean(draw_quality(truth, answer))
    told()
    return point


def _averaged_point(points: list[Point]) -> Point:
    first = points[0]
    means = {}
    for key in ("query_tokens", "seconds", "draws_tv", "log_evidence_error"):
        values = [getattr(p, key) for p in points if getattr(p, key) is not None]
        means[key] = sum(values) / len(values) if values else None
    n = round(sum(p.num_particles for p in points) / len(points))
    return Point(first.name, first.budget, n, **means)  # type: ignore[arg-type]


def _tell(progress: bool | Callable[[str], None] | None, what: str) -> None:
    if callable(progress):
        progress(what)


def _figure(row: Row) -> str:
    """The line of progress of an algorithm that is done: the distance of its draws, or its log evidence."""
    for name, value in (("TV", row.draws_tv), ("log Z", row.log_evidence)):
        if value is not None:
            return f"{row.name}: {name} {value:.3f}"
    return f"{row.name}: done"


def _mean(x: Tensor) -> float | None:
    """The mean of all values that are not NaN; None if there are none.  (-inf, an evidence of zero, counts.)"""
    x = x.double()
    x = x[~x.isnan()]
    return float(x.mean()) if x.numel() else None


def _unexplored(truth: Posterior | None) -> float | None:
    left = getattr(truth, "unexplored", None)
    return None if left is None else float(torch.as_tensor(left).double().mean())
