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
from lmppl.inference.judging.compare import Meter
from lmppl.inference.posterior.algorithm import Algorithm, sized
from lmppl.models import TreeOfThoughts
from lmppl.models.experiment import Experiment
from lmppl.models.thoughts import EVERY, RECIPE, Judge, encode, experiment, small_answers, small_questions, sums
from lmppl.models.thoughts import Asked as Given

from .study import Figures, Results, Study, markdown, spread, verdict
from .targets import programs

SAMPLERS, GFLOWNET, SEARCHED, BOUNDS = "samplers", "GFlowNet", "searched", "bounds"
BUDGETS = 150, 400  # tokens a question of the small world; to enumerate it takes some 740
LARGE_BUDGETS = 100, 300, 1000
CHAIN_BUDGET = 1000  # of Metropolis, which costs most a particle
SIZES = 2, 8, 32
CHAIN_SIZES, TREE_SIZES = (1, 4, 16, 64), (1, 3, 10, 30)
REPETITIONS = 2
STEPS = 100  # of the GFlowNet
CHILDREN, NUMBERS = 4, (1, 2, 4, 8, 16, 64)
PLAIN, CHAINS, SMC_CHAINS = "chains, no judge", "chains, weighed at the end", "chains, SMC"
TREES, WEIGHED, SMC_TREES = "trees as they are", "trees, weighed", "trees, SMC"
ASKED = PLAIN, CHAINS, SMC_CHAINS, TREES, WEIGHED, SMC_TREES
CELLS = SAMPLERS, GFLOWNET, *ASKED, SEARCHED, BOUNDS
BOUNDED = 2  # questions
IMPORTANCE = "importance sampling"
GUIDED, SMC_GUIDED = "importance, GFlowNet's guide", "SMC, GFlowNet's guide"
PARTICLES = 16, 64


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
    exact = Enumeration(task.model).run(*encode(lm(), small_answers()[2][:questions]))
    return paths(exact, 2), exact.log_evidence


def measured(algorithm: Algorithm, args: tuple[Tensor, ...], sizes: tuple[int, ...], repetitions: int) -> Figures:
    """With so many particles: tokens a question, the path's total variation, and the error of log Z."""
    exact, log_z = truth(len(args[0]))
    meter, found = Meter(Query(algorithm.model, algorithm.guide, args).networks), []
    for n in sizes:
        runs, tokens, _ = meter(partial(_repeated, sized(algorithm, n), args, repetitions))
        tv = [distance(p, q) for r in runs for p, q in zip(exact, paths(r, 2), strict=True)]
        error = float(torch.stack([(r.log_evidence - log_z).abs() for r in runs]).mean())
        point = {"particles": n, "tokens": tokens / repetitions / len(args[0]), "tv": average(tv)}
        found.append(point | {"error": error if math.isfinite(error) else None})
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


def answers(algorithm: Algorithm, questions: int, sizes: tuple[int, ...], repetitions: int) -> list[Figures]:
    """With so many particles: the mass on the right answer, and how often the answer with most mass is right."""
    asked, x = _asked(questions), large_questions(questions)
    right, meter, found = torch.tensor([q.answer for q in asked]), Meter([lm().network]), []
    for n in sizes:
        runs, tokens, _ = meter(partial(_repeated, sized(algorithm, n), (x,), repetitions))
        mass, votes = [], []
        for r in runs:
            said, weights = results_of(r, x, 3), r.probabilities.double()
            of = torch.stack([(weights * (said == one)).sum(0) for one in said])  # (N, B): of each particle's answer
            votes.append(said.gather(0, of.argmax(0)[None])[0] == right)
            mass.append((weights * (said == right)).sum(0))
        masses = torch.stack(mass)
        point = {"particles": n, "tokens": tokens / repetitions / questions, "mass": masses.mean(0).tolist()}
        found.append(
            point | {"square": (masses**2).mean(0).tolist(), "vote": float(torch.stack(votes).double().mean())}
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
    args = encode(lm(), [Given(q.x, str(q.answer)) for q in asked])
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
    questions, repetitions = (2, 1) if short else (16, REPETITIONS)
    sizes, few = SIZES[: 2 if short else None], 2 if short else None
    pyro.set_rng_seed(seed)
    if cell == SAMPLERS:
        args = encode(lm(), small_answers()[2][:questions])
        return {name: measured(a, args, sizes, repetitions) for name, a in samplers(small()).items()}
    if cell == GFLOWNET:
        steps = 2 if short else STEPS
        e = experiment(children=2, seed=seed, recipe=replace(RECIPE, steps=steps))
        args = tuple(given[:questions] for given in e.test)
        trainer, task = e.gflownet(), programs(e)
        untrained = measured(Importance(task.model, task.guide), args, sizes[-1:], repetitions)
        trainer.fit(e.batches, steps, seed=seed, progress=False)
        after = {
            GUIDED: measured(Importance(task.model, task.guide), args, sizes, repetitions),
            SMC_GUIDED: measured(SMC(task.model, task.guide), args, sizes, repetitions),
        }
        return after | {"untrained": untrained, "training": trainer.training_tokens}
    if cell in ASKED:
        sizes = (CHAIN_SIZES if "chains" in cell else TREE_SIZES)[:few]
        return {"curve": answers(askers()[cell], questions, sizes, repetitions)}
    return searched(questions) if cell == SEARCHED else bounds(1 if short else BOUNDED, short)


# -- the section ---------------------------------------------------------------------------------------------------


def at(curve: list[Figures], key: str, tokens: float) -> float:
    """A figure of a curve at so many tokens a question, linear in their logarithm between the runs."""
    xs, ys = [math.log(p["tokens"]) for p in curve], [p[key] for p in curve]
    x = min(max(math.log(tokens), xs[0]), xs[-1])
    i = max(1, next((i for i, right in enumerate(xs) if right >= x), len(xs) - 1))
    share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + share * (ys[i] - ys[i - 1])


def with_errors(results: Results) -> dict[str, list[list[Figures]]]:
    """Of the large world: each way to answer, its curve by seed, with the root mean square error of the mass."""
    exact, found = results[SEARCHED][0]["large"]["None"]["right"], dict[str, list[list[Figures]]]()
    for name in ASKED:
        found[name] = []
        for r in results[name]:
            curve = []
            for p in r["curve"]:
                each = [s - 2 * e * m + e * e for s, m, e in zip(p["square"], p["mass"], exact, strict=True)]
                curve.append(p | {"error": math.sqrt(average(each)), "mass": average(p["mass"])})
            found[name].append(curve)
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
    drawn, asked = curves(results), with_errors(results)
    training = average(r["training"] for r in results[GFLOWNET])
    text = (
        "Not an experiment of the paper ([thoughts.md](thoughts.md)). A sum is worked out step by step; a step is a "
        "sign and a digit of the arithmetic LM, and a judge who is right in 85% says of each whether it is right. "
        "*Small world*: sums of three operands from 1 to 3, and answers that somebody gave, wrong in half of them; "
        "trees of two levels and one child or two. The exact posterior of the path is known, and so is the evidence. "
        "Total variation of the path, and error of log Z, at so many tokens a question (to enumerate all takes 740), "
        "between runs of 2, 8 and 32 "
        f"particles. The GFlowNet's training took {round(training):,} tokens.\n\n"
    )
    rows = []
    for name, runs in drawn.items():
        rows.append([name, *(of_seeds([at(c, "tv", b) for c in runs]) for b in BUDGETS)])
        known = all(p["error"] is not None for c in runs for p in c)
        rows[-1].append(of_seeds([at(c, "error", BUDGETS[-1]) for c in runs]) if known else "")
    header = ["algorithm", *(f"TV, {b} tokens" for b in BUDGETS), f"error of log Z, {BUDGETS[-1]}"]
    text += markdown(header, rows)
    exact = results[SEARCHED][0]["large"]
    text += (
        "\n*Large world*: sums of four operands from 0 to 9 whose answer is wanted, trees of three levels and four "
        "children (20 thoughts each: some 10^17 trees), against chains at equal tokens. *Vote*: how often the result "
        "with most weight is right; *mass*: the weight of the right result; *error*: root mean square, of that mass "
        "against the exact posterior's "
        f"({average(exact['None']['right']):.2f}; its vote {exact['None']['vote']:.2f}).\n\n"
    )
    header, rows = ["answers by"], [[name] for name in asked]
    for b in LARGE_BUDGETS:
        header += [f"{b} tokens: vote", "mass", "error"]
        for row in rows:
            row += [of_seeds([at(c, "vote", b) for c in asked[row[0]]], 2)]
            row += [of_seeds([at(c, "mass", b) for c in asked[row[0]]], 2)]
            row += [of_seeds([at(c, "error", b) for c in asked[row[0]]])]
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
    known_to = "; ".join(
        f"{p['particles']} particles {of_seeds([r['curve'][i]['lower'] for r in runs])} to "
        f"{of_seeds([r['curve'][i]['upper'] for r in runs])}"
        for i, p in enumerate(runs[0]["curve"])
    )
    text += (
        f"\nBounds of the large trees' log evidence, answer observed, {BOUNDED} questions, less the exact one, which "
        f"is the chain's: {known_to} nats.\n\n"
    )
    return text + claims(results, drawn, asked)


def claims(results: Results, drawn: dict[str, list[list[Figures]]], asked: dict[str, list[list[Figures]]]) -> str:
    """What was expected, and whether it was seen."""
    alone = [results[SEARCHED][0]["large"][str(k)]["tv"] for k in NUMBERS]

    def of(name: str, key: str) -> list[float]:  # by budget
        return [average(at(c, key, b) for c in asked[name]) for b in LARGE_BUDGETS]

    def told(values: list[float], digits: int = 3) -> str:
        return ", ".join(f"{x:.{digits}f}" for x in values)

    tokens = ", ".join(map(str, LARGE_BUDGETS)) + " tokens"
    text = verdict(
        "a search that is not weighted is no posterior: it comes closer with every child more, and is still away by a "
        "TV of 0.05 with 64 of them, since it looks one level ahead",
        alone[-1] >= 0.05 and all(a > b for a, b in zip(alone, alone[1:], strict=False)),
        "Large world, " + ", ".join(f"K = {k}: {tv:.3f}" for k, tv in zip(NUMBERS, alone, strict=True)) + ".",
    )
    trees, chains, smc = (of(name, "error") for name in (WEIGHED, CHAINS, SMC_CHAINS))
    text += verdict(
        "weighted, a tree of four children estimates the posterior better than chains that are weighted at their end, "
        "at every budget",
        all(a < b for a, b in zip(trees, chains, strict=True)),
        f"Error of the mass at {tokens}: trees {told(trees)}, chains {told(chains)}.",
    )
    text += verdict(
        "it buys nothing beside SMC over the steps of chains: SMC's error is no larger at any budget",
        all(a <= b for a, b in zip(smc, trees, strict=True)),
        f"SMC: {told(smc)}; SMC of trees: {told(of(SMC_TREES, 'error'))}.",
    )
    plain, searches = of(PLAIN, "vote"), of(TREES, "vote")
    text += verdict(
        "for the vote, trees are better than plain chains with few tokens, and worse with many: the judge's mistakes "
        "are always the same, the language model's cancel",
        searches[0] > plain[0] and searches[-1] < plain[-1],
        f"Votes at {tokens}: plain chains {told(plain, 2)}; trees {told(searches, 2)}; trees, weighed "
        f"{told(of(WEIGHED, 'vote'), 2)}.",
    )
    site, branch = (average(at(c, "tv", CHAIN_BUDGET) for c in drawn[f"Metropolis, a {x}"]) for x in ("site", "branch"))
    text += verdict(
        "Metropolis that regrows a branch is closer to the posterior than one site at a time",
        branch < site,
        f"TV at {CHAIN_BUDGET} tokens {branch:.3f} and {site:.3f}.",
    )
    amortised, prior, resampled = (
        average(at(c, "tv", BUDGETS[0]) for c in drawn[x]) for x in (GUIDED, IMPORTANCE, "SMC")
    )
    text += verdict(
        "with few tokens a trained guide is closer to the posterior than importance sampling and SMC from the prior",
        amortised < min(prior, resampled),
        f"TV at {BUDGETS[0]} tokens {amortised:.3f}, {prior:.3f} and {resampled:.3f}; by 32 draws before training "
        f"{average(r['untrained']['curve'][0]['tv'] for r in results[GFLOWNET]):.3f}, after it "
        f"{average(c[-1]['tv'] for c in drawn[GUIDED]):.3f}.",
    )
    return text


def plot(results: Results, path: Path) -> None:
    """The small world's TV; the large world's error and vote against tokens; what a search finds against K."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 7.4), layout="constrained")
    (first, second), (third, fourth) = figure.subplots(2, 2)
    for j, (name, runs) in enumerate(curves(results).items()):
        tokens = [average(c[i]["tokens"] for c in runs) for i in range(len(runs[0]))]
        first.plot(tokens, [average(c[i]["tv"] for c in runs) for i in range(len(tokens))], "o-", ms=3, color=f"C{j}")
        first.lines[-1].set_label(name)
    first.set(xscale="log", xlabel="tokens a question", ylabel="TV of the path", title="small world, answer observed")
    styles = {PLAIN: ("0.5", "o-"), CHAINS: ("C0", "o-"), SMC_CHAINS: ("C0", "s--"), TREES: ("0.2", "^-"),
              WEIGHED: ("C3", "^-"), SMC_TREES: ("C3", "v--")}  # fmt: skip
    for name, runs in with_errors(results).items():
        colour, style = styles[name]
        tokens = [average(c[i]["tokens"] for c in runs) for i in range(len(runs[0]))]
        for axis, key in ((second, "error"), (third, "vote")):
            figures = [average(c[i][key] for c in runs) for i in range(len(tokens))]
            axis.plot(tokens, figures, style, ms=4, color=colour, label=name)
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


STUDY = Study("thoughts", "Thoughts: what a tree buys beside a chain", CELLS, run, report, plot, paired=False)
