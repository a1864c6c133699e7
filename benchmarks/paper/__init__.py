"""The paper's experiments on the embedded language models, one a file; `python -m benchmarks.paper` runs them."""

from . import constrained, contrastive
from .study import Study

STUDIES: tuple[Study, ...] = (contrastive.STUDY, constrained.STUDY)
