"""Compression of a layer's rows to fewer ones with new coefficients: the best such in the kernel's function space.

The layer without its factor s is f = Σ_m a_m k(B_m, ·), a_m = Amult_m A_m. Rows S are picked by pivoted Cholesky decomposition of
K = k(B Bᵀ), and the coefficients of S solve K_SS c = K_S: a, the orthogonal projection of f. With L the Cholesky factor
the squared distance is ‖f‖² - ‖Lᵀ a‖². All in float64. Source: Fine & Scheinberg 2001 (low-rank kernel representations).
"""
from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .bounded import K1, Report
from .row_state import require_whole
from .vtransform import relu_k, relu_k_prime

if TYPE_CHECKING:
    from .layers import InfPiLinearReLU

CUT = 1e-9      # a row this close (squared) to the span of those picked is left out: it would only add rounding
BLOCK = 2048    # rows of K that are in memory at a time
PROBES = 256


@torch.no_grad()
def compress(layer: InfPiLinearReLU, tol: float) -> Report:
    """Keep as few rows as it takes for ‖f - f'‖ <= tol · ‖f‖; needs memory for rows x kept numbers in float64.

    |f(x) - f'(x)| <= ‖f - f'‖ √k(1) for every direction x, and the derivative along any unit tangent obeys the same bound with
    k'(1) = k(1) = ½, so both bounds of the report are ‖f - f'‖ / √2. Momentum that an optimiser holds per row is lost.
    """
    if not 0 <= tol < 1:
        raise ValueError(f"tol is {tol}; the relative error of the function to allow was expected, from 0 (exact) to below 1")
    require_whole(layer, "compress")
    before = len(layer)
    A, Amult, B = (getattr(layer, name).blocks.dense().double() for name in ("A", "Amult", "B"))
    a = A * Amult[:, None]
    alive = (a != 0).any(1).nonzero().squeeze(1)  # rows of coefficient 0 go for free, such as the first ones of a readout
    a, B, origin = a[alive], B[alive], layer.origin[alive]
    norm2 = _squared_norm(a, B)
    picked, coefficients, error2 = _project(a, B, norm2, tol)
    probes = B[torch.linspace(0, max(len(B) - 1, 0), min(PROBES, len(B))).long()]
    output, gradient = _changes(a, B, coefficients, B[picked], probes)
    error = math.sqrt(max(error2, 0.0))
    layer.set_rows(coefficients, torch.ones(len(picked)), B[picked], origin[picked])
    return Report("compress", before, len(layer), error * math.sqrt(K1), error * math.sqrt(K1), error, math.sqrt(norm2), output,
                  gradient)


def _kernel(X: Tensor, Y: Tensor) -> Tensor:
    return relu_k(X @ Y.T)


def _squared_norm(a: Tensor, B: Tensor) -> float:
    """‖Σ_m a_m k(B_m, ·)‖², summed over outputs."""
    return sum(float((_kernel(B[i:i + BLOCK], B) * (a[i:i + BLOCK] @ a.T)).sum()) for i in range(0, len(B), BLOCK))


def _project(a: Tensor, B: Tensor, norm2: float, tol: float) -> tuple[Tensor, Tensor, float]:
    """(picked rows, their coefficients, squared distance): picks until the distance is small enough or no row adds anything."""
    m = len(B)
    residual = torch.full((m,), K1, dtype=a.dtype, device=a.device)
    weight = a.square().sum(1)
    L = a.new_empty(m, min(m, 64))
    rotated, picked, error2 = [], [], norm2
    while error2 > tol * tol * norm2 and len(picked) < m:
        pivot = int((residual * weight).argmax())
        if residual[pivot] < CUT * K1:
            pivot = int(residual.argmax())
            if residual[pivot] < CUT * K1:
                break
        if len(picked) == L.shape[1]:
            L = torch.cat([L, L.new_empty(m, min(m - len(picked), L.shape[1]))], 1)
        count = len(picked)
        column = _kernel(B, B[pivot:pivot + 1])[:, 0] - L[:, :count] @ L[pivot, :count]
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
        return index, a.new_zeros(0, a.shape[1]), error2
    triangle = L[index, :len(picked)].tril()
    return index, torch.linalg.solve_triangular(triangle.T, torch.stack(rotated), upper=True), error2


def _changes(a: Tensor, B: Tensor, c: Tensor, S: Tensor, probes: Tensor) -> tuple[float, float]:
    """Relative change of outputs f and of Jacobians ∂f/∂x from (a, B) to (c, S), measured at directions `probes`."""
    if not len(probes):
        return 0.0, 0.0
    value = _kernel(probes, B) @ a
    output = torch.linalg.vector_norm(_kernel(probes, S) @ c - value) / torch.linalg.vector_norm(value)
    moved, size = 0.0, 0.0
    for probe in probes:
        old = (a * relu_k_prime(B @ probe)[:, None]).T @ B
        new = (c * relu_k_prime(S @ probe)[:, None]).T @ S
        tangent = [jacobian - (jacobian @ probe)[:, None] * probe for jacobian in (old, new)]
        moved += float((tangent[1] - tangent[0]).square().sum())
        size += float(tangent[0].square().sum())
    return float(output), math.sqrt(moved / size) if size else 0.0
