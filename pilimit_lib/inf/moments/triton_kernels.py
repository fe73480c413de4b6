"""Φ(u) V and the rank-b update of V on a GPU, with tiles of Φ made on the fly: for kernels of
degree at most 2.

The second implementation of `feature_linear.forward` and `update_`, in the same order of columns.
It refuses (`usable`) what it can't do, and then the plain one runs. Tested against it under
Triton's interpreter; not yet measured on a GPU.
Index legend: b batch, r rank in, o rank out, P columns. Column q of degree 2 is u_i u_j with i = q
mod r, j = (i + q/r) mod r.
"""

from __future__ import annotations

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dual.features import PolynomialFeatures

# parts of P that are summed separately: enough programs to fill a GPU even for few samples and
# outputs
SPLITS = 64


def usable(features: PolynomialFeatures, u: Tensor, V: Tensor) -> bool:
    """Whether these kernels can take this over: degree at most 2, float32 sums, contiguous V, on a
    GPU or interpreted."""
    if not (u.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return False
    return (
        features.degree <= 2
        and u.dtype == torch.float32
        and V.is_contiguous()
        and V.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


@triton.jit
def phi_tile(
    u_ptr, rows, row_mask, p, P, r, first, second, k0, k1, k2_square, k2_pair, BLOCK_P: tl.constexpr
):
    """Φ [rows, p]. Columns below `first` are the constant, below `second` those of degree 1."""
    constant = p < first
    linear = (p >= first) & (p < second)
    q = p - second
    distance = q // r
    i = tl.where(linear, p - first, tl.where(constant, 0, q % r))
    j = tl.where(p >= second, (i + distance) % r, 0)
    scale = tl.where(
        constant, k0, tl.where(linear, k1, tl.where(distance == 0, k2_square, k2_pair))
    )
    mask = row_mask[:, None] & (p < P)[None, :]
    offset = rows[:, None].to(tl.int64) * r
    left = tl.load(u_ptr + offset + i[None, :], mask=mask, other=0.0)
    right = tl.load(u_ptr + offset + j[None, :], mask=mask, other=0.0)
    value = (
        tl.where(constant[None, :], 1.0, left)
        * tl.where((p >= second)[None, :], right, 1.0)
        * scale[None, :]
    )
    return tl.where(mask, value, 0.0)


@triton.jit
def _forward(
    u_ptr,
    V_ptr,
    out_ptr,
    b,
    o,
    P,
    r,
    first,
    second,
    k0,
    k1,
    k2_square,
    k2_pair,
    per_split,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(2)
    total = tl.zeros((BLOCK_B, BLOCK_O), dtype=tl.float32)
    begin = split * per_split
    for start in range(begin, begin + per_split, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        phi = phi_tile(
            u_ptr, rows, rows < b, p, P, r, first, second, k0, k1, k2_square, k2_pair, BLOCK_P
        )
        at = p[:, None].to(tl.int64) * o + columns[None, :]
        V = tl.load(V_ptr + at, mask=(p < P)[:, None] & (columns < o)[None, :], other=0.0).to(
            tl.float32
        )
        total += tl.dot(phi, V, input_precision="ieee")
    at = (split.to(tl.int64) * b + rows[:, None]) * o + columns[None, :]
    tl.store(out_ptr + at, total, mask=(rows < b)[:, None] & (columns < o)[None, :])


@triton.jit
def _update(
    u_ptr,
    delta_ptr,
    V_ptr,
    b,
    o,
    P,
    r,
    first,
    second,
    k0,
    k1,
    k2_square,
    k2_pair,
    scale,
    decay,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_P, BLOCK_O), dtype=tl.float32)
    for start in range(0, b, BLOCK_B):
        rows = start + tl.arange(0, BLOCK_B)
        phi = phi_tile(
            u_ptr, rows, rows < b, p, P, r, first, second, k0, k1, k2_square, k2_pair, BLOCK_P
        )
        at = rows[:, None].to(tl.int64) * o + columns[None, :]
        delta = tl.load(
            delta_ptr + at, mask=(rows < b)[:, None] & (columns < o)[None, :], other=0.0
        )
        total += tl.dot(tl.trans(phi), delta, input_precision="ieee")
    at = p[:, None].to(tl.int64) * o + columns[None, :]
    mask = (p < P)[:, None] & (columns < o)[None, :]
    V = tl.load(V_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(V_ptr + at, (decay * V + scale * total).to(V_ptr.dtype.element_ty), mask=mask)


def column_numbers(features: PolynomialFeatures) -> tuple[int, int, float, float, float, float]:
    """(columns before degree 1, before degree 2, √κ_0, √κ_1, √κ_2, √2κ_2) for the kernels."""
    kappa = [*features.kappa, 0.0, 0.0, 0.0][:3]
    first = int(kappa[0] > 0)
    return (
        first,
        first + features.r * (kappa[1] > 0),
        math.sqrt(kappa[0]),
        math.sqrt(kappa[1]),
        math.sqrt(kappa[2]),
        math.sqrt(2 * kappa[2]),
    )


def forward(features: PolynomialFeatures, u: Tensor, V: Tensor, block_p: int = 64) -> Tensor:
    """Φ(u) V: [b o] in float32, for directions u [b r], V [P o]. Deterministic: partial sums are
    added in order."""
    u, (b, o, P) = u.contiguous(), (len(u), V.shape[1], features.P)
    block_b, block_o = block_sizes(b, o)
    per_split = triton.cdiv(triton.cdiv(P, SPLITS), block_p) * block_p
    splits = triton.cdiv(P, per_split)
    partial = torch.empty(splits, b, o, device=u.device, dtype=torch.float32)
    if b:
        _forward[(triton.cdiv(b, block_b), triton.cdiv(o, block_o), splits)](
            u,
            V,
            partial,
            b,
            o,
            P,
            features.r,
            *column_numbers(features),
            per_split,
            BLOCK_B=block_b,
            BLOCK_P=block_p,
            BLOCK_O=block_o,
        )
    return partial.sum(0)


def update_(
    features: PolynomialFeatures,
    V: Tensor,
    u: Tensor,
    delta: Tensor,
    scale: float,
    decay: float = 1.0,
    block_p: int = 64,
) -> None:
    """V ← decay·V + scale·Φ(u)ᵀ delta in place: V [P o] is read and written once."""
    u, delta, (b, o) = u.contiguous(), delta.contiguous(), delta.shape
    block_b, block_o = block_sizes(b, o)
    _update[(triton.cdiv(features.P, block_p), triton.cdiv(o, block_o))](
        u,
        delta,
        V,
        b,
        o,
        features.P,
        features.r,
        *column_numbers(features),
        float(scale),
        float(decay),
        BLOCK_B=block_b,
        BLOCK_P=block_p,
        BLOCK_O=block_o,
    )


def block_sizes(b: int, o: int) -> tuple[int, int]:
    """Block sizes of samples and outputs: powers of two from 16, the least that tl.dot takes."""
    return tuple(min(64, max(16, triton.next_power_of_2(size))) for size in (b, o))
