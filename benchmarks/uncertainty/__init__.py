"""Uncertainty through chains of thought: does a model know when it does not know?  docs/uncertainty.md.

The plan was frozen before a trained method read a test sentence.

A member is an adapter that exact EM trained on the labelled sentences (10 or 50, those of `benchmarks.paper`, one
draw per seed).  It trains both factors of p(y | x) = sum over z of p(z | x) p(y | x, z).  Five members with different
first weights are the ensemble.  In the cell "SGLD" the members are five samples of one adapter's parameters, from a
chain of 200 steps with the labels of "10".  They are compared with the direct answer ("{x} is"): one adapter, or
five, trained on log p(y | x) without a reason.

A prediction is judged on 300 test sentences by its accuracy, by its calibration, and by how well its uncertainty
finds its own errors.  Then all scores of the ensemble's prediction are compared: do they find its errors, sentences
of kinds without a labelled sentence (*unlearnt*), and sentences that the corpus cannot have
(`embedded.subjectivity.strange`, 100 by each rule)?  We expected that parameter information finds what was not
learnt, the unlearnt and the impossible, better than the other parts do, and that entropy finds errors best, because
it is their sum.
"""

from ..paper.study import Study
from .measured import CELLS, run
from .page import plot, report

STUDY = Study("figures", "Figures", CELLS, run, report, plot)
STUDIES = (STUDY,)
