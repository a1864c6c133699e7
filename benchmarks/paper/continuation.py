"""Tempered continuation compared with the usual decoding methods, by likelihood and by diversity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import cycle
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

from .study import Figures, Results, Study, markdown, opening, paired, spread, verdict
from .targets import power

TEMPERATURES = (0.95, 0.9, 0.85, 0.8, 0.5, 0.25)  # the paper's four and two colder ones
TOP_P, PENALTIES = (0.95, 0.9, 0.8, 0.5), (0.5, 2.0)
LIMIT = {"max_tokens": continuation.EMBEDDED_LONGEST}
DRAWS = 32  # texts a prompt
STEPS, STEPS_GIVEN_T = 150, 300
MASS, SHORT_MASS = 0.998, 0.9  # of the language model that is enumerated
FAR = 3.0  # nats below the best: in the table, not in the picture
GUIDE, GIVEN_T, EXACT, BY_TOKEN = "GFlowNet", "GFlowNet given T", "exact target", "token temperature"
QUESTION = (
    "Are sentences drawn from the tempered distribution p(z|x)^(1/T) more likely and more diverse than those of the "
    "usual decoding methods?"
)


@lru_cache(1)
def enumerated(prompts: int) -> Posterior:
    """The language model's continuations of the first test prompts, with their probabilities."""
    experiment = continuation.experiment(temperature=1.0)
    x, one = (a[:prompts] for a in experiment.test)
    return Enumeration(experiment.model, mass=MASS if prompts == continuation.TEST_PROMPTS else SHORT_MASS).run(x, one)


def target(temperature: float, prompts: int) -> Posterior:
    """The exact target p(z|x)^(1/T): the same texts with other weights."""
    return power(enumerated(prompts), temperature)


def measure(e: Experiment, x: Tensor, family: str, setting: str, z: Tensor) -> Figures:
    """A row of the table: measures of the texts z (n, B, E) for the prompts x."""
    log_p = decoding.log_likelihood(e.lm, x, z, **LIMIT)
    distance = measures.edit_distance(z)
    return {
        "family": family, "setting": setting, "log_likelihood": float(log_p.mean()),
        "best": float(log_p.amax(0).mean()), "distinct": float(measures.distinct(z).mean()),
        "distance": float(distance.mean()),
    }  # fmt: skip


def usual(e: Experiment, x: Tensor, n: int) -> list[Figures]:
    """Rows of the usual decoding methods."""

    def generated(family: str, setting: str = "", **options: Any) -> Figures:
        return measure(e, x, family, setting, decoding.generate(e.lm, x, n, **LIMIT, **options))

    rows = [generated("greedy"), generated("beam", f"{n} beams", num_beams=n, length_penalty=0.0)]
    for penalty in PENALTIES:
        z = decoding.beams(e.lm, x, n, groups=n, penalty=penalty, **LIMIT)
        rows.append(measure(e, x, "diverse beam", f"{n} groups, penalty {penalty:g}", z))
    rows += [generated("nucleus", f"p = {p:g}", do_sample=True, top_p=p) for p in TOP_P]
    return rows + [generated(BY_TOKEN, f"T = {t:g}", do_sample=True, temperature=t) for t in (1.0, *TEMPERATURES)]


def guided(e: Experiment, x: Tensor, temperature: float, n: int, family: str) -> Figures:
    """The row of a trained guide at one temperature, with the distance of its distribution from the target."""
    args = x, torch.full((len(x),), temperature)
    exact = target(temperature, len(x))
    z = e.gflownet().run(*args, num_particles=n).samples["z"]
    tv = density_quality(exact, e.guide, args, {}).total_variation
    return measure(e, x, family, f"T = {temperature:g}", z) | {"tv": float(tv.mean())}


def reference(e: Experiment, x: Tensor, temperature: float, n: int) -> Figures:
    """The row of the exact target at one temperature, and the distances of two untrained distributions from it."""
    exact = target(temperature, len(x))

    def by_token(x: Tensor) -> Tensor:
        with pyro.plate("prompts", len(x)):
            return pyro.sample("z", Completion(e.lm, x, stop=".", temperature=temperature, **LIMIT))

    lm = 0.5 * (target(1.0, len(x)).probabilities - exact.probabilities).abs().sum(0)
    row = measure(e, x, EXACT, f"T = {temperature:g}", exact.resample(n, "multinomial").samples["z"])
    tv = density_quality(exact, by_token, (x,), {}).total_variation
    return row | {"tv": 0.0, "lm_tv": float(lm.mean()), "token_temperature_tv": float(tv.mean())}


def run(cell: str, seed: int, short: bool) -> Figures:
    """Texts for unseen prompts by the usual decoding, by a guide for one temperature, or by a guide for all."""
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
    """The rows of every cell, the usual decoding first."""
    rows: Rows = {}
    for runs in results.values():
        for found in runs:
            for row in found["rows"]:
                rows.setdefault((row["family"], row["setting"]), []).append(row)
    families = list(dict.fromkeys(family for family, _ in rows))
    return {key: rows[key] for key in sorted(rows, key=lambda key: families.index(key[0]))}


def diversity_at(curve: Sequence[Figures], log_likelihood: float) -> float | None:
    """The edit distance of the guides' texts at this likelihood, interpolated linearly between two temperatures.

    Below the likelihood of all guides: the largest edit distance of a guide, which is then ahead in both.  Above: None.
    """
    points = sorted((r["log_likelihood"], r["distance"]) for r in curve)
    if log_likelihood > points[-1][0]:
        return None
    if log_likelihood <= points[0][0]:
        return max(distance for _, distance in points)
    right = next(i for i, point in enumerate(points) if point[0] >= log_likelihood)
    (a, low), (b, high) = points[right - 1 : right + 1]
    return low + (high - low) * (log_likelihood - a) / (b - a)


WORDS = {  # of `versus`, in the verdict
    "behind": "Less diverse than the guides",
    "ahead": "More diverse than the guides",
    "even": "No difference at 95%",
    "beyond": "More likely than every guide, so not comparable",
}


def versus(rows: Rows) -> dict[str, list[str]]:
    """Each decoding method compared with the guides at equal likelihood: "behind", "ahead", "even" or "beyond"."""
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
    listed = ". ".join(f"{WORDS[word]}: {'; '.join(names)}" for word, names in found.items() if names)
    text = verdict(
        "at equal likelihood the GFlowNet's texts are more diverse than those of the usual decoding",
        not found["ahead"] and not found["even"] and bool(found["behind"]),
        "Diversity is the edit distance. Each decoding method is compared with the guides at its own likelihood, "
        "interpolated between their temperatures; one that is less likely than all guides is compared with the most "
        f"diverse guide. {listed}.",
    )
    for key, which in (("log_likelihood", "on average"), ("best", "for the best text of a prompt")):
        ahead, said = [], []
        for t in TEMPERATURES:
            ours, theirs = (rows[family, f"T = {t:g}"] for family in (GUIDE, BY_TOKEN))
            difference, half = paired([r[key] for r in ours], [r[key] for r in theirs])
            ahead.append(difference > half)
            said.append(f"{difference:+.2f} ± {half:.2f} at {t:g}")
        text += verdict(
            f"at the same T, GFlowNet texts are more likely than those of token temperature, {which}",
            all(ahead), f"They are at {sum(ahead)} of {len(ahead)} temperatures. Differences in nats, with 95% "
            f"intervals: {', '.join(said)}.",
        )  # fmt: skip
    worst = max(mean(r["tv"] for r in runs) for (family, _), runs in rows.items() if family == GUIDE)
    return text + verdict(
        "the guides for one temperature sample the target (TV at most 0.1; the paper has no exact target)",
        worst <= 0.1,
        f"The largest TV of such a guide is {worst:.3f}.",
    )


def report(results: Results) -> str:
    rows = gathered(results)
    text = opening(
        QUESTION,
        "Target: p(z|x)^(1/T), the next sentence z after a beginning x; the paper's setting is the same. Data: "
        f"{continuation.TEST_PROMPTS} beginnings that no guide was trained on, {DRAWS} texts each. *{GUIDE}*: one "
        f"guide for each temperature. *{GIVEN_T}*: one guide that reads the temperature. The paper shows its figures "
        "in a plot, for another model and other prompts.",
        {
            "setting": "the option of the decoding method, or the temperature of the target",
            "log p(z given x)": "log-probability of the texts under the base model, nats, mean over draws, whatever "
            "method wrote them",
            "best": f"the same, for the most likely of a prompt's {DRAWS} texts",
            "distinct": "share of different texts among those of a prompt",
            "edit distance": "mean distance in tokens between two texts of a prompt, from 0 (equal) to 1",
            "TV": "total variation between the method's distribution and the enumerated target, mean over prompts",
        },
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
    text += "\nTotal variation to the target at each temperature; the first two columns need no training:\n\n"
    text += markdown(
        ("target", "the language model itself", "token temperature T", GUIDE, GIVEN_T),
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
    for family, marker in zip(dict.fromkeys(family for family, _ in rows), cycle("sPXDov^*dhp<>")):
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
