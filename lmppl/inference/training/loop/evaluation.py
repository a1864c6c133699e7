"""Evaluation on held-out observations: how close a guide is to their posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from ...core import programs
from ...core.query import Query
from ...core.sites import text_of
from ...core.weights import weigh
from ...posterior.posterior import Posterior, effective_sample_size
from ...processes import distributed
from ...samplers.smc.bounds import ExactSample, upper_bound
from .verdict import khat, known, missed, of_all, verdict

REMEMBERED = 3  # earlier evaluations that a verdict compares with
LOOK = 64  # draws of the guide in an evaluation
JUDGED = 3  # evaluations that cost as much as `judge`


@torch.no_grad()
def examine(query: Query, num_particles: int, exact_sample: ExactSample | None = None) -> dict[str, float]:
    r"""Figures from N on-policy draws of the guide, and from N/2 draws of the model's latents.

    With the log weights u of the guide's draws and v of the model's, means over observations of

    .. math:: \widehat{\log Z} = \log \tfrac1N \sum_n e^{u_n}, \qquad
              \widehat{\log Z}_{model} = \log \tfrac2N \sum_n e^{v_n}, \qquad
              \widehat{\log Z}_{above} = \log \tfrac1N \Big(e^{u(z^*)} + \sum_{n<N} e^{u_n}\Big)

    The first two are too low on average.  The last is too high on average; it needs an exact draw z* of the posterior.
    """
    weighted = weigh(query, num_particles)
    u = weighted.u
    found = {
        "held_out_sd_u": standard_deviation(u).mean().item(),
        "held_out_ess": (effective_sample_size(u) / len(u)).mean().item(),
        "held_out_impossible": (u == -torch.inf).double().mean().item(),
        **_endings(weighted.guide),
        "held_out_log_z": _log_mean(u),
    }
    if exact_sample is not None:
        found["held_out_log_z_above"] = upper_bound(query, u, exact_sample).mean().item()
        found["held_out_gap"] = found["held_out_log_z_above"] - found["held_out_log_z"]
    v = weigh(replace(query, guide=None), max(1, num_particles // 2)).u
    found["held_out_log_z_model"] = _log_mean(v)
    u, v = of_all(u), of_all(v)
    return found | known(held_out_missed=missed(u, v)) | khat(u)


def standard_deviation(u: Tensor) -> Tensor:
    """The standard deviation of u over axis 0, of its finite entries."""
    keep = u.isfinite()
    n = keep.sum(0).clamp(min=1)
    mean = u.where(keep, torch.zeros_like(u)).sum(0) / n
    return (((u - mean) ** 2).where(keep, torch.zeros_like(u)).sum(0) / n).sqrt()


def _log_mean(u: Tensor) -> float:
    return (u.double().logsumexp(0) - math.log(len(u))).mean().item()


def _endings(guide: Trace) -> dict[str, float]:
    """The mean length of the guide's texts and the mean probability of their stops; empty where no text has a stop."""
    length, stop = [], []
    for node in programs.latents(guide).values():
        site = text_of(node["fn"])
        if site is not None and site.terminable:
            end = site.ending(node["value"]).at
            log_stop = site.prefix_scores(node["value"]).stop_log_probs
            length.append(end.double().mean())
            stop.append(log_stop.gather(-1, end[..., None]).exp().double().mean())
    if not length:
        return {}
    return {"held_out_length": torch.stack(length).mean().item(), "held_out_stop": torch.stack(stop).mean().item()}


def check_exact(exact_sample: Any, held_out: Any) -> None:
    """Refuses an argument that cannot be an exact sample of the posterior of ``held_out``."""
    if exact_sample is None:
        return
    if not isinstance(exact_sample, Posterior | Mapping):
        raise ValueError(f"exact_sample: expected a Posterior or the latent values by site, got {exact_sample!r}")
    if held_out is None:
        raise ValueError("exact_sample: it is a sample of the posterior of held_out=, which is not given")
    if distributed.world().size > 1 and isinstance(exact_sample, Posterior):
        raise ValueError("exact_sample: on several processes, give values by site, posterior.resample(1).values")


class Looks:
    """The evaluations of one `fit`: every so many steps and at the last one, with a verdict on all so far."""

    def __init__(
        self,
        evaluate: Callable[[int], dict[str, float]] | None,
        judge: Callable[[], dict[str, float]],
        every: int,
        steps: int,
    ):
        self.evaluate, self.judge, self.every, self.steps = evaluate, judge, every, steps
        self.before: list[dict[str, float]] = []
        self._draws = True  # whether an evaluation draws from a guide

    def count(self, done: int) -> int:
        """How many evaluations are still to come after so many steps."""
        if self.evaluate is None or done >= self.steps:
            return 0
        return self.steps // self.every - done // self.every + bool(self.steps % self.every)

    def due(self, done: int) -> int:
        """The same, where the last one, which also calls `judge`, counts as several."""
        count = self.count(done)
        return count + JUDGED if count and self._draws else count

    def trial(self, draws: int) -> bool:
        """A small evaluation whose figures are dropped; False if it did not depend on the number of draws."""
        assert self.evaluate is not None
        self._draws = "held_out_sd_u" in self.evaluate(draws)
        return self._draws

    def at(self, step: int) -> bool:
        """Whether there is an evaluation after this step."""
        return self.evaluate is not None and ((step + 1) % self.every == 0 or step + 1 == self.steps)

    def __call__(self, step: int) -> dict[str, Any]:
        """The figures after this step; empty where there is no evaluation."""
        if self.evaluate is None or not self.at(step):
            return {}
        last = step + 1 == self.steps
        found: dict[str, Any] = self.evaluate(LOOK)
        if last:
            found |= self.judge()
        if "held_out_sd_u" in found:
            said = verdict(found, self.before)
            names = ("held_out_sd_u", "held_out_impossible")
            seen: dict[str, float] = {name: found[name] for name in names if name in found}
            self.before = (self.before + [seen])[-REMEMBERED:]
            found["verdict"] = said
        return found

    def state(self) -> Any:
        """What a checkpoint keeps; None where there is nothing to keep."""
        return self.before or None

    def restore(self, state: Any) -> None:
        """Restores what `state` returned."""
        self.before = state
