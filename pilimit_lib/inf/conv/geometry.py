"""Where the outputs of a convolution get their inputs from: sizes, and the offsets grouped so that
no product is wasted.

An input position q feeds the output p through the offset δ where q = p·stride + δ·dilation -
padding. Positions with the same remainder q mod stride use the same offsets, so they make a
`Phase`: a sublattice of the input, q = start + t·stride with t = 0, 1, ..., and for each of its
offsets the shift with p = t + shift.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Pair = tuple[int, int]
Size = int | Pair
PADDING_MODES = ("zeros", "circular", "reflect", "replicate")


@dataclass(frozen=True)
class Phase:
    """A sublattice `start` of the input, and (offset, shift) of those it feeds outputs through, as
    (row, column) pairs."""

    start: Pair
    taps: tuple[tuple[Pair, Pair], ...]


@dataclass(frozen=True)
class Geometry:
    """Kernel, stride, padding and dilation as (rows, columns), on a map whose activations were
    averaged over `pool` windows. `padding_mode`: what lies beyond the border, as in `nn.Conv2d`."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    pool: Pair = (1, 1)
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Geometry:
        """The geometry of these `numbers`, padded with zeros."""
        return cls(*zip(numbers[::2], numbers[1::2]))

    @property
    def numbers(self) -> list[int]:
        """All pairs one after the other: what an operator can be handed, which pads with zeros."""
        return [*self.kernel, *self.stride, *self.padding, *self.dilation, *self.pool]

    @property
    def offsets(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def pooled(self, size: Pair) -> Pair:
        """Size of the map after pooling; positions that fill no window are left out, as in
        nn.AvgPool2d."""
        return size[0] // self.pool[0], size[1] // self.pool[1]

    def output(self, size: Pair) -> Pair:
        """Size of the output map of an input map [h w]; may be 0 or less, where nothing fits."""
        # no padding around nothing
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1 if n else 0
            for n, k, s, p, d in zip(
                self.pooled(size), self.kernel, self.stride, self.padding, self.dilation
            )
        )

    def phases(self) -> Iterator[Phase]:
        """The sublattices that feed any output at all."""
        for row in range(self.stride[0]):
            for column in range(self.stride[1]):
                taps = tuple(
                    ((i, j), (up, left))
                    for i, up in self._taps(0, row)
                    for j, left in self._taps(1, column)
                )
                if taps:
                    yield Phase((row, column), taps)

    def _taps(self, axis: int, start: int) -> list[tuple[int, int]]:
        found = []
        for offset in range(self.kernel[axis]):
            shift, rest = divmod(
                start + self.padding[axis] - offset * self.dilation[axis], self.stride[axis]
            )
            if rest == 0:
                found.append((offset, shift))
        return found


def overlap(shift: int, begin: int, end: int, size: int) -> tuple[slice, slice]:
    """Where t in [begin, end) meets p = t + shift in [0, size): slices of t - begin and of p. Empty
    ones where nothing does."""
    first, last = max(begin, -shift), min(end, size - shift)
    last = max(first, last)
    return slice(first - begin, last - begin), slice(first + shift, last + shift)


def pair(value: int | Pair, name: str, least: int) -> Pair:
    """`value` for rows and columns, checked."""
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) != 2 or any(
        isinstance(v, bool) or not isinstance(v, int) or v < least for v in values
    ):
        raise ValueError(
            f"{name} is {value!r}; a whole number from {least}, or a pair of them, was expected"
        )
    return values


def same_padding(kernel: Pair, stride: Pair, dilation: Pair) -> Pair:
    """The padding that keeps the size of a map; raises where there is none on both sides alike."""
    reach = tuple(d * (k - 1) for k, d in zip(kernel, dilation))
    if stride != (1, 1) or any(n % 2 for n in reach):
        raise ValueError(
            f"padding='same' needs stride 1 and an odd kernel, got kernel_size={kernel}, "
            f"stride={stride}, "
            f"dilation={dilation}; give the padding as numbers"
        )
    return reach[0] // 2, reach[1] // 2


def geometry_of(
    kernel_size: Size,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    pool: Size = 1,
    padding_mode: str = "zeros",
) -> Geometry:
    """The geometry that arguments in `nn.Conv2d`'s manner describe."""
    if padding_mode not in PADDING_MODES:
        raise ValueError(
            f"padding_mode is {padding_mode!r}; one of {', '.join(PADDING_MODES)} was expected"
        )
    kernel, stride, dilation = (
        pair(kernel_size, "kernel_size", 1),
        pair(stride, "stride", 1),
        pair(dilation, "dilation", 1),
    )
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding is {padding!r}; 'same', 'valid', or numbers were expected")
        padding = same_padding(kernel, stride, dilation) if padding == "same" else 0
    padding, pool = pair(padding, "padding", 0), pair(pool, "pool", 1)
    return Geometry(kernel, stride, padding, dilation, pool, padding_mode)


def check_map(layer: nn.Module, x: Tensor, channels: int, what: str, geometry: Geometry) -> None:
    """Raise ValueError where `x` is not [b channels h w] (or [channels h w]), or where no output
    would be left."""
    name = type(layer).__name__
    if x.ndim not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(
            f"{name} expects {what} [b, {channels}, h, w] or [{channels}, h, w], got "
            f"{list(x.shape)}; its input "
            f"must have {channels} channels"
        )
    check_size(name, geometry, tuple(x.shape[-2:]))


def check_size(name: str, geometry: Geometry, size: Pair) -> Pair:
    """Size of the output map of the layer `name` for an input map of `size`; raises ValueError
    where it would be empty."""
    out = geometry.output(size)
    if min(out) < 1:
        raise ValueError(
            f"{name}({describe(geometry)}) leaves nothing of a map of {size[0]}x{size[1]}: its "
            "output would be "
            f"{out[0]}x{out[1]}; use larger images, more padding, or less pooling, stride or kernel"
        )
    spare = {"reflect": 1, "circular": 0}.get(geometry.padding_mode)
    have = geometry.pooled(size)
    if spare is not None and any(p > n - spare for p, n in zip(geometry.padding, have)):
        raise ValueError(
            f"{name}({describe(geometry)}) can't take its border from a map of "
            f"{have[0]}x{have[1]}: padding_mode={geometry.padding_mode!r} needs a padding of at "
            f"most its size{' less 1' if spare else ''}; use less padding, less pooling, larger "
            "images, or padding_mode='replicate'"
        )
    return out


def with_border(g: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """(g [b r h w] with the border that `padding_mode` asks for, the geometry without padding that
    is left to do).

    What lies beyond the border of a *pooled* map is a copy of one of its windows, so whole windows
    of g are copied. Zeros need no copy: no activation comes from them.
    """
    if geometry.padding_mode == "zeros":
        return g, geometry
    pooled = geometry.pooled(tuple(g.shape[2:]))
    for dim, size, padding, pool in zip((2, 3), pooled, geometry.padding, geometry.pool):
        windows = _beyond(size, padding, geometry.padding_mode)
        places = [window * pool + place for window in windows for place in range(pool)]
        g = g.index_select(dim, torch.tensor(places, device=g.device))
    return g, replace(geometry, padding=(0, 0), padding_mode="zeros")


def _beyond(size: int, padding: int, mode: str) -> list[int]:
    """Which of `size` places stands at -padding ... size + padding - 1."""
    last = size - 1
    source = {
        "circular": lambda t: t % size,
        "reflect": lambda t: last - abs(last - abs(t)),
        "replicate": lambda t: min(max(t, 0), last),
    }[mode]
    return [source(t) for t in range(-padding, size + padding)]


def convolve(
    geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, bias_alpha: float
) -> Tensor:
    padding = geometry.padding
    if geometry.padding_mode != "zeros":
        (rows, columns), padding = padding, (0, 0)
        x = F.pad(x, (columns, columns, rows, rows), geometry.padding_mode)
    bias = None if bias is None else bias_alpha * bias
    return F.conv2d(x, weight, bias, geometry.stride, padding, geometry.dilation)


def describe(geometry: Geometry) -> str:
    def short(value: Pair) -> Size:
        return value[0] if value[0] == value[1] else value

    shown = {
        "kernel_size": geometry.kernel,
        "stride": geometry.stride,
        "padding": geometry.padding,
        "dilation": geometry.dilation,
        "pool": geometry.pool,
    }
    usual = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "pool": (1, 1)}
    parts = [f"{name}={short(value)}" for name, value in shown.items() if value != usual.get(name)]
    if geometry.padding_mode != "zeros":
        parts.append(f"padding_mode={geometry.padding_mode}")
    return ", ".join(parts)
