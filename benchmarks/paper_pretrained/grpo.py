r"""The peers' way of training: TRL's GRPO with the targets and the budgets of GFlowNets of two of these studies.

The reward is the log of the GFlowNet's unnormalised target: log p(z|x) / T of continuation at T = 0.9, and log
p(z|x) + log p(y|x,z) of subjectivity with 50 labels; see `grpo_worker`.  The same for both: prompts, barred tokens,
stops and limits, the adapter, the constant learning rate, the norm at which gradients are clipped, 2 prompts x 8
texts per step, and the number of steps.  All else is TRL's default: advantages are rewards minus the mean of the
group, divided by its standard deviation (so that T cancels); the loss is a mean over tokens; beta = 0, so that
nothing holds the policy close to the language model; and each draw is used once.  The optimum is one text, the most
likely one.

*Matched*: the reward minus log q(z|x), not scaled, so that the expected reward is the ELBO.  What is left of GRPO is
the policy gradient with the group's mean as baseline, and its optimum is the GFlowNet's target.

TRL is installed in .venv-trl, with this repository's versions of torch and transformers, when a unit first needs
it.  It runs as a process of its own (`grpo_worker`).  Its adapter is loaded and measured here as the guides are.

Cost: the three cells took 14, 28 and 5 minutes for a seed.  With seed 100 and six of the prompts for choices, 20 steps
of GRPO ended at texts of 3 tokens, of which 39% were distinct.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.paper.study import Figures, Headline, Results, Study, markdown, meanings, opening, spread, verdict
from benchmarks.peers import ON_ONE_PROCESSOR, ROOT, Unavailable, interpreter
from lmppl import LanguageModel
from lmppl.inference import Importance
from lmppl.models import PRETRAINED, Continuation
from lmppl.models.programs.subjectivity import LONGEST_REASON

from . import continuation, subjectivity
from .grpo_worker import Target

PACKAGES = ("trl==1.16.0", "peft")
ENVIRONMENT = ROOT / ".venv-trl"
GRPO, MATCHED = "GRPO", "GRPO, matched"
TEMPERATURE, LABELS = continuation.FIRST, "50"
CELLS = ("continuation", "continuation, matched", "subjectivity")


def adapter(lm: LanguageModel, seed: int, **task: Any) -> tuple[LanguageModel, Figures]:
    """Train an adapter by TRL: the language model with the adapter, and the cost of the training."""
    recipe = task.pop("recipe")
    given = {
        "lm": str(lm.model.name_or_path), "seed": seed, "device": lm.device.type, "adapter": recipe.adapter,
        "observations": recipe.observations, "particles": recipe.particles, "learning_rate": recipe.learning_rate,
        "steps": recipe.steps, "matched": False, "y": None, "barred": [],
    }  # fmt: skip
    python = interpreter(ENVIRONMENT, PACKAGES)
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        (folder / "task.json").write_text(json.dumps(given | task | {"target": asdict(task["target"])}))
        command = [str(python), str(Path(__file__).with_name("grpo_worker.py")), path]
        hidden = ON_ONE_PROCESSOR if lm.device.type == "cpu" else {}
        done = subprocess.run(command, env=os.environ | hidden, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"{PACKAGES[0]} does not run: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        return lm.with_adapter(folder / "adapter"), json.loads((folder / "figures.json").read_text())


def continuing(lm: LanguageModel, data: Path, seed: int, short: bool, matched: bool) -> Figures:
    """Texts for the prompts of the study of continuation, and their distance from the target."""
    parts, allowed = continuation.prompts(lm, data), continuation.plain_tokens(lm)
    target = Target(int(lm.token_id(".")), continuation.LIMIT["max_tokens"], temperature=TEMPERATURE)
    recipe = replace(continuation.RECIPE, steps=2 if short else continuation.RECIPE.steps)
    barred = (~allowed).nonzero()[:, 0].tolist()
    q, took = adapter(lm, seed, recipe=recipe, target=target, prompt=parts[0], barred=barred, matched=matched)
    task = Continuation(lm, q, allowed=allowed, **continuation.LIMIT)
    x, t = task.encode(parts[2][:2] if short else parts[2], TEMPERATURE)
    n, particles = (4, 4) if short else (continuation.DRAWS, continuation.PARTICLES)
    torch.manual_seed(seed)
    posterior = Importance(task.model, task.guide, particles).run(x, t)
    z, certified = posterior.samples["z"][:n], continuation.certified(posterior)
    name = MATCHED if matched else GRPO
    return {"rows": [continuation.measured(task, x, name, f"T = {TEMPERATURE:g}", z, **certified)], "took": took}


def labelling(lm: LanguageModel, data: Path, seed: int, short: bool) -> Figures:
    """Labels through reasons, for the sentences of the study of subjectivity."""
    s = subjectivity.Setup(LABELS, seed, short, lm, data)
    plain, prompts = s.task(), subjectivity.PROMPTS
    labels = plain.label_texts
    if labels.shape[-1] != 1:
        raise ValueError(f"WORDS: expected labels of one token each, got {plain.labels}")
    target = Target(
        int(lm.token_id(prompts["stop"])), LONGEST_REASON, plain.reason["min_tokens"],
        then=tuple(lm.encode(prompts["then"]).tolist()), labels=tuple(labels[:, 0].tolist()),
    )  # fmt: skip
    q, took = adapter(
        lm, seed, recipe=replace(PRETRAINED, steps=s.steps(subjectivity.GUIDE_STEPS)), target=target,
        prompt=[prompts["why"].format(x=t.text) for t in s.labelled],
        y=[plain.labels.index(t.label) for t in s.labelled],
    )  # fmt: skip
    torch.manual_seed(seed)
    methods = {GRPO: s.by_reasons(s.task(q), "guide")}
    return {"lines": s.lines, "y": s.y.tolist(), "methods": methods, "took": took}


def run(cell: str, seed: int, short: bool, lm: LanguageModel, data: Path) -> Figures:
    """Draws of GRPO's policy, measured as the draws of the GFlowNet."""
    if cell == "subjectivity":
        found = labelling(lm, data, seed, short)
    else:
        found = continuing(lm, data, seed, short, matched=cell != "continuation")
    return found | {"elsewhere": found["took"]["seconds"]}


# -- the section ------------------------------------------------------------------------------------------------------


QUESTION = "How does GRPO, the usual way to train for a reward, compare with the GFlowNet on the same targets?"
SETTING = (
    "TRL's GRPO gets the log of the GFlowNet's unnormalised target as reward, and as many draws and steps. Its optimum "
    "is the most likely text. *Matched* subtracts log q(z|x) from the reward, so that its optimum is the GFlowNet's "
    "target. Data: prompts and sentences of the sections above."
)


def report(results: Results) -> str:
    """The tables of both studies with GRPO's rows, its cost, and the claims."""
    text, said = opening(QUESTION, SETTING, {}).rstrip("\n") + "\n\n", []
    texts = {cell: results[cell] for cell in CELLS[:2] if cell in results}
    if texts:
        beside = f"continuation: T={TEMPERATURE:g}"
        rows = continuation.embedded.gathered(texts | {beside: results.get(beside, [])})
        text += f"Texts for the prompts of the section on continuation:\n\n{meanings(continuation.COLUMNS)}\n"
        text += continuation.tables(rows)
        shown = [f"- {family}: {' / '.join(z.strip() for z in of[0]['texts'])}\n" for (family, _), of in rows.items()]
        text += f"\nThree texts of the first prompt:\n\n{''.join(shown)}\n"
        said += continuation_claims(rows)
    if "subjectivity" in results:
        runs = subjectivity.together(results["subjectivity"], results.get(f"subjectivity: {LABELS}", []))
        methods = [m for m in ("supervised", "GFlowNet", GRPO) if m in runs[0]["methods"]]
        text += (
            f"The {subjectivity.TEST} test sentences of each seed are those of the section on subjectivity, and so are "
            "the columns. *Distinct, one sentence*: share of different reasons among the ten of a sentence. *Distinct, "
            "all*: the same among one reason of each sentence.\n\n"
        )
        text += markdown(
            (*subjectivity.HEADER, "distinct, one sentence", "distinct, all"),
            [[*subjectivity.row(LABELS, runs, m), *variety(runs, m)] for m in methods],
        )
        said += subjectivity_claims(runs)
    took = {cell: [r["took"] for r in results[cell]] for cell in CELLS if cell in results}
    text += "\nThe cost of TRL's training, and the mean reward of its first and last ten steps:\n\n" + markdown(
        ("cell", "processor seconds", "tokens of prompts and texts", "first rewards", "last rewards"),
        [
            (cell, spread(of, "seconds", 0), f"{mean(t['tokens'] for t in of):,.0f}",
             *(f"{mean(mean(t['rewards'][part]) for t in of):.2f}" for part in (slice(10), slice(-10, None))))
            for cell, of in took.items()
        ],
    )  # fmt: skip
    return text + "\n" + "".join(said)


def variety(runs: Sequence[Figures], method: str) -> list[str]:
    """The share of different reasons among the ten of a sentence, and among one reason of every sentence."""
    of = [r["methods"][method] for r in runs if "reasons" in r["methods"][method]]
    among = [r["distinct"] for r in of if "distinct" in r]
    across = [len(set(r["reasons"])) / len(r["reasons"]) for r in of]
    return [f"{mean(values):.2f}" if values else "" for values in (among, across)]


def continuation_claims(rows: continuation.embedded.Rows) -> list[str]:
    """Whether the reward only gives more likely and less diverse texts, and what the matched reward changes."""
    setting, said = f"T = {TEMPERATURE:g}", []
    plain, matched, guide = (rows.get((f, setting)) for f in (GRPO, MATCHED, continuation.GUIDE))
    for ours, name in ((guide, continuation.GUIDE), (matched, MATCHED)):
        if plain and ours:
            likelier, by = continuation.by_prompt(plain, ours, "log_likelihood")
            wider, half = continuation.by_prompt(plain, ours, "distance")
            claim = f"GRPO's texts are more likely and less diverse than those of {name}"
            because = f"{likelier:+.2f} ± {by:.2f} nats and {wider:+.2f} ± {half:.2f} of edit distance, over prompts."
            said.append(verdict(claim, likelier > by and wider < -half, because))
    if plain and guide:
        gaps = [mean(r["kl"] for r in continuation.distances(rows, runs)) for runs in (plain, guide)]
        because = f"log Z - ELBO is {gaps[0]:.2f} nats, the GFlowNet's {gaps[1]:.2f}."
        said.append(verdict("GRPO's policy is further from the target than the GFlowNet", gaps[0] > gaps[1], because))
    return said


def subjectivity_claims(runs: Sequence[Figures]) -> list[str]:
    """Whether its labels are less accurate than the GFlowNet's."""
    if "GFlowNet" not in runs[0]["methods"]:
        return []
    gain, half = subjectivity.difference(runs, GRPO, "GFlowNet")
    because = f"{gain:+.1f} ± {half:.1f} points on {sum(len(r['y']) for r in runs)} sentences."
    return [verdict(f"GRPO is less accurate than the GFlowNet at {LABELS} labels", gain < -half, because)]


def headline(results: Results) -> Headline:
    """Distance from the target and diversity of the texts, at the temperature that both have."""
    beside = results.get(f"continuation: T={TEMPERATURE:g}")
    if "continuation" not in results or not beside:
        return []
    rows = continuation.embedded.gathered({"guide": beside, GRPO: results["continuation"]})
    runs = [[r | found for r, found in zip(of, continuation.distances(rows, of), strict=True)] for of in rows.values()]
    here = "; ".join(", ".join(spread(of, key, 2) for key in ("kl", "distinct")) for of in runs)
    measured = f"log Z - ELBO, distinct texts of {continuation.GUIDE}; TRL's {GRPO}, T = {TEMPERATURE:g}"
    return [(measured, "", here, min(map(len, runs)))]


STUDY = Study(
    "grpo", "The peers' way of training", CELLS, run, report, paired=False, headline=headline,
    needs=(*continuation.STUDY.needs, *subjectivity.STUDY.needs), beside=("continuation", "subjectivity"),
)  # fmt: skip
