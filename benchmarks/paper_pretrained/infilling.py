r"""Infilling (Hu et al. 2024, section 4.2, Table 2): the middle of a story that the model itself has written.

Stories are drawn by `tell.py`, seed 0, and kept in stories.jsonl: a lead, then x, z and y, three sentences of at
most 20 tokens that end with ".", which the limit adds if it has not come before.  Each sentence is drawn from p given
the text before it.  p is the base model without special tokens and without line breaks.  So the middle of a stored
story is a draw of the posterior p(z | x, y), and the evidence has bounds from both sides, in nats per story:

.. math:: E_q[\log p(z, y) - \log q(z)] = \log p(y) - KL(q, p), \quad
          E_p[\log p(z, y) - \log q(z)] = \log p(y) + KL(p, q).

The first is a mean over the draws of the method, the second over the stored middles.  Their difference is the sum of
both KLs; it is 0 only at the posterior.  BLEU-4 and GLEU-4 compare all draws with the stored middles.  There is no
BERTScore, because no encoder is available.

The cells "..., hand-written" measure the same methods, trained in the same way, on stories of the embedded grammar
(`lmppl.embedded.data("stories", "test")`: "Tom went to the kitchen. He found the small knife. He sharpened it.") after
one sentence of introduction.  SmolLM2 did not write their middles, so they are not draws of its posterior: there is an
ELBO and an estimate of log p(y), but no upper bound.  Nothing was chosen on these stories.

The template that a guide continues was chosen on the 16 stories for choices, before any training, by KL(q, p) + KL(p,
q) in nats, from 8 draws each, seed 100.  The language model that does not know the end has 8.3.

    {y} / / {x}                                            9.2  taken
    Later:{y} / {x}                                        9.3
    The story ends:{y} / / The story:{x}                  10.8
    A story that goes on with this sentence:{y} / / {x}   11.1
    Ending:{y} / Beginning:{x} / Middle:                  23.8  18.2 after three examples: "prompting"

The training was chosen on the same stories and by the same sum, with the first of these templates, from 16 draws each:

    supervised, 16 stored middles per step: 12 steps at 1e-4   8.4  taken
                                            24 steps           8.5
                                            100 at 5e-4       41    (200 stored middles are learnt by heart)
    GFlowNet, 2 x 8 draws per step: 100 steps at 1e-3          9.5
        after 24 steps of supervised, 25 at 3e-4               8.8
                                      50                       9.5
        stored middles in its replay buffer, 25 at 3e-4        8.7
                                             50                8.7  taken

With the buffer, one of eight draws is the stored middle of the story, a draw of the posterior.  No line is closer to
the posterior than the language model that does not know the end.  So the study can only show how far each method is
from it.

Cost, by the pilots: a supervised step takes 10 processor seconds, a step of the GFlowNet 8 to 10, and measuring 16
stories 2 minutes: a seed takes about 30 minutes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import pyro
import torch
from pyro import condition, poutine
from torch import Tensor

from benchmarks.paper.infilling import QUESTION
from benchmarks.paper.study import Figures, Headline, Results, Study, markdown, opening, paired, spread, verdict
from lmppl import LanguageModel, embedded
from lmppl.distributions import Completion
from lmppl.embedded import Story
from lmppl.inference import SMC, GFlowNet, Importance, Posterior, Replay, SupervisedFineTuning, few_shot
from lmppl.inference.core.programs import Program
from lmppl.models import PRETRAINED, Infilling, measures
from lmppl.models.programs.infilling import TEMPLATE as ASKING

from .continuation import plain_tokens

STORIES = Path(__file__).with_name("stories.jsonl")
LEAD = "This is a short story for children. Once upon a time, there was"
LIMIT = {"max_tokens": 20, "stop": "."}
TEMPLATE = "{y}\n\n{x}"  # the prompt of a guide; `ASKING` is the prompt after examples
TRAIN, HELD_OUT, TEST, DRAWS, SHOTS = 200, 16, 24, 16, 3
RECIPE = replace(PRETRAINED, steps=50, learning_rate=3e-4)
TOLD_BATCH, TOLD_STEPS, TOLD_RATE = 16, 12, 1e-4
PRIOR, ASKED, TOLD, GUIDE, SEQUENTIAL = "language model", "prompting", "supervised", "GFlowNet", "SMC with the guide"
METHODS = (PRIOR, ASKED, TOLD, GUIDE)
WRITTEN = {f"{method}, hand-written": method for method in METHODS}  # cells
CELLS = (*METHODS, *WRITTEN)
WRITTEN_TEST, WRITTEN_LEAD = 16, "This is a short story for children. "


class Told(Infilling):
    """Infilling of stories whose three sentences have the same distribution given the text before."""

    def __init__(self, lm: LanguageModel, guide_lm: LanguageModel | None = None, template: str = TEMPLATE):
        super().__init__(lm, guide_lm, template=template, allowed=plain_tokens(lm), **LIMIT)

    def model(self, x: Tensor, y: Tensor) -> Tensor:
        """z ~ LM(x); y ~ LM(x z)."""
        with pyro.plate("stories", len(x)):
            z = pyro.sample("z", self.sentence(x))
            pyro.sample("y", self.sentence(self.lm.join(x, z)), obs=y)
            return z

    def prior(self, x: Tensor, y: Tensor) -> Tensor:
        """z ~ LM(x), a guide that does not know the end."""
        with pyro.plate("stories", len(x)):
            return pyro.sample("z", self.sentence(x))

    def sentence(self, before: Tensor) -> Completion:
        return Completion(self.lm, before, **self.text)


def stories(path: Path = STORIES) -> tuple[list[Story], list[Story], list[Story]]:
    """Stories for training, for choices and for the test."""
    told = [Story(**json.loads(line)) for line in path.read_text().splitlines()]
    return told[HELD_OUT + TEST :], told[TEST : HELD_OUT + TEST], told[:TEST]


def written() -> list[Story]:
    """The hand-written test stories."""
    return [s._replace(x=WRITTEN_LEAD + s.x) for s in embedded.data("stories", "test")[:WRITTEN_TEST]]


def trained(cell: str, lm: LanguageModel, train: list[Story], seed: int, short: bool) -> tuple[Told, Any]:
    """The programs of a method, after training if the method trains, and the trainer."""
    if cell == ASKED:
        shots = [({"x": s.x, "y": s.y}, s.z) for s in Random(seed).sample(train, min(SHOTS, len(train)))]
        return Told(lm, lm, few_shot(ASKING, shots, "\n")), None
    if cell == PRIOR:
        return Told(lm), None
    task = Told(lm, RECIPE.guide_lm(lm, seed))
    x, y = task.encode(train)
    z = lm.encode([s.z for s in train])
    parameters = task.guide_lm.trainable_parameters()
    if cell == TOLD:
        batch: Callable[[int], tuple[Tensor, ...]] = replace(RECIPE, observations=TOLD_BATCH).batches(
            x, y, z, seed=seed
        )

        def shown(step: int) -> tuple[Any, ...]:
            some_x, some_y, some_z = batch(step)
            return some_x, some_y, {"z": some_z}

        tuning = SupervisedFineTuning(task.model, task.guide, optimizer=torch.optim.AdamW(parameters, lr=TOLD_RATE))
        tuning.fit(shown, 2 if short else TOLD_STEPS, seed=seed, progress=False)
        return task, tuning
    optimizer = torch.optim.AdamW(parameters, lr=RECIPE.learning_rate)
    trainer = GFlowNet(
        task.model, task.guide, RECIPE.objective(), optimizer=optimizer, num_particles=RECIPE.particles,
        replay=Replay(fraction=1 / RECIPE.particles),
    )  # fmt: skip
    trainer.demonstrate(x, y, values={"z": z})
    trainer.fit(RECIPE.batches(x, y, seed=seed), 2 if short else RECIPE.steps, seed=seed, progress=False)
    return task, trainer


def log_joint(program: Program, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The log-density under a program of middles z (n, B, E) and of its observations: (n, B)."""
    trace = poutine.trace(condition(program, {"z": z})).get_trace(x, y)
    trace.compute_log_prob()
    log_prob: Tensor = sum(trace.nodes[name]["log_prob"] for name in ("z", "y") if name in trace.nodes)
    return log_prob


@torch.no_grad()
def measured(task: Told, program: Program, test: list[Story], posterior: Posterior, z: Tensor, name: str) -> Figures:
    """The measures of middles z (n, B, E) of a method, and of its weighted draws, the posterior."""
    lm, (x, y) = task.lm, task.encode(test)
    told = lm.encode([s.z for s in test])[None]  # one middle per story
    u = posterior.log_weights + torch.tensor(float(posterior.num_particles)).log()
    above = (log_joint(task.model, x, y, told) - log_joint(program, x, y, told))[0]
    story, reference = (measures.story_log_likelihood(lm, x, each, y) for each in (z, told))
    candidates = [s for row in lm.decode(z) for s in row]
    references = [s.z for s in test] * len(z)
    return {
        "name": name, "below": u.mean(0).tolist(), "log_z": posterior.log_evidence.tolist(),
        "above": above.tolist(), "ess": float((posterior.ess / posterior.num_particles).mean()),
        "bleu": measures.bleu(candidates, references), "gleu": measures.gleu(candidates, references),
        "story": float(story.mean()), "told": float(reference.mean()),
        "wins": float((story > reference).float().mean()), "distinct": float(measures.distinct(z).mean()),
        "shown": lm.decode(z[:3, 0]),
    }  # fmt: skip


def run(cell: str, seed: int, short: bool, lm: LanguageModel, data: Path | None = None) -> Figures:
    """Draw middles of unseen stories by one method; for the GFlowNet also by SMC with its guide."""
    train, _, test = stories()
    test = written() if cell in WRITTEN else test
    test, n = (test[:2], 4) if short else (test, DRAWS)
    cell = WRITTEN.get(cell, cell)
    task, trainer = trained(cell, lm, train, seed, short)
    program = task.prior if cell == PRIOR else task.guide
    args = task.encode(test)
    torch.manual_seed(seed)
    found = Importance(task.model, program, num_particles=n).run(*args)
    rows = [measured(task, program, test, found, found.samples["z"], cell)]
    if cell == GUIDE:
        found = SMC(task.model, program, num_particles=n, twist="flow").run(*args)
        z = found.resample(n, "multinomial").samples["z"]
        rows.append(measured(task, program, test, found, z, SEQUENTIAL))
    return {"rows": rows, "tokens": 0 if trainer is None else trainer.training_tokens}


# -- the section -------------------------------------------------------------------------------------------------------


def report(results: Results) -> str:
    """The tables and the claims."""
    runs, by_hand = ({cell: of for cell, of in results.items() if (cell in WRITTEN) == w} for w in (False, True))
    text = of_told(by_method(runs)) if runs else ""
    return text + (of_written(by_method(by_hand)) if by_hand else "")


def by_method(results: Results) -> dict[str, list[Figures]]:
    """The rows of each method, one per seed."""
    runs: dict[str, list[Figures]] = {}
    for found in (found for cell in results.values() for found in cell):
        for row in found["rows"]:
            runs.setdefault(row["name"], []).append(row | {"seed": found["seed"]})
    return runs


def of_written(runs: dict[str, list[Figures]]) -> str:
    """The table of the hand-written stories."""
    seeds = max(map(len, runs.values()))
    text = (
        f"\nThe same methods, trained on the model's own stories, on {WRITTEN_TEST} hand-written stories "
        f"({seeds} seed{'s' if seeds > 1 else ''}), {DRAWS} middles for each story. The written middles are not draws "
        "of the posterior, so there is no upper bound.\n\n"
    )
    text += markdown(
        ("method", "ELBO", "estimate", *HEADS, "a middle of the first story", "seeds"),
        [
            (name, *(evidence(name, rows, key) for key in ("below", "log_z")), *figures(name, rows),
             rows[0]["shown"][0].strip().replace("|", "\\|"), str(len(rows)))
            for name, rows in runs.items()
        ],
    )  # fmt: skip
    told = mean(r["told"] for rows in runs.values() for r in rows)
    return text + f"\nWith the written middles log p(x z y) is {told:.2f}.\n"


def of_told(runs: dict[str, list[Figures]]) -> str:
    """The table of the stories that the model has written, and the claims."""
    text = opening(
        QUESTION,
        "Target: the posterior p(z|x, y) of the middle z, given the beginning x and the end y. Data: stories that the "
        f"base model has written itself, so that their own middles are draws of the posterior; {TEST} of them that no "
        f"method was trained on, {DRAWS} middles for each story. Log-probabilities are in nats, means over stories.",
        {
            "ELBO, upper bound": "two bounds of log p(y|x); their difference is KL(q,p) + KL(p,q) between the method's "
            "distribution q and the posterior p, and 0 only if q is the posterior",
            "estimate": "the importance estimate of log p(y|x) by the method's draws, or that of SMC, which resamples: "
            "its final weights give neither bounds nor an effective sample size",
            "ESS/N": "effective sample size of the weighted draws, as a share of N",
            "BLEU-4, GLEU-4": "overlap of words between the draws and the story's own middle; larger is closer",
            "log p(x z y)": "log-probability of the whole story under the base model",
            "wins": "share of the draws with which the base model finds the story more likely than with its own "
            "middle; about a half for draws of the posterior",
            "distinct": "share of different texts among the draws for a story",
        },
    )
    text += markdown(
        ("method", "ELBO", "estimate", "upper bound", *HEADS, "seeds"),
        [
            (name, *(evidence(name, rows, key) for key in ("below", "log_z", "above")), *figures(name, rows),
             str(len(rows)))
            for name, rows in runs.items()
        ],
    )  # fmt: skip
    told = mean(r["told"] for rows in runs.values() for r in rows)
    return text + f"\nWith the stories' own middles log p(x z y) is {told:.2f}.\n\n" + "".join(claims(runs))


def evidence(name: str, rows: list[Figures], key: str) -> str:
    """A bound of log p(y|x), or the estimate; the final weights of SMC, after resamplings, give the estimate only."""
    return "" if name == SEQUENTIAL and key != "log_z" else f"{mean(mean(r[key]) for r in rows):.2f}"


def figures(name: str, rows: list[Figures]) -> list[str]:
    """The columns that both tables have."""
    shown = [spread(rounded(rows, key, digits), key, digits) for key, digits in COLUMNS]
    return ["", *shown[1:]] if name == SEQUENTIAL else shown


def rounded(rows: list[Figures], key: str, digits: int) -> list[Figures]:
    """A figure rounded as it is shown, because BLEU without four common words is 1e-78."""
    return [{key: round(r[key], digits)} for r in rows]


HEADS = ("ESS/N", "BLEU-4", "GLEU-4", "log p(x z y)", "wins", "distinct")
COLUMNS = (("ess", 2), ("bleu", 3), ("gleu", 3), ("story", 2), ("wins", 2), ("distinct", 2))


def claims(runs: dict[str, list[Figures]]) -> list[str]:
    """A verdict on each claim whose methods have run, from means over seeds for each story."""
    said = []
    for theirs in (PRIOR, ASKED, TOLD):
        if GUIDE in runs and theirs in runs:
            gain, half = paired(between(runs[theirs]), between(runs[GUIDE]))
            because = f"KL(q,p) + KL(p,q) differs by {-gain:+.2f} ± {half:.2f} nats per story; less is closer."
            said.append(verdict(f"the GFlowNet is closer to the posterior than {NAMES[theirs]}", gain > half, because))
            said.append(in_bleu(runs, theirs))
    return said


NAMES = {PRIOR: "the language model that does not know the end", ASKED: ASKED, TOLD: TOLD}


def in_bleu(runs: dict[str, list[Figures]], theirs: str) -> str:
    """A verdict on BLEU-4, one number per seed: with at least two seeds, by the interval of the differences."""
    ours, other = ({r["seed"]: r["bleu"] for r in runs[name]} for name in (GUIDE, theirs))
    pairs = [(ours[seed], other[seed]) for seed in ours if seed in other]
    if not pairs:
        return ""
    gain, half = paired(*zip(*pairs, strict=True))
    many = len(pairs) > 1
    because = f"The difference is {gain:+.3f}" + (
        f" ± {half:.3f} over {len(pairs)} seeds." if many else " with one seed."
    )
    return verdict(f"the GFlowNet is ahead of {NAMES[theirs]} in BLEU-4", gain > half if many else None, because)


def between(runs: list[Figures]) -> list[float]:
    """KL(q, p) + KL(p, q) of each story, mean over seeds."""
    each = [[a - b for a, b in zip(r["above"], r["below"], strict=True)] for r in runs]
    return [mean(story) for story in zip(*each, strict=True)]


def headline(results: Results) -> Headline:
    """The distances of the methods from the posterior."""
    shown = [name for name in (PRIOR, ASKED, TOLD, GUIDE) if name in results]
    if GUIDE not in shown:
        return []
    here = [f"{mean(between([r['rows'][0] for r in results[name]])):.1f}" for name in shown]
    seeds = min(len(results[name]) for name in shown)
    return [(f"KL(q, p) + KL(p, q), nats per story, of {', '.join(shown)}", "", ", ".join(here), seeds)]


STUDY = Study("infilling", "Infilling", CELLS, run, report, paired=False, headline=headline)
