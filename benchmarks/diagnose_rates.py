"""How often `diagnose` finds planted faults, and how often it reports a fault where there is none: `docs/diagnose.md`.

    python -m benchmarks.diagnose_rates [--seeds 40] [--simulations 100]

A text of at most three tokens of a trigram model, one observation that follows it, default settings.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.inference import SMC, Enumeration, Importance, MetropolisHastings, Posterior, diagnose
from lmppl.ngram import NGram, NGramConfig

TOKENS = ["<eos>", *"abcdef"]


def trigram(seed: int = 0) -> LanguageModel:
    """A language model of seven tokens with random logits."""
    network = NGram(NGramConfig(vocab_size=len(TOKENS), order=2, eos_token_id=0, bos_token_id=0)).double()
    with torch.no_grad():
        network.table.normal_(std=1.0, generator=torch.Generator().manual_seed(seed))
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    backend.decoder = decoders.Fuse()
    return LanguageModel(network, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=TOKENS[0]))


LM = trigram()
X, Y = LM.encode("ab"), LM.encode("cd", stop="eos")
LONGEST = 3


def prior(x: torch.Tensor, **rules: Any) -> Completion:
    return Completion(LM, x, **{"max_tokens": LONGEST, **rules})


def model(x: torch.Tensor = X, y: torch.Tensor = Y) -> None:
    z = pyro.sample("z", prior(x))
    pyro.sample("y", Completion(LM, LM.join(x, z), max_tokens=4), obs=y)


def guide(**rules: Any) -> Callable[..., None]:
    """A proposal that does not look at y."""

    def program(x: torch.Tensor = X, y: torch.Tensor = Y) -> None:
        pyro.sample("z", prior(x, **rules))

    return program


def observe(args: tuple[Any, ...], observed: dict[str, Any]) -> tuple[Any, ...]:
    return args[0], observed["y"]


@dataclass
class Draws:
    """64 draws of the exact posterior to a power, with a bias towards a token, and an evidence off by so many nats."""

    model: Any
    power: float = 1.0
    bias: float = 0.0
    off: float = 0.0

    def run(self, *args: Any, **kwargs: Any) -> Posterior:
        exact = Enumeration(self.model).run(*args, **kwargs)
        many = (exact.samples["z"] == LM.token_id("a")).sum(-1)
        draws = replace(exact, log_weights=self.power * exact.log_weights + self.bias * many).resample(
            64, "multinomial"
        )
        return replace(draws, log_evidence=exact.log_evidence + self.off)


@dataclass
class Reweighted:
    """Importance sampling from the prior with its weights to a power (0: data ignored), its evidence off."""

    model: Any
    power: float = 1.0
    off: float = 0.0

    def run(self, *args: Any, **kwargs: Any) -> Posterior:
        found = Importance(self.model).run(*args, **kwargs)
        log_evidence = found.log_evidence + self.off
        log_weights = (self.power * found.log_weights).log_softmax(0) + log_evidence
        return replace(found, log_weights=log_weights, log_evidence=log_evidence)


@dataclass
class Case:
    """An algorithm, and the share of seeds that should find fault with it, at least or (where it is right) at most."""

    algorithm: Any
    expected: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        return self.expected < 0.5


GUIDED = {"simulate": observe}
CASES = {
    "exact draws": Case(Draws(model), 0.05),
    "enumeration": Case(Enumeration(model), 0.05),
    "importance sampling, prior": Case(Importance(model), 0.05),
    "importance sampling, broader guide": Case(Importance(model, guide(temperature=1.4)), 0.05, GUIDED),
    "SMC": Case(SMC(model), 0.05),
    "Metropolis, 16 x 10": Case(MetropolisHastings(model, num_chains=16, num_samples=10, warmup=10), 0.05),
    "truncated support (guide)": Case(Importance(model, guide(max_tokens=2)), 0.95, GUIDED),
    "collapsed guide": Case(Importance(model, guide(temperature=0.2)), 0.95, GUIDED),
    "data ignored": Case(Reweighted(model, power=0.0), 0.95),
    "evidence too high by 1.5 nats": Case(Reweighted(model, off=1.5), 0.95),
    "evidence too low by 1.5 nats": Case(Reweighted(model, off=-1.5), 0.95),
    "too narrow (power 3)": Case(Draws(model, power=3.0), 0.95),
    "a token's bias (1 nat)": Case(Draws(model, bias=1.0), 0.8),
    "weights to the power 0.3": Case(Reweighted(model, power=0.3), 0.8),
}


def rate(case: Case, seeds: range, **options: Any) -> tuple[float, Counter[str]]:
    """The share of seeds with a finding, and how often each was one."""
    why: Counter[str] = Counter()
    found = 0
    for seed in seeds:
        diagnosis = diagnose(case.algorithm, X, Y, seed=seed, **{**case.options, **options})
        found += not diagnosis.ok
        why.update(f.name for f in diagnosis.findings if f.suspect or not f.checked)
    return found / len(seeds), why


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--simulations", type=int, default=100)
    parser.add_argument("--only", default="", help="part of a case's name")
    chosen = parser.parse_args()
    print("| algorithm | found | should be | tokens | seconds | by |\n|---|---:|---:|---:|---:|---|")
    for name, case in CASES.items():
        if chosen.only not in name:
            continue
        tokens, started = LM.tokens_scored, time.time()
        found, why = rate(case, range(chosen.seeds), simulations=chosen.simulations)
        most = ", ".join(f"{k} {v}" for k, v in why.most_common(3))
        cost, seconds = (x / chosen.seeds for x in (LM.tokens_scored - tokens, time.time() - started))
        bound = f"{'<=' if case.right else '>='} {case.expected:.2f}"
        print(f"| {name} | {found:.3f} | {bound} | {cost:,.0f} | {seconds:.1f} | {most} |", flush=True)


if __name__ == "__main__":
    main()
