"""Markov chain Monte Carlo and its kernels."""

from .metropolis import MarkovChains, MetropolisHastings

__all__ = ["MarkovChains", "MetropolisHastings"]
