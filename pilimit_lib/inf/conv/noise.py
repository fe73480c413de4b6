"""The noise of a finite width, drawn anew in every step: training as if the network were a random
finite one each time.

    g ← M g ,   M = ΩᵀΩ/n ,   Ω [n r] standard normal ,   the same M for all samples and positions

A finite network that reads out n^-½ Ω g by its own n^-½ Ωᵀ gets M g: of activations that are linear
this is its forward pass. E[M] = 1, and Cov(M g) = (|g|² 1 + g gᵀ)/n.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..numerics import accumulator


class FiniteWidthNoise(nn.Module):
    """Multiplies pre-activations [b r h w] by a fresh ΩᵀΩ/n in training; nothing in evaluation.

    Args:
        width: n. The smaller, the more noise: |M g - g|² is (r + 1)/n · |g|² on average.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(
                f"width is {width!r}; the width of a finite network, a whole number from 1, was "
                "expected"
            )
        self.width = width

    def forward(self, g: Tensor) -> Tensor:
        if not self.training:
            return g
        M = finite_width_factor(g.shape[1], self.width, g)
        # The other way round would leave a map that the convolution has to copy.
        return torch.tensordot(M, g, ([1], [1])).transpose(0, 1)

    def extra_repr(self) -> str:
        return f"width={self.width}"


@torch.no_grad()
def finite_width_factor(r: int, width: int, like: Tensor) -> Tensor:
    """ΩᵀΩ/n [r r] for a fresh Ω [n r] from torch's generator, n = `width`."""
    omega = torch.randn(width, r, device=like.device, dtype=accumulator(like.dtype))
    return (omega.T @ omega / width).to(like.dtype)
