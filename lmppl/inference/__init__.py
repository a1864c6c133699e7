"""Inference algorithms, one a file: each is built from (model, guide, ...) and answers ``.run(*args) -> Posterior``."""

if __name__ != "lmppl.inference":
    # The repository's top level links here, for readers only: imported by the short name, modules would exist twice.
    raise ImportError("import lmppl.inference, not inference")

from .compare import Comparison, compare
from .enumeration import Enumerated, Enumeration
from .gflownet import (
    DetailedBalance,
    EpsilonUniform,
    Exploration,
    GFlowNet,
    Mixture,
    Objective,
    OnPolicy,
    PooledVarGrad,
    Prior,
    Proposal,
    RelativeTrajectoryBalance,
    SubTB,
    Tempered,
    TrajectoryBalance,
    VarGrad,
)
from .importance import Importance
from .metropolis import MarkovChains, MetropolisHastings
from .posterior import Posterior, ZeroEvidence
from .predictive import Prediction, Predictive
from .programs import SiteMismatch
from .smc import SMC
from .training import Task, Trainer
from .validation import AxesError

__all__ = [
    "SMC",
    "AxesError",
    "Comparison",
    "DetailedBalance",
    "Enumerated",
    "Enumeration",
    "EpsilonUniform",
    "Exploration",
    "GFlowNet",
    "Importance",
    "MarkovChains",
    "MetropolisHastings",
    "Mixture",
    "Objective",
    "OnPolicy",
    "PooledVarGrad",
    "Posterior",
    "Prediction",
    "Predictive",
    "Prior",
    "Proposal",
    "RelativeTrajectoryBalance",
    "SiteMismatch",
    "SubTB",
    "Task",
    "Tempered",
    "Trainer",
    "TrajectoryBalance",
    "VarGrad",
    "ZeroEvidence",
    "compare",
]
