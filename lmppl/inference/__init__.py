"""Inference algorithms, one a file: each is built from (model, guide, ...) and answers ``.run(*args) -> Posterior``."""

if __name__ != "lmppl.inference":
    # The repository's top level links here, for readers only: imported by the short name, modules would exist twice.
    raise ImportError("import lmppl.inference, not inference")

import lmppl.inference.training.gflownet as gflownet  # so written, pyright reads its names

from .core.autoguide import AutoGuide
from .core.programs import SiteMismatch
from .core.query import Query
from .core.validation import AxesError
from .core.weights import weigh
from .judging.compare import compare
from .judging.comparison import Comparison
from .judging.diagnose import Diagnosis, Finding, diagnose
from .posterior import Ensemble, Posterior, Prediction, Predictive, Uncertainty, ZeroEvidence
from .posterior.algorithm import Algorithm, Sampler
from .processes.sharded import Sharded
from .samplers.enumeration import Enumerated, Enumeration
from .samplers.importance import Importance
from .samplers.markov import Automaton, Markov
from .samplers.metropolis import MarkovChains, MetropolisHastings
from .samplers.prompting import Prompting, few_shot
from .samplers.smc import (
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
from .training.direct_preference import DirectPreferenceOptimization
from .training.em import VariationalEM
from .training.gflownet import *  # noqa: F403 - objectives are listed in one place
from .training.langevin import SGLD
from .training.policy_gradient import PolicyGradient
from .training.reweighted_wake_sleep import ReweightedWakeSleep
from .training.supervised import SupervisedFineTuning, dreams

__all__ = [
    "Algorithm",
    "AutoGuide",
    "SGLD",
    "SMC",
    "Automaton",
    "AxesError",
    "Bounds",
    "Comparison",
    "Diagnosis",
    "DirectPreferenceOptimization",
    "Divergences",
    "EarlyStopping",
    "Ensemble",
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
    "Query",
    "Resampling",
    "ReweightedWakeSleep",
    "Sampler",
    "Sandwich",
    "Sequential",
    "Sharded",
    "Simulated",
    "SiteMismatch",
    "StopTraining",
    "SupervisedFineTuning",
    "Task",
    "Trainer",
    "Uncertainty",
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
    "weigh",
]
__all__ += gflownet.__all__
