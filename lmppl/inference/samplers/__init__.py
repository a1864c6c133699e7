"""Algorithms that train nothing: importance sampling, SMC, Markov chains, enumeration, prompting."""
