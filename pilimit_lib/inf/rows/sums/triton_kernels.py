"""The sums over rows of a π-layer as Triton kernels, shaped like flash attention: Q = ĝ, K = B, V =
A · Amult, k for softmax.

Each program takes one tile of the batch and one stretch of the rows, keeps its sums in registers
and writes one partial result; those are added in order afterwards, so results do not depend on
scheduling. Cosines exist tile by tile only. Rows lie in blocks, whose addresses come as a table;
offsets inside are 64 bits wide. With x = |c|,

    2π k(c) = J(x) + π max(c, 0) ,  J(x) = sqrt(1 - x²) - x acos(x) = (1 - x)^1.5 U(x) ;  acos(x) =
    sqrt(1 - x) P(x) ; sqrt(1 - x²) = sqrt(1 - x) S(x)

which takes one square root, has no cancellation and no branch. U, P and S are interpolated at the
nine Chebyshev points of [0, 1]: errors below 3e-10, 5e-9 and 5e-9 (refitted by a test). Not yet
measured on a GPU.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

PI = tl.constexpr(3.141592653589793)
U = (
    0.9999999997,
    -0.07079627863,
    0.01880419623,
    -0.007729034363,
    0.003909490657,
    -0.002098884451,
    0.00100198718,
    -0.0003385782616,
    5.61436905e-05,
)
P = (
    1.570796323,
    -0.2146011607,
    0.08903013694,
    -0.05059357388,
    0.03257117017,
    -0.02072766525,
    0.01102838067,
    -0.003974577704,
    0.0006845318166,
)
S = (
    1.000000004,
    0.4999992676,
    -0.1249799748,
    0.06228427306,
    -0.03786150625,
    0.02340367195,
    -0.01226585742,
    0.004385790411,
    -0.0007521091842,
)
_U, _P, _S = (tl.constexpr(series) for series in (U, P, S))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# rows of a tile, warps, stages
CONFIGS = [(32, 4, 2), (32, 8, 2), (64, 4, 2), (64, 8, 2), (64, 8, 3), (128, 8, 2)]


def _tuned(kernel):
    """Tile sizes are tried out once for each bucket of the number of rows, which itself changes
    with every step."""
    if INTERPRETED:
        return kernel
    configs = [
        triton.Config({"BLOCK_M": rows}, num_warps=warps, num_stages=stages)
        for rows, warps, stages in CONFIGS
    ]
    return triton.autotune(configs, key=["bucket", "r", "o", "BLOCK_B"])(kernel)


@triton.jit
def _series(x, C: tl.constexpr):
    value = tl.full(x.shape, C[8], tl.float32)
    for i in tl.static_range(8):
        value = value * x + C[7 - i]
    return value


@triton.jit
def _rows(table, start, block_rows, rows, columns, mask, width, TYPE: tl.constexpr):
    """A tile of rows [BLOCK_M, columns]; it lies within one block."""
    block = tl.load(table + start // block_rows).to(tl.pointer_type(TYPE))
    inside = (rows - (start // block_rows) * block_rows).to(tl.int64)
    return tl.load(
        block + inside[:, None] * width + columns[None, :],
        mask=mask[:, None] & (columns < width)[None, :],
        other=0.0,
    )


@triton.jit
def _dot(left, right, DOT: tl.constexpr):
    return tl.dot(left.to(DOT), right.to(DOT), input_precision="ieee")


@triton.jit
def _size(values, DOT: tl.constexpr):
    """By what each line of `values` is divided for a product: its largest number, since float16
    would lose small ones."""
    size = tl.full((values.shape[0], 1), 1.0, tl.float32)
    if DOT == tl.float16:
        largest = tl.max(tl.abs(values), 1)[:, None]
        size = tl.where(largest > 0, largest, size)
    return size


@triton.jit
def _cosines(
    u, B, u_sum, scale_ptr, shift_ptr, rows, mask, EIGHT_BITS: tl.constexpr, DOT: tl.constexpr
):
    q = _dot(u, tl.trans(B), DOT)
    if EIGHT_BITS:
        scale, shift = (
            tl.load(scale_ptr + rows, mask=mask, other=0.0),
            tl.load(shift_ptr + rows, mask=mask, other=0.0),
        )
        q = q * scale[None, :] + u_sum[:, None] * shift[None, :]
    return tl.where(q > 1.0, 1.0, tl.where(q < -1.0, -1.0, q))  # minimum and maximum would drop NaN


@_tuned
@triton.jit(do_not_specialize=["m", "per_split", "bucket"])
def forward_kernel(
    u_ptr,
    A_table,
    B_table,
    weight_ptr,
    offset_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    b,
    m,
    r,
    o,
    block_rows,
    per_split,
    bucket,
    TYPE: tl.constexpr,
    DOT: tl.constexpr,
    EIGHT_BITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    samples, split = (
        tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B),
        tl.program_id(1).to(tl.int64),
    )
    at_r, at_o = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_O)
    u = tl.load(
        u_ptr + samples[:, None].to(tl.int64) * r + at_r[None, :],
        mask=(samples < b)[:, None] & (at_r < r)[None, :],
        other=0.0,
    )
    u_sum = tl.sum(u, 1)
    total = tl.zeros((BLOCK_B, BLOCK_O), dtype=tl.float32)
    common = tl.zeros((BLOCK_B,), dtype=tl.float32)
    begin = split * per_split
    for start in range(begin, tl.minimum(begin + per_split, m), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = rows < m
        B = _rows(B_table, start, block_rows, rows, at_r, mask, r, TYPE)
        q = _cosines(u, B, u_sum, scale_ptr, shift_ptr, rows, mask, EIGHT_BITS, DOT)
        x = tl.abs(q)
        rest = 1.0 - x
        kernel = rest * tl.sqrt(rest) * _series(x, _U) + PI * tl.maximum(q, 0.0)
        if EIGHT_BITS:
            common += tl.sum(kernel * tl.load(offset_ptr + rows, mask=mask, other=0.0)[None, :], 1)
        weight = tl.load(weight_ptr + rows, mask=mask, other=0.0)
        A = _rows(A_table, start, block_rows, rows, at_o, mask, o, TYPE)
        weighted = kernel * weight[None, :]
        size = _size(weighted, DOT)
        total += _dot(weighted / size, A, DOT) * size
    at = (split * b + samples[:, None]) * o + at_o[None, :]
    tl.store(
        out_ptr + at, total + common[:, None], mask=(samples < b)[:, None] & (at_o < o)[None, :]
    )


@_tuned
@triton.jit(do_not_specialize=["m", "per_split", "bucket"])
def backward_kernel(
    u_ptr,
    grad_ptr,
    A_table,
    B_table,
    weight_ptr,
    offset_ptr,
    scale_ptr,
    shift_ptr,
    rows_ptr,
    unit_ptr,
    b,
    m,
    r,
    o,
    block_rows,
    per_split,
    bucket,
    TYPE: tl.constexpr,
    DOT: tl.constexpr,
    EIGHT_BITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    samples, split = (
        tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B),
        tl.program_id(1).to(tl.int64),
    )
    at_r, at_o = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_O)
    here = samples[:, None].to(tl.int64)
    u = tl.load(
        u_ptr + here * r + at_r[None, :],
        mask=(samples < b)[:, None] & (at_r < r)[None, :],
        other=0.0,
    )
    grad = tl.load(
        grad_ptr + here * o + at_o[None, :],
        mask=(samples < b)[:, None] & (at_o < o)[None, :],
        other=0.0,
    )
    u_sum, grad_sum, grad_size = tl.sum(u, 1), tl.sum(grad, 1), _size(grad, DOT)
    along_rows = tl.zeros((BLOCK_B, BLOCK_R), dtype=tl.float32)
    along_unit = tl.zeros((BLOCK_B,), dtype=tl.float32)
    common = tl.zeros((BLOCK_B,), dtype=tl.float32)
    begin = split * per_split
    for start in range(begin, tl.minimum(begin + per_split, m), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = rows < m
        B = _rows(B_table, start, block_rows, rows, at_r, mask, r, TYPE)
        q = _cosines(u, B, u_sum, scale_ptr, shift_ptr, rows, mask, EIGHT_BITS, DOT)
        A = _rows(A_table, start, block_rows, rows, at_o, mask, o, TYPE)
        dgamma = (
            _dot(grad / grad_size, tl.trans(A), DOT)
            * grad_size
            * tl.load(weight_ptr + rows, mask=mask, other=0.0)[None, :]
        )
        if EIGHT_BITS:
            dgamma += grad_sum[:, None] * tl.load(offset_ptr + rows, mask=mask, other=0.0)[None, :]
        x = tl.abs(q)
        root = tl.sqrt(1.0 - x)
        arc = root * _series(x, _P)
        along_unit += tl.sum(root * _series(x, _S) * dgamma, 1)
        slope = tl.where(q > 0, PI - arc, arc) * dgamma
        if EIGHT_BITS:
            common += tl.sum(slope * tl.load(shift_ptr + rows, mask=mask, other=0.0)[None, :], 1)
            slope = slope * tl.load(scale_ptr + rows, mask=mask, other=0.0)[None, :]
        size = _size(slope, DOT)
        along_rows += _dot(slope / size, B, DOT) * size
    at = (split * b + samples[:, None]) * r + at_r[None, :]
    tl.store(
        rows_ptr + at,
        along_rows + common[:, None],
        mask=(samples < b)[:, None] & (at_r < r)[None, :],
    )
    tl.store(unit_ptr + split * b + samples, along_unit, mask=samples < b)
