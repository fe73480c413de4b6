"""The feature map Φ of a polynomial dual kernel: ⟨Φ(u), Φ(v)⟩ = Σ_j κ_j ⟨u, v⟩^j, one column per
monomial.

    column of the monomial u^α, |α| = j:   √κ_j √(j!/α!) u^α
    P = Σ_{j: κ_j>0} C(r+j-1, j), which is C(r+D, D) if no κ_j is 0

Index legend: b batch, r rank in, o rank out, P columns. Columns are ordered by degree. Within a
degree nothing is gathered or scattered, forward or backward:

    degree 2     by distance: row d of a rectangle is u ∘ roll(u, -d), d = 0 ... r/2,
                 a strided view of (u, u) times u
    degree 3+    lexicographic: the monomials with smallest index i are u_i times
                 a suffix of those of one degree less

Φ is made tile by tile and never stored. Tiles lie transposed, [columns b]: every slice above is
then contiguous in memory, and the products with V [P o] need no transposed copy, which is what
small batches spend their time on otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 18  # one MiB of float32: a tile and its gradient stay in the cache of one core
BATCH_CHUNK = 1024  # larger batches are walked in pieces


@dataclass(frozen=True)
class Segment:
    """Columns start ... stop of Φ, of one degree: `rows` of the rectangle of degree 2, `pieces` (i,
    from, to) beyond it."""

    degree: int
    start: int
    stop: int
    rows: tuple[int, int] = (0, 0)
    pieces: tuple[tuple[int, int, int], ...] = ()

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Tile:
    """Neighbouring segments that are multiplied with V at once."""

    segments: tuple[Segment, ...]

    @property
    def start(self) -> int:
        return self.segments[0].start

    @property
    def stop(self) -> int:
        return self.segments[-1].stop

    def __len__(self) -> int:
        return self.stop - self.start


def suffix(r: int, degree: int, i: int) -> int:
    """Position of the first monomial of this degree whose indices are all >= i, in lexicographic
    order.

    There are C(r + degree - 1, degree) monomials of r variables; those of the r - i variables from
    i on, C(r - i + degree - 1, degree) of them, stand last.
    """
    return comb(r + degree - 1, degree) - comb(r - i + degree - 1, degree)


class Basis:
    """What the tiles of one batch of directions `u` [b r] are made of: u and (u, u) transposed,
    monomials of degree 2 ... D-1."""

    def __init__(self, features: PolynomialFeatures, u: Tensor, taped: bool = False) -> None:
        self.u = u.T.contiguous()  # [r b]
        self.windows = None
        if 2 in features.degrees and taped:
            # The derivative of a view by unfold has no rule under vmap, that of a roll has.
            self.windows = torch.stack([self.u.roll(-d, 0) for d in range(features.r // 2 + 1)])
        elif 2 in features.degrees:
            # Window d of (u, u) is u_d ... u_{d+r-1}, indices mod r: roll(u, -d). [r+1 r b]
            self.windows = torch.cat([self.u, self.u]).unfold(0, features.r, 1).transpose(1, 2)
        self.monomials = {1: self.u}
        for degree in range(2, features.degree):
            lower = self.monomials[degree - 1]
            # u^α with smallest index i is u_i times a monomial whose indices are all >= i; those
            # are a suffix of the lexicographic order.
            self.monomials[degree] = torch.cat(
                [self.u[i] * lower[suffix(features.r, degree - 1, i) :] for i in range(features.r)]
            )


class PolynomialFeatures:
    """Φ for directions of rank `r` and the coefficients `kappa` [D+1] >= 0 of a polynomial
    kernel."""

    def __init__(self, r: int, kappa: Sequence[float], tile_elements: int = TILE_ELEMENTS) -> None:
        self.r, self.kappa, self.tile_elements = r, tuple(kappa), tile_elements
        self.degrees = [degree for degree, value in enumerate(self.kappa) if value > 0]
        self.degree = self.degrees[-1]
        self.starts, start = {}, 0
        for degree in self.degrees:
            self.starts[degree] = start
            start += comb(r + degree - 1, degree)
        self.P = start
        # √κ of degrees 0, 1 and 2, which is all that the native sums know
        self.roots = tuple(math.sqrt(value) for value in (*self.kappa, 0.0, 0.0)[:3])
        self._weights: dict[tuple, Tensor] = {}

    def kernel(self, c: Tensor) -> Tensor:
        """Σ_j κ_j c^j, what the features' inner products are."""
        result = torch.zeros_like(c)
        for kappa in reversed(self.kappa):
            result = result * c + kappa
        return result

    def matrix(self, u: Tensor) -> Tensor:
        """All of Φ(u): [b P]. Differentiable to any order; this is the definition that the rest is
        tested against."""
        basis = Basis(self, u, taped=True)
        return torch.cat([self.tile(tile, basis) for tile in self.tiles(len(u))]).T

    def tiles(self, batch: int) -> Iterator[Tile]:
        """A partition of the columns into tiles for a batch of this size."""
        limit = self.columns(batch)
        segments, size = [], 0
        for segment in self._segments(limit):
            if segments and size + len(segment) > limit:
                yield Tile(tuple(segments))
                segments, size = [], 0
            segments.append(segment)
            size += len(segment)
        yield Tile(tuple(segments))

    def columns(self, batch: int) -> int:
        """No tile for a batch of this size has more columns, unless a single row of the rectangle
        does."""
        return max(self.tile_elements // max(1, min(batch, BATCH_CHUNK)), self.r)

    def _segments(self, limit: int) -> Iterator[Segment]:
        for degree in self.degrees:
            start = self.starts[degree]
            if degree < 2:
                yield Segment(degree, start, start + self.r**degree)
            elif degree == 2:
                yield from self._rectangle(start, max(1, limit // self.r))
            else:
                yield from self._suffixes(degree, start, limit)

    def _rectangle(self, start: int, step: int) -> Iterator[Segment]:
        # The pairs {i, i+d mod r} of a distance d < r/2 are r different ones, and d and r - d give
        # the same: d = 0 ... ⌈r/2⌉-1 have every pair but those of distance r/2 once.
        full = (self.r + 1) // 2
        for first in range(0, full, step):
            last = min(first + step, full)
            yield Segment(2, start + first * self.r, start + last * self.r, (first, last))
        if self.r % 2 == 0:
            # At distance r/2 every pair appears twice in a row of r, so only half of the row is
            # kept.
            yield Segment(
                2, start + full * self.r, start + full * self.r + self.r // 2, (full, full + 1)
            )

    def _suffixes(self, degree: int, start: int, limit: int) -> Iterator[Segment]:
        lower = comb(self.r + degree - 2, degree - 1)
        pieces, size = [], 0
        for i in range(self.r):
            position = suffix(self.r, degree - 1, i)
            while position < lower:
                take = min(limit - size, lower - position)
                pieces.append((i, position, position + take))
                position, size = position + take, size + take
                if size == limit:
                    yield Segment(degree, start, start + size, pieces=tuple(pieces))
                    pieces, size, start = [], 0, start + size
        if pieces:
            yield Segment(degree, start, start + size, pieces=tuple(pieces))

    def tile(self, tile: Tile, basis: Basis, out: Tensor | None = None) -> Tensor:
        """The columns of one tile, transposed: [columns b], written into `out` where that is given
        (off the tape only)."""
        if out is None:
            return torch.cat([self._segment(segment, basis) for segment in tile.segments])
        for segment in tile.segments:
            self._segment(
                segment, basis, out[segment.start - tile.start : segment.stop - tile.start]
            )
        return out

    def _segment(self, segment: Segment, basis: Basis, out: Tensor | None = None) -> Tensor:
        u, root = basis.u, math.sqrt(self.kappa[segment.degree])
        if segment.degree == 0:
            return u.new_full((1, u.shape[1]), root) if out is None else out.fill_(root)
        if segment.degree == 1:
            return torch.mul(u, root, out=out)
        if segment.degree == 2:
            first, last = segment.rows
            width = len(segment) // (last - first)
            values = torch.mul(
                u[:width] * (math.sqrt(2) * root),
                basis.windows[first:last, :width],
                out=None if out is None else out.view(last - first, width, -1),
            )
            if first == 0:
                values[0] /= math.sqrt(2)  # squares, which appear once
            return values.flatten(0, 1)
        lower = basis.monomials[segment.degree - 1]
        values = torch.cat([u[i] * lower[begin:end] for i, begin, end in segment.pieces])
        return torch.mul(values, self._weight(segment, u), out=out)

    def _weight(self, segment: Segment, like: Tensor) -> Tensor:
        """√κ_j √(j!/α!) for the columns of a segment of degree 3 or more: [columns 1]."""
        key = (segment.degree, like.dtype, like.device)
        if key not in self._weights:
            self._weights[key] = (
                math.sqrt(self.kappa[segment.degree]) * multinomials(self.r, segment.degree).sqrt()
            ).to(like.device, like.dtype)[:, None]
        start = self.starts[segment.degree]
        return self._weights[key][segment.start - start : segment.stop - start]

    def __deepcopy__(self, memo: dict) -> PolynomialFeatures:
        return PolynomialFeatures(self.r, self.kappa, self.tile_elements)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_weights": {}}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PolynomialFeatures) and (self.r, self.kappa) == (
            other.r,
            other.kappa,
        )

    __hash__ = None


class Adjoint:
    """Collects ∂L/∂u from the gradients of tiles: the same slices as in `Basis`, walked
    backwards."""

    def __init__(self, features: PolynomialFeatures, basis: Basis) -> None:
        self.features, self.basis = features, basis
        r, b = basis.u.shape
        self.u = torch.zeros_like(basis.u)
        self.doubled = basis.u.new_zeros(2 * r, b)
        self.monomials = {
            degree: torch.zeros_like(value)
            for degree, value in basis.monomials.items()
            if degree > 1
        }

    def add(self, tile: Tile, grad: Tensor) -> None:
        """Take in ∂L/∂(columns of the tile) [columns b]; `grad` is used up."""
        for segment in tile.segments:
            self._add(segment, grad[segment.start - tile.start : segment.stop - tile.start])

    def _add(self, segment: Segment, grad: Tensor) -> None:
        features, u = self.features, self.basis.u
        root = math.sqrt(features.kappa[segment.degree])
        if segment.degree == 1:
            self.u.add_(grad, alpha=root)
        elif segment.degree == 2:
            first, last = segment.rows
            grad = grad.view(last - first, len(segment) // (last - first), u.shape[1])
            scale = math.sqrt(2) * root
            if first == 0:
                grad[0] /= math.sqrt(2)
            width = grad.shape[1]
            self.u[:width].add_((grad * self.basis.windows[first:last, :width]).sum(0), alpha=scale)
            # Column (d, i) is u_i u_{i+d}, so u_t of (u, u) collects the products with d + i = t.
            sums = diagonal_sums(grad, u[:width])
            self.doubled[first : first + len(sums)].add_(sums, alpha=scale)
        elif segment.degree > 2:
            self._add_pieces(segment, grad.mul_(features._weight(segment, u)))

    def _add_pieces(self, segment: Segment, grad: Tensor) -> None:
        u, degree, start = self.basis.u, segment.degree - 1, 0
        for i, begin, end in segment.pieces:
            part = grad[start : start + end - begin]
            self.u[i] += (part * self.basis.monomials[degree][begin:end]).sum(0)
            self.monomials[degree][begin:end].addcmul_(part, u[i])
            start += end - begin

    def total(self) -> Tensor:
        """∂L/∂u [b r]."""
        r, u = self.features.r, self.basis.u
        for degree in sorted(self.monomials, reverse=True):
            grad, lower, start = self.monomials[degree], self.basis.monomials[degree - 1], 0
            below = self.monomials.get(degree - 1, self.u)
            for i in range(r):
                begin = suffix(r, degree - 1, i)
                part = grad[start : start + len(lower) - begin]
                gathered = (part * lower[begin:]).sum(0)
                below[begin:].addcmul_(part, u[i])
                self.u[i] += gathered
                start += len(part)
        return (self.u + self.doubled[:r] + self.doubled[r:]).T


def diagonal_sums(values: Tensor, factor: Tensor) -> Tensor:
    """Σ_d values[d, t - d] ∘ factor[t - d] for every t: [n + w - 1, b] from [n w b] and [w b].

    Rows padded to length n + w and read back in rows one shorter lie skewed: entry (d, i) stands at
    d·(n + w) + i = d·(n + w - 1) + (d + i), in column d + i. So the sum is along one dimension.
    """
    n, w, b = values.shape
    padded = values.new_zeros(n, w + n, b)
    torch.mul(values, factor, out=padded[:, :w])
    return padded.flatten(0, 1)[: n * (n + w - 1)].view(n, n + w - 1, b).sum(0)


def monomial_indices(r: int, degree: int) -> Tensor:
    """Sorted indices of every monomial of a degree, in lexicographic order: LongTensor [count,
    degree]."""
    index = torch.arange(r)[:, None]
    for lower in range(1, degree):
        index = torch.cat(
            [
                torch.cat([torch.full((len(index) - begin, 1), i), index[begin:]], 1)
                for i in range(r)
                for begin in [suffix(r, lower, i)]
            ]
        )
    return index


def multinomials(r: int, degree: int) -> Tensor:
    """j!/α! of every monomial of degree j, in lexicographic order: float64 [count]."""
    # `lead`: how often the smallest index stands in the monomial. One more factor u_i in front
    # multiplies j! by j + 1, and α_i! by the new α_i, which is 1 where i is smaller than the rest.
    count = torch.ones(r, dtype=torch.float64)
    lead, smallest = count.clone(), torch.arange(r)
    for lower in range(1, degree):
        counts, leads, firsts = [], [], []
        for i in range(r):
            begin = suffix(r, lower, i)
            run = torch.where(smallest[begin:] == i, lead[begin:] + 1, 1.0)
            counts.append(count[begin:] * (lower + 1) / run)
            leads.append(run)
            firsts.append(torch.full((len(run),), i))
        count, lead, smallest = torch.cat(counts), torch.cat(leads), torch.cat(firsts)
    return count


def column_indices(features: PolynomialFeatures, degree: int) -> Tensor:
    """Sorted indices of the monomial of every column of one degree: LongTensor [count, degree]."""
    r = features.r
    if degree != 2:
        return monomial_indices(r, degree) if degree else torch.empty(1, 0, dtype=torch.long)
    # Rows of the rectangle one after the other: column d·r + i is u_i u_{i+d}.
    column = torch.arange(comb(r + 1, 2))
    distance, i = column // r, column % r
    return torch.stack([i, (i + distance) % r], 1).sort(1).values
