"""GFlowNet objectives, one in each file, their divergences and explorations, and the trainer.

All names listed here are public in `lmppl.inference`.
"""

from .detailed_balance import DetailedBalance
from .divergences import DIVERGENCES, AlphaDivergence, Divergence
from .exploration import EpsilonUniform, Exploration, Mixture, OnPolicy, Prior, Proposal, Tempered
from .hard_var_grad import HardVarGrad
from .linex import Linex
from .local_search import LocalSearch
from .objective import Objective
from .replay import Replay
from .search import Searched
from .served import Served
from .sub_tb import SubTB
from .trainer import GFlowNet
from .trajectory_balance import RelativeTrajectoryBalance, TrajectoryBalance
from .var_grad import PooledVarGrad, VarGrad

__all__ = [
    "AlphaDivergence",
    "DIVERGENCES",
    "DetailedBalance",
    "Divergence",
    "EpsilonUniform",
    "Exploration",
    "GFlowNet",
    "HardVarGrad",
    "Linex",
    "LocalSearch",
    "Mixture",
    "Objective",
    "OnPolicy",
    "PooledVarGrad",
    "Prior",
    "Proposal",
    "RelativeTrajectoryBalance",
    "Replay",
    "Searched",
    "Served",
    "SubTB",
    "Tempered",
    "TrajectoryBalance",
    "VarGrad",
]
