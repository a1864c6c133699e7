"""Contrastive continuation, p(z|x)^a / p(z|x')^b, on pairs of unseen prompts."""

from __future__ import annotations

from dataclasses import replace

from lmppl.models import contrastive

from .study import Figures, Results, Study, markdown, opening, spread, verdict
from .targets import PARTICLES, enumerated, trained, untrained

CELLS = ("GFlowNet", "PPO", "sampling")
STEPS = {"GFlowNet": 300, "PPO": 150}


def run(cell: str, seed: int, short: bool) -> Figures:
    observations, steps = (2, 3) if short else (None, STEPS.get(cell, 0))
    e = contrastive.experiment(seed=seed, recipe=replace(contrastive.RECIPE, steps=max(1, steps)))
    args = tuple(given[:observations] for given in e.test)
    exact = enumerated("contrastive", observations)
    if cell != "sampling":
        return trained(e, cell, steps, seed, exact, args)
    return {"log_z": exact.log_evidence.tolist(), **untrained(e, exact, args)}


def report(results: Results) -> str:
    rows = [row("GFlowNet", results["GFlowNet"]), row("PPO, reward only", results["PPO"])]
    for name in ("language model", "importance sampling", "SMC", "SMC, stop twist", "exact draws"):
        rows.append(row(name, [found[name] for found in results["sampling"]]))
    tv = [found["tv"] for found in results["GFlowNet"]]
    ppo = results["PPO"]
    kept = [found["perplexity"] / found["target_perplexity"] for found in ppo]
    return (
        opening(
            "Can a trained guide draw sentences that are likely after one beginning x and unlikely after another, x'?",
            "Target: p(z|x)^a / p(z|x')^b with a = 1.25 and b = 0.25. It is exact, because all 2,560 sentences of the "
            "embedded grammar are enumerated. Data: pairs of beginnings that no guide was trained on. The paper names "
            "this target and has no figure for it.",
            COLUMNS,
        )
        + markdown(HEADER, rows)
        + "\n"
        + verdict(
            "the trained guide samples the target on unseen observations",
            max(tv) <= 0.05,
            f"Its largest TV of a seed is {max(tv):.3f} (at most 0.05 was asked). The language model's is "
            f"{spread([f['language model'] for f in results['sampling']], 'tv')}.",
        )
        + verdict(
            "maximising the reward loses diversity",
            max(kept) < 0.5,
            f"PPO's guide has {spread(ppo, 'perplexity', 0)} effective texts, the target "
            f"{spread(ppo, 'target_perplexity', 0)}.",
        )
    )


HEADER = ("method", "TV", "TV of draws (N)", "mass on the support", "ESS/N", "error of log Z", "effective texts")
COLUMNS = {
    "TV": "total variation between the method's distribution q and the target, computed exactly, mean over "
    "observations; 0 is best, 1 is worst",
    "TV of draws (N)": f"total variation between N weighted draws and the target; compare it with the row *exact "
    f"draws*, because few draws are far from any target. The guides draw {PARTICLES}, the other samplers as many as "
    "cost the same number of tokens",
    "mass on the support": "probability that q gives to the texts that the target allows",
    "ESS/N": "effective sample size of the weighted draws, as a share of N",
    "error of log Z": "absolute error of the estimated log evidence, nats",
    "effective texts": "exp of the entropy of q on the support: as many equally probable texts have this entropy",
    "a dash, infinite": "the method has no such figure; in some run all weights were zero",
}


def row(name: str, runs: list[Figures]) -> list[str]:
    """A line of the table; a dash where a method has no such figure."""

    def cell(key: str, digits: int = 3) -> str:
        return spread(runs, key, digits) if key in runs[0] else "–"

    draws = f"{cell('draws_tv')} ({runs[0]['particles']})" if "draws_tv" in runs[0] else "–"
    return [name, cell("tv"), draws, cell("inside"), cell("ess"), cell("log_z_error"), cell("perplexity", 0)]


STUDY = Study("contrastive", "Contrastive: likely after x, not after x'", CELLS, run, report)
