"""Tables and claims of `python -m benchmarks.diffusion`, and the figures that the text of its page quotes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from ..paper.study import Figures, Results, markdown, meanings, paired, spread, verdict
from .measured import BOUNDED, BOUNDS, CAUSAL, FEW, STEPS, UNTRAINED, VARIANCE

HEADER = ("guide", "TV, unseen", "TV, trained pairs", "sd(u)", "ESS/N", "error of log Z", "training tokens")
COLUMNS = {
    "TV, unseen; TV, trained pairs": "total variation between the guide's distribution of texts and the exact "
    "posterior, mean over stories whose pairs of place and verb were not, or were, in training",
    "sd(u)": "standard deviation of the log weights on unseen stories, 0 at the posterior",
    "ESS/N": "effective sample size of the weighted draws, as a share of N",
    "error of log Z": "absolute error of the log evidence, nats",
    "training tokens": "tokens that the networks read during training",
}
TRAINED = {VARIANCE: "VarGrad", BOUNDED: "Linex"}
ENOUGH = 0.05  # total variation


def flat(runs: Sequence[Figures], key: str = "tv") -> list[float]:
    """A figure of every story, all seeds one after another."""
    return [tv for r in runs for tv in r[key]]


def averaged(runs: Sequence[Figures], key: str) -> str:
    """Mean over stories and, in brackets, the standard deviation of the seeds' means."""
    return spread([{key: mean(r[key])} for r in runs], key) if key in runs[0] else ""


def row(name: str, runs: Sequence[Figures]) -> list[str]:
    plain = [spread(runs, key) if key in runs[0] else "" for key in ("sd", "ess", "error")]
    cost = f"{mean(r['tokens'] for r in runs):,.0f}" if "tokens" in runs[0] else ""
    return [name, averaged(runs, "tv"), averaged(runs, "seen tv"), *plain, cost]


def before(results: Results) -> list[Figures]:
    """The untrained guide."""
    return [r["guide"] for r in results.get(UNTRAINED, [])]


def by_story(ours: Sequence[Figures], theirs: Sequence[Figures], key: str = "tv") -> tuple[float, float, str]:
    """The mean difference of TV on the same stories, half of its 95% interval, and both in words."""
    difference, half = paired(flat(ours, key), flat(theirs, key))
    return difference, half, f"TV {difference:+.3f} ± {half:.3f} on {len(flat(ours, key))} stories"


def claims(results: Results) -> str:
    """The verdict on every claim."""
    text, start = "", before(results)
    for cell in (c for c in TRAINED if c in results and len(start) == len(results[c])):
        for key, what in (("seen tv", "pairs of place and verb that it was trained on"), ("tv", "unseen pairs")):
            difference, half, said = by_story(results[cell], start, key)
            claim = f"training by {TRAINED[cell]} brings the guide closer to the posterior on {what}"
            text += verdict(claim, difference < -half, f"{said}.")
    if BOUNDED in results and VARIANCE in results:
        difference, half, said = by_story(results[BOUNDED], results[VARIANCE])
        text += verdict(
            "Linex ends closer to the posterior than VarGrad on unseen pairs", difference < -half, f"{said}."
        )
    if FEW in results:
        worst = max(mean(r["seen tv"]) for r in results[FEW])
        because = f"TV is {averaged(results[FEW], 'seen tv')}, at the worst seed {worst:.3f}."
        claim = f"trained by Linex on only eight stories, the guide samples their posterior (TV at most {ENOUGH:g})"
        text += verdict(claim, worst <= ENOUGH, because)
    if CAUSAL in results and start:
        worst = max(mean(r["tv"]) for r in results[CAUSAL])
        best = min(mean(r["tv"]) for cell in (*TRAINED, UNTRAINED) for r in guides(results, cell))
        because = f"Its TV at the worst seed is {worst:.3f}, the smallest of the others in a seed {best:.3f}."
        claim = "the causal guide, trained as long, is closer to its own posterior than the other guides are to theirs"
        text += verdict(claim, worst < best, because)
    return text


def guides(results: Results, cell: str) -> list[Figures]:
    return before(results) if cell == UNTRAINED else results.get(cell, [])


def report(results: Results) -> str:
    """The table of guides, that of bounds, and the claims."""
    rows: list[list[str]] = []
    if UNTRAINED in results:
        rows += [row("the prior p(z given x), untrained", [r["prior"] for r in results[UNTRAINED]])]
        rows += [row("both ends, untrained", before(results))]
    rows += [row(f"{name}, {STEPS} steps", results[cell]) for cell, name in TRAINED.items() if cell in results]
    if FEW in results:
        rows.append(row(f"Linex, {STEPS} steps on eight stories", results[FEW]))
    if CAUSAL in results:
        rows.append(row(f"causal guide, VarGrad, {STEPS} steps, its own posterior", results[CAUSAL]))
    text = meanings(COLUMNS) + "\n" + markdown(HEADER, rows) + "\n"
    if BOUNDS in results:
        runs = results[BOUNDS]
        sandwiches = [name for name, found in runs[0].items() if isinstance(found, dict)]
        both = [[spread([r[name] for r in runs], side, 4) for side in ("below", "above")] for name in sandwiches]
        rows = [[name, *cells] for name, cells in zip(sandwiches, both, strict=True)]
        text += "How far bounds of log p of a text are from the sum over subsets, nats:\n\n"
        text += markdown(("particles", "below", "above"), rows) + "\n"
    return text + claims(results)


def told(results: Results) -> dict[str, str]:
    """The figures in the text of the page and in its row of docs/results.md."""
    found: dict[str, str] = {}
    if start := before(results):
        prior = [r["prior"] for r in results[UNTRAINED]]
        found |= {"untrained": f"{mean(flat(start)):.3f}", "untrained_seen": f"{mean(flat(start, 'seen tv')):.3f}"}
        found |= {"stories": str(len(flat(start))), "prior": f"{mean(flat(prior)):.3f}"}
        for name, runs in (("prior_", prior), ("", start)):
            found[f"{name}smc"] = f"{mean(r['smc error'] for r in runs):.2f}"
            found[f"{name}error"] = f"{mean(r['error'] for r in runs):.2f}"
            found[f"{name}sd"] = f"{mean(r['sd'] for r in runs):.2f}"
        shuffled = [r["random order"] for r in results[UNTRAINED]]
        found |= {"random": f"{mean(flat(shuffled)):.3f}", "in_order": f"{mean(flat(shuffled, 'left to right')):.3f}"}
        found["summed"] = str(len(flat(shuffled)))
        found["outside"] = f"{mean(r['outside'] for r in start):.4f}"
    for cell, name in ((VARIANCE, "vargrad"), (BOUNDED, "linex"), (FEW, "few"), (CAUSAL, "causal")):
        if runs := results.get(cell, []):
            found |= {name: f"{mean(flat(runs)):.3f}", f"{name}_seen": f"{mean(flat(runs, 'seen tv')):.3f}"}
            found[f"{name}_seeds"] = str(len(runs))
            if "sd" in runs[0]:
                found[f"{name}_sd"] = f"{mean(r['sd'] for r in runs):.2f}"
            found |= {f"{name}_tokens": f"{mean(r['tokens'] for r in runs) / 1e6:.1f}"}
            if len(start) == len(runs) and cell in TRAINED:
                for key, end in (("tv", ""), ("seen tv", "_seen")):
                    found[f"{name}_gain{end}"] = "{:+.3f} ± {:.3f}".format(*by_story(runs, start, key)[:2])
    if runs := results.get(BOUNDS, []):
        found |= {name: f"{mean(r[name] for r in runs):.3f}" for name in ("text", "path")}
    return found
