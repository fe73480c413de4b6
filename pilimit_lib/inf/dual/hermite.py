"""Hermite series of an activation, and the polynomial dual kernels made of it.

With orthonormal Hermite polynomials h_j and a_j = E[φ(z) h_j(z)], z ~ N(0, 1), an activation φ =
Σ_j a_j h_j has the dual kernel k(c) = Σ_j a_j² c^j. A polynomial kernel k_D(c) = Σ_{j≤D} κ_j c^j
with κ_j >= 0 is the exact dual kernel of p = Σ_j ±√κ_j h_j.
Source: Daniely, Frostig & Singer 2016, section 4; O'Donnell, Analysis of Boolean Functions, chapter
11.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "erf": torch.erf,
    "tanh": torch.tanh,
    "silu": torch.nn.functional.silu,
}
FITS = ("hermite", "minimax")

# exp(-z²/4) is below 1e-16 beyond ±12. Panels meet at multiples of 1/50, where the kinks of most
# piecewise linear activations lie: a Gauss-Hermite rule over the whole line would be off by 1e-3
# for a kink at 0. Within a panel a kink costs about 1e-6 of a coefficient and a jump 1e-4.
_REACH, _PANELS_PER_UNIT, _NODES = 14, 50, 8
_LONG = 1000  # terms by which the exact kernel is represented where a fit is judged
_NEGLIGIBLE = 1e-9  # coefficients κ_j below this are rounding of the quadrature


@dataclass(frozen=True)
class Series:
    """A polynomial dual kernel k_D(c) = Σ_j kappa_j c^j and the activation p = Σ_j coefficients_j
    h_j that it belongs to.

    `k1` is the exact kernel at 1, E[φ(z)²]; `error` bounds |k - k_D| on [-1, 1]. `natural` are the
    a_j of φ itself, which the Hermite fit takes over as `coefficients`.
    """

    activation: str
    fit: str
    kappa: tuple[float, ...]
    coefficients: tuple[float, ...]
    natural: tuple[float, ...]
    k1: float
    error: float

    @property
    def degree(self) -> int:
        return len(self.kappa) - 1

    def kernel(self, c: Tensor) -> Tensor:
        """k_D(c) for cosines `c` of any shape."""
        result = torch.zeros_like(c)
        for kappa in reversed(self.kappa):
            result = result * c + kappa
        return result


def hermite_series(
    activation: str | Callable[[Tensor], Tensor] = "relu", degree: int = 2, fit: str = "hermite"
) -> Series:
    """The polynomial kernel of degree at most `degree` that stands for `activation`.

    Args:
        activation: one of relu, gelu, erf, tanh, silu, or an elementwise function of a tensor.
        fit: "hermite" cuts the series of the activation, which keeps its first moments exact;
            "minimax" minimises max |k - k_D| on [-1, 1] over non-negative coefficients of the
            degrees that the activation has.
    """
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 0:
        raise ValueError(f"degree is {degree!r}; a whole number from 0 was expected")
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r}; one of {', '.join(FITS)} was expected")
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation is {activation!r}; a name out of {', '.join(ACTIVATIONS)}, "
                "or an elementwise function, was expected"
            )
        return _named_series(activation, degree, fit)
    if not callable(activation):
        raise TypeError(
            f"activation is a {type(activation).__name__}; a name or an elementwise function was "
            "expected"
        )
    return _series("custom", activation, degree, fit)


@lru_cache(maxsize=64)
def _named_series(name: str, degree: int, fit: str) -> Series:
    return _series(name, ACTIVATIONS[name], degree, fit)


def _series(name: str, function: Callable[[Tensor], Tensor], degree: int, fit: str) -> Series:
    terms = max(degree + 1, _LONG if fit == "minimax" else 0)
    natural, k1 = hermite_coefficients(function, terms)
    kappa = natural[: degree + 1] ** 2
    kappa[kappa < _NEGLIGIBLE * k1] = 0
    if fit == "minimax":
        kappa, error = _minimax(natural**2, k1, kappa > 0)
    else:
        error = max(0.0, k1 - float(kappa.sum()))
    if not kappa.any():
        raise ValueError(
            f"activation {name} has no part of degree {degree} or less; raise the degree"
        )
    coefficients = np.where(natural[: degree + 1] < 0, -1, 1) * np.sqrt(kappa)
    return Series(
        name,
        fit,
        tuple(kappa.tolist()),
        tuple(coefficients.tolist()),
        tuple(natural[: degree + 1].tolist()),
        k1,
        error,
    )


def hermite_coefficients(
    function: Callable[[Tensor], Tensor], terms: int
) -> tuple[np.ndarray, float]:
    """(a_0 ... a_{terms-1}, E[φ²]) of an elementwise function, by Gauss quadrature against the
    normal density."""
    node, weight = np.polynomial.legendre.leggauss(_NODES)
    edges = np.arange(-_REACH * _PANELS_PER_UNIT, _REACH * _PANELS_PER_UNIT) / _PANELS_PER_UNIT
    half = 0.5 / _PANELS_PER_UNIT
    z = (edges[:, None] + half * (1 + node)).ravel()
    # √ of the density: Hermite *functions* h_j·root stay bounded for any j
    root = np.exp(-z * z / 4) / (2 * math.pi) ** 0.25
    try:
        # a copy, because nn.SiLU(inplace=True) and its like write into it
        value = function(torch.from_numpy(z.copy()))
    except RuntimeError as error:
        raise TypeError(
            f"the activation failed on a float64 tensor ({error}); it must take one, as a module "
            "with parameters "
            "does after .double()"
        ) from error
    if not isinstance(value, Tensor) or value.shape != z.shape:
        raise TypeError(
            "the activation must map a tensor to one of the same shape, got "
            f"{type(value).__name__} "
            f"{list(getattr(value, 'shape', []))} for {list(z.shape)}"
        )
    value = value.detach().double().numpy()
    scaled = value * root
    weight = np.tile(weight * half, len(edges))
    square = scaled * scaled * weight
    k1 = float(square.sum())
    if not np.isfinite(value).all() or k1 <= 0 or square[np.abs(z) > _REACH - 1].sum() > 1e-9 * k1:
        raise ValueError(
            "the activation has no Hermite series: it must be finite, not zero everywhere, and "
            "grow slower than "
            f"exp(z²/4); E[φ²] came out as {k1:.3g}"
        )
    coefficients = np.empty(terms)
    before, now = np.zeros_like(z), root
    for j in range(terms):
        coefficients[j] = (scaled * now * weight).sum()
        before, now = now, (z * now - math.sqrt(j) * before) / math.sqrt(j + 1)
    return coefficients, k1


def _minimax(exact: np.ndarray, k1: float, allowed: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients [D+1] >= 0 that minimise max |k - k_D| on a Chebyshev grid (a linear program),
    and a bound on that error."""
    from scipy.optimize import linprog

    degree = len(allowed) - 1
    c = np.cos(np.linspace(0, math.pi, 2001))
    kernel = np.polynomial.polynomial.polyval(c, exact)
    powers = c[:, None] ** np.arange(degree + 1)
    ones = np.ones((len(c), 1))
    result = linprog(
        np.r_[np.zeros(degree + 1), 1.0],
        A_ub=np.r_[np.c_[powers, -ones], np.c_[-powers, -ones]],
        b_ub=np.r_[kernel, -kernel],
        bounds=[(0, None if ok else 0) for ok in allowed] + [(0, None)],
        method="highs",
    )
    if not result.success:
        raise ArithmeticError(f"the linear program of the minimax fit failed: {result.message}")
    kappa = result.x[:-1]
    kappa[kappa < _NEGLIGIBLE * k1] = 0
    # The tail that the long series leaves out counts in full at ±1.
    return kappa, float(np.abs(powers @ kappa - kernel).max() + max(0.0, k1 - exact.sum()))
