"""NNGP and NTK of networks with other activations than ReLU, whose pair expectations depend on
variances and not only on the correlation.

For u, v jointly normal with variances p, q and covariance c, K = E[φ(u) φ(v)] and by Price's
theorem K' = ∂K/∂c = E[φ'(u) φ'(v)]. Closed form for relu, erf and gelu; of tanh by Gauss-Hermite
quadrature. Index legend: a, b samples, d data. Sources: Williams 1997 (erf); Cho & Saul 2009
(relu); gelu by Stein's lemma, u φ(u) standing for -∂φ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..dual.relu import relu_k, relu_k_prime

Dual = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

NODES = 48  # per dimension; tanh is then right to 1e-6 for variances up to 4


def relu(c: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(K, K') of max(u, 0)."""
    size = p.sqrt() * q.sqrt()
    correlation = c / torch.where(size > 0, size, 1)
    return size * relu_k(correlation), relu_k_prime(correlation)


def erf(c: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(K, K') of erf(u)."""
    square = (1 + 2 * p) * (1 + 2 * q)
    K = 2 / math.pi * (2 * c / square.sqrt()).clamp(-1, 1).asin()
    return K, 4 / math.pi / (square - 4 * c * c).sqrt()


def gelu(c: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(K, K') of u P(z ≤ u)."""
    square = (1 + p) * (1 + q)
    rest = square - c * c
    both = 0.25 + (c / square.sqrt()).clamp(-1, 1).asin() / (2 * math.pi)
    density = 1 / (2 * math.pi * rest.sqrt())
    mixed = 1 / (1 + p) + 1 / (1 + q) - 1
    inner = p * q + c * c * mixed
    return c * both + inner * density, both + density * (c + 2 * c * mixed + inner * c / rest)


def tanh(c: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(K, K') of tanh(u), node by node."""
    c, p, q = torch.broadcast_tensors(c, p, q)
    nodes, weights = _rule()
    left, right = p.sqrt(), q.sqrt()
    size = left * right
    correlation = (c / torch.where(size > 0, size, 1)).clamp(-1, 1)
    other = (1 - correlation * correlation).sqrt()
    K, slope = torch.zeros_like(c), torch.zeros_like(c)
    z = torch.as_tensor(nodes).to(c)
    w = torch.as_tensor(weights).to(c)
    for node, weight in zip(nodes.tolist(), weights.tolist()):
        u = (left * node).tanh()
        v = (right[..., None] * (correlation[..., None] * node + other[..., None] * z)).tanh()
        K += weight * u * (v @ w)
        slope += weight * (1 - u * u) * ((1 - v * v) @ w)
    return K, slope


@lru_cache(maxsize=1)
def _rule() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for the standard normal density."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return nodes, weights / math.sqrt(2 * math.pi)


DUALS: dict[str, Dual] = {"relu": relu, "erf": erf, "gelu": gelu, "tanh": tanh}


@dataclass(frozen=True)
class ActivationKernel:
    """The kernel K(x [a d], y [b d]) -> [a b] of an MLP with `depth` hidden layers in the limit of
    infinite width: NNGP or, with `ntk`, NTK; conventions as in `ReLUKernel`, with the same
    variances in every layer. Entries are float64.

    Args:
        activation: relu, erf, gelu or tanh. varw, varb: variances of weights and biases; biases
            are trained where their variance is not 0.
    """

    depth: int
    activation: str = "gelu"
    ntk: bool = False
    varw: float = 1.0
    varb: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.depth, int) or self.depth < 1:
            raise ValueError(
                f"depth counts hidden layers and is {self.depth!r}; it must be at least 1"
            )
        if self.activation not in DUALS:
            raise ValueError(
                f"activation is {self.activation!r}; one of {', '.join(DUALS)} was expected"
            )
        for name in ("varw", "varb"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it may not be negative")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = (samples.reshape(len(samples), -1).double() for samples in (x, y))
        if x.shape[1] != y.shape[1]:
            raise ValueError(
                f"samples of {x.shape[1]} and {y.shape[1]} numbers; both sides need the same"
            )
        dual, trained = DUALS[self.activation], float(self.varb > 0)
        cov = x @ y.T / x.shape[1]
        own_x, own_y = x.square().mean(1)[:, None], y.square().mean(1)
        theta = cov + trained
        for _ in range(self.depth):
            cov, own_x, own_y = (self.varw * value + self.varb for value in (cov, own_x, own_y))
            cov, slope = dual(cov, own_x, own_y)
            own_x, own_y = (dual(own, own, own)[0] for own in (own_x, own_y))
            theta = cov + trained + self.varw * slope * theta
        return theta if self.ntk else cov
