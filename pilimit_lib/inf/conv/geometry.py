"""Where the outputs of a convolution get their inputs from: sizes, and the offsets grouped so that
no product is wasted.

An input position q feeds the output p through the offset δ where q = p·stride + δ·dilation -
padding. Positions with the same remainder q mod stride use the same offsets, so they make a
`Phase`: a sublattice of the input, q = start + t·stride with t = 0, 1, ..., and for each of its
offsets the shift with p = t + shift.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

Pair = tuple[int, int]
Size = int | Pair


@dataclass(frozen=True)
class Phase:
    """A sublattice `start` of the input, and (offset, shift) of those it feeds outputs through, as
    (row, column) pairs."""

    start: Pair
    taps: tuple[tuple[Pair, Pair], ...]


@dataclass(frozen=True)
class Geometry:
    """Kernel, stride, padding and dilation as (rows, columns), on a map whose activations were
    averaged over `pool` windows."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    pool: Pair = (1, 1)

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Geometry:
        """The geometry of these `numbers`."""
        return cls(*zip(numbers[::2], numbers[1::2]))

    @property
    def numbers(self) -> list[int]:
        """All pairs one after the other: what an operator can be handed."""
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
    kernel_size: Size, stride: Size, padding: Size | str, dilation: Size, pool: Size = 1
) -> Geometry:
    """The geometry that arguments in `nn.Conv2d`'s manner describe."""
    kernel, stride, dilation = (
        pair(kernel_size, "kernel_size", 1),
        pair(stride, "stride", 1),
        pair(dilation, "dilation", 1),
    )
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding is {padding!r}; 'same', 'valid', or numbers were expected")
        padding = same_padding(kernel, stride, dilation) if padding == "same" else 0
    return Geometry(kernel, stride, pair(padding, "padding", 0), dilation, pair(pool, "pool", 1))


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
    return out


def convolve(
    geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, bias_alpha: float
) -> Tensor:
    return F.conv2d(
        x,
        weight,
        None if bias is None else bias_alpha * bias,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
    )


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
    return ", ".join(
        f"{name}={short(value)}" for name, value in shown.items() if value != usual.get(name)
    )
