"""Whether an answer can be trusted: weights, calibration, bounds, drift."""

from .diagnose import Diagnosis, Finding, diagnose

__all__ = ["Diagnosis", "Finding", "diagnose"]
