"""Φ(u) V without Φ: forward, backward and the rank-b update of V, tile by tile.

    forward    out = Φ(u) V                                  u [b r], V [P o]
    backward   ∂V = Φ(u)ᵀ ∂out ,  ∂Φ = ∂out Vᵀ ,  ∂u from ∂Φ by `Adjoint`
    update     V ← decay·V - lr·Φ(u)ᵀ ∂out                   reads and writes V once

An update never forms ∂V. V may be float16 or bfloat16: each tile of it is converted, and sums are
float32 or better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from ..dual.features import BATCH_CHUNK, Adjoint, Basis, PolynomialFeatures
from ..implementation import chosen
from ..numerics import accumulator
from . import native

ROWS_AT_ONCE = 8192  # rows that are summed into moments at a time
# 16 MiB of float32: what monomials of lower degrees may take however small V is
LOWER_ELEMENTS = 1 << 22
# of V updated at a time: BLAS decays and adds in two passes, the second then from cache
BLOCK_ELEMENTS = 1 << 18


def _twin(features: PolynomialFeatures, u: Tensor, V: Tensor) -> ModuleType | None:
    """The implementation that was asked for, where it does not refuse."""
    choice = chosen()
    if choice.moments == "native":
        reason = native.refuses(features, u, V)
        choice.tell(f"native {'runs' if reason is None else f'refuses: {reason}'}")
        return native if reason is None else None
    if choice.moments == "triton":
        from . import triton_kernels as triton_features

        return triton_features if triton_features.usable(features, u, V) else None
    return None


def plain(features: PolynomialFeatures, u: Tensor, V: Tensor) -> Tensor:
    """Φ(u) V by the definition, all of Φ at once: differentiable to any order. What the rest is
    tested against."""
    return features.matrix(u) @ V.to(u.dtype)


@torch.no_grad()
def forward(features: PolynomialFeatures, u: Tensor, V: Tensor) -> Tensor:
    """Φ(u) V: [b o] in u's dtype."""
    twin = _twin(features, u, V)
    if twin is not None:
        return twin.forward(features, u, V)
    out = u.new_zeros(len(u), V.shape[1])
    for basis, part in _pieces(features, u, out):
        space = _space(features, basis)
        for tile in features.tiles(basis.u.shape[1]):
            part.addmm_(
                features.tile(tile, basis, space[: len(tile)]).T,
                V[tile.start : tile.stop].to(u.dtype),
            )
    return out


@torch.no_grad()
def backward(
    features: PolynomialFeatures, u: Tensor, V: Tensor, grad: Tensor, need_u: bool, need_V: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(∂u [b r], ∂V [P o]) for ∂out `grad` [b o] in u's dtype; None for what is not needed."""
    twin = _twin(features, u, V)
    if twin is native:
        return native.backward(features, u, V, grad, need_u, need_V)
    dV = torch.empty_like(V, dtype=u.dtype, requires_grad=False) if need_V else None
    totals = []
    for number, (basis, part) in enumerate(_pieces(features, u, grad)):
        transposed, adjoint, space = (
            part.T.contiguous(),
            Adjoint(features, basis),
            _space(features, basis),
        )
        for tile in features.tiles(basis.u.shape[1]):
            if need_V:
                dV[tile.start : tile.stop].addmm_(
                    features.tile(tile, basis, space[: len(tile)]), part, beta=int(number > 0)
                )
            if need_u:
                block = V[tile.start : tile.stop].to(u.dtype)
                adjoint.add(tile, torch.mm(block, transposed, out=space[: len(tile)]))
        if need_u:
            totals.append(adjoint.total())
    return torch.cat(totals) if need_u else None, None if dV is None else dV.to(V.dtype)


@torch.no_grad()
def update_(
    features: PolynomialFeatures,
    V: Tensor,
    u: Tensor,
    delta: Tensor,
    scale: float,
    decay: float = 1.0,
) -> None:
    """V ← decay·V + scale·Φ(u)ᵀ delta in place, for u [b r], delta [b o]: as many rows folded into
    V as there are samples."""
    twin = _twin(features, u, V)
    if twin is not None:
        return twin.update_(features, V, u, delta, scale, decay)
    rows = max(1, BLOCK_ELEMENTS // V.shape[1])
    # rounded once only
    total = (
        V
        if V.dtype == u.dtype or len(u) <= samples_at_once(features, V.shape[1])
        else V.to(u.dtype)
    )
    for number, (basis, part) in enumerate(_pieces(features, u, delta)):
        space = _space(features, basis)
        for tile in features.tiles(basis.u.shape[1]):
            block = total[tile.start : tile.stop]
            values = block if block.dtype == u.dtype else block.to(u.dtype)
            columns = features.tile(tile, basis, space[: len(tile)])
            for some, their in zip(values.split(rows), columns.split(rows)):
                some.addmm_(their, part, beta=1.0 if number else decay, alpha=scale)
            if values is not block:
                block.copy_(values)
    if total is not V:
        V.copy_(total)


def factored_norm(features: PolynomialFeatures, u: Tensor, delta: Tensor) -> Tensor:
    """Frobenius norm of Φ(u)ᵀ delta, from the kernel alone: sqrt(Σ_ij δ_i·δ_j k(u_i·u_j))."""
    if chosen().moments == "native" and features.degree <= 2 and u.device.type == "cpu":
        norm = native.factored_norm(features, u, delta)
        if norm is not None:
            return norm
    return (features.kernel(u @ u.T) * (delta @ delta.T)).sum().clamp_min(0).sqrt()


def moments_of(features: PolynomialFeatures, blocks, r_out: int, like: Tensor) -> Tensor:
    """Σ_m Amult_m Φ(B_m) A_mᵀ [P o] of blocks of rows (A [m o], Amult [m], B [m r]), on `like`'s
    device, in its precision."""
    V = torch.zeros(features.P, r_out, device=like.device, dtype=accumulator(like.dtype))
    for A, Amult, B in blocks:
        # rows may be mapped from a large file
        for part in zip(*(tensor.split(ROWS_AT_ONCE) for tensor in (A, Amult, B))):
            A_part, Amult_part, B_part = (tensor.to(V) for tensor in part)
            update_(features, V, B_part, A_part * Amult_part[:, None], 1.0)
    return V


def _pieces(
    features: PolynomialFeatures, u: Tensor, other: Tensor
) -> Iterator[tuple[Basis, Tensor]]:
    size = samples_at_once(features, other.shape[1])
    for part, rest in zip(u.split(size), other.split(size)):
        yield Basis(features, part), rest


def samples_at_once(features: PolynomialFeatures, r_out: int) -> int:
    """How many samples share a pass over V: from degree 3 on, so few that the lower monomials of
    all stay small beside V."""
    if features.degree < 3:
        return BATCH_CHUNK
    lower = sum(math.comb(features.r + degree - 1, degree) for degree in range(2, features.degree))
    return min(BATCH_CHUNK, max(1, max(LOWER_ELEMENTS, features.P * r_out // 8) // lower))


def _space(features: PolynomialFeatures, basis: Basis) -> Tensor:
    """Memory for one tile, used for all tiles of a call: [columns b]."""
    batch = basis.u.shape[1]
    return basis.u.new_empty(min(features.columns(batch), features.P), batch)
