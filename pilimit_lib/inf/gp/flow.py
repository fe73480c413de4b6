"""Infinitely wide networks in the NTK parametrisation during training, in closed form.

Gradient flow on ½ Σ |f - y|² (of the samples' *sum*) moves outputs as df/dt = -Θ (f - y), with a
tangent kernel Θ that stays. From f_0 ~ GP(0, K), with S_t = Θ(*, x) Θ⁻¹ (1 - e^{-Θt}):

    mean_t       = S_t y
    covariance_t = K(*, *) - S_t K(x, *) - K(*, x) S_tᵀ + S_t K(x, x) S_tᵀ

One step of gradient descent at rate η is a time of η; with the *mean* of the loss over n samples,
η/n. As t → ∞ a network fits the samples, and its covariance is no posterior of any prior, but that
of an ensemble. Index legend: a samples, b test samples, o outputs, t times. Source: Lee et al.
2019, *Wide neural networks of any depth evolve as linear models*, equations 14 and 15.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .exact import check_targets
from .matrix import kernel_matrix
from .solve import memory_needed, require_memory

Kernel = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FlowPrediction:
    """Outputs over training time, in float64: mean [t b o], and covariance [t b b] over initial
    weights where an NNGP was given, else None."""

    mean: Tensor
    covariance: Tensor | None


def gradient_flow(
    ntk: Kernel,
    x: Tensor,
    targets: Tensor,
    x_test: Tensor,
    times: Sequence[float],
    nngp: Kernel | None = None,
    ridge: float = 0.0,
) -> FlowPrediction:
    """Predictions at x_test [b …] after training for `times` (inf: to the end) on x [a …], targets
    [a o], from outputs that begin at zero mean.

    Without `nngp` all networks begin as the zero function, or with its covariance. `ridge` is added
    to Θ between samples, absolutely: that trains with weight decay towards the start.
    """
    check_targets(x, targets)
    if not all(time >= 0 for time in times):
        raise ValueError(f"times are {list(times)}; none may be negative")
    if not ridge >= 0:
        raise ValueError(f"ridge is {ridge}; it may not be negative")
    require_memory(memory_needed(len(x), method="eigen"))
    values, vectors = torch.linalg.eigh(kernel_matrix(ntk, x, progress=False))
    # A direction in which Θ is zero up to rounding never moves, whatever the time.
    least = float(values[-1]) * len(x) * torch.finfo(torch.float64).eps
    values = torch.where(values > least, values, 0) + ridge
    cross = ntk(x_test, x).double() @ vectors
    steps = [cross * _progress(values, time) @ vectors.T for time in times]
    y = targets.double()
    mean = torch.stack([step @ y for step in steps])
    if nngp is None:
        return FlowPrediction(mean, None)
    start, between = kernel_matrix(nngp, x_test, progress=False), nngp(x, x_test).double()
    among = kernel_matrix(nngp, x, progress=False)
    covariance = []
    for step in steps:
        learned = step @ between
        covariance.append(start - learned - learned.T + step @ among @ step.T)
    return FlowPrediction(mean, torch.stack(covariance))


def _progress(values: Tensor, time: float) -> Tensor:
    """(1 - e^{-λt})/λ for eigenvalues λ >= 0, which tends to t as λ → 0; where λ is 0 nothing is
    learned from an infinite time either."""
    moving = values > 0
    safe = torch.where(moving, values, 1)
    return torch.where(moving, -torch.expm1(-safe * time) / safe, 0.0)
