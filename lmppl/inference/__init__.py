"""Inference algorithms, one a file: each is built from (model, guide, ...) and answers ``.run(*args) -> Posterior``."""

if __name__ != "lmppl.inference":
    # The repository's top level links here, for readers only: imported by the short name, modules would exist twice.
    raise ImportError("import lmppl.inference, not inference")

from . import gflownet
from .autoguide import AutoGuide
from .baselines import PolicyGradient, Prompting, ReweightedWakeSleep, SupervisedFineTuning, dreams, few_shot
from .compare import Comparison, compare
from .diagnose import Diagnosis, Finding, diagnose
from .em import VariationalEM
from .enumeration import Enumerated, Enumeration
from .gflownet import *  # noqa: F403 - objectives are listed in one place
from .importance import Importance
from .markov import Automaton, Markov
from .metropolis import MarkovChains, MetropolisHastings
from .posterior import Posterior, Prediction, Predictive, ZeroEvidence
from .programs import SiteMismatch
from .sharded import Sharded
from .smc import (
    SMC,
    Bounds,
    Divergences,
    Resampling,
    Sandwich,
    Sequential,
    Simulated,
    divergences,
    lineages,
    plot_ancestry,
    simulate,
    survivors,
)
from .training import EarlyStopping, StopTraining, Task, Trainer
from .validation import AxesError

__all__ = [
    "AutoGuide",
    "SMC",
    "Automaton",
    "AxesError",
    "Bounds",
    "Comparison",
    "Diagnosis",
    "Divergences",
    "EarlyStopping",
    "Enumerated",
    "Enumeration",
    "Finding",
    "Importance",
    "Markov",
    "MarkovChains",
    "MetropolisHastings",
    "PolicyGradient",
    "Posterior",
    "Prediction",
    "Predictive",
    "Prompting",
    "Resampling",
    "ReweightedWakeSleep",
    "Sandwich",
    "Sequential",
    "Sharded",
    "Simulated",
    "SiteMismatch",
    "StopTraining",
    "SupervisedFineTuning",
    "Task",
    "Trainer",
    "VariationalEM",
    "ZeroEvidence",
    "compare",
    "diagnose",
    "divergences",
    "dreams",
    "few_shot",
    "lineages",
    "plot_ancestry",
    "simulate",
    "survivors",
]
__all__ += gflownet.__all__
