"""Gaussian processes and kernels of infinitely wide networks: NNGP, NTK, feature kernels."""

from .activations import ActivationKernel
from .exact import GaussianProcessPosterior, gp_posterior
from .features import FiniteFeatures, InfiniteFeatures, embed, features_of
from .flow import FlowPrediction, gradient_flow
from .learner import KernelMLP, KernelReadout
from .linear import LinearPosterior, linear_posterior
from .matrix import kernel_matrix, kernel_product
from .readout import readout_features, readout_posterior, set_readout
from .regression import kernel_regression
from .relu import InFloat32, ReLUKernel
from .solve import kernel_ridge, memory_needed, require_memory

__all__ = [
    "ActivationKernel",
    "FiniteFeatures",
    "FlowPrediction",
    "GaussianProcessPosterior",
    "InfiniteFeatures",
    "InFloat32",
    "KernelMLP",
    "KernelReadout",
    "LinearPosterior",
    "ReLUKernel",
    "embed",
    "features_of",
    "gp_posterior",
    "gradient_flow",
    "kernel_matrix",
    "kernel_product",
    "kernel_regression",
    "kernel_ridge",
    "linear_posterior",
    "memory_needed",
    "readout_features",
    "readout_posterior",
    "require_memory",
    "set_readout",
]
