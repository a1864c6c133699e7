"""Tempered continuation against the usual decoding: likelihood under the base language model, against diversity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import pyro
import torch
from torch import Tensor

from lmppl.distributions import Completion
from lmppl.files import replacing
from lmppl.inference import Enumeration, Posterior
from lmppl.inference.judging.quality import density_quality
from lmppl.models import Experiment, continuation, decoding, measures

from .study import Figures, Results, Study, markdown, paired, spread, verdict
from .targets import power

TEMPERATURES = (0.95, 0.9, 0.85, 0.8, 0.5, 0.25)  # the paper's four and two colder ones
TOP_P, PENALTIES = (0.95, 0.9, 0.8, 0.5), (0.5, 2.0)
LIMIT = {"max_tokens": continuation.EMBEDDED_LONGEST}
DRAWS = 32  # texts a prompt
STEPS, STEPS_GIVEN_T = 150, 300
MASS, SHORT_MASS = 0.998, 0.9  # of the language model that is enumerated
FAR = 3.0  # nats below the best: in the table, not in the picture
GUIDE, GIVEN_T, EXACT, BY_TOKEN = "GFlowNet", "GFlowNet given T", "exact target", "token temperature"


@lru_cache(1)
def enumerated(prompts: int) -> Posterior:
    """The language model's own continuations of the first test prompts, with their probabilities."""
    experiment = continuation.experiment(temperature=1.0)
    x, one = (a[:prompts] for a in experiment.test)
    return Enumeration(experiment.model, mass=MASS if prompts == continuation.TEST_PROMPTS else SHORT_MASS).run(x, one)


def target(temperature: float, prompts: int) -> Posterior:
    """p(z|x)^(1/T), exact: the same texts with other weights."""
    return power(enumerated(prompts), temperature)


def measure(e: Experiment, x: Tensor, family: str, setting: str, z: Tensor) -> Figures:
    """A row: texts z (n, B, E) for the prompts x."""
    log_p = decoding.log_likelihood(e.lm, x, z, **LIMIT)
    distance = measures.edit_distance(z)
    return {
        "family": family, "setting": setting, "log_likelihood": float(log_p.mean()),
        "best": float(log_p.amax(0).mean()), "distinct": float(measures.distinct(z).mean()),
        "distance": float(distance.mean()),
    }  # fmt: skip


def usual(e: Experiment, x: Tensor, n: int) -> list[Figures]:
    """The usual decoding methods."""

    def generated(family: str, setting: str = "", **options: Any) -> Figures:
        return measure(e, x, family, setting, decoding.generate(e.lm, x, n, **LIMIT, **options))

    rows = [generated("greedy"), generated("beam", f"{n} beams", num_beams=n, length_penalty=0.0)]
    for penalty in PENALTIES:
        z = decoding.beams(e.lm, x, n, groups=n, penalty=penalty, **LIMIT)
        rows.append(measure(e, x, "diverse beam", f"{n} groups, penalty {penalty:g}", z))
    rows += [generated("nucleus", f"p = {p:g}", do_sample=True, top_p=p) for p in TOP_P]
    return rows + [generated(BY_TOKEN, f"T = {t:g}", do_sample=True, temperature=t) for t in (1.0, *TEMPERATURES)]


def guided(e: Experiment, x: Tensor, temperature: float, n: int, family: str) -> Figures:
    """A trained guide at one temperature: its texts, and the distance of its density from the target."""
    args = x, torch.full((len(x),), temperature)
    exact = target(temperature, len(x))
    z = e.gflownet().run(*args, num_particles=n).samples["z"]
    tv = density_quality(exact, e.guide, args, {}).total_variation
    return measure(e, x, family, f"T = {temperature:g}", z) | {"tv": float(tv.mean())}


def reference(e: Experiment, x: Tensor, temperature: float, n: int) -> Figures:
    """The exact target at one temperature, and how far two densities without training are from it."""
    exact = target(temperature, len(x))

    def by_token(x: Tensor) -> Tensor:
        with pyro.plate("prompts", len(x)):
            return pyro.sample("z", Completion(e.lm, x, stop=".", temperature=temperature, **LIMIT))

    lm = 0.5 * (target(1.0, len(x)).probabilities - exact.probabilities).abs().sum(0)
    row = measure(e, x, EXACT, f"T = {temperature:g}", exact.resample(n, "multinomial").samples["z"])
    tv = density_quality(exact, by_token, (x,), {}).total_variation
    return row | {"tv": 0.0, "lm_tv": float(lm.mean()), "token_temperature_tv": float(tv.mean())}


def run(cell: str, seed: int, short: bool) -> Figures:
    """Texts for unseen prompts by the usual decoding, or by guides trained for one temperature, or for all."""
    prompts, n = (2, 8) if short else (continuation.TEST_PROMPTS, DRAWS)
    temperature = TEMPERATURES if cell == GIVEN_T else float(cell.removeprefix("T=")) if cell != "decoding" else 1.0
    e = continuation.experiment(temperature=temperature, seed=seed)
    x = e.test[0][:prompts]
    if cell == "decoding":
        torch.manual_seed(seed)
        return {"rows": usual(e, x, n)}
    steps = 4 if short else STEPS_GIVEN_T if cell == GIVEN_T else STEPS
    trainer = e.gflownet()
    trainer.fit(e.batches, steps, seed=seed, progress=False)
    torch.manual_seed(seed)
    if isinstance(temperature, tuple):
        rows = [guided(e, x, t, n, GIVEN_T) for t in temperature]
    else:
        rows = [reference(e, x, temperature, n), guided(e, x, temperature, n, GUIDE)]
    return {"rows": rows, "tokens": trainer.training_tokens}


# -- the section ------------------------------------------------------------------------------------------------------

Rows = dict[tuple[str, str], list[Figures]]  # by family and setting, one a seed


def gathered(results: Results) -> Rows:
    """Every cell's rows, the usual decoding first."""
    rows: Rows = {}
    for runs in results.values():
        for found in runs:
            for row in found["rows"]:
                rows.setdefault((row["family"], row["setting"]), []).append(row)
    families = list(dict.fromkeys(family for family, _ in rows))
    return {key: rows[key] for key in sorted(rows, key=lambda key: families.index(key[0]))}


def diversity_at(curve: Sequence[Figures], log_likelihood: float) -> float | None:
    """How different the guides' texts are at this likelihood, between two temperatures linearly.

    Below the likelihood of all of them it is the most diverse one's, which is then ahead in both; above, None.
    """
    points = sorted((r["log_likelihood"], r["distance"]) for r in curve)
    if log_likelihood > points[-1][0]:
        return None
    if log_likelihood <= points[0][0]:
        return max(distance for _, distance in points)
    right = next(i for i, point in enumerate(points) if point[0] >= log_likelihood)
    (a, low), (b, high) = points[right - 1 : right + 1]
    return low + (high - low) * (log_likelihood - a) / (b - a)


def versus(rows: Rows) -> dict[str, list[str]]:
    """Each usual setting against the guides at equal likelihood: "behind", "ahead", "even" or "beyond" them."""
    guides = [runs for (family, _), runs in rows.items() if family == GUIDE]
    found: dict[str, list[str]] = {"behind": [], "ahead": [], "even": [], "beyond": []}
    for (family, setting), runs in rows.items():
        if family in (GUIDE, GIVEN_T, EXACT):
            continue
        at = [diversity_at([g[i] for g in guides], r["log_likelihood"]) for i, r in enumerate(runs)]
        reached = [(r["distance"], d) for r, d in zip(runs, at, strict=True) if d is not None]
        word = "beyond"
        if len(reached) == len(runs):
            difference, half = paired(*zip(*reached, strict=True))
            word = "behind" if difference + half < 0 else "ahead" if difference - half > 0 else "even"
        found[word].append(f"{family} {setting}".strip())
    return found


def claims(rows: Rows) -> str:
    """The paper's claims, each with what was found."""
    found = versus(rows)
    listed = "; ".join(f"{word}: {', '.join(names)}" for word, names in found.items() if names)
    text = verdict(
        "at equal likelihood the GFlowNet's texts are more diverse than those of the usual decoding",
        not found["ahead"] and not found["even"] and bool(found["behind"]),
        f"By edit distance, against the guides of all temperatures (beyond: more likely than any guide's; to what is "
        f"less likely than any, the widest is compared): {listed}.",
    )
    for key, words in (("log_likelihood", "on average"), ("best", "in the best of a prompt's texts")):
        ahead, said = [], []
        for t in TEMPERATURES:
            ours, theirs = (rows[family, f"T = {t:g}"] for family in (GUIDE, BY_TOKEN))
            difference, half = paired([r[key] for r in ours], [r[key] for r in theirs])
            ahead.append(difference > half)
            said.append(f"{difference:+.2f} ± {half:.2f} at {t:g}")
        text += verdict(
            f"a tempered sequence is more likely than one of tempered tokens at the same T, {words}",
            all(ahead), f"{sum(ahead)} of {len(ahead)} temperatures; nats, with 95% intervals: {', '.join(said)}.",
        )  # fmt: skip
    worst = max(mean(r["tv"] for r in runs) for (family, _), runs in rows.items() if family == GUIDE)
    return text + verdict(
        "the guides sample the tempered sequences (not the paper's words; it has no truth to compare with)",
        worst <= 0.1,
        f"The largest total variation of a guide of its own is {worst:.3f} (asked for here: 0.1).",
    )


def report(results: Results) -> str:
    rows = gathered(results)
    text = (
        "Target: p(z|x)^(1/T), in either setting. The next sentence after unseen beginnings; every log-likelihood is "
        f"the base model's, whoever wrote the text; {DRAWS} texts a prompt, *best* the most likely of them; TV is the "
        "density's, to the enumerated target. The paper's figures are a plot, of another model and other prompts.\n\n"
    )
    header = ("method", "setting", "log p(z given x)", "best", "distinct", "edit distance", "TV")
    text += markdown(
        header,
        [
            (family, setting, spread(runs, "log_likelihood", 2), spread(runs, "best", 2), spread(runs, "distinct", 2),
             spread(runs, "distance", 2), spread(runs, "tv") if "tv" in runs[0] else "")
            for (family, setting), runs in rows.items()
        ],
    )  # fmt: skip
    text += "\nTotal variation to the target:\n\n" + markdown(
        ("target", "the LM itself", "token temperature T", GUIDE, GIVEN_T),
        [
            (s, spread(rows[EXACT, s], "lm_tv"), spread(rows[EXACT, s], "token_temperature_tv"),
             spread(rows[GUIDE, s], "tv"), spread(rows[GIVEN_T, s], "tv"))
            for s in (f"T = {t:g}" for t in TEMPERATURES)
        ],
    )  # fmt: skip
    return text + "\n" + claims(rows)


def plot(results: Results, path: Path, far: float = FAR) -> None:
    """Mean log-likelihood against diversity: one line a family, up and to the right is better.

    What is more than ``far`` nats below the best is named above the picture.
    """
    from matplotlib.figure import Figure

    rows = gathered(results)
    axes = "distance", "log_likelihood"
    points = {key: tuple(mean(r[k] for r in runs) for k in axes) for key, runs in rows.items()}
    best = max(y for _, y in points.values())
    below = {key: point for key, point in points.items() if point[1] < best - far}
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axis = figure.subplots()
    for family, marker in zip(dict.fromkeys(family for family, _ in rows), "sPXDov^*", strict=False):
        mine = sorted(point for key, point in points.items() if key[0] == family and key not in below)
        if mine:
            axis.plot(*zip(*mine, strict=True), marker=marker, ms=5, lw=0.9, alpha=0.85, label=family)
    axis.set(xlabel="mean normalised edit distance between a prompt's texts", ylabel="mean log p(z | x), nats")
    if below:
        axis.set_title("below: " + "; ".join(f"{' '.join(k)}: {y:.1f}" for k, (_, y) in below.items()), fontsize=7)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=120)


CELLS = ("decoding", *(f"T={t:g}" for t in TEMPERATURES), GIVEN_T)
STUDY = Study("continuation", "Continuation: tempered sequences", CELLS, run, report, plot)
