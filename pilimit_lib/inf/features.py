"""The feature map Φ of a polynomial dual kernel: ⟨Φ(u), Φ(v)⟩ = Σ_j κ_j ⟨u, v⟩^j, one column per monomial.

    column of the monomial u^α, |α| = j:   √κ_j √(j!/α!) u^α             P = Σ_{j: κ_j>0} C(r+j-1, j), C(r+D, D) if no κ_j is 0

Index legend: b batch, r rank in, o rank out, P columns. Columns are ordered by degree. Within a degree nothing is gathered or
scattered, forward or backward:

    degree 2     by distance: row d of a rectangle is u ∘ roll(u, -d), d = 0 ... r/2, a strided view of (u, u) times u
    degree 3+    lexicographic: the monomials with smallest index i are u_i times a suffix of those of one degree less

Φ is made tile by tile and never stored: a tile [b, columns] holds about TILE_ELEMENTS numbers.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 18  # one MiB of float32: a tile and its gradient stay in the cache of one core
BATCH_CHUNK = 1024       # larger batches are walked in pieces


@dataclass(frozen=True)
class Tile:
    """Columns start ... stop of Φ. `rows` of the rectangle of degree 2; `pieces` (i, from, to) of suffixes beyond."""
    degree: int
    start: int
    stop: int
    rows: tuple[int, int] = (0, 0)
    pieces: tuple[tuple[int, int, int], ...] = ()


def suffix(r: int, degree: int, i: int) -> int:
    """Position of the first monomial of this degree whose indices are all >= i, in lexicographic order."""
    return comb(r + degree - 1, degree) - comb(r - i + degree - 1, degree)


class Basis:
    """What the tiles of one batch of directions `u` [b r] are made of: (u, u), and the monomials of degree 2 ... D-1."""

    def __init__(self, features: PolynomialFeatures, u: Tensor) -> None:
        self.u = u
        self.windows = torch.cat([u, u], 1).unfold(1, features.r, 1) if 2 in features.degrees else None  # [b r+1 r]
        self.monomials = {1: u}
        for degree in range(2, features.degree):
            lower = self.monomials[degree - 1]
            self.monomials[degree] = torch.cat(
                [u[:, i:i + 1] * lower[:, suffix(features.r, degree - 1, i):] for i in range(features.r)], 1)


class PolynomialFeatures:
    """Φ for directions of rank `r` and the coefficients `kappa` [D+1] >= 0 of a polynomial kernel."""

    def __init__(self, r: int, kappa: Sequence[float], tile_elements: int = TILE_ELEMENTS) -> None:
        self.r, self.kappa, self.tile_elements = r, tuple(kappa), tile_elements
        self.degrees = [degree for degree, value in enumerate(self.kappa) if value > 0]
        self.degree = self.degrees[-1]
        self.starts, start = {}, 0
        for degree in self.degrees:
            self.starts[degree] = start
            start += comb(r + degree - 1, degree)
        self.P = start
        self._weights: dict[tuple, Tensor] = {}

    def kernel(self, c: Tensor) -> Tensor:
        """Σ_j κ_j c^j, what the features' inner products are."""
        result = torch.zeros_like(c)
        for kappa in reversed(self.kappa):
            result = result * c + kappa
        return result

    def matrix(self, u: Tensor) -> Tensor:
        """All of Φ(u): [b P]. Differentiable to any order; this is the definition that the rest is tested against."""
        basis = Basis(self, u)
        return torch.cat([self.tile(tile, basis) for tile in self.tiles(len(u))], 1)

    def tiles(self, batch: int) -> Iterator[Tile]:
        """A partition of the columns into tiles for a batch of this size."""
        columns = max(self.tile_elements // max(1, min(batch, BATCH_CHUNK)), 1)
        for degree in self.degrees:
            start = self.starts[degree]
            if degree < 2:
                yield Tile(degree, start, start + self.r ** degree)
            elif degree == 2:
                yield from self._rectangle(start, max(1, columns // self.r))
            else:
                yield from self._suffixes(degree, start, columns)

    def _rectangle(self, start: int, step: int) -> Iterator[Tile]:
        full = (self.r + 1) // 2
        for first in range(0, full, step):
            last = min(first + step, full)
            yield Tile(2, start + first * self.r, start + last * self.r, (first, last))
        if self.r % 2 == 0:
            # At distance r/2 every pair appears twice in a row of r, so only half of the row is kept.
            yield Tile(2, start + full * self.r, start + full * self.r + self.r // 2, (full, full + 1))

    def _suffixes(self, degree: int, start: int, columns: int) -> Iterator[Tile]:
        lower = comb(self.r + degree - 2, degree - 1)
        pieces, size = [], 0
        for i in range(self.r):
            position = suffix(self.r, degree - 1, i)
            while position < lower:
                take = min(columns - size, lower - position)
                pieces.append((i, position, position + take))
                position, size = position + take, size + take
                if size == columns:
                    yield Tile(degree, start, start + size, pieces=tuple(pieces))
                    pieces, size, start = [], 0, start + size
        if pieces:
            yield Tile(degree, start, start + size, pieces=tuple(pieces))

    def tile(self, tile: Tile, basis: Basis) -> Tensor:
        """The columns of one tile: [b, stop - start]."""
        u, root = basis.u, math.sqrt(self.kappa[tile.degree])
        if tile.degree == 0:
            return u.new_full((len(u), 1), root)
        if tile.degree == 1:
            return u * root
        if tile.degree == 2:
            first, last = tile.rows
            width = (tile.stop - tile.start) // (last - first)
            values = u[:, None, :width] * (math.sqrt(2) * root) * basis.windows[:, first:last, :width]
            if first == 0:
                values[:, 0] /= math.sqrt(2)  # squares, which appear once
            return values.flatten(1)
        lower = basis.monomials[tile.degree - 1]
        values = [u[:, i:i + 1] * lower[:, begin:end] for i, begin, end in tile.pieces]
        return torch.cat(values, 1) * self._weight(tile, u)

    def _weight(self, tile: Tile, like: Tensor) -> Tensor:
        """√κ_j √(j!/α!) for the columns of a tile of degree 3 or more."""
        key = (tile.degree, like.dtype, like.device)
        if key not in self._weights:
            self._weights[key] = (math.sqrt(self.kappa[tile.degree])
                                  * multinomials(self.r, tile.degree).sqrt()).to(like.device, like.dtype)
        start = self.starts[tile.degree]
        return self._weights[key][tile.start - start:tile.stop - start]

    def __deepcopy__(self, memo: dict) -> PolynomialFeatures:
        return PolynomialFeatures(self.r, self.kappa, self.tile_elements)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_weights": {}}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PolynomialFeatures) and (self.r, self.kappa) == (other.r, other.kappa)

    __hash__ = None


class Adjoint:
    """Collects ∂L/∂u from the gradients of tiles: the same slices as in `Basis`, walked backwards."""

    def __init__(self, features: PolynomialFeatures, basis: Basis) -> None:
        self.features, self.basis = features, basis
        self.u = torch.zeros_like(basis.u)
        self.doubled = basis.u.new_zeros(len(basis.u), 2 * features.r + 1)
        self.monomials = {degree: torch.zeros_like(value) for degree, value in basis.monomials.items() if degree > 1}

    def add(self, tile: Tile, grad: Tensor) -> None:
        """Take in ∂L/∂(columns of the tile) [b, columns]; `grad` is used up."""
        features, u, root = self.features, self.basis.u, math.sqrt(self.features.kappa[tile.degree])
        if tile.degree == 1:
            self.u.add_(grad, alpha=root)
        elif tile.degree == 2:
            first, last = tile.rows
            grad, scale = grad.view(len(u), last - first, -1), math.sqrt(2) * root
            if first == 0:
                grad[:, 0] /= math.sqrt(2)
            width = grad.shape[2]
            self.u[:, :width].add_((grad * self.basis.windows[:, first:last, :width]).sum(1), alpha=scale)
            sums = diagonal_sums(grad.mul_(u[:, None, :width]))
            self.doubled[:, first:first + sums.shape[1]].add_(sums, alpha=scale)
        elif tile.degree > 2:
            self._add_pieces(tile, grad.mul_(features._weight(tile, u)))

    def _add_pieces(self, tile: Tile, grad: Tensor) -> None:
        u, degree, start = self.basis.u, tile.degree - 1, 0
        for i, begin, end in tile.pieces:
            part = grad[:, start:start + end - begin]
            self.u[:, i] += (part * self.basis.monomials[degree][:, begin:end]).sum(1)
            self.monomials[degree][:, begin:end].addcmul_(part, u[:, i:i + 1])
            start += end - begin

    def total(self) -> Tensor:
        """∂L/∂u [b r]."""
        r, u = self.features.r, self.basis.u
        for degree in sorted(self.monomials, reverse=True):
            grad, lower, start = self.monomials[degree], self.basis.monomials[degree - 1], 0
            below = self.monomials.get(degree - 1, self.u)
            for i in range(r):
                begin = suffix(r, degree - 1, i)
                part = grad[:, start:start + lower.shape[1] - begin]
                gathered = (part * lower[:, begin:]).sum(1)
                below[:, begin:].addcmul_(part, u[:, i:i + 1])
                self.u[:, i] += gathered
                start += part.shape[1]
        self.u += self.doubled[:, :r] + self.doubled[:, r:2 * r]
        return self.u


def diagonal_sums(values: Tensor) -> Tensor:
    """Σ_d values[b, d, t - d] for every t: [b, n + w - 1] from [b n w]. Rows padded by n and read back one shorter lie skewed."""
    b, n, w = values.shape
    if n == 1:
        return values[:, 0]
    skewed = torch.nn.functional.pad(values, (0, n)).flatten(1)[:, :n * (n + w - 1)]
    return skewed.view(b, n, n + w - 1).sum(1)


def monomial_indices(r: int, degree: int) -> Tensor:
    """Sorted indices of every monomial of a degree, in lexicographic order: LongTensor [count, degree]."""
    index = torch.arange(r)[:, None]
    for lower in range(1, degree):
        index = torch.cat([torch.cat([torch.full((len(index) - begin, 1), i), index[begin:]], 1)
                           for i in range(r) for begin in [suffix(r, lower, i)]])
    return index


def multinomials(r: int, degree: int) -> Tensor:
    """j!/α! of every monomial of degree j, in lexicographic order: float64 [count]."""
    count, lead, smallest = torch.ones(r, dtype=torch.float64), torch.ones(r, dtype=torch.float64), torch.arange(r)
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
    distance, i = torch.arange(comb(r + 1, 2)) // r, torch.arange(comb(r + 1, 2)) % r
    return torch.stack([i, (i + distance) % r], 1).sort(1).values
