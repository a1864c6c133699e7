"""The result of every algorithm: weighted particles, with predictions, files and tables."""

from .ensemble import Ensemble, Uncertainty
from .posterior import Posterior, Sites, ZeroEvidence
from .predictive import Prediction, Predictive

__all__ = ["Ensemble", "Posterior", "Prediction", "Predictive", "Sites", "Uncertainty", "ZeroEvidence"]
