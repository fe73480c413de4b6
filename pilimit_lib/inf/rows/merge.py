"""Sums of rows that the same sample made and whose directions agree, and what operations on rows
report.

A row of coefficient a (|Amult A|) that is replaced by something at distance ε in the kernel's
function space changes g_out by at most a · ε · √k(1) · s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dual.relu import relu_k
from ..numerics import accumulator
from .layer import RowLayer

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


@torch.no_grad()
def merge(layer: RowLayer, cosine: float = 0.95) -> Report:
    """Sum rows made by the same sample whose directions have a cosine above `cosine` with the
    newest of their group.

    Rows of unknown origin are left alone. Momentum that an optimiser holds per row does not survive
    this.
    """
    check_cosine(cosine)
    layer.require_whole("merge")
    m, origin = len(layer), layer.origin
    A, Amult, B = (getattr(layer, name).blocks.dense() for name in ("A", "Amult", "B"))
    unit = B.to(accumulator(B.dtype))
    group = torch.unique(origin, return_inverse=True)[1]
    leader = torch.arange(m, device=origin.device)
    loose = origin >= 0
    while bool(loose.any()):
        index = loose.nonzero().squeeze(1)
        newest = torch.full((m,), -1, device=origin.device).scatter_reduce_(
            0, group[index], index, "amax"
        )[group[index]]
        found = (unit[index] * unit[newest]).sum(1)
        joins = (found > cosine) | (newest == index)
        leader[index[joins]] = newest[joins]
        loose[index[joins]] = False
    heads = (leader == torch.arange(m, device=origin.device)).nonzero().squeeze(1)
    member = torch.unique(leader, return_inverse=True)[1]
    total, mean, bound = combine(A.to(unit) * Amult.to(unit)[:, None], unit, member)
    crowd = torch.bincount(member) > 1
    fresh, multiplier = split(total)
    layer.set_rows(
        torch.where(crowd[:, None], fresh.to(A.dtype), A[heads]),
        torch.where(crowd, multiplier.to(Amult.dtype), Amult[heads]),
        torch.where(crowd[:, None], mean.to(B.dtype), B[heads]),
        origin[heads],
    )
    # k'(1) = k(1), so slopes obey the bound of values
    return Report("merge", m, len(layer), bound, bound)


def combine(a: Tensor, B: Tensor, group: Tensor) -> tuple[Tensor, Tensor, float]:
    """One row for each group of rows a = Amult A [m o], B [m r]: (Σ a [g o], direction [g r], bound
    on the change).

    The direction b = Σ ⟨a_m, Σa⟩ B_m / |Σa|² makes the first order of the change, Σ a_m ⊗ (B_m -
    b), as small as it can be; weights are kept positive, since rows that cancel have no meaningful
    mean.
    """
    count = int(group.max()) + 1 if len(group) else 0
    total = a.new_zeros(count, a.shape[1]).index_add_(0, group, a)
    square = total.square().sum(1)
    weight = (a * total[group]).sum(1) / torch.where(square > 0, square, 1)[group]
    weight = weight.clamp(min=1e-6)
    mean = B.new_zeros(count, B.shape[1]).index_add_(0, group, B * weight[:, None])
    mean /= torch.linalg.vector_norm(mean, dim=1, keepdim=True)
    moved = torch.linalg.vector_norm(a.double(), dim=1) * displacement((B * mean[group]).sum(1))
    alone = torch.bincount(group, minlength=count)[group] == 1
    return total, mean, float(moved[~alone].sum()) * math.sqrt(K1)


def split(a: Tensor) -> tuple[Tensor, Tensor]:
    """(A [m o], Amult [m]) of rows a = Amult A: the largest number of A is 1, which any storage
    holds.

    With the Amult of one of the summed rows, which weight decay has made small, A would grow beyond
    float16.
    """
    size = a.abs().amax(1)
    size = torch.where(size > 0, size, 1)
    return a / size[:, None], size


def displacement(cosine: Tensor) -> Tensor:
    """‖k(b, ·) - k(b', ·)‖ of two unit directions with this cosine, in the kernel's function
    space."""
    return (2 * (K1 - relu_k(cosine.double()))).clamp_min(0).sqrt()


def check_cosine(cosine: float) -> None:
    if not -1 <= cosine <= 1:
        raise ValueError(
            f"the cosine above which rows are merged is {cosine}; a number from -1 to 1 was "
            "expected (0.9 to 0.99)"
        )
