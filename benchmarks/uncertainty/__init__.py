"""Uncertainty through chains of thought: does a model know when it does not know?  docs/uncertainty.md.

The plan, frozen before a trained method read a test sentence.

A member is an adapter that exact EM trained on the labelled sentences (10 or 50, those of `benchmarks.paper`, a draw
a seed): both factors of p(y | x) = sum over z of p(z | x) p(y | x, z), from adapters that begin apart. Five of them
are the ensemble; in the cell "SGLD" members are five samples of one adapter's parameters, along a chain of 200 steps
at the labels of "10". Beside them the direct answer ("{x} is"), an adapter or five of them trained on log p(y | x)
without a reason.

A prediction is judged on 300 test sentences by how often it is right, its calibration, and by whether its uncertainty
finds its own errors.  Then all scores of one prediction, the ensemble's: do they find its errors, sentences of kinds
that no labelled sentence had (*unlearnt*), and sentences that the corpus cannot have (`embedded.subjectivity.strange`,
100 by each rule)?  Expected: parameter information finds what was not learnt, the unlearnt and the impossible, better
than the other parts do; entropy finds errors best, since it is their sum.
"""

from ..paper.study import Study
from .measured import CELLS, run
from .page import plot, report

STUDY = Study("figures", "Figures", CELLS, run, report, plot)
STUDIES = (STUDY,)
