"""The one normalisation over a batch that has an infinite-width limit in this form: all channels
are divided by the same number.

    g ← γ · g / σ ,   σ² = mean over samples and positions of |g(p)|²

In a finite network |h(p)|² stands in its place, the sum over its n channels: h = n^-½ Ω g, so it
tends to |g(p)|², and h/σ is n^-½ Ω (g/σ).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checkpoints.entries import LoadsWhole

_NO_LIMIT = {
    "batch": "divides each channel by a deviation of its own, so that the kernel of two positions "
    "depends on the whole batch's covariance: no row of an earlier step has a meaning in it",
    "instance": "divides each channel by a deviation of its own, as batch norm does",
    "group": "divides groups of channels by deviations of their own; of groups that widen with the "
    "network, each tends to the root mean square of all",
    "layer": "is not done between layers here but by them",
}


def check_norm(norm: str | None) -> None:
    """Raise ValueError where a normalisation is not one that this library can take to infinite
    width."""
    if norm in (None, "scalar"):
        return
    why = f": {norm} norm {_NO_LIMIT[norm]}" if norm in _NO_LIMIT else ""
    remedy = "layernorm=True" if norm == "layer" else "norm='scalar'"
    raise ValueError(f"norm is {norm!r}{why}. None or 'scalar' was expected; use {remedy} instead")


class ScalarNorm(LoadsWhole):
    """Divides a map [b c h w] by the root of the mean of |·|² over samples and positions, and
    multiplies it by the learned number `scale`.

    In training the batch's own mean counts and moves `running`; in evaluation `running` does. The
    same module serves infinite networks, whose channels are ranks, and finite ones.

    Args:
        gain: `scale` at the start: the root mean square length of what is handed on.
        momentum: the share of a batch in `running`. eps: is added to the mean square.
    """

    running: Tensor

    def __init__(
        self,
        gain: float = 1.0,
        momentum: float = 0.1,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 < momentum <= 1 or not eps > 0:
            raise ValueError(
                f"momentum is {momentum} and eps {eps}; a share above 0 up to 1 and a positive "
                "number were expected"
            )
        self.gain, self.momentum, self.eps = float(gain), float(momentum), float(eps)
        self.scale = nn.Parameter(torch.full((1,), self.gain, device=device, dtype=dtype))
        self.register_buffer("running", torch.ones(1, device=device, dtype=dtype))

    def forward(self, g: Tensor) -> Tensor:
        square = self.running
        if self.training:
            square = _mean_square(g).to(self.running)
            with torch.no_grad():
                self.running.lerp_(square, self.momentum)
        factor = self.scale * (square + self.eps).rsqrt()
        return g * factor.to(g.dtype)

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, eps={self.eps}"


def _mean_square(g: Tensor) -> Tensor:
    """Mean over samples and positions of |g|² [1], summed in float32 or better."""
    if g.ndim != 4 or not g.numel():
        raise ValueError(
            f"ScalarNorm expects maps [b, c, h, w] that are not empty, got {list(g.shape)}"
        )
    wide = g if g.dtype == torch.float64 else g.float()
    return wide.square().sum().div(g.numel() // g.shape[1])[None]
