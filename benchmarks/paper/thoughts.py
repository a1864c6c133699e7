"""Trees of thoughts beside chains: every algorithm against the exact posterior, and answers at equal tokens.

Not an experiment of the paper.  The claims are this package's own, written down after a pilot on seed 100.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import mean as average
from typing import Any

import pyro
import torch
from torch import Tensor

from lmppl import LanguageModel, embedded, text
from lmppl.files import replacing
from lmppl.inference import SMC, Enumeration, Importance, MetropolisHastings, Posterior, Query, Sandwich
from lmppl.inference.judging.compare import Meter, particles_within
from lmppl.inference.posterior.algorithm import Algorithm, sized
from lmppl.models import TreeOfThoughts
from lmppl.models.experiment import Experiment
from lmppl.models.thoughts import EVERY, RECIPE, Judge, encode, experiment, small_questions, sums

from .study import Figures, Results, Study, markdown, spread, verdict
from .targets import programs

SAMPLERS, GFLOWNET, ANSWERS, SEARCHED, BOUNDS = "samplers", "GFlowNet", "answers", "searched", "bounds"
CELLS = SAMPLERS, GFLOWNET, ANSWERS, SEARCHED, BOUNDS
BUDGETS = 150, 300, 600  # tokens a query of the small world; to enumerate it takes some 740
LARGE_BUDGETS = 100, 300, 900
REPETITIONS = 4
STEPS = 100  # of the GFlowNet
CHILDREN, NUMBERS = 4, (1, 2, 4, 8, 16, 64)
PLAIN, CHAINS, SMC_CHAINS = "chains, no judge", "chains, weighed at the end", "chains, SMC"
TREES, WEIGHED, SMC_TREES = "trees as they are", "trees, weighed", "trees, SMC"
BOUNDED = 2  # questions
IMPORTANCE = "importance sampling"
GUIDED, SMC_GUIDED = "importance, GFlowNet's guide", "SMC, GFlowNet's guide"
PARTICLES = 4, 16


@cache
def lm() -> LanguageModel:
    return LanguageModel.embedded("arithmetic")


def small(e: Experiment | None = None, children: tuple[float, ...] = (0.5, 0.5)) -> TreeOfThoughts:
    """The small world's trees, or its chains."""
    return programs(e) if e is not None else TreeOfThoughts(**sums(lm()), children=children)


def large(children: int) -> TreeOfThoughts:
    """Sums of four operands and any digits, trees of so many children."""
    return TreeOfThoughts(**sums(lm(), digits=EVERY, steps=3), children=[0.0] * (children - 1) + [1.0])


def large_questions(count: int) -> Tensor:
    return lm().encode([q.x for q in _asked(count)])


def _asked(count: int) -> list[Any]:
    return embedded.data("arithmetic", "test_4")[:count]


# -- paths ---------------------------------------------------------------------------------------------------------


def chosen(posterior: Posterior, d: int) -> Tensor:
    """The path's thought at level d, (N, B, L)."""
    samples = posterior.samples
    if f"expand {d}" not in samples:
        return samples[f"thought {d}.1"]
    among = [samples[name] for name in sorted(samples) if name.startswith(f"thought {d}.")]
    width = max(z.shape[-1] for z in among)
    each = torch.stack([text.pad(z, width) for z in among])  # (K, N, B, L)
    return each.gather(0, samples[f"expand {d}"][None, ..., None].expand(1, *each.shape[1:]))[0]


def paths(posterior: Posterior, steps: int) -> list[dict[str, float]]:
    """Of every question, the distribution of the path."""
    told = [lm().decode(chosen(posterior, d)) for d in range(1, steps + 1)]
    found: list[dict[str, float]] = [{} for _ in told[0][0]]
    for n, weights in enumerate(posterior.probabilities.tolist()):
        for i, p in enumerate(weights):
            key = "".join(z[n][i] for z in told)
            found[i][key] = found[i].get(key, 0.0) + p
    return found


def distance(p: dict[str, float], q: dict[str, float]) -> float:
    return sum(abs(p.get(key, 0.0) - q.get(key, 0.0)) for key in {*p, *q}) / 2


# -- the small world, the answer observed --------------------------------------------------------------------------


@cache
def truth(questions: int) -> tuple[list[dict[str, float]], Tensor]:
    """Exact: the path of every test question, and the log evidence."""
    task = small(children=(1.0,))
    exact = Enumeration(task.model).run(*encode(lm(), small_questions()[2][:questions]))
    return paths(exact, 2), exact.log_evidence


def measured(algorithm: Algorithm, args: tuple[Tensor, ...], budgets: tuple[int, ...], repetitions: int) -> Figures:
    """At each budget of tokens a query: the path's total variation, and the error of log Z."""
    exact, log_z = truth(len(args[0]))
    meter, found = Meter(Query(algorithm.model, algorithm.guide, args).networks), []
    for budget in budgets:
        n = particles_within(algorithm, budget, meter, args=args, checks=1)
        runs, tokens, _ = meter(partial(_repeated, sized(algorithm, n), args, repetitions))
        tv = [distance(p, q) for r in runs for p, q in zip(exact, paths(r, 2), strict=True)]
        errors = torch.stack([(r.log_evidence - log_z).abs() for r in runs])
        error = float(errors.mean())
        found.append(
            {
                "particles": n,
                "tokens": tokens / repetitions / len(args[0]),
                "tv": average(tv),
                "error": error if math.isfinite(error) else None,
            }
        )
    return {"curve": found}


def _repeated(algorithm: Algorithm, args: tuple[Tensor, ...], repetitions: int) -> list[Posterior]:
    return [algorithm.run(*args) for _ in range(repetitions)]


def samplers(task: TreeOfThoughts) -> dict[str, Algorithm]:
    chains = {"num_chains": 4, "num_samples": 8, "warmup": 2}
    return {
        IMPORTANCE: Importance(task.model),
        "SMC": SMC(task.model),
        "Metropolis, a site": MetropolisHastings(task.model, **chains),
        "Metropolis, a branch": MetropolisHastings(task.model, moves="branch", **chains),
    }


# -- the large world, the answer wanted ----------------------------------------------------------------------------


def alone(task: TreeOfThoughts, weighted: bool = True) -> Callable[[Tensor], None]:
    """A tree without the answer."""

    def program(x: Tensor) -> None:
        with pyro.plate("questions", len(x)):
            task.path(x, weighted=weighted)

    return program


def results_of(posterior: Posterior, x: Tensor, steps: int) -> Tensor:
    """What the path's sums come to, (N, B)."""
    first = text.map(lambda s: int(s.split()[1]), x, lm())
    return first + sum(
        text.map(lambda s: int(s.replace(" ", "")), chosen(posterior, d), lm()) for d in range(1, steps + 1)
    )


def answers(algorithm: Algorithm, questions: int, budgets: tuple[int, ...], repetitions: int) -> list[Figures]:
    """At each budget: the mass on the right answer, and how often the answer with most mass is right."""
    asked, x = _asked(questions), large_questions(questions)
    right, meter, found = torch.tensor([q.answer for q in asked]), Meter([lm().network]), []
    for budget in budgets:
        n = particles_within(algorithm, budget, meter, args=(x,), checks=1)
        runs, tokens, _ = meter(partial(_repeated, sized(algorithm, n), (x,), repetitions))
        mass, votes = [], []
        for r in runs:
            said, weights = results_of(r, x, 3), r.probabilities.double()
            of = torch.stack([(weights * (said == said[n])).sum(0) for n in range(len(said))])  # of n's answer
            votes.append(said.gather(0, of.argmax(0)[None])[0] == right)
            mass.append((weights * (said == right)).sum(0))
        found.append(
            {
                "particles": n,
                "tokens": tokens / repetitions / questions,
                "mass": torch.stack(mass).mean(0).tolist(),
                "square": (torch.stack(mass) ** 2).mean(0).tolist(),
                "vote": float(torch.stack(votes).double().mean()),
            }
        )
    return found


def askers() -> dict[str, Algorithm]:
    chain, tree = large(1), large(CHILDREN)
    return {
        PLAIN: Importance(alone(chain, weighted=False)),
        CHAINS: Importance(alone(chain)),
        SMC_CHAINS: SMC(alone(chain)),
        TREES: Importance(alone(tree, weighted=False)),
        WEIGHED: Importance(alone(tree)),
        SMC_TREES: SMC(alone(tree)),
    }


@torch.no_grad()
def searched(questions: int) -> Figures:
    """Exact: the path of a search of K children, for the small and the large world; K = None: the posterior's.

    A judge has two scores, so that of K children m are found right, binomially, and one of those is taken with
    probability m / (m + (K - m) e^doubt).
    """
    found: Figures = {}
    for name, task, asked in (
        ("small", small(children=(1.0,)), small_questions()[2][:questions]),
        ("large", large(1), _asked(questions)),
    ):
        judge: Judge = task.evaluate  # type: ignore[assignment]
        network = lm()
        states = {q: {q.x + " " + str(q.operands[0]): dict.fromkeys((None, *NUMBERS), 1.0)} for q in asked}
        thoughts = task.allowed.texts()  # type: ignore[union-attr]
        said = network.decode(thoughts)
        for d in range(1, task.steps + 1):
            told = [s for q in asked for s in states[q]]
            log_p = task.thought(network, network.encode(told), torch.ones(len(told), dtype=torch.bool)).log_prob(
                thoughts[:, None]
            )
            p = dict(zip(told, log_p.exp().double().T.tolist(), strict=True))
            for q in asked:
                after: dict[str, dict[Any, float]] = {}
                for s, shares in states[q].items():
                    nexts = [_followed(task, s + z, d) for z in said]
                    fine = [judge.verdict(t) for t in nexts]
                    good = sum(x for x, f in zip(p[s], fine, strict=True) if f)
                    for key, share in shares.items():
                        taken = _taken(key, good, (1 - judge.reliable) / judge.reliable)
                        for t, x, f in zip(nexts, p[s], fine, strict=True):
                            scale = taken[f]
                            after.setdefault(t, {})[key] = after.get(t, {}).get(key, 0.0) + share * x * scale
                states[q] = after
        rows: Figures = {}
        for key in (None, *NUMBERS):
            right, tv, best = [], [], []
            for q in asked:
                total = sum(v[key] for v in states[q].values())
                mass = sum(v[None] for v in states[q].values())
                by_answer: dict[int, float] = {}
                for t, v in states[q].items():
                    said_last = int(t.rstrip(".").split()[-1])
                    by_answer[said_last] = by_answer.get(said_last, 0.0) + v[key] / total
                right.append(by_answer.get(q.answer, 0.0))
                best.append(max(by_answer, key=lambda a: by_answer[a]) == q.answer)
                tv.append(sum(abs(v[key] / total - v[None] / mass) for v in states[q].values()) / 2)
            rows[str(key)] = {"right": right, "tv": average(tv), "vote": average(best)}
        found[name] = rows
    return found


def _followed(task: TreeOfThoughts, told: str, d: int) -> str:
    """What is told with a thought, in strings."""
    assert task.after is not None
    told += task.after(told)
    told += task.marks[d == task.steps]
    return told + task.after(told)


def _taken(number: int | None, good: float, doubt: float) -> dict[bool, float]:
    """By how much a search of so many children prefers what is found right, or not; None: the posterior."""
    if number is None:
        return {True: 1.0, False: doubt}
    if not 0 < good < 1:
        return {True: 1.0, False: 1.0}
    of = [math.comb(number, m) * good**m * (1 - good) ** (number - m) for m in range(number + 1)]
    share = sum(b * m / (m + (number - m) * doubt) for m, b in enumerate(of))
    return {True: share / good, False: (1 - share) / (1 - good)}


def bounds(questions: int, short: bool) -> Figures:
    """Trees of four children, three levels, the answer observed: bounds by SMC, and the chain's exact evidence."""
    asked = _asked(questions)
    args = encode(lm(), asked)
    exact = Enumeration(large(1).model, max_support=10_000).run(*args)
    tree, curve = large(CHILDREN), []
    for n in PARTICLES[: 1 if short else None]:
        lows, highs = [], []
        for _ in range(1 if short else 4):
            path = exact.resample(1, "multinomial").values
            values = tree.around(args[0], [path[f"thought {d}.1"][0] for d in (1, 2, 3)])
            both = Sandwich(tree.model, num_particles=n).run(*args, exact_sample=values)
            lows.append(both.lower - exact.log_evidence)
            highs.append(both.upper - exact.log_evidence)
        curve.append(
            {"particles": n, "lower": float(torch.stack(lows).mean()), "upper": float(torch.stack(highs).mean())}
        )
    return {"curve": curve, "unexplored": float(exact.unexplored.max()), "log_z": float(exact.log_evidence.mean())}


def run(cell: str, seed: int, short: bool) -> Figures:
    """One cell; everything is drawn from the seed."""
    questions, large_ones = (2, 2) if short else (16, 16)
    pyro.set_rng_seed(seed)
    before = lm().tokens_scored
    budgets, repetitions = (BUDGETS[:1], 1) if short else (BUDGETS, REPETITIONS)
    if cell == SAMPLERS:
        args = encode(lm(), small_questions()[2][:questions])
        return {name: measured(a, args, budgets, repetitions) for name, a in samplers(small()).items()}
    if cell == GFLOWNET:
        steps = 2 if short else STEPS
        e = experiment(children=2, seed=seed, recipe=replace(RECIPE, steps=steps))
        args = tuple(given[:questions] for given in e.test)
        trainer, task = e.gflownet(), programs(e)
        untrained = measured(Importance(task.model, task.guide), args, budgets[-1:], repetitions)
        trainer.fit(e.batches, steps, seed=seed, progress=False)
        after = {
            GUIDED: measured(Importance(task.model, task.guide), args, budgets, repetitions),
            SMC_GUIDED: measured(SMC(task.model, task.guide), args, budgets, repetitions),
        }
        return after | {"untrained": untrained, "training": trainer.training_tokens}
    if cell == ANSWERS:
        budgets = LARGE_BUDGETS[:1] if short else LARGE_BUDGETS
        return {name: answers(a, large_ones, budgets, repetitions) for name, a in askers().items()}
    if cell == SEARCHED:
        return searched(large_ones)
    return bounds(1 if short else BOUNDED, short) | {"tokens": lm().tokens_scored - before}


# -- the section ---------------------------------------------------------------------------------------------------


def rms(results: Results, name: str, at: int) -> list[float]:
    """Of every seed, the root mean square error of the mass on the right answer, at a budget."""
    exact = results[SEARCHED][0]["large"]["None"]["right"]
    found = []
    for r in results[ANSWERS]:
        point = r[name][at]
        each = [s - 2 * p * m + p * p for s, m, p in zip(point["square"], point["mass"], exact, strict=True)]
        found.append(math.sqrt(average(each)))
    return found


def of_seeds(values: list[float], digits: int = 3) -> str:
    return spread([{"x": x} for x in values], "x", digits)


def curves(results: Results) -> dict[str, list[list[Figures]]]:
    """Of each sampler of the small world, its curve by seed."""
    found = {name: [r[name]["curve"] for r in results[SAMPLERS]] for name in results[SAMPLERS][0] if name != "seed"}
    trained = {name: [r[name]["curve"] for r in results[GFLOWNET]] for name in (GUIDED, SMC_GUIDED)}
    return found | trained


def report(results: Results) -> str:
    """The tables, and a sentence a claim."""
    drawn, asked = curves(results), {n: r for n, r in results[ANSWERS][0].items() if n != "seed"}
    budgets, large_budgets = BUDGETS[: points(drawn[IMPORTANCE])], LARGE_BUDGETS[: len(asked[PLAIN])]
    training = average(r["training"] for r in results[GFLOWNET])
    text = (
        "Not an experiment of the paper ([thoughts.md](thoughts.md)). A sum is worked out step by step; a step is a "
        "sign and a digit of the arithmetic LM, and a judge who is right in 85% says of each whether it is right. "
        "*Small world*: sums of three operands from 1 to 3 whose answer is observed, trees of two levels and one child "
        "or two. The exact posterior of the path is known, and so is the evidence. Total variation of the path at so "
        "many tokens a question (to enumerate all takes 740), and at the largest budget the error of log Z and N. "
        f"The GFlowNet's training took {round(training):,} tokens.\n\n"
    )
    rows = []
    for name, runs in drawn.items():
        errors = [c[-1]["error"] for c in runs]
        rows.append([name, *(of_seeds([c[at]["tv"] for c in runs]) for at in range(len(budgets)))])
        rows[-1] += ["" if None in errors else of_seeds(errors), f"{average(c[-1]['particles'] for c in runs):.0f}"]
    header = ["algorithm", *(f"TV, {b} tokens" for b in budgets), "error of log Z", "N"]
    text += markdown(header, rows)
    exact = results[SEARCHED][0]["large"]
    text += (
        "\n*Large world*: sums of four operands from 0 to 9 whose answer is wanted, trees of three levels and four "
        "children (20 thoughts each: some 10^17 trees), against chains at equal tokens. *Vote*: how often the result "
        "with most weight is right; *mass*: the weight of the right result; *error*: root mean square, of that mass "
        "against the exact posterior's "
        f"({average(exact['None']['right']):.2f}; its vote {exact['None']['vote']:.2f}).\n\n"
    )
    shown = sorted({0, len(large_budgets) // 2, len(large_budgets) - 1})
    header, rows = ["answers by"], [[name] for name in asked]
    for at in shown:
        header += [f"{large_budgets[at]} tokens: vote", "mass", "error"]
        for row in rows:
            runs = [r[row[0]][at] for r in results[ANSWERS]]
            row += [spread(runs, "vote", 2), of_seeds([average(r["mass"]) for r in runs], 2)]
            row += [of_seeds(rms(results, row[0], at))]
    text += markdown(header, rows)
    text += (
        "\nExactly: the path that a search of K children finds, beside the posterior (no answer observed); K = 1 is "
        "the language model.\n\n"
    )
    rows = [
        [str(k), *(f"{results[SEARCHED][0][w][str(k)]['tv']:.3f}" for w in ("small", "large"))]
        + [f"{average(exact[str(k)]['right']):.2f}", f"{exact[str(k)]['vote']:.2f}"]
        for k in NUMBERS
    ]
    text += markdown(["children", "TV, small world", "TV, large", "mass on the right result, large", "vote"], rows)
    runs = results[BOUNDS]
    known = "; ".join(
        f"{p['particles']} particles {of_seeds([r['curve'][at]['lower'] for r in runs])} to "
        f"{of_seeds([r['curve'][at]['upper'] for r in runs])}"
        for at, p in enumerate(runs[0]["curve"])
    )
    text += (
        f"\nBounds of the large trees' log evidence, answer observed, {BOUNDED} questions, less the exact one, which "
        f"is the chain's: {known} nats.\n\n"
    )
    return text + claims(results, budgets, large_budgets)


def points(runs: list[list[Figures]]) -> int:
    """At how many budgets there are figures."""
    return len(runs[0])


def claims(results: Results, budgets: tuple[int, ...], large_budgets: tuple[int, ...]) -> str:
    """What was expected, and whether it was seen."""
    exact, found = results[SEARCHED][0], curves(results)
    alone = [exact["large"][str(k)]["tv"] for k in NUMBERS]
    text = verdict(
        "a search that is not weighted is no posterior: it comes closer with every child more, and is still away by a "
        "TV of 0.05 with 64 of them, since it looks one level ahead",
        alone[-1] >= 0.05 and all(a > b for a, b in zip(alone, alone[1:], strict=False)),
        "Large world, " + ", ".join(f"K = {k}: {tv:.3f}" for k, tv in zip(NUMBERS, alone, strict=True)) + ".",
    )
    better = {at: (rms(results, WEIGHED, at), rms(results, CHAINS, at)) for at in range(len(large_budgets))}
    text += verdict(
        "weighted, a tree of four children estimates the posterior better than chains that are weighted at their end, "
        "at every budget",
        all(average(a) < average(b) for a, b in better.values()),
        "Error of the mass, trees and chains: "
        + ", ".join(
            f"{large_budgets[at]} tokens {average(a):.3f} and {average(b):.3f}" for at, (a, b) in better.items()
        )
        + ".",
    )
    smc = {at: rms(results, SMC_CHAINS, at) for at in better}
    text += verdict(
        "it buys nothing beside SMC over the steps of chains: SMC's error is no larger at any budget",
        all(average(smc[at]) <= average(better[at][0]) for at in better),
        "SMC: " + ", ".join(f"{large_budgets[at]} tokens {average(x):.3f}" for at, x in smc.items()) + ".",
    )
    votes = {n: [average(r[n][at]["vote"] for r in results[ANSWERS]) for at in better] for n in (PLAIN, TREES, WEIGHED)}
    text += verdict(
        "for the vote, trees are better than plain chains with few tokens, and worse with many: the judge's mistakes "
        "are always the same, the language model's cancel",
        votes[TREES][0] > votes[PLAIN][0] and votes[TREES][-1] < votes[PLAIN][-1],
        "Votes by budget: "
        + "; ".join(f"{name} " + ", ".join(f"{v:.2f}" for v in each) for name, each in votes.items())
        + ".",
    )
    site, branch = (average(c[-1]["tv"] for c in found[f"Metropolis, a {x}"]) for x in ("site", "branch"))
    text += verdict(
        "Metropolis that regrows a branch is closer to the posterior than one site at a time",
        branch < site,
        f"TV at {budgets[-1]} tokens {branch:.3f} and {site:.3f}.",
    )
    amortised, prior = (average(c[0]["tv"] for c in found[x]) for x in (GUIDED, IMPORTANCE))
    text += verdict(
        "a trained guide helps: at the smallest budget it halves the TV of importance sampling from the prior",
        amortised <= prior / 2,
        f"{amortised:.3f} and {prior:.3f}; at {budgets[-1]} tokens before training "
        f"{average(r['untrained']['curve'][0]['tv'] for r in results[GFLOWNET]):.3f}, after it "
        f"{average(c[-1]['tv'] for c in found[GUIDED]):.3f}.",
    )
    return text


def plot(results: Results, path: Path) -> None:
    """The small world's TV; the large world's error and vote against tokens; what a search finds against K."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 7.4), layout="constrained")
    (first, second), (third, fourth) = figure.subplots(2, 2)
    for i, (name, runs) in enumerate(curves(results).items()):
        tokens = [average(c[at]["tokens"] for c in runs) for at in range(len(runs[0]))]
        first.plot(tokens, [average(c[at]["tv"] for c in runs) for at in range(len(tokens))], "o-", ms=3, color=f"C{i}")
        first.lines[-1].set_label(name)
    first.set(xscale="log", xlabel="tokens a question", ylabel="TV of the path", title="small world, answer observed")
    names = [n for n in results[ANSWERS][0] if n != "seed"]
    styles = {PLAIN: ("0.5", "o-"), CHAINS: ("C0", "o-"), SMC_CHAINS: ("C0", "s--"), TREES: ("0.2", "^-"),
              WEIGHED: ("C3", "^-"), SMC_TREES: ("C3", "v--")}  # fmt: skip
    for name in names:
        colour, style = styles[name]
        runs = [r[name] for r in results[ANSWERS]]
        tokens = [average(c[at]["tokens"] for c in runs) for at in range(len(runs[0]))]
        errors = [average(rms(results, name, at)) for at in range(len(tokens))]
        votes = [average(c[at]["vote"] for c in runs) for at in range(len(tokens))]
        second.plot(tokens, errors, style, ms=4, color=colour, label=name)
        third.plot(tokens, votes, style, ms=4, color=colour, label=name)
    second.set(xscale="log", yscale="log", xlabel="tokens a question", ylabel="error of the mass on the right answer")
    second.set_title("large world, answer wanted")
    exact = results[SEARCHED][0]["large"]
    third.axhline(exact["None"]["vote"], color="k", lw=0.8, ls=":", label="the exact posterior's vote")
    third.set(xscale="log", xlabel="tokens a question", ylabel="vote is right", title="large world: the vote")
    for key, label in (("tv", "TV to the posterior"), ("vote", "vote is right")):
        fourth.plot(NUMBERS, [exact[str(k)][key] for k in NUMBERS], "o-", ms=4, label=f"search: {label}")
    fourth.plot(NUMBERS, [average(exact[str(k)]["right"]) for k in NUMBERS], "o-", ms=4, label="search: P(right)")
    fourth.axhline(average(exact["None"]["right"]), color="C2", lw=0.8, ls=":", label="posterior: P(right)")
    fourth.set(xscale="log", xlabel="children", ylim=(0, 1.02), title="exactly: the path that a search finds")
    for axis in (first, second, third, fourth):
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=110)


STUDY = Study("thoughts", "Thoughts: what a tree buys beside a chain", CELLS, run, report, plot)
