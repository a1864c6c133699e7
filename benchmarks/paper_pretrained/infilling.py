r"""Infilling (Hu et al. 2024, section 4.2, Table 2): the middle of a story that the model itself has told.

Stories are drawn by `tell.py`, seed 0, and kept in stories.jsonl: a lead, x, z and y, three sentences of at most 20
tokens up to a ".", which the limit sets where it has not come, each drawn from p given what stands before it.  p is the
base model without special tokens and line breaks.  So the middle that was told is a draw of the posterior p(z | x, y)
itself, and evidence comes from both sides, in nats a story:

.. math:: E_q[\log p(z, y) - \log q(z)] = \log p(y) - KL(q, p), \quad
          E_p[\log p(z, y) - \log q(z)] = \log p(y) + KL(p, q),

the first over the method's draws, the second over the middles that were told; their difference is the sum of both KLs,
0 at the posterior alone.  BLEU-4 and GLEU-4 are of all middles against the ones that were told.  There is no BERTScore:
no encoder is at hand.

The cells "..., hand-written" measure the same methods, trained in the same way, on stories of the embedded grammar
(`lmppl.embedded.data("stories", "test")`: "Tom went to the kitchen. He found the small knife. He sharpened it.") after
one sentence of introduction.  SmolLM2 did not write their middles, so these are no draws of its posterior: there is an
ELBO and an estimate of log p(y), and no upper bound.  Nothing was chosen on them.

What a guide continues was chosen on the 16 stories to choose on, before any training: KL(q, p) + KL(p, q) by 8 draws
each, seed 100, in nats; the language model that does not know the end has 8.3.

    {y} / / {x}                                            9.2  taken
    Later:{y} / {x}                                        9.3
    The story ends:{y} / / The story:{x}                  10.8
    A story that goes on with this sentence:{y} / / {x}   11.1
    Ending:{y} / Beginning:{x} / Middle:                  23.8  18.2 after three examples: "prompting"

What trains was chosen on the same stories and by the same sum, after the first of these templates, 16 draws each:

    supervised, 16 told middles a step: 12 steps at 1e-4   8.4  taken
                                        24 steps           8.5
                                        100 at 5e-4       41    (200 told middles are learnt by heart)
    GFlowNet, 2 x 8 draws a step: 100 steps at 1e-3        9.5
        after 24 steps of supervised, 25 at 3e-4           8.8
                                      50                   9.5
        told middles in its replay buffer, 25 at 3e-4      8.7
                                           50              8.7  taken

One of eight draws is then the story's told middle, a draw of the posterior.  No line is nearer than the language model
that does not know the end, so what the studies can show is how far these are from it.

Cost, by the pilots: a supervised step 10 processor seconds, a step of the GFlowNet 8 to 10, and measuring 2 minutes on
16 stories: a seed is some 30 minutes.
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

from benchmarks.paper.study import Figures, Headline, Results, Study, markdown, paired, spread, verdict
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
TEMPLATE = "{y}\n\n{x}"  # what a guide continues; `ASKING` is what is asked after examples
TRAIN, HELD_OUT, TEST, DRAWS, SHOTS = 200, 16, 24, 16, 3
RECIPE = replace(PRETRAINED, steps=50, learning_rate=3e-4)
TOLD_BATCH, TOLD_STEPS, TOLD_RATE = 16, 12, 1e-4
PRIOR, ASKED, TOLD, GUIDE, SEQUENTIAL = "language model", "prompting", "supervised", "GFlowNet", "SMC with the guide"
METHODS = (PRIOR, ASKED, TOLD, GUIDE)
WRITTEN = {f"{method}, hand-written": method for method in METHODS}  # cells
CELLS = (*METHODS, *WRITTEN)
WRITTEN_TEST, WRITTEN_LEAD = 16, "This is a short story for children. "


class Told(Infilling):
    """Infilling of stories whose three sentences have one law."""

    def __init__(self, lm: LanguageModel, guide_lm: LanguageModel | None = None, template: str = TEMPLATE):
        super().__init__(lm, guide_lm, template=template, allowed=plain_tokens(lm), **LIMIT)

    def model(self, x: Tensor, y: Tensor) -> Tensor:
        """z ~ LM(x); y ~ LM(x z)."""
        with pyro.plate("stories", len(x)):
            z = pyro.sample("z", self.sentence(x))
            pyro.sample("y", self.sentence(self.lm.join(x, z)), obs=y)
            return z

    def prior(self, x: Tensor, y: Tensor) -> Tensor:
        """z ~ LM(x): a guide that does not know the end."""
        with pyro.plate("stories", len(x)):
            return pyro.sample("z", self.sentence(x))

    def sentence(self, before: Tensor) -> Completion:
        return Completion(self.lm, before, **self.text)


def stories(path: Path = STORIES) -> tuple[list[Story], list[Story], list[Story]]:
    """To train on, to choose on and to test on."""
    told = [Story(**json.loads(line)) for line in path.read_text().splitlines()]
    return told[HELD_OUT + TEST :], told[TEST : HELD_OUT + TEST], told[:TEST]


def written() -> list[Story]:
    """Hand-written stories to test on."""
    return [s._replace(x=WRITTEN_LEAD + s.x) for s in embedded.data("stories", "test")[:WRITTEN_TEST]]


def trained(cell: str, lm: LanguageModel, train: list[Story], seed: int, short: bool) -> tuple[Told, Any]:
    """The programs of a method, trained where it is one that trains, and the trainer."""
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
    """A program's log-density of middles z (n, B, E) and what it observes: (n, B)."""
    trace = poutine.trace(condition(program, {"z": z})).get_trace(x, y)
    trace.compute_log_prob()
    log_prob: Tensor = sum(trace.nodes[name]["log_prob"] for name in ("z", "y") if name in trace.nodes)
    return log_prob


@torch.no_grad()
def measured(task: Told, program: Program, test: list[Story], posterior: Posterior, z: Tensor, name: str) -> Figures:
    """The measures of middles z (n, B, E), drawn by a method whose weighted draws are these."""
    lm, (x, y) = task.lm, task.encode(test)
    told = lm.encode([s.z for s in test])[None]  # one middle a story
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
    """Middles of unseen stories by one method, and by SMC with it where it is the GFlowNet."""
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
    """The table, and a sentence a claim."""
    runs, by_hand = ({cell: of for cell, of in results.items() if (cell in WRITTEN) == w} for w in (False, True))
    text = of_told(by_method(runs)) if runs else ""
    return text + (of_written(by_method(by_hand)) if by_hand else "")


def by_method(results: Results) -> dict[str, list[Figures]]:
    """Each method's row of each seed."""
    runs: dict[str, list[Figures]] = {}
    for found in (found for cell in results.values() for found in cell):
        for row in found["rows"]:
            runs.setdefault(row["name"], []).append(row | {"seed": found["seed"]})
    return runs


def of_written(runs: dict[str, list[Figures]]) -> str:
    """The table of the hand-written stories."""
    seeds = max(map(len, runs.values()))
    text = (
        f"\n{WRITTEN_TEST} hand-written stories ({seeds} seed{'s' if seeds > 1 else ''}), {DRAWS} middles each, by the "
        "same methods, which were trained on the model's own stories. The written middles are no draws of the "
        "posterior, so there is no upper bound.\n\n"
    )
    text += markdown(
        ("method", "ELBO", "estimate", *HEADS, "a middle of the first story", "seeds"),
        [
            (name, *(f"{mean(mean(r[key]) for r in rows):.2f}" for key in ("below", "log_z")), *figures(rows),
             rows[0]["shown"][0].strip().replace("|", "\\|"), str(len(rows)))
            for name, rows in runs.items()
        ],
    )  # fmt: skip
    told = mean(r["told"] for rows in runs.values() for r in rows)
    return text + f"\nWith the written middles log p(x z y) is {told:.2f}.\n"


def of_told(runs: dict[str, list[Figures]]) -> str:
    """The table of the stories that the model told, and the claims."""
    text = (
        f"{TEST} unseen stories, {DRAWS} middles each; nats a story. *ELBO* and *upper bound* enclose log p(y|x), "
        "their difference is KL(q,p) + KL(p,q); *wins* is how often the base model finds the story likelier than with "
        "the middle that was told, of which a draw of the posterior has about a half.\n\n"
    )
    text += markdown(
        ("method", "ELBO", "estimate", "upper bound", *HEADS, "seeds"),
        [
            (name, *(f"{mean(mean(r[key]) for r in rows):.2f}" for key in ("below", "log_z", "above")),
             *figures(rows), str(len(rows)))
            for name, rows in runs.items()
        ],
    )  # fmt: skip
    told = mean(r["told"] for rows in runs.values() for r in rows)
    return text + f"\nWith the middles that were told log p(x z y) is {told:.2f}.\n\n" + "".join(claims(runs))


def figures(rows: list[Figures]) -> list[str]:
    """The columns that both tables have."""
    return [spread(rounded(rows, key, digits), key, digits) for key, digits in COLUMNS]


def rounded(rows: list[Figures], key: str, digits: int) -> list[Figures]:
    """A figure as it is shown: a BLEU of no common four words is 1e-78."""
    return [{key: round(r[key], digits)} for r in rows]


HEADS = ("ESS/N", "BLEU-4", "GLEU-4", "log p(x z y)", "wins", "distinct")
COLUMNS = (("ess", 2), ("bleu", 3), ("gleu", 3), ("story", 2), ("wins", 2), ("distinct", 2))


def claims(runs: dict[str, list[Figures]]) -> list[str]:
    """A verdict on each claim whose methods have run, story by story, each the mean over seeds."""
    said = []
    for theirs in (PRIOR, ASKED, TOLD):
        if GUIDE in runs and theirs in runs:
            gain, half = paired(between(runs[theirs]), between(runs[GUIDE]))
            because = f"The sum of both KLs is {gain:+.2f} ± {half:.2f} nats a story less."
            said.append(verdict(f"the GFlowNet is nearer to the posterior than {NAMES[theirs]}", gain > half, because))
            said.append(in_bleu(runs, theirs))
    return said


NAMES = {PRIOR: "the language model that does not know the end", ASKED: ASKED, TOLD: TOLD}


def in_bleu(runs: dict[str, list[Figures]], theirs: str) -> str:
    """A verdict on BLEU-4, which is one number a seed: from two seeds on, by the interval of their differences."""
    ours, other = ({r["seed"]: r["bleu"] for r in runs[name]} for name in (GUIDE, theirs))
    pairs = [(ours[seed], other[seed]) for seed in ours if seed in other]
    if not pairs:
        return ""
    gain, half = paired(*zip(*pairs, strict=True))
    because = f"{gain:+.3f}" + (f" ± {half:.3f}, over {len(pairs)} seeds." if len(pairs) > 1 else ", of one seed.")
    return verdict(f"GFlowNet ahead of {NAMES[theirs]} in BLEU-4", gain > half if len(pairs) > 1 else None, because)


def between(runs: list[Figures]) -> list[float]:
    """The sum of both KLs, story by story, the mean over seeds."""
    each = [[a - b for a, b in zip(r["above"], r["below"], strict=True)] for r in runs]
    return [mean(story) for story in zip(*each, strict=True)]


def headline(results: Results) -> Headline:
    """How far the methods are from the posterior."""
    shown = [name for name in (PRIOR, ASKED, TOLD, GUIDE) if name in results]
    if GUIDE not in shown:
        return []
    here = [f"{mean(between([r['rows'][0] for r in results[name]])):.1f}" for name in shown]
    seeds = min(len(results[name]) for name in shown)
    return [(f"KL(q, p) + KL(p, q), nats a story, of {', '.join(shown)}", "", ", ".join(here), seeds)]


STUDY = Study("infilling", "Infilling", CELLS, run, report, paired=False, headline=headline)
