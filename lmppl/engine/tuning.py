"""Numbers that decide how work is cut up, and never what comes out: in one place, where tests set them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Tuning:
    """Tokens, rows and floats from which on, or up to which, one way is faster than another, or fits."""

    # How much at once
    cache: int = 2**20  # floats: about what a processor core's caches hold
    fewest: int = 256  # tokens that are worth reading the weights for
    looked_at: int = 2**18  # floats of logits from which tokens are drawn together
    unembedded: int = 2**23  # floats of logits that are formed together where none is kept
    logits_at_once: int = 2**25  # floats of logits that are formed together
    logit_budget: int = 2**28  # floats of logits alive at once
    activations: int = 2**27  # floats that a processor keeps for a backward pass, at the default token budget
    scores: int = 2**23  # floats of attention scores that are formed together
    many_logits: int = 2**20  # floats of logits from which on only those that are wanted are formed
    distinct: float = 0.75  # below this share of distinct positions each is computed once and copied
    # Packing
    worthwhile: float = 0.75  # rows are packed where it sends at most this share of the tokens through the network
    read_again: int = 8  # a pass is split where this many tokens go through for each that a part reads again
    # Kept prompts
    prompt_tokens: int = 16_384  # tokens whose keys and values are kept
    most_prompts: int = 64  # more distinct prompts than that are texts that grow, not prompts
    slack: int = 4  # tokens that are sooner read again than kept a second time
    repeated: int = 1024  # tokens of a prompt that would be repeated, from which on it is shared
    # Growing texts
    room: int = 32  # tokens that a cache has room for before it is copied
    sooner_copied: int = 32  # tokens that are sooner copied than given room
    few_permitted: float = 0.7  # of the vocabulary: with fewer, they are sooner taken out than the others barred
    matchers: int = 4096  # of a grammar, after as many prefixes, that are kept
    merged: int = 2**27  # floats of weights that an adapter is merged into while it decodes; none where there are more
    steps_apart: int = 3  # decoding steps that are sooner made without that
    # Enumeration
    least: float = 2**-20  # of the mass that may be left out: a node of less is not kept
    nodes: int = 4096  # expanded at once in one tree
    expansions: int = 10_000  # that a tree may make, or 8 times the support asked for where that is more
    waiting: int = 2**20  # nodes waiting at once, all trees together
    children: int = 2**23  # looked at at once
    pooled: int = 256  # trees with fewer nodes than this between them share one pass


TUNING = Tuning()
