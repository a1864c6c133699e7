"""Tables, claims and the picture of `python -m benchmarks.uncertainty`."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from lmppl.embedded.subjectivity import STRANGE

from ..paper.study import Figures, Results, markdown, meanings, paired, spread, verdict
from .measured import FEW

CAPTION = (
    "The picture, with 10 labels, means over seeds. Left: accuracy by the share of sentences that are answered, the "
    "surest first. Votes are unanimous on most sentences and cannot order these. Right: the parts of the entropy of "
    "the answer by all chains of five adapters, for test sentences that are answered rightly, answered wrongly, or of "
    "kinds without a label, and for three sorts of impossible sentences."
)
FORECAST = {
    "accuracy": ("accuracy", 1, 100),
    "calibration": ("ECE", 3, 1),
    "ECE by chance": ("ECE by chance", 3, 1),
    "brier": ("Brier", 3, 1),
    "log score": ("log score", 3, 1),
    "errors": ("AUROC of errors", 3, 1),
    "AURC": ("AURC", 3, 1),
    "half": ("accuracy on the surer half", 1, 100),
}
FINDS = {"errors": "errors", "AURC": "AURC", "unlearnt": "unlearnt kinds"} | {rule: rule for rule in STRANGE}


FIRST = (
    "Each prediction on 300 test sentences. Its uncertainty is 1 - max p. The number in brackets is the standard "
    "deviation over seeds.\n\n"
)
FIRST_COLUMNS = {
    "accuracy": "right labels in percent",
    "ECE": "expected calibration error; 0 is best",
    "ECE by chance": "the ECE that 300 answers drawn from the forecast itself would have",
    "Brier": "mean squared error of the probabilities, from 0 to 2",
    "log score": "mean log-probability of the true label, nats; infinite if all votes for a sentence are wrong",
    "AUROC of errors": "probability that a wrong answer is less certain than a right one; 0.5 is chance",
    "AURC": "mean share of errors over all coverages; lower is better",
    "accuracy on the surer half": "right labels in percent among the half of the sentences with the least uncertainty",
}
SECOND = (
    "What each score finds. The scores are those of the prediction by all chains of five adapters; a row that names "
    "another prediction has the scores and the errors of that one. With two labels, entropy and 1 - max p put "
    "sentences in the same order.\n\n"
)
SECOND_COLUMNS = {
    "errors": "AUROC of the prediction's errors",
    "AURC": "mean share of errors over all coverages",
    "unlearnt kinds": "AUROC of test sentences of kinds without a label ({share:.0f}% with 10 labels) among all test "
    "sentences",
    "three kinds, word order, idle words": "AUROC of impossible sentences, compared with test sentences",
}
THIRD = (
    "Information parts estimated from few chains of each of five adapters, 10 labels, nats: the mean over test "
    "sentences, and the root mean square error of the estimate for one sentence.\n\n"
)


def forecasts(results: Results, cell: str) -> list[list[str]]:
    """Rows of the first table."""
    every = [f["forecasts"] | {"all chains, five adapters": f["ensemble"]["forecast"]} for f in results[cell]]
    said = {name: [f[name] for f in every] for name in every[0]}
    if cell == "10" and "SGLD" in results:
        said["all chains, five samples of SGLD"] = [f["ensemble"]["forecast"] for f in results["SGLD"]]
    return [[name, *(spread(runs, k, d, f) for k, (_, d, f) in FORECAST.items())] for name, runs in said.items()]


def found_by(results: Results, cell: str) -> list[list[str]]:
    """Rows of the second table: scores of the ensemble and of other predictions."""
    runs = results[cell]
    said = {name: [f["ensemble"]["scores"][name] for f in runs] for name in runs[0]["ensemble"]["scores"]}
    said["one adapter: entropy"] = [f["one"]["scores"]["entropy"] for f in runs]
    said["one adapter: chain information"] = [f["one"]["scores"]["chain information"] for f in runs]
    said["direct answers: entropy"] = [f["direct"]["scores"]["entropy"] for f in runs]
    said["direct answers: parameter information"] = [f["direct"]["scores"]["parameter information"] for f in runs]
    if cell == "10" and "SGLD" in results:
        for name in ("entropy", "parameter information"):
            said[f"samples of SGLD: {name}"] = [f["ensemble"]["scores"][name] for f in results["SGLD"]]
    said["-log p(x), no answer asked"] = [f["surprise"] for f in runs]
    return [[name, *(spread(own, k) if all(k in f for f in own) else "–" for k in FINDS)] for name, own in said.items()]


def estimates(results: Results, cell: str) -> str:
    """The third table: informations from few chains."""
    runs = [f["few"] for f in results[cell]]
    header, rows = ["chains per member", *map(str, FEW), "all"], []
    for name in ("chain_information", "parameter_information"):
        for how, title in (("split", "plug-in"), ("jackknife", "jackknife")):
            for key in ("mean", "error"):
                cells = [spread([f[f"{how} {name} {n}"] for f in runs], key) for n in FEW]
                exact = spread([f["exact"] for f in runs], name) if key == "mean" else "0"
                rows.append(
                    [f"{name.replace('_', ' ')}, {title}, {'mean' if key == 'mean' else 'RMSE'}", *cells, exact]
                )
    return markdown(header, rows)


def ahead(claim: str, ours: list[Figures], theirs: list[Figures], key: str = "errors") -> str:
    """A verdict by paired differences of an AUROC; for errors, AURC is shown too."""
    d, half = paired([f[key] for f in ours], [f[key] for f in theirs])
    because = f"AUROC {d:+.3f} ± {half:.3f}"
    if key == "errors":
        because += "; AURC {:+.3f} ± {:.3f}".format(*paired([f["AURC"] for f in ours], [f["AURC"] for f in theirs]))
    return verdict(claim, d > half, f"{because}; {len(ours)} paired draws.")


def claims(results: Results) -> str:
    """The verdict on every claim."""
    said = ""
    for cell in ("10", "50"):
        five = [f["ensemble"]["forecast"] for f in results[cell]]
        known = {name: [f["forecasts"][name] for f in results[cell]] for name in results[cell][0]["forecasts"]}
        one = known["all chains, one adapter"]
        for ours, theirs, claim in (
            (one, known["direct, one adapter"], "than the direct answer, an adapter each"),
            (five, known["direct, five adapters"], "than direct answers, five adapters each"),
            (one, known["votes of 32 chains"], "by their average than by 32 votes"),
            (five, one, "with five adapters than with one"),
        ):
            said += ahead(f"chains know their errors better {claim}, {cell} labels", ours, theirs)
    scores = {
        name: [f["ensemble"]["scores"][name] for f in results["10"]] for name in results["10"][0]["ensemble"]["scores"]
    }
    parameters = scores["parameter information"]
    for key, what in (("unlearnt", "kinds that had no label"), ("impossible", "impossible sentences")):
        for other in ("expected entropy", "chain information", "entropy"):
            claim = f"parameter information finds {what} better than {other} does, 10 labels"
            said += ahead(claim, parameters, scores[other], key)
    return said + ahead(
        "entropy finds errors better than parameter information, 10 labels", scores["entropy"], parameters
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
        f"{FIRST}{meanings(FIRST_COLUMNS)}\n{table}{SECOND}"
        f"{meanings(SECOND_COLUMNS).format(share=100 * share)}\n{finds}"
        f"{THIRD}{estimates(results, '10')}\n{claims(results)}\n{CAPTION}\n"
    )


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
        heights = [mean(f["ensemble"]["parts"][name][part] for f in runs) for name in names]
        right.bar(names, heights, bottom=bottom, label=title)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    right.set(ylabel="entropy of the answer, nats, by group of sentences")
    right.set_ylim(0, 1.3 * max(bottom))  # room for the legend
    right.tick_params(axis="x", labelrotation=20)
    right.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
