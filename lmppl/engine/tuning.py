"""Numbers that decide how work is divided.

They never change results. They are in one place so that tests can set them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Tuning:
    """Limits, in tokens, rows or floats, at which one way is faster than another, or fits memory."""

    # How much at once
    cache: int = 2**20  # floats that fit a processor core's caches
    fewest: int = 256  # the smallest number of tokens in a pass; fewer would not be worth reading the weights
    looked_at: int = 2**18  # floats of logits from which tokens are drawn at once
    unembedded: int = 2**23  # floats of logits computed at once if none is kept
    logits_at_once: int = 2**25  # floats of logits computed at once
    logit_budget: int = 2**28  # floats of logits in memory at once
    activations: int = 2**27  # floats that a processor keeps for a backward pass, at the default token budget
    scores: int = 2**23  # floats of attention scores computed at once
    many_logits: int = 2**20  # floats of logits; with more, only the needed logits are computed
    distinct: float = 0.75  # share of distinct positions; below it, each is computed once and copied
    # Packing
    worthwhile: float = 0.75  # rows are packed if at most this share of the tokens then goes through the network
    read_again: int = 8  # a pass is split if it has at least this many tokens for each token that a part reads again
    # Kept prompts
    prompt_tokens: int = 16_384  # tokens whose keys and values are kept
    most_prompts: int = 64  # distinct prompts; more are probably growing texts, and are not kept
    slack: int = 4  # tokens; a prompt that is longer than a kept one by at most so many is not kept again
    repeated: int = 1024  # tokens; a prompt is shared if at least so many would be repeated otherwise
    # Growing texts
    room: int = 32  # spare tokens in a cache
    sooner_copied: int = 32  # tokens; a shorter cache is copied at each step and has no spare room
    few_permitted: float = 0.7  # share of the vocabulary; if fewer tokens are permitted, only their logits are used
    matchers: int = 4096  # prefixes of a grammar whose matchers are kept
    merged: int = 2**27  # floats of weights; an adapter with more is not merged for decoding
    steps_apart: int = 3  # decoding steps before an adapter is merged
    # Enumeration
    least: float = 2**-20  # share of the mass that may be left out; a node with less is dropped
    nodes: int = 4096  # nodes expanded at once in one tree
    expansions: int = 10_000  # expansions of a tree; 8 times the support that was requested, if that is more
    waiting: int = 2**20  # waiting nodes of all trees together
    children: int = 2**23  # children examined at once
    pooled: int = 256  # trees with fewer nodes than this in all share one pass


TUNING = Tuning()
