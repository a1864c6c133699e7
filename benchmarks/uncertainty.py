"""Uncertainty through chains of thought: does a model know when it does not know?  docs/uncertainty.md.

    python -m benchmarks.uncertainty --seeds 4

Every unit of work (a cell and a seed) is one JSON file under --runs; the same command goes on where an interrupted one
was.  The plan, frozen before a trained method read a test sentence.

A member is an adapter that exact EM trained on the labelled sentences (10 or 50, those of `benchmarks.paper`, a draw a
seed): both factors of p(y | x) = sum over z of p(z | x) p(y | x, z), from adapters that begin apart.  Five of them are
the ensemble; in the cell "SGLD" members are samples of one adapter's parameters along a chain.  Beside them the direct
answer ("{x} is"), an adapter or five of them trained on log p(y | x) without a reason.

A prediction is judged on 300 test sentences by how often it is right, its calibration, and by whether its uncertainty
finds its own errors.  Then all scores of one prediction, the ensemble's: do they find its errors, sentences of kinds
that no labelled sentence had (*unlearnt*), and sentences that the corpus cannot have (`embedded.subjectivity.strange`,
100 by each rule)?  Expected: parameter information finds what was not learnt, the unlearnt and the impossible, better
than the other parts do; entropy finds errors best, since it is their sum.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean, stdev

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

from .paper import runner
from .paper.study import Figures, Headline, Results, Study, markdown, paired, spread, verdict
from .paper.subjectivity import SUPERVISED_STEPS, TEST_SENTENCES, Setup, exact_em, gflownet, gflownet_em

CELLS = ("10", "50", "SGLD")
MEMBERS, CHAINS, FEW = 5, 32, (2, 4, 8, 16, 32)
IMPOSSIBLE = 100  # sentences by each rule
# Chosen on validation sentences and on labels that no seed of the study draws.
PRIOR_SCALE, RATE, BURN_IN, THIN = 0.1, 3e-4, 60, 30
BETWEEN = 60  # points of a curve that are kept


class Sentences:
    """Test sentences first, then those that the corpus cannot have, and how to judge what is said of them."""

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
        """How good they are on the test sentences, and how well 1 - max p finds their errors."""
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
    """The exact predictions of so many samples of an adapter's parameters, a chain of SGLD from no change at all."""
    p = s.adapter()
    task, found = s.task(p=p), list[Prediction]()
    sampler = SGLD(p.trainable_parameters(), lr=RATE, prior_scale=PRIOR_SCALE)
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


# -- the page ----------------------------------------------------------------------------------------------------------

FORECAST = {
    "accuracy": ("accuracy", 1, 100),
    "calibration": ("ECE", 3, 1),
    "ECE by chance": ("of it by chance", 3, 1),
    "brier": ("Brier", 3, 1),
    "log score": ("log score", 3, 1),
    "errors": ("AUROC of errors", 3, 1),
    "AURC": ("AURC", 3, 1),
    "half": ("accuracy on the surer half", 1, 100),
}
FINDS = {"errors": "errors", "AURC": "AURC", "unlearnt": "unlearnt kinds"} | {rule: rule for rule in STRANGE}


def forecasts(results: Results, cell: str) -> list[list[str]]:
    """Rows of the first table."""
    every = [f["forecasts"] | {"all chains, five adapters": f["ensemble"]["forecast"]} for f in results[cell]]
    said = {name: [f[name] for f in every] for name in every[0]}
    if cell == "10" and "SGLD" in results:
        said["all chains, five samples of SGLD"] = [f["ensemble"]["forecast"] for f in results["SGLD"]]
    return [[name, *(spread(runs, k, d, f) for k, (_, d, f) in FORECAST.items())] for name, runs in said.items()]


def found_by(results: Results, cell: str) -> list[list[str]]:
    """Rows of the second table: the ensemble's scores, and others'."""
    runs = results[cell]
    said = {name: [f["ensemble"]["scores"][name] for f in runs] for name in runs[0]["ensemble"]["scores"]}
    said["one adapter's chain information"] = [f["one"]["scores"]["chain information"] for f in runs]
    said["the direct answers' parameter information"] = [f["direct"]["scores"]["parameter information"] for f in runs]
    said["-log p(x), no answer asked"] = [f["surprise"] for f in runs]
    return [[name, *(spread(own, k) if all(k in f for f in own) else "–" for k in FINDS)] for name, own in said.items()]


def estimates(results: Results, cell: str) -> str:
    """The third table: informations from few chains."""
    runs = [f["few"] for f in results[cell]]
    header, rows = ["chains a member", *map(str, FEW), "all"], []
    for name in ("chain_information", "parameter_information"):
        for how, title in (("split", "plug-in"), ("jackknife", "jackknife")):
            for key in ("mean", "error"):
                cells = [spread([f[f"{how} {name} {n}"] for f in runs], key) for n in FEW]
                exact = spread([f["exact"] for f in runs], name) if key == "mean" else "0"
                rows.append(
                    [f"{name.replace('_', ' ')}, {title}, {'mean' if key == 'mean' else 'RMSE'}", *cells, exact]
                )
    return markdown(header, rows)


def gain(ours: list[float], theirs: list[float]) -> tuple[float, float, str]:
    """A paired difference with the half-width of its 95% interval."""
    difference, half = paired(ours, theirs)
    return difference, half, f"{difference:+.3f} ± {half:.3f} over {len(ours)} paired draws"


def of(results: Results, cell: str, score: str, key: str) -> list[float]:
    return [f["ensemble"]["scores"][score][key] for f in results[cell]]


def claims(results: Results) -> str:
    """What was expected, and whether it was seen."""
    said = ""
    for cell in ("10", "50"):
        runs = results[cell]
        known = {name: [f["forecasts"][name]["errors"] for f in runs] for name in runs[0]["forecasts"]}
        own = [f["ensemble"]["forecast"]["errors"] for f in runs]
        for ours, theirs, claim in (
            (
                known["all chains, one adapter"],
                known["direct, one adapter"],
                "than the direct answer, an adapter each",
            ),
            (own, known["direct, five adapters"], "than direct answers, five adapters each"),
            (known["all chains, one adapter"], known["votes of 32 chains"], "averaged than by votes of 32"),
            (own, known["all chains, one adapter"], "with five adapters than with one"),
        ):
            d, half, because = gain(ours, theirs)
            said += verdict(f"chains know their errors better {claim}, {cell} labels", d > half, f"AUROC {because}.")
    for key, what in (("unlearnt", "kinds that had no label"), ("impossible", "impossible sentences")):
        for other in ("expected entropy", "chain information", "entropy"):
            d, half, because = gain(of(results, "10", "parameter information", key), of(results, "10", other, key))
            said += verdict(
                f"parameter information finds {what} better than {other} does, 10 labels", d > half, f"AUROC {because}."
            )
    d, half, because = gain(
        of(results, "10", "entropy", "errors"), of(results, "10", "parameter information", "errors")
    )
    return said + verdict(
        "entropy finds errors better than parameter information, 10 labels", d > half, f"AUROC {because}."
    )


def report(results: Results) -> str:
    """Three tables and the claims."""
    table = ""
    for cell in ("10", "50"):
        table += f"{cell} labels:\n\n"
        table += markdown(["prediction", *(title for title, *_ in FORECAST.values())], forecasts(results, cell)) + "\n"
    finds = ""
    for cell in ("10", "50"):
        finds += f"{cell} labels:\n\n" + markdown(["score", *FINDS.values()], found_by(results, cell)) + "\n"
    share = mean(f["unlearnt"] for f in results["10"])
    return (
        "Each prediction on 300 test sentences, its uncertainty 1 - max p; standard deviation over seeds in brackets. "
        "Log scores in nats; *infinite* where a vote gives the truth nothing. *By chance*: the ECE that 300 answers "
        "drawn from the forecast itself would have. AURC, the mean share of errors over all coverages, is better where "
        f"lower.\n\n{table}What each score finds, all of the prediction by all chains of five adapters: AUROC of its "
        f"errors, their AURC, AUROC of kinds without a label ({100 * share:.0f}% of the test sentences at 10 labels) "
        f"among the test sentences, and of impossible sentences beside them.\n\n{finds}"
        "The informations from few chains of each of five adapters, 10 labels, nats: the mean over test sentences, and "
        f"the error of a sentence's.\n\n{estimates(results, '10')}\n{claims(results)}"
    )


def headline(results: Results) -> Headline:
    """AUROC of errors: direct, one adapter, five."""
    rows = []
    for cell in ("10", "50"):
        runs = results[cell]
        figures = [
            ("direct", [f["forecasts"]["direct, one adapter"] for f in runs]),
            ("chains", [f["forecasts"]["all chains, one adapter"] for f in runs]),
            ("chains of five adapters", [f["ensemble"]["forecast"] for f in runs]),
        ]
        for key, title, digits, scale in (("accuracy", "accuracy", 1, 100), ("errors", "AUROC of errors", 2, 1)):
            said = ", ".join(f"{name} {spread(f, key, digits, scale)}" for name, f in figures)
            rows.append((f"{title}, {cell} labels", "", said, len(runs)))
    return rows


def plot(results: Results, path: Path) -> None:
    """Selective accuracy by coverage, and the parts of the entropy by group of sentences, at 10 labels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = results["10"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    curves = {
        "direct, one adapter": [f["forecasts"]["direct, one adapter"]["curve"] for f in runs],
        "direct, five adapters": [f["forecasts"]["direct, five adapters"]["curve"] for f in runs],
        "one chain": [f["forecasts"]["one chain"]["curve"] for f in runs],
        "votes of 32 chains": [f["forecasts"]["votes of 32 chains"]["curve"] for f in runs],
        "all chains, one adapter": [f["forecasts"]["all chains, one adapter"]["curve"] for f in runs],
        "all chains, five adapters": [f["ensemble"]["forecast"]["curve"] for f in runs],
    }
    for name, said in curves.items():
        y = [100 * mean(values) for values in zip(*said, strict=True)]
        left.plot([100 * (i + 1) / len(y) for i in range(len(y))], y, label=name, lw=2.4 if "five" in name else 1.4)
    left.set(xlabel="answered: the surest sentences, %", ylabel="accuracy, %", xlim=(5, 100))
    left.legend(fontsize=8)
    names = list(runs[0]["ensemble"]["parts"])
    bottom = [0.0] * len(names)
    for part, title in (
        ("expected_entropy", "chance: expected entropy"),
        ("chain_information", "chain information"),
        ("parameter_information", "parameter information"),
    ):
        values = [[f["ensemble"]["parts"][name][part] for f in runs] for name in names]
        heights = [mean(v) for v in values]
        error = [stdev(v) if len(v) > 1 else 0.0 for v in values]
        right.bar(names, heights, bottom=bottom, label=title, yerr=error, error_kw={"lw": 0.8, "alpha": 0.6})
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    right.axhline(math.log(2), color="grey", lw=0.8, ls=":")
    right.set(ylabel="entropy of the answer, nats")
    right.tick_params(axis="x", labelrotation=20)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


PREAMBLE = Path(__file__).with_name("uncertainty.md").read_text()
STUDY = Study("uncertainty", "Figures", CELLS, run, report, plot, headline=headline)
STUDIES = (STUDY,)


def main() -> None:
    parser = runner.options(__doc__, STUDIES, seeds=4, jobs=1, runs="out/uncertainty", out="docs/uncertainty.md")
    a = parser.parse_args()
    runner.run("benchmarks.uncertainty", PREAMBLE, a, runner.chosen(parser, a, STUDIES))


if __name__ == "__main__":
    main()
