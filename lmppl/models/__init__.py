"""Latent-variable models ready to run, by the names of the catalogue.

The class of each, with its two Pyro programs, is a page of `programs`.  What it runs on (data, recipe, language model)
is a module of the same name here, with a function ``experiment(lm=None, data=None, **options) -> Experiment``;
`experiment.Options` are common to all.  ``EXPERIMENTS`` holds these functions by name: ``EXPERIMENTS["infilling"]()``.
``PRETRAINED`` is the `Recipe` for large language models.
"""

if __name__ != "lmppl.models":
    # The repository's top level links here, for readers only: imported by the short name, modules would exist twice.
    raise ImportError("import lmppl.models, not models")

from collections.abc import Callable
from importlib import import_module

from ..catalogue import MODELS
from .arithmetic import Arithmetic
from .budget import Plan, plan
from .constrained import Constrained
from .continuation import Continuation
from .contrastive import Contrastive
from .diffusion import Diffusion
from .experiment import PRETRAINED, Experiment, Recipe
from .infilling import Infilling
from .preferences import Annotators, Preferences
from .random_number import RandomNumber
from .reverse import Reverse
from .subjectivity import Subjectivity
from .thoughts import ChainOfThoughts, TreeOfThoughts
from .transfer import Transfer


def _maker(name: str) -> Callable[..., Experiment]:
    module, function = (MODELS[name].maker or f"{name}.experiment").split(".")
    return getattr(import_module(f".{module}", __name__), function)


#: The functions that make an experiment, by the model's name: ``EXPERIMENTS["infilling"](lm=None) -> Experiment``.
EXPERIMENTS = {name: _maker(name) for name in MODELS}

__all__ = [
    "EXPERIMENTS",
    "PRETRAINED",
    "Annotators",
    "Arithmetic",
    "ChainOfThoughts",
    "Constrained",
    "Continuation",
    "Contrastive",
    "Diffusion",
    "Experiment",
    "Infilling",
    "Plan",
    "Preferences",
    "RandomNumber",
    "Recipe",
    "Reverse",
    "Subjectivity",
    "TreeOfThoughts",
    "Transfer",
    "plan",
]
