"""V of a fused layer: a parameter whose gradient stays in its two factors until someone asks for
it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import refuse_wrapping
from ..dual.features import PolynomialFeatures
from . import sums


@dataclass
class Factors:
    """A gradient of V as its two factors, ∂V = Φ(unit)ᵀ delta: unit [b r], delta [b o]."""

    unit: Tensor
    delta: Tensor


class PendingFactors:
    """The gradient of a `FactoredParameter` while it is in factors; see
    `optim.pending.PendingGradient`."""

    def __init__(self, parameter: FactoredParameter) -> None:
        self.parameter = parameter

    def __bool__(self) -> bool:
        return self.parameter.in_factors

    def norm(self) -> Tensor:
        """Frobenius norm of ∂V, without forming it."""
        factors = self.parameter.factors()
        return sums.factored_norm(self.parameter.features, factors.unit, factors.delta)

    def tensors(self) -> tuple[Tensor, ...]:
        factors = self.parameter.factors()
        return factors.delta, factors.unit

    def scale_(self, factor: Tensor) -> None:
        for part in self.parameter.parts:
            part.delta = part.delta * factor.to(part.delta)

    def check(self, momentum: float, velocity: Tensor | None) -> None:
        """Factors can always be applied."""

    def apply(self, lr: float, decay: float, velocity: Callable[[int], Tensor] | None) -> None:
        """In place; with momentum the gradient is formed, and left to torch's SGD."""
        if velocity is None:
            V, factors = self.parameter, self.parameter.factors()
            sums.update_(V.features, V, factors.unit, factors.delta, -lr, 1 - lr * decay)
            self.clear()

    def clear(self) -> None:
        self.parameter.parts = []


class FactoredParameter(nn.Parameter):
    """V of a fused layer: its gradient stays in factors until someone asks for `.grad`.

    `PiSGD` applies the factors in place and `clip_grad_norm_` of this package measures and scales
    them. Whatever else reads `.grad` (another optimiser, torch's clipping) gets the matrix ∂V [P
    o], formed on demand, so that no step is ever lost. Only `backward()` adds to it:
    `torch.autograd.grad` hands ∂V back where it was asked for, and leaves nothing behind.
    """

    features: PolynomialFeatures
    parts: list[Factors]

    def __new__(
        cls, data: Tensor, features: PolynomialFeatures, requires_grad: bool = True
    ) -> FactoredParameter:
        self = super().__new__(cls, data, requires_grad)
        self.features, self.parts = features, []
        return self

    def factors(self) -> Factors | None:
        """All pending factors as one pair, or None."""
        if len(self.parts) > 1:
            unit = torch.cat([part.unit for part in self.parts])
            self.parts = [Factors(unit, torch.cat([part.delta for part in self.parts]))]
        return self.parts[0] if self.parts else None

    @property
    def pending(self) -> PendingFactors:
        """The gradient as long as it is in factors."""
        return PendingFactors(self)

    @property
    def in_factors(self) -> bool:
        """Whether the whole gradient is still in factors."""
        return bool(self.parts) and nn.Parameter.grad.__get__(self) is None

    @property
    def watched(self) -> bool:
        """Whether hooks want to see the gradient, which must then be formed at once."""
        return bool(self._backward_hooks or self._post_accumulate_grad_hooks)

    @property
    def grad(self) -> Tensor | None:
        formed = nn.Parameter.grad.__get__(self)
        parts = self.factors()
        if parts is not None:
            gradient = sums.backward(self.features, parts.unit, self, parts.delta, False, True)[1]
            nn.Parameter.grad.__set__(self, gradient if formed is None else formed.add_(gradient))
            self.parts = []
        return nn.Parameter.grad.__get__(self)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.parts = []
        nn.Parameter.grad.__set__(self, value)

    def detach(self) -> Tensor:
        refuse_wrapping(
            "V of a fused layer can't be made an nn.Parameter of another module, as "
            "parametrizations such as weight_norm do: its gradient lies in factors; build the "
            "layer with fused=False"
        )
        return super().detach()

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
            "ranks would train apart; sum gradients with pilimit_lib.inf.sum_gradients_(net) in "
            "its place, or build it with fused=False"
        )
