"""Exact Gaussian processes: posterior mean, covariance and marginal likelihood from kernels.

    f ~ GP(0, K) ,  y = f(x) + N(0, noise)

With the NNGP kernel this is an infinitely wide network of which only the readout is trained,
Bayesian. For n samples it takes O(n³) time and n² memory; `linear` needs neither, where the kernel
has few features. Index legend: a samples, b test samples, o outputs. Source: Rasmussen & Williams
2006, algorithm 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .matrix import kernel_matrix
from .solve import memory_needed, require_memory

Kernel = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class GaussianProcessPosterior:
    """Of f at test samples: mean [b o], covariance [b b] (alike for all outputs), in float64; and
    log p(y) of each output [o]. A new observation's variance is `covariance.diagonal() + noise`."""

    mean: Tensor
    covariance: Tensor
    log_marginal_likelihood: Tensor


def gp_posterior(
    kernel: Kernel, x: Tensor, targets: Tensor, x_test: Tensor, noise: float
) -> GaussianProcessPosterior:
    """The posterior at x_test [b …] given targets [a o] at x [a …] with noise of variance `noise`,
    in the units of the kernel.

    Raises ValueError where K + noise·I is not positive definite in float64.
    """
    check_targets(x, targets)
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise is {noise}; a variance that is not negative was expected")
    require_memory(2 * memory_needed(len(x)))
    y = targets.double()
    K = kernel_matrix(kernel, x, progress=False)
    K.diagonal().add_(noise)
    factor, info = torch.linalg.cholesky_ex(K)
    if info:
        raise ValueError(
            f"the kernel of {len(x)} samples with noise {noise:g} is not positive definite in "
            "float64: some samples are the same, or nearly. Take more noise"
        )
    cross = kernel(x, x_test).double()
    white = torch.linalg.solve_triangular(factor, cross, upper=False)
    whitened = torch.linalg.solve_triangular(factor, y, upper=False)
    volume = factor.diagonal().log().sum() + 0.5 * len(x) * math.log(2 * math.pi)
    return GaussianProcessPosterior(
        white.T @ whitened,
        kernel_matrix(kernel, x_test, progress=False) - white.T @ white,
        -0.5 * whitened.square().sum(0) - volume,
    )


def check_targets(x: Tensor, targets: Tensor) -> None:
    """Raise ValueError where there are not as many targets as samples."""
    if targets.ndim != 2 or len(targets) != len(x) or not len(x):
        raise ValueError(
            f"targets have shape {list(targets.shape)}; expected [{len(x)}, outputs], and at least "
            "one sample"
        )
