"""Finite networks sampled from infinite ones: width n, Ω_l [n r] standard normal, ω a row of it.

    input layer   W = n^-½ Ω_1 Aᵀ                                            bias = n^-½ Ω bias
    hidden layer  W = n_out^-½ n_in^-½ Ω_l Σ_m Amult_m A_m φ(Ω_{l-1} B_m)ᵀ   bias = n_out^-½ Ω bias
    readout       W = n_in^-½ Σ_m Amult_m A_m φ(Ω_L B_m)ᵀ                    bias copied

Pre-activations have coordinates of order n^-½, so their norm is that of g. Gradients of every layer
but the readout are projected onto the range of Ω, see `projection`.
Source: Yang, Santacroce & Hu 2022, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from opt_einsum import contract
from torch import Tensor, nn

from ..entries import LoadsWhole
from ..numerics import accumulator, direction
from ..rows.initial import initial_columns_, initial_rows
from .projection import basis_of, project_gradient


class InfiniteLayer(Protocol):
    """What an infinitely wide layer must tell to be sampled: ranks in and out, and the weight of a
    finite layer before ω of the layer itself, and scaling, are multiplied to it."""

    r: int
    r_out: int
    bias: Tensor | None

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def finite_weight(self, omega: Tensor | None) -> Tensor:
        """[o n] on units with ω [n r] in the layer below; on data ([o d], no ω) in an input
        layer."""


def relu_weight(A: Tensor, Amult: Tensor, B: Tensor, omega: Tensor) -> Tensor:
    """Σ_m Amult_m A_m relu(Ω B_m)ᵀ for ω [n r] and rows A [m o], Amult [m], B [m r]: [o n]."""
    return contract("mo,m,mn->on", A, Amult, torch.relu(B @ omega.T))


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
    layer.n_in, layer.n_out = n_in, n_out
    layer.bias_alpha, layer.layernorm = float(bias_alpha or 0), layernorm
    layer.project = r is not None
    layer.weight = nn.Parameter(torch.zeros(n_out, n_in, device=device, dtype=dtype))
    layer.bias = None
    if layer.bias_alpha:
        layer.bias = nn.Parameter(torch.zeros(n_out, device=device, dtype=dtype))
    omega = basis = None
    if r is not None:
        omega = torch.randn(n_out, r, device=device, dtype=dtype)
        basis = basis_of(omega)
    layer.register_buffer("omega", omega)
    layer.register_buffer("basis", basis)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """x Wᵀ + bias_alpha · bias, with projected gradients."""
    weight, bias = layer.weight, layer.bias
    if layer.project:
        weight = project_gradient(weight, layer.basis)
        bias = None if bias is None else project_gradient(bias, layer.basis)
    h = x @ weight.T
    return h if bias is None else h + layer.bias_alpha * bias


def _copy_bias(layer: nn.Module, inf_layer: InfiniteLayer) -> None:
    if layer.bias is not None and inf_layer.bias is not None:
        bias = inf_layer.bias.to(layer.weight)
        layer.bias.copy_(bias if layer.omega is None else layer.omega @ bias / layer.n_out**0.5)


def _description(layer: nn.Module) -> str:
    return (
        f"n_in={layer.n_in}, n_out={layer.n_out}, bias_alpha={layer.bias_alpha}, "
        f"layernorm={layer.layernorm}, project={layer.project}"
    )


class FinPiInputLinearReLU(LoadsWhole):
    """The first layer of width `n_out`: data x [..., n_in] to pre-activations [..., n_out].

    Sampled from `inf_layer` where one is given, else from the start of an
    InfPiInputLinearReLU(n_in, r).
    """

    def __init__(
        self,
        r: int,
        n_in: int,
        n_out: int | None = None,
        bias_alpha: float | None = 1,
        layernorm: bool = False,
        inf_layer: InfiniteLayer | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        dtype = None
        if inf_layer is not None:
            dtype, device = inf_layer.dtype, inf_layer.device
        super().__init__()
        n_out = n_in if n_out is None else n_out
        _build(self, n_in, n_out, r, bias_alpha, layernorm, device, dtype)
        if inf_layer is None:
            self._spread(initial_columns_(self.weight.new_empty(n_in, r)).T)
        else:
            self.initialize(inf_layer)

    @torch.no_grad()
    def initialize(self, inf_layer: InfiniteLayer) -> None:
        """Take over weights and bias of `inf_layer`, keeping ω."""
        self._spread(inf_layer.finite_weight(None))
        _copy_bias(self, inf_layer)

    @torch.no_grad()
    def _spread(self, total: Tensor) -> None:
        """Take the weight that belongs to `total` [r n_in]."""
        self.weight.copy_(self.omega @ total.to(self.omega) / self.n_out**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(self, x)

    def extra_repr(self) -> str:
        return _description(self)


class FinPiLinearReLU(LoadsWhole):
    """A layer of width `n_out` on pre-activations [..., n_in], to which it applies the activation
    first.

    Sampled from `inf_layer` and the ω [n_in r] of the layer below (`prev_omega`); without an
    `inf_layer`, from the start of an InfPiLinearReLU(r). A readout (`output_layer`) has neither ω
    nor projection.
    """

    def __init__(
        self,
        r: int,
        n_in: int,
        n_out: int | None = None,
        bias_alpha: float | None = 1,
        output_layer: bool = False,
        layernorm: bool = False,
        inf_layer: InfiniteLayer | None = None,
        prev_omega: Tensor | None = None,
        nonlin: Callable[[], nn.Module] = nn.ReLU,
        device: torch.device | str | None = None,
    ) -> None:
        n_out = n_in if n_out is None else n_out
        dtype, rank = None, r
        if inf_layer is not None:
            if output_layer and n_out != inf_layer.r_out:
                raise ValueError(
                    f"the readout of the infinite network has {inf_layer.r_out} outputs, so n_out "
                    f"can't be {n_out}"
                )
            dtype, device, rank = accumulator(inf_layer.dtype), inf_layer.device, inf_layer.r_out
        super().__init__()
        omega_rank = None if output_layer else rank
        _build(self, n_in, n_out, omega_rank, bias_alpha, layernorm, device, dtype)
        self.output_layer = output_layer
        self.nonlin = nonlin()
        if inf_layer is None:
            rows = initial_rows(r, n_out if output_layer else r, output_layer)
            A, Amult, B = (part.to(device, accumulator(self.weight.dtype)) for part in rows)
            prev_omega = self._checked_omega(prev_omega, r)
            self._spread(relu_weight(A, Amult, B, prev_omega.to(B)))
        else:
            self.initialize(inf_layer, prev_omega)

    @torch.no_grad()
    def initialize(self, inf_layer: InfiniteLayer, prev_omega: Tensor | None = None) -> None:
        """Take over all rows and the bias of `inf_layer`, keeping ω. Without `prev_omega` the layer
        below gets a new one."""
        prev_omega = self._checked_omega(prev_omega, inf_layer.r)
        self._spread(inf_layer.finite_weight(prev_omega))
        _copy_bias(self, inf_layer)

    def _checked_omega(self, omega: Tensor | None, r: int) -> Tensor:
        """The ω [n_in r] of the layer below, drawn where none is given."""
        if omega is None:
            omega = torch.randn(self.n_in, r).to(self.weight)
        if list(omega.shape) != [self.n_in, r]:
            raise ValueError(
                f"prev_omega must be the ω of the layer below, [{self.n_in}, {r}], "
                f"got {list(omega.shape)}"
            )
        return omega

    @torch.no_grad()
    def _spread(self, total: Tensor) -> None:
        """Take the weight that belongs to `total` [r n_in], of a readout [o n_in]."""
        total = total.to(self.weight) / self.n_in**0.5
        self.weight.copy_(total if self.omega is None else self.omega @ total / self.n_out**0.5)

    def forward(self, h: Tensor) -> Tensor:
        if self.layernorm:
            h = direction(h)[0]
        return _linear(self, self.nonlin(h))

    def extra_repr(self) -> str:
        return _description(self)
