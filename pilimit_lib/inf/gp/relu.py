"""Kernels of infinitely wide ReLU networks that learn no features: NNGP and NTK.

NTK parametrisation: weights N(0, varw), biases N(0, varb), inputs scaled by 1/√d. With
Σ_1 = ⟨x, y⟩/d, per hidden layer l:

    Σ ← varw_l·Σ + varb_l ,  c its correlation ,  E[φφ] = √(Σ_xx Σ_yy)·k(c) ,  E[φ'φ'] = k'(c)
    Θ_1 = lrw_1·⟨x, y⟩/d + lrb_1
    Θ_{l+1} = lrw_{l+1}·E[φφ]_l + lrb_{l+1} + varw_{l+1}·E[φ'φ']_l·Θ_l

Index legend: a, b samples, d data. Sources: Cho & Saul 2009; Lee et al. 2018; Jacot et al. 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dual.relu import relu_k, relu_k_prime

PerLayer = float | Sequence[float]


@dataclass(frozen=True)
class ReLUKernel:
    """The kernel K(x [a d], y [b d]) -> [a b] of a ReLU MLP with `depth` hidden layers, in the
    limit of infinite width.

    Args:
        ntk: the tangent kernel Θ_{depth+1}; otherwise the NNGP: E[φφ] after the last hidden layer,
            that is the covariance of a readout whose weights have variance 1 and which has no bias.
        varw, varb: variances of weights and biases; lrw, lrb: learning-rate multipliers of weights
            and biases. Each is one number or one per layer of weights, `depth + 1` with the
            readout's.
        lrb: default None is 1 in layers whose varb is not zero, and 0 in the others, which then
        have no bias.
        as_published: repeat the NTK of the paper's own code, which takes k' at the correlation
            *after* the ReLU and twice. The published figures were made with it; it is the tangent
            kernel of no network.
    """

    depth: int
    ntk: bool = False
    varw: PerLayer = 1.0
    varb: PerLayer = 0.0
    lrw: PerLayer = 1.0
    lrb: PerLayer | None = None
    as_published: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.depth, int) or self.depth < 1:
            raise ValueError(
                f"depth counts hidden layers and is {self.depth!r}; it must be at least 1"
            )
        for name in ("varw", "varb", "lrw", "lrb"):
            values = self._per_layer(name)
            if len(values) != self.depth + 1 or not all(
                0 <= value < float("inf") for value in values
            ):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; expected one number that is not negative, "
                    "or one for each "
                    f"of the {self.depth + 1} layers of weights (depth {self.depth} and the "
                    "readout)"
                )
        if not any(self._per_layer("varw")[: self.depth]) and not any(
            self._per_layer("varb")[: self.depth]
        ):
            raise ValueError(
                "all variances are zero: the network is the zero function and has no kernel"
            )
        if self.as_published and not self.ntk:
            raise ValueError("as_published says how the NTK is computed; there is only one NNGP")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Entries in float64: near-by samples have correlations so close to 1 that float32 loses
        half the digits of k'. `InFloat32` computes them faster."""
        return self.entries(x.double(), y.double())

    def entries(self, x: Tensor, y: Tensor) -> Tensor:
        """The kernel in the precision of x and y."""
        x, y = (samples.reshape(len(samples), -1) for samples in (x, y))
        if x.shape[1] != y.shape[1]:
            raise ValueError(
                f"samples of {x.shape[1]} and {y.shape[1]} numbers; both sides need the same"
            )
        cov = x @ y.T / x.shape[1]
        own_x, own_y = x.square().mean(1)[:, None], y.square().mean(1)
        slope = _slope_as_published if self.as_published else _slope
        settings = [self._per_layer(name) for name in ("varw", "varb", "lrw", "lrb")]
        return propagated(cov, own_x, own_y, *settings, self.ntk, slope=slope)

    def _per_layer(self, name: str) -> tuple[float, ...]:
        value = getattr(self, name)
        if name == "lrb" and value is None:
            return tuple(float(varb > 0) for varb in self._per_layer("varb"))
        return tuple(value) if isinstance(value, Sequence) else (float(value),) * (self.depth + 1)


@dataclass(frozen=True)
class InFloat32:
    """The same kernel computed in float32: about half the time. Correlations near 1 lose half their
    digits in the NTK, and ridges must stay above that: ask for the `error` on your data."""

    kernel: ReLUKernel

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.kernel.entries(x.float(), y.float())

    def error(self, x: Tensor, samples: int = 256) -> float:
        """The largest difference from float64 among pairs of so many of the samples x [a d], evenly
        spaced, in units of the mean diagonal: what a ridge is measured in."""
        some = x[:: max(1, len(x) // samples)][:samples]
        exact = self.kernel(some, some)
        difference = (self(some, some).double() - exact).abs().max()
        return float(difference / exact.diagonal().mean())


def propagated(
    cov: Tensor,
    own_x: Tensor,
    own_y: Tensor,
    varw: Sequence[float | Tensor],
    varb: Sequence[float | Tensor],
    lrw: Sequence[float | Tensor],
    lrb: Sequence[float | Tensor],
    ntk: bool,
    *,
    k: Callable[[Tensor], Tensor] = relu_k,
    slope: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Σ or, with `ntk`, Θ behind the last hidden layer, from ⟨x, y⟩/d `cov`, |x|²/d `own_x` and
    |y|²/d `own_y`, of shapes that broadcast; `slope(c, k)` is k' there."""
    theta = lrw[0] * cov + lrb[0]
    for l in range(len(varw) - 1):
        cov, own_x, own_y = (varw[l] * value + varb[l] for value in (cov, own_x, own_y))
        size = own_x.sqrt() * own_y.sqrt()
        c = cov / torch.where(size > 0, size, 1)
        dual = k(c)
        cov, own_x, own_y = size * dual, own_x / 2, own_y / 2
        if ntk:
            theta = lrw[l + 1] * cov + lrb[l + 1] + varw[l + 1] * slope(c, dual) * theta
    return theta if ntk else cov


def _slope(c: Tensor, dual: Tensor) -> Tensor:
    return relu_k_prime(c)


def _slope_as_published(c: Tensor, dual: Tensor) -> Tensor:
    return 2 * relu_k_prime(2 * dual)
