"""Rows that backward passes made and no step has appended yet: the gradient of a layer of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core import Axis
from ..dual.relu import relu_k
from ..numerics import accumulator


def relu_kernel(left: Tensor, right: Tensor) -> Tensor:
    """k(⟨·, ·⟩) of two sets of unit rows, [a r] and [b r]: [a b]."""
    return relu_k(left @ right.T)


@dataclass
class Rows:
    """Rows that one backward pass made: A [b o], B [b r], and the ids [b] of the samples they come
    from.

    `kernel` of two sets of B gives the inner products of what the rows stand for.
    """

    A: Tensor
    B: Tensor
    origin: Tensor
    kernel: Callable[[Tensor, Tensor], Tensor] = relu_kernel

    def __len__(self) -> int:
        return len(self.A)

    def __getitem__(self, index: Tensor) -> Rows:
        """The rows at the positions [k], or under the mask [b], `index`."""
        return replace(
            self, A=self.A[index], B=self.B[index], origin=self.origin[index.to(self.origin.device)]
        )

    def norm(self) -> Tensor:
        """Size of the update that these rows stand for: sqrt(Σ_ij A_i·A_j k(B_i, B_j)), the norm
        that clipping uses."""
        A, B = self.A.to(accumulator(self.A.dtype)), self.B.to(accumulator(self.B.dtype))
        # A row without direction (B = 0) has A = 0 too, so its k(0) does not count.
        return (self.kernel(B, B).to(A) * (A @ A.T)).sum().clamp_min(0).sqrt()

    @staticmethod
    def joined(parts: list[Rows]) -> Rows:
        if len(parts) == 1:
            return parts[0]
        return replace(
            parts[0],
            **{
                name: torch.cat([getattr(part, name) for part in parts])
                for name in ("A", "B", "origin")
            },
        )


class PendingRows:
    """Rows that backward passes made and no step has appended yet; shared by A, Amult and B of one
    layer. See `optim.pending.PendingGradient`."""

    axis: Axis  # along which they will be appended; the layer sets it once its parameters exist

    def __init__(self) -> None:
        self.parts: list[Rows] = []
        self.staged: list[Rows] = []
        self.coming: dict[int, list[Rows]] = {}  # by the backward pass that is under way
        self.spent: Any = None  # by which step they were appended; see `PiSGD`

    @property
    def layer(self) -> nn.Module:
        """The layer whose rows these will be."""
        return self.axis.members[0].module

    @property
    def parameter(self) -> nn.Parameter:
        """Amult, to which the learning rate applies."""
        return self.layer.Amult

    def __bool__(self) -> bool:
        return bool(self.parts)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have no pending rows, as torch's have no `.grad`: else a copy would
        step some layers only."""
        return {**self.__dict__, "parts": [], "staged": [], "coming": {}, "spent": None}

    def deliver(self, rows: Rows) -> None:
        """Called by a backward pass: keep its rows until autograd accumulates a gradient into A.

        Only `backward()` does that; what `torch.autograd.grad` made is forgotten when it ends.
        """
        task = torch._C._current_graph_task_id()
        if task not in self.coming:
            self.coming[task] = []
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(self.coming.pop, task, None))
        self.coming[task].append(rows)

    def accumulate(self) -> None:
        """What was delivered in this backward pass is pending from now on."""
        coming = self.coming.get(torch._C._current_graph_task_id())
        if coming:
            self.parts += coming
            self.spent = None
            coming.clear()

    def clear(self) -> None:
        self.parts = []
        self.coming.clear()
        self.spent = None

    def rows(self) -> Rows | None:
        """All pending rows in the order in which they were made, or None."""
        if len(self.parts) > 1:
            self.parts = [Rows.joined(self.parts)]
        return self.parts[0] if self.parts else None

    def norm(self) -> Tensor:
        """Size of the function that the rows would add."""
        return self.rows().norm()

    def tensors(self) -> tuple[Tensor, ...]:
        """A as it would be stored, and B."""
        rows, storage = self.rows(), self.layer.A.blocks.storage
        # Under layer norm A = ∂out·(s > 0), so a pre-activation that is NaN shows in its direction
        # only.
        return rows.A.to(storage) if storage == torch.float16 else rows.A, rows.B

    def check(self, momentum: float, velocity: Tensor | None) -> None:
        self.layer.check_append(momentum, velocity)

    def apply(self, lr: float, decay: float, velocity: Callable[[int], Tensor] | None) -> None:
        self.layer.append(lr, decay, velocity)

    def scale_(self, factor: Tensor | float) -> None:
        """Multiply the update that the rows stand for; directions keep their length 1."""
        for rows in self.parts:
            rows.A = rows.A * factor

    def stage(self) -> None:
        """Put the pending rows aside, where `zero_grad` does not reach them."""
        self.staged += self.parts
        self.parts = []

    def unstage(self) -> None:
        """Take the rows that were put aside back, before those made since."""
        self.parts = self.staged + self.parts
        self.staged = []
