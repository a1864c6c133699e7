"""Runs language models: cached decoding, and scoring in which shared prefixes are computed once."""
