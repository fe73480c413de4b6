"""What operations on rows report, and how far replacing a row moves a layer.

A row of coefficient a (|Amult A|) that is replaced by something at distance ε in the kernel's
function space changes g_out by at most a · ε · √k(1) · s.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..dual.relu import relu_k

K1 = 0.5  # k(1) of ReLU


@dataclass(frozen=True)
class Report:
    """What an operation on rows did, and how far the layer may have moved.

    `output_bound`: no output g_out has changed by more than this times |g| (times 1 with layer
    norm). `gradient_bound`: the same for the norm of the Jacobian ∂g_out/∂g (times 1/|g| with layer
    norm). The last four are reported by `compress`: distance and size of the layer's function in
    the kernel's space, and relative changes of outputs and Jacobians at up to 256 of its rows.
    """

    action: str
    rows_before: int
    rows_after: int
    output_bound: float
    gradient_bound: float | None = None
    rkhs_error: float | None = None
    rkhs_norm: float | None = None
    output_change: float | None = None
    gradient_change: float | None = None


def displacement(cosine: Tensor) -> Tensor:
    """‖k(b, ·) - k(b', ·)‖ of two unit directions with this cosine, in the kernel's function
    space."""
    return (2 * (K1 - relu_k(cosine.double()))).clamp_min(0).sqrt()
