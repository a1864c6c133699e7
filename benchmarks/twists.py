"""Does the stop twist help SMC at equal tokens?  Errors of log Z on three embedded stories, whose object comes last.

    python -m benchmarks.twists [--tokens 500,2000] [--runs 24]

Each twist gets the largest number of particles whose run costs at most this number of tokens.  Figures: root mean
square error and mean error of log Z over the runs; an estimate of zero counts as 10 nats.  About three minutes on one
core.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.inference import SMC, Enumeration

STORIES = (
    ("Tom went to the kitchen.", " He sliced it."),
    ("Ann went to the garden.", " She swung it."),
    ("Mia went to the kitchen.", " She sharpened it."),
)
TWISTS = None, "stop", "flow"
MOST = 10.0  # nats


def story(lm: LanguageModel) -> Callable[[Tensor, Tensor], None]:
    """A sentence between a beginning and what happens next."""

    def model(x: Tensor, y: Tensor) -> None:
        z = pyro.sample("z", Completion(lm, x, max_tokens=5, stop="."))
        pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=y.shape[-1], stop=None), obs=y)

    return model


def run(lm: LanguageModel, smc: SMC, args: tuple[Tensor, Tensor], seed: int) -> tuple[float, int]:
    """log Z-hat, and the tokens that it cost."""
    pyro.set_rng_seed(seed)
    before = lm.tokens_scored
    return float(smc.run(*args).log_evidence), lm.tokens_scored - before


def particles(cost: Callable[[int], int], tokens: int) -> int:
    """The largest number that costs at most so many tokens, within a tenth."""
    low = 16
    while cost(2 * low) <= tokens:
        low *= 2
    high = 2 * low
    while high - low > max(1, low // 10):
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= tokens else (low, middle)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="500,2000", help="with commas")
    parser.add_argument("--runs", type=int, default=24)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    lm = LanguageModel.embedded("stories")
    model = story(lm)
    print("| story | twist | particles | tokens | rms error | mean error |\n|---|---|---:|---:|---:|---:|")
    for x, y in STORIES:
        args = lm.encode(x), lm.encode(y)
        exact = float(Enumeration(model, mass=0.9999).run(*args).log_evidence)
        for tokens in map(int, chosen.tokens.split(",")):
            for twist in TWISTS:
                rules: dict[str, Any] = {"twist": twist}
                n = particles(
                    lambda n, rules=rules, args=args: run(lm, SMC(model, None, n, **rules), args, 0)[1], tokens
                )
                found = [run(lm, SMC(model, None, n, **rules), args, 100 + i) for i in range(chosen.runs)]
                errors = [max(-MOST, log_z - exact) for log_z, _ in found]
                rms = math.sqrt(sum(e * e for e in errors) / len(errors))
                cost = sum(cost for _, cost in found) / len(found)
                mean = sum(errors) / len(errors)
                print(f"| {x}{y} | {twist} | {n} | {cost:.0f} | {rms:.2f} | {mean:+.2f} |", flush=True)


if __name__ == "__main__":
    main()
