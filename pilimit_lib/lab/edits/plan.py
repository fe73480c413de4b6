"""What an edit would touch, worked out and checked before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core import Change, follow
from ..errors import Refused
from ..neurons.couplings import Coupling
from ..neurons.undisturbed import answers, undisturbed
from .rollback import Memento
from .surgery import Step, carry_out

if TYPE_CHECKING:
    from ..watch import Lab

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # relative; planning errors are of order one


@dataclass(frozen=True, eq=False)
class Touched:
    """One tensor that the edit changes."""

    tensor: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    optimizer_state: tuple[str, ...]

    def __str__(self) -> str:
        state = (
            f"   + optimiser's {', '.join(self.optimizer_state)}" if self.optimizer_state else ""
        )
        return f"{self.tensor:<44} {list(self.before)} -> {list(self.after)}{state}"


@dataclass(frozen=True, eq=False)
class Plan:
    """A dry run: `print(plan)` lists every tensor touched; `tensors` is the same as data."""

    operation: str
    summary: str
    coupling: Coupling
    steps: list[Step]
    preserves: str | None  # "itself", "masked", or None: what the edited network has to compute
    removed: tuple[int, ...]
    tensors: tuple[Touched, ...]
    finish: Callable[[], None] | None = None

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.summary}: {len(self.tensors)} tensors",
                *(f"  {entry}" for entry in self.tensors),
            ]
        )


def touched(steps: list[Step], lab: Lab) -> tuple[Touched, ...]:
    """The list that a plan prints; a tensor met twice is listed once, with the shape it ends
    with."""
    shapes: dict[tuple[int, str], tuple[Step, list[int]]] = {}
    for step in steps:
        _, shape = shapes.setdefault((id(step.module), step.name), (step, list(step.value.shape)))
        shape[step.dim] = len(step.source)
    entries = []
    for step, shape in shapes.values():
        held = lab.optimizer.state.get(step.value, {}) if lab.optimizer is not None else {}
        state = tuple(
            sorted(
                k
                for k, v in held.items()
                if isinstance(v, Tensor) and v.shape == step.value.shape and v.ndim
            )
        )
        entries.append(Touched(step.label, tuple(step.value.shape), tuple(shape), state))
    return tuple(entries)


def apply(plan: Plan, lab: Lab) -> Change:
    """Carry the plan out. On any error model, counters and optimiser are the very objects that they
    were."""
    example = lab.example()
    before = Memento([lab.module, *lab.neurons.values()], lab.optimizer)
    with lab.tracking_paused():
        expected = _expected(plan, lab, example)
        try:
            change = carry_out(plan.steps)
            if plan.finish is not None:
                plan.finish()
            _check(plan, lab, example, expected)
            if lab.optimizer is not None:
                follow(lab.optimizer, change)
        except BaseException:
            before.restore()
            raise
    return change


def _expected(plan: Plan, lab: Lab, example: tuple) -> list[Tensor] | None:
    """What the network says now, with what the edit takes away masked out of every consumer."""
    with undisturbed(lab.module):
        if plan.preserves is None:
            return None
        if plan.preserves == "itself":
            return answers(lab.module, example)
        masked = {}
        for tie in plan.coupling.columns():
            weight = masked.get(tie.label, getattr(tie.module, tie.name).detach().clone())
            weight.index_fill_(
                tie.dim, tie.positions[list(plan.removed)].flatten().to(weight.device), 0
            )
            masked[tie.label] = weight
        return answers(lab.module, example, masked)


def _check(plan: Plan, lab: Lab, example: tuple, expected: list[Tensor] | None) -> None:
    try:
        with undisturbed(lab.module):
            found = answers(lab.module, example)
    except Exception as error:
        raise Refused(
            f"{plan.summary}: the forward pass no longer runs on the example batch "
            f"({type(error).__name__}: {error}); "
            "it probably names a size (a view or split with fixed numbers). Nothing was changed"
        ) from error
    if expected is None:
        return
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        raise Refused(
            f"{plan.summary}: the neurons reach the output of the model, whose shape would change "
            "from "
            f"{[list(t.shape) for t in expected]} to {[list(t.shape) for t in found]}; "
            "pass allow_output=True if that is meant. Nothing was changed"
        )
    for new, old in zip(found, expected):
        scale = float(old.abs().max()) if old.numel() else 0.0
        apart = float((new - old).abs().max()) if old.numel() else 0.0
        if (
            not apart <= TOLERANCE.get(old.dtype, 3e-2) * max(scale, 1e-6)
            and torch.isfinite(old).all()
        ):
            raise Refused(
                f"{plan.summary}: the edited network differs from what it should compute by "
                f"{apart:.3g} on the example "
                "batch; something between this layer and its consumers mixes neurons (a mean or "
                "softmax over them, a "
                "shuffle), so the edit is refused. Nothing was changed"
            )
