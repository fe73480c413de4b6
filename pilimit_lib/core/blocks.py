"""Tensors that only ever get longer: rows in blocks of fixed size.

Appending to one contiguous tensor copies it, and doubling its capacity needs three times its memory for a moment.
Blocks do neither: old rows stay where they are, and at most one block is partly empty.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BLOCK_ROWS = 4096  # large enough for matrix products at full rate, small enough that a block of [b, rows] stays in cache


class Blocks:
    """A tensor of shape [m, *tail] kept as a list of blocks of `block_rows` rows each.

    `edits` counts the changes of rows that already existed (scaling, writing, removal); appending does not count. Who keeps
    a row number across time (a backward pass, say) compares it, as autograd does with a tensor's version.
    """

    def __init__(self, tail: tuple[int, ...] = (), *, dtype: torch.dtype | None = None,
                 device: torch.device | str | None = None, block_rows: int = BLOCK_ROWS) -> None:
        if block_rows < 1:
            raise ValueError(f"block_rows is {block_rows}; a block needs at least one row")
        self.tail = tuple(tail)
        self.block_rows = block_rows
        self.edits = 0
        self._blocks: list[Tensor] = []
        self._like = torch.empty((0, *self.tail), dtype=dtype or torch.get_default_dtype(), device=device)
        self._rows = 0

    @classmethod
    def of(cls, values: Tensor, *, block_rows: int = BLOCK_ROWS) -> Blocks:
        """Blocks that hold a copy of `values` [m, *tail]."""
        blocks = cls(tuple(values.shape[1:]), dtype=values.dtype, device=values.device, block_rows=block_rows)
        blocks.append(values)
        return blocks

    def __len__(self) -> int:
        return self._rows

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self._rows, *self.tail))

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    def like(self) -> Tensor:
        """A new tensor of the same kind without rows: [0, *tail]."""
        return torch.empty_like(self._like)

    def views(self, rows: int | None = None) -> Iterator[Tensor]:
        """The first `rows` rows (default: all) as views [<= block_rows, *tail], in order, without copying."""
        left = self._rows if rows is None else rows
        for block in self._blocks:
            if left <= 0:
                return
            yield block[:left] if left < self.block_rows else block
            left -= self.block_rows

    def dense(self) -> Tensor:
        """All rows as one new tensor [m, *tail]."""
        return torch.cat(list(self.views())) if self._rows else self._like.clone()

    def check(self, values: Tensor, what: str = "values") -> None:
        """Raise unless `values` [k, *tail] could be appended."""
        if values.ndim != 1 + len(self.tail) or tuple(values.shape[1:]) != self.tail:
            expected = ", ".join(["k", *map(str, self.tail)])
            raise ValueError(f"{what} has shape {list(values.shape)}; rows of shape [{expected}] were expected")

    def append(self, values: Tensor) -> None:
        """Add rows `values` [k, *tail]; they are copied off the tape, and converted to the dtype and device of the blocks."""
        self.check(values)
        values = values.detach()
        start, count = 0, values.shape[0]
        while start < count:
            used = self._rows % self.block_rows
            if used == 0 and self._rows == len(self._blocks) * self.block_rows:
                self._blocks.append(self._like.new_empty((self.block_rows, *self.tail)))
            take = min(self.block_rows - used, count - start)
            self._blocks[-1][used:used + take].copy_(values[start:start + take])
            self._rows += take
            start += take

    def truncate(self, rows: int) -> None:
        """Forget all but the first `rows` rows."""
        if not 0 <= rows <= self._rows:
            raise ValueError(f"cannot keep the first {rows} rows of {self._rows}")
        self._rows = rows
        del self._blocks[-(-rows // self.block_rows):]
        self.edits += 1

    def keep(self, index: Tensor) -> None:
        """Keep the rows `index` [k] (positions, in the order given)."""
        self._replace(self.select(index))

    def select(self, index: Tensor) -> Tensor:
        """The rows `index` [k] as one new tensor [k, *tail]."""
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self._rows:
            raise IndexError(f"positions from {int(index.min())} to {int(index.max())} in blocks of {self._rows} rows")
        result = self._like.new_empty((len(index), *self.tail))
        for number, block in enumerate(self.views()):
            here = (index // self.block_rows == number).nonzero().squeeze(1)
            result[here] = block[index[here] - number * self.block_rows]
        return result

    def write(self, values: Tensor) -> None:
        """Overwrite all rows with `values` [m, *tail] of the same length."""
        values = self._for_all_rows(values)
        start = 0
        for block in self.views():
            block.copy_(values[start:start + len(block)])
            start += len(block)
        self.edits += 1

    def set(self, values: Tensor) -> None:
        """Hold exactly `values` [k, *tail], whatever was here before."""
        self.check(values)
        self._replace(values)

    def scale_(self, factor: float) -> None:
        """Multiply every row by `factor` in place."""
        if factor != 1:
            for block in self.views():
                block.mul_(factor)
            self.edits += 1

    def add_(self, values: Tensor, alpha: float = 1.0) -> None:
        """Add alpha * `values` [m, *tail] in place."""
        values = self._for_all_rows(values)
        start = 0
        for block in self.views():
            block.add_(values[start:start + len(block)], alpha=alpha)
            start += len(block)
        self.edits += 1

    def convert(self, fn: Callable[[Tensor], Tensor], keep_dtype: bool = False) -> None:
        """Apply a conversion of dtype or device (as `nn.Module._apply` passes it) block by block."""
        dtype = self.dtype

        def one(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved.to(dtype) if keep_dtype else moved

        self._like = one(self._like)
        for number, block in enumerate(self._blocks):
            self._blocks[number] = one(block)
        self.edits += 1

    def _for_all_rows(self, values: Tensor) -> Tensor:
        if tuple(values.shape) != tuple(self.shape):
            raise ValueError(f"got values of shape {list(values.shape)} for rows of shape {list(self.shape)}")
        return values.detach()

    def _replace(self, values: Tensor) -> None:
        self._blocks, self._rows = [], 0
        self.append(values)
        self.edits += 1

    def __deepcopy__(self, memo: dict) -> Blocks:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin._blocks = [block.clone() for block in self._blocks]
        return twin

    def __repr__(self) -> str:
        return f"Blocks({list(self.shape)}, {self.dtype}, {len(self._blocks)} x {self.block_rows} rows)"
