"""The sums of `plain` in C++ compiled on the machine where they run, for rows on a CPU.

It is asked for by `implementation(rows="native")`, needs a C++ compiler (GCC 12 or Clang, as `c++`
or what CXX says), and refuses where there is none. The first use compiles `native.cpp` in some
seconds into the user's cache folder; later ones load that. Rows in two or one byte are widened in
registers or in the first level of cache, which no sequence of torch operations does.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ....core import StoredRows
from ...dual.relu import TWO_PI
from ...extension import FLAGS, library
from ..layer import RowLayer

SOURCE = Path(__file__).with_name("native.cpp")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


def refuses(layer: RowLayer, unit: Tensor) -> str | None:
    """Why this implementation can't run, or None."""
    storage = layer.A.blocks.storage
    if unit.device.type != "cpu" or layer.A.blocks.device.type != "cpu":
        return (
            f"rows lie on {layer.A.blocks.device}, pre-activations on {unit.device}; it runs on "
            "the CPU"
        )
    if storage not in KINDS or unit.dtype != torch.float32:
        return (
            f"rows in {storage}, sums in {unit.dtype}; it sums float32, float16, bfloat16 or int8 "
            "rows in float32"
        )
    return unavailable()


def unavailable() -> str | None:
    """Why this machine can't run it, or None; built where that was not done before."""
    found = _library()
    return found if isinstance(found, str) else None


@cache
def _library() -> ctypes.CDLL | str:
    return library(SOURCE, FLAGS)


class _Tiles:
    """Samples side by side: [b n] as [tiles n W], with W = 16 or 32, and sums over n [tiles W].

    Up to 8 samples stay [8 n], with n padded by zeros to a multiple of 16.
    """

    def __init__(self, b: int) -> None:
        self.b = b
        self.W = next((width for width in (8, 16) if b <= width), 32)
        self.tiles = -(-b // self.W)

    def lay(self, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.W == 8:
            padded = values.new_zeros(8, -(-values.shape[1] // 16) * 16)
            padded[: self.b, : values.shape[1]] = values
            return padded, padded.sum(1)
        padded = values.new_zeros(self.tiles * self.W, values.shape[1])
        padded[: self.b] = values
        return padded.view(self.tiles, self.W, -1).transpose(1, 2).contiguous(), padded.sum(1)

    def totals(self, width: int, singles: int) -> list[Tensor]:
        """Zeros for sums [b width] in this layout, and as many sums [b 1]."""
        shapes = [(8, -(-width // 16) * 16)] if self.W == 8 else [(self.tiles, width, self.W)]
        shapes += [(8, 1) if self.W == 8 else (self.tiles, 1, self.W)] * singles
        return [torch.zeros(shape, dtype=torch.float64) for shape in shapes]

    def read(self, total: Tensor, width: int) -> Tensor:
        """Sums [b width] out of this layout."""
        if self.W == 8:
            return total[: self.b, :width]
        return total.transpose(1, 2).reshape(self.tiles * self.W, -1)[: self.b]


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _run(
    name: str,
    layer: RowLayer,
    rows: int,
    tiles: _Tiles,
    given: list[Tensor],
    width: int,
    singles: int,
) -> list[Tensor]:
    """Call a function for every block, a stretch of blocks per thread; the sums of the threads are
    added in order."""
    function, kind = getattr(_library(), name), KINDS[layer.A.blocks.storage]

    def stretch(parts: list[tuple[StoredRows, StoredRows, StoredRows]]) -> list[Tensor]:
        totals = tiles.totals(width, singles)
        for A, Amult, B in parts:
            weight, offset, scale, shift = Amult.dense(torch.float32) / TWO_PI, None, None, None
            if A.shift is not None:
                weight, offset, scale, shift = weight * A.scale, weight * A.shift, B.scale, B.shift
            elif A.scale != 1 or B.scale != 1:
                raise RuntimeError(
                    "A or B of a π-layer was scaled lazily, which only Amult is; write the rows "
                    "instead"
                )
            sizes = layer.r, layer.r_out, tiles.tiles, tiles.W
            function(
                ctypes.c_int(kind),
                ctypes.c_long(len(weight)),
                *map(ctypes.c_int, sizes),
                *map(_pointer, (A.values, B.values, weight, offset, scale, shift, *given, *totals)),
            )
        return totals

    blocks = list(layer.parts(rows))
    threads = max(1, min(torch.get_num_threads(), len(blocks)))
    if threads == 1:
        return stretch(blocks)
    per = -(-len(blocks) // threads)
    with ThreadPoolExecutor(threads) as pool:
        found = list(
            pool.map(stretch, [blocks[start : start + per] for start in range(0, len(blocks), per)])
        )
    return [sum(totals[1:], start=totals[0]) for totals in zip(*found)]


def forward(layer: RowLayer, rows: int, unit: Tensor, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Σ_m Amult_m A_m k(⟨B_m, ĝ⟩) for directions `unit` [b r]: [b o]; cosines are recomputed, never
    saved."""
    tiles = _Tiles(len(unit))
    total, common = _run("pi_rows_forward", layer, rows, tiles, [*tiles.lay(unit)], layer.r_out, 1)
    return tiles.read(total + common, layer.r_out).to(unit.dtype), []


def backward(
    layer: RowLayer, rows: int, grad: Tensor, unit: Tensor, saved: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """For ∂out `grad` [b o]: Σ_m dγ k'(q) B [b r] and Σ_m dγ (k - q k')(q) [b 1]."""
    tiles = _Tiles(len(unit))
    given = [*tiles.lay(unit), *tiles.lay(grad)]
    total, common, along_unit = _run("pi_rows_backward", layer, rows, tiles, given, layer.r, 2)
    return tiles.read(total + common, layer.r).to(unit.dtype), tiles.read(along_unit, 1).to(
        unit.dtype
    )
