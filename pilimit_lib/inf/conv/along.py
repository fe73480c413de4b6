"""Infinitely wide convolutions along sequences: pre-activations [b r l], in the manner of
`nn.Conv1d`.

A sequence is a map of one row, so each layer holds the one of maps as `conv`, with a kernel of one
row: V [P 1 k o].
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..checkpoints.entries import load_whole
from .finite import FinPiConv2d
from .geometry import Pair
from .layers import InfPiConv2d, InfPiInputConv2d


class _Along(nn.Module):
    """A layer of maps, `conv`, on sequences [b c l] or [c l]."""

    conv: nn.Module
    load_state_dict = load_whole

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim not in (2, 3):
            raise ValueError(
                f"{type(self).__name__} expects sequences [b, c, l] or [c, l], got {list(x.shape)}"
            )
        return self.conv(x.unsqueeze(-2)).squeeze(-2)


class InfPiInputConv1d(_Along):
    """The first layer of an infinitely wide network of sequences: [b c l] to pre-activations
    [b r l'].

    Args: as of `InfPiInputConv2d`, with one number each for kernel, stride, padding and dilation.
    """

    def __init__(
        self,
        channels: int,
        r_out: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | str = 0,
        dilation: int = 1,
        **how: Any,
    ) -> None:
        super().__init__()
        window = _window(kernel_size, stride, padding, dilation)
        self.conv = InfPiInputConv2d(channels, r_out, *window, **how)

    def sample(
        self, n_in: int | None = None, n_out: int = 256, omega: Tensor | None = None
    ) -> FinPiConv1d:
        """A finite layer of `n_out` channels with the same limit, see `InfPiInputConv2d.sample`."""
        return FinPiConv1d(self.conv.sample(n_in, n_out, omega))


class InfPiConv1d(_Along):
    """An infinitely wide convolution along sequences that learns features: pre-activations [b r l]
    to [b r_out l'].

    Args: as of `InfPiConv2d`, with one number each for kernel, stride, padding, dilation and pool.
    """

    def __init__(
        self,
        r: int,
        r_out: int | None = None,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | str = 0,
        dilation: int = 1,
        *,
        pool: int = 1,
        **how: Any,
    ) -> None:
        super().__init__()
        window = _window(kernel_size, stride, padding, dilation)
        self.conv = InfPiConv2d(r, r_out, *window, pool=(1, _number(pool, "pool")), **how)

    def sample(
        self,
        n_in: int,
        n_out: int | None = None,
        prev_omega: Tensor | None = None,
        omega: Tensor | None = None,
    ) -> FinPiConv1d:
        """A finite layer with the same limit, see `InfPiConv2d.sample`."""
        return FinPiConv1d(self.conv.sample(n_in, n_out, prev_omega, omega))


class FinPiConv1d(_Along):
    """A finite convolution along sequences that tends to an infinite one as widths grow, and whose
    gradients are projected, see `FinPiConv2d`."""

    def __init__(self, conv: FinPiConv2d) -> None:
        super().__init__()
        self.conv = conv

    @property
    def omega(self) -> Tensor | None:
        """ω [n r] of the layer: what the next one is sampled with."""
        return self.conv.omega


def _window(
    kernel_size: int, stride: int, padding: int | str, dilation: int
) -> tuple[Pair, Pair, Pair | str, Pair]:
    sides = padding if isinstance(padding, str) else (0, _number(padding, "padding"))
    return (
        (1, _number(kernel_size, "kernel_size")),
        (1, _number(stride, "stride")),
        sides,
        (1, _number(dilation, "dilation")),
    )


def _number(value: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}; sequences have one dimension: give one number")
    return value
