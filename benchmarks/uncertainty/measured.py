"""The figures of one draw of labels: members, their predictions, and what their uncertainty finds."""

from __future__ import annotations

import math
from statistics import mean

import torch
from torch import Tensor

from lmppl import LanguageModel, text
from lmppl.distributions import Completion
from lmppl.embedded import data
from lmppl.embedded.subjectivity import STRANGE, strange
from lmppl.inference import SGLD, Ensemble, Prediction
from lmppl.models.forecasts import (
    auroc,
    brier_score,
    calibration_error,
    hits,
    log_score,
    risk_coverage,
    selective_accuracy,
)
from lmppl.models.programs.subjectivity import Subjectivity

from ..paper.study import Figures
from ..paper.subjectivity import SUPERVISED_STEPS, TEST_SENTENCES, Setup, exact_em, gflownet, gflownet_em

CELLS = ("10", "50", "SGLD")
MEMBERS, CHAINS, FEW = 5, 32, (2, 4, 8, 16, 32)
IMPOSSIBLE = 100  # sentences by each rule
# Chosen on validation sentences and on labels that no seed of the study draws.
PRIOR_SCALE, RATE, TEMPERATURE, BURN_IN, THIN = 3.0, 0.03, 1e-3, 100, 25  # of SGLD
BETWEEN = 60  # points of a curve that are kept


class Sentences:
    """Test sentences, then sentences that the corpus cannot have, and the measures of predictions for them."""

    def __init__(self, s: Setup, short: bool):
        test = data("subjectivity", "test")[: 32 if short else TEST_SENTENCES]
        told = {rule: strange(rule, 8 if short else IMPOSSIBLE) for rule in STRANGE}
        self.x = s.lm.encode([t.text for t in test] + [text for texts in told.values() for text in texts])
        self.y, self.count = s.y_test, len(test)
        learnt = {t.kind for t in s.sentences}
        self.unlearnt = torch.tensor([t.kind not in learnt for t in test])
        self.groups = {"test": slice(0, self.count)}
        for rule, texts in told.items():
            start = max(g.stop for g in self.groups.values())
            self.groups[rule] = slice(start, start + len(texts))

    def forecast(self, probabilities: Tensor) -> Figures:
        """Measures of probabilities on the test sentences, and of how well 1 - max p finds their errors."""
        p = probabilities[:, : self.count]
        right, unsure = hits(p, self.y), 1 - p.amax(0)
        found = {
            "accuracy": float(right.mean()),
            "calibration": calibration_error(p, self.y),
            "brier": brier_score(p, self.y),
            "log score": finite(log_score(p, self.y)),
            **self.errors(unsure, right),
        }
        curve = 1 - risk_coverage(unsure, 1 - right)
        points = torch.linspace(0, self.count - 1, BETWEEN).round().long()
        return found | {"curve": curve[points].tolist(), "ECE by chance": self.ideal(p)}

    def ideal(self, p: Tensor) -> float:
        """The calibration error that answers drawn from p itself would have."""
        g = torch.Generator().manual_seed(0)
        drawn = [torch.multinomial(p.double().T, 1, generator=g)[:, 0] for _ in range(20)]
        return mean(calibration_error(p, y) for y in drawn)

    def errors(self, score: Tensor, right: Tensor) -> Figures:
        wrong, score = 1 - right, score[: self.count].double()
        return {
            "errors": auroc(score, wrong > 0),
            "AURC": float(risk_coverage(score, wrong).mean()),
            "half": selective_accuracy(score, wrong, 0.5),
        }

    def finds(self, score: Tensor, right: Tensor) -> Figures:
        """What a score (B,) finds: errors, unlearnt kinds, and impossible sentences beside those of the test."""
        test, found = score[: self.count].double(), self.errors(score, right)
        if 0 < int(self.unlearnt.sum()) < self.count:
            found["unlearnt"] = auroc(test, self.unlearnt)
        for rule in STRANGE:
            other = score[self.groups[rule]].double()
            found[rule] = auroc(torch.cat([test, other]), torch.arange(len(test) + len(other)) >= len(test))
        return found | {"impossible": mean(found[rule] for rule in STRANGE)}


def finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


# -- members -----------------------------------------------------------------------------------------------------------


def direct(s: Setup) -> Subjectivity:
    """An adapter trained on log p(y | x), no reason."""
    p = s.adapter()
    task = s.task(p=p)
    s.climb(p, s.steps(SUPERVISED_STEPS), lambda x, y: task.log_direct(x).gather(-1, y[:, None])[:, 0], math.inf)
    return task


@torch.no_grad()
def answers(task: Subjectivity, x: Tensor) -> Prediction:
    """The direct answer: of one particle."""
    log_p = task.log_direct(x).T[:, None]  # (C, 1, B)
    return Prediction(list(task.labels), log_p, torch.zeros_like(log_p[0]))


def along(s: Setup, x: Tensor, count: int) -> list[Prediction]:
    """The exact predictions of so many samples of an adapter's parameters: a cold chain of SGLD from no change."""
    p = s.adapter()
    task, found = s.task(p=p), list[Prediction]()
    sampler = SGLD(p.trainable_parameters(), lr=RATE, prior_scale=PRIOR_SCALE, temperature=TEMPERATURE)
    burn_in, thin = (1, 1) if s.short else (BURN_IN, THIN)
    for step in range(burn_in + thin * (count - 1) + 1):
        sampler.zero_grad()
        (-task.log_likelihood(s.x, s.y).sum()).backward()  # all labels: no batch
        sampler.step()
        if step >= burn_in and (step - burn_in) % thin == 0:
            found.append(task.predict(x))
    return found


@torch.no_grad()
def surprise(lm: LanguageModel, x: Tensor) -> Tensor:
    """-log p(x), nats, of whole sentences after nothing: a detector that asks for no answer, (B,)."""
    return -Completion(lm, lm.encode(""), max_tokens=text.length(x), stop=None).log_prob(x)


# -- the study ---------------------------------------------------------------------------------------------------------


def scores(found: Ensemble) -> dict[str, Tensor]:
    """What may tell that an answer is wrong, each (B,), higher where less certain."""
    u = found.split()
    return {
        "1 - max p": 1 - found.probabilities.amax(0),
        "disagreement of votes": 1 - found.vote.amax(0),
        "entropy": u.entropy,
        "expected entropy": u.expected_entropy,
        "chain information": u.chain_information,
        "parameter information": u.parameter_information,
    }


def parts(found: Ensemble, sentences: Sentences, right: Tensor) -> Figures:
    """The mean of each part of the entropy in each group of sentences."""
    u = found.split()
    test = {"right": right > 0.5, "wrong": right <= 0.5, "unlearnt": sentences.unlearnt}
    rows = {name: chosen.nonzero()[:, 0] for name, chosen in test.items()}
    rows |= {rule: torch.arange(len(sentences.x))[sentences.groups[rule]] for rule in STRANGE}
    names = "expected_entropy", "chain_information", "parameter_information"
    return {name: {part: finite(float(getattr(u, part)[own].mean())) for part in names} for name, own in rows.items()}


def judged(found: Ensemble, sentences: Sentences) -> Figures:
    """An ensemble's forecast, its scores and the parts of its entropy."""
    right = hits(found.probabilities[:, : sentences.count], sentences.y)
    return {
        "forecast": sentences.forecast(found.probabilities),
        "scores": {name: sentences.finds(score, right) for name, score in scores(found).items()},
        "parts": parts(found, sentences, right),
    }


def first(p: Prediction, n: int, count: int) -> Prediction:
    """By its first n draws alone, of equal weight, on so many sentences."""
    return Prediction(p.names, p.log_probs[:, :n, :count], p.log_weights[:n, :count].log_softmax(0))


def few(exact: Ensemble, drawn: list[Prediction], sentences: Sentences) -> Figures:
    """What few chains tell of the informations, by both estimates: the mean over test sentences, and the error."""
    names, found = ("chain_information", "parameter_information"), {}
    truth = {name: getattr(exact.split(), name)[: sentences.count] for name in names}
    found["exact"] = {name: float(t.mean()) for name, t in truth.items()}
    for n in FEW:
        some = Ensemble.of([first(p, n, sentences.count) for p in drawn])
        for how in ("split", "jackknife"):
            u = getattr(some, how)()
            for name, t in truth.items():
                error = (getattr(u, name) - t).square().mean().sqrt()
                found[f"{how} {name} {n}"] = {"mean": float(getattr(u, name).mean()), "error": float(error)}
    return found


def run(cell: str, seed: int, short: bool = False) -> Figures:
    """Every method on one draw of labels."""
    s = Setup(seed, 10 if cell == "SGLD" else int(cell), 0, short=short)
    sentences, members = Sentences(s, short), 2 if short else MEMBERS
    x = sentences.x
    if cell == "SGLD":
        return {"ensemble": judged(Ensemble.of(along(s, x, members)), sentences)}
    plain = [answers(direct(s), x) for _ in range(members)]
    tasks = [exact_em(s) for _ in range(members)]
    exact = [task.predict(x) for task in tasks]
    drawn = [task.predict(x, num_particles=CHAINS) for task in tasks]
    one = first(drawn[0], 1, len(x))
    said = {
        "direct, one adapter": plain[0].probabilities,
        "direct, five adapters": Ensemble.of(plain).probabilities,
        "one chain": one.probabilities,
        "votes of 32 chains": drawn[0].vote,
        "mean of 32 chains": drawn[0].probabilities,
        "all chains, one adapter": exact[0].probabilities,
        "32 chains each of five adapters": Ensemble.of(drawn).probabilities,
    }
    if cell == "10":
        task, trainer = gflownet(s, s.adapter())
        gflownet_em(s, task, trainer)
        said["32 chains of the guide"] = task.predict(x, "guide", CHAINS).probabilities
    whole = Ensemble.of(exact)
    right = hits(whole.probabilities[:, : sentences.count], sentences.y)
    return {
        "forecasts": {name: sentences.forecast(p) for name, p in said.items()},
        "ensemble": judged(whole, sentences),
        "one": judged(Ensemble.of(exact[:1]), sentences),
        "direct": judged(Ensemble.of(plain), sentences),
        "surprise": sentences.finds(surprise(s.lm, x), right),
        "unlearnt": float(sentences.unlearnt.double().mean()),
        "few": few(whole, drawn, sentences),
    }
