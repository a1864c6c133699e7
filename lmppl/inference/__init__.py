"""Inference algorithms, one a file: each is built from (model, guide, ...) and answers ``.run(*args) -> Posterior``."""

if __name__ != "lmppl.inference":
    # The repository's top level links here, for readers only: imported by the short name, modules would exist twice.
    raise ImportError("import lmppl.inference, not inference")

from .compare import Comparison, compare
from .enumeration import Enumerated, Enumeration
from .gflownet import Exploration, GFlowNet, Objective, PooledVarGrad, SubTB, Tempered, VarGrad
from .importance import Importance
from .posterior import Posterior, Predictive, ZeroEvidence
from .programs import SiteMismatch
from .smc import SMC
from .validation import AxesError

__all__ = [
    "SMC",
    "AxesError",
    "Comparison",
    "Enumerated",
    "Enumeration",
    "Exploration",
    "GFlowNet",
    "Importance",
    "Objective",
    "PooledVarGrad",
    "Posterior",
    "Predictive",
    "SiteMismatch",
    "SubTB",
    "Tempered",
    "VarGrad",
    "ZeroEvidence",
    "compare",
]
