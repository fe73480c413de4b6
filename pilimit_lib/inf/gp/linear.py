"""Gaussian posteriors over weights that enter linearly, from sums over samples only.

    f(x) = ⟨ψ(x), w⟩ ,  w ~ N(0, σ²/ρ) ,  y = f(x) + N(0, σ²)         ψ [P], w [P o]

With G = Σ ψψᵀ = U diag(λ) Uᵀ and z = Uᵀ Σ ψyᵀ everything is closed form: mean U z/(λ + ρ),
variance of f σ² Σ_i (Uᵀψ)_i²/(λ_i + ρ), and

    log p(y) = -½ [n log 2πσ² + (|y|² - Σ_i z_i²/(λ_i + ρ))/σ² + Σ_i log(1 + λ_i/ρ)]

in O(nP² + P³) and memory O(P²), whatever the number n of samples. Above `MAX_DENSE` features G is
taken on its leading eigenvectors, found by randomised subspace iteration in O(n P rank); the other
directions keep their prior variance, so the posterior is never too sure there.

Index legend: n samples, P features, q directions kept, o outputs. Sources: MacKay 1992; Halko,
Martinsson & Tropp 2011.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_DENSE = 4096  # features up to which G is decomposed whole: 128 MiB, and minutes of one core
RANK = 512
_OVERSAMPLING, _PASSES = 16, 2
# ρ is sought between these multiples of the largest eigenvalue, on a grid that then closes in
_RANGE, _GRID, _ZOOMS = (-10.0, 4.0), 57, 5

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class LinearPosterior:
    """The posterior of w, and what the data say about noise and prior. All tensors are float64.

    Args:
        basis: U [P q], orthonormal columns; eigenvalues: λ [q]; projected: z [q o].
        square: |y|² [o]; samples: n.
        ridge: ρ [o], noise over prior variance; noise: σ² [o].
    """

    basis: Tensor
    eigenvalues: Tensor
    projected: Tensor
    square: Tensor
    samples: int
    ridge: Tensor
    noise: Tensor

    @property
    def mean(self) -> Tensor:
        """Of w: [P o]."""
        return self.basis @ (self.projected / (self.eigenvalues[:, None] + self.ridge))

    @property
    def prior(self) -> Tensor:
        """Prior variance σ²/ρ of each weight: [o]."""
        return self.noise / self.ridge

    def variance(self, psi: Tensor) -> Tensor:
        """Of f, without the noise, at features ψ [b P]: [b o]."""
        psi = psi.double()
        inside = (psi @ self.basis).square()
        left = (psi.square().sum(1) - inside.sum(1)).clamp(min=0)
        known = inside @ (1 / (self.eigenvalues[:, None] + self.ridge))
        return self.noise * (known + left[:, None] / self.ridge)

    def log_marginal_likelihood(self) -> Tensor:
        """log p(y) of each output: [o]."""
        return _evidence(self, self.ridge, self.noise)


def linear_posterior(
    batches: Batches,
    P: int,
    *,
    ridge: float | None = None,
    noise: float | None = None,
    max_dense: int = MAX_DENSE,
    rank: int = RANK,
) -> LinearPosterior:
    """The posterior given samples; ρ and σ² maximise the marginal likelihood where they are not
    given.

    `batches()` iterates over all (ψ [b P], y [b o]), and is called once, or four times where P
    exceeds `max_dense`. The random directions of that case come from torch's generator.
    """
    for name, value in (("ridge", ridge), ("noise", noise)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; a positive number was expected, or None")
    span = None if P <= max_dense else _leading(batches, P, min(P, rank + _OVERSAMPLING))
    gram, cross, square, samples = _sums(batches, P, span)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    basis = vectors if span is None else span @ vectors
    nothing = torch.ones_like(square)
    found = LinearPosterior(
        basis, eigenvalues.clamp(min=0), vectors.T @ cross, square, samples, nothing, nothing
    )
    chosen = _best_ridge(found, noise) if ridge is None else ridge * nothing
    sigma = _best_noise(found, chosen) if noise is None else noise * nothing
    return LinearPosterior(
        basis, found.eigenvalues, found.projected, square, samples, chosen, sigma
    )


def _sums(batches: Batches, P: int, span: Tensor | None) -> tuple[Tensor, Tensor, Tensor, int]:
    """(G [q q], Σ ψyᵀ [q o], Σ y² [o], n) of ψ, or of its coordinates in `span` [P q]."""
    gram, cross, square, samples = 0, 0, 0, 0
    for psi, y in batches():
        if psi.ndim != 2 or psi.shape[1] != P or y.ndim != 2 or len(y) != len(psi):
            raise ValueError(
                f"a batch of features {list(psi.shape)} and targets {list(y.shape)}; expected "
                f"[b, {P}] and [b, outputs]"
            )
        psi, y = psi.double(), y.double()
        if span is not None:
            psi = psi @ span
        gram, cross = gram + psi.T @ psi, cross + psi.T @ y
        square, samples = square + y.square().sum(0), samples + len(y)
    if not samples:
        raise ValueError("there are no samples: a posterior needs at least one")
    return gram, cross, square, samples


def _leading(batches: Batches, P: int, q: int) -> Tensor:
    """Orthonormal [P q] that nearly spans the leading eigenvectors of G."""
    span = torch.randn(P, q, dtype=torch.float64)
    for _ in range(1 + _PASSES):
        span = torch.linalg.qr(span)[0]
        image = torch.zeros_like(span)
        for psi, _ in batches():
            psi = psi.double()
            image += psi.T @ (psi @ span)
        span = image
    return torch.linalg.qr(span)[0]


def _best_noise(found: LinearPosterior, ridge: Tensor) -> Tensor:
    """σ² of the highest marginal likelihood for ρ [... o]: the mean of what is left of |y|²."""
    explained = (found.projected.square() / (found.eigenvalues[:, None] + ridge[..., None, :])).sum(
        -2
    )
    # Rounding must not make it zero where the features can say everything.
    floor = (1e-12 * found.square / found.samples).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.maximum((found.square - explained) / found.samples, floor)


def _evidence(found: LinearPosterior, ridge: Tensor, noise: Tensor) -> Tensor:
    left = _best_noise(found, ridge) * found.samples
    volume = torch.log1p(found.eigenvalues[:, None] / ridge[..., None, :]).sum(-2)
    return -0.5 * (found.samples * (2 * math.pi * noise).log() + left / noise + volume)


def _best_ridge(found: LinearPosterior, noise: float | None) -> Tensor:
    """ρ [o] of the highest marginal likelihood: a grid of powers of ten that closes in."""
    top = float(found.eigenvalues.max())
    if not top:
        return torch.ones_like(found.square)
    low, high = (torch.full_like(found.square, end) for end in _RANGE)
    for _ in range(_ZOOMS):
        exponents = torch.stack([low + (high - low) * i / (_GRID - 1) for i in range(_GRID)])
        ridges = top * 10**exponents
        noises = _best_noise(found, ridges) if noise is None else noise + 0 * ridges
        at = _evidence(found, ridges, noises).argmax(0, keepdim=True)
        best, step = exponents.gather(0, at)[0], (high - low) / (_GRID - 1)
        low, high = best - step, best + step
    return top * 10**best
