"""GFlowNet objectives, one a file, and their trainer."""

from .exploration import Exploration, Tempered
from .objective import Objective
from .sub_tb import SubTB
from .trainer import GFlowNet
from .var_grad import PooledVarGrad, VarGrad

__all__ = ["Exploration", "GFlowNet", "Objective", "PooledVarGrad", "SubTB", "Tempered", "VarGrad"]
