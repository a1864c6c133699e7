r"""Does SmolLM2 know when it does not know?  Uncertainty of its labels, by chains and by adapters.

The plan was frozen before a figure of it was seen.  Sentences, prompts and labels are those of `subjectivity`; no
prompt and no recipe is chosen here.  A score, for example the entropy of an answer in nats, should find the errors of
that answer.  It is measured by AUROC, with the 95% percentile interval of 2,000 resamples of the test sentences; so
the interval holds for this model and these adapters.

- *untrained*: each seed has its own third of 150 test sentences.  It has the direct answer and `REASONS` chains of
  p(z | x); p(y | x, z) of each chain is kept, so that entropy = expected entropy + chain information.
- *supervised, 10 labels*: each seed is a member of an ensemble, an adapter trained by `subjectivity.supervised` on the
  same ten labels, with its own first weights and its own order.  It has its direct answers on all 150 sentences.

The table also has figures from the records of `subjectivity`, on a hundred sentences for each seed: direct answers and
chains of the untrained model; and with 10 labels, one adapter for each seed, direct answers of supervised adapters and
chains of guides before and after EM.

We expected, as on the embedded sentences: chains know their errors better than the direct answer does; the ensemble
does so better than one member; and no part of the entropy is better than their sum.

Planned cost: a third of the sentences 50 x (2 + 0.3) s, an adapter 160 s and 150 x 0.3 s for its answers: 15 minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.paper.study import Figures, Results, Study, markdown, opening, verdict
from lmppl import LanguageModel
from lmppl.inference import Ensemble, Prediction
from lmppl.models.forecasts import auroc, hits, selective_accuracy

from .subjectivity import REASONS, WORDS, Setup, forecast, pooled, supervised

UNTRAINED, MEMBERS = "untrained", "supervised, 10 labels"
CELLS = (UNTRAINED, MEMBERS)
SENTENCES, PARTS = 150, 3  # test sentences, and the number of seeds that share them
RESAMPLES = 2000
HEADER = ("answer", "score", "sentences", "accuracy", "AUROC of its errors", "accuracy of the surer half")


def run(cell: str, seed: int, short: bool, lm: LanguageModel, data: Path) -> Figures:
    """p(subjective) of sentences, named by their lines in the file, by the direct answer and by every chain."""
    count = 6 if short else SENTENCES
    share = count // PARTS
    part = seed % PARTS
    chosen = range(part * share, (part + 1) * share) if cell == UNTRAINED else range(count)
    s = Setup("10", seed, short, lm, data, chosen)
    found: Figures = {"lines": s.lines, "y": s.y.tolist()}
    if cell == MEMBERS:
        return found | {"direct": s.directly(supervised(s))["p"]}
    task = s.task()
    drawn = task.predict(s.x, num_particles=2 if short else REASONS)
    return found | {"direct": s.directly(task)["p"], "chains": drawn.log_probs[1].exp().double().tolist()}


# -- figures -----------------------------------------------------------------------------------------------------------


def of_chains(runs: Sequence[Figures]) -> tuple[Ensemble, Tensor]:
    """The chains of all thirds as the prediction of an ensemble of one member, and the true labels."""
    subjective = torch.cat([torch.tensor(r["chains"], dtype=torch.float64) for r in runs], 1)  # (N, B)
    return Ensemble.of([prediction(subjective)]), truth(runs)


def of_members(runs: Sequence[Figures]) -> tuple[Ensemble, Tensor]:
    """The direct answers of the adapters, one member each, and the true labels; all have the same sentences."""
    members = [prediction(torch.tensor([r["direct"]], dtype=torch.float64)) for r in runs]
    return Ensemble.of(members), truth(runs[:1])


def prediction(subjective: Tensor) -> Prediction:
    """A prediction from p(subjective) of each chain, (N, B)."""
    log_p = torch.stack([1 - subjective, subjective]).log()
    return Prediction(list(WORDS.values()), log_p, torch.zeros_like(subjective).log_softmax(0))


def truth(runs: Sequence[Figures]) -> Tensor:
    return torch.tensor([label for r in runs for label in r["y"]])


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy of probabilities (C, B), nats."""
    return -torch.xlogy(probabilities, probabilities).sum(0)


def interval(scores: Sequence[Tensor], wrong: Sequence[Tensor]) -> tuple[float, float, float]:
    """An AUROC, or the difference of two, and its 95% interval over resamples of the sentences."""
    g = torch.Generator().manual_seed(0)
    found = []
    for n in range(RESAMPLES + 1):
        count = len(wrong[0])
        rows = torch.randint(count, (count,), generator=g) if n else torch.arange(count)
        if all(0 < float(w[rows].sum()) < count for w in wrong):  # else it is undefined
            each = [auroc(s[rows], w[rows] > 0.5) for s, w in zip(scores, wrong, strict=True)]
            found.append(each[0] - sum(each[1:]))
    low, high = torch.tensor(found[1:], dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return found[0], low, high


class Answer:
    """An answer's scores of uncertainty, and where it is right."""

    def __init__(self, probabilities: Tensor, y: Tensor, scores: dict[str, Tensor] | None = None):
        self.right = hits(probabilities, y)
        self.scores = {"entropy": entropy(probabilities)} | (scores or {})

    @classmethod
    def of(cls, found: Ensemble, y: Tensor, *parts: str) -> Answer:
        split = found.split()
        return cls(found.probabilities, y, {part.replace("_", " "): getattr(split, part) for part in parts})

    @property
    def wrong(self) -> Tensor:
        return 1 - self.right

    def rows(self, name: str) -> list[list[str]]:
        """The rows of the table, one for each score."""
        said = []
        for score, values in self.scores.items():
            area, low, high = interval([values], [self.wrong])
            half = selective_accuracy(values, self.wrong, 0.5)
            accuracy = f"{100 * float(self.right.mean()):.1f}"
            found = f"{area:.2f} ({low:.2f} to {high:.2f})"
            said.append([name, score, str(len(values)), accuracy, found, f"{100 * half:.1f}"])
        return said


def ahead(claim: str, ours: tuple[Answer, str], theirs: tuple[Answer, str]) -> str:
    """A verdict by the difference of two AUROCs on the same sentences, each for the errors of its own answer."""
    (a, of_a), (b, of_b) = ours, theirs
    area, low, high = interval([a.scores[of_a], b.scores[of_b]], [a.wrong, b.wrong])
    said = f"AUROC {area:+.2f}, {low:+.2f} to {high:+.2f}, on {len(a.right)} sentences."
    return verdict(claim, low > 0, said)


RECORDED = {  # cells of the study of subjectivity; their methods, the direct answer first, and the names used here
    "untrained": {
        "zero-shot": "untrained, direct",
        "exact-prior chains": f"untrained, {REASONS} chains",
        "zero-shot, calibrated": "untrained, direct, calibrated",
        "exact-prior chains, calibrated": f"untrained, {REASONS} chains, calibrated",
    },
    "10": {
        "supervised": "10 labels, direct",
        "GFlowNet": f"10 labels, {REASONS} chains of the GFlowNet",
        "GFlowNet + EM": f"10 labels, {REASONS} chains of GFlowNet + EM",
    },
}


def recorded(results: Results) -> dict[str, Answer]:
    """The answers in the records of subjectivity, of all seeds."""
    return {
        name: Answer(*forecast(*pooled(runs, method)))
        for cell, methods in RECORDED.items()
        if (runs := results.get(f"subjectivity: {cell}"))
        for method, name in methods.items()
    }


def report(results: Results) -> str:
    """How well each answer's uncertainty finds its own errors, and the claims."""
    answers, said = recorded(results), ""
    for cell, method in (("untrained", "exact-prior chains"), ("10", "GFlowNet + EM")):
        if f"subjectivity: {cell}" in results:
            direct, *_ = (names := RECORDED[cell]).values()
            pair = (answers[names[method]], "entropy"), (answers[direct], "entropy")
            where = "untrained" if cell == "untrained" else f"at {cell} labels, by GFlowNet + EM"
            said += ahead(f"{where}, chains know their errors better than the direct answer", *pair)
    if UNTRAINED in results:
        chains = Answer.of(*of_chains(results[UNTRAINED]), "expected_entropy", "chain_information")
        answers["untrained, each chain kept"] = chains
        parts = (chains, "chain information"), (chains, "entropy")
        said += ahead("untrained, chain information finds errors better than entropy", *parts)
    if len(runs := results.get(MEMBERS, [])) > 1:
        whole = Answer.of(*of_members(runs), "expected_entropy", "parameter_information")
        one = Answer(*forecast(runs[0]["direct"], runs[0]["y"]))
        answers |= {"10 labels, one adapter of these, direct": one, f"10 labels, {len(runs)} adapters, direct": whole}
        entropy, parameters = (whole, "entropy"), (whole, "parameter information")
        said += ahead("an ensemble of adapters knows its errors better than one of them", entropy, (one, "entropy"))
        said += ahead("parameter information finds errors better than entropy", parameters, entropy)
    rows = [row for name, answer in answers.items() for row in answer.rows(name)]
    text = opening(
        "Does the uncertainty of an answer find the errors of that answer?",
        "Data: the task of the section on subjectivity. Rows with 300 sentences are from its records, a hundred "
        "sentences and one adapter for each seed. For the other rows every chain or adapter was kept, so that the "
        "entropy can be split into parts ([uncertainty.md](uncertainty.md)).",
        {
            "score": "the measure of uncertainty: the entropy of the labels' probabilities, averaged over chains or "
            "adapters, or a part of it",
            "accuracy": "right labels in percent",
            "AUROC of its errors": "probability that a wrong answer has a larger score than a right one, with the 95% "
            "interval over test sentences; 0.5 is chance",
            "accuracy of the surer half": "right labels in percent among the half of the sentences with the smallest "
            "scores",
        },
    )
    return f"{text}{markdown(HEADER, rows)}\n{said}"


STUDY = Study(
    "uncertainty",
    "Uncertainty of the labels",
    CELLS,
    run,
    report,
    paired=False,
    needs=tuple(f"subj/{name}.jsonl" for name in ("train", "train.10", "train.20", "train.50", "test")),
    beside=("subjectivity",),
)
