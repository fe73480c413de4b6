"""The activation of a finite network whose limit are moments: p = Σ_j a_j h_j, h_j orthonormal
Hermite polynomials."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..numerics import length


class TruncatedActivation(nn.Module):
    """φ_D(h) = n^-½ ‖h‖ p(√n h/‖h‖) along the last dimension: p on coordinates of unit mean square,
    scaled back."""

    def __init__(self, coefficients: Sequence[float]) -> None:
        super().__init__()
        self.coefficients = tuple(coefficients)

    def forward(self, h: Tensor) -> Tensor:
        scale = length(h) / math.sqrt(h.shape[-1])
        z = h / torch.where(scale > 0, scale, 1)
        before, now = torch.zeros_like(z), torch.ones_like(z)
        result = self.coefficients[0] * now
        for j, coefficient in enumerate(self.coefficients[1:]):
            before, now = now, (z * now - math.sqrt(j) * before) / math.sqrt(j + 1)
            result = result + coefficient * now
        return scale * result

    def extra_repr(self) -> str:
        return ", ".join(f"{value:.5g}" for value in self.coefficients)
