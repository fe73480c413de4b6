"""A dimension that several tensors share, and that changes size while they train.

An edit is explicit: every verb validates first, changes all members or none, and returns a `Change`
that the caller hands to `follow` for each optimiser concerned. Nothing observes anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .blocks import Blocks
from .change import Change, Edit, Source


@dataclass(frozen=True)
class Member:
    """One tensor along an axis: attribute `name` of `module`, whose dimension `dim` is the axis.

    `blocks` is its storage, where it is kept in blocks: the attribute itself, or those of a
    parameter that fronts them.
    """

    module: nn.Module
    name: str
    dim: int
    label: str
    blocks: Blocks | None

    @property
    def value(self) -> Tensor | Blocks:
        return getattr(self.module, self.name)

    @property
    def shape(self) -> torch.Size:
        return (self.blocks if self.blocks is not None else self.value).shape

    def fill_shape(self, count: int) -> list[int]:
        shape = list(self.shape)
        shape[self.dim] = count
        return shape


@dataclass(frozen=True)
class Mark:
    """A size to come back to; valid until existing slices are removed or reordered."""

    axis: str
    size: int
    reorderings: int


class Axis:
    """A named dimension shared by several tensors, which therefore change size together.

    It lives as a plain attribute on the module that owns the members (itself or its submodules) and
    survives `deepcopy` and pickling with that module. Parameters are *replaced* when they change
    size: setting `.data` of another shape breaks the next backward of any graph that is still
    alive. Buffers are replaced too; `Blocks` change in place.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.members: list[Member] = []
        self._reorderings = 0

    @property
    def size(self) -> int:
        """The current length of the dimension."""
        if not self.members:
            raise ValueError(f"axis '{self.name}' has no members yet; join a tensor first")
        member = self.members[0]
        return member.shape[member.dim]

    def join(self, module: nn.Module, name: str, dim: int = 0, label: str | None = None) -> Axis:
        """Let dimension `dim` of the parameter, buffer or `Blocks` `module.name` belong to this
        axis; returns the axis."""
        label = label or name
        if not hasattr(module, name):
            raise ValueError(
                f"axis '{self.name}': {type(module).__name__} has no attribute '{name}'"
            )
        value = getattr(module, name)
        member = Member(
            module,
            name,
            dim,
            label,
            value if isinstance(value, Blocks) else getattr(value, "blocks", None),
        )
        if member.blocks is None and not isinstance(member.value, Tensor):
            raise TypeError(
                f"axis '{self.name}': {type(module).__name__}.{name} is a "
                f"{type(member.value).__name__}; "
                "a parameter, a buffer or Blocks was expected"
            )
        ndim = len(member.shape)
        if not -ndim <= dim < ndim:
            raise ValueError(
                f"axis '{self.name}': '{label}' has shape {list(member.shape)} and no dimension "
                f"{dim}"
            )
        if member.blocks is not None and dim % ndim:
            raise ValueError(
                f"axis '{self.name}': '{label}' is kept in blocks, which change along dimension 0, "
                f"not {dim}"
            )
        if any(other.label == label for other in self.members):
            raise ValueError(
                f"axis '{self.name}' already has a member '{label}'; choose another label"
            )
        for other in self.members:
            if other.value is member.value:
                raise ValueError(
                    f"axis '{self.name}': {type(module).__name__}.{name} is the tensor of member "
                    f"'{other.label}', "
                    "and an edit replaces it once; give each dimension an axis of its own, untie "
                    "shared weights"
                )
        if self.members and member.shape[dim] != self.size:
            raise ValueError(
                f"axis '{self.name}' has size {self.size}, but dimension {dim} of '{label}' is "
                f"{member.shape[dim]}"
            )
        self.members.append(replace(member, dim=dim % ndim))
        return self

    def append(self, values: Mapping[str, Tensor]) -> Change:
        """Add new slices at the end. `values[label]`: the member's shape, with any common length k
        along the axis."""
        count = self._common_length(values)
        self._check_fill(values, count)
        source = Source(prefix=self.size, fresh=count)
        if any(member.blocks is None for member in self.members):
            return self._commit(source, values)
        edits = []  # every training step of a π-network comes here, so the general path is too long
        for member in self.members:
            old_shape, value = member.blocks.shape, member.value
            member.blocks.append(values[member.label].detach())
            edits.append(Edit(member.module, member.name, value, value, 0, old_shape, source))
        return Change(tuple(edits))

    def keep(self, index: Tensor) -> Change:
        """Keep the slices `index` (positions [k], repeats allowed, or a bool mask [size]), in that
        order."""
        return self.take(self._positions(index), {})

    def take(self, source: Tensor, fill: Mapping[str, Tensor] | None = None) -> Change:
        """The general edit: slice i of the result is old slice source[i], or the next slice of
        `fill` where source[i] is -1.

        Without a `fill` for a label its new slices are zero.
        """
        source = torch.as_tensor(source)
        if source.ndim != 1 or source.is_floating_point() or source.dtype == torch.bool:
            raise ValueError(
                f"axis '{self.name}': source must be a vector of positions, got {source.dtype} "
                f"{list(source.shape)}"
            )
        if len(source) and (int(source.min()) < -1 or int(source.max()) >= self.size):
            raise IndexError(
                f"axis '{self.name}' has size {self.size}; source holds positions from "
                f"{int(source.min())} to "
                f"{int(source.max())} (-1 stands for a new slice)"
            )
        fill = dict(fill or {})
        fresh = int((source == -1).sum())
        for label in fill:
            self._member(label)
        for member in self.members:
            if member.label not in fill:
                dtype = (member.blocks if member.blocks is not None else member.value).dtype
                fill[member.label] = torch.zeros(member.fill_shape(fresh), dtype=dtype)
        self._check_fill(fill, fresh)
        change = self._commit(Source.indexed(source.to(torch.long)), fill)
        self._reorderings += 1
        return change

    def mark(self) -> Mark:
        """Remember the current size for `rewind`. Values that are changed in place later (weight
        decay) are not remembered."""
        return Mark(self.name, self.size, self._reorderings)

    def rewind(self, mark: Mark) -> Change:
        """Remove what was appended since the mark."""
        if mark.axis != self.name:
            raise ValueError(f"the mark belongs to axis '{mark.axis}', not to '{self.name}'")
        if mark.reorderings != self._reorderings or mark.size > self.size:
            raise ValueError(
                f"slices of axis '{self.name}' were removed or reordered since the mark; take a "
                "new mark"
            )
        return self._commit(Source.truncated(mark.size), {m.label: None for m in self.members})

    def _member(self, label: str) -> Member:
        for member in self.members:
            if member.label == label:
                return member
        raise KeyError(
            f"axis '{self.name}' has no member '{label}'; it has {[m.label for m in self.members]}"
        )

    def _positions(self, index: Tensor) -> Tensor:
        index = torch.as_tensor(index)
        if index.numel() and index.is_floating_point() or index.ndim != 1:
            raise ValueError(
                f"axis '{self.name}': a vector of positions or a mask was expected, got "
                f"{index.dtype} "
                f"{list(index.shape)}"
            )
        if index.dtype == torch.bool:
            if list(index.shape) != [self.size]:
                raise ValueError(
                    f"axis '{self.name}': a mask of shape {list(index.shape)} for size {self.size}"
                )
            return index.nonzero().squeeze(1)
        if len(index) and int(index.min()) < 0:
            raise IndexError(
                f"axis '{self.name}': negative position {int(index.min())}; count from 0 to "
                f"{self.size - 1}"
            )
        return index.to(torch.long)

    def _common_length(self, values: Mapping[str, Tensor]) -> int:
        if len(values) > len(self.members):
            for label in values:
                self._member(label)
        missing = [m.label for m in self.members if m.label not in values]
        if missing or not self.members:
            raise ValueError(
                f"axis '{self.name}': values for {missing or 'any member'} are missing; all "
                "members grow together"
            )
        for label, value in values.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"axis '{self.name}': '{label}' needs a tensor of new slices, got a "
                    f"{type(value).__name__}"
                )
        lengths = {
            m.label: values[m.label].shape[m.dim] if values[m.label].ndim > m.dim else None
            for m in self.members
        }
        if len(set(lengths.values())) != 1 or None in lengths.values():
            raise ValueError(
                f"axis '{self.name}': values of different lengths {lengths}; one common length was "
                "expected"
            )
        return next(iter(lengths.values()))

    def _check_fill(self, values: Mapping[str, Tensor], count: int) -> None:
        for member in self.members:
            got, expected = list(values[member.label].shape), member.fill_shape(count)
            if got != expected:
                raise ValueError(
                    f"axis '{self.name}': '{member.label}' needs new slices of shape {expected}, "
                    f"got {got}"
                )

    def _commit(self, source: Source, fill: Mapping[str, Tensor | None]) -> Change:
        """Build every new tensor first, then swap: an error while building leaves all members as
        they were."""
        built = [
            None if m.blocks is not None else source.apply(m.value.detach(), m.dim, fill[m.label])
            for m in self.members
        ]
        grads = [
            None
            if new is None or getattr(m.value, "grad", None) is None
            else source.apply(m.value.grad, m.dim, None)
            for m, new in zip(self.members, built)
        ]
        prepared = [
            source.prepare(m.blocks, fill[m.label]) if m.blocks is not None else None
            for m in self.members
        ]
        edits = []
        for member, tensor, grad, apply in zip(self.members, built, grads, prepared):
            old, old_shape = member.value, member.shape
            if apply is not None:
                apply()
                new = old
            elif isinstance(old, nn.Parameter):
                new = nn.Parameter(tensor, requires_grad=old.requires_grad)
                new.grad = grad
                setattr(member.module, member.name, new)
            else:
                new = tensor
                setattr(member.module, member.name, new)
            edits.append(Edit(member.module, member.name, old, new, member.dim, old_shape, source))
        return Change(tuple(edits))
