"""Inference algorithms, one a file: each is built from (model, guide, ...) and answers ``.run(*args) -> Posterior``."""

if __name__ != "lmppl.inference":
    # The repository's top level links here, for readers only: imported by the short name, modules would exist twice.
    raise ImportError("import lmppl.inference, not inference")

from .autoguide import AutoGuide
from .baselines import PolicyGradient, Prompting, ReweightedWakeSleep, SupervisedFineTuning, dreams, few_shot
from .compare import Comparison, compare
from .diagnose import Diagnosis, Finding, diagnose
from .em import VariationalEM
from .enumeration import Enumerated, Enumeration
from .gflownet import (
    DetailedBalance,
    EpsilonUniform,
    Exploration,
    GFlowNet,
    HardVarGrad,
    Linex,
    LocalSearch,
    Mixture,
    Objective,
    OnPolicy,
    PooledVarGrad,
    Prior,
    Proposal,
    RelativeTrajectoryBalance,
    Replay,
    Searched,
    Served,
    SubTB,
    Tempered,
    TrajectoryBalance,
    VarGrad,
)
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
    "DetailedBalance",
    "Diagnosis",
    "Divergences",
    "EarlyStopping",
    "Enumerated",
    "Enumeration",
    "EpsilonUniform",
    "Exploration",
    "Finding",
    "GFlowNet",
    "HardVarGrad",
    "Importance",
    "Linex",
    "LocalSearch",
    "Markov",
    "MarkovChains",
    "MetropolisHastings",
    "Mixture",
    "Objective",
    "OnPolicy",
    "PolicyGradient",
    "PooledVarGrad",
    "Posterior",
    "Prediction",
    "Predictive",
    "Prior",
    "Prompting",
    "Proposal",
    "RelativeTrajectoryBalance",
    "Replay",
    "Resampling",
    "ReweightedWakeSleep",
    "Sandwich",
    "Searched",
    "Sequential",
    "Served",
    "Sharded",
    "Simulated",
    "SiteMismatch",
    "StopTraining",
    "SubTB",
    "SupervisedFineTuning",
    "Task",
    "Tempered",
    "Trainer",
    "TrajectoryBalance",
    "VarGrad",
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
