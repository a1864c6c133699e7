"""The paper's experiments on the embedded language models, one a file; `python -m benchmarks.paper` runs them."""

from .study import Study

STUDIES: tuple[Study, ...] = ()
