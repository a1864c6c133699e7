"""Latent-variable models ready to run, one a file: each offers ``experiment(lm=None, data=None) -> Experiment``.

Its ``device`` is where the embedded language model goes; ``lm``, any other one, stays where it is.
"""

if __name__ != "lmppl.models":
    # The repository's top level links here, for readers only: imported by the short name, modules would exist twice.
    raise ImportError("import lmppl.models, not models")

from collections.abc import Callable

from . import arithmetic, constrained, continuation, contrastive, infilling, random_number, reverse, subjectivity
from .arithmetic import Arithmetic
from .constrained import Constrained
from .continuation import Continuation
from .contrastive import Contrastive
from .experiment import Experiment, Recipe
from .infilling import Infilling
from .random_number import RandomNumber
from .reverse import Reverse
from .subjectivity import Subjectivity

EXPERIMENTS: dict[str, Callable[..., Experiment]] = {
    "infilling": infilling.experiment,
    "continuation": continuation.experiment,
    "reverse": reverse.experiment,
    "contrastive": contrastive.experiment,
    "constrained": constrained.experiment,
    "random_number": random_number.experiment,
    "random_number_bounds": random_number.bounds_experiment,
    "random_number_valid": random_number.valid_experiment,
    "subjectivity": subjectivity.experiment,
    "arithmetic": arithmetic.experiment,
}

__all__ = [
    "EXPERIMENTS",
    "Arithmetic",
    "Constrained",
    "Continuation",
    "Contrastive",
    "Experiment",
    "Infilling",
    "RandomNumber",
    "Recipe",
    "Reverse",
    "Subjectivity",
]
