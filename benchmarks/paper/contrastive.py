"""Contrastive continuation, p(z|x)^a / p(z|x')^b, on pairs of unseen prompts."""

from __future__ import annotations

from dataclasses import replace

from lmppl.models import contrastive

from .study import Figures, Results, Study, markdown, spread, verdict
from .targets import enumerated, trained, untrained

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
        "The paper names this target and has no number for it. Unseen pairs of beginnings, a = 1.25, b = 0.25; the "
        "exact target counts all 2,560 sentences of the embedded grammar, so its mass is certified.\n\n"
        + markdown(HEADER, rows)
        + "\n"
        + verdict(
            "the trained guide samples the target on unseen observations",
            max(tv) <= 0.05,
            f"Its total variation is at most {max(tv):.3f} (asked: 0.05); the language model's is "
            f"{spread([f['language model'] for f in results['sampling']], 'tv')}.",
        )
        + verdict(
            "maximising the reward loses diversity",
            max(kept) < 0.5,
            f"PPO's guide is worth {spread(ppo, 'perplexity', 0)} texts, the target "
            f"{spread(ppo, 'target_perplexity', 0)}.",
        )
    )


HEADER = ("method", "TV, density", "TV, draws (N)", "mass on the support", "ESS/N", "error of log Z", "worth texts")


def row(name: str, runs: list[Figures]) -> list[str]:
    """A line of the table; a dash where a method has no such figure."""

    def cell(key: str, digits: int = 3) -> str:
        return spread(runs, key, digits) if key in runs[0] else "–"

    draws = f"{cell('draws_tv')} ({runs[0]['particles']})" if "draws_tv" in runs[0] else "–"
    return [name, cell("tv"), draws, cell("inside"), cell("ess"), cell("log_z_error"), cell("perplexity", 0)]


STUDY = Study("contrastive", "Contrastive: likely after x, not after x'", CELLS, run, report)
