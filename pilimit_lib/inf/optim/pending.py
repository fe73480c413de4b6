"""What optimisers and clipping ask of a gradient, whether it is a tensor in `.grad` or something
else that a step applies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn


class Gradient(Protocol):
    """A gradient that can be measured and scaled."""

    def norm(self) -> Tensor:
        """Its size, as it counts in the total that clipping compares."""

    def tensors(self) -> tuple[Tensor, ...]:
        """What it consists of, as a step would use it: NaN or Inf in any makes the step invalid."""

    def scale_(self, factor: Tensor) -> None:
        """Multiply it, in place."""


class PendingGradient(Gradient, Protocol):
    """A gradient in another form than a tensor, held by a parameter's attribute `pending` and
    applied by itself. Empty (false) where a step has nothing to apply."""

    parameter: nn.Parameter  # whose group in the optimiser gives rate, momentum and weight decay

    def check(self, momentum: float, velocity: Tensor | None) -> None:
        """Raise where `apply` could not be done; `velocity` is what the optimiser holds."""

    def apply(self, lr: float, decay: float, velocity: Callable[[int], Tensor] | None) -> None:
        """Step by SGD and be empty. With momentum, `velocity(k)` tells what is added to the m
        entries of the parameter and the k to come, in units of −lr."""

    def clear(self) -> None:
        """Be empty, without a step."""


class TensorGradient:
    """The gradient that torch keeps in `.grad`."""

    def __init__(self, grad: Tensor) -> None:
        self.grad = grad

    def norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.grad)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.grad.coalesce().values() if self.grad.is_sparse else self.grad,)

    def scale_(self, factor: Tensor) -> None:
        self.grad.mul_(factor.to(self.grad))


def gradient_of(parameter: Tensor) -> Gradient | None:
    """The gradient of `parameter`, in whichever form; parameters that share one return the same
    object."""
    pending = getattr(parameter, "pending", None)
    if pending:
        return pending
    return None if parameter.grad is None else TensorGradient(parameter.grad)


def pending_of(parameters: Iterable[Tensor]) -> list[PendingGradient]:
    """Those gradients, not kept in `.grad`, whose leading parameter is among `parameters`."""
    found = ((parameter, getattr(parameter, "pending", None)) for parameter in parameters)
    return [pending for parameter, pending in found if pending and pending.parameter is parameter]
