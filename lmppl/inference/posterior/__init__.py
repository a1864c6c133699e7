"""What every algorithm answers with: weighted particles, their predictions, files and tables."""

from .posterior import Posterior, Sites, ZeroEvidence
from .predictive import Prediction, Predictive

__all__ = ["Posterior", "Prediction", "Predictive", "Sites", "ZeroEvidence"]
