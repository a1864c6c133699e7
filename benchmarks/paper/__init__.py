"""The paper's experiments on the embedded language models, one a file; `python -m benchmarks.paper` runs them."""

from . import arithmetic, constrained, continuation, contrastive, infilling, random_number, reverse, subjectivity
from .study import Study

STUDIES: tuple[Study, ...] = (
    random_number.STUDY,
    continuation.STUDY,
    contrastive.STUDY,
    constrained.STUDY,
    infilling.STUDY,
    reverse.STUDY,
    subjectivity.STUDY,
    arithmetic.STUDY,
)
