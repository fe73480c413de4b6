"""A feature map of images in pieces: which positions a piece holds, and the shifted sums that make
a convolution of its products.

Index legend: b samples, o outputs, h w rows and columns of a map, k offsets of a phase, n positions
of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from torch import Tensor

from .geometry import Geometry, Pair, Phase, overlap


class Chunk:
    """A piece of one phase: some samples, and some rows of the phase's sublattice with all their
    columns."""

    def __init__(
        self, geometry: Geometry, phase: Phase, size: Pair, samples: slice, rows: slice
    ) -> None:
        self.geometry, self.phase, self.size = geometry, phase, size
        self.samples, self.rows = samples, rows
        self.out_size = geometry.output(size)
        self.height = rows.stop - rows.start
        self.columns = lattice_size(geometry, phase, size)[1]
        self.positions = (samples.stop - samples.start) * self.height * self.columns

    def windows(self, g: Tensor) -> Iterator[Tensor]:
        """Its positions in g [r b h w], one view [r b' h' w'] for each place in the pooling
        window."""
        if self.whole:
            yield g[:, self.samples]
            return
        ph, pw = self.geometry.pool
        sh, sw = self.geometry.stride
        row, column = self.phase.start
        height, width = self.geometry.pooled(self.size)
        # Pixel (y·ph + i, x·pw + j) is place (i, j) of window (y, x): splitting rows into (y, i)
        # and columns into (x, j) makes place (i, j) of all windows one strided view, not a copy.
        tiled = (
            g[:, self.samples, : height * ph, : width * pw]
            .unflatten(2, (height, ph))
            .unflatten(4, (width, pw))
        )
        lattice = tiled[:, :, row::sh, :, column::sw][:, :, self.rows]
        for i in range(ph):
            for j in range(pw):
                yield lattice[:, :, :, i, :, j]

    @cached_property
    def flat(self) -> bool:
        """Whether it holds whole maps that keep their size: a shift is then one offset in memory,
        but at the border.

        Position (y, x) of sample s lies at (s·h + y)·w + x in the input and in the output alike, so
        that (y + up, x + left) is up·w + left further on; what leaves the map that way would come
        in at the other side or in a neighbour, and is set to 0 (`_clear_outside`).
        """
        return self.geometry.stride == (1, 1) and self.out_size == self.geometry.pooled(
            self.size
        ) == (self.height, self.columns)

    @cached_property
    def whole(self) -> bool:
        """Whether it holds every position of its samples."""
        return (
            self.geometry.pool == (1, 1)
            and self.geometry.stride == (1, 1)
            and self.height == self.size[0]
        )

    def add_shifted(self, y: Tensor, out: Tensor) -> None:
        """Add y [k·o n] of every offset to the outputs that it feeds, out [o b h w]; uses y up."""
        o = len(out)
        if not self.flat:
            y = y.view(len(self.phase.taps), o, -1, self.height, self.columns)
            target = out[:, self.samples]
            for number, (rows, columns), (out_rows, out_columns) in self._taps():
                target[:, :, out_rows, out_columns] += y[number, :, :, rows, columns]
            return
        self._clear_outside(y, o)
        target = out[:, self.samples].flatten(1)
        for part, offset in zip(y.view(-1, o, self.positions), self._flat_offsets()):
            here, there = overlap(offset, 0, self.positions, self.positions)
            target[:, there].add_(part[:, here])

    def shifted(self, grad: Tensor, dy: Tensor) -> Tensor:
        """For every offset the entries of grad [o b h w] that it feeds, 0 where that lies outside:
        into dy [k·o n]."""
        o, part = len(grad), grad[:, self.samples]
        if not self.flat:
            target = dy.zero_().view(len(self.phase.taps), o, -1, self.height, self.columns)
            for number, (rows, columns), (out_rows, out_columns) in self._taps():
                target[number, :, :, rows, columns] = part[:, :, out_rows, out_columns]
            return dy
        source = part.flatten(1)
        for target, offset in zip(dy.view(-1, o, self.positions), self._flat_offsets()):
            here, there = overlap(offset, 0, self.positions, self.positions)
            target[:, here] = source[:, there]
        self._clear_outside(dy, o)
        return dy

    def _taps(self) -> Iterator[tuple[int, Pair, Pair]]:
        """(number of the offset in the phase, slices of rows and columns in the chunk, those in the
        output map)."""
        for number, (_, (up, left)) in enumerate(self.phase.taps):
            rows, out_rows = overlap(up, self.rows.start, self.rows.stop, self.out_size[0])
            columns, out_columns = overlap(left, 0, self.columns, self.out_size[1])
            yield number, (rows, columns), (out_rows, out_columns)

    def _flat_offsets(self) -> list[int]:
        return [up * self.columns + left for _, (up, left) in self.phase.taps]

    def _clear_outside(self, y: Tensor, o: int) -> None:
        """Set y [k·o n] to 0 where an offset leads out of the map: a shift in memory would lead
        into a neighbour."""
        # With stride 1 there is one phase, whose taps are all offsets, row by row: tap i·kw + j is
        # offset (i, j), whose shift up depends on i alone, and whose shift left on j alone.
        kh, kw = self.geometry.kernel
        maps = y.view(kh, kw, o, -1, self.height, self.columns)
        for number in range(kh):
            inside, _ = overlap(self.phase.taps[number * kw][1][0], 0, self.height, self.height)
            for outside in _complement(inside, self.height):
                maps[number, :, :, :, outside].zero_()
        for number in range(kw):
            inside, _ = overlap(self.phase.taps[number][1][1], 0, self.columns, self.columns)
            for outside in _complement(inside, self.columns):
                maps[:, number, :, :, :, outside].zero_()


def chunks(
    geometry: Geometry, phase: Phase, samples: int, size: Pair, positions: int
) -> Iterator[Chunk]:
    """A partition of a phase of `samples` maps into pieces of so many positions (or one row): whole
    maps, or rows of one."""
    rows, columns = lattice_size(geometry, phase, size)
    if rows <= 0 or columns <= 0:
        return
    maps = max(1, positions // (rows * columns))
    height = rows if rows * columns <= positions else max(1, positions // columns)
    for first in range(0, samples, maps):
        for top in range(0, rows, height):
            yield Chunk(
                geometry,
                phase,
                size,
                slice(first, min(first + maps, samples)),
                slice(top, min(top + height, rows)),
            )


def lattice_size(geometry: Geometry, phase: Phase, size: Pair) -> Pair:
    """Rows and columns of a phase's sublattice: how many t >= 0 have start + t·stride < n, which is
    (n - start) / stride rounded up (-(-a // b) rounds a / b up)."""
    return tuple(
        -(-(n - start) // stride)
        for n, start, stride in zip(geometry.pooled(size), phase.start, geometry.stride)
    )


def _complement(inside: slice, size: int) -> Iterator[slice]:
    """The parts of range(size) before and after `inside`, where there are any."""
    if inside.start >= inside.stop:
        yield slice(0, size)
        return
    if inside.start > 0:
        yield slice(0, inside.start)
    if inside.stop < size:
        yield slice(inside.stop, size)
