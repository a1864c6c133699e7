"""Trees of thoughts and chains: every algorithm compared with the exact posterior, and answers at equal tokens.

Not an experiment of the paper.  The claims are our own, and were written down after a pilot on seed 100.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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

from .study import Figures, Results, Study, markdown, meanings, opening, spread, verdict
from .targets import programs

SAMPLERS, GFLOWNET, SEARCHED, BOUNDS = "samplers", "GFlowNet", "searched", "bounds"
BUDGETS = 150, 400  # tokens per question of the small world; its enumeration takes about 740
LARGE_BUDGETS = 100, 300, 1000
CHAIN_BUDGET = 1000  # for Metropolis, the most expensive per particle
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
FOUND = (  # in the first lines of docs/results.md
    "right votes with {thoughts_few} tokens per question: trees {thoughts_vote_trees}, plain chains "
    "{thoughts_vote_chains}. Error of the mass on the right answer with {thoughts_few}, {thoughts_some} and "
    "{thoughts_many} tokens: weighted trees {thoughts_error_trees}, SMC over chains {thoughts_error_smc}. An "
    "unweighted search with {thoughts_children} children is not the posterior: TV {thoughts_search} ({thoughts_seeds} "
    "seeds)"
)
IMPORTANCE = "importance sampling"
GUIDED, SMC_GUIDED = "importance, GFlowNet's guide", "SMC, GFlowNet's guide"
PARTICLES = 16, 64


@cache
def lm() -> LanguageModel:
    return LanguageModel.embedded("arithmetic")


def small(e: Experiment | None = None, children: tuple[float, ...] = (0.5, 0.5)) -> TreeOfThoughts:
    """The programs of the small world: its trees, or with one child its chains."""
    return programs(e) if e is not None else TreeOfThoughts(**sums(lm()), children=children)


def large(children: int) -> TreeOfThoughts:
    """The programs of the large world, sums of four operands with all digits; trees with this number of children."""
    return TreeOfThoughts(**sums(lm(), digits=EVERY, steps=3), children=[0.0] * (children - 1) + [1.0])


def large_questions(count: int) -> Tensor:
    return lm().encode([q.x for q in _asked(count)])


def _asked(count: int) -> list[Any]:
    return embedded.data("arithmetic", "test_4")[:count]


# -- paths ---------------------------------------------------------------------------------------------------------


def chosen(posterior: Posterior, d: int) -> Tensor:
    """The thought of the path at level d, (N, B, L)."""
    samples = posterior.samples
    if f"expand {d}" not in samples:
        return samples[f"thought {d}.1"]
    among = [samples[name] for name in sorted(samples) if name.startswith(f"thought {d}.")]
    width = max(z.shape[-1] for z in among)
    each = torch.stack([text.pad(z, width) for z in among])  # (K, N, B, L)
    return each.gather(0, samples[f"expand {d}"][None, ..., None].expand(1, *each.shape[1:]))[0]


def paths(posterior: Posterior, steps: int) -> list[dict[str, float]]:
    """The distribution of the path for every question."""
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
    """The exact distribution of the path for every test question, and the log evidence."""
    task = small(children=(1.0,))
    exact = Enumeration(task.model).run(*encode(lm(), small_answers()[2][:questions]))
    return paths(exact, 2), exact.log_evidence


def measured(algorithm: Algorithm, args: tuple[Tensor, ...], sizes: tuple[int, ...], repetitions: int) -> Figures:
    """Tokens per question, total variation of the path and error of log Z, for these numbers of particles."""
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
    """The tree as a program without the answer."""

    def program(x: Tensor) -> None:
        with pyro.plate("questions", len(x)):
            task.path(x, weighted=weighted)

    return program


def results_of(posterior: Posterior, x: Tensor, steps: int) -> Tensor:
    """The result of the path, (N, B)."""
    first = text.map(lambda s: int(s.split()[1]), x, lm())
    return first + sum(
        text.map(lambda s: int(s.replace(" ", "")), chosen(posterior, d), lm()) for d in range(1, steps + 1)
    )


def answers(algorithm: Algorithm, questions: int, sizes: tuple[int, ...], repetitions: int) -> list[Figures]:
    """Mass on the right answer, and how often the answer with most mass is right, for these numbers of particles."""
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
    """The exact path of a search with K children, for the small and the large world; K = None is the posterior.

    A judge has two scores.  So the number m of the K children that are judged right is binomial, and one of these is
    chosen with probability m / (m + (K - m) e^doubt).
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
    """The text so far with a thought and what follows it, in strings."""
    assert task.after is not None
    told += task.after(told)
    told += task.marks[d == task.steps]
    return told + task.after(told)


def _taken(number: int | None, good: float, doubt: float) -> dict[bool, float]:
    """The factor of thoughts that are judged right, and of the others, for this number of children."""
    if number is None:
        return {True: 1.0, False: doubt}
    if not 0 < good < 1:
        return {True: 1.0, False: 1.0}
    of = [math.comb(number, m) * good**m * (1 - good) ** (number - m) for m in range(number + 1)]
    share = sum(b * m / (m + (number - m) * doubt) for m, b in enumerate(of))
    return {True: share / good, False: (1 - share) / (1 - good)}


def bounds(questions: int, short: bool) -> Figures:
    """Bounds of the evidence of large trees with the answer observed, by SMC, and the exact evidence, the chain's."""
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
    """Run one cell; all draws follow from the seed."""
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
    """A figure of a curve at this number of tokens per question, linear in its logarithm between the runs."""
    xs, ys = [math.log(p["tokens"]) for p in curve], [p[key] for p in curve]
    x = min(max(math.log(tokens), xs[0]), xs[-1])
    i = max(1, next((i for i, right in enumerate(xs) if right >= x), len(xs) - 1))
    share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + share * (ys[i] - ys[i - 1])


def with_errors(results: Results) -> dict[str, list[list[Figures]]]:
    """The curves of every method of the large world by seed, with the root mean square error of the mass."""
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
    """The curve of every sampler of the small world by seed."""
    found = {name: [r[name]["curve"] for r in results[SAMPLERS]] for name in results[SAMPLERS][0] if name != "seed"}
    trained = {name: [r[name]["curve"] for r in results[GFLOWNET]] for name in (GUIDED, SMC_GUIDED)}
    return found | trained


def report(results: Results) -> str:
    """The tables and the claims."""
    drawn, asked = curves(results), with_errors(results)
    training = average(r["training"] for r in results[GFLOWNET])
    text = opening(
        "Do trees of thoughts estimate the posterior and the answer better than chains of thoughts, at the same number "
        "of tokens?",
        "This is not an experiment of the paper ([thoughts.md](thoughts.md)). A sum is solved step by step. A step, or "
        "thought, is a sign and a digit drawn by the arithmetic language model. A judge says of every step whether it "
        "is right; the judge is right in 85%. The path of a tree is the sequence of chosen thoughts.\n\n"
        "*Small world.* Target: the posterior of the path, given an answer; it is known exactly, and so is the "
        "evidence. Data: sums of three operands from 1 to 3, with answers that somebody gave, half of them wrong; "
        f"trees have two levels and one or two children. Training of the GFlowNet read {round(training):,} tokens. "
        "Enumerating everything takes 740 tokens per question.",
        {
            "TV": "total variation between the path and the target, mean over questions, at this number of tokens per "
            f"question, interpolated between runs of {SIZES[0]}, {SIZES[1]} and {SIZES[2]} particles",
            "error of log Z": "absolute error of the log evidence, nats; empty if the algorithm has no estimate",
        },
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
        "\n*Large world.* Target: the posterior of the answer, exact. Data: sums of four operands from 0 to 9 without "
        f"an answer; trees have three levels and {CHILDREN} children, of 20 possible thoughts each (about 10^17 "
        "trees). Rows:\n\n"
    )
    described = {
        PLAIN: "the language model, without the judge",
        CHAINS: "importance sampling: the judge's scores are weights",
        SMC_CHAINS: "SMC, which resamples after every step",
        TREES: "a search: the judge chooses among the children, and nothing is weighted",
        WEIGHED: "importance sampling with the weights that make the tree's path a draw of the posterior",
        SMC_TREES: "SMC with these weights",
    }
    text += meanings(described) + "\nColumns, at each number of tokens per question:\n\n"
    text += meanings(
        {
            "vote": "how often the answer with the largest weight is right; "
            f"{exact['None']['vote']:.2f} for the exact posterior",
            "mass": f"weight of the right answer; {average(exact['None']['right']):.2f} for the exact posterior",
            "error": "root mean square error of this mass, compared with the exact posterior",
        }
    )
    text += "\n"
    header, rows = ["method"], [[name] for name in asked]
    for b in LARGE_BUDGETS:
        header += [f"{b} tokens: vote", f"{b}: mass", f"{b}: error"]
        for row in rows:
            row += [of_seeds([at(c, "vote", b) for c in asked[row[0]]], 2)]
            row += [of_seeds([at(c, "mass", b) for c in asked[row[0]]], 2)]
            row += [of_seeds([at(c, "error", b) for c in asked[row[0]]])]
    text += markdown(header, rows)
    text += (
        "\nThe path that an unweighted search finds, compared with the posterior, both without an answer. All figures "
        "are exact. One child is the language model itself:\n\n"
    )
    rows = [
        [str(k), *(f"{results[SEARCHED][0][w][str(k)]['tv']:.3f}" for w in ("small", "large"))]
        + [f"{average(exact[str(k)]['right']):.2f}", f"{exact[str(k)]['vote']:.2f}"]
        for k in NUMBERS
    ]
    text += markdown(
        ["children", "TV, small world", "TV, large world", "mass on the right answer, large", "vote, large"], rows
    )
    runs = results[BOUNDS]
    known_to = "; ".join(
        f"{p['particles']} particles {of_seeds([r['curve'][i]['lower'] for r in runs])} to "
        f"{of_seeds([r['curve'][i]['upper'] for r in runs])}"
        for i, p in enumerate(runs[0]["curve"])
    )
    text += (
        f"\nBounds of the log evidence of large trees with the answer observed, minus the exact value, which equals "
        f"the chain's; nats, {BOUNDED} questions: {known_to}.\n\n"
    )
    return text + claims(results, drawn, asked)


def claims(results: Results, drawn: dict[str, list[list[Figures]]], asked: dict[str, list[list[Figures]]]) -> str:
    """The verdict on every claim."""
    alone = [results[SEARCHED][0]["large"][str(k)]["tv"] for k in NUMBERS]

    def of(name: str, key: str) -> list[float]:  # by budget
        return [average(at(c, key, b) for c in asked[name]) for b in LARGE_BUDGETS]

    def listed(values: list[float], digits: int = 3) -> str:
        return ", ".join(f"{x:.{digits}f}" for x in values)

    tokens = ", ".join(map(str, LARGE_BUDGETS)) + " tokens"
    text = verdict(
        "an unweighted search is not the posterior: more children bring it closer, but with 64 of them the TV is still "
        "at least 0.05",
        alone[-1] >= 0.05 and all(a > b for a, b in zip(alone, alone[1:], strict=False)),
        "TV in the large world, by the number of children: "
        + ", ".join(f"{k}: {tv:.3f}" for k, tv in zip(NUMBERS, alone, strict=True))
        + ". The search looks only one level ahead.",
    )
    trees, chains, smc = (of(name, "error") for name in (WEIGHED, CHAINS, SMC_CHAINS))
    text += verdict(
        "weighted trees of four children estimate the posterior better than chains weighted at the end, at every "
        "number of tokens",
        all(a < b for a, b in zip(trees, chains, strict=True)),
        f"Error of the mass at {tokens}: trees {listed(trees)}; chains {listed(chains)}.",
    )
    text += verdict(
        "weighted trees are not better than SMC over chains: the error of SMC is not larger at any number of tokens",
        all(a <= b for a, b in zip(smc, trees, strict=True)),
        f"Error of the mass at {tokens}: SMC over chains {listed(smc)}; weighted trees {listed(trees)}; SMC over trees "
        f"{listed(of(SMC_TREES, 'error'))}.",
    )
    plain, searches = of(PLAIN, "vote"), of(TREES, "vote")
    text += verdict(
        "unweighted trees vote right more often than plain chains with few tokens, and less often with many",
        searches[0] > plain[0] and searches[-1] < plain[-1],
        f"Right votes at {tokens}: plain chains {listed(plain, 2)}; trees {listed(searches, 2)}; weighted trees "
        f"{listed(of(WEIGHED, 'vote'), 2)}. The reason for this claim: the judge's mistakes are always the same, "
        "while those of the language model cancel.",
    )
    site, branch = (average(at(c, "tv", CHAIN_BUDGET) for c in drawn[f"Metropolis, a {x}"]) for x in ("site", "branch"))
    text += verdict(
        "Metropolis that redraws a branch is closer to the posterior than Metropolis that redraws one site",
        branch < site,
        f"TV at {CHAIN_BUDGET} tokens: {branch:.3f} and {site:.3f}.",
    )
    amortised, prior, resampled = (
        average(at(c, "tv", BUDGETS[0]) for c in drawn[x]) for x in (GUIDED, IMPORTANCE, "SMC")
    )
    text += verdict(
        "with few tokens a trained guide is closer to the posterior than importance sampling and SMC from the prior",
        amortised < min(prior, resampled),
        f"TV at {BUDGETS[0]} tokens: {amortised:.3f}, {prior:.3f} and {resampled:.3f}. With {SIZES[-1]} draws of the "
        f"guide it is {average(r['untrained']['curve'][0]['tv'] for r in results[GFLOWNET]):.3f} before training and "
        f"{average(c[-1]['tv'] for c in drawn[GUIDED]):.3f} after it.",
    )
    return text


def told(results: Results) -> dict[str, str]:
    """The figures of `FOUND`."""
    if not {SEARCHED, *ASKED} <= results.keys():
        return {}
    asked = with_errors(results)

    def of(name: str, key: str, budgets: Sequence[int], digits: int) -> str:
        return ", ".join(f"{average(at(c, key, b) for c in asked[name]):.{digits}f}" for b in budgets)

    few, some, many = LARGE_BUDGETS
    return {
        "thoughts_seeds": str(len(asked[TREES])),
        "thoughts_few": str(few),
        "thoughts_some": str(some),
        "thoughts_many": f"{many:,}",
        "thoughts_vote_trees": of(TREES, "vote", [few], 2),
        "thoughts_vote_chains": of(PLAIN, "vote", [few], 2),
        "thoughts_error_trees": of(WEIGHED, "error", LARGE_BUDGETS, 3),
        "thoughts_error_smc": of(SMC_CHAINS, "error", LARGE_BUDGETS, 3),
        "thoughts_children": str(NUMBERS[-1]),
        "thoughts_search": f"{results[SEARCHED][0]['large'][str(NUMBERS[-1])]['tv']:.2f}",
    }


def plot(results: Results, path: Path) -> None:
    """TV of the small world, error and vote of the large world, by tokens; the path of a search, by children."""
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
    fourth.set(xscale="log", xlabel="children", ylim=(0, 1.02), title="the path that a search finds, exact")
    for axis in (first, second, third, fourth):
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=110)


STUDY = Study("thoughts", "Thoughts: trees and chains", CELLS, run, report, plot, paired=False, told=told)
