"""The paper's experiments on the embedded language models; `python -m benchmarks.paper` runs them.

The file with the name of an experiment has its study, `STUDY`.
"""

from importlib import import_module
from pathlib import Path

from lmppl.catalogue import MODELS

from .study import Study

STUDIES: tuple[Study, ...] = tuple(
    import_module(f".{name}", __name__).STUDY for name in MODELS if Path(__file__).with_name(f"{name}.py").exists()
)
