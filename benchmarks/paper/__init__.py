"""The paper's experiments on the embedded language models; `python -m benchmarks.paper` runs them.

The study of an experiment is the file of its name, with `STUDY` in it.
"""

from importlib import import_module
from pathlib import Path

from lmppl.catalogue import MODELS

from .study import Study

STUDIES: tuple[Study, ...] = tuple(
    import_module(f".{name}", __name__).STUDY for name in MODELS if Path(__file__).with_name(f"{name}.py").exists()
)
