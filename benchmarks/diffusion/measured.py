"""What one seed comes to: a guide of infilling by unmasking beside the exact posterior of texts."""

from __future__ import annotations

from dataclasses import replace

from lmppl.models.diffusion import RECIPE

STORIES, SUMMED = 16, 2  # test stories a seed; of other orders, since each is a sum over all paths
DRAWS, RUNS, TOLD = 64, 4, 200
STEPS = 300
SHORT = replace(RECIPE, steps=STEPS)
UNTRAINED, ANY_ORDER, TRAINED, RANDOM, ASLEEP, CAUSAL, BOUNDS = (
    "untrained", "untrained, random order", "VarGrad", "VarGrad, random order", "maximum likelihood on dreams",
    "causal guide", "bounds",
)  # fmt: skip
