"""Tensors that only ever get longer: rows in blocks of fixed size.

Appending to one contiguous tensor copies it, and doubling its capacity needs three times its memory
for a moment.
Blocks do neither: old rows stay where they are, and at most one block is partly empty.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .part import Allocate, StoredRows, in_memory

# large enough for matrix products at full rate, small enough that a block of [b, rows] stays in
# cache
BLOCK_ROWS = 4096
SMALLEST = 2.0**-40  # a factor below this is multiplied in, long before it could underflow


class Blocks:
    """A tensor of shape [m, *tail] kept as a list of blocks of `block_rows` rows each.

    `edits` counts the changes of rows that already existed (scaling, writing, removal); appending
    does not count. Who keeps a row number across time (a backward pass, say) compares it, as
    autograd does with a tensor's version.

    Scaling all rows is lazy: each block remembers a factor, which readers apply. `state` and
    `load_state` keep the factors apart, so that what is loaded goes on rounding as what was saved
    would have.

    Args:
        allocate: gives the memory of a new block; see `in_memory`.
    """

    def __init__(
        self,
        tail: tuple[int, ...] = (),
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        block_rows: int = BLOCK_ROWS,
        allocate: Allocate = in_memory,
    ) -> None:
        if block_rows < 1:
            raise ValueError(f"block_rows is {block_rows}; a block needs at least one row")
        self.tail = tuple(tail)
        self.block_rows = block_rows
        self.edits = 0
        self.allocate = allocate
        self._blocks: list[Any] = []
        self._factors: list[float] = []
        self._like = torch.empty(
            (0, *self.tail), dtype=dtype or torch.get_default_dtype(), device=device
        )
        self._rows = 0

    @classmethod
    def of(cls, values: Tensor, *, block_rows: int = BLOCK_ROWS) -> Blocks:
        """Blocks that hold a copy of `values` [m, *tail]."""
        blocks = cls(
            tuple(values.shape[1:]), dtype=values.dtype, device=values.device, block_rows=block_rows
        )
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

    @property
    def storage(self) -> torch.dtype:
        """The dtype in which rows are stored; `dtype` is the one in which they are read."""
        return self.dtype

    @property
    def nbytes(self) -> int:
        """Memory of the rows that are there."""
        return self._rows * math.prod(self.tail) * self._like.element_size()

    def parts(self, rows: int | None = None) -> Iterator[StoredRows]:
        """The first `rows` rows (default: all) as they are stored, block by block, in order,
        without copying."""
        left = self._rows if rows is None else rows
        for number in range(len(self._blocks)):
            if left <= 0:
                return
            yield self._part(number, min(left, self.block_rows))
            left -= self.block_rows

    def views(self, rows: int | None = None) -> Iterator[Tensor]:
        """The first `rows` rows (default: all) [<= block_rows, *tail], in order; views, except of
        blocks that were scaled.

        Only to be read: `put` and `write` change rows.
        """
        for part in self.parts(rows):
            yield part.dense(self.dtype)

    def dense(self) -> Tensor:
        """All rows as one new tensor [m, *tail]."""
        return torch.cat(list(self.views())) if self._rows else self._like.clone()

    def state(self) -> dict[str, Tensor]:
        """Copies of what `load_state` needs to make the same blocks: "" is `dense()`, or the stored
        values where they differ."""
        if all(factor == 1 for factor in self._factors):
            return {"": self.dense()}
        raw = torch.cat([self._blocks[n][: self._used(n)] for n in range(len(self._blocks))])
        return {
            "": self.dense(),
            "_raw": raw,
            "_factors": torch.tensor(self._factors, dtype=torch.float64),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Hold what `state` says. Stored values that are not those of the dense tensor (it was
        edited) are passed over."""
        self.set(state[""].detach())
        raw, factors = state.get("_raw"), state.get("_factors")
        if (
            raw is None
            or factors is None
            or raw.shape != state[""].shape
            or len(factors) != len(self._blocks)
        ):
            return
        dense = [block.clone() for block in self.views()]
        self.set(raw.detach())
        self._factors = factors.tolist()
        if not all(torch.equal(*pair) for pair in zip(self.views(), dense)):
            self.set(state[""].detach())

    def extend(self, state: dict[str, Tensor]) -> None:
        """Append rows given as `state` gives them, without factors."""
        self.append(state[""])

    def check(self, values: Tensor, what: str = "values") -> None:
        """Raise unless `values` [k, *tail] could be appended."""
        if values.ndim != 1 + len(self.tail) or tuple(values.shape[1:]) != self.tail:
            expected = ", ".join(["k", *map(str, self.tail)])
            raise ValueError(
                f"{what} has shape {list(values.shape)}; rows of shape [{expected}] were expected"
            )

    def append(self, values: Tensor) -> None:
        """Add rows `values` [k, *tail]; they are copied off the tape, and converted to the dtype
        and device of the blocks."""
        self.check(values)
        values = values.detach()
        start, count = 0, values.shape[0]
        while start < count:
            used = self._rows % self.block_rows
            if used == 0 and self._rows == len(self._blocks) * self.block_rows:
                self._blocks.append(self._new_block())
                self._factors.append(1.0)
            take = min(self.block_rows - used, count - start)
            self._apply_factor(len(self._blocks) - 1)
            self._store(len(self._blocks) - 1, used, values[start : start + take])
            self._rows += take
            start += take

    def truncate(self, rows: int) -> None:
        """Forget all but the first `rows` rows."""
        if not 0 <= rows <= self._rows:
            raise ValueError(f"cannot keep the first {rows} rows of {self._rows}")
        self._rows = rows
        held = -(-rows // self.block_rows)
        del self._blocks[held:], self._factors[held:]
        self.edits += 1

    def keep(self, index: Tensor) -> None:
        """Keep the rows `index` [k] (positions, in the order given)."""
        self._replace(self.select(index))

    def select(self, index: Tensor) -> Tensor:
        """The rows `index` [k] as one new tensor [k, *tail]."""
        result = self._like.new_empty((len(index), *self.tail))
        for number, here in self._by_block(index):
            result[here] = self._part(number, self._used(number)).dense(self.dtype)[
                index[here] - number * self.block_rows
            ]
        return result

    def put(self, position: Tensor, values: Tensor) -> None:
        """Overwrite the rows `position` [k] with `values` [k, *tail]."""
        self.check(values)
        if len(values) != len(position):
            raise ValueError(f"{len(values)} rows for {len(position)} positions")
        for number, here in self._by_block(position):
            self._apply_factor(number)
            self._store(number, position[here] - number * self.block_rows, values[here].detach())
        self.edits += 1

    def write(self, values: Tensor) -> None:
        """Overwrite all rows with `values` [m, *tail] of the same length."""
        values = self._for_all_rows(values)
        self._factors = [1.0] * len(self._blocks)
        for number, part in enumerate(values.split(self.block_rows) if len(values) else ()):
            self._store(number, 0, part)
        self.edits += 1

    def set(self, values: Tensor) -> None:
        """Hold exactly `values` [k, *tail], whatever was here before."""
        self.check(values)
        self._replace(values)

    def scale_(self, factor: float) -> None:
        """Multiply every row by `factor`: lazily, without touching them."""
        if factor != 1:
            for number, old in enumerate(self._factors):
                self._factors[number] = old * factor
                if not abs(self._factors[number]) >= SMALLEST:
                    self._apply_factor(number)
            self.edits += 1

    def add_(self, values: Tensor, alpha: float = 1.0) -> None:
        """Add alpha * `values` [m, *tail] in place."""
        values = self._for_all_rows(values)
        for number, part in enumerate(values.split(self.block_rows) if len(values) else ()):
            self._apply_factor(number)
            self._store(
                number,
                0,
                self._part(number, len(part))
                .dense(self.dtype)
                .add(part.to(self._like), alpha=alpha),
            )
        self.edits += 1

    def convert(self, fn: Callable[[Tensor], Tensor], keep_dtype: bool = False) -> None:
        """Apply a conversion of dtype or device (as `nn.Module._apply` passes it) block by block.

        Blocks that were moved elsewhere (`move`) stay there.
        """
        like = fn(self._like)
        if keep_dtype:
            like = like.to(self.dtype)
        if self.allocate is not in_memory:
            like = like.to(self.device)

        def one(tensor: Tensor) -> Tensor:
            if self.allocate is in_memory:
                tensor = fn(tensor)
            return tensor.to(like.device, like.dtype)

        self._like = like
        for number in range(len(self._blocks)):
            self._blocks[number] = self._converted(self._blocks[number], one)
        self.edits += 1

    def move(self, allocate: Allocate, device: torch.device | str = "cpu") -> None:
        """Let every block, present and future, lie in the memory that `allocate` gives on `device`.
        No edit: no value changes."""
        self.allocate, self._like = allocate, self._like.to(device)
        for number in range(len(self._blocks)):
            self._blocks[number] = self._copied(self._blocks[number])

    def _by_block(self, index: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(number of a block, which of the positions `index` lie in it)."""
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self._rows:
            raise IndexError(
                f"positions from {int(index.min())} to {int(index.max())} in blocks of "
                f"{self._rows} rows"
            )
        for number in torch.unique(index // self.block_rows).tolist():
            yield number, (index // self.block_rows == number).nonzero().squeeze(1)

    def _used(self, number: int) -> int:
        return min(self.block_rows, self._rows - number * self.block_rows)

    # How one block is stored: what a subclass with another storage replaces.

    def _new_block(self) -> Any:
        return self.allocate((self.block_rows, *self.tail), self._like.dtype, self._like.device)

    def _store(self, number: int, where: int | Tensor, values: Tensor) -> None:
        """Write `values` from row `where` of a block, or to the rows `where`, whose factor is 1."""
        if isinstance(where, Tensor):
            self._blocks[number][where] = values.to(self._like)
        else:
            self._blocks[number][where : where + len(values)].copy_(values)

    def _part(self, number: int, stop: int) -> StoredRows:
        block = self._blocks[number]
        return StoredRows(block[:stop] if stop < self.block_rows else block, self._factors[number])

    def _apply_factor(self, number: int) -> None:
        if self._factors[number] != 1:
            self._blocks[number].mul_(self._factors[number])
            self._factors[number] = 1.0

    def _converted(self, block: Any, fn: Callable[[Tensor], Tensor]) -> Any:
        return self._settled(fn(block), block)

    def _copied(self, block: Any) -> Any:
        return self.allocate(tuple(block.shape), block.dtype, self.device).copy_(block)

    def _settled(self, tensor: Tensor, old: Tensor) -> Tensor:
        """A converted tensor, in the memory that blocks are to lie in."""
        if tensor is old or self.allocate is in_memory:
            return tensor
        return self.allocate(tuple(tensor.shape), tensor.dtype, tensor.device).copy_(tensor)

    def _for_all_rows(self, values: Tensor) -> Tensor:
        if tuple(values.shape) != tuple(self.shape):
            raise ValueError(
                f"got values of shape {list(values.shape)} for rows of shape {list(self.shape)}"
            )
        return values.detach()

    def _replace(self, values: Tensor) -> None:
        self._blocks, self._factors, self._rows = [], [], 0
        self.append(values)
        self.edits += 1

    def __deepcopy__(self, memo: dict) -> Blocks:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin._blocks = [self._copied(block) for block in self._blocks]
        twin._factors = list(self._factors)
        return twin

    def __repr__(self) -> str:
        blocks = f"{len(self._blocks)} x {self.block_rows} rows"
        return f"Blocks({list(self.shape)}, {self.dtype}, {blocks})"
