"""Sequential Monte Carlo, token by token: `SMC`, twists, ancestry, and lower and upper bounds of the evidence."""

from .ancestry import Resampling, lineages, plot_ancestry, survivors
from .bounds import Bounds, Divergences, Sandwich, Simulated, divergences, simulate
from .smc import SMC, Sequential

__all__ = [
    "Bounds",
    "Divergences",
    "Resampling",
    "SMC",
    "Sandwich",
    "Sequential",
    "Simulated",
    "divergences",
    "lineages",
    "plot_ancestry",
    "simulate",
    "survivors",
]
