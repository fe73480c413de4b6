"""What an edit would touch, worked out and checked before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from ..neurons.couplings import Coupling
from .surgery import Step


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
    removed: tuple[int, ...] = ()
    finish: Callable[[], None] | None = None
    tensors: tuple[Touched, ...] = ()  # worked out for a dry run

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.summary}: {len(self.tensors)} tensors",
                *(f"  {entry}" for entry in self.tensors),
            ]
        )


def touched(steps: list[Step], optimizer: Optimizer | None) -> tuple[Touched, ...]:
    """The list that a plan prints; a tensor met twice is listed once, with the shape it ends
    with."""
    shapes: dict[tuple[int, str], tuple[Step, list[int]]] = {}
    for step in steps:
        _, shape = shapes.setdefault((id(step.module), step.name), (step, list(step.value.shape)))
        shape[step.dim] = len(step.source)
    entries = []
    for step, shape in shapes.values():
        held = {} if optimizer is None else optimizer.state.get(step.value, {})
        state = tuple(
            sorted(
                k
                for k, v in held.items()
                if isinstance(v, Tensor) and v.shape == step.value.shape and v.ndim
            )
        )
        entries.append(Touched(step.label, tuple(step.value.shape), tuple(shape), state))
    return tuple(entries)
