"""The state of a layer of rows: what it holds, how that is saved, moved and edited, and how a step
appends to it.

What is computed with rows stands beside and above: sums, the tape, merging, compression, sharding
and files take a `RowLayer`, and the user's layers derive from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core import UNKNOWN, Axis, Blocks, StoredRows
from ..bias import check_sizes
from ..checkpoints.entries import load_whole, parameter_misfits, refused
from .parameter import ROWS, InfPiParameter
from .pending import PendingRows, Rows, relu_kernel
from .storage import (
    BESIDE,
    FOLDED,
    LIMITS,
    as_rows,
    elsewhere,
    new_blocks,
    pieces_of,
    pop_rows,
    rows_misfits,
    storage_misfit,
)


class RowLayer(nn.Module):
    """A function Σ_m Amult_m A_m K(B_m, ·) that training lengthens, kept as rows A [m o], Amult [m]
    and B [m r].

    The three are parameters to torch whose values lie in blocks; `origin` [m] says which sample
    made each row. Backward passes leave rows in `pending`, and `append` makes them part of the
    layer.

    Args:
        r: length of a row of B; r_out: of A.
        row_dtype: of A and B as stored, default torch's; see `storage.new_blocks`.
    """

    A: InfPiParameter
    Amult: InfPiParameter
    B: InfPiParameter
    limits: nn.Module | None  # `RowLimits`: bounds the number of rows
    folded: nn.Module | None  # moments of rows that were folded
    shard: Any  # this process's share, where `shard_rows` spread the rows
    also_loads = BESIDE
    load_state_dict = load_whole
    row_kernel = staticmethod(relu_kernel)  # of what rows stand for: two sets of B
    shardable = False  # whether a sum over the rows of all processes is made

    def __init__(
        self,
        r: int,
        r_out: int,
        row_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(r, r_out)
        self.r = r
        self.r_out = r_out
        self.limits = self.folded = self.shard = None
        self.pending = PendingRows()
        dtype = row_dtype or torch.get_default_dtype()
        for name, tail in (("A", (r_out,)), ("Amult", ()), ("B", (r,))):
            blocks = new_blocks(name, tail, dtype, device)
            self.register_parameter(name, InfPiParameter(blocks, self.pending, name))
        self.origin_blocks = Blocks(dtype=torch.long, device=device)
        self.axis = Axis("rows")
        for name in ROWS:
            self.axis.join(self, name)
        self.axis.join(self, "origin_blocks", label="origin")
        self.pending.axis = self.axis

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.A.blocks)

    def __bool__(self) -> bool:
        return True  # a layer without rows is still a layer

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    @property
    def device(self) -> torch.device:
        return self.A.device

    @property
    def origin(self) -> Tensor:
        """Id of the sample that made each row, -1 where unknown: LongTensor [m]."""
        return self.origin_blocks.dense()

    @property
    def row_bytes(self) -> int:
        """Memory of A and B, and of the moments of folded rows, in bytes."""
        rows = self.A.blocks.nbytes + self.B.blocks.nbytes
        return rows if self.folded is None else rows + self.folded.V.nbytes

    @property
    def edits(self) -> int:
        """How often existing rows were changed (not how often rows were appended)."""
        return self.A.blocks.edits + self.Amult.blocks.edits + self.B.blocks.edits

    def row_storage(self, name: str) -> Blocks:
        """The blocks of "A", "Amult", "B" or "origin"."""
        return self.origin_blocks if name == "origin" else getattr(self, name).blocks

    def parts(self, rows: int | None = None) -> Iterator[tuple[StoredRows, StoredRows, StoredRows]]:
        """The first `rows` rows (default: all those here) as they are stored, (A, Amult, B) block
        by block."""
        return zip(*(self.row_storage(name).parts(rows) for name in ROWS))

    def row_blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Views (A [k o], Amult [k], B [k r]) of all rows, block by block."""
        self.require_whole("what reads all rows")
        return zip(*(self.row_storage(name).views() for name in ROWS))

    def dense_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of A [m o], Amult [m] and B [m r]."""
        return tuple(self.row_storage(name).dense() for name in ROWS)

    def select_rows(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of A [k o], Amult [k] and B [k r] of the rows `index` [k]."""
        return tuple(self.row_storage(name).select(index) for name in ROWS)

    def require_whole(self, what: str) -> None:
        """Raise where some of the rows are on other ranks."""
        if self.shard is not None:
            raise RuntimeError(
                f"{what} needs all rows of a layer, and these are sharded over {self.shard.size} "
                "processes; call gather_rows(model) on every rank first, or write a checkpoint "
                "with save_rows"
            )

    def set_rows(self, A: Tensor, Amult: Tensor, B: Tensor, origin: Tensor | None = None) -> None:
        """Hold exactly these rows: A [m o], Amult [m], B [m r] of unit rows, origin [m] (default:
        unknown)."""
        self.require_whole("set_rows")
        self._hold({name: {"": value} for name, value in zip(ROWS, (A, Amult, B))}, origin)

    def deliver(self, rows: Rows) -> Tensor:
        """Take the rows of a backward pass; returns the gradient of A with which they become
        pending, once autograd accumulates it."""
        self.pending.deliver(rows)
        return self.A.blocks.like()

    def check_append(self, momentum: float = 0.0, velocity: Tensor | None = None) -> None:
        """Raise where the pending rows could not be appended by a step with this momentum, whose
        velocity [m] so far the optimiser holds."""
        rows = self.pending.rows()
        if self.limits is not None:
            self.limits.check(rows, momentum)
        if velocity is not None and len(velocity) != len(self):
            raise RuntimeError(
                f"a π-layer has {len(self)} rows, but its momentum in the optimiser "
                f"{len(velocity)}; after keep() or rewind() call follow(optimizer, change)"
            )
        if self.shard is not None:
            self.shard.check(rows, len(self))

    def append(
        self, lr: float, decay: float = 0.0, velocity: Callable[[int], Tensor] | None = None
    ) -> None:
        """Make the pending rows part of the layer: a step of SGD on its function.

        Amult ← (1 − lr·decay) Amult, and the rows come with Amult = −lr. Where a `velocity` is
        given Amult ← Amult − lr·v instead, with v = velocity(k) [m + k] for the rows here and the k
        to come.
        """
        rows = self.pending.rows()
        count, here = len(rows), len(self)
        if self.shard is not None:
            rows = self.shard.share(rows)
        if velocity is not None:
            v = velocity(len(rows))
            self.Amult.blocks.add_(v[:here], alpha=-lr)
            amult = -lr * v[here:]
        else:
            self.Amult.blocks.scale_(1 - lr * decay)
            if self.limits is not None:
                rows = self.limits.absorb(self, rows, -lr)
            amult = torch.full((len(rows),), -lr, dtype=self.Amult.dtype, device=self.Amult.device)
        # Rows with coefficient 0 would never contribute; with a velocity they may do so later.
        if lr or velocity is not None:
            self.axis.append({"A": rows.A, "Amult": amult, "B": rows.B, "origin": rows.origin})
            if self.shard is not None:
                self.shard.total += count
        if self.limits is not None:
            self.limits.enforce(self, 1 - lr * decay)
        self.pending.clear()

    def structure(self) -> dict[str, Any]:
        return {"rows": len(self)}

    def restructure(self, structure: dict[str, Any]) -> None:
        if elsewhere():
            return
        rows = structure["rows"]
        self.set_rows(torch.zeros(rows, self.r_out), torch.zeros(rows), torch.zeros(rows, self.r))

    def _hold(self, found: dict[str, dict[str, Tensor]], origin: Tensor | None) -> None:
        """Hold the rows that `found` gives by name, as `Blocks.state` does; nothing is changed
        where they do not fit."""
        rows = {name: as_rows(pieces, name) for name, pieces in found.items()}
        origin = torch.full((len(rows["A"]),), UNKNOWN) if origin is None else origin
        rows["origin"] = origin
        for name, values in rows.items():
            self.row_storage(name).check(values, name)
        for name in ("A", "B"):
            misfit = storage_misfit(rows[name], self.row_storage(name).storage, name)
            if misfit:
                raise ValueError(misfit)
        lengths = {name: len(values) for name, values in rows.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"rows of different number: {lengths}")
        for name, pieces in found.items():
            codes = pieces[""].dtype == torch.int8
            if codes and self.row_storage(name).storage != torch.int8:
                pieces = {"": rows[name]}
            self.row_storage(name).load_state(pieces)
        self.origin_blocks.set(origin)

    @contextmanager
    def _rows_aside(self) -> Iterator[None]:
        """Inside the `with`, torch's own methods see the other parameters only: rows are not
        tensors to be copied."""
        held = dict(self._parameters)
        for name in ROWS:
            del self._parameters[name]
        try:
            yield
        finally:
            others = dict(self._parameters)
            self._parameters.clear()
            self._parameters.update({name: others.get(name, held[name]) for name in held})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RowLayer:
        """Conversions go block by block; Amult never below float32, or small steps would vanish."""
        with self._rows_aside():
            super()._apply(fn, recurse)
        for name in ROWS:
            front = getattr(self, name)
            front.blocks.convert(_at_least_float32(fn) if name == "Amult" else fn)
            self._parameters[name] = front.refreshed()
        self.origin_blocks.convert(fn)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if keep_vars:
            destination.update({prefix + name: getattr(self, name) for name in ROWS})
            destination[prefix + "origin"] = self.origin
        elif not elsewhere():
            self.require_whole("state_dict")
            for name in ROWS:
                for suffix, value in self.row_storage(name).state().items():
                    destination[prefix + name + suffix] = value
            destination[prefix + "origin"] = self.origin
        with self._rows_aside():
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def entry_misfits(self, state: Mapping[str, Any], prefix: str, strict: bool) -> Iterator[str]:
        """What keeps entries of a state dict from being loaded; any number of rows can be."""
        if not elsewhere():
            found = list(rows_misfits(state, prefix, self.r, self.r_out, strict))
            if self.shard is not None:
                found.append(
                    f"{prefix}A is spread over {self.shard.size} processes; call "
                    "gather_rows(model) on every rank first, or use load_rows"
                )
            yield from found or self._storage_misfits(state, prefix)
        yield from parameter_misfits(self, state, prefix, strict, but=ROWS)
        if self.folded is None and any(prefix + name in state for name in FOLDED):
            yield (
                f"{prefix}folded holds folded rows; build the network with row_budget, or with "
                "memory='moments'"
            )

    def _storage_misfits(self, state: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for name in ("A", "B"):
            pieces = pieces_of(state, prefix, name)
            if pieces:
                storage = self.row_storage(name).storage
                misfit = storage_misfit(as_rows(pieces, name), storage, prefix + name)
                if misfit:
                    yield misfit

    def _take_settings(self, state: dict, prefix: str) -> None:
        """Take what is no tensor of this layer out of a state dict that fits."""
        state.pop(prefix + "layer_alpha", None)
        if self.limits is None:
            for name in LIMITS:  # the tally of a layer whose rows were limited
                state.pop(prefix + name, None)

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        """Rows may be more or fewer than here; a checkpoint without `origin` has rows of unknown
        origin."""
        if refused(self, state, prefix, errors):
            return
        self._take_settings(state, prefix)
        found, origin = pop_rows(state, prefix), state.pop(prefix + "origin", None)
        if not elsewhere():
            absent = [prefix + name for name in ROWS if name not in found]
            missing += absent
            if not absent:
                self._hold(found, origin)
        with self._rows_aside():
            super()._load_from_state_dict(
                state, prefix, metadata, strict, missing, unexpected, errors
            )


def row_layers(model: nn.Module) -> list[tuple[str, RowLayer]]:
    """The layers of `model` that keep rows, with their names."""
    return [
        (name, module) for name, module in model.named_modules() if isinstance(module, RowLayer)
    ]


def _at_least_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def convert(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype in (torch.float32, torch.float64) else tensor.to(moved.device)

    return convert
