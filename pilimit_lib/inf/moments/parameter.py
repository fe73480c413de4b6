"""V of a fused layer: a parameter whose gradient stays in its two factors until someone asks for
it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..dual.features import PolynomialFeatures
from . import sums


@dataclass
class Factors:
    """A gradient of V as its two factors, ∂V = Φ(unit)ᵀ delta: unit [b r], delta [b o]."""

    unit: Tensor
    delta: Tensor


class FactoredParameter(nn.Parameter):
    """V of a fused layer: its gradient stays in factors until someone asks for `.grad`.

    `PiSGD` applies the factors in place and `clip_grad_norm_` of this package measures and scales
    them. Whatever else reads `.grad` (another optimiser, torch's clipping) gets the matrix ∂V [P
    o], formed on demand, so that no step is ever lost. Every backward pass that reaches V adds to
    it, also that of `torch.autograd.grad`: wrap such calls in a `zero_grad`, or freeze V with
    `requires_grad_(False)` around them.
    """

    features: PolynomialFeatures
    pending: list[Factors]

    def __new__(
        cls, data: Tensor, features: PolynomialFeatures, requires_grad: bool = True
    ) -> FactoredParameter:
        self = super().__new__(cls, data, requires_grad)
        self.features, self.pending = features, []
        return self

    def factors(self) -> Factors | None:
        """All pending factors as one pair, or None."""
        if len(self.pending) > 1:
            self.pending = [
                Factors(
                    torch.cat([f.unit for f in self.pending]),
                    torch.cat([f.delta for f in self.pending]),
                )
            ]
        return self.pending[0] if self.pending else None

    def scale_(self, factor: Tensor) -> None:
        """Multiply the pending gradient by `factor`, whether it is in factors or formed."""
        for part in self.pending:
            part.delta = part.delta * factor.to(part.delta)
        formed = nn.Parameter.grad.__get__(self)
        if formed is not None:
            formed.mul_(factor.to(formed))

    def gradient_norm(self) -> Tensor:
        """Frobenius norm of the pending gradient, without forming it where it is in factors."""
        if self.in_factors:
            factors = self.factors()
            return sums.factored_norm(self.features, factors.unit, factors.delta)
        return torch.linalg.vector_norm(self.grad)

    @property
    def in_factors(self) -> bool:
        """Whether the whole gradient is still in factors."""
        return bool(self.pending) and nn.Parameter.grad.__get__(self) is None

    @property
    def grad(self) -> Tensor | None:
        formed = nn.Parameter.grad.__get__(self)
        parts = self.factors()
        if parts is not None:
            gradient = sums.backward(self.features, parts.unit, self, parts.delta, False, True)[1]
            nn.Parameter.grad.__set__(self, gradient if formed is None else formed.add_(gradient))
            self.pending = []
        return nn.Parameter.grad.__get__(self)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.pending = []
        nn.Parameter.grad.__set__(self, value)

    def __deepcopy__(self, memo: dict) -> FactoredParameter:
        if id(self) not in memo:  # copies have no gradient, as with torch's own parameters
            memo[id(self)] = type(self)(
                self.detach().clone(), copy.deepcopy(self.features, memo), self.requires_grad
            )
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int):
        return type(self), (self.detach(), self.features, self.requires_grad)


def refuse_ddp() -> None:
    """Gradients in factors pass DistributedDataParallel by, and ranks would drift apart without a
    word."""
    active = getattr(nn.parallel.DistributedDataParallel, "_get_active_ddp_module", lambda: None)()
    if active is not None:
        raise RuntimeError(
            "a fused layer keeps the gradient of V out of DistributedDataParallel's reach, so its "
            "ranks would "
            "train apart; build it with fused=False"
        )
