"""Rows in bounded memory: at every step merge new rows with those of the same sample, and fold old
ones into moments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..entries import parameter_misfits, refused
from ..numerics import accumulator
from .layer import RowLayer
from .merge import Report, check_cosine, combine, split
from .pending import Rows


class RowLimits(nn.Module):
    """The settings `row_budget` and `merge` of a layer, applied at every step of PiSGD, and a tally
    of what they did."""

    def __init__(self, budget: int | None, merge: float | None) -> None:
        super().__init__()
        if budget is not None and (
            isinstance(budget, bool) or not isinstance(budget, int) or budget < 0
        ):
            raise ValueError(
                f"row_budget is {budget!r}; the number of newest rows to keep was expected, a "
                "whole number from 0"
            )
        if merge is not None:
            check_cosine(merge)
        self.budget, self.merge = budget, merge
        self.register_buffer("merged", torch.zeros((), dtype=torch.long))
        self.register_buffer("error", torch.zeros((), dtype=torch.float64))

    def reset_(self) -> None:
        """Start the tally anew."""
        self.merged.zero_()
        self.error.zero_()

    def check(self, rows: Rows, momentum: float) -> None:
        """Raise before a step that could not be made."""
        if momentum:
            raise ValueError(
                "a step with momentum goes on changing old rows, which row_budget and merge have "
                "folded or summed; "
                "use momentum=0, or memory='moments', where momentum is exact"
            )
        if self.merge is not None and bool((rows.origin < 0).any()):
            raise ValueError(
                "merge sums rows of the same sample, but the forward pass did not say which "
                "samples it was about; "
                "run it inside `with pilimit_lib.core.batch(ids)`"
            )

    @torch.no_grad()
    def absorb(self, layer: RowLayer, rows: Rows, coefficient: float) -> Rows:
        """Add rows about to be appended with this Amult to rows of the same sample that agree;
        returns those left over."""
        if self.merge is None or not len(layer):
            return rows
        same = (layer.origin[None] == rows.origin[:, None].to(layer.origin.device)).nonzero()
        if not len(same):
            return rows
        new, old = same.unbind(1)
        B = rows.B.to(accumulator(rows.B.dtype))
        cosine = (B[new] * layer.B.blocks.select(old).to(B)).sum(1)
        usable = cosine > self.merge
        best = cosine.new_full((len(B),), -2.0).scatter_reduce_(
            0, new, torch.where(usable, cosine, -2.0), "amax"
        )
        chosen = usable & (cosine == best[new])
        # Of equally good rows only one receives the new one.
        target = torch.full((len(B),), -1, device=old.device).scatter_reduce_(
            0, new[chosen], old[chosen], "amax"
        )
        hit = target >= 0
        if not bool(hit.any()):
            return rows
        position, member = torch.unique(target[hit], return_inverse=True)
        amult = layer.Amult.blocks.select(position).to(B)
        a = torch.cat(
            [
                layer.A.blocks.select(position).to(B) * amult[:, None],
                coefficient * rows.A[hit].to(B),
            ]
        )
        directions = torch.cat([layer.B.blocks.select(position).to(B), B[hit]])
        total, mean, moved = combine(
            a, directions, torch.cat([torch.arange(len(position), device=member.device), member])
        )
        for name, value in zip(("A", "Amult", "B"), (*split(total), mean)):
            layer.row_storage(name).put(position, value)
        self.error += moved
        self.merged += int(hit.sum())
        return rows[~hit]

    @torch.no_grad()
    def enforce(self, layer: RowLayer, decay: float) -> None:
        """After a step that scaled Amult by `decay`: the same to folded rows, then fold what
        exceeds the budget."""
        self.error.mul_(abs(decay))
        if layer.folded is not None and decay != 1:
            layer.folded.scale_(decay)
        if self.budget is not None and len(layer) > self.budget:
            fold(layer, self.budget)

    def _apply(self, fn, recurse: bool = True) -> RowLimits:
        error = self.error
        super()._apply(fn, recurse)
        self.error = error.to(self.merged.device)
        return self

    def entry_misfits(self, state: Mapping[str, Any], prefix: str, strict: bool) -> Iterator[str]:
        """A checkpoint without a tally begins anew."""
        return parameter_misfits(self, state, prefix, strict=False)

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        if refused(self, state, prefix, errors):
            return
        for name, value in self.named_buffers():
            state.setdefault(prefix + name, torch.zeros_like(value))
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)


@torch.no_grad()
def fold(layer: RowLayer, keep: int) -> Report:
    """Fold all but the newest `keep` rows of `layer` into its moments `layer.folded`."""
    before, excess = len(layer), max(0, len(layer) - keep)
    index = torch.arange(excess, device=layer.device)
    rise = (
        layer.folded.fold_(
            *(getattr(layer, name).blocks.select(index) for name in ("A", "Amult", "B"))
        )
        if excess
        else 0.0
    )
    if excess:
        layer.axis.keep(torch.arange(excess, before))
    slope = layer.folded.slope_error / layer.folded.series.error
    return Report("fold", before, len(layer), rise, rise * math.hypot(1, slope))
