"""GFlowNet objectives, one a file, and their trainer."""

from .exploration import Exploration, Tempered
from .objective import Objective
from .sub_tb import SubTB
from .var_grad import PooledVarGrad, VarGrad

__all__ = ["Exploration", "Objective", "PooledVarGrad", "SubTB", "Tempered", "VarGrad"]
