"""A convolution of features on a GPU, with tiles of Φ made on the fly: for kernels of degree at
most 2.

The second implementation of `conv_operator.forward`, and of its backward pass for V. It refuses
(`usable`) what it can't do, and then the plain one runs; the gradient of g always is the plain
one's. Tested under Triton's interpreter, unmeasured on a GPU. Φ is made again for every offset,
from û of one position (of each in a pooling window), which the caches hold. Positions are rows
here, as in `triton_features`.
Index legend: n positions, r rank in, o rank out, P columns, δ offsets.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dual.features import PolynomialFeatures
from ..moments.triton_kernels import block_sizes, column_numbers, phi_tile
from ..numerics import direction, output_scale
from .geometry import Geometry


def usable(features: PolynomialFeatures, g: Tensor, V: Tensor, geometry: Geometry) -> bool:
    """Whether these kernels can take this over: degree at most 2, zeros beyond the border, float32
    sums, on a GPU or interpreted."""
    if not (g.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return False
    return (
        features.degree <= 2
        and geometry.padding_mode == "zeros"
        and g.dtype == torch.float32
        and V.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


@triton.jit
def _source(n, count, offset, place, h, w, ho, wo, sh, sw, ph, pw, dh, dw, kw, qh, qw):
    """(input position of output n at an offset, and at a place of the pooling window there; whether
    it lies in the map)."""
    image = n // (ho * wo)
    i = (n // wo % ho) * sh + (offset // kw) * dh - ph
    j = (n % wo) * sw + (offset % kw) * dw - pw
    inside = (n < count) & (i >= 0) & (i < h // qh) & (j >= 0) & (j < w // qw)
    row = i * qh + place // qw
    column = j * qw + place % qw
    return tl.where(inside, (image * h + row) * w + column, 0), inside


@triton.jit
def _window(
    u_ptr,
    s_ptr,
    n,
    count,
    offset,
    p,
    P,
    r,
    h,
    w,
    ho,
    wo,
    sh,
    sw,
    ph,
    pw,
    dh,
    dw,
    kw,
    qh,
    qw,
    first,
    second,
    k0,
    k1,
    k2_square,
    k2_pair,
    PLACES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Columns p of s Φ(û) of what outputs n see at an offset, averaged over the pooling window."""
    total = tl.zeros((BLOCK_N, BLOCK_P), dtype=tl.float32)
    for place in range(PLACES):
        rows, inside = _source(
            n, count, offset, place, h, w, ho, wo, sh, sw, ph, pw, dh, dw, kw, qh, qw
        )
        s = tl.load(s_ptr + rows, mask=inside, other=0.0)
        phi = phi_tile(
            u_ptr, rows, inside, p, P, r, first, second, k0, k1, k2_square, k2_pair, BLOCK_P
        )
        total += phi * s[:, None]
    return total / PLACES


@triton.jit
def _forward(
    u_ptr,
    s_ptr,
    V_ptr,
    out_ptr,
    count,
    o,
    P,
    r,
    h,
    w,
    ho,
    wo,
    sh,
    sw,
    ph,
    pw,
    dh,
    dw,
    kw,
    qh,
    qw,
    first,
    second,
    k0,
    k1,
    k2_square,
    k2_pair,
    OFFSETS: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
    for offset in range(OFFSETS):
        for start in range(0, P, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            phi = _window(
                u_ptr,
                s_ptr,
                n,
                count,
                offset,
                p,
                P,
                r,
                h,
                w,
                ho,
                wo,
                sh,
                sw,
                ph,
                pw,
                dh,
                dw,
                kw,
                qh,
                qw,
                first,
                second,
                k0,
                k1,
                k2_square,
                k2_pair,
                PLACES,
                BLOCK_N,
                BLOCK_P,
            )
            at = (p[:, None].to(tl.int64) * OFFSETS + offset) * o + columns[None, :]
            V = tl.load(V_ptr + at, mask=(p < P)[:, None] & (columns < o)[None, :], other=0.0).to(
                tl.float32
            )
            total += tl.dot(phi, V, input_precision="ieee")
    at = n[:, None].to(tl.int64) * o + columns[None, :]
    tl.store(out_ptr + at, total, mask=(n < count)[:, None] & (columns < o)[None, :])


@triton.jit
def _gradient(
    u_ptr,
    s_ptr,
    grad_ptr,
    dV_ptr,
    count,
    o,
    P,
    r,
    h,
    w,
    ho,
    wo,
    sh,
    sw,
    ph,
    pw,
    dh,
    dw,
    kw,
    qh,
    qw,
    first,
    second,
    k0,
    k1,
    k2_square,
    k2_pair,
    OFFSETS: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    offset = tl.program_id(2)
    total = tl.zeros((BLOCK_P, BLOCK_O), dtype=tl.float32)
    for start in range(0, count, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        phi = _window(
            u_ptr,
            s_ptr,
            n,
            count,
            offset,
            p,
            P,
            r,
            h,
            w,
            ho,
            wo,
            sh,
            sw,
            ph,
            pw,
            dh,
            dw,
            kw,
            qh,
            qw,
            first,
            second,
            k0,
            k1,
            k2_square,
            k2_pair,
            PLACES,
            BLOCK_N,
            BLOCK_P,
        )
        at = n[:, None].to(tl.int64) * o + columns[None, :]
        grad = tl.load(grad_ptr + at, mask=(n < count)[:, None] & (columns < o)[None, :], other=0.0)
        total += tl.dot(tl.trans(phi), grad, input_precision="ieee")
    at = (p[:, None].to(tl.int64) * OFFSETS + offset) * o + columns[None, :]
    tl.store(dV_ptr + at, total, mask=(p < P)[:, None] & (columns < o)[None, :])


def _positions(g: Tensor, layernorm: bool) -> tuple[Tensor, Tensor]:
    """(û [b·h·w r], what it is scaled by [b·h·w]) of g [r b h w]."""
    unit, s = direction(g.permute(1, 2, 3, 0).reshape(-1, len(g)))
    return unit.contiguous(), output_scale(s, layernorm).contiguous()


def _sizes(g: Tensor, geometry: Geometry) -> tuple[int, ...]:
    (h, w), (ho, wo) = g.shape[2:], geometry.output(tuple(g.shape[2:]))
    steps = *geometry.stride, *geometry.padding, *geometry.dilation
    return h, w, ho, wo, *steps, geometry.kernel[1], *geometry.pool


def forward(
    features: PolynomialFeatures,
    g: Tensor,
    V: Tensor,
    geometry: Geometry,
    layernorm: bool = False,
    block_p: int = 64,
) -> Tensor:
    """The convolution of g [r b h w] with V [P kh kw o]: [o b h' w'] in float32."""
    unit, s = _positions(g, layernorm)
    (ho, wo), o = geometry.output(tuple(g.shape[2:])), V.shape[3]
    count = g.shape[1] * ho * wo
    out = torch.empty(count, o, device=g.device, dtype=torch.float32)
    block_n, block_o = block_sizes(count, o)
    if count:
        _forward[(triton.cdiv(count, block_n), triton.cdiv(o, block_o))](
            unit,
            s,
            V.contiguous(),
            out,
            count,
            o,
            features.P,
            features.r,
            *_sizes(g, geometry),
            *column_numbers(features),
            OFFSETS=geometry.offsets,
            PLACES=geometry.pool[0] * geometry.pool[1],
            BLOCK_N=block_n,
            BLOCK_P=block_p,
            BLOCK_O=block_o,
        )
    return out.view(-1, ho, wo, o).permute(3, 0, 1, 2)


def gradient(
    features: PolynomialFeatures,
    g: Tensor,
    V: Tensor,
    geometry: Geometry,
    grad: Tensor,
    layernorm: bool = False,
    block_p: int = 64,
) -> Tensor:
    """∂V [P kh kw o] in float32 for ∂out `grad` [o b h' w']. Deterministic: every entry is summed
    by one program."""
    unit, s = _positions(g, layernorm)
    flat = grad.permute(1, 2, 3, 0).reshape(-1, len(grad)).contiguous()
    count, o = flat.shape
    dV = torch.empty(V.shape, device=g.device, dtype=torch.float32)
    block_n, block_o = block_sizes(count, o)
    _gradient[(triton.cdiv(features.P, block_p), triton.cdiv(o, block_o), geometry.offsets)](
        unit,
        s,
        flat,
        dV,
        count,
        o,
        features.P,
        features.r,
        *_sizes(g, geometry),
        *column_numbers(features),
        OFFSETS=geometry.offsets,
        PLACES=geometry.pool[0] * geometry.pool[1],
        BLOCK_N=block_n,
        BLOCK_P=block_p,
        BLOCK_O=block_o,
    )
    return dV
