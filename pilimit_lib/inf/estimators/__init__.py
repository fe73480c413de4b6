"""Infinitely wide networks as estimators of scikit-learn."""

from .classifier import PiClassifier
from .regressor import PiRegressor

__all__ = ["PiClassifier", "PiRegressor"]
