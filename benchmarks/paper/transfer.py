"""Transfer across tasks: one guide for many posteriors, the same guide on new tasks, and combined guides.

Not an experiment of the paper.  The claims are our own, and were written down before the seeds ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean as average
from tempfile import TemporaryDirectory
from typing import Any

import pyro
import torch
from torch import Tensor

from lmppl import LanguageModel
from lmppl.distributions import TextMixture, TextProduct
from lmppl.embedded.stories import VERBS
from lmppl.files import replacing
from lmppl.inference import Enumerated, Importance, StopTraining
from lmppl.inference.judging.quality import draw_quality
from lmppl.models import Experiment
from lmppl.models.transfer import FAMILIES, RECIPE, TRAINED, Told, embedded_tasks, experiment

from .study import Figures, Results, Study, markdown, meanings, opening, spread, verdict
from .targets import mean, programs

MANY, SCRATCH, SINGLE = "guide of four families", "from scratch", "guides of endings"
CELLS = MANY, SCRATCH, SINGLE
KINDS = "seen", "new"
TARGETS = {"two endings": ("two endings", False), "new words": ("lexical", True)}  # to be learned
ENOUGH = 0.05  # total variation
STEPS = {MANY: 300, SINGLE: 60, "on": 60}
LOOK = 10  # steps between two measurements of the distance
TASKS = 6  # test tasks of each set
PARTICLES, REPETITIONS = 64, 2
STARTS = {SCRATCH: SCRATCH, SINGLE: "guide of infilling", MANY: MANY}
PROMPT, PARTS = "guide of four families, told both", "it, told one and the other: product over the prior"
COMPOSED = "mixture of guides", "product of guides over the prior", "product of guides", "sum of adapters, told both"
ALONE = "language model", "guide of even endings", "guide of odd endings"
SHOWN = {PARTS: "guide of four families, asked twice: product over the prior"}  # names of the records, in plain words
FOUND = (  # in the first lines of docs/results.md
    "TV of one guide: {transfer_least} to {transfer_most} on four families of tasks, {transfer_words} on new words. On "
    "two endings, which it was not trained on: {transfer_described} if it reads both, {transfer_composed} if it is "
    "asked twice and the answers are multiplied and divided by the prior ({transfer_seeds} seeds)"
)


class Truth:
    """The test tasks of a set, and their exact posteriors."""

    def __init__(self, family: str, new: bool, count: int):
        e = untrained()
        self.tasks = [told.task for told in embedded_tasks(family, "test", new=new)[:count]]
        self.args = programs(e).encode(self.tasks)
        assert e.exact is not None
        self.exact: Enumerated = e.exact.run(*self.args)

    def tv(self, fn: Any) -> float:
        """The total variation of a distribution over texts, mean over tasks, from the log-probability of every text."""
        q, p = scored(fn, self.exact.samples["z"]).exp(), self.exact.probabilities.double()
        return float((((q - p).abs().sum(0) + 1 - q.sum(0)) / 2).mean())


@cache
def untrained() -> Experiment:
    return experiment()


@cache
def truth(family: str, new: bool, count: int) -> Truth:
    return Truth(family, new, count)


def scored(fn: Any, z: Tensor) -> Tensor:
    """log q of texts (K, B, L), (K, B)."""
    return TextProduct([fn], torch.ones(1)).log_prob(z).double()


def proposed(of: Truth, fn: Any) -> Figures:
    """Measures of a proposal fn: total variation and ESS / N, both exact, and of draws with weights e^u.

    k-hat is a mean over the tasks where it is defined, None if it is defined for no task.
    """
    log_q, p = scored(fn, of.exact.samples["z"]), of.exact.probabilities.double()
    second = torch.where(p > 0, 2 * p.log() - log_q, -torch.inf).logsumexp(0)  # log E_q (p / q)^2

    def guide(*args: Tensor) -> None:
        with pyro.plate("tasks", len(of.tasks)):
            pyro.sample("z", fn)

    model = programs(untrained()).model
    runs = [Importance(model, guide, PARTICLES).run(*of.args) for _ in range(REPETITIONS)]
    large = Importance(model, guide, 4 * PARTICLES).run(*of.args)
    q = log_q.exp()
    return {
        "tv": float((((q - p).abs().sum(0) + 1 - q.sum(0)) / 2).mean()),
        "ess": mean((-second).exp()),
        "khat": None if bool(large.khat.isnan().all()) else float(large.khat.nanmean()),
        "draws_tv": mean(torch.stack([draw_quality(of.exact, run) for run in runs])),
        "log_z_error": mean(torch.stack([(r.log_evidence - of.exact.log_evidence).abs() for r in runs])),
    }


def posed(e: Experiment, told: Sequence[Told], seed: int) -> Experiment:
    """The experiment with these tasks as training data."""
    args = programs(e).encode([t.task for t in told])
    demonstrations = (*args, {"z": [*zip(*(t.z for t in told), strict=True)]})
    return replace(e, batches=e.recipe.batches(*args, seed=seed), demonstrations=demonstrations)


def learned(start: Path | None, target: str, seed: int, short: bool) -> Figures:
    """Learn a target from a saved guide (None: a fresh one): tokens until the TV is `ENOUGH`, and the TV on the way.

    The learning rate rises and falls over ``STEPS["on"]`` steps, as in every training.
    """
    family, new = TARGETS[target]
    of = truth(family, new, 2 if short else TASKS)
    e = experiment(seed=seed, checkpoint=start)
    e = posed(e, embedded_tasks(family, "train", new=new), seed)
    trainer, task = e.gflownet(), programs(e)
    way = [(0, of.tv(task.proposal(*of.args)))]

    def look(step: int, metrics: dict[str, Any]) -> None:
        if (step + 1) % LOOK == 0:
            way.append((trainer.training_tokens, of.tv(task.proposal(*of.args))))
            if way[-1][1] <= ENOUGH:
                raise StopTraining

    if way[0][1] > ENOUGH:
        steps = LOOK if short else STEPS["on"]
        trainer.fit(e.batches, steps, seed=seed, callback=look, progress=False)
    return {"way": way, "tokens": way[-1][0] if way[-1][1] <= ENOUGH else None, "scored": trainer.training_tokens}


def trained(families: Sequence[str], steps: int, seed: int, parity: int | None = None) -> tuple[Experiment, int]:
    """A guide trained on families, and the training tokens; ``parity`` leaves only every other verb of the chain."""
    e = experiment(seed=seed, families=families, recipe=replace(RECIPE, steps=steps))
    if parity is not None:
        tasks = [t for f in families for t in embedded_tasks(f, "train") if number(t.task.y) % 2 == parity]
        e = posed(e, tasks, seed)
    trainer = e.gflownet()
    trainer.fit(e.batches, steps, seed=seed, progress=False)
    return e, trainer.training_tokens


def number(ending: str) -> int:
    """The number of an ending's verb in the chain.  One of the two verbs that can happen to a thing is even."""
    return VERBS.index(ending.split()[1])


def told_one(e: Experiment, of: Truth, parity: int) -> Any:
    """The proposal of a guide that reads only one of two endings, the even or the odd one."""
    tasks = [t._replace(y=t.y if number(t.y) % 2 == parity else t.v, v="") for t in of.tasks]
    return programs(e).proposal(*programs(e).encode(tasks))


def run(cell: str, seed: int, short: bool) -> Figures:
    """Train the guide that a cell starts from, measure it, and learn the targets from it."""
    count, steps = 2 if short else TASKS, 2 if short else STEPS.get(cell, 0)
    found: Figures = {"scored": 0, "proposals": {}}
    if cell == SCRATCH:
        return found | learn(None, found, seed, short)
    both, task = truth("two endings", False, count), programs(untrained())
    prior = task.prior(both.args[0])
    e, found["scored"] = trained(TRAINED if cell == MANY else ["infilling"], steps, seed)
    if cell == MANY:
        known = {f"{family}, {kind}": truth(family, kind == "new", count) for family in FAMILIES for kind in KINDS}
        found["prior"] = {name: of.tv(task.prior(of.args[0])) for name, of in known.items()}
        found["zero-shot"] = {name: of.tv(programs(e).proposal(*of.args)) for name, of in known.items()}
        parts = over_prior(told_one(e, both, 0), told_one(e, both, 1), prior)
        fns = {ALONE[0]: prior, PROMPT: programs(e).proposal(*both.args), PARTS: parts}
        draws = [draw_quality(both.exact, both.exact.resample(PARTICLES, "multinomial")) for _ in range(8)]
        found["exact draws"] = mean(torch.stack(draws))
    else:
        (even, tokens), (odd, more) = (trained(["infilling"], steps, seed, parity) for parity in (0, 1))
        found["scored"] += tokens + more
        one, other = told_one(even, both, 0), told_one(odd, both, 1)
        view = summed(even, [even.guide_lm, odd.guide_lm])
        each = (
            TextMixture([one, other], torch.zeros(2)),
            over_prior(one, other, prior),
            TextProduct([one, other], torch.ones(2)),
            programs(even).proposal(*both.args, lm=view),
        )
        fns = dict(zip((*ALONE[1:], *COMPOSED), (one, other, *each), strict=True))
    found["proposals"] = {name: proposed(both, fn) for name, fn in fns.items()}
    with TemporaryDirectory() as folder:
        e.guide_lm.save_pretrained(folder)
        return found | learn(Path(folder), found, seed, short)


def learn(start: Path | None, found: Figures, seed: int, short: bool) -> Figures:
    """Learn every target from a start."""
    ways = {target: learned(start, target, seed, short) for target in TARGETS}
    return {
        "learned": ways,
        "trained": found["scored"],
        "scored": found["scored"] + sum(way["scored"] for way in ways.values()),
    }


def over_prior(one: Any, other: Any, prior: Any) -> TextProduct:
    """The product of two posteriors' next-token probabilities, divided by those of their prior."""
    return TextProduct([one, other, prior], torch.tensor([1.0, 1.0, -1.0]))


@torch.no_grad()
def summed(e: Experiment, guides: Sequence[LanguageModel]) -> LanguageModel:
    """A view of the experiment's language model with the sum of these adapters.

    For LoRA this is one adapter with all their ranks: [B_1 B_2] [A_1; A_2] = B_1 A_1 + B_2 A_2.
    """
    own, count = e.recipe.adapter, len(guides)
    adapter = own | {"r": own["r"] * count, "lora_alpha": own["lora_alpha"] * count}
    view = replace(e.recipe, adapter=adapter).guide_lm(e.lm)
    parts = [dict(guide.named_parameters()) for guide in guides]
    for name, p in view.named_parameters():
        of = [
            part[name.replace(f".{view.adapter_name}.", f".{guide.adapter_name}.")]
            for part, guide in zip(parts, guides, strict=True)
        ]
        p.copy_(torch.cat(of, 0 if ".lora_A." in name else 1))
    return view


def composed(results: Results) -> dict[str, list[Figures]]:
    """The figures of every proposal for two endings, one per seed."""
    known: dict[str, list[Figures]] = {}
    for cell in CELLS:
        for found in results[cell]:
            for name, figures in found["proposals"].items():
                known.setdefault(name, []).append(figures)
    return {name: known[name] for name in (*ALONE, *COMPOSED, PROMPT, PARTS)}


def tokens_of(results: Results, target: str) -> dict[str, list[int | None]]:
    """Tokens to learn a target from every start; None if it was not learned."""
    return {cell: [found["learned"][target]["tokens"] for found in results[cell]] for cell in STARTS}


def amount(values: Sequence[int | None], least: int) -> str:
    """Tokens in words."""
    if any(v is None for v in values):
        reached = sum(v is not None for v in values)
        return f"more than {least:,}" if not reached else f"{reached} of {len(values)} seeds"
    return f"{round(average(v for v in values if v is not None)):,}"


def report(results: Results) -> str:
    """The tables and the claims."""
    text = opening(
        "Can one guide serve many posteriors, if it reads a description of the task? And can guides be combined "
        "without training?",
        "This is not an experiment of the paper ([transfer.md](transfer.md)). A task asks for a text of which "
        "something is known: what comes before it, what follows it, another thing that might have followed it, a word "
        "in it, or a temperature. Families of tasks differ in what is known. One guide reads a description of the task "
        "and is trained on four families; *two endings* at once is a fifth family, on which it is not trained. Target: "
        f"the posterior of each task, exact over all 2,368 texts. Data: {TASKS} tasks of unseen stories for each "
        "column.",
        {
            "language model": "total variation (TV) of the untrained language model to the target, mean over tasks",
            "guide": "TV of the trained guide",
            "seen": "tasks with verbs, words and temperatures of the training tasks",
            "new": "tasks with verbs (16 of 96), words (8 of 32) and temperatures (2 of 6) that no training task has",
        },
    )
    zero = [found["zero-shot"] for found in results[MANY]]
    prior = [found["prior"] for found in results[MANY]]
    rows = [
        [family if family in TRAINED else f"{family} (never trained)"]
        + [spread(of, f"{family}, {kind}") for kind in KINDS for of in (prior, zero)]
        for family in FAMILIES
    ]
    text += markdown(["family", *(f"{of}, {kind}" for kind in KINDS for of in ("language model", "guide"))], rows)
    text += f"\nThe guide's training read {round(average(f['trained'] for f in results[MANY])):,} tokens.\n\n"
    rows = []
    for target in TARGETS:
        for cell, start in STARTS.items():
            runs = [found["learned"][target] for found in results[cell]]
            least = min(run["scored"] for run in runs)
            first, last = ([{"tv": run["way"][i][1]} for run in runs] for i in (0, -1))
            tokens = amount([run["tokens"] for run in runs], least)
            rows.append([target, start, spread(first, "tv"), spread(last, "tv"), tokens])
    text += (
        f"Training on a target, from three starts, until the TV is {ENOUGH:g} or for {STEPS['on']} steps. The last "
        f"column has the training tokens to a TV of {ENOUGH:g}, or how many seeds came so near:\n\n"
    )
    text += markdown(["target", "from", "TV at the start", "TV at the end", f"tokens to TV {ENOUGH:g}"], rows) + "\n"
    text += (
        "Proposals q for two endings. No guide was trained on two endings; the guides of even and of odd endings were "
        "each trained on every other verb.\n\n"
    )
    text += meanings(
        {
            "TV of q": "total variation between q and the target, exact",
            "ESS/N": "effective sample size of weights p/q as a share of N, exact",
            "k-hat": f"Pareto k-hat of {4 * PARTICLES} draws; undefined if it was so in a seed",
            "TV, weighted": f"total variation of {PARTICLES} draws with weights p/q; exact draws have "
            f"{spread(results[MANY], 'exact draws')}",
            "error of log Z": f"absolute error of the log evidence by {PARTICLES} draws, nats",
        }
    )
    text += "\n"
    of = composed(results)
    rows = [
        [
            SHOWN.get(name, name),
            spread(runs, "tv"),
            spread(runs, "ess"),
            "undefined" if any(r["khat"] is None for r in runs) else spread(runs, "khat", 2),
            spread(runs, "draws_tv"),
            spread(runs, "log_z_error"),
        ]
        for name, runs in of.items()
    ]
    text += markdown(["proposal", "TV of q", "ESS/N", "k-hat", "TV, weighted", "error of log Z"], rows) + "\n"
    return text + claims(results, zero, of)


def claims(results: Results, zero: list[Figures], of: dict[str, list[Figures]]) -> str:
    """The verdict on every claim."""
    text = ""

    def largest(kind: str, families: Sequence[str] = TRAINED) -> dict[str, float]:
        return {f: max(z[f"{f}, {kind}"] for z in zero) for f in families}

    def said(found: dict[str, float]) -> str:
        return "The largest TV of a seed: " + ", ".join(f"{name} {x:.3f}" for name, x in found.items()) + "."

    seen, new, both = largest("seen"), largest("new"), largest("seen", ["two endings"])
    text += verdict("one guide serves the four families (TV at most 0.05)", max(seen.values()) <= 0.05, said(seen))
    text += verdict("it serves new verbs, words and temperatures (TV at most 0.1)", max(new.values()) <= 0.1, said(new))
    text += verdict(
        "it serves two endings, which it was not trained on, from their description (TV at most 0.1)",
        both["two endings"] <= 0.1, said(both),
    )  # fmt: skip
    for target in TARGETS:
        tokens = {
            cell: [float("inf") if t is None else t for t in ts] for cell, ts in tokens_of(results, target).items()
        }
        less = all(m < min(s, o) for m, s, o in zip(tokens[MANY], tokens[SCRATCH], tokens[SINGLE], strict=True))
        text += verdict(
            f"{target}: training from the guide of four families takes fewer tokens than from scratch or infilling",
            less,
            f"Tokens to a TV of {ENOUGH:g}, by seed. "
            + "; ".join(
                f"{STARTS[cell]}: " + ", ".join("not reached" if t == float("inf") else f"{t:,}" for t in ts)
                for cell, ts in tokens.items()
            )
            + ".",
        )
    least = {name: min(r["ess"] for r in runs) for name, runs in of.items()}
    mixture, product, _, weights = COMPOSED
    text += verdict(
        "two guides that were trained separately make a proposal for both conditions: their product over the prior has "
        "an ESS/N of at least 0.5, larger than that of their mixture",
        least[product] >= 0.5 and all(a["ess"] > b["ess"] for a, b in zip(of[product], of[mixture], strict=True)),
        f"The smallest ESS/N of a seed: product {least[product]:.3f}, mixture {least[mixture]:.3f}, "
        + ", ".join(f"{name} {least[name]:.2g}" for name in ALONE)
        + ".",
    )
    text += verdict(
        "the sum of the adapters' weights has at least half of the product's ESS/N",
        all(a["ess"] >= b["ess"] / 2 for a, b in zip(of[weights], of[product], strict=True)),
        f"Its smallest ESS/N of a seed is {least[weights]:.3f}.",
    )
    return text


def told(results: Results) -> dict[str, str]:
    """The figures of `FOUND`."""
    zero = [found["zero-shot"] for found in results[MANY]]
    seen = [average(z[f"{family}, seen"] for z in zero) for family in TRAINED]
    parts = composed(results)[PARTS]
    return {
        "transfer_seeds": str(len(zero)),
        "transfer_least": f"{min(seen):.3f}",
        "transfer_most": f"{max(seen):.3f}",
        "transfer_words": f"{average(z['lexical, new'] for z in zero):.3f}",
        "transfer_described": f"{average(z['two endings, seen'] for z in zero):.3f}",
        "transfer_composed": f"{average(r['tv'] for r in parts):.3f}",
    }


def plot(results: Results, path: Path) -> None:
    """TV of the guide on every family, ESS/N of proposals, and TV during training on two targets from three starts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1))
    left, right = above.subplots(1, 2, width_ratios=(1, 1.15))
    zero = [found["zero-shot"] for found in results[MANY]]
    prior = [found["prior"] for found in results[MANY]]
    for k, (kind, colour) in enumerate(zip(KINDS, ("tab:blue", "tab:orange"), strict=True)):
        for i, family in enumerate(FAMILIES):
            at, name = i + (k - 0.5) * 0.36, f"{family}, {kind}"
            left.hlines(average(p[name] for p in prior), at - 0.16, at + 0.16, color="k", lw=1)
            left.bar(at, average(z[name] for z in zero), 0.32, color=colour, label=kind if not i else None)
            left.plot([at] * len(zero), [z[name] for z in zero], "k.", ms=3)
    left.set_xticks(range(len(FAMILIES)), [f if f in TRAINED else f"{f}\n(not trained)" for f in FAMILIES], fontsize=8)
    left.set(ylabel="TV to the exact posterior", ylim=(0, 1))
    left.set_title("One guide that reads the task; lines: language model", fontsize=9, loc="left")
    told = {"title": "verbs, words, T", "title_fontsize": 8}
    left.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(0.15, 0.72), **told)
    names = composed(results)
    for i, (name, runs) in enumerate(names.items()):
        colour = "tab:gray" if name in ALONE else "tab:purple" if name in COMPOSED else "tab:blue"
        right.barh(i, average(r["ess"] for r in runs), color=colour)
        right.plot([r["ess"] for r in runs], [i] * len(runs), "k.", ms=3)
        worth = max(r["ess"] for r in runs)
        right.text(worth + 0.015, i, f"TV {average(r['tv'] for r in runs):.2f}", va="center", fontsize=8)
    right.set_yticks(range(len(names)), list(names), fontsize=8)
    right.invert_yaxis()
    right.set(xlim=(0, 1.1), xlabel="ESS/N for two endings; no guide was trained on two")
    right.set_title("Combined guides", fontsize=9, loc="left")
    colours = dict(zip(STARTS, ("tab:gray", "tab:green", "tab:blue"), strict=True))
    for axis, target in zip(below.subplots(1, 2, sharey=True), TARGETS, strict=True):
        for cell, start in STARTS.items():
            for j, found in enumerate(results[cell]):
                tokens, tv = zip(*found["learned"][target]["way"], strict=True)
                axis.plot([t / 1000 for t in tokens], tv, color=colours[cell], lw=1.2, label=start if not j else None)
        axis.axhline(ENOUGH, color="k", lw=0.8, ls="--")
        axis.set(xlabel="thousand training tokens", ylim=(0, 1))
        axis.set_title(f"Training on a target: {target}", fontsize=9, loc="left")
    below.axes[0].set_ylabel("TV to the exact posterior")
    below.axes[0].legend(fontsize=8, frameon=False)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=120)


STUDY = Study("transfer", "Transfer: one guide for many posteriors", CELLS, run, report, plot, told=told)
