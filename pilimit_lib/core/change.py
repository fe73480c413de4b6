"""What an edit did to which tensors: the record that optimisers and ledgers follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .blocks import Blocks


@dataclass(frozen=True)
class Source:
    """Where each new slice comes from: a prefix of the old ones plus `fresh` new ones, or an
    explicit `index` (-1 = new).

    The prefix form exists because rows are appended every training step, where a list of all
    positions would cost O(m).
    """

    prefix: int = 0
    fresh: int = 0
    index: Tensor | None = None

    @staticmethod
    def truncated(size: int) -> Source:
        return Source(size, 0)

    @staticmethod
    def indexed(index: Tensor) -> Source:
        return Source(index=index)

    def positions(self) -> Tensor:
        """Old position of every new slice, -1 where it is new: LongTensor [new size]."""
        if self.index is not None:
            return self.index
        return torch.cat([torch.arange(self.prefix), torch.full((self.fresh,), -1)])

    def apply(self, tensor: Tensor, dim: int, fill: Tensor | None) -> Tensor:
        """`tensor` with its dimension `dim` rearranged; new slices from `fill` in order, or
        zero."""
        positions = self.positions().to(tensor.device)
        old = positions >= 0
        result = tensor.new_zeros([*tensor.shape[:dim], len(positions), *tensor.shape[dim + 1 :]])
        result.index_copy_(dim, old.nonzero().squeeze(1), tensor.index_select(dim, positions[old]))
        if fill is not None:
            result.index_copy_(dim, (~old).nonzero().squeeze(1), fill.detach().to(tensor))
        return result

    def prepare(self, blocks: Blocks, fill: Tensor | None) -> Callable[[], None]:
        """The same edit on blocks, as an action that can no longer fail for want of valid input."""
        if self.index is None and self.prefix == len(blocks) and fill is not None:
            return lambda: blocks.append(fill.detach())
        if self.index is None:
            return lambda: blocks.truncate(self.prefix)
        index = self.index.to(blocks.device)
        values = (
            blocks.select(index.clamp_min(0))
            if len(blocks)
            else blocks.like().new_zeros((len(index), *blocks.tail))
        )
        if fill is not None and len(fill):
            values[index < 0] = fill.detach().to(values)
        return lambda: blocks.set(values)


@dataclass(frozen=True, eq=False)
class Edit:
    """One tensor's part in a change: `old` was replaced by `new` (the same object where the tensor
    is kept in blocks)."""

    module: nn.Module
    name: str
    old: Tensor | Blocks
    new: Tensor | Blocks
    dim: int
    old_shape: torch.Size
    origin: Source

    @property
    def source(self) -> Tensor:
        """Old position of every new slice, -1 where it is new: LongTensor [new size]."""
        return self.origin.positions()


@dataclass(frozen=True, eq=False)
class Change:
    """A sequence of edits, additions and removals of parameters. Changes add up in the order in
    which they happened."""

    edits: tuple[Edit, ...] = ()
    added: tuple[tuple[nn.Parameter, nn.Parameter | None], ...] = ()
    removed: tuple[nn.Parameter, ...] = ()
    steps: tuple[Change, ...] = field(default=(), repr=False)

    @staticmethod
    def adding(parameter: nn.Parameter, beside: nn.Parameter | None = None) -> Change:
        """A new parameter that shall be optimised like `beside` and stand after it (None: at the
        end of the last group)."""
        return Change(added=((parameter, beside),))

    @staticmethod
    def removing(parameter: nn.Parameter) -> Change:
        """A parameter that is no longer part of the model."""
        return Change(removed=(parameter,))

    def __repr__(self) -> str:
        """One line, for the end of a notebook's cell."""
        parts = [f"{len(self.edits)} tensors replaced"] if self.edits else []
        parts += [f"{len(self.added)} parameters added"] if self.added else []
        parts += [f"{len(self.removed)} parameters removed"] if self.removed else []
        shown = [
            f"{type(edit.module).__name__}.{edit.name} {list(edit.old_shape)} -> "
            f"{list(edit.new.shape)}"
            for edit in self.edits[:2]
        ]
        more = ["..."] if len(self.edits) > len(shown) else []
        what = f" ({', '.join([*shown, *more])})" if shown else ""
        return f"Change: {', '.join(parts) or 'nothing'}{what}"

    def __add__(self, other: Change) -> Change:
        parts = (self.steps or (self,)) + (other.steps or (other,))
        return Change(
            self.edits + other.edits, self.added + other.added, self.removed + other.removed, parts
        )
