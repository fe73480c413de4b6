"""Instruments to understand a network with: is it lazy or rich, does it scale as its limit does."""

from .coord_check import CoordCheck, coord_check
from .feature_learning import FeatureLearning, KernelChange, feature_learning
from .features import feature_kernels
from .similarity import alignment, cka, relative_change, target_kernel
from .tangent import empirical_ntk

__all__ = [
    "CoordCheck",
    "FeatureLearning",
    "KernelChange",
    "alignment",
    "cka",
    "coord_check",
    "empirical_ntk",
    "feature_kernels",
    "feature_learning",
    "relative_change",
    "target_kernel",
]
