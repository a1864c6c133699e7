"""Transfer across tasks: one guide for many posteriors, what it is worth on others, and guides put together.

Not an experiment of the paper.  The claims are this package's own, written down before the seeds ran.
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
from torch.optim.lr_scheduler import LambdaLR

from lmppl import LanguageModel
from lmppl.distributions import TextMixture, TextProduct
from lmppl.files import replacing
from lmppl.inference import Enumerated, Importance, StopTraining
from lmppl.inference.judging.quality import draw_quality
from lmppl.models import Experiment
from lmppl.models.transfer import FAMILIES, RECIPE, TRAINED, Told, embedded_tasks, experiment

from .study import Figures, Results, Study, markdown, spread, verdict
from .targets import mean, programs

MANY, SCRATCH, SINGLE = "guide of four families", "from scratch", "guides of one family"
CELLS = MANY, SCRATCH, SINGLE
SETS = [(family, new) for family in FAMILIES for new in (False, True)]
TARGETS = {"an ending and words": ("both", False), "unseen words": ("lexical", True)}  # to be learned
ENOUGH = 0.05  # total variation
STEPS = {MANY: 400, SINGLE: 200, "on": 200}
LOOK = 10  # steps between looks at the distance
ON_RATE = 2e-3  # of learning a target, constant after the warm-up
PARTICLES, REPETITIONS = 64, 4
STARTS = {SCRATCH: SCRATCH, SINGLE: "guide of infilling", MANY: MANY}
PROMPT, PARTS = "guide of four families, told both", "its two prompts, product over the prior"
COMPOSED = "mixture of guides", "product of guides over the prior", "product of guides", "sum of adapters, told both"
ALONE = "language model", "guide of infilling", "guide of words"


class Truth:
    """The test tasks of a set, and their exact posteriors."""

    def __init__(self, family: str, new: bool, count: int):
        e = untrained()
        self.tasks = [told.task for told in embedded_tasks(family, "test", new=new)[:count]]
        self.args = programs(e).encode(self.tasks)
        assert e.exact is not None
        self.exact: Enumerated = e.exact.run(*self.args)

    def tv(self, fn: Any) -> float:
        """The total variation of texts fn, a mean over tasks; all texts are scored, from their common beginnings on."""
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
    """What a proposal fn is worth: its total variation, exactly its ESS / N, and draws corrected by u."""
    log_q, p = scored(fn, of.exact.samples["z"]), of.exact.probabilities.double()
    second = torch.where(p > 0, 2 * p.log() - log_q, -torch.inf).logsumexp(0)  # log E_q (p / q)^2

    def guide(*args: Tensor) -> None:
        with pyro.plate("tasks", len(of.tasks)):
            pyro.sample("z", fn)

    model = programs(untrained()).model
    runs = [Importance(model, guide, PARTICLES).run(*of.args) for _ in range(REPETITIONS)]
    large = Importance(model, guide, 16 * PARTICLES).run(*of.args)
    return {
        "tv": of.tv(fn),
        "ess": mean((-second).exp()),
        "khat": mean(large.khat.nan_to_num(0.0)),
        "draws_tv": mean(torch.stack([draw_quality(of.exact, run) for run in runs])),
        "log_z_error": mean(torch.stack([(r.log_evidence - of.exact.log_evidence).abs() for r in runs])),
    }


def posed(e: Experiment, told: Sequence[Told], seed: int) -> Experiment:
    """The experiment with these tasks to train on."""
    args = programs(e).encode([t.task for t in told])
    demonstrations = (*args, {"z": [*zip(*(t.z for t in told), strict=True)]})
    return replace(e, batches=e.recipe.batches(*args, seed=seed), demonstrations=demonstrations)


def learned(start: Path | None, target: str, seed: int, short: bool) -> Figures:
    """Learn a target from a saved guide (None: a fresh one): tokens until it is near enough, and the way there."""
    family, new = TARGETS[target]
    of = truth(family, new, 2 if short else 8)
    e = experiment(seed=seed, checkpoint=start, recipe=replace(RECIPE, learning_rate=ON_RATE))
    e = posed(e, embedded_tasks(family, "train", new=new), seed)
    trainer, task = e.gflownet(), programs(e)
    way = [(0, of.tv(task.proposal(*of.args)))]

    def look(step: int, metrics: dict[str, Any]) -> None:
        if (step + 1) % LOOK == 0:
            way.append((trainer.training_tokens, of.tv(task.proposal(*of.args))))
            if way[-1][1] <= ENOUGH:
                raise StopTraining

    if way[0][1] > ENOUGH:
        rate = LambdaLR(trainer.optimizer, lambda step: min(1.0, (step + 1) / 10))
        steps = LOOK if short else STEPS["on"]
        trainer.fit(e.batches, steps, seed=seed, scheduler=rate, callback=look, progress=False)
    return {"way": way, "tokens": way[-1][0] if way[-1][1] <= ENOUGH else None, "scored": trainer.training_tokens}


def trained(families: Sequence[str], steps: int, seed: int) -> tuple[Experiment, int]:
    """A guide trained on families, and the tokens that it took."""
    e = experiment(seed=seed, families=families, recipe=replace(RECIPE, steps=steps))
    trainer = e.gflownet()
    trainer.fit(e.batches, steps, seed=seed, progress=False)
    return e, trainer.training_tokens


def alone(e: Experiment, of: Truth, **blank: str) -> Any:
    """What a guide proposes that is told of the tasks all but this."""
    return programs(e).proposal(*programs(e).encode([task._replace(**blank) for task in of.tasks]))


def run(cell: str, seed: int, short: bool) -> Figures:
    """Train what a cell starts from, look at what it is worth as it is, and learn the targets from there."""
    count = 2 if short else 8
    both, task = truth("both", False, count), programs(untrained())
    prior = task.prior(both.args[0])
    found: Figures = {"scored": 0}
    if cell == SCRATCH:
        known = {f"{family}, {'unseen' if new else 'seen'}": truth(family, new, count) for family, new in SETS}
        found["prior"] = {name: of.tv(task.prior(of.args[0])) for name, of in known.items()}
        found["proposals"] = {ALONE[0]: proposed(both, prior)}
        draws = [draw_quality(both.exact, both.exact.resample(PARTICLES, "multinomial")) for _ in range(8)]
        found["exact draws"] = mean(torch.stack(draws))
        return found | learn(None, found, seed, short)
    steps = 2 if short else STEPS[cell]
    with TemporaryDirectory() as folder:
        if cell == MANY:
            e, found["scored"] = trained(TRAINED, steps, seed)
            known = {f"{family}, {'unseen' if new else 'seen'}": truth(family, new, count) for family, new in SETS}
            found["zero-shot"] = {name: of.tv(programs(e).proposal(*of.args)) for name, of in known.items()}
            prompt = programs(e).proposal(*both.args)
            parts = over_prior(alone(e, both, w=""), alone(e, both, y=""), prior)
            found["proposals"] = {PROMPT: proposed(both, prompt), PARTS: proposed(both, parts)}
        else:
            e, tokens = trained(["infilling"], steps, seed)
            words, more = trained(["lexical"], steps, seed)
            found["scored"] = tokens + more
            of_y, of_w = alone(e, both, w=""), alone(words, both, y="")
            view = summed(e, [e.guide_lm, words.guide_lm])
            fns = [
                TextMixture([of_y, of_w], torch.zeros(2)),
                over_prior(of_y, of_w, prior),
                TextProduct([of_y, of_w], torch.ones(2)),
                programs(e).proposal(*both.args, lm=view),
            ]
            apart = dict(zip(ALONE[1:], (of_y, of_w), strict=True))
            found["proposals"] = {
                k: proposed(both, fn) for k, fn in {**apart, **dict(zip(COMPOSED, fns, strict=True))}.items()
            }
            own = {"infilling": e, "lexical": words}
            found["own task"] = {
                f: truth(f, False, count).tv(programs(g).proposal(*truth(f, False, count).args)) for f, g in own.items()
            }
        e.guide_lm.save_pretrained(folder)
        return found | learn(Path(folder), found, seed, short)


def learn(start: Path | None, found: Figures, seed: int, short: bool) -> Figures:
    """All targets from a start."""
    ways = {target: learned(start, target, seed, short) for target in TARGETS}
    return {
        "learned": ways,
        "trained": found["scored"],
        "scored": found["scored"] + sum(way["scored"] for way in ways.values()),
    }


def over_prior(one: Any, other: Any, prior: Any) -> TextProduct:
    """The product of two posteriors' next tokens over those of their prior."""
    return TextProduct([one, other, prior], torch.tensor([1.0, 1.0, -1.0]))


@torch.no_grad()
def summed(e: Experiment, guides: Sequence[LanguageModel]) -> LanguageModel:
    """A view of the experiment's language model whose weights are the base's plus all of these adapters' differences.

    Of LoRA that is an adapter of all their ranks together: [B_1 B_2] [A_1; A_2] = B_1 A_1 + B_2 A_2.
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
    """What every proposal for an ending and words was worth, over seeds."""
    known: dict[str, list[Figures]] = {}
    for cell in CELLS:
        for found in results.get(cell, []):
            for name, figures in found["proposals"].items():
                known.setdefault(name, []).append(figures)
    return {name: known[name] for name in (*ALONE, *COMPOSED, PROMPT, PARTS) if name in known}


def tokens_of(results: Results, target: str) -> dict[str, list[int | None]]:
    """Tokens to learn a target from every start; None where it was not learned."""
    return {cell: [found["learned"][target]["tokens"] for found in results.get(cell, [])] for cell in STARTS}


def amount(values: Sequence[int | None], least: int) -> str:
    """Tokens in words."""
    if any(v is None for v in values):
        reached = sum(v is not None for v in values)
        return f"more than {least:,}" if not reached else f"{reached} of {len(values)} seeds"
    return f"{round(average(v for v in values if v is not None)):,}"


def report(results: Results) -> str:
    """The tables, and a sentence a claim."""
    text = (
        "Not an experiment of the paper ([transfer.md](transfer.md)). Tasks leave blank what is not known of a text: "
        "its beginning, what follows it, words of which it has one, a temperature. One guide reads a description of "
        "that and is trained on four families of blanks; an ending *and* words at once are a fifth, which it is not "
        "trained on. Unseen: 16 of the 96 things as words (in what is observed, of reverse), 16 of the 96 verbs as "
        "endings, two temperatures of six. Total variation (TV) is exact, over all 2,368 texts, on 8 unseen tasks of "
        "each set.\n\n"
    )
    zero = [found["zero-shot"] for found in results.get(MANY, [])]
    prior = [found["prior"] for found in results.get(SCRATCH, [])]
    if zero and prior:
        rows = [
            [f"{family}" + ("" if family in TRAINED else " (never trained)")]
            + [spread(of, f"{family}, {kind}") for kind in ("seen", "unseen") for of in (prior, zero)]
            for family in FAMILIES
        ]
        text += markdown(
            ["family", "language model, seen", "guide, seen", "language model, unseen", "guide, unseen"], rows
        )
        text += f"\nTraining tokens of the guide: {round(average(f['trained'] for f in results[MANY])):,}.\n\n"
    rows = []
    for target in TARGETS:
        for cell, start in STARTS.items():
            runs = [found["learned"][target] for found in results.get(cell, [])]
            if runs:
                least = min(run["scored"] for run in runs)
                first, last = ([{"tv": run["way"][i][1]} for run in runs] for i in (0, -1))
                rows.append(
                    [target, start, spread(first, "tv"), spread(last, "tv"), amount([r["tokens"] for r in runs], least)]
                )
    text += f"Learning a target, until its TV is {ENOUGH:g} or for {STEPS['on']} steps of the same tasks:\n\n"
    text += markdown(["target", "from", "TV at the start", "TV at the end", "tokens to get there"], rows) + "\n"
    text += (
        f"Proposals for an ending and words, without training on both. ESS/N of weights p/q, exact; k-hat of "
        f"{16 * PARTICLES} draws; the TV of {PARTICLES} draws corrected by u (exact draws: "
        f"{spread(results.get(SCRATCH, [{'exact draws': None}]), 'exact draws')}), and the error of their log Z, nats:"
        "\n\n"
    )
    of = composed(results)
    rows = [
        [
            name,
            spread(runs, "tv"),
            spread(runs, "ess"),
            spread(runs, "khat", 2),
            spread(runs, "draws_tv"),
            spread(runs, "log_z_error"),
        ]
        for name, runs in of.items()
    ]
    text += markdown(["proposal", "TV of q", "ESS/N", "k-hat", "TV, corrected", "error of log Z"], rows) + "\n"
    return text + claims(results, zero, of)


def claims(results: Results, zero: list[Figures], of: dict[str, list[Figures]]) -> str:
    """A verdict each."""
    if not all(cell in results for cell in CELLS):
        return ""
    text = ""

    def largest(kind: str, families: Sequence[str] = TRAINED) -> dict[str, float]:
        return {f: max(z[f"{f}, {kind}"] for z in zero) for f in families}

    def said(found: dict[str, float]) -> str:
        return ", ".join(f"{name} {x:.3f}" for name, x in found.items()) + " (the largest of a seed)."

    seen, new, both = largest("seen"), largest("unseen"), largest("seen", ["both"])
    text += verdict("one guide serves the four families (TV at most 0.05)", max(seen.values()) <= 0.05, said(seen))
    text += verdict("and what none of its training tasks had (TV at most 0.1)", max(new.values()) <= 0.1, said(new))
    text += verdict(
        "it serves a combination that it never saw, by its description alone (TV at most 0.1)",
        both["both"] <= 0.1, said(both),
    )  # fmt: skip
    for target in TARGETS:
        tokens = {
            cell: [float("inf") if t is None else t for t in ts] for cell, ts in tokens_of(results, target).items()
        }
        less = all(m < min(s, o) for m, s, o in zip(tokens[MANY], tokens[SCRATCH], tokens[SINGLE], strict=True))
        text += verdict(
            f"{target}: from the guide of four families it takes fewer tokens than from scratch or infilling",
            less,
            "; ".join(
                f"{STARTS[cell]} " + ", ".join("not in time" if t == float("inf") else f"{t:,}" for t in ts)
                for cell, ts in tokens.items()
            )
            + ".",
        )
    least = {name: min(r["ess"] for r in runs) for name, runs in of.items()}
    mixture, product, _, weights = COMPOSED
    text += verdict(
        "two guides that were trained apart are together a proposal for both conditions: the product over the prior "
        "has ESS/N of 0.5 or more, above the mixture's",
        least[product] >= 0.5 and all(a["ess"] > b["ess"] for a, b in zip(of[product], of[mixture], strict=True)),
        f"Smallest of a seed: product {least[product]:.3f}, mixture {least[mixture]:.3f}, "
        + ", ".join(f"{name} {least[name]:.2g}" for name in ALONE)
        + ".",
    )
    text += verdict(
        "adding the adapters' weights does as well as half of the product's ESS/N",
        all(a["ess"] >= b["ess"] / 2 for a, b in zip(of[weights], of[product], strict=True)),
        f"Smallest {least[weights]:.3f}.",
    )
    return text


def plot(results: Results, path: Path) -> None:
    """Zero-shot distances, the way to two targets from three starts, and what proposals are worth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1))
    left, right = above.subplots(1, 2, width_ratios=(1, 1.15))
    zero = [found["zero-shot"] for found in results.get(MANY, [])]
    prior = [found["prior"] for found in results.get(SCRATCH, [])]
    for k, (kind, colour) in enumerate((("seen", "tab:blue"), ("unseen", "tab:orange"))):
        for i, family in enumerate(FAMILIES):
            at, name = i + (k - 0.5) * 0.36, f"{family}, {kind}"
            if prior:
                left.hlines(average(p[name] for p in prior), at - 0.16, at + 0.16, color="k", lw=1)
            if zero:
                left.bar(at, average(z[name] for z in zero), 0.32, color=colour, label=kind if not i else None)
                left.plot([at] * len(zero), [z[name] for z in zero], "k.", ms=3)
    left.set_xticks(range(len(FAMILIES)), [f if f in TRAINED else f"{f}\n(not trained)" for f in FAMILIES], fontsize=8)
    left.set(ylabel="TV to the exact posterior", ylim=(0, 1))
    left.set_title("One guide as it is, by its description; lines: language model", fontsize=9, loc="left")
    left.legend(fontsize=8, frameon=False, title="words, verbs, temperatures", title_fontsize=8)
    names = composed(results)
    for i, (name, runs) in enumerate(names.items()):
        colour = "tab:gray" if name in ALONE else "tab:purple" if name in COMPOSED else "tab:blue"
        right.barh(i, average(r["ess"] for r in runs), color=colour)
        right.plot([r["ess"] for r in runs], [i] * len(runs), "k.", ms=3)
    right.set_yticks(range(len(names)), list(names), fontsize=8)
    right.invert_yaxis()
    right.set(xlim=(0, 1), xlabel="ESS/N for an ending and words; nothing was trained on both")
    right.set_title("Guides put together, corrected by u", fontsize=9, loc="left")
    colours = dict(zip(STARTS, ("tab:gray", "tab:green", "tab:blue"), strict=True))
    for axis, target in zip(below.subplots(1, 2, sharey=True), TARGETS, strict=True):
        for cell, start in STARTS.items():
            for j, found in enumerate(results.get(cell, [])):
                tokens, tv = zip(*found["learned"][target]["way"], strict=True)
                axis.plot([t / 1000 for t in tokens], tv, color=colours[cell], lw=1.2, label=start if not j else None)
        axis.axhline(ENOUGH, color="k", lw=0.8, ls="--")
        axis.set(xlabel="thousand training tokens", ylim=(0, 1))
        axis.set_title(f"Learning a target: {target}", fontsize=9, loc="left")
    below.axes[0].set_ylabel("TV to the exact posterior")
    below.axes[0].legend(fontsize=8, frameon=False)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=120)


STUDY = Study("transfer", "Transfer: one guide for many posteriors", CELLS, run, report, plot, paired=False)
