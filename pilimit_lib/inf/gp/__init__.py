"""Gaussian processes and kernels of infinitely wide networks: NNGP, NTK, feature kernels."""

from .learner import KernelMLP, KernelReadout
from .matrix import kernel_matrix, kernel_product
from .regression import (
    FiniteFeatures,
    InfiniteFeatures,
    ReLUKernel,
    embed,
    features_of,
    kernel_regression,
)
from .solve import kernel_ridge

__all__ = [
    "FiniteFeatures",
    "InfiniteFeatures",
    "KernelMLP",
    "KernelReadout",
    "ReLUKernel",
    "embed",
    "features_of",
    "kernel_matrix",
    "kernel_product",
    "kernel_regression",
    "kernel_ridge",
]
