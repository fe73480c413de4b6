"""Finite convolutions sampled from infinite ones: n channels, Ω [n r] standard normal, shared by
all positions and offsets.

    input layer   W_δ = n^-½ Ω A_δ
    hidden layer  W_δ = n_out^-½ n_in^-½ Ω_out Σ_m Amult_m A_{m,δ} p(Ω_in B_m)ᵀ
    readout       W_δ = n_in^-½ Σ_m Amult_m A_{m,δ} p(Ω_in B_m)ᵀ
    bias          n_out^-½ Ω_out bias; a readout's is copied

The activation is `TruncatedActivation`, at each position along the channels. Gradients of every
layer but the readout are projected onto the range of Ω_out, see `finite.projection`. Layers whose
outputs are summed must share Ω_out: pass the one `omega` to both.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..entries import LoadsWhole
from ..finite.layers import InfiniteLayer
from ..finite.projection import basis_of, project_gradient
from ..numerics import accumulator, direction
from .geometry import Geometry, check_map, convolve, describe


class InfiniteConv(InfiniteLayer, Protocol):
    """What an infinitely wide convolution must tell to be sampled. `finite_weight` gives
    [o n kh kw], from ω [n r], or [o c kh kw] of an input layer."""

    geometry: Geometry
    bias_alpha: float
    layernorm: bool
    output_layer: bool

    def finite_activation(self) -> nn.Module | None:
        """What a finite layer applies to its input first; None where that are images."""


class FinPiConv2d(LoadsWhole):
    """A convolution with n_out channels that tends to `inf_layer` as widths grow: an input layer, a
    hidden one or a readout.

    Args:
        inf_layer: the infinitely wide layer; n_in: channels that come in (of an input layer: those
        of the images).
        n_out: channels that go out; a readout keeps those of `inf_layer`.
        prev_omega [n_in r]: ω of the layer below, which an input layer lacks. omega [n_out r_out]:
        of this layer, default fresh.
    """

    def __init__(
        self,
        inf_layer: InfiniteConv,
        n_in: int,
        n_out: int | None = None,
        prev_omega: Tensor | None = None,
        omega: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.output_layer = inf_layer.output_layer
        self.n_in, self.n_out = n_in, inf_layer.r_out if self.output_layer else n_out or n_in
        self.geometry, self.bias_alpha = inf_layer.geometry, inf_layer.bias_alpha
        self.layernorm, self.project = inf_layer.layernorm, not self.output_layer
        self.nonlin = inf_layer.finite_activation()
        self._check(inf_layer, prev_omega, omega)
        dtype, device = accumulator(inf_layer.dtype), inf_layer.device
        like = torch.empty(0, device=device, dtype=dtype)
        basis = None
        if self.project:
            if omega is None:
                omega = torch.randn(self.n_out, inf_layer.r_out).to(like)
            else:  # a copy of one that is shared: a file of tensors can't hold one twice
                omega = omega.clone()
            basis = basis_of(omega).to(like)
        self.register_buffer("omega", omega if self.project else None)
        self.register_buffer("basis", basis)
        self.weight = nn.Parameter(like.new_zeros(self.n_out, self.n_in, *self.geometry.kernel))
        self.bias = None if inf_layer.bias is None else nn.Parameter(like.new_zeros(self.n_out))
        self.initialize(inf_layer, prev_omega)

    def _check(
        self, inf_layer: InfiniteConv, prev_omega: Tensor | None, omega: Tensor | None
    ) -> None:
        if min(self.n_in, self.n_out) < 1:
            raise ValueError(
                f"a layer needs positive widths, got n_in={self.n_in}, n_out={self.n_out}"
            )
        if self.nonlin is None and self.n_in != inf_layer.r:
            raise ValueError(
                f"the images have {inf_layer.r} channels, so n_in can't be {self.n_in}"
            )
        below = None if prev_omega is None else list(prev_omega.shape)
        if self.nonlin is not None and below != [self.n_in, inf_layer.r]:
            raise ValueError(
                f"prev_omega must be the ω of the layer below, [{self.n_in}, {inf_layer.r}], got "
                f"{below}"
            )
        if omega is not None and list(omega.shape) != [self.n_out, inf_layer.r_out]:
            raise ValueError(
                f"omega must be [{self.n_out}, {inf_layer.r_out}], got {list(omega.shape)}; layers "
                "whose outputs are summed have the same rank and width"
            )

    @torch.no_grad()
    def initialize(self, inf_layer: InfiniteConv, prev_omega: Tensor | None = None) -> None:
        """Take over weights and bias of `inf_layer`, keeping ω."""
        total = inf_layer.finite_weight(prev_omega).to(self.weight)
        if self.nonlin is not None:
            total = total / self.n_in**0.5
        self.weight.copy_(self._spread(total))
        if self.bias is not None:
            self.bias.copy_(self._spread(inf_layer.bias.to(self.weight)))

    def _spread(self, values: Tensor) -> Tensor:
        """n^-½ Ω values along the first dimension; a readout's stay as they are."""
        if self.output_layer:
            return values
        return torch.tensordot(self.omega, values, 1) / self.n_out**0.5

    def forward(self, h: Tensor) -> Tensor:
        check_map(self, h, self.n_in, "channels", self.geometry)
        weight, bias = self.weight, self.bias
        if self.project:
            weight = project_gradient(weight.flatten(1), self.basis).view_as(weight)
            bias = None if bias is None else project_gradient(bias, self.basis)
        if self.nonlin is not None:
            h = h.movedim(-3, -1)
            if self.layernorm:
                h = direction(h)[0]
            h = self.nonlin(h).movedim(-1, -3)
            if self.geometry.pool != (1, 1):
                h = F.avg_pool2d(h, self.geometry.pool)
        return convolve(self.geometry, h, weight, bias, self.bias_alpha)

    def extra_repr(self) -> str:
        return (
            f"n_in={self.n_in}, n_out={self.n_out}, {describe(self.geometry)}, "
            f"bias_alpha={self.bias_alpha}, "
            f"layernorm={self.layernorm}, project={self.project}"
        )
