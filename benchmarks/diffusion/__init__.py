"""Infilling by unmasking on the embedded stories, compared with the exact posterior of texts: docs/diffusion.md.

Model and guide unmask from left to right, so that a text has one path and its posterior is a sum over the 1,152 middles
of the stories' grammar.  The untrained guide also runs in random order, where a text has 720 paths, on fewer stories.
Each seed has its own first weights of the guide, its own batches and its own 16 unseen test stories, whose pairs of
place and verb no training story has, and 16 stories whose pairs guides are trained on.  The recipe is that of
`lmppl compare diffusion`: 300 steps of 4 stories x 8 paths, rate 1e-3, LoRA of rank 16.
"""

from pathlib import Path

from ..paper.study import Study
from .measured import CELLS, run
from .page import report, told

RECORDS = Path(__file__).with_name("records")
FOUND = (  # in docs/results.md
    "yes, exactly, if the site's value is the path of unmasking steps. TV to the posterior, {stories} unseen stories: "
    "{untrained} without training, {linex} after training by Linex, {vargrad} by VarGrad; on stories of trained pairs "
    "{untrained_seen}, {linex_seen}, {vargrad_seen} (three seeds)"
)
STUDY = Study("stories", "Figures", CELLS, run, report, told=told, paired=False)
STUDIES = (STUDY,)
