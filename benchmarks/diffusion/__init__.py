"""Infilling by unmasking on the embedded stories, beside the exact posterior of texts: docs/diffusion.md.

Model and guide unmask from left to right, so that a text has one path and its posterior is a sum over the 1,152 middles
of the stories' grammar; untrained in random order too, where a text has 720 paths, on fewer stories.  A seed draws a
guide's first weights, batches and 16 unseen test stories of its own, whose pairs of place and verb no training story
has, beside 16 stories whose pairs guides are trained on.  300 steps of 4 stories x 8 paths, rate 1e-3, LoRA of
rank 16, as in `lmppl compare diffusion`.
"""

from pathlib import Path

from ..paper.study import Study
from .measured import CELLS, run
from .page import report, told

RECORDS = Path(__file__).with_name("records")
FOUND = (  # in docs/results.md
    "yes, as a path of unmasking steps, exactly; training hardly pays: TV to the posterior of {stories} unseen stories "
    "{untrained} before, {linex} after by Linex, {vargrad} by VarGrad (three seeds); of stories of trained pairs "
    "{untrained_seen}, {linex_seen}, {vargrad_seen}"
)
STUDY = Study("stories", "Figures", CELLS, run, report, told=told, paired=False)
STUDIES = (STUDY,)
