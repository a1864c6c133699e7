"""Small programs of several sites, with their exact posterior as a guide and their optimal twist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from ngrams import ngram_lm, written_lm
from torch import Tensor

from lmppl.distributions import Completion
from lmppl.inference.samplers.enumeration.enumeration import Enumerated, Enumeration

V = 4  # <eos> . a b
EOS, DOT, A, B = range(V)


def contains(z: Tensor, token: int) -> Tensor:
    return (z == token).any(-1)


@dataclass
class Program:
    r"""z ~ LM(a); y ~ LM(b z) observed; k ~ Categorical(z); w ~ LM(start_k z); a factor of z, k and w.

    ``observes`` leaves y out, ``switches`` k, ``continues`` w.  Everything in double precision, over ``runs`` plate
    elements with one posterior.
    """

    seed: int
    runs: int
    observes: bool = True
    switches: bool = True
    continues: bool = True
    max_tokens: int = 2
    strength: float = 1.5

    def __post_init__(self) -> None:
        self.lm = ngram_lm(V, 2, self.seed, scale=0.7)
        self.y = self.lm.encode("a", stop="eos")
        self.starts = self.lm.encode(["a", "b"])
        self.exact: Enumerated = Enumeration(lambda: self.model(1)).run()
        found = {name: value[:, 0] for name, value in self.exact.samples.items()}  # one run's: (K, ...)
        self.support, self.log_w, self.log_prior = found, self.exact.log_weights[:, 0], self.exact.log_prior[:, 0]
        self.log_evidence = self.exact.log_evidence[0]

    def prior(self, lm: Any, prompt: Any) -> Completion:
        return Completion(lm, prompt, max_tokens=self.max_tokens)

    def seen(self, z: Tensor) -> Completion:
        return Completion(self.lm, self.lm.join("b", z), max_tokens=1)

    def model(self, runs: int | None = None) -> None:
        with pyro.plate("runs", self.runs if runs is None else runs, dim=-1):
            z = pyro.sample("z", self.prior(self.lm, "a"))
            score = self.strength * contains(z, DOT).double()
            if self.observes:
                pyro.sample("y", self.seen(z), obs=self.y)
            k = torch.zeros(z.shape[:-1], dtype=torch.long)
            if self.switches:
                p = torch.where(contains(z, A), 0.7, 0.2).double()
                k = pyro.sample("k", dist.Categorical(torch.stack([p, 1 - p], -1)))
                score = score - 0.5 * k
            if self.continues:
                w = pyro.sample("w", self.prior(self.lm, self.lm.join(self.starts[k], z)))
                score = score + self.strength * (contains(w, B) ^ contains(z, B)).double()
            pyro.factor("score", score)

    # -- the posterior as a guide -----------------------------------------------------------------------------------

    def posterior(self) -> Callable[[], None]:
        """z by its marginal, then k and w given what came before, from tables of exact conditionals."""
        z = self.support["z"]
        texts, row = torch.unique(z, dim=0, return_inverse=True)  # (Z, E), (K,)
        k = self.support["k"] if self.switches else torch.zeros_like(row)
        first = written_lm(conditionals([((A,), z)], self.log_w), V, 3)
        table = torch.full((len(texts), 2), -torch.inf, dtype=torch.float64)
        for i in range(len(row)):
            table[row[i], k[i]] = torch.logaddexp(table[row[i], k[i]], self.log_w[i])
        codes = torch.stack([(2 * row + k) // V**d % V for d in (2, 1, 0)], -1)  # (K, 3): (z, k) as a prompt
        second = written_lm(conditionals([(codes, self.support["w"])], self.log_w), V, 5) if self.continues else None

        def guide() -> None:
            with pyro.plate("runs", self.runs, dim=-1):
                z = pyro.sample("z", self.prior(first, "a"))
                known = (z[..., None, :] == texts).all(-1).int().argmax(-1)
                k = torch.zeros_like(known)
                if self.switches:
                    k = pyro.sample("k", dist.Categorical(logits=table[known]))
                if second is not None:
                    code = torch.stack([(2 * known + k) // V**d % V for d in (2, 1, 0)], -1)
                    pyro.sample("w", self.prior(second, code))

        return guide

    # -- the optimal twist ------------------------------------------------------------------------------------------

    def log_psi(self, prefix: Tensor, before: dict[str, Tensor]) -> Tensor:
        """log E[what is still to come | the sites before, prefix], (particle, runs, t) -> (particle, runs)."""
        site = "w" if "z" in before else "z"
        t = prefix.shape[-1]
        fits = (prefix[..., None, :] == self.support[site][:, :t]).all(-1)  # (particle, runs, K)
        for name, value in before.items():
            same = value[..., None] == self.support[name] if name == "k" else None
            fits &= (value[..., None, :] == self.support[name]).all(-1) if same is None else same
        weight, prior = (torch.where(fits, x, -torch.inf).logsumexp(-1) for x in (self.log_w, self.log_prior))
        past = self.seen(before["z"]).log_prob(self.y).detach() if self.observes and "z" in before else 0.0
        return weight - prior - past


def conditionals(sites: list[tuple[Any, Tensor]], log_w: Tensor) -> dict[tuple[int, ...], Tensor]:
    """Log weights (V,) of the next token after each prompt and prefix, from weighted texts (K, E)."""
    table: dict[tuple[int, ...], Tensor] = {}
    for prompt, value in sites:
        for i, z in enumerate(value.tolist()):
            start = prompt if isinstance(prompt, tuple) else tuple(prompt[i].tolist())
            for t in range(z.index(EOS) + 1):
                row = table.setdefault((*start, *z[:t]), torch.full((V,), -torch.inf, dtype=torch.float64))
                row[z[t]] = torch.logaddexp(row[z[t]], log_w[i])
    return table
