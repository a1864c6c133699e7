"""Latent-variable models ready to run, one a file: each offers ``experiment(lm=None, data=None) -> Experiment``."""

if __name__ != "lmppl.models":
    # The repository's top level links here, for readers only: imported by the short name, modules would exist twice.
    raise ImportError("import lmppl.models, not models")

from . import infilling
from .experiment import Experiment, Recipe
from .infilling import Infilling

EXPERIMENTS = {"infilling": infilling.experiment}

__all__ = ["EXPERIMENTS", "Experiment", "Infilling", "Recipe"]
