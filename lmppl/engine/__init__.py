"""How language models run: cached decoding and scoring with shared prefixes computed once."""
