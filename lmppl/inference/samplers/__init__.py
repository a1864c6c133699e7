"""Algorithms without training: importance sampling, SMC, Markov chains, enumeration, prompting."""
