"""Preferences as a distribution: texts for people who disagree, compared with the exact mixture over kinds of people.

Not an experiment of the paper.  The claims are our own.  They were written down after a pilot on seed 100.  The rows
with a utility for every sort of text, and what is said about them, came after all seeds had run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean as average
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmppl.embedded.stories import ADJECTIVES
from lmppl.files import replacing
from lmppl.inference import DirectPreferenceOptimization, Trainer
from lmppl.models import Experiment, Preferences
from lmppl.models.constrained import beginnings, next_sentence
from lmppl.models.preferences import GROUPS, KINDS, RECIPE, TOLD, People, choices, experiment, flat, infer, pooled
from lmppl.models.programs.preferences import features

from .study import Figures, Results, Study, markdown, meanings, opening, spread, verdict
from .targets import perplexity, ppo, programs

EXACT, GFLOWNET, POOLED = "exact", "GFlowNet for each taste", "GFlowNet, one utility"
MATCHED, REWARD, DPO = "PPO, one utility, matched KL", "PPO, one utility, reward only", "DPO"
CELLS = EXACT, GFLOWNET, POOLED, MATCHED, REWARD, DPO
MIXTURE, PRIOR, FITTED, MEAN = "exact mixture", "language model", "one utility, exact", "mean utility, exact"
NEAREST = "one utility, nearest power, exact"
SORTS, OF_MIXTURE = "utility of every sort, exact", "utility of every sort, from the mixture, exact"
TILTS = [0.25 * n for n in range(65)]  # powers of e^u
STEPS = {GFLOWNET: 300, POOLED: 200, MATCHED: 150, REWARD: 150, DPO: 120}
DPO_RATE = 1e-3  # 120 steps of 32 choices, nine passes; chosen of 40 and 120 on seed 100
SELDOM = 1e-3  # tastes with a smaller probability are left out of a guide's mixture
THINGS = ("food", "toys", "other")
DRAWS = 10  # texts among which a person looks for one
FOUND = (  # in the first lines of docs/results.md
    "TV to the exact mixture over people: {preferences_tv} for a guide that is told the taste, {preferences_one} for "
    "one utility fitted to all choices, {preferences_power} for the power of it that is closest. Share of texts for "
    "the smallest kind: {preferences_minority} in the mixture, {preferences_tv_minority}, {preferences_one_minority} "
    "and {preferences_power_minority} in these ({preferences_seeds} seeds)"
)


class World(NamedTuple):
    """All texts after the test prompts, and the utilities of the kinds of people."""

    people: People
    x: Tensor  # (B, L) test prompts
    z: Tensor  # (K, L) all texts
    log_p: Tensor  # (K, B)
    phi: Tensor  # (K, F)

    def tilted(self, w: Tensor, phi: Tensor | None = None) -> Tensor:
        """p(z | x) e^(w phi) normalised, (K, B)."""
        return (self.log_p + ((self.phi if phi is None else phi) @ w.double())[:, None]).softmax(0)

    def mixture(self) -> Tensor:
        """The exact mixture, (K, B)."""
        m, tastes = self.people.next_taste.double(), self.people.annotators.tastes
        return sum((share * self.tilted(w) for share, w in zip(m, tastes, strict=True)), torch.zeros(()))

    def kinds(self) -> Tensor:
        """The true kinds' utilities of the texts, (K, kinds)."""
        names, strength = list(flat(GROUPS)), float(self.people.annotators.tastes.max())
        w = torch.tensor([[strength * (name in liked) for _, liked in KINDS] for name in names]).double()
        return self.phi @ w

    def figures(self, q: Tensor) -> Figures:
        """Measures of a distribution over the texts, (K, B)."""
        utility = self.kinds()
        all_ = (utility == utility.amax(0)).double()  # (K, kinds)
        p, of_kind = self.log_p.exp(), all_.T @ q  # (kinds, B)
        return {
            "tv": ((q - self.mixture()).abs().sum(0) / 2).mean().item(),
            "kinds": of_kind.mean(1).tolist(),
            "found": (1 - (1 - of_kind) ** DRAWS).mean(1).tolist(),
            "preferred": preferred(q, p, utility).mean(1).tolist(),
            "perplexity": perplexity(q).mean().item(),
            "cells": (sorts(self.phi).T @ q).mean(1).view(len(ADJECTIVES), len(THINGS)).tolist(),
        }


def sorts(phi: Tensor) -> Tensor:
    """The pair of adjective and thing of a text, one-hot: (..., F) to (..., adjectives * things)."""
    adjectives, things = phi[..., : len(ADJECTIVES)], phi[..., len(ADJECTIVES) :]
    things = torch.cat([things, 1 - things.sum(-1, keepdim=True)], -1)
    return (adjectives[..., None] * things[..., None, :]).flatten(-2)


def preferred(q: Tensor, p: Tensor, utility: Tensor) -> Tensor:
    """The probability that each kind chooses a text of q rather than one of p, (kinds, B).

    q and p have shape (K, B), utility (K, kinds); a kind has few different utilities.
    """
    found = []
    for u in utility.unbind(-1):
        levels, of = u.unique(return_inverse=True)
        mass = [torch.zeros(len(levels), x.shape[1], dtype=x.dtype).index_add(0, of, x) for x in (q, p)]  # (levels, B)
        chosen = torch.sigmoid(levels[:, None] - levels)
        found.append(torch.einsum("lb,lm,mb->b", mass[0], chosen, mass[1]))
    return torch.stack(found)


@cache
@torch.no_grad()
def world(prompts: int) -> World:
    e, people = experiment(), infer(choices(), GROUPS)
    task = programs(e)
    z = next_sentence(e.lm).texts()
    x = e.lm.encode([x for (x,) in beginnings()[2][:prompts]])
    log_p = task.completion(e.lm, x).log_prob(z[:, None]).double()
    return World(people, x, z, log_p, task.features(z).double())


@torch.no_grad()
def density(task: Preferences, of: World, w: Tensor) -> Tensor:
    """q of all texts after the test prompts, for one utility: (K, B)."""
    return task.proposal(of.x, w.expand(len(of.x), -1)).log_prob(of.z[:, None]).double().exp()


def run(cell: str, seed: int, short: bool) -> Figures:
    """Train one method, and compare its distribution with the exact mixture."""
    of, steps = world(2 if short else 8), 2 if short else STEPS.get(cell, 0)
    one = pooled(of.people.d, of.people.y)
    m, tastes = of.people.next_taste.double(), of.people.annotators.tastes
    if cell == EXACT:
        mean = (m[:, None] * tastes).sum(0)
        every, sort = utility_of_sorts(), sorts(of.phi)
        whole = ((sort.T @ of.mixture()).sum(1) / (sort.T @ of.log_p.exp()).sum(1)).log()
        exact = {
            MIXTURE: of.mixture(), PRIOR: of.log_p.exp(), FITTED: of.tilted(one), MEAN: of.tilted(mean),
            SORTS: of.tilted(every, sort), OF_MIXTURE: of.tilted(whole, sort),
        }  # fmt: skip
        found: Figures = {name: of.figures(q) for name, q in exact.items()}
        swept = [{"tilt": t, **of.figures(of.tilted(t * one))} for t in TILTS]
        found |= {"swept": swept, NEAREST: min(swept, key=lambda f: f["tv"])}
        found |= {"sorts": min((of.figures(of.tilted(t * every, sort)) for t in TILTS), key=lambda f: f["tv"])}
        found |= {"alike": [alike([*ADJECTIVES]), alike([*TOLD.values()])]}
        return found | {"shares": [m[taste(tastes, liked)].item() for _, liked in KINDS], "fitted": one.tolist()}
    e = experiment(seed=seed, recipe=replace(RECIPE, steps=steps))
    if cell == GFLOWNET:
        trainer: Trainer = e.gflownet()
        trainer.fit(e.batches, steps, seed=seed, progress=False)
        often = (m > SELDOM).nonzero()[:, 0]
        share = m[often] / m[often].sum()
        each = [density(programs(e), of, tastes[g]) for g in often]
        q = sum((s * x for s, x in zip(share, each, strict=True)), torch.zeros(()))
        own = [(x - of.tilted(tastes[g])).abs().sum(0).mean() / 2 for g, x in zip(often, each, strict=True)]
        all_ = [(density(programs(e), of, w) - of.tilted(w)).abs().sum(0).mean() / 2 for w in tastes]
        more = {"each": sum(float(s * tv) for s, tv in zip(share, own, strict=True)), "worst": float(max(all_))}
    else:
        e = unaware(e, one)
        trainer = methods(cell, e)
        trainer.fit(e.batches if cell != DPO else pairs(e, one, seed), steps, seed=seed, progress=False)
        q, more = density(programs(e), of, one), {}
    return of.figures(q) | more | {"scored": trainer.training_tokens}


def utility_of_sorts() -> Tensor:
    """The utility with a number for every sort of text under which all choices are most probable."""
    names, told = flat(GROUPS), choices()
    d = torch.stack([sorts(features(c.chosen, names)) - sorts(features(c.rejected, names)) for c in told])
    return pooled(d[None], torch.ones(1, len(told)))


@torch.no_grad()
def alike(words: Sequence[str]) -> float:
    """The smallest cosine of the story LM's embeddings of two of these words."""
    lm = experiment().lm
    of = lm.model.get_input_embeddings()(torch.tensor([lm.token_id(f" {word}") for word in words]))
    of = of / of.norm(dim=-1, keepdim=True)
    return float((of @ of.T).min())


def taste(tastes: Tensor, liked: Sequence[str]) -> int:
    """The row of the taste that likes exactly this."""
    asked = torch.tensor([name in liked for name in flat(GROUPS)])
    return int(((tastes > 0) == asked).all(-1).nonzero()[0, 0])


def unaware(e: Experiment, one: Tensor) -> Experiment:
    """The experiment with one utility for everyone: the guide reads only the prompt."""
    given = programs(e)
    task = Preferences(
        e.lm,
        e.guide_lm,
        properties=given.properties,
        max_tokens=given.max_tokens,
        template="{x}",
        allowed=given.allowed,
    )
    x = e.lm.encode([x for (x,) in beginnings()[0]])
    return replace(e, model=task.model, guide=task.guide, batches=e.recipe.batches(x, one.expand(len(x), -1)))


def methods(cell: str, e: Experiment) -> Trainer:
    """The trainer of a cell with one utility."""
    if cell == POOLED:
        return e.gflownet()
    if cell == DPO:  # beta 1: its optimum is then that of the others
        optimizer = e.optimizer(DPO_RATE)
        return DirectPreferenceOptimization(e.model, e.guide, optimizer=optimizer, beta=1.0)
    return ppo(e, matched=True) if cell == MATCHED else ppo(e, reward="likelihood", kl=0.0)


def pairs(e: Experiment, one: Tensor, seed: int) -> Any:
    """The observed choices in batches; every pass has its own order."""
    told = choices()
    x, best, other = (e.lm.encode([getattr(c, name) for c in told]) for name in ("prompt", "chosen", "rejected"))
    passes = e.recipe.passes(len(told), seed)

    def batch(step: int) -> tuple[Any, ...]:
        rows = passes(step)
        return x[rows], one.expand(len(rows), -1), {"z": best[rows]}, {"z": other[rows]}

    return batch


def rows(results: Results) -> list[tuple[str, list[Figures]]]:
    """The rows of the table: their names and the figures of each seed."""
    names = MIXTURE, PRIOR, FITTED, NEAREST, SORTS, MEAN, OF_MIXTURE
    exact = [(name, [r[name] for r in results[EXACT]]) for name in names]
    return exact[:1] + [(GFLOWNET, results[GFLOWNET])] + exact[1:] + [(c, results[c]) for c in CELLS[2:]]


def report(results: Results) -> str:
    """The table and the claims."""
    exact = results[EXACT][0]
    shares = exact["shares"]
    liked = [" ".join(names) for _, names in KINDS]
    total = sum(count for count, _ in KINDS)
    shown = ", ".join(
        f"{like} {count / total:.2f} (posterior {s:.2f})"
        for (count, _), like, s in zip(KINDS, liked, shares, strict=True)
    )

    def row(name: str, runs: list[Figures]) -> list[str]:
        apart = [{"a": r["kinds"][k], "b": r["preferred"][k]} for k in range(len(KINDS)) for r in runs]
        of = [apart[k * len(runs) : (k + 1) * len(runs)] for k in range(len(KINDS))]
        tokens = f"{round(average(r['scored'] for r in runs)):,}" if "scored" in runs[0] else ""
        return [
            name, spread(runs, "tv"), *(spread(x, "a", 2) for x in of), *(spread(x, "b", 2) for x in of),
            spread(runs, "perplexity", 0), tokens,
        ]  # fmt: skip

    header = ["method", "TV to the mixture", *(f"all of: {x}" for x in liked), *(f"chosen by: {x}" for x in liked)]
    fitted = ", ".join(f"{name} {w:.2f}" for name, w in zip(flat(GROUPS), exact["fitted"], strict=True))
    described = {
        GFLOWNET: "one guide that reads a taste; tastes are drawn from the posterior",
        FITTED: f"the Bradley-Terry utility u fitted to all choices, a sum over properties ({fitted} nats). This row "
        "is the optimum of the GFlowNet and of PPO with matched KL",
        NEAREST: f"the power of e^u that is closest to the mixture, {exact[NEAREST]['tilt']:g}",
        SORTS: "a number for each of nine sorts of text (an adjective, and food, toys or neither), fitted to the same "
        f"choices, because DPO's utility need not be a sum. The closest of its powers has a TV of "
        f"{exact['sorts']['tv']:.3f}",
        OF_MIXTURE: "here the number of every sort is log(mixture / language model)",
        MEAN: "the posterior mean of the kinds' utilities",
    }
    text = opening(
        "If people disagree, can texts be drawn for every kind of person in proportion to its share?",
        "This is not an experiment of the paper ([preferences.md](preferences.md)). Data: forty annotators of three "
        "kinds, who chose ten times each between two middles of stories. Who they are is inferred exactly. The kinds "
        f"and their shares: {shown}. Target: the mixture of the texts that each kind would have, weighted by the "
        "posterior, after 8 beginnings that no guide was trained on. All distributions are exact, over 2,304 texts.\n\n"
        f"Rows:\n\n{meanings(described)}\nColumns:",
        {
            "TV to the mixture": "total variation between the method's distribution and the target, mean over prompts",
            "all of": "share of the texts that have everything that this kind likes",
            "chosen by": "probability that this kind prefers a text of the method to one of the language model",
            "effective texts": "exp of the entropy: as many equally probable texts have this entropy",
            "training tokens": "tokens that the network read during training",
        },
    )
    text += (
        "The methods have different recipes. Steps, each of "
        f"{RECIPE.observations} prompts with {RECIPE.particles} draws: "
        + "; ".join(f"{cell} {steps}" for cell, steps in STEPS.items() if cell != DPO)
        + f". {DPO}: {STEPS[DPO]} steps, each of {RECIPE.observations} of the {len(choices())} choices, with its own "
        "learning rate. Steps, learning rates and claims were written down after a pilot on seed 100 and before these "
        "seeds ran. The rows *utility of every sort* were added after all seeds had run.\n\n"
    )
    text += markdown([*header, "effective texts", "training tokens"], [row(*r) for r in rows(results)]) + "\n"
    of_ten = ", ".join(
        f"{name} {average(r['found'][-1] for r in runs):.2f}"
        for name, runs in ((MIXTURE, [exact[MIXTURE]]), (GFLOWNET, results[GFLOWNET]), (FITTED, [exact[FITTED]]))
    )
    text += (
        f"The probability that at least one of {DRAWS} texts has everything that the smallest kind likes: {of_ten}. "
        "The smallest cosine between embeddings of adjectives in the story language model is {:.3f}; between those of "
        "the words that the guide reads instead it is {:.3f}.\n\n".format(*exact["alike"])
    )
    worst = max(r["tv"] for r in results[GFLOWNET])
    minority = {c: max(r["kinds"][-1] for r in results[c]) for c in CELLS[2:]}
    wanted, nearest, optimum = exact[MIXTURE]["kinds"][-1], exact[NEAREST], exact[FITTED]["tv"]
    text += verdict(
        "the guide that is told the taste samples the mixture over people (TV at most 0.05)", worst <= 0.05,
        f"The largest TV of a seed is {worst:.3f}. For single tastes, weighted by their shares, it is "
        f"{spread(results[GFLOWNET], 'each')}, for the worst of all tastes {spread(results[GFLOWNET], 'worst')}.",
    )  # fmt: skip
    text += verdict(
        "one utility for all drops the smallest kind (at most half of the texts that the mixture has for it)",
        max(minority.values()) <= wanted / 2,
        f"The share of texts for it is {wanted:.3f} in the mixture and {exact[PRIOR]['kinds'][-1]:.3f} in the language "
        "model. The largest of a seed: " + "; ".join(f"{c} {x:.2g}" for c, x in minority.items()) + ".",
    )
    exactly = {c: max(abs(r["tv"] - optimum) for r in results[c]) for c in (POOLED, MATCHED)}
    text += verdict(
        "the reason is the utility, not the algorithm: GFlowNet and PPO with matched KL reach its optimum (TV to the "
        "mixture within 0.01), and no power of it is near the mixture (TV at least 0.1)",
        max(exactly.values()) <= 0.01 and nearest["tv"] >= 0.1,
        f"The TV of the optimum is {optimum:.3f}, of the two methods "
        + " and ".join(f"{spread(results[c], 'tv')}" for c in exactly)
        + f". The closest power has {nearest['tv']:.3f}, with {nearest['kinds'][-1]:.3f} for the smallest kind.",
    )
    return text


def told(results: Results) -> dict[str, str]:
    """The figures of `FOUND`."""
    if not {EXACT, GFLOWNET} <= results.keys():
        return {}
    exact, runs = results[EXACT][0], results[GFLOWNET]
    found = {"preferences_seeds": str(len(runs)), "preferences_minority": f"{exact[MIXTURE]['kinds'][-1]:.2f}"}
    for name, of in (("tv", runs), ("one", [exact[FITTED]]), ("power", [exact[NEAREST]])):
        found[f"preferences_{name}"] = f"{average(r['tv'] for r in of):.3f}"
        found[f"preferences_{name}_minority"] = f"{average(r['kinds'][-1] for r in of):.2f}"
    return found


def plot(results: Results, path: Path) -> None:
    """Mass by adjective and thing for each method, with frames around what a kind likes; all powers of one utility."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    shown = [(name, runs) for name, runs in rows(results) if name not in (MEAN, FITTED, SORTS, OF_MIXTURE)]
    colours, liked = ("tab:red", "tab:green", "tab:blue"), [names for _, names in KINDS]
    figure = Figure(figsize=(9.5, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2, 1.1))
    for axis, (name, runs) in zip(above.subplots(2, 4, sharex=True, sharey=True).flatten(), shown, strict=True):
        cells = torch.tensor([r["cells"] for r in runs]).mean(0)  # (adjectives, things)
        axis.imshow(cells, cmap="Greys", vmin=0, vmax=0.6)
        for i, line in enumerate(cells.tolist()):
            for j, mass in enumerate(line):
                axis.text(j, i, f"{mass:.2f}", ha="center", va="center", color="w" if mass > 0.3 else "k", fontsize=9)
        for names, colour in zip(liked, colours, strict=True):
            at = [[*group].index(name) for group, name in zip(GROUPS, names, strict=True)]  # adjective, thing
            axis.add_patch(Rectangle((at[1] - 0.47, at[0] - 0.47), 0.94, 0.94, fill=False, ec=colour, lw=2.5))
        axis.set_title(f"{name}\nTV {average(r['tv'] for r in runs):.2f}", fontsize=8)
        axis.set_xticks(range(len(THINGS)), THINGS, fontsize=8)
        axis.set_yticks(range(len(ADJECTIVES)), ADJECTIVES, fontsize=8)
    exact, axis = results[EXACT][0], below.subplots()
    swept = [f for f in exact["swept"] if f["tilt"] <= 8]
    powers = [f["tilt"] for f in swept]
    axis.plot(powers, [f["tv"] for f in swept], color="k", label="TV to the mixture")
    for k, (names, colour) in enumerate(zip(liked, colours, strict=True)):
        axis.plot(powers, [f["kinds"][k] for f in swept], color=colour, label=f"all of: {' '.join(names)}")
        axis.axhline(exact[MIXTURE]["kinds"][k], color=colour, lw=0.8, ls="--")
    axis.set(xlabel="one utility for all: the power of e^u", ylabel="share of texts", xlim=(0, 8), ylim=(0, 1))
    axis.set_title("dashed: the share in the mixture", fontsize=8, loc="left")
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=120)


STUDY = Study("preferences", "Preferences: people who disagree", CELLS, run, report, plot, paired=False, told=told)
