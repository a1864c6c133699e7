r"""Tempered continuation (Hu et al. 2024, section 4.1) on web sentences: likelihood and diversity.

The target is p(z|x)^(1/T).  A text z has at most 20 tokens and ends with ".", which the limit adds if it has not come
before.  p is the base model without special tokens and without tokens with line breaks, and their mass is shared among
the others: after a plain prompt a chat model would begin a turn of the user.  log p(z|x) is always p's, whatever method
wrote the text, and includes the stop.  *mean* is the mean over texts and prompts, *best* the largest of a prompt, mean
over prompts.  Diversity is the mean normalised edit distance, in tokens, between the texts of a prompt.

Prompts are lines of prompts.txt with 8 to 24 tokens, in a fixed order: 12 for the test, 12 for choices, 1,000 for
training.  No exact target is known.  A guide is judged by the gap between the importance estimate of log Z and the
ELBO, by ESS/N and by k-hat, for each prompt.  "Power sampling" is Metropolis sampling on the base model that redraws
suffixes, without training (Karan and Du 2025, arXiv 2510.14901).  "SMC" weighs and resamples the proposals of the base
model after every token.

Cost: a step of 2 x 8 texts reads about 800 tokens and takes 7 to 9.5 processor seconds.  A temperature of 100 steps
took 9 to 13 minutes, the usual decoding 11, power sampling and SMC 26: a seed takes an hour and a half.  With seed 100
and six of the prompts for choices, 100 steps at T = 0.9 ended at a gap of 1.4 nats and ESS/N 0.3 of 16 draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.paper import continuation as embedded
from benchmarks.paper.study import Figures, Headline, Results, Study, markdown, opening, paired, spread, verdict
from lmppl import LanguageModel
from lmppl.inference import SMC, GFlowNet, MetropolisHastings, Posterior
from lmppl.models import PRETRAINED, Continuation, decoding, measures
from lmppl.models.continuation import read_prompts
from lmppl.text import length

TEMPERATURES = (0.95, 0.9, 0.85, 0.8)
FIRST = 0.9  # the temperature of the headline
LIMIT = {"max_tokens": 20}
TEST, TRAIN, DRAWS, PARTICLES, MOVES = 12, 1000, 16, 64, 10  # draws are shown; particles judge the guide
SHORTEST, LONGEST = 8, 24  # tokens of a prompt
RECIPE = replace(PRETRAINED, steps=100)
GUIDE, BY_TOKEN, POWER, SEQUENTIAL = embedded.GUIDE, embedded.BY_TOKEN, "power sampling", "SMC"
CELLS = ("decoding", POWER, *(f"T={t:g}" for t in TEMPERATURES))


def plain_tokens(lm: LanguageModel) -> Tensor:
    """All tokens except special ones and those with a line break: BoolTensor (V,)."""
    special = {*lm.tokenizer.all_special_ids, *lm.tokenizer.added_tokens_decoder}
    plain = [i not in special and "\n" not in lm.decode(torch.tensor([i])) for i in range(lm.vocab_size)]
    return torch.tensor(plain, device=lm.device)


def prompts(lm: LanguageModel, data: Path) -> tuple[list[str], list[str], list[str]]:
    """Prompts for training, for choices and for the test."""
    lines = read_prompts(data / "prompts" / "prompts.txt")
    count = length(lm.encode(lines))
    fitting = [x for x, n in zip(lines, count.tolist(), strict=True) if SHORTEST <= n <= LONGEST]
    Random("prompts").shuffle(fitting)
    test, held_out = fitting[:TEST], fitting[TEST : 2 * TEST]
    return fitting[2 * TEST :][:TRAIN], held_out, test


def measured(task: Continuation, x: Tensor, family: str, setting: str, z: Tensor, **more: Any) -> Figures:
    """A row of the table: measures of the texts z (n, B, E) for each of the prompts x, and their means."""
    lm, distance = task.lm, measures.edit_distance(z)
    log_p = decoding.log_likelihood(lm, x, z, **task.text)
    each = {"log_likelihood": log_p.mean(0), "best": log_p.amax(0), "distance": distance}
    return {
        "family": family, "setting": setting, "distinct": float(measures.distinct(z).mean()),
        "words": float(length(z).float().mean()), "texts": lm.decode(z[:3, 0]), **more,
        **{key: float(value.mean()) for key, value in each.items()},
        "each": {key: value.tolist() for key, value in each.items()},
    }  # fmt: skip


def certified(posterior: Posterior) -> Figures:
    """Measures of the distance of weighted draws from the target, means over prompts."""
    u = posterior.log_weights + torch.tensor(float(posterior.num_particles)).log()
    gap = posterior.log_evidence - u.mean(0)
    return {
        "gap": float(gap.mean()), "sd": float(u.std(0).mean()), "log_z": float(posterior.log_evidence.mean()),
        "ess": float((posterior.ess / posterior.num_particles).mean()), "khat": posterior.khat.tolist(),
    }  # fmt: skip


def usual(task: Continuation, x: Tensor, n: int) -> list[Figures]:
    """Rows of the usual decoding methods."""
    lm, allowed = task.lm, task.text["allowed"]
    barred = (~allowed).nonzero()[:, 0].tolist()

    def row(family: str, setting: str = "", **options: Any) -> Figures:
        z = decoding.generate(lm, x, n, **LIMIT, suppress_tokens=barred, **options)
        return measured(task, x, family, setting, z)

    rows = [row("greedy"), row("beam", f"{n} beams", num_beams=n, length_penalty=0.0)]
    for penalty in embedded.PENALTIES:
        z = decoding.beams(lm, x, n, groups=n, penalty=penalty, allowed=allowed, **LIMIT)
        rows.append(measured(task, x, "diverse beam", f"{n} groups, penalty {penalty:g}", z))
    rows += [row("nucleus", f"p = {p:g}", do_sample=True, top_p=p) for p in (0.95, 0.9, 0.8)]
    rows += [row("top-k", f"k = {k}", do_sample=True, top_k=k) for k in (50, 10)]
    return rows + [row(BY_TOKEN, f"T = {t:g}", do_sample=True, temperature=t) for t in (1.0, *TEMPERATURES)]


def untrained(task: Continuation, x: Tensor, t: float, n: int, moves: int, particles: int) -> list[Figures]:
    """Rows of Metropolis moves that begin at draws of the base model, and of SMC, for one temperature."""
    lm, args = task.lm, (x, torch.full((len(x),), t))
    before = lm.network.tokens_scored
    z = MetropolisHastings(task.model, num_chains=n, num_samples=1, warmup=moves).run(*args).samples["z"]
    between = lm.network.tokens_scored
    rows = [measured(task, x, POWER, f"T = {t:g}", z, scored=between - before)]
    found = SMC(task.model, num_particles=particles).run(*args)
    scored = lm.network.tokens_scored - between
    z = found.resample(n, "multinomial").samples["z"]
    return [*rows, measured(task, x, SEQUENTIAL, f"T = {t:g}", z, scored=scored, **certified(found))]


def trained(
    lm: LanguageModel, parts: Sequence[Sequence[str]], t: float, seed: int, steps: int, progress: bool = False
) -> tuple[Continuation, GFlowNet]:
    """A guide trained for one temperature, and its trainer."""
    task = Continuation(lm, RECIPE.guide_lm(lm, seed), allowed=plain_tokens(lm), **LIMIT)
    x, _ = task.encode(parts[0], t)
    batches: Callable[[int], tuple[Tensor, ...]] = RECIPE.batches(x, torch.full((len(x),), t), seed=seed)
    optimizer = torch.optim.AdamW(task.guide_lm.trainable_parameters(), lr=RECIPE.learning_rate)
    trainer = GFlowNet(task.model, task.guide, RECIPE.objective(), optimizer=optimizer, num_particles=RECIPE.particles)
    trainer.fit(batches, steps, seed=seed, progress=progress)
    return task, trainer


def run(cell: str, seed: int, short: bool, lm: LanguageModel, data: Path) -> Figures:
    """Texts for unseen prompts by the usual decoding, by sampling without training, or by a trained guide."""
    parts = prompts(lm, data)
    held = parts[2][:2] if short else parts[2]
    n = 4 if short else DRAWS
    task = Continuation(lm, allowed=plain_tokens(lm), **LIMIT)
    x, _ = task.encode(held, 1.0)
    torch.manual_seed(seed)
    if cell == "decoding":
        return {"rows": usual(task, x, n)}
    if cell == POWER:
        moves, particles, several = (1, 4, TEMPERATURES[:1]) if short else (MOVES, PARTICLES, TEMPERATURES)
        return {"rows": [row for t in several for row in untrained(task, x, t, n, moves, particles)]}
    t = float(cell.removeprefix("T="))
    task, trainer = trained(lm, parts, t, seed, 2 if short else RECIPE.steps)
    torch.manual_seed(seed)
    posterior = trainer.run(x, torch.full((len(x),), t), num_particles=n if short else PARTICLES)
    row = measured(task, x, GUIDE, f"T = {t:g}", posterior.samples["z"][:n], **certified(posterior))
    return {"rows": [row], "tokens": trainer.training_tokens}


# -- the section ------------------------------------------------------------------------------------------------------


def report(results: Results) -> str:
    """The tables and the claims."""
    rows = embedded.gathered(results)
    text = opening(
        embedded.QUESTION,
        f"Target: p(z|x)^(1/T), the rest z of a web sentence after its beginning x, at most {LIMIT['max_tokens']} "
        f"tokens. It is not known exactly. Data: {TEST} prompts that no guide was trained on, {DRAWS} texts each. "
        f"*{GUIDE}*: one guide for each temperature.",
        COLUMNS,
    )
    return text + tables(rows) + "\n" + "".join(claims(rows))


COLUMNS = {
    "mean log p(z∣x)": "log-probability of the texts under the base model, nats, mean over texts and prompts, whatever "
    "method wrote them",
    "best": "the same, for the most likely of a prompt's texts",
    "edit distance": "mean distance in tokens between two texts of a prompt, from 0 (equal) to 1",
    "distinct": "share of different texts among those of a prompt",
    "tokens": "mean length of the texts",
}


def tables(rows: embedded.Rows) -> str:
    """The table of texts, and that of the distances of weighted draws from the target."""
    text = markdown(
        ("method", "setting", "mean log p(z∣x)", "best", "edit distance", "distinct", "tokens", "seeds"),
        [
            (family, setting, *(spread(runs, key, 2) for key in ("log_likelihood", "best", "distance", "distinct")),
             spread(runs, "words", 1), str(len(runs)))
            for (family, setting), runs in rows.items()
        ],
    )  # fmt: skip
    sure = {key: runs for key, runs in rows.items() if "gap" in runs[0]}
    if sure:
        text += (
            "\nHow far weighted draws are from the target, means over prompts. log Z - ELBO estimates KL(q, target) of "
            "the distribution q of the draws. Its log Z is the largest estimate in this table at the same T: draws "
            "that miss most of the target estimate log Z too low, and their weights do not show it. sd(u) is the "
            "standard deviation of the log weights: 0 if q is the target, and also if all draws are one text. ESS/N is "
            "the effective sample size as a share of the draws. Pareto k-hat below 0.7 means that averages by these "
            "weights can be trusted, as far as the draws reach. SMC resamples, so its final weights say nothing of "
            "this.\n\n"
        )
        text += markdown(
            ("draws", "T", "estimate of log Z", "log Z - ELBO", "sd(u)", "ESS/N", "prompts with k-hat < 0.7"),
            [
                (family, setting.removeprefix("T = "), spread(runs, "log_z", 2),
                 *([""] * 4 if family == SEQUENTIAL else far(rows, runs)))
                for (family, setting), runs in sure.items()
            ],
        )  # fmt: skip
    return text


def far(rows: embedded.Rows, runs: Sequence[Figures]) -> list[str]:
    """Columns: log Z - ELBO, sd(u), ESS/N, and the share of prompts with a small k-hat."""
    khat = f"{100 * mean(k < 0.7 for r in runs for k in r['khat']):.0f}%"
    return [spread(distances(rows, runs), "kl", 2), *(spread(runs, key, 2) for key in ("sd", "ess")), khat]


def distances(rows: embedded.Rows, runs: Sequence[Figures]) -> list[Figures]:
    """log Z - ELBO of each run, with the largest estimate of log Z of all methods at the same temperature."""
    log_z = max(mean(r["log_z"] for r in of) for of in rows.values() if shares(of[0], runs[0]))
    return [{"kl": log_z - (r["log_z"] - r["gap"])} for r in runs]


def shares(run: Figures, other: Figures) -> bool:
    """Whether a run's draws are weighted for the same target."""
    return "gap" in run and run["setting"] == other["setting"]


def claims(rows: embedded.Rows) -> list[str]:
    """A verdict on each claim whose cells have run."""
    said = []
    there = [t for t in TEMPERATURES if (GUIDE, f"T = {t:g}") in rows]
    both = [t for t in there if (BY_TOKEN, f"T = {t:g}") in rows]
    for key, which in (("log_likelihood", "on average"), ("best", "for the best text of a prompt")):
        ahead, listed = [], []
        for t in both:
            difference, half = by_prompt(rows[GUIDE, f"T = {t:g}"], rows[BY_TOKEN, f"T = {t:g}"], key)
            ahead.append(difference > half)
            listed.append(f"{difference:+.2f} ± {half:.2f} at {t:g}")
        if both:
            claim = f"at the same T, GFlowNet texts are more likely than those of token temperature, {which}"
            because = f"Differences in nats, with 95% intervals over prompts: {', '.join(listed)}."
            said.append(verdict(claim, all(ahead), because))
    if both:
        guides = [merged(rows[GUIDE, f"T = {t:g}"]) for t in both]
        compared: dict[str, list[str]] = {"behind": [], "ahead": [], "beyond": []}
        for (family, setting), runs in rows.items():
            if family in (GUIDE, POWER, SEQUENTIAL):
                continue
            other = merged(runs)
            at = embedded.diversity_at(guides, other["log_likelihood"])
            word = "beyond" if at is None else "behind" if other["distance"] < at else "ahead"
            compared[word].append(f"{family} {setting}".strip())
        listed = ". ".join(f"{embedded.WORDS[word]}: {'; '.join(names)}" for word, names in compared.items() if names)
        claim = "at equal likelihood the GFlowNet's texts are more diverse than those of the usual decoding"
        because = f"Diversity is the edit distance, mean over prompts and seeds, without an interval. {listed}."
        said.append(verdict(claim, not compared["ahead"] and not compared["beyond"], because))
    if there:
        worst = max(mean(r["kl"] for r in distances(rows, rows[GUIDE, f"T = {t:g}"])) for t in there)
        because = f"The largest mean of log Z - ELBO is {worst:.2f} nats."
        said.append(verdict("the guides sample the target (log Z - ELBO less than 0.1 nats)", worst < 0.1, because))
    return said


def by_prompt(ours: Sequence[Figures], theirs: Sequence[Figures], key: str) -> tuple[float, float]:
    """The mean difference over prompts of means over seeds, and half of its 95% interval."""
    a, b = ([mean(values) for values in zip(*(r["each"][key] for r in runs), strict=True)] for runs in (ours, theirs))
    return paired(a, b)


def merged(runs: Sequence[Figures]) -> Figures:
    """Likelihood and diversity, means over seeds."""
    return {key: mean(r[key] for r in runs) for key in ("log_likelihood", "distance")}


def headline(results: Results) -> Headline:
    """Likelihood, diversity and length of texts at one temperature."""
    setting = f"T = {FIRST:g}"
    rows = {family: runs for (family, at), runs in embedded.gathered(results).items() if at == setting}
    shown = [family for family in (BY_TOKEN, GUIDE) if family in rows]
    if len(shown) < 2:
        return []
    columns = ("log_likelihood", 1), ("distance", 2), ("words", 1)
    here = [", ".join(spread(rows[f], key, digits) for key, digits in columns) for f in shown]
    seeds = min(len(rows[f]) for f in shown)
    return [(f"mean log p(z∣x), edit distance, tokens of {'; '.join(shown)}, {setting}", "", "; ".join(here), seeds)]


STUDY = Study(
    "continuation", "Continuation: tempered sequences", CELLS, run, report, partial(embedded.plot, far=inf),
    paired=False, needs=("prompts/prompts.txt",), headline=headline,
)  # fmt: skip
