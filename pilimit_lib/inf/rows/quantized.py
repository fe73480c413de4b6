"""Rows in eight bits: whole numbers from -127 to 127 with a scale and a shift per row.

A row x [n] is stored as c = round((x - h) / σ), σ = (max x - min x) / 254, and read as σ c + h.
Rounding alone would change the *sum* of a row, which can matter more than its entries: gradients of
a softmax sum to zero over its outputs, and what their rounded sums are adds up over the rows to a
shift common to all outputs. So h is chosen last, such that the row keeps its sum; entries then err
by less than σ (by σ / √12, root mean square).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...core import Blocks, StoredRows, in_memory

LARGEST = 127


class Codes(NamedTuple):
    """Stored rows: codes [k *tail] int8, scale and shift [k] float32."""

    codes: Tensor
    scale: Tensor
    shift: Tensor


def quantize(rows: Tensor) -> Codes:
    """Rows [k n] in eight bits; see the head of this file. Rows with NaN or Inf stay so (by their
    scale)."""
    rows = rows.to(torch.float32)
    if not rows.numel():
        empty = rows.new_zeros(len(rows))
        return Codes(rows.to(torch.int8), empty, empty.clone())
    low, high = rows.aminmax(dim=1)
    middle, scale = (high + low) / 2, (high - low) / (2 * LARGEST)
    centred = rows - middle[:, None]
    codes = (
        torch.nan_to_num(centred / torch.where(scale > 0, scale, 1)[:, None])
        .round_()
        .clamp_(-LARGEST, LARGEST)
    )
    # In float64: the sum of a row of a few hundred entries has to come out to the last bit of
    # float32.
    shift = (
        rows.sum(1, dtype=torch.float64) - scale.double() * codes.sum(1, dtype=torch.float64)
    ) / rows.shape[1]
    return Codes(codes.to(torch.int8), scale, shift.to(torch.float32))


class QuantizedBlocks(Blocks):
    """Rows [m n] stored in eight bits and read as float32 (or float64); each row is rounded once,
    when it is appended."""

    def __init__(
        self,
        tail: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        **settings,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"rows of eight bits are read as float32 or float64, not as {dtype}")
        super().__init__(tail, dtype=dtype, device=device, **settings)

    @property
    def storage(self) -> torch.dtype:
        return torch.int8

    @property
    def nbytes(self) -> int:
        return len(self) * (self.tail[0] + 8)

    def state(self) -> dict[str, Tensor]:
        parts = list(self.parts())
        if not parts:
            return {
                "": self._like.to(torch.int8),
                "_scale": torch.zeros(0),
                "_shift": torch.zeros(0),
            }
        return {
            "": torch.cat([part.values for part in parts]),
            "_scale": torch.cat([part.scale for part in parts]),
            "_shift": torch.cat([part.shift for part in parts]),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Codes are taken as they are; a tensor of numbers is rounded to codes."""
        self.check(state[""])
        self._replace(self._like)
        self.extend(state)

    def extend(self, state: dict[str, Tensor]) -> None:
        if state[""].dtype != torch.int8:
            return self.append(state[""])
        self.check(state[""])
        start, count = len(self), len(state[""])
        self.append(torch.zeros(count, *self.tail))
        codes = Codes(*(state[name].detach() for name in ("", "_scale", "_shift")))
        for number, here in self._by_block(torch.arange(start, start + count)):
            rows = torch.arange(start, start + count)[here] - number * self.block_rows
            self._fill(
                number,
                slice(int(rows[0]), int(rows[-1]) + 1),
                Codes(*(tensor[here] for tensor in codes)),
            )

    def scale_(self, factor: float) -> None:
        for block in self._blocks:
            block.scale.mul_(factor)
            block.shift.mul_(factor)
        self.edits += 1

    def convert(self, fn: Callable[[Tensor], Tensor], keep_dtype: bool = False) -> None:
        """Codes stay codes; their device, and the precision in which they are read if that is
        float32 or more, may change."""
        like = fn(self._like) if self.allocate is in_memory else fn(self._like).to(self.device)
        self._like = like if like.dtype in (torch.float32, torch.float64) else like.float()
        for number, block in enumerate(self._blocks):
            self._blocks[number] = Codes(
                *(self._settled(tensor.to(self._like.device), tensor) for tensor in block)
            )
        self.edits += 1

    def _new_block(self) -> Codes:
        device = self._like.device
        return Codes(
            self.allocate((self.block_rows, *self.tail), torch.int8, device),
            *(self.allocate((self.block_rows,), torch.float32, device) for _ in range(2)),
        )

    def _store(self, number: int, where: int | Tensor, values: Tensor) -> None:
        codes = quantize(values.to(self._like.device))
        self._fill(
            number, where if isinstance(where, Tensor) else slice(where, where + len(values)), codes
        )

    def _fill(self, number: int, where: slice | Tensor, codes: Codes) -> None:
        for stored, fresh in zip(self._blocks[number], codes):
            stored[where] = fresh.to(stored)

    def _part(self, number: int, stop: int) -> StoredRows:
        return StoredRows(*(tensor[:stop] for tensor in self._blocks[number]))

    def _apply_factor(self, number: int) -> None:
        """Factors are in the scales already."""

    def _copied(self, block: Codes) -> Codes:
        return Codes(*(super(QuantizedBlocks, self)._copied(tensor) for tensor in block))


def codes_to_rows(state: dict[str, Tensor]) -> Tensor:
    """The rows that the `state` of blocks stands for, whether it holds numbers or codes."""
    value = state[""].detach()
    return (
        value
        if value.dtype != torch.int8
        else StoredRows(value, state["_scale"], state["_shift"]).dense(torch.float32)
    )
