"""`diagnose`: whether an algorithm's posteriors can be trusted where the truth is not known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ... import markup
from ...files import save_figure
from ..core.arguments import at_least, is_integer
from ..core.query import Query
from ..posterior.algorithm import posterior_of, query_of
from ..posterior.log_weights import smallest_sample
from ..posterior.posterior import Posterior
from ..samplers.smc.smc import Sequential
from ..training.loop.verdict import MOST_LACKING, MOST_MISSED, judge
from . import drift, pools
from .calibration import Calibration, NotChecked, Simulate, Statistic, calibrate
from .evidence import judge_evidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVEL = 0.02  # how often calibration, all statistics together, rejects a correct algorithm
WORST, ON_AVERAGE = 5, 10  # the least effective sample size of the worst run, and of all runs on average
ENOUGH = 20  # fewer data sets (plate elements count singly) cannot show that an algorithm is calibrated


@dataclass
class Finding:
    """One line of a `Diagnosis`: a figure, its meaning, and a verdict.

    :param name: what was looked at, for instance "ESS / N", "Pareto k-hat" or "SBC: length of z".
    :param figure: the figure, formatted.
    :param meaning: what it means.
    :param suspect: whether it shows a fault; None: not judged.
    :param value: the figure as a number, if there is one.
    :param checked: false if it could not be checked but should have been.

    Example::

        diagnosis = diagnose(Importance(model, guide), x, y, simulations=0)
        finding = diagnosis["ESS / N"]
        finding.value, finding.meaning, finding.suspect
    """

    name: str
    figure: str
    meaning: str
    suspect: bool | None
    value: float | None = None
    checked: bool = True


@dataclass(repr=False)
class Diagnosis:
    """The result of `diagnose`.  ``diagnosis["ESS / N"]`` is the finding of that name.

    :param findings: everything that was looked at, each with its verdict.
    :param notes: remarks.
    :param posterior: the posterior of the first run.
    :param calibration: the figures of simulation-based calibration.
    :param drifts: how the guide's texts differ from the posterior's.

    Example::

        diagnosis = diagnose(Importance(model, guide), x, y, simulations=0)
        diagnosis.print()
        if not diagnosis.ok:
            print([f.name for f in diagnosis.findings if f.suspect or not f.checked])
    """

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    posterior: Posterior | None = field(default=None, repr=False)
    calibration: Calibration = field(default_factory=Calibration, repr=False)
    drifts: list[drift.Drift] = field(default_factory=list, repr=False)

    @property
    def ok(self) -> bool:
        """Whether nothing is suspect, and everything that was asked for was checked."""
        return not any(f.suspect or not f.checked for f in self.findings)

    def __getitem__(self, name: str) -> Finding:
        return next(f for f in self.findings if f.name == name)

    def __repr__(self) -> str:
        """One line: what is suspect, and what could not be checked."""
        return f"Diagnosis({'; '.join(self._verdicts())})"

    def _repr_html_(self) -> str:
        rows = []
        for f in self.findings:
            verdict = "suspect" if f.suspect else "not checked" if not f.checked else "" if f.suspect is None else "ok"
            strong = markup.strong(verdict) if verdict in ("suspect", "not checked") else verdict
            rows.append([f.name, f.figure, strong, f.meaning])
        table = markup.table(["", "figure", "verdict", "what it means"], rows, left=(0, 2, 3))
        return markup.page("Diagnosis", table, *map(markup.note, self.notes), *self._verdicts())

    def _verdicts(self) -> list[str]:
        """What is suspect and what was not checked, in one sentence each."""
        suspects = "; ".join(f.name for f in self.findings if f.suspect)
        unchecked = "; ".join(f.name for f in self.findings if not f.checked)
        found = [f"Suspect: {suspects}" if suspects else "Nothing suspect."]
        return found + ([f"Not checked: {unchecked}"] if unchecked else [])

    def print(self, console: Console | None = None) -> None:
        """Prints the findings as a table.

        :param console: a `rich.console.Console`; None: standard output.
        """
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for title in ("", "figure", "verdict"):
            table.add_column(title, no_wrap=True)
        table.add_column("what it means")
        for f in self.findings:
            verdict = "[bold red]suspect[/]" if f.suspect else "" if f.suspect is None else "[green]ok[/]"
            verdict = verdict if f.checked or f.suspect else "[yellow]not checked[/]"
            name, figure, meaning = (part.replace("[", r"\[") for part in (f.name, f.figure, f.meaning))
            table.add_row(name, figure, verdict, meaning)
        console = console or Console()
        console.print(table)
        for note in self.notes:
            console.print(note, highlight=False, markup=False)
        for line in self._verdicts():
            console.print(line, markup=False)

    def to_json(self) -> dict[str, Any]:
        """A dict for JSON: findings, notes and the figures of the plot; numbers that are not finite are None."""
        return {
            "ok": self.ok,
            "findings": [_finite(asdict(f)) for f in self.findings],
            "notes": self.notes,
            "positions": {name: _numbers(x) for name, x in self.calibration.positions.items()},
            "log_evidence_bounds": [_numbers(self.calibration.lowers), _numbers(self.calibration.uppers)],
        }

    def plot(self, path: str | Path | None = None) -> list[Axes]:
        """Draws calibration, evidence bounds, weights, and the lengths of the guide's and posterior's texts.

        :param path: a PNG to write; None: a notebook shows the figure.
        :returns: the axes of the panels.
        """
        from .plot import draw

        figure = draw(self, path)
        if path is not None:
            save_figure(figure, path)
        return list(figure.axes)


def diagnose(
    algorithm: Any,
    *args: Any,
    seed: int = 0,
    repetitions: int = 5,
    simulations: int = 100,
    num_particles: int = 64,
    simulate: Simulate | None = None,
    statistics: Mapping[str, Statistic] | None = None,
    **kwargs: Any,
) -> Diagnosis:
    r"""Judges whether an algorithm's posteriors can be trusted for these arguments, and for data like them.

    It needs no exact posterior.  It looks at:

    - The weights: the ESS and Pareto k-hat of the worst of ``repetitions`` runs, and the spread of the evidence over
      the runs; for `SMC`, whether at least half of the runs are `Sequential.suspect`.
    - Simulation-based calibration on ``simulations`` data sets drawn from the model.  The true latents must look like
      one of the posterior's draws, by these statistics: each text's length and log p, each number, log p(observed)
      given the latents, log p(z, observed), how often texts have each token, and how many draws are equal.  All
      statistics together make one test.
    - Bounds of the evidence on the same data,
      :math:`E[\log \hat Z] \le \log Z \le E[\log \frac1N (w(z^*) + \sum w_n)]`, with the true latents z* among the
      N = ``num_particles`` of the upper bound.
    - The texts of a *trained* guide: whether their lengths and stops differ from the posterior's, which share of the
      evidence it misses, and which share of the posterior has a too low density.

    What cannot be checked is a finding too, and `Diagnosis.ok` is then false.  The cost is ``repetitions +
    simulations`` runs; each simulation also scores at most 128 draws and ``num_particles`` others.  Calibration finds a
    correct algorithm with exact draws suspect in 2 of 100 seeds.

    :param algorithm: any object with ``run(*args) -> Posterior``; with ``model`` and ``guide`` more can be checked.
    :param args: the arguments of ``run``, and ``kwargs``.
    :param kwargs: keyword arguments of ``run``.
    :param seed: of all random numbers; the caller's generator is not changed.
    :param repetitions: runs on the given arguments.
    :param simulations: simulated data sets; 0: no calibration.
    :param num_particles: draws of the proposal for the bounds of each simulated data set.
    :param simulate: a function ``(args, observed) -> args`` that puts simulated observations, a dict by site, into the
        arguments.  It is needed if there is a guide, because a guide reads the observations from its arguments.
    :param statistics: further statistics by name, functions of the latents ``{site: (n, *plates, ...)}`` that return
        (n, *plates).
    :returns: a `Diagnosis`.
    :raises ValueError: for an algorithm without ``run``, and for counts that are not positive.

    Source: Talts et al. 2018 and Modrák et al. 2023 (calibration); Grosse et al. 2015 (bounds); Vehtari et al. 2024
    (k-hat).

    Example::

        diagnosis = diagnose(Importance(model, guide), x, y, simulate=lambda args, observed: (args[0], observed["y"]))
        diagnosis.print()
        diagnosis.plot("diagnosis.png")
    """
    is_integer(seed=seed)
    at_least(1, repetitions=repetitions, num_particles=num_particles)
    at_least(0, simulations=simulations)
    if not hasattr(algorithm, "run"):
        raise ValueError(f"algorithm: {type(algorithm).__name__} has no run(*args)")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        answers = [posterior_of(algorithm, args, kwargs) for _ in range(repetitions)]
        result = Diagnosis(posterior=answers[0])
        _judge_weights(result, answers)
        if not hasattr(algorithm, "model"):
            result.findings.append(_missing("the algorithm has no model attribute"))
            return result
        query = query_of(algorithm, args, kwargs, answers[0].sites.plates.nesting)
        options: dict[str, Any] = {"num_particles": num_particles, "to_args": simulate, "statistics": statistics}
        try:
            result.calibration = calibrate(algorithm, query, simulations=simulations, **options)
        except NotChecked as error:
            if simulations:
                result.findings.append(_missing(str(error)))
        _judge_calibration(result)
        if drift.is_trained(query) and bool((answers[0].log_evidence != -torch.inf).all()):
            result.drifts = drift.drifts(query, answers[0])
            for d in result.drifts:
                result.findings.append(Finding(d.name, f"{d.proposed:.3g} -> {d.posterior:.3g}", d.meaning, d.suspect))
            if not kwargs:
                result.findings += _judge_guide(query)
    return result


def _judge_guide(query: Query) -> list[Finding]:
    """What a trained guide misses, found with the model's own draws, because its own draws do not show it."""
    found = judge(query, thorough=True)
    rows = {
        "held_out_missed": (
            "guide misses",
            MOST_MISSED,
            "of the evidence is found by the model's own draws, but not by the guide's",
        ),
        "held_out_lacking": ("guide lacks", MOST_LACKING, "of the posterior is where the guide's density is too low"),
    }
    few = "too few of the model's own draws are effective to say"
    return [
        Finding(name, f"{found[key]:.0%}", meaning, found[key] > most, found[key])
        if key in found
        else Finding(name, "-", few, None, checked=False)
        for key, (name, most, meaning) in rows.items()
    ]


def _missing(why: str) -> Finding:
    return Finding("calibration", "-", why, None, checked=False)


def _judge_weights(result: Diagnosis, answers: list[Posterior]) -> None:
    """Adds the findings of ESS, k-hat and the spread of the evidence; for an enumeration, the mass left out."""
    first = answers[0]
    if hasattr(first, "unexplored"):
        left = float(first.unexplored.max())
        meaning = "prior mass that the enumeration left out"
        result.findings.append(Finding("unexplored", f"{left:.2g}", meaning, left > 0.01, left))
        return
    n = first.num_particles
    ess = torch.stack([a.ess for a in answers])
    if _never_moved(answers) or bool(ess.isnan().any()):
        result.findings.append(_undefined_ess(answers))
    else:
        least, mean = float(ess.min()), float(ess.mean(0).min())
        meaning = f"at worst {n} particles are worth {least:.1f} independent draws"
        suspect = least < min(WORST, n / 2) or mean < min(ON_AVERAGE, n / 2)
        result.findings.append(Finding("ESS / N", f"{least / n:.3f}", meaning, suspect, least / n))
    result.findings += _judge_ways([a for a in answers if isinstance(a, Sequential)])
    evidence = torch.stack([a.log_evidence for a in answers]).double()  # (repetition, *plates)
    if bool(evidence.isnan().any()):  # the weights are no importance weights
        return
    # One k-hat has a standard deviation of about 0.2: take the median of the runs, the upper quartile of the plates.
    khats = torch.stack([a.khat for a in answers]).nanmedian(0).values.flatten()
    khats = khats[~khats.isnan()]
    if len(khats):
        k = float(khats.sort().values[(3 * len(khats)) // 4 if len(khats) > 1 else 0])
        if k < 0.5:
            meaning = "the weights have a finite variance" if math.isfinite(k) else "the largest weights are equal"
        elif k < 1:
            meaning = f"heavy tail: an average needs some {smallest_sample(k):,.0f} particles"
        else:
            meaning = "heavy tail: no number of particles is enough"
        if k >= 0.7:
            meaning += "; the proposal misses posterior mass"
        result.findings.append(Finding("Pareto k-hat", f"{k:.2f}", meaning, k >= 0.7, k))
    else:
        result.findings.append(Finding("Pareto k-hat", "-", "not defined: too few distinct weights", None))
    low, spread = evidence.mean(0), evidence.std(0).amax() if len(evidence) > 1 else torch.tensor(torch.nan)
    result.findings.append(
        Finding(
            "log evidence",
            f"{float(low.mean()):.3f} +- {float(spread):.3f}",
            "nats; its spread over runs is small" if float(spread) <= 1 else "nats; the runs disagree",
            None if bool(spread.isnan()) and bool(low.isfinite().all()) else not float(spread) <= 1.0,
            float(low.mean()),
        )
    )


def _judge_ways(answers: list[Sequential]) -> list[Finding]:
    """The finding of SMC's runs before their end, which the final weights do not show.

    Single runs of a good algorithm may be `Sequential.suspect`: at least half of the runs must be.
    """
    if not answers:
        return []
    n = answers[0].num_particles
    least, survive = (float(torch.stack([getattr(a, x) for a in answers]).min()) for x in ("min_ess", "survival"))
    share = float(torch.stack([a.suspect for a in answers]).double().mean(0).max())
    meaning = f"at worst an ESS of {least:.1f} of {n} particles; {survive:.1%} of the first have descendants at the end"
    return [Finding("SMC during the run", f"{share:.0%} of runs", meaning, share >= 0.5, share)]


def _never_moved(answers: list[Posterior]) -> bool:
    """Whether all Markov chains stayed where they started, in which case their ESS means nothing."""
    accepted = [float(x.max()) for a in answers for x in getattr(a, "acceptance", {}).values()]
    return bool(accepted) and max(accepted) == 0


def _undefined_ess(answers: list[Posterior]) -> Finding:
    """The finding of Markov chains without an effective sample size: too short, or without an accepted move."""
    if _never_moved(answers):
        return Finding("ESS / N", "-", "no chain ever moved", True)
    chains = getattr(answers[0], "num_chains", None)
    short = chains is not None and answers[0].num_particles < 4 * chains
    why = "fewer than 4 draws per chain" if short else "all draws are equal"
    return Finding("ESS / N", "-", f"not defined: {why}", None, checked=not short)


def _judge_calibration(result: Diagnosis) -> None:
    """Adds the findings of the simulated data, and the error that ended the simulations, if there was one."""
    found = result.calibration
    if found.error is not None:
        said = " ".join(f"{type(found.error).__name__}: {found.error}".split())
        meaning = f"failed on simulated data set {len(found.pools) + 1}: {said}"
        result.findings.append(Finding("calibration", "-", meaning, True, checked=False))
    if not found.pools:
        return
    result.findings += [Finding(*row) for row in judge_evidence(found)]
    lost = int((found.lowers == -torch.inf).sum())
    if lost:
        meaning = "simulated data sets for which no possible value was found"
        result.findings.append(Finding("zero evidence", f"{lost}", meaning, True, lost))
    few = len(found.lowers) < ENOUGH
    for name, verdict in pools.judge(found.pools).items():
        suspect = None if few and verdict.p >= LEVEL else verdict.p < LEVEL
        meaning = "too few data sets to judge" if suspect is None else "as expected"
        meaning = _meaning(verdict, name, result.posterior) if suspect else meaning
        row = Finding(f"SBC: {name}", f"p = {verdict.p:.2g}", meaning, suspect, verdict.p, checked=suspect is not None)
        result.findings.append(row)


def _meaning(verdict: pools.Verdict, name: str, posterior: Posterior | None) -> str:
    """How the truth differs from the draws, in words."""
    less, more = verdict.z < 0, verdict.z > 0
    if verdict.function == "rank":
        return f"the posterior's values are too {'high' if less else 'low'}"
    if verdict.function == "spread":
        return f"the posterior is too {'narrow' if more else 'wide'}"
    if verdict.function == "share":
        return f"too {'many' if less else 'few'} draws are equal"
    assert posterior is not None
    token = int(verdict.function)
    string = posterior.sites.decoders[name.removeprefix("tokens of ")](torch.tensor([token]))
    return f"the posterior has the token {token}, {string!r}, too {'often' if less else 'seldom'}"


def _numbers(x: Tensor) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in x.tolist()]


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
