"""`diagnose`: one call that says whether an algorithm's answers can be trusted, where the truth is not known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..arguments import at_least, is_integer
from ..files import save_figure
from ..posterior.log_weights import smallest_sample
from ..posterior.posterior import Posterior
from . import drift
from .calibration import Calibration, Simulate, Statistic, calibrate, uniformity

LEVEL = 0.01  # how often calibration, all statistics together, finds fault with a correct algorithm


@dataclass
class Finding:
    """A figure, what it means, and whether it is suspect (None: not judged)."""

    name: str
    figure: str
    meaning: str
    suspect: bool | None
    value: float | None = None


@dataclass
class Diagnosis:
    """What `diagnose` found; `print` and `plot` it, or take its `to_json`."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    posterior: Posterior | None = field(default=None, repr=False)
    calibration: Calibration = field(default_factory=Calibration, repr=False)
    drifts: list[drift.Drift] = field(default_factory=list, repr=False)

    @property
    def ok(self) -> bool:
        """Nothing is suspect."""
        return not any(f.suspect for f in self.findings)

    def __getitem__(self, name: str) -> Finding:
        return next(f for f in self.findings if f.name == name)

    def print(self, console: Console | None = None) -> None:
        """Print the verdict as a table."""
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for title in ("", "figure", "verdict"):
            table.add_column(title, no_wrap=True)
        table.add_column("what it means")
        for f in self.findings:
            verdict = "" if f.suspect is None else "[bold red]suspect[/]" if f.suspect else "[green]ok[/]"
            name, figure, meaning = (part.replace("[", r"\[") for part in (f.name, f.figure, f.meaning))
            table.add_row(name, figure, verdict, meaning)
        console = console or Console()
        console.print(table)
        for note in self.notes:
            console.print(note, highlight=False, markup=False)
        suspects = [f.name for f in self.findings if f.suspect]
        console.print("Suspect: " + "; ".join(suspects) if suspects else "Nothing suspect.", markup=False)

    def to_json(self) -> dict[str, Any]:
        """Findings, notes and the figures behind the plot; numbers that are not finite are None."""
        return {
            "ok": self.ok,
            "findings": [_finite(asdict(f)) for f in self.findings],
            "notes": self.notes,
            "positions": {name: _numbers(x) for name, x in self.calibration.positions.items()},
            "log_evidence_bounds": [_numbers(self.calibration.lowers), _numbers(self.calibration.uppers)],
        }

    def plot(self, path: str | Path) -> None:
        """Write a PNG: calibration, evidence bounds, weights, and how the guide's texts drift from the posterior's."""
        from .plot import draw

        save_figure(draw(self), path)


def diagnose(
    algorithm: Any,
    *args: Any,
    seed: int = 0,
    repetitions: int = 5,
    simulations: int = 50,
    num_particles: int = 64,
    simulate: Simulate | None = None,
    statistics: Mapping[str, Statistic] | None = None,
    **kwargs: Any,
) -> Diagnosis:
    r"""Say whether an algorithm's answers to these arguments, and to data like them, can be trusted.

    - ESS and Pareto k-hat of the weights, and the spread of the evidence over ``repetitions`` runs.
    - Simulation-based calibration on ``simulations`` data sets drawn from the model: the position of the true latents
      among the posterior's draws must be uniform.  Statistics: each text's length and log p, each number, and
      log p(observed) given the latents, without which the prior would pass.
    - An evidence sandwich on the same data: :math:`E[\log \hat Z] \le \log Z \le E[\log \frac1N (w(z^*) + \sum w_n)]`,
      the true latents z* among the N = ``num_particles`` of the upper bound.
    - Drift: how far the texts that the guide writes differ from the posterior's, in length and in where they stop.

    :param algorithm: anything with ``run(*args) -> Posterior`` and, for more than its weights, ``model`` and ``guide``.
    :param simulate: ``(args, observed) -> args`` puts simulated observations, by site, into the arguments; needed where
        there is a guide, because it reads them there.
    :param statistics: more of them, by name: functions of the latents ``{site: (n, *plates, ...)}`` to (n, *plates).

    It costs ``repetitions + simulations`` runs, and two of importance sampling a simulation.  A correct algorithm with
    exact draws is found suspect by calibration once in 100 seeds.

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
        answers = [algorithm.run(*args, **kwargs) for _ in range(repetitions)]
        result = Diagnosis(posterior=answers[0])
        _judge_weights(result, answers)
        if not hasattr(algorithm, "model"):
            result.notes.append("The algorithm shows no model: no calibration, evidence bounds or drift.")
            return result
        try:
            result.calibration = calibrate(
                algorithm,
                args,
                kwargs,
                simulations=simulations,
                num_particles=num_particles,
                to_args=simulate,
                statistics=statistics,
            )
        except ValueError as error:
            result.notes.append(f"No calibration and no evidence bounds: {error}")
        else:
            _judge_bounds(result)
            _judge_calibration(result)
        if bool((answers[0].log_evidence != -torch.inf).all()):
            proposal = getattr(algorithm, "guide", None) or algorithm.model
            result.drifts = drift.drifts(proposal, answers[0], args, kwargs)
            for d in result.drifts:
                result.findings.append(Finding(d.name, f"{d.proposed:.3g} -> {d.posterior:.3g}", d.meaning, d.suspect))
    return result


def _judge_weights(result: Diagnosis, answers: list[Posterior]) -> None:
    """ESS, k-hat, spread of the evidence; or, for an enumeration, what it left out."""
    first = answers[0]
    if hasattr(first, "unexplored"):
        left = float(first.unexplored.max())
        meaning = "prior mass that the enumeration left out"
        result.findings.append(Finding("unexplored", f"{left:.2g}", meaning, left > 0.01, left))
        return
    n = first.num_particles
    ess = float(torch.stack([a.ess for a in answers]).mean(0).min())
    result.findings.append(
        Finding(
            "ESS / N",
            f"{ess / n:.3f}",
            f"{n} particles are worth {ess:.1f} independent draws",
            ess < min(10, n / 2),
            ess / n,
        )
    )
    khats = torch.stack([a.khat for a in answers]).flatten()
    khats = khats[~khats.isnan()]
    if len(khats):
        # One estimate spreads by some 0.2, so that the largest of many says little: the upper quartile.
        k = float(khats.sort().values[(3 * len(khats)) // 4 if len(khats) > 1 else 0])
        if k < 0.5:
            meaning = "the weights have a finite variance" if math.isfinite(k) else "the largest weights are alike"
        elif k < 1:
            meaning = f"heavy tail: an average needs some {smallest_sample(k):,.0f} particles"
        else:
            meaning = "heavy tail: no number of particles will do"
        if k >= 0.7:
            meaning += "; the proposal misses posterior mass"
        result.findings.append(Finding("Pareto k-hat", f"{k:.2f}", meaning, k >= 0.7, k))
    else:
        result.findings.append(Finding("Pareto k-hat", "-", "not defined: too few distinct weights", None))
    evidence = torch.stack([a.log_evidence for a in answers]).double()  # (repetition, *plates)
    if bool(evidence.isnan().any()):
        return
    low, spread = evidence.mean(0), evidence.std(0).amax() if len(evidence) > 1 else torch.tensor(torch.nan)
    result.findings.append(
        Finding(
            "log evidence",
            f"{float(low.mean()):.3f} +- {float(spread):.3f}",
            "nats; its spread over runs is small" if float(spread) <= 1 else "nats; runs differ in what they find",
            None if bool(spread.isnan()) and bool(low.isfinite().all()) else not float(spread) <= 1.0,
            float(low.mean()),
        )
    )


def _judge_bounds(result: Diagnosis) -> None:
    gaps = (result.calibration.uppers - result.calibration.lowers).double()
    if not len(gaps):
        return
    mean = float(gaps.mean())
    error = float(gaps.std() / len(gaps) ** 0.5) if len(gaps) > 1 else math.nan
    if not math.isfinite(mean):
        missed = float((~gaps.isfinite()).double().mean())
        meaning = (
            f"in {missed:.0%} of the simulated data the proposal cannot draw the truth, or nothing else is possible"
        )
    elif mean < -5 * error:
        meaning = "the wrong way round: the evidence is too high, the weights are wrong"
    else:
        meaning = "nats between the bounds of log Z"
    suspect = not math.isfinite(mean) or mean > 1.0 or mean < -5 * error
    result.findings.append(Finding("evidence sandwich", f"{mean:.3f} +- {error:.3f}", meaning, suspect, mean))


def _judge_calibration(result: Diagnosis) -> None:
    positions = result.calibration.positions
    lost = max((int(x.isnan().sum()) for x in positions.values()), default=0)
    if lost:
        result.findings.append(
            Finding("zero evidence", f"{lost}", "simulated data sets for which nothing possible was found", True, lost)
        )
    for name, x in positions.items():
        p, x = uniformity(x), x[~x.isnan()]
        suspect = None if math.isnan(p) else p < LEVEL / len(positions)
        meaning = "too few data sets to judge" if suspect is None else _shape(x) if suspect else "as it should be"
        result.findings.append(Finding(f"SBC: {name}", f"p = {p:.2g}", meaning, suspect, p))


def _shape(x: Tensor) -> str:
    """How positions are not uniform: the mean is 1/2, the mean distance from it 1/4."""
    error = (12 * len(x)) ** -0.5
    shift, width = float(x.mean() - 0.5) / error, float((x - 0.5).abs().mean() - 0.25) / (error / 2)
    if abs(shift) > max(3.0, abs(width)):
        return "the posterior's values are too " + ("low" if shift > 0 else "high")
    if abs(width) > 3:
        return "the posterior is too " + ("narrow" if width > 0 else "wide") + " in it"
    return "the posterior's distribution of it is wrong"


def _numbers(x: Tensor) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in x.tolist()]


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
