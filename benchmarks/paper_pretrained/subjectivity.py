"""Subjectivity (Hu et al. 2024, section 4.3, Table 3) on the paper's sentences: labels through a latent reason.

The plan was frozen before a test sentence was read.  Prompts were chosen on 60 sentences of train.jsonl that are in no
file of few labels, 30 of each label (the first of each in the order of `random.Random(0).shuffle`).  Without a reason:
accuracy, accuracy after subtracting the median log-odds, and the area under the curve:

    {x} This sentence is [objective, subjective]                                             0.50  0.63  0.63
    Sentence:{x} / This sentence is from a [plot, review]                                    0.50  0.67  0.76
    Sentence:{x} / This sentence is from a movie [plot, review]                              0.65  0.67  0.72  taken
    Sentence:{x} / This is a movie [summary, review]                                         0.50  0.70  0.75
    Is this sentence part of the plot of a movie, or an opinion about the movie? /
        Sentence:{x} / Answer: It is the [plot, opinion]                                     0.52  0.47  0.46
    A sentence about a movie tells its plot or gives an opinion. /
        Sentence:{x} / This sentence is about the [plot, opinion]                            0.50  0.67  0.73
        Sentence:{x} / It [tells, gives]                                                     0.48  0.70  0.75
    Sentence:{x} / Plot or opinion? [Plot, Opinion]                                          0.55  0.53  0.57
    Sentence:{x} / Plot or opinion? It is about words, so it is the [plot, opinion]          0.53  0.50  0.56

The prompt that needs no calibration was taken, because p(y | x, z) has none.  With four reasons {z}, on 30 sentences:

    Sentence:{x} / This sentence is about{z}, so it is from a movie [plot, review]           0.63  0.73  0.78  taken
    Sentence:{x} / It talks about{z}, which is what you find in a movie [plot, review]       0.53  0.67  0.76
    Sentence:{x} / Summary:{z}. This sentence is from a movie [plot, review]                 0.63  0.60  0.63

With so few sentences, differences of 0.1 are noise.  Steps and learning rates were chosen by their cost, without a run.

Each seed has its own 100 of the 1,000 test sentences, the same for all methods and numbers of labels.  The labelled
sentences are those of the paper's files.  So a seed changes the adapters, the draws and the test sentences, but not the
labelled ones.  Three seeds are about 300 sentences.  An accuracy of 0.7 then has a 95% interval of 5 points on either
side, and so has the difference of two methods that disagree on a fifth of the sentences.

Planned cost: a token takes 135M parameters x 2 / 50 GFLOP/s = 5 ms, and 10 ms if few rows are drawn.  A test sentence
with its prompt has about 50 tokens.  They are read once to draw ten reasons and once by p(y | x, z); in addition
10 x 5 tokens are drawn and 10 x 8 are read.  This takes 2 s (with four reasons 0.8 s and 131 tokens were measured),
0.3 s without a reason, and 2 s after 400 tokens of examples.  A step of 2 x 8 reasons takes 8 s, a round of EM 16 s, a
supervised step of 4 labels 4 s.  So each number of labels takes 160 (supervised) + 190 (GFlowNet) + 260 (EM)
+ 100 x (2 + 2 + 2 + 0.3) s, and a seed of all three with the untrained methods takes an hour.  Measured cost: 550 s for
each number of labels and 130 s for the untrained methods, half an hour for a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.paper.study import Figures, Headline, Results, Study, markdown, opening, paired, verdict
from benchmarks.paper.subjectivity import PAPER, QUESTION
from lmppl import LanguageModel
from lmppl.embedded import Sentence
from lmppl.inference import GFlowNet, SupervisedFineTuning, VariationalEM
from lmppl.models import PRETRAINED, measures
from lmppl.models.forecasts import calibration_error, hits, log_score
from lmppl.models.programs.subjectivity import Subjectivity
from lmppl.models.subjectivity import read_sentences

WORDS = {"objective": "plot", "subjective": "review"}
PROMPTS: dict[str, Any] = {
    "why": "Sentence:{x}\nThis sentence is about",
    "then": " so it is from a movie",
    "stop": ",",
    "plainly": "Sentence:{x}\nThis sentence is from a movie",
}
COUNTS = ("10", "20", "50")  # of labels
LONGER = {f"{n}, longer EM": n for n in COUNTS}  # cells
CELLS = ("untrained", *COUNTS, *LONGER)
TEST, REASONS = 100, 10  # test sentences per seed, reasons per sentence
UNLABELLED = 32  # training sentences for the calibration of the untrained methods
FEW_SHOT_TOKENS = 400
GUIDE_STEPS, ROUNDS, SUPERVISED_STEPS, SUPERVISED_BATCH = 24, 16, 40, 4
GUIDE_RATE, RATE = PRETRAINED.learning_rate, 5e-4
LONGER_ROUNDS, LONGER_BATCH, M_STEPS, M_PARTICLES = 40, 4, 2, 2
EM, LONGER_EM = "GFlowNet + EM", "GFlowNet + longer EM"
SHOWN, BEGINNING = 10, 60  # reasons in the report; characters of their sentences
HEADER = ("labels", "method", "paper", "accuracy", "paired", "vote", "ECE", "log score", "seeds")


class Setup:
    """The language model, the labelled sentences and the test sentences of a cell and a seed."""

    def __init__(
        self, cell: str, seed: int, short: bool, lm: LanguageModel, data: Path, sentences: range | None = None
    ):
        """``sentences``: a range of the shuffled test sentences; None: the hundred of this seed."""
        self.lm, self.seed, self.short = lm, seed, short
        few = {n: read(data / "subj" / f"train.{n}.jsonl") for n in COUNTS}
        known = {s.text for sentences in few.values() for s in sentences}
        self.labelled = few.get(cell, [])
        self.unlabelled = [s for s in read(data / "subj" / "train.jsonl") if s.text not in known]
        test, count = read(data / "subj" / "test.jsonl"), 4 if short else TEST
        start = seed * count % len(test)
        chosen = sentences or range(start, start + count)
        lines = Random("test").sample(range(len(test)), len(test))  # of test.jsonl, from 0
        self.lines = lines[chosen.start : chosen.stop]
        self.test = [test[i] for i in self.lines]
        self.x, self.y = self.task().encode(self.test)

    def task(self, guide: LanguageModel | None = None, p: LanguageModel | None = None) -> Subjectivity:
        """The model, whose factors p(z | x) and p(y | x, z) both belong to p; the guide reads only x."""
        return Subjectivity(p or self.lm, guide, labels=tuple(WORDS.values()), reads="x", **PROMPTS)

    def adapter(self) -> LanguageModel:
        return PRETRAINED.guide_lm(self.lm, self.seed)

    @property
    def particles(self) -> int:
        return 2 if self.short else PRETRAINED.particles

    def steps(self, steps: int) -> int:
        return 1 if self.short else steps

    def batches(self, size: int) -> Any:
        """Batches of ``size`` labelled sentences, in turn."""
        recipe = replace(PRETRAINED, observations=size)
        return recipe.batches(*self.task().encode(self.labelled), seed=self.seed)

    @torch.no_grad()
    def by_reasons(self, task: Subjectivity, sampler: str, x: Tensor | None = None) -> Figures:
        """For each test sentence p(subjective), averaged over reasons, the share of reasons that vote for it, a reason.

        *distinct* is the share of distinct reasons among those of a sentence, mean over sentences.
        """
        x = self.x if x is None else x
        fn = task.prior(x) if sampler == "prior" else task.proposal(x)
        z = fn.sample(torch.Size([2 if self.short else REASONS]))  # (N, B, L)
        p = task.log_labels(x, z)[..., 1].exp().double()  # (N, B)
        reasons = [reason.strip() for reason in task.lm.decode(z[0])]
        vote, distinct = ((p > 0.5) + 0.5 * (p == 0.5)).mean(0), measures.distinct(z).mean()
        return {"p": p.mean(0).tolist(), "vote": vote.tolist(), "reasons": reasons, "distinct": float(distinct)}

    @torch.no_grad()
    def directly(self, task: Subjectivity, before: str = "", x: Tensor | None = None) -> Figures:
        """p(subjective) without a reason."""
        return {"p": task.log_direct(self.x if x is None else x, before)[:, 1].exp().double().tolist()}


def read(path: Path) -> list[Sentence]:
    """Sentences with their labels as words; each sentence begins with a space."""
    return [Sentence(f" {s.text}", WORDS[s.label], "") for s in read_sentences(path)]


def calibrated(p: Sequence[float], unlabelled: Sequence[float]) -> list[float]:
    """Probabilities after subtracting the median log-odds of unlabelled sentences, so that half are "subjective"."""
    middle = torch.tensor(unlabelled, dtype=torch.float64).logit().median()
    return (torch.tensor(p, dtype=torch.float64).logit() - middle).sigmoid().tolist()


def untrained(s: Setup) -> dict[str, Figures]:
    """The untrained language model, without and with reasons, and both after calibration."""
    task = s.task()
    x = task.encode(Random(s.seed).sample(s.unlabelled, 2 if s.short else UNLABELLED))[0]
    plainly, reasons = s.directly(task), s.by_reasons(task, "prior")
    return {
        "zero-shot": plainly,
        "zero-shot, calibrated": {"p": calibrated(plainly["p"], s.directly(task, x=x)["p"])},
        "exact-prior chains": reasons,
        "exact-prior chains, calibrated": {"p": calibrated(reasons["p"], s.by_reasons(task, "prior", x)["p"])},
    }


def trained(s: Setup) -> dict[str, Figures]:
    """The methods that learn from labelled sentences."""
    plain = s.task()
    found = {"few-shot": s.directly(plain, plain.examples(s.labelled, FEW_SHOT_TOKENS))}

    found["supervised"] = s.directly(supervised(s))

    task, trainer = guided(s)
    found["GFlowNet"] = s.by_reasons(task, "guide")
    em = VariationalEM(task.model, task.guide, trainer, adam(task.lm, RATE), num_particles=s.particles, clip=1.0)
    em.fit(s.batches(PRETRAINED.observations), s.steps(ROUNDS), seed=s.seed, progress=False)
    found[EM] = s.by_reasons(task, "guide")
    return found


def longer(s: Setup) -> dict[str, Figures]:
    """EM that reads as many labelled sentences as supervised fine-tuning."""
    task, trainer = guided(s)
    em = VariationalEM(
        task.model, task.guide, trainer, adam(task.lm, RATE), num_particles=M_PARTICLES, m_steps=M_STEPS, clip=1.0
    )
    em.fit(s.batches(LONGER_BATCH), s.steps(LONGER_ROUNDS), seed=s.seed, progress=False)
    return {LONGER_EM: s.by_reasons(task, "guide")}


def guided(s: Setup) -> tuple[Subjectivity, GFlowNet]:
    """A model with a fresh adapter, its trained guide, and the trainer."""
    p, q = s.adapter(), s.adapter()
    task = s.task(q, p)
    trainer = GFlowNet(task.model, task.guide, optimizer=adam(q, GUIDE_RATE), num_particles=s.particles)
    trainer.fit(s.batches(PRETRAINED.observations), s.steps(GUIDE_STEPS), seed=s.seed, progress=False)
    return task, trainer


def supervised(s: Setup) -> Subjectivity:
    """An adapter trained on log p(y | x) of the labelled sentences, without reasons."""
    p = s.adapter()
    told = s.task(p=p)
    tuning = SupervisedFineTuning(
        told.direct, lambda x, y=None: told.direct(x), optimizer=adam(p, RATE), examples=lambda x, y: ((x,), {"y": y})
    )
    tuning.fit(s.batches(SUPERVISED_BATCH), s.steps(SUPERVISED_STEPS), seed=s.seed, progress=False)
    return told


def adam(lm: LanguageModel, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(lm.trainable_parameters(), lr=rate)


def run(cell: str, seed: int, short: bool, lm: LanguageModel, data: Path) -> Figures:
    """p(subjective) of each test sentence by every method; a sentence is named by its line in the file."""
    s = Setup(LONGER.get(cell, cell), seed, short, lm, data)
    methods = untrained(s) if cell == "untrained" else longer(s) if cell in LONGER else trained(s)
    found: Figures = {"lines": s.lines, "y": s.y.tolist(), "methods": methods}
    return found if cell not in COUNTS else found | {"shown": shown(s, methods[EM])}


def shown(s: Setup, method: Figures) -> list[list[str]]:
    """The first reasons that led to a right label and to a wrong one, as rows of a table."""
    hits, rows = right(method["p"], s.y.tolist()), []
    for hit, name in ((1.0, "right"), (0.0, "wrong")):
        for i in [i for i, h in enumerate(hits) if h == hit][:SHOWN]:
            cells = list(WORDS)[int(s.y[i])], s.test[i].text.strip()[:BEGINNING], method["reasons"][i]
            rows.append([name, *(cell.replace("|", "\\|").replace("\n", " ") for cell in cells)])
    return rows


# -- figures -----------------------------------------------------------------------------------------------------------


def right(p: Sequence[float], y: Sequence[int]) -> list[float]:
    """1 if the more likely label is the true one, 0 if it is not, 1/2 if both are equally likely."""
    return hits(*forecast(p, y)).tolist()


def forecast(p: Sequence[float], y: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The probabilities of both labels (2, B) and the true labels (B,)."""
    subjective = torch.tensor(p, dtype=torch.float64)
    return torch.stack([1 - subjective, subjective]), torch.tensor(y)


def pooled(runs: Sequence[Figures], method: str, key: str = "p") -> tuple[list[float], list[int]]:
    """A method's figures for the sentences of all seeds, and the labels of the sentences."""
    said = [q for r in runs for q in r["methods"][method][key]]
    return said, [label for r in runs for label in r["y"]]


def together(ours: Sequence[Figures], theirs: Sequence[Figures]) -> list[Figures]:
    """Runs on the same test sentences, with the methods of both; only ours if there is no such run of theirs."""
    of = {tuple(r["lines"]): r["methods"] for r in theirs}
    both = [r | {"methods": of[tuple(r["lines"])] | r["methods"]} for r in ours if tuple(r["lines"]) in of]
    return both or list(ours)


def report(results: Results) -> str:
    """Accuracy and calibration by method and number of labels, reasons, and the claims."""
    text = opening(
        QUESTION,
        f"Data: {TEST} test sentences for each seed. The labelled sentences are the paper's files, the same for every "
        "seed. *Exact-prior chains* draw reasons from the untrained p(z|x). *Calibrated*: the median log-odds of "
        f"{UNLABELLED} unlabelled training sentences is subtracted. Labelled sentences that training read, with "
        f"repetitions: supervised {SUPERVISED_STEPS * SUPERVISED_BATCH}, GFlowNet "
        f"{GUIDE_STEPS * PRETRAINED.observations}, EM after it {ROUNDS * PRETRAINED.observations}, longer EM "
        f"{LONGER_ROUNDS * LONGER_BATCH}. Longer EM was planned after the other figures, on other sentences, had been "
        "read.",
        {
            "paper": "the paper's accuracy in percent",
            "accuracy": "right labels in percent, with the 95% interval over sentences",
            "paired": "difference to supervised fine-tuning on the same sentences, with its 95% interval",
            "vote": f"accuracy in percent by the majority vote of {REASONS} reasons",
            "ECE": "expected calibration error in ten bins; 0 is best",
            "log score": "mean log-probability of the true label, nats per sentence; 0 is best, a coin has -0.69",
        },
    )
    shorter = {cell: runs for cell, runs in results.items() if cell not in LONGER}
    rows = [row(cell, runs, method) for cell, runs in shorter.items() for method in runs[0]["methods"]]
    rows += [row(cell, runs, LONGER_EM) for cell, runs in with_longer(results).items()]
    text += markdown(HEADER, sorted(rows, key=lambda r: [*shorter, *COUNTS].index(r[0]))) + "\n"
    for cell in COUNTS:
        if cell in results:
            text += f"Reasons of GFlowNet + EM with {cell} labels, first seed, and whether the label was right:\n\n"
            text += markdown(("", "label", "sentence", "a reason"), results[cell][0]["shown"]) + "\n"
            return text + "".join(claims(results))
    return text


def with_longer(results: Results) -> dict[str, list[Figures]]:
    """The runs of longer EM by number of labels, with all methods of their seeds."""
    return {n: together(results[cell], results.get(n, [])) for cell, n in LONGER.items() if cell in results}


def accuracy(runs: Sequence[Figures], method: str) -> tuple[float, float]:
    """The accuracy in percent and half of its 95% interval over sentences."""
    hits = [100 * h for h in right(*pooled(runs, method))]
    return paired(hits, [0.0] * len(hits))


def row(cell: str, runs: Sequence[Figures], method: str) -> list[str]:
    p, y = pooled(runs, method)
    share, half = accuracy(runs, method)
    paper = PAPER[method][COUNTS.index(cell)] if method in PAPER and cell in COUNTS else ""
    against = ""
    if "supervised" in runs[0]["methods"] and method != "supervised":
        against = "{:+.1f} ± {:.1f}".format(*difference(runs, method, "supervised"))
    vote = ""
    if "vote" in runs[0]["methods"][method]:
        vote = f"{100 * mean(right(*pooled(runs, method, 'vote'))):.1f}"
    said = forecast(p, y)
    calibration = f"{calibration_error(*said):.3f}", f"{log_score(*said):.3f}"
    return [cell, method, paper, f"{share:.1f} ± {half:.1f}", against, vote, *calibration, str(len(runs))]


def difference(runs: Sequence[Figures], method: str, other: str) -> tuple[float, float]:
    """By how many points a method is ahead on the same sentences, and half of the 95% interval."""
    ours, theirs = ([100 * h for h in right(*pooled(runs, m))] for m in (method, other))
    return paired(ours, theirs)


def claims(results: Results) -> list[str]:
    """A verdict on each claim whose cells have run."""
    said, every = [], results | {f"{n}, longer": runs for n, runs in with_longer(results).items()}
    for ours, theirs, cells in (
        ("GFlowNet", "supervised", ("10", "20")),
        (EM, "supervised", ("10", "20")),
        (EM, "GFlowNet", ("10", "50")),
        ("GFlowNet", "few-shot", ("10",)),
        (LONGER_EM, "supervised", COUNTS),
        (LONGER_EM, EM, COUNTS),
    ):
        for cell in cells:
            runs = every.get(f"{cell}, longer" if ours == LONGER_EM else cell, [])
            if runs and {ours, theirs} <= runs[0]["methods"].keys():
                gain, half = difference(runs, ours, theirs)
                sentences = sum(len(r["y"]) for r in runs)
                because = f"{gain:+.1f} ± {half:.1f} points on {sentences} sentences."
                said.append(verdict(f"{ours} is ahead of {theirs} at {cell} labels", gain > half, because))
    return said


def headline(results: Results) -> Headline:
    """Accuracy by number of labels."""
    methods, found = ("supervised", "GFlowNet", EM), []
    for i, cell in enumerate(COUNTS):
        if cell not in results:
            continue
        runs, shown = results[cell], methods
        if len(both := with_longer(results).get(cell, [])) == len(runs) and LONGER_EM in both[0]["methods"]:
            runs, shown = both, (*methods, LONGER_EM)
        paper = ", ".join(PAPER[m][i] for m in methods)
        here = ", ".join("{:.1f} ± {:.1f}".format(*accuracy(runs, m)) for m in shown)
        found.append((f"accuracy of {', '.join(shown)}; {cell} labels", paper, here, len(runs)))
    return found


STUDY = Study(
    "subjectivity",
    "Subjectivity",
    CELLS,
    run,
    report,
    paired=False,
    needs=tuple(f"subj/{name}.jsonl" for name in ("train", "train.10", "train.20", "train.50", "test")),
    headline=headline,
)
