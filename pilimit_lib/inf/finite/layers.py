"""Finite networks sampled from infinite ones: width n, Ω_l [n r] standard normal, ω a row of it.

    input layer   W = n^-½ Ω_1 Aᵀ                                            bias = n^-½ Ω bias
    hidden layer  W = n_out^-½ n_in^-½ Ω_l Σ_m Amult_m A_m φ(Ω_{l-1} B_m)ᵀ   bias = n_out^-½ Ω bias
    readout       W = n_in^-½ Σ_m Amult_m A_m φ(Ω_L B_m)ᵀ                    bias copied

Pre-activations have coordinates of order n^-½, so their norm is that of g. Gradients of every layer
but the readout are projected onto the range of Ω, G ← Ω (ΩᵀΩ)^-1 Ωᵀ G: only such updates have an
infinitely wide counterpart. That happens inside the backward pass, so that any optimiser and any
clipping sees projected gradients.
Source: Yang, Santacroce & Hu 2022, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..numerics import accumulator, direction

if TYPE_CHECKING:
    from ..layers import InfPiInputLinearReLU, InfPiLinearReLU
    from ..moments.layer import InfPiLinear


class ProjectGradient(torch.autograd.Function):
    """The identity whose gradient is projected onto the columns of `basis` [n k] (orthonormal),
    along dimension 0."""

    @staticmethod
    def forward(ctx, weight: Tensor, basis: Tensor) -> Tensor:
        ctx.save_for_backward(basis)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (basis,) = ctx.saved_tensors
        return basis @ (basis.T @ grad), None


def _build(
    layer: nn.Module,
    n_in: int,
    n_out: int,
    r: int | None,
    bias_alpha: float | None,
    layernorm: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """Give `layer` its weight [n_out n_in], bias [n_out] and, where `r` is given, a fresh ω [n_out
    r] with projection."""
    if min(n_in, n_out) < 1:
        raise ValueError(f"a layer needs positive widths, got n_in={n_in}, n_out={n_out}")
    layer.n_in, layer.n_out, layer.bias_alpha, layer.layernorm = (
        n_in,
        n_out,
        float(bias_alpha or 0),
        layernorm,
    )
    layer.project = r is not None
    layer.weight = nn.Parameter(torch.zeros(n_out, n_in, device=device, dtype=dtype))
    layer.bias = (
        nn.Parameter(torch.zeros(n_out, device=device, dtype=dtype)) if layer.bias_alpha else None
    )
    omega = basis = None
    if r is not None:
        omega = torch.randn(n_out, r, device=device, dtype=dtype)
        # Orthonormal columns with the range of Ω: Ω (ΩᵀΩ)^-1 Ωᵀ without inverting a matrix, for n <
        # r too.
        basis = torch.linalg.qr(omega.double()).Q.to(omega.dtype)
    layer.register_buffer("omega", omega)
    layer.register_buffer("basis", basis)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """x Wᵀ + bias_alpha · bias, with projected gradients."""
    weight, bias = layer.weight, layer.bias
    if layer.project:
        weight = ProjectGradient.apply(weight, layer.basis)
        bias = None if bias is None else ProjectGradient.apply(bias, layer.basis)
    h = x @ weight.T
    return h if bias is None else h + layer.bias_alpha * bias


def _copy_bias(layer: nn.Module, inf_layer: nn.Module) -> None:
    if layer.bias is not None and inf_layer.bias is not None:
        bias = inf_layer.bias.to(layer.weight)
        layer.bias.copy_(bias if layer.omega is None else layer.omega @ bias / layer.n_out**0.5)


def _description(layer: nn.Module) -> str:
    return (
        f"n_in={layer.n_in}, n_out={layer.n_out}, bias_alpha={layer.bias_alpha}, "
        f"layernorm={layer.layernorm}, "
        f"project={layer.project}"
    )


class FinPiInputLinearReLU(nn.Module):
    """The first layer of width `n_out`: data x [..., n_in] to pre-activations [..., n_out].

    Sampled from `inf_layer` where one is given, else from a freshly initialised
    InfPiInputLinearReLU(n_in, r).
    """

    def __init__(
        self,
        r: int,
        n_in: int,
        n_out: int | None = None,
        bias_alpha: float | None = 1,
        layernorm: bool = False,
        inf_layer: InfPiInputLinearReLU | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        like = None if inf_layer is None else inf_layer.A
        super().__init__()
        _build(
            self,
            n_in,
            n_in if n_out is None else n_out,
            r,
            bias_alpha,
            layernorm,
            device if like is None else like.device,
            None if like is None else like.dtype,
        )
        if inf_layer is None:
            from ..layers import InfPiInputLinearReLU

            inf_layer = InfPiInputLinearReLU(n_in, r, bias_alpha, layernorm, device)
        self.initialize(inf_layer)

    @torch.no_grad()
    def initialize(self, inf_layer: InfPiInputLinearReLU) -> None:
        """Take over weights and bias of `inf_layer`, keeping ω."""
        self.weight.copy_(self.omega @ inf_layer.A.to(self.omega).T / self.n_out**0.5)
        _copy_bias(self, inf_layer)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(self, x)

    def extra_repr(self) -> str:
        return _description(self)


class FinPiLinearReLU(nn.Module):
    """A layer of width `n_out` on pre-activations [..., n_in], to which it applies the activation
    first.

    Sampled from `inf_layer` and the ω [n_in r] of the layer below (`prev_omega`); without an
    `inf_layer`, from a freshly initialised InfPiLinearReLU(r). A readout (`output_layer`) has
    neither ω nor projection.
    """

    def __init__(
        self,
        r: int,
        n_in: int,
        n_out: int | None = None,
        bias_alpha: float | None = 1,
        output_layer: bool = False,
        layernorm: bool = False,
        inf_layer: InfPiLinearReLU | InfPiLinear | None = None,
        prev_omega: Tensor | None = None,
        nonlin: Callable[[], nn.Module] = nn.ReLU,
        device: torch.device | str | None = None,
    ) -> None:
        n_out = n_in if n_out is None else n_out
        if inf_layer is not None:
            if output_layer and n_out != inf_layer.r_out:
                raise ValueError(
                    f"the readout of the infinite network has {inf_layer.r_out} outputs, so n_out "
                    f"can't be {n_out}"
                )
            dtype, device = accumulator(inf_layer.dtype), inf_layer.device
        else:
            dtype = None
        r_out = None if output_layer else (r if inf_layer is None else inf_layer.r_out)
        super().__init__()
        _build(self, n_in, n_out, r_out, bias_alpha, layernorm, device, dtype)
        self.output_layer = output_layer
        self.nonlin = nonlin()
        if inf_layer is None:
            from ..layers import InfPiLinearReLU

            inf_layer = InfPiLinearReLU(
                r, n_out if output_layer else r, bias_alpha, output_layer, layernorm, device
            )
        self.initialize(inf_layer, prev_omega)

    @torch.no_grad()
    def initialize(
        self, inf_layer: InfPiLinearReLU | InfPiLinear, prev_omega: Tensor | None = None
    ) -> None:
        """Take over all rows and the bias of `inf_layer`, keeping ω. Without `prev_omega` the layer
        below gets a new one."""
        if prev_omega is None:
            prev_omega = torch.randn(self.n_in, inf_layer.r).to(self.weight)
        if list(prev_omega.shape) != [self.n_in, inf_layer.r]:
            raise ValueError(
                f"prev_omega must be the ω of the layer below, [{self.n_in}, {inf_layer.r}], "
                f"got {list(prev_omega.shape)}"
            )
        total = inf_layer.finite_weight(prev_omega).to(self.weight) / self.n_in**0.5
        self.weight.copy_(total if self.omega is None else self.omega @ total / self.n_out**0.5)
        _copy_bias(self, inf_layer)

    def forward(self, h: Tensor) -> Tensor:
        if self.layernorm:
            h = direction(h)[0]
        return _linear(self, self.nonlin(h))

    def extra_repr(self) -> str:
        return _description(self)
