"""The sums of `plain` shaped for a CPU's caches, still in plain torch.

What a step must do is read A and B once forward and once backward; so that little else is done,

* cosines are laid out [m b], which makes every matrix product one of the stored rows as they lie,
  none transposed,
* a chunk of rows small enough to stay in cache goes through all operations, in place, before the
  next one is read,
* rows of low precision are converted chunk by chunk into one buffer; scales and shifts of rows in
  eight bits, the lazy factor of Amult and the 1/2π of the kernel meet in one coefficient per row,
* sums have two levels: float32 within a chunk, float64 over chunks, so that rounding does not grow
  with the number of rows.

Rows may lie on another device than the pre-activations; they are then copied chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ....core import StoredRows
from ...dual.relu import TWO_PI, relu_k_parts
from ..layer import RowLayer

# cosines of one chunk: 1 MB, several of which fit into the second level of cache or close to it
CHUNK_ELEMENTS = 1 << 18
MIN_CHUNK = 256  # fewer rows make matrix products slow
CHUNK_OF_ONE = 1024  # rows of a matrix-vector product, which adds them one after the other


def refuses(layer: RowLayer, unit: Tensor) -> str | None:
    """Why this implementation can't run: it always can."""
    return None


@dataclass
class _Chunk:
    """Rows as matrices in the accumulating precision, A [k o] and B [k r], still without scale and
    shift."""

    A: Tensor
    B: Tensor
    amult: Tensor  # Amult / 2π [k]
    scale_A: Tensor | None  # [k]
    shift_A: Tensor | None
    scale_B: Tensor | float
    shift_B: Tensor | None


class _Reader:
    """Reads rows chunk by chunk into buffers that are used again."""

    def __init__(self, layer: RowLayer, unit: Tensor) -> None:
        self.layer, self.like = layer, unit
        rows = layer.A.blocks.block_rows
        elements = CHUNK_ELEMENTS if len(unit) != 1 else CHUNK_OF_ONE
        # Launches are what small chunks cost on a GPU, where there is no cache of this size to stay
        # in.
        self.size = (
            rows
            if unit.device.type != "cpu"
            else max(MIN_CHUNK, min(rows, elements // max(1, len(unit))))
        )
        self.buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, rows: int, columns: int) -> Tensor:
        """The first `rows` rows of a buffer [size columns]."""
        if name not in self.buffers:
            self.buffers[name] = self.like.new_empty(min(self.size, max(rows, 1)), columns)
        elif len(self.buffers[name]) < rows:
            self.buffers[name] = self.like.new_empty(self.size, columns)
        return self.buffers[name][:rows]

    def chunks(self, rows: int) -> Iterator[_Chunk]:
        layer = self.layer
        for A, Amult, B in layer.parts(rows):
            amult = Amult.dense(self.like.dtype).to(self.like.device) / TWO_PI
            for start in range(0, len(amult), self.size):
                stop = start + self.size
                (A_values, scale_A, shift_A), (B_values, scale_B, shift_B) = (
                    self._cut(part, start, stop) for part in (A, B)
                )
                if isinstance(scale_A, float):
                    scale_A = (
                        None if scale_A == 1 else self.like.new_full((len(A_values),), scale_A)
                    )
                yield _Chunk(
                    self._matrix("A", A_values),
                    self._matrix("B", B_values),
                    amult[start:stop],
                    scale_A,
                    shift_A,
                    scale_B,
                    shift_B,
                )

    def _cut(
        self, part: StoredRows, start: int, stop: int
    ) -> tuple[Tensor, Tensor | float, Tensor | None]:
        scale, shift = (
            entry[start:stop].to(self.like) if isinstance(entry, Tensor) else entry
            for entry in (part.scale, part.shift)
        )
        return part.values[start:stop], scale, shift

    def _matrix(self, name: str, values: Tensor) -> Tensor:
        if values.dtype == self.like.dtype and values.device == self.like.device:
            return values
        return self.buffer(name, *values.shape).copy_(values, non_blocking=True)

    def cosines(self, chunk: _Chunk, unit_T: Tensor, total: Tensor, out: Tensor) -> Tensor:
        """q = B ĝᵀ [k b] into `out`, for ĝᵀ [r b] and the sums of ĝ over r [b]."""
        torch.mm(chunk.B, unit_T, out=out)
        if isinstance(chunk.scale_B, Tensor):
            out.mul_(chunk.scale_B[:, None])
        elif chunk.scale_B != 1:
            out.mul_(chunk.scale_B)
        if chunk.shift_B is not None:
            out.addr_(chunk.shift_B, total)
        return out.clamp_(-1, 1)


def forward(layer: RowLayer, rows: int, unit: Tensor, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Σ_m Amult_m A_m k(⟨B_m, ĝ⟩) for directions `unit` [b r]: [b o], and the cosines of each chunk
    where `save`."""
    b, reader = len(unit), _Reader(layer, unit)
    total = unit.new_zeros(b, layer.r_out, dtype=torch.float64)
    part, unit_T, unit_sum = unit.new_empty(b, layer.r_out), unit.T.contiguous(), unit.sum(1)
    saved = []
    for chunk in reader.chunks(rows):
        k = len(chunk.B)
        q = reader.cosines(
            chunk, unit_T, unit_sum, unit.new_empty(k, b) if save else reader.buffer("q", k, b)
        )
        angle, root = relu_k_parts(q, reader.buffer("angle", k, b), reader.buffer("root", k, b))
        kernel = root.addcmul_(q, angle)
        if chunk.shift_A is not None:
            total += (kernel.T @ (chunk.amult * chunk.shift_A))[:, None]
        kernel.mul_(
            (chunk.amult if chunk.scale_A is None else chunk.amult * chunk.scale_A)[:, None]
        )
        total += torch.mm(kernel.T, chunk.A, out=part)
        if save:
            saved.append(q)
    return total.to(unit.dtype), saved


def backward(
    layer: RowLayer, rows: int, grad: Tensor, unit: Tensor, saved: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """For ∂out `grad` [b o]: Σ_m dγ k'(q) B [b r] and Σ_m dγ (k - q k')(q) [b 1]; cosines are
    recomputed where not saved."""
    b, reader = len(unit), _Reader(layer, unit)
    along_rows = unit.new_zeros(b, layer.r, dtype=torch.float64)
    along_unit = unit.new_zeros(b, dtype=torch.float64)
    part, unit_T, grad_T = torch.empty_like(unit), unit.T.contiguous(), grad.T.contiguous()
    unit_sum, grad_sum = unit.sum(1), grad.sum(1)
    for number, chunk in enumerate(reader.chunks(rows)):
        k = len(chunk.B)
        q = (
            saved[number]
            if saved
            else reader.cosines(chunk, unit_T, unit_sum, reader.buffer("q", k, b))
        )
        dgamma = torch.mm(chunk.A, grad_T, out=reader.buffer("dgamma", k, b))
        dgamma.mul_(
            (chunk.amult if chunk.scale_A is None else chunk.amult * chunk.scale_A)[:, None]
        )
        if chunk.shift_A is not None:
            dgamma.addr_(chunk.amult * chunk.shift_A, grad_sum)
        angle, root = relu_k_parts(q, reader.buffer("angle", k, b), reader.buffer("root", k, b))
        along_unit += root.mul_(dgamma).sum(0)
        weights = angle.mul_(dgamma)
        if chunk.shift_B is not None:
            along_rows += (weights.T @ chunk.shift_B)[:, None]
        if isinstance(chunk.scale_B, Tensor):
            weights.mul_(chunk.scale_B[:, None])
        elif chunk.scale_B != 1:
            weights.mul_(chunk.scale_B)
        along_rows += torch.mm(weights.T, chunk.B, out=part)
    return along_rows.to(unit.dtype), along_unit[:, None].to(unit.dtype)
