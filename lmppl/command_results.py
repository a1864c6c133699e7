"""What the commands train, compare and write."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command_options import Failure
from .command_output import Output
from .command_record import FILE
from .files import claim, save_figure, writing
from .markup import visible

if TYPE_CHECKING:  # what computes is imported by the function that computes: --help waits for none of it
    from collections.abc import Callable

    from .inference import Comparison, Posterior, Trainer
    from .inference.posterior.algorithm import Algorithm
    from .models import Experiment
    from .models.budget import Plan

OUTSIDE_DRAWS = 10_000
MATCHED = 5  # runs, at most, that it takes to find an algorithm's particles
CURVE = "training.png"
SAMPLES = "samples.txt", "samples.json"
SHOWN = 6  # texts of an observation


def exact_posterior(experiment: Experiment, output: Output) -> tuple[Posterior | None, int | None]:
    """Returns the exact posterior of the test observations and its cost in tokens; None if there is none."""
    if experiment.exact is None:
        return None, None
    before, started = experiment.lm.tokens_scored, time.time()
    with output.status("Enumerating the exact posterior of every test observation"):
        exact = experiment.exact.run(*experiment.test)
    output.say(f"Exact posterior of {exact.log_evidence.numel()} observations: {time.time() - started:.0f} s")
    return exact, experiment.lm.tokens_scored - before


def trainer_of(name: str, experiment: Experiment) -> Trainer:
    """Returns the trainer of the experiment's guide: "gflownet", "wake-sleep", or a policy gradient."""
    if name == "gflownet":
        return experiment.gflownet()
    from .inference import PolicyGradient, ReweightedWakeSleep

    given: dict[str, Any] = {"optimizer": experiment.optimizer(), "num_particles": experiment.recipe.particles}
    if name == "wake-sleep":
        return ReweightedWakeSleep(experiment.model, experiment.guide, **given)
    return PolicyGradient(experiment.model, experiment.guide, algorithm=name, **given)


def comparing(experiment: Experiment, particles: int, algorithms: int, repetitions: int, exact: bool) -> float:
    """Seconds that a comparison takes, about: each algorithm's run is as long as the GFlowNet's, which is measured.

    :param exact: whether there is an exact posterior, outside of which `annotate` looks for mass.
    """
    from .inference.posterior.algorithm import sized

    gflownet = experiment.gflownet()

    def seconds(n: int) -> float:
        began = time.perf_counter()
        sized(gflownet, n).run(*experiment.test)
        return time.perf_counter() - began

    outside = 20 * seconds(-(-OUTSIDE_DRAWS // len(experiment.test[0]) // 10)) if exact else 0.0  # of two guides
    return outside + seconds(particles) * (2 + repetitions * algorithms + MATCHED * (algorithms - 1))


class Minutes:
    """What `compare --budget` has time for: the trainings share what the comparison leaves.

    :param kept: seconds to keep for the comparison.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic):
        self.minutes, self.clock, self.kept = minutes, clock, 0.0
        self.end = clock() + 60 * minutes

    def share(self, trainings: int) -> float:
        """Minutes of the next of so many trainings."""
        left = self.end - self.clock() - self.kept
        if left <= 0:
            from .inference.training.loop.cost import duration

            took, compared = duration(60 * self.minutes - left - self.kept), duration(self.kept)
            raise Failure(
                f"--budget {self.minutes:g}: no time is left to train: {took} have gone, and the comparison takes "
                f"about {compared}; give more minutes, or choose fewer --algorithms or --particles"
            )
        return left / trainings / 60


def plan_of(experiment: Experiment, minutes: float | None, out: Path) -> Plan | None:
    """What a training of so many minutes takes; of one that is taken up, what it was begun with."""
    from .inference.training.loop import checkpoint as checkpoints
    from .models.budget import Plan, plan

    before = checkpoints.identity(out / "training")
    found = Plan.saved(before)
    if before and minutes != (found and found.minutes):
        begun = "without --budget" if found is None else f"with --budget {found.minutes:g}"
        raise Failure(f"--out {out}: the run there was begun {begun}; take it up likewise, or name another directory")
    return found if found is not None or minutes is None else plan(experiment, minutes)


def train_beside(
    trainer: Trainer,
    experiment: Experiment,
    exact: Posterior | None,
    steps: int,
    out: Path,
    seed: int,
    output: Output,
    looks: dict[str, Any] | None = None,
) -> None:
    """Train a guide, by the exact posterior where there is one, with log, curve and adapter in ``out``.

    :param looks: what `fit` is told of held-out observations; None: all of them, as often as usual.
    """
    from .inference.training.loop.log import Log

    refuse_run(out)
    claim_training(out)
    Log(out / "run.jsonl").cut(0)
    if exact is not None:
        output.say(f"Total variation of the guide before training: {density_tv(exact, experiment):.3f}")
    looks = {"held_out": experiment.held_out} if looks is None else looks
    trainer.fit(experiment.batches, steps, seed=seed, log=out / "run.jsonl", progress=not output.quiet, **looks)
    save_training(experiment, out)


def refuse_run(out: Path) -> None:
    """Refuse a directory in which `lmppl train` keeps its run."""
    from .inference.training.loop import checkpoint as checkpoints

    if checkpoints.exists(out / "training"):
        raise Failure(f"--out {out}: `lmppl train` keeps its run there; name another directory")


def claim_training(out: Path) -> None:
    """Before anything is trained, refuse a directory in which others have files of the names that will be written."""
    from .inference.training.loop.log import Log
    from .loading import CONFIG, WEIGHTS

    claim(out, [CURVE, FILE])
    claim(out / "adapter", [CONFIG, WEIGHTS])
    Log(out / "run.jsonl")


def contents(path: Path | None) -> dict[str, str]:
    """What tells data files apart: what is in them."""
    from .inference.training.loop.identity import digest

    if path is None:
        return {}
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {"data files": digest([file.read_bytes() for file in files])}


def history_of(out: Path) -> list[dict[str, Any]]:
    """Returns the metrics of every step of the log in a directory, without a line that is half written."""
    lines = (out / "run.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line.strip()]


def verdict_of(out: Path) -> str | None:
    """Returns the last verdict on held-out observations; None if there is none."""
    return next((step["verdict"] for step in reversed(history_of(out)) if "verdict" in step), None)


def save_training(experiment: Experiment, out: Path) -> None:
    """Saves the adapter, and the training curves of the log."""
    history = history_of(out)
    with writing(out, "training curve") as fresh:
        save_figure(training_figure(history), fresh / CURVE)
    experiment.guide_lm.save_pretrained(out / "adapter")


class Matching:
    """Gives algorithms as many particles as cost the GFlowNet's tokens a query; and knows what all of them cost.

    ``tokens`` and ``seconds`` are those of one run of each on the test observations, by what they took here.
    """

    def __init__(self, experiment: Experiment, gflownet: Algorithm):
        from .inference.judging.compare import Meter

        self.meter, self.count = Meter([experiment.lm.network]), len(experiment.test[0])
        answer, self.once, self.seconds_once = self.meter(lambda: gflownet.run(*experiment.test))
        self.particles, self.tokens, self.seconds = answer.num_particles, 0.0, 0.0

    def cost(self, repetitions: int) -> str:
        """What comparing them will cost, in words."""
        from .inference.training.loop.cost import amount, duration

        tokens, seconds = amount(repetitions * self.tokens), duration(repetitions * self.seconds)
        return f"Comparing, {repetitions} runs of each algorithm: about {tokens} tokens, {seconds}"

    def own(self, gflownet: Algorithm) -> Algorithm:
        """The GFlowNet itself, when it is compared too."""
        self.tokens, self.seconds = self.tokens + self.once, self.seconds + self.seconds_once
        return gflownet

    def __call__(self, algorithm: Algorithm, own: Experiment) -> Algorithm:
        from .inference.judging.compare import PILOTS, particles_within
        from .inference.posterior.algorithm import sized

        self.meter.watch([own.lm.network])
        pilots, budget = (min(self.particles, PILOTS[0]), min(4 * self.particles, PILOTS[1])), self.once / self.count
        n = particles_within(algorithm, budget, self.meter, args=own.test, pilots=pilots, checks=3)
        tokens, seconds = self.meter.last  # of a run with about as many particles
        self.tokens, self.seconds = self.tokens + self.once, self.seconds + seconds * self.once / tokens
        return sized(algorithm, n)


def candidates_of(
    chosen: list[str], experiment: Experiment, gflownet: Algorithm, match: Matching
) -> dict[str, Algorithm]:
    """The algorithms, all others with as many particles as cost the GFlowNet's tokens."""
    from .inference import SMC, Importance, MetropolisHastings

    found: dict[str, Algorithm] = {}
    model, guide = experiment.model, experiment.guide
    if "gflownet" in chosen:
        found["GFlowNet"] = match.own(gflownet)
    if "importance" in chosen:
        found["importance sampling (prior)"] = match(Importance(model), experiment)
    if "smc" in chosen:
        found["SMC (prior, stop twist)"] = match(SMC(model, twist="stop"), experiment)
    if "mcmc" in chosen:
        found["MCMC (prior, regrowth)"] = match(MetropolisHastings(model), experiment)
    if "smc" in chosen and "gflownet" in chosen:
        found["SMC (GFlowNet, flow twist)"] = match(SMC(model, guide, twist="flow"), experiment)
    return found


def density_tv(exact: Posterior, experiment: Experiment) -> float:
    """The guide's total variation from the posterior, by its densities, a mean over the test observations."""
    from .inference.judging.quality import density_quality

    return float(density_quality(exact, experiment.guide, experiment.test, {}).total_variation.mean())


def annotate(result: Comparison, experiment: Experiment, exact: Posterior | None) -> None:
    """Say what the figures are of, and how much of the posterior the enumeration may lack."""
    from .inference import Importance
    from .inference.judging.quality import outside_mass

    count = len(experiment.test[0])
    result.notes.insert(0, f"Target: {experiment.target}. {count} unseen observations; |error| and KL in nats.")
    if exact is None:
        return
    shares = []
    for source, guide in {"prior": None, "guide": experiment.guide}.items():
        drawn = Importance(experiment.model, guide, num_particles=-(-OUTSIDE_DRAWS // count)).run(*experiment.test)
        shares.append(
            f"{float(outside_mass(exact, drawn).mean()):.4f} by {drawn.num_particles * count:,} {source} draws"
        )
    result.notes.append(
        "Every TV is to the enumerated posterior; posterior mass outside it: " + ", ".join(shares) + "."
    )


def samples(
    experiment: Experiment,
    posterior: Posterior,
    exact: Posterior | None,
    observations: int | None = None,
    *,
    required: bool = True,
) -> list[dict[str, Any]]:
    """The most probable texts of each observation, with their exact probabilities where those are known.

    :raises ZeroEvidence: if every draw of an observation is impossible and texts are ``required``; else it has none.
    """
    from .inference import ZeroEvidence

    found = []
    for i in range(len(experiment.test[0]))[:observations]:
        truth = dict(exact.table(experiment.site, i)) if exact is not None else None
        try:
            table = posterior.table(experiment.site, i)[:SHOWN]
        except ZeroEvidence:
            if required:
                raise
            table = []
        texts = [
            {"text": text, "probability": p, "exact": None if truth is None else truth.get(text, 0.0)}
            for text, p in table
        ]
        found.append({"observation": experiment.describe(i), "texts": texts})
    return found


def sample_text(found: list[dict[str, Any]]) -> str:
    """Returns samples as text."""
    lines = []
    for one in found:
        lines.append(one["observation"])
        for row in one["texts"]:
            known = "" if row["exact"] is None else f"   exact {row['exact']:.3f}"
            lines.append(f"    {row['probability']:.3f}{known}  {visible(row['text'].strip())}")
        if not one["texts"]:
            lines.append("    (no draw of the guide is possible)")
    return "\n".join(lines) + "\n"


def save_samples(found: list[dict[str, Any]], out: Path) -> None:
    """Writes samples as text and as JSON."""
    with writing(out, "samples") as fresh:
        (fresh / SAMPLES[0]).write_text(sample_text(found))
        (fresh / SAMPLES[1]).write_text(json.dumps(found, indent=1, allow_nan=False))


PANELS = (
    ("sd(u), nats; 0 at the posterior", {"sd_u": "training draws", "held_out_sd_u": "held out"}),
    (
        "log evidence, held out, nats",
        {
            "held_out_log_z": "by the guide's draws",
            "held_out_log_z_model": "by the model's draws",
            "held_out_log_z_above": "from above",
        },
    ),
    ("ESS / N, held out; 1 at the posterior", {"held_out_ess": "held out"}),
    ("loss", {"loss": "training draws"}),
)
POINTS = 400  # of a line; of more, means are drawn


def training_figure(history: list[dict[str, Any]]) -> Any:
    """Draws the metrics of a training against its steps: one panel for each of `PANELS` that has data."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for title, keys in PANELS:
        found = {label: [(h["step"], h[key]) for h in history if h.get(key) is not None] for key, label in keys.items()}
        if any(found.values()):
            lines[title] = {label: _thinned(points) for label, points in found.items() if points}
    rows = max(1, -(-len(lines) // 2))
    figure = Figure(figsize=(9.6, 2.9 * rows), layout="constrained")
    for i, (title, found) in enumerate(lines.items()):
        axis: Any = figure.add_subplot(rows, min(2, max(1, len(lines))), i + 1)
        for label, points in found.items():
            many = len(points) > 60
            axis.plot(*zip(*points, strict=True), label=label, lw=0.9, marker="" if many else "o", ms=2.5)
        axis.set(xlabel="step", title=title)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.title.set_fontsize(9)
        axis.spines[["top", "right"]].set_visible(False)
        if title.startswith(("sd", "ESS")):
            axis.set_ylim(0, 1.05 if title.startswith("ESS") else None)
        if len(found) > 1:
            axis.legend(frameon=False, fontsize=8)
    return figure


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of groups of equal size where there are more than `POINTS`."""
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
