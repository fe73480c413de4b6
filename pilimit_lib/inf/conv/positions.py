"""The feature map Φ of many positions at once, one row per monomial: Φᵀ [P n] for pre-activations
[r n].

`dual.features` has one *row* per direction, which suits few directions of high rank. A feature map
of an image is the opposite: very many positions of low rank. With positions along the rows every
monomial is one long vector product, a slice of (û, û) times a slice of g. Columns are those of
`PolynomialFeatures` without their factors √κ_j √(j!/α!), which go into V (`weights`).

    row of the monomial α, |α| = j:     s · û^α ,   s = |g| ,  û = g/s

With layer norm s is 1; where g = 0 it is 0.

Index legend: r rank, n positions, P monomials.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dual.features import PolynomialFeatures, multinomials, suffix
from ..numerics import output_scale


def weights(features: PolynomialFeatures, like: Tensor) -> Tensor:
    """√κ_j √(j!/α!) of every column: [P], on `like`'s device, in its precision."""
    parts = []
    for degree in features.degrees:
        root = math.sqrt(features.kappa[degree])
        if degree < 2:
            part = torch.full((features.r**degree,), root, dtype=torch.float64)
        elif degree == 2:
            part = torch.full(
                (features.r * (features.r + 1) // 2,), math.sqrt(2) * root, dtype=torch.float64
            )
            part[: features.r] = root  # squares come first, and once
        else:
            part = root * multinomials(features.r, degree).sqrt()
        parts.append(part)
    return torch.cat(parts).to(like.device, like.dtype)


class Positions:
    """Pre-activations `g` [r n] taken apart: length s [1 n], direction û twice over [2r n], what Φ
    is linear in: s·û, or û."""

    def __init__(self, features: PolynomialFeatures, g: Tensor, layernorm: bool) -> None:
        self.features, self.layernorm = features, layernorm
        # vector_norm along the first dimension takes twenty times as long
        self.s = (g * g).sum(0, keepdim=True).sqrt_()
        self.inverse = torch.where(self.s > 0, self.s, 1).reciprocal_()
        unit = g * self.inverse
        self.doubled = torch.cat([unit, unit])
        self.unit = self.doubled[: features.r]
        # û_d ... û_{d+r-1} for every distance d, with indices mod r: [r+1 r n]
        self.windows = self.doubled.unfold(0, features.r, 1).transpose(1, 2)
        self.linear = unit if layernorm else g
        self.scale = output_scale(self.s, layernorm)
        # Monomials of degree 1 ... D-1 in lexicographic order, which degrees from 3 on are made of.
        self.monomials = {1: self.linear}
        for degree in range(2, features.degree if features.degree > 2 else 0):
            lower = self.monomials[degree - 1]
            self.monomials[degree] = torch.cat(
                [
                    self.unit[i] * lower[suffix(features.r, degree - 1, i) :]
                    for i in range(features.r)
                ]
            )

    def write(self, phi: Tensor, add: bool = False) -> None:
        """Φᵀ into `phi` [P n], or added to what it holds."""
        r = self.features.r
        for degree in self.features.degrees:
            start = self.features.starts[degree]
            if degree < 2:
                rows, source = phi[start : start + r**degree], self.linear if degree else self.scale
                rows.add_(source) if add else rows.copy_(source)
            elif degree == 2:
                for d, rows, width in rectangle(phi[start : start + r * (r + 1) // 2], r):
                    product(rows, self.linear[:width], self.windows[d : d + len(rows), :width], add)
            else:
                lower = self.monomials[degree - 1]
                for i, rows, begin in staircase(phi[start:], r, degree):
                    product(rows, lower[begin:], self.unit[i].expand_as(lower[begin:]), add)

    def gradient(self, dphi: Tensor) -> Tensor:
        """∂L/∂g [r n] for ∂L/∂Φᵀ `dphi` [P n]."""
        r = self.features.r
        doubled, linear, scale = torch.zeros_like(self.doubled), torch.zeros_like(self.linear), None
        shifted = doubled.unfold(0, r, 1).transpose(1, 2)
        lex = {
            degree: torch.zeros_like(value)
            for degree, value in self.monomials.items()
            if degree > 1
        }
        lex[1] = linear
        for degree in self.features.degrees:
            start = self.features.starts[degree]
            if degree == 0:
                scale = dphi[start : start + 1]
            elif degree == 1:
                linear.add_(dphi[start : start + r])
            elif degree == 2:
                for d, rows, width in rectangle(dphi[start : start + r * (r + 1) // 2], r):
                    # One distance after the other, because the windows overlap: `shifted` is a
                    # view of `doubled`, so û_{i+d} collects its sums of all distances in one place.
                    source, target = linear[:width], self.linear[:width]
                    for part, window, sums in zip(
                        rows.unbind(),
                        self.windows[d:, :width].unbind(),
                        shifted[d:, :width].unbind(),
                    ):
                        source.addcmul_(part, window)
                        sums.addcmul_(part, target)
            else:
                self._descend(lex, doubled, dphi[start:], degree)
        for degree in sorted(lex, reverse=True):
            if degree > 1:
                self._descend(lex, doubled, lex[degree], degree)
        # û stood there twice, so its gradient is the sum over both.
        unit = doubled[:r].add_(doubled[r:])
        if self.layernorm:
            unit.add_(linear)
        along = (unit * self.unit).sum(0, keepdim=True)
        result = torch.addcmul(unit, self.unit, along, value=-1).mul_(self.inverse)
        if not self.layernorm:
            result.add_(linear)
            if scale is not None:
                result.addcmul_(self.unit, scale)
        return result.mul_((self.s > 0).to(result.dtype))

    def _descend(self, lex: dict[int, Tensor], doubled: Tensor, grad: Tensor, degree: int) -> None:
        """Hand the gradient of the monomials of a degree on to those of one degree less and to
        û."""
        lower, below = self.monomials[degree - 1], lex[degree - 1]
        for i, rows, begin in staircase(grad, self.features.r, degree):
            below[begin:].addcmul_(rows, self.unit[i])
            doubled[i] += (rows * lower[begin:]).sum(0)


def product(rows: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    if add:
        rows.addcmul_(left, right)
    else:
        torch.mul(left, right, out=rows)


def rectangle(rows: Tensor, r: int):
    """(first distance d, products u_i u_{i+d} by distance [distances width n], width) of degree 2,
    [r(r+1)/2 n] in all.

    The pairs {i, i+d mod r} of a distance d < r/2 are r different ones, and d and r - d give the
    same pairs: d = 0 ... ⌈r/2⌉-1 have every pair but those of distance r/2 once. There each pair
    appears twice, so half of those are kept.
    """
    full = (r + 1) // 2
    yield 0, rows[: full * r].unflatten(0, (full, r)), r
    if r % 2 == 0:
        yield full, rows[full * r :][None], r // 2


def staircase(rows: Tensor, r: int, degree: int):
    """(i, rows of the monomials with smallest index i, where those of one degree less begin) in
    lexicographic order.

    Monomials with smallest index i are u_i times all of one degree less whose indices are >= i; in
    lexicographic order these are a suffix, from `begin` on.
    """
    start, total = 0, suffix(r, degree - 1, r)
    for i in range(r):
        begin = suffix(r, degree - 1, i)
        yield i, rows[start : start + total - begin], begin
        start += total - begin
