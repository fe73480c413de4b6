"""The sums of `plain` in Triton: when they can run, and the calls of the kernels. Not yet measured
on a GPU.

Products are made in the dtype of the rows (float16 for rows in eight bits, whose codes it holds
exactly; float32 for float32) and summed in float32, partial sums in float64. What float16 rows are
multiplied with is divided by its largest number first, tile by tile and sample by sample, so that
neither small gradients nor small multipliers vanish. No array of cosines exists. Rows in bfloat16
are multiplied in float32 under Triton's interpreter, whose product of bfloat16 is wrong.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ...dual.relu import TWO_PI
from ..layer import RowLayer

LARGEST_RANK = 512
LARGEST_TILE = 128  # rows; blocks hold a whole number of tiles
# enough to fill a large GPU several times; also bounds the memory of partial sums
PROGRAMS = 512
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


def refuses(layer: RowLayer, unit: Tensor) -> str | None:
    """Why this implementation can't run, or None."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    A, B = layer.A.blocks, layer.B.blocks
    if not (unit.is_cuda or interpreted):
        return f"pre-activations are on {unit.device}; it runs on CUDA"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if A.device != unit.device:
        return f"rows lie on {A.device}, pre-activations on {unit.device}"
    if A.storage not in DTYPES or unit.dtype != torch.float32:
        return (
            f"rows in {A.storage}, sums in {unit.dtype}; it sums float32, float16, bfloat16 or "
            "int8 rows in float32"
        )
    if max(layer.r, layer.r_out) > LARGEST_RANK:
        return f"ranks {layer.r} and {layer.r_out}; at most {LARGEST_RANK} fit into one tile"
    if A.block_rows % LARGEST_TILE or A.block_rows != B.block_rows:
        return f"blocks of {A.block_rows} rows; a multiple of {LARGEST_TILE} was expected"
    return None


@dataclass
class _Operands:
    """The rows as the kernels take them; vectors are [m]."""

    A_table: Tensor  # addresses of blocks
    B_table: Tensor
    weight: Tensor  # Amult / 2π, times the scale of A
    offset: Tensor  # Amult / 2π, times the shift of A
    scale: Tensor  # of B
    shift: Tensor
    keep: list  # what the addresses point to

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        return self.A_table, self.B_table, self.weight, self.offset, self.scale, self.shift


def _operands(layer: RowLayer, rows: int, like: Tensor) -> _Operands:
    A, Amult, B = (list(parts) for parts in zip(*layer.parts(rows)))
    tables = [
        torch.tensor(
            [part.values.data_ptr() for part in parts], dtype=torch.int64, device=like.device
        )
        for parts in (A, B)
    ]
    weight = torch.cat([part.dense(like.dtype) for part in Amult]) / TWO_PI
    if any(part.shift is not None for part in A):
        scale_A, shift_A, scale_B, shift_B = (
            torch.cat([getattr(part, name) for part in parts]).to(like)
            for parts in (A, B)
            for name in ("scale", "shift")
        )
        return _Operands(*tables, weight * scale_A, weight * shift_A, scale_B, shift_B, [A, B])
    for parts in (A, B):
        if any(part.scale != 1 for part in parts):
            raise RuntimeError(
                "A or B of a π-layer was scaled lazily, which only Amult is; write the rows instead"
            )
    return _Operands(*tables, weight, weight, weight, weight, [A, B])


def _settings(layer: RowLayer, rows: int, unit: Tensor) -> tuple[tuple[int, int], dict]:
    """((tiles of the batch, stretches of rows), arguments that both kernels share)."""
    import triton
    import triton.language as tl

    from .triton_kernels import INTERPRETED

    storage = layer.A.blocks.storage
    kinds = {
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
        torch.int8: tl.int8,
    }
    products = (
        kinds | {torch.int8: tl.float16} | ({torch.bfloat16: tl.float32} if INTERPRETED else {})
    )
    block_r, block_o = (max(16, triton.next_power_of_2(size)) for size in (layer.r, layer.r_out))
    block_b = max(
        16, min(64, (1 << 14) // max(block_r, block_o), triton.next_power_of_2(max(1, len(unit))))
    )
    tiles = triton.cdiv(len(unit), block_b)
    wanted = max(1, PROGRAMS // tiles)
    per_split = triton.cdiv(triton.cdiv(rows, wanted), LARGEST_TILE) * LARGEST_TILE
    common = {
        "b": len(unit),
        "m": rows,
        "r": layer.r,
        "o": layer.r_out,
        "block_rows": layer.A.blocks.block_rows,
        "per_split": per_split,
        "bucket": triton.next_power_of_2(rows),
        "TYPE": kinds[storage],
        "DOT": products[storage],
        "EIGHT_BITS": storage == torch.int8,
        "BLOCK_B": block_b,
        "BLOCK_R": block_r,
        "BLOCK_O": block_o,
    }
    if INTERPRETED:
        common["BLOCK_M"] = 64
    return (tiles, triton.cdiv(rows, per_split)), common


def forward(layer: RowLayer, rows: int, unit: Tensor, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Σ_m Amult_m A_m k(⟨B_m, ĝ⟩) for directions `unit` [b r]: [b o]; cosines are never saved."""
    if not rows or not len(unit):
        return unit.new_zeros(len(unit), layer.r_out), []
    from .triton_kernels import forward_kernel

    unit, given = unit.contiguous(), _operands(layer, rows, unit)
    grid, common = _settings(layer, rows, unit)
    partial = unit.new_empty(grid[1], len(unit), layer.r_out)
    forward_kernel[grid](unit, *given.pointers, partial, **common)
    return partial.sum(0, dtype=torch.float64).to(unit.dtype), []


def backward(
    layer: RowLayer, rows: int, grad: Tensor, unit: Tensor, saved: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """For ∂out `grad` [b o]: Σ_m dγ k'(q) B [b r] and Σ_m dγ (k - q k')(q) [b 1]."""
    if not rows or not len(unit):
        return torch.zeros_like(unit), unit.new_zeros(len(unit), 1)
    from .triton_kernels import backward_kernel

    unit, grad, given = unit.contiguous(), grad.contiguous(), _operands(layer, rows, unit)
    grid, common = _settings(layer, rows, unit)
    along_rows, along_unit = (
        unit.new_empty(grid[1], *unit.shape),
        unit.new_empty(grid[1], len(unit)),
    )
    backward_kernel[grid](unit, grad, *given.pointers, along_rows, along_unit, **common)
    return tuple(
        part.sum(0, dtype=torch.float64).to(unit.dtype)
        for part in (along_rows, along_unit[..., None])
    )
