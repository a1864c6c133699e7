"""Constrained generation, p(z|x) c(z): a word that the text must contain, a pattern, a classifier."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from lmppl.constraints import Constraint, regex
from lmppl.inference import Importance, Posterior
from lmppl.models import constrained
from lmppl.models.constrained import PATTERN, RECIPES, Constrained, next_sentence

from .contrastive import COLUMNS, HEADER, row
from .study import Figures, Results, Study, markdown, mean_of, opening, spread, verdict
from .targets import PARTICLES, enumerated, of_density, of_draws, programs, trained, untrained

# cell: constraint, method, steps
CELLS: dict[str, tuple[str, str, int]] = {
    "lexical-GFlowNet": ("lexical", "GFlowNet", 600),
    "lexical-PPO": ("lexical", "PPO", 150),
    "lexical-sampling": ("lexical", "sampling", 0),
    "regex-GFlowNet": ("regex", "GFlowNet", 150),
    "regex-sampling": ("regex", "sampling", 0),
    "learned-GFlowNet": ("learned", "GFlowNet", 200),
    "learned-sampling": ("learned", "sampling", 0),
}
SAMPLERS = "language model", "locally masked", "importance sampling", "SMC", "SMC, stop twist", "exact draws"


def run(cell: str, seed: int, short: bool) -> Figures:
    constraint, method, steps = CELLS[cell]
    observations, steps = (2, min(steps, 3)) if short else (None, steps)
    e = constrained.experiment(constraint=constraint, seed=seed, recipe=replace(RECIPES[constraint], steps=steps or 1))
    args = tuple(given[:observations] for given in e.test)
    exact = enumerated("constrained", observations, constraint=constraint)
    if method != "sampling":
        return trained(e, method, steps, seed, exact, args)
    found = {"evidence": exact.log_evidence.exp().mean().item(), **untrained(e, exact, args)}
    if constraint != "learned":
        found["locally masked"] = masked(programs(e), e.lm, exact, args)
    return found


def masked(task: Constrained, lm: Any, exact: Posterior, args: tuple[Any, ...]) -> Figures:
    """The language model masked token by token, with a mask for each observation."""
    found = []
    for i in range(len(args[0])):
        one = tuple(given[i : i + 1] for given in args)
        mask: Constraint = regex(lm, PATTERN)
        if len(args) > 1:
            mask = next_sentence(lm, [lm.decode(one[1])[0].strip()])
        guide = task.masked(mask, lm=lm)
        alone = truth_of(exact, i)
        draws = of_draws(alone, partial(Importance(task.model, guide, PARTICLES).run, *one))
        found.append(of_density(alone, guide, one) | draws)
    return {key: mean_of([f[key] for f in found]) for key in found[0]}


def truth_of(exact: Posterior, i: int) -> Posterior:
    """The target of observation ``i`` alone."""
    plates = replace(exact.sites.plates, sizes=(1,))
    return Posterior(
        values={name: v[:, i : i + 1] for name, v in exact.values.items()},
        log_weights=exact.log_weights[:, i : i + 1],
        log_evidence=exact.log_evidence[i : i + 1],
        sites=replace(exact.sites, plates=plates),
    )


def report(results: Results) -> str:
    text = opening(
        "Can a trained guide draw texts of the language model that satisfy a condition c, in the language model's own "
        "proportions?",
        "Target: p(z|x) c(z), with three conditions. *Lexical*: the next sentence of a story contains a given object; "
        "training never asked for this object after this beginning. *Regex*: the rest of the story matches a pattern. "
        "*Learned*: a classifier likes the next sentence. The last two are tested on beginnings that no guide was "
        "trained on. The targets are exact: every text of the embedded grammar that can satisfy the condition is "
        "enumerated. *Evidence* is the mean of c(z) over texts of the language model. *Locally masked* is the language "
        "model with a mask: at every step it forbids the tokens after which the condition cannot be met. The paper "
        "names these targets and has no figures for them.",
        COLUMNS | {"mass on the support": "probability that q gives to the texts that the target allows; under "
        "*lexical* and *regex*, that its text satisfies the condition"},
    ).rstrip("\n") + "\n"  # fmt: skip
    for constraint in constrained.CONSTRAINTS:
        sampling = results[f"{constraint}-sampling"]
        rows = [row("GFlowNet", results[f"{constraint}-GFlowNet"])]
        if f"{constraint}-PPO" in results:
            rows.append(row("PPO, reward only", results[f"{constraint}-PPO"]))
        rows += [row(name, [found[name] for found in sampling]) for name in SAMPLERS if name in sampling[0]]
        text += f"\n*{constraint.capitalize()}*, evidence {spread(sampling, 'evidence')}:\n\n" + markdown(HEADER, rows)
    worst = {c: max(f["tv"] for f in results[f"{c}-GFlowNet"]) for c in constrained.CONSTRAINTS}
    ppo, local = results["lexical-PPO"], [f["locally masked"] for f in results["regex-sampling"]]
    kept = [f["perplexity"] / f["target_perplexity"] for f in ppo]
    told = ", ".join(f"{c} {tv:.3f}" for c, tv in worst.items())
    return (
        text
        + "\n"
        + verdict(
            "the trained guide samples the constrained posterior on unseen observations",
            max(worst.values()) <= 0.05,
            f"Its largest TV of a seed (at most 0.05 was asked): {told}.",
        )
        + verdict(
            "maximising the reward loses diversity",
            max(kept) < 0.5,
            f"Among the texts that satisfy the lexical condition, PPO's guide has {spread(ppo, 'perplexity', 1)} "
            f"effective texts, the target {spread(ppo, 'target_perplexity', 1)}. {spread(ppo, 'inside')} of PPO's mass "
            "satisfies the condition.",
        )
        + verdict(
            "masking tokens is not conditioning",
            min(f["tv"] for f in local) > 0.05,
            "Masked by the pattern, the language model always satisfies the condition, but its TV is "
            f"{spread(local, 'tv')}. The lexical condition is easier: it concerns one word at the end of a sentence.",
        )
    )


STUDY = Study("constrained", "Constrained: words, a pattern, a classifier", tuple(CELLS), run, report)
