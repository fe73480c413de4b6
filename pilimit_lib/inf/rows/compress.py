"""Compression of a layer's rows to fewer ones with new coefficients: the best such in the kernel's
function space.

The layer without its factor s is f = Σ_m a_m k(B_m, ·), a_m = Amult_m A_m. Rows S are picked by
pivoted Cholesky decomposition of K = k(B Bᵀ), and the coefficients of S solve K_SS c = K_S: a, the
orthogonal projection of f. With L the Cholesky factor the squared distance is ‖f‖² - ‖Lᵀ a‖². All
in float64. Source: Fine & Scheinberg 2001 (low-rank kernel representations).

Stored rows are only nearly unit, by the rounding of their type, and k of such a row is no function
of the kernel's space. So the
space is that of the exact directions, and what rounding adds is bounded apart: |k(ρc) - k(c)| <=
½|ρ-1|, and both parts of the gradient of s·k move by at most |ρ-1|. The distance is measured once
more from the rows as they were stored in the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dual.relu import relu_k, relu_k_prime
from ..numerics import accumulator, direction
from .layer import RowLayer
from .merge import K1, Report

# a row this close (squared, of 1) to the span of those picked is left out: it would only add
# rounding
CUT = 1e-9
BLOCK = 2048  # rows of K that are in memory at a time
PROBES = 256
# of the precision of sums: how far the terms of a sum may be rounded, relative to their sizes
SUMMED = 4


@torch.no_grad()
def compress(layer: RowLayer, tol: float) -> Report:
    """Keep as few rows as it takes for ‖f - f'‖ <= tol · ‖f‖; needs memory for rows x kept numbers
    in float64.

    |f(x) - f'(x)| <= ‖f - f'‖ √k(1) for every direction x, and the derivative along any unit
    tangent obeys the same bound with k'(1) = k(1) = ½, so both bounds of the report are ‖f - f'‖ /
    √2, plus what rounding adds: rows in few bits may not come as near as `tol`. Momentum that an
    optimiser holds per row is lost.
    """
    if not 0 <= tol < 1:
        raise ValueError(
            f"tol is {tol}; the relative error of the function to allow was expected, from 0 "
            "(exact) to below 1"
        )
    layer.require_whole("compress")
    before, storage = len(layer), layer.A.blocks.storage
    a, B = _rows(layer)
    # rows of coefficient 0 go for free, such as the first ones of a readout
    alive = (a != 0).any(1).nonzero().squeeze(1)
    a, B, origin = a[alive], B[alive], layer.origin[alive]
    unit, length = direction(B)
    norm2 = _squared_norm(a, unit)[0]
    picked, coefficients = _project(
        a,
        unit,
        norm2,
        tol,
        max(CUT, 1 / 127 if storage == torch.int8 else torch.finfo(storage).eps),
    )
    layer.set_rows(coefficients, torch.ones(len(picked)), B[picked], origin[picked])
    c, S = _rows(layer)
    change = a.clone()
    change[picked] -= c
    distance2, rounding2 = _squared_norm(change, unit)
    error = math.sqrt(max(distance2, 0.0) + rounding2)
    # What the function space doesn't see: lengths other than 1, picked rows that were stored
    # otherwise, sums that were rounded.
    changed, size, stored = (torch.linalg.vector_norm(values, dim=1) for values in (change, a, c))
    outside = float(
        changed @ (length.squeeze(1) - 1).abs()
        + stored @ torch.linalg.vector_norm(S - B[picked], dim=1)
    )
    outside += SUMMED * torch.finfo(accumulator(layer.dtype)).eps * float(size.sum() + stored.sum())
    probes = unit[torch.linspace(0, max(len(B) - 1, 0), min(PROBES, len(B))).long()]
    output, gradient = _changes(a, unit, c, direction(S)[0], probes)
    inside = error * math.sqrt(K1)
    return Report(
        "compress",
        before,
        len(layer),
        inside + outside / 2,
        inside + 1.5 * outside,
        error,
        math.sqrt(norm2),
        output,
        gradient,
    )


def _rows(layer: RowLayer) -> tuple[Tensor, Tensor]:
    """(Amult_m A_m [m o], B [m r]) as stored, in float64."""
    A, Amult, B = (getattr(layer, name).blocks.dense().double() for name in ("A", "Amult", "B"))
    return A * Amult[:, None], B


def _kernel(X: Tensor, Y: Tensor) -> Tensor:
    return relu_k(X @ Y.T)


def _squared_norm(a: Tensor, B: Tensor) -> tuple[float, float]:
    """(‖Σ_m a_m k(B_m, ·)‖² summed over outputs, how far rounding may have moved it)."""
    total, size = 0.0, 0.0
    for i in range(0, len(B), BLOCK):
        terms = _kernel(B[i : i + BLOCK], B) * (a[i : i + BLOCK] @ a.T)
        total, size = total + float(terms.sum()), size + float(terms.abs().sum())
    return total, size * torch.finfo(torch.float64).eps


def _project(a: Tensor, B: Tensor, norm2: float, tol: float, cut: float) -> tuple[Tensor, Tensor]:
    """(picked rows, their coefficients): picks until the distance is small enough or no row is
    further than `cut` from them."""
    m = len(B)
    residual = torch.full((m,), K1, dtype=a.dtype, device=a.device)
    weight = a.square().sum(1)
    L = a.new_empty(m, min(m, 64))
    rotated, picked, error2 = [], [], norm2
    while error2 > tol * tol * norm2 and len(picked) < m:
        pivot = int((residual * weight).argmax())
        if residual[pivot] < cut * K1:
            pivot = int(residual.argmax())
            if residual[pivot] < cut * K1:
                break
        if len(picked) == L.shape[1]:
            L = torch.cat([L, L.new_empty(m, min(m - len(picked), L.shape[1]))], 1)
        count = len(picked)
        column = _kernel(B, B[pivot : pivot + 1])[:, 0] - L[:, :count] @ L[pivot, :count]
        column /= residual[pivot].sqrt()
        column[picked] = 0  # exactly so, up to rounding
        L[:, count] = column
        residual = (residual - column.square()).clamp_min_(0)
        residual[pivot] = 0
        picked.append(pivot)
        rotated.append(column @ a)
        error2 -= float(rotated[-1].square().sum())
    index = torch.tensor(picked, dtype=torch.long, device=a.device)
    if not picked:
        return index, a.new_zeros(0, a.shape[1])
    triangle = L[index, : len(picked)].tril()
    return index, torch.linalg.solve_triangular(triangle.T, torch.stack(rotated), upper=True)


def _changes(a: Tensor, B: Tensor, c: Tensor, S: Tensor, probes: Tensor) -> tuple[float, float]:
    """Relative change of outputs f and of Jacobians ∂f/∂x from (a, B) to (c, S), measured at
    directions `probes`."""
    if not len(probes):
        return 0.0, 0.0
    value = _kernel(probes, B) @ a
    output = torch.linalg.vector_norm(_kernel(probes, S) @ c - value) / torch.linalg.vector_norm(
        value
    )
    moved, size = 0.0, 0.0
    for probe in probes:
        old = (a * relu_k_prime(B @ probe)[:, None]).T @ B
        new = (c * relu_k_prime(S @ probe)[:, None]).T @ S
        tangent = [jacobian - (jacobian @ probe)[:, None] * probe for jacobian in (old, new)]
        moved += float((tangent[1] - tangent[0]).square().sum())
        size += float(tangent[0].square().sum())
    return float(output), math.sqrt(moved / size) if size else 0.0
