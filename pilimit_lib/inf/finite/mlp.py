"""Multilayer perceptrons of finite width, sampled from infinite ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.architecture import ALPHAS, KEY, built, decoded, dtype_of
from ..checkpoints.network import SavedNetwork
from ..numerics import direction
from ..summary import summary
from .activation import TruncatedActivation
from .layers import FinPiInputLinearReLU, FinPiLinearReLU
from .projection import projection_misfits, projections, set_projections


def hidden(net: nn.Module, x: Tensor) -> Tensor:
    """Pre-activations that feed the readout of a multilayer perceptron: [b r] of an infinite one,
    [b n] of a finite one."""
    g = scaled(net.first_layer_alpha, net.layers[0](x))
    for layer in net.layers[1:-1]:
        g = layer(g)
    return g


def scaled(alpha: float, values: Tensor) -> Tensor:
    """alpha · values; those themselves where alpha is 1, as it mostly is."""
    return values if alpha == 1 else alpha * values


class FinPiMLPSample(SavedNetwork):
    """A network of width `n` sampled from `infnet`, whose training follows the infinite one at
    distance of order n^-½.

    Needs the optimiser settings of `infnet`, an InfMLP: `param_groups` and `PiSGD` treat both kinds
    alike.
    """

    taken = (*ALPHAS, "layernorm")

    def __init__(self, infnet: nn.Module, n: int) -> None:
        super().__init__()
        self.n = n
        self.d_in = infnet.d_in
        self.d_out = infnet.d_out
        self.r = infnet.r
        self.L = infnet.L
        self.first_layer_alpha = infnet.first_layer_alpha
        self.last_layer_alpha = infnet.last_layer_alpha
        self.bias_alpha = infnet.bias_alpha
        self.last_bias_alpha = infnet.last_bias_alpha
        self.layernorm = infnet.layernorm
        self.kernel_output: Tensor | None = None
        self.layers = nn.ModuleList([infnet.layers[0].sample(infnet.d_in, n)])
        for layer in infnet.layers[1:]:
            self.layers.append(layer.sample(n, n, prev_omega=self.layers[-1].omega))

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], device: torch.device | str | None = None
    ) -> FinPiMLPSample:
        """Build the network that `state` came from and load it."""
        if KEY not in state:
            raise ValueError(
                "the checkpoint holds no architecture of a FinPiMLPSample; sample a network of the "
                "same shape, then load_state_dict"
            )
        settings = decoded(state[KEY])
        plan = built(Plan, {name: settings.get(name) for name in Plan.__dataclass_fields__})
        net = cls(plan, plan.n).to(device, dtype_of(state, "layers.0.weight"))
        net.load_state_dict(state)
        return net

    def architecture(self) -> dict[str, Any]:
        """Sizes, multipliers, the coefficients of each layer's activation (None: ReLU), and which
        layers project their gradients."""
        names = ("n", "d_in", "d_out", "r", "L", *ALPHAS, "layernorm")
        found = {name: getattr(self, name) for name in names}
        return found | {"units": _units(self), "project": projections(self)}

    def differences(self, settings: Mapping[str, Any]) -> Iterator[str]:
        if settings.get("units") != _units(self):
            yield (
                "the activation is another one: coefficients "
                f"{settings.get('units')!r:.80} in the checkpoint, {_units(self)!r:.80} here"
            )
        yield from projection_misfits(self, settings)

    def set_extra_state(self, state: Any) -> None:
        super().set_extra_state(state)
        set_projections(self, decoded(state))
        for layer in self.layers:
            layer.layernorm = self.layernorm

    def forward(self, x: Tensor, save_kernel_output: bool = False) -> Tensor:
        """Outputs [b d_out]. `save_kernel_output` keeps `embedding(x)` in `self.kernel_output`."""
        h = hidden(self, x)
        if save_kernel_output:
            self.kernel_output = direction(h)[0]
        return self.last_layer_alpha * self.layers[-1](h)

    def embedding(self, x: Tensor) -> Tensor:
        """Directions [b n] of the pre-activations that feed the readout."""
        return direction(hidden(self, x))[0]

    @torch.no_grad()
    def gaussian_init_(self) -> FinPiMLPSample:
        """Make this the μ-net: independent Gaussian weights, gradients not projected.

        Weights keep the norm of a pre-activation from layer to layer as n → ∞: variance r/(n d) in
        the input layer (columns of A have norm 1) and 2/n in hidden ones; the readout stays as
        sampled and biases become 0.
        """
        for layer in self.layers[:-1]:
            layer.project = False
            hidden = isinstance(layer, FinPiLinearReLU)
            variance = 2 / layer.n_in if hidden else self.r / (self.n * self.d_in)
            layer.weight.normal_(std=variance**0.5)
            if layer.bias is not None:
                layer.bias.zero_()
        return self

    def __repr__(self) -> str:
        settings = {name: getattr(self, name) for name in ("n", "d_in", "d_out", "r", "L")}
        return summary(self, settings | ({"layernorm": True} if self.layernorm else {}))


@dataclass(frozen=True)
class Plan:
    """Enough of an infinite network to make finite ones of its shape, with weights to be
    loaded."""

    n: int
    d_in: int
    d_out: int
    r: int
    L: int
    first_layer_alpha: float
    last_layer_alpha: float
    bias_alpha: float
    last_bias_alpha: float
    layernorm: bool
    units: tuple[tuple[float, ...] | None, ...]

    def __post_init__(self) -> None:
        sizes = (self.n, self.d_in, self.d_out, self.r, self.L + 1)
        if not all(type(size) is int and size > 0 for size in sizes):
            raise TypeError(f"sizes are {sizes}")
        if len(self.units) != self.L + 1:
            raise TypeError(f"{len(self.units)} activations for {self.L + 1} layers")

    @property
    def layers(self) -> list[_PlannedLayer]:
        return [_PlannedLayer(self, number) for number in range(self.L + 2)]


@dataclass(frozen=True)
class _PlannedLayer:
    plan: Plan
    number: int

    def sample(
        self, n_in: int, n_out: int, prev_omega: Tensor | None = None
    ) -> FinPiInputLinearReLU | FinPiLinearReLU:
        plan, last = self.plan, self.number == self.plan.L + 1
        if not self.number:
            return FinPiInputLinearReLU(plan.r, n_in, n_out, plan.bias_alpha, plan.layernorm)
        coefficients = plan.units[self.number - 1]
        return FinPiLinearReLU(
            plan.r,
            n_in,
            plan.d_out if last else n_out,
            plan.last_bias_alpha if last else plan.bias_alpha,
            last,
            plan.layernorm,
            prev_omega=prev_omega,
            nonlin=nn.ReLU if coefficients is None else partial(TruncatedActivation, coefficients),
        )


def _units(net: nn.Module) -> tuple[tuple[float, ...] | None, ...]:
    return tuple(getattr(layer.nonlin, "coefficients", None) for layer in net.layers[1:])
