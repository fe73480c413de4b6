"""Multilayer perceptrons of finite width, sampled from infinite ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..numerics import direction
from ..summary import summary
from .layers import FinPiLinearReLU


def hidden(net: nn.Module, x: Tensor) -> Tensor:
    """Pre-activations that feed the readout of a multilayer perceptron: [b r] of an infinite one,
    [b n] of a finite one."""
    g = net.first_layer_alpha * net.layers[0](x)
    for layer in net.layers[1:-1]:
        g = layer(g)
    return g


class FinPiMLPSample(nn.Module):
    """A network of width `n` sampled from `infnet`, whose training follows the infinite one at
    distance of order n^-½.

    Needs the optimiser settings of `infnet`, an InfMLP: `param_groups` and `PiSGD` treat both kinds
    alike.
    """

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
