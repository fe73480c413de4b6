"""The weights of a finite network whose limit are moments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..dual.features import PolynomialFeatures, column_indices
from ..numerics import accumulator

_COLUMNS = 4096  # columns of Ψ made at a time


@torch.no_grad()
def finite_moments(
    features: PolynomialFeatures, coefficients: Sequence[float], omega: Tensor, V: Tensor
) -> Tensor:
    """Σ_m p(Ω B_m) Amult_m A_mᵀ [n o] of the rows summed in V [P o], for p = Σ_j coefficients_j h_j
    and ω [n r].

    By the multinomial theorem of Hermite polynomials h_j(⟨ω, b⟩) = Σ_{|α|=j} √(j!/α!) b^α Ψ_α(ω)
    for unit b, with Ψ_α(ω) = Π_i h_{α_i}(ω_i); the sum over rows is V's, up to √κ_j.
    """
    dtype = accumulator(V.dtype)
    total = torch.zeros(len(omega), V.shape[1], device=V.device, dtype=dtype)
    for degree, start, psi in hermite_columns(features, omega.to(total)):
        total.addmm_(
            psi,
            V[start : start + psi.shape[1]].to(dtype),
            alpha=coefficients[degree] / math.sqrt(features.kappa[degree]),
        )
    return total


def hermite_columns(
    features: PolynomialFeatures, omega: Tensor
) -> Iterator[tuple[int, int, Tensor]]:
    """(degree, first column, Ψ [n columns]) for all columns of the feature map, in pieces: Π_i
    h_{α_i}(ω_i) for each u^α."""
    table = [torch.ones_like(omega), omega]  # h_0, h_1, ... of every coordinate
    for j in range(1, features.degree):
        table.append((omega * table[-1] - math.sqrt(j) * table[-2]) / math.sqrt(j + 1))
    table = torch.stack(table)
    for degree in features.degrees:
        index = column_indices(features, degree)
        for first in range(0, len(index), _COLUMNS):
            yield (
                degree,
                features.starts[degree] + first,
                _products(table, index[first : first + _COLUMNS].to(omega.device)),
            )


def _products(table: Tensor, index: Tensor) -> Tensor:
    """Π over runs of equal indices of h_{length of the run}: [n count] for sorted index [count
    degree], table [D+1 n r]."""
    count, degree = index.shape
    result = table.new_ones(table.shape[1], count)
    run = torch.ones(count, dtype=torch.long, device=index.device)
    for t in range(degree):
        ends = (
            torch.ones_like(run, dtype=torch.bool)
            if t == degree - 1
            else index[:, t] != index[:, t + 1]
        )
        order = torch.where(ends, run, 0)
        result *= table[order, :, index[:, t]].T
        run = torch.where(ends, 1, run + 1)
    return result
