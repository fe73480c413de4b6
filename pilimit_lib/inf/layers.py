"""Infinitely wide layers as rows. A layer hands on *pre-activations*; the ReLU belongs to the layer
that receives them.

    input layer    g = x A + bias_alpha · bias                                     A [d r]
    π-layer        g_out = s · Σ_m Amult_m A_m k(⟨B_m, ĝ⟩) + bias_alpha · bias
                   A [m o], Amult [m], B [m r]

Training appends one row per sample and step: see `PiSGD`. Source: Yang, Santacroce & Hu 2022.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .bias import BiasedLayer, bias_misfits, bias_parameter, check_sizes, take_bias_alpha
from .finite.layers import FinPiInputLinearReLU, FinPiLinearReLU, relu_weight
from .moments.autograd import moments_output
from .moments.folded import FoldedRows
from .moments.layer import InfPiLinear, to_moments
from .numerics import accumulator
from .rows.autograd import inf_linear
from .rows.compress import compress
from .rows.initial import initial_columns_, initial_rows
from .rows.layer import RowLayer
from .rows.limits import RowLimits
from .rows.merge import Report, merge

__all__ = ["FinPiInputLinearReLU", "FinPiLinearReLU", "InfPiInputLinearReLU", "InfPiLinearReLU"]


class InfPiInputLinearReLU(BiasedLayer):
    """The first layer of an infinitely wide network: data x [..., d] to pre-activations g [..., r].
    An ordinary linear map.

    Args:
        r: size of the data (the original's name for it; `d` in the formulas).
        r_out: rank of the pre-activations, default `r`.
        bias_alpha: multiplier of the bias; 0 or None means no bias.
        layernorm: kept for the finite networks that are sampled from this layer; the next layer
        applies it.
    """

    def __init__(
        self,
        r: int,
        r_out: int | None = None,
        bias_alpha: float | None = 1,
        layernorm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.r = r
        self.r_out = r if r_out is None else r_out
        self.bias_alpha = float(bias_alpha or 0)
        self.layernorm = layernorm
        check_sizes(r, self.r_out)
        self.A = nn.Parameter(torch.empty(r, self.r_out, device=device, dtype=dtype))
        self.bias = bias_parameter(self.bias_alpha, self.r_out, device, dtype)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Columns of A uniform on the unit sphere, bias 0."""
        initial_columns_(self.A)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.r:
            raise ValueError(
                f"InfPiInputLinearReLU expects data [..., {self.r}], got {list(x.shape)}; flatten "
                "images first"
            )
        g = x @ self.A
        return g if self.bias is None else g + self.bias_alpha * self.bias

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    @property
    def device(self) -> torch.device:
        return self.A.device

    def finite_weight(self, omega: Tensor | None) -> Tensor:
        """[r_out d] on data, before a finite layer's ω and scaling."""
        return self.A.T

    def sample(self, n_in: int | None = None, n_out: int = 1024) -> FinPiInputLinearReLU:
        """A finite layer of width `n_out` that computes the same function as n_out → ∞. `n_in` is
        the size of the data."""
        if n_in not in (None, self.r):
            raise ValueError(f"the data have {self.r} features, so n_in can't be {n_in}")
        return FinPiInputLinearReLU(
            self.r_out, self.r, n_out, self.bias_alpha, self.layernorm, inf_layer=self
        )

    def extra_repr(self) -> str:
        return (
            f"d={self.r}, r={self.r_out}, bias_alpha={self.bias_alpha}, layernorm={self.layernorm}"
        )


class InfPiLinearReLU(RowLayer):
    """An infinitely wide layer that learns features: pre-activations g [..., r] to pre-activations
    [..., o].

    `A` [m o], `Amult` [m] and `B` [m r] are parameters to torch, but a step *appends* to them
    instead of adding. `origin` [m] says which sample made each row (-1: unknown), where the forward
    pass ran inside `with batch(ids)`. The backward pass leaves the rows to come in `pending`;
    freezing `A` (`requires_grad_(False)`) stops that.

    Args:
        r: rank of the pre-activations that come in; r_out: of those that go out, default `r`.
        bias_alpha: multiplier of the bias; 0 or None means no bias.
        output_layer: a readout, whose A starts at zero.
        layernorm: use the direction of g only.
        dtype: of the bias; row_dtype: of A and B as stored: float32, float16, bfloat16, float64, or
            int8 with a scale per row (sums are float32 or better, Amult too).
        row_budget: keep the newest so many rows exact and fold older ones into moments of this
            `degree` and `fit` (see `hermite_series`), held in `folded`. merge: add a new row to one
            of the same sample if their directions have a larger cosine than this; the forward pass
            must run inside `with batch(ids)`. Both happen in `PiSGD.step`, and `limits` keeps the
            tally.
    """

    shardable = True
    also_loads = (*RowLayer.also_loads, "bias", "bias_alpha")

    def __init__(
        self,
        r: int,
        r_out: int | None = None,
        bias_alpha: float | None = 1,
        output_layer: bool = False,
        layernorm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        row_dtype: torch.dtype | None = None,
        row_budget: int | None = None,
        merge: float | None = None,
        degree: int = 2,
        fit: str = "hermite",
    ) -> None:
        row_dtype = row_dtype or dtype or torch.get_default_dtype()
        super().__init__(r, r if r_out is None else r_out, row_dtype, device)
        self.bias_alpha = float(bias_alpha or 0)
        self.layernorm = layernorm
        self.output_layer = output_layer
        if row_budget is not None or merge is not None:
            self.limits = RowLimits(row_budget, merge).to(device)
        if row_budget is not None:
            precision = accumulator(row_dtype)
            self.folded = FoldedRows(r, self.r_out, degree, fit, device, precision)
        self.bias = bias_parameter(self.bias_alpha, self.r_out, device, dtype)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """The rows of `initial_rows`, none pending or folded; bias 0."""
        self.set_rows(*initial_rows(self.r, self.r_out, self.output_layer))
        self.pending.clear()
        for module in (self.limits, self.folded):
            if module is not None:
                module.reset_()
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, g: Tensor) -> Tensor:
        if g.shape[-1] != self.r:
            raise ValueError(
                f"InfPiLinearReLU expects pre-activations [..., {self.r}], got {list(g.shape)}"
            )
        flat = g.reshape(-1, self.r)
        out = inf_linear(self, flat)
        if self.folded is not None:
            out = out + moments_output(self.folded.features, flat, self.folded.V, self.layernorm)
        out = out.reshape(*g.shape[:-1], self.r_out)
        return out if self.bias is None else out + self.bias_alpha * self.bias

    def finite_weight(self, omega: Tensor) -> Tensor:
        """Σ_m Amult_m A_m φ(Ω B_m)ᵀ for ω [n r]: [o n], the readout of a finite network before its
        scaling."""
        total = torch.zeros(
            self.r_out, len(omega), device=self.device, dtype=accumulator(self.dtype)
        )
        for A, Amult, B in self.row_blocks():
            A, Amult, B = (tensor.to(total) for tensor in (A, Amult, B))
            total += relu_weight(A, Amult, B, omega.to(total))
        return total if self.folded is None else total + self.folded.finite_weight(omega)

    def sample(
        self, n_in: int, n_out: int | None = None, prev_omega: Tensor | None = None
    ) -> FinPiLinearReLU:
        """A finite layer between widths `n_in` and `n_out` (a readout keeps its o outputs) with the
        same limit.

        `prev_omega` [n_in r]: the ω of the finite layer below (`finite_layer.omega`), to which the
        two must agree.
        """
        return FinPiLinearReLU(
            self.r,
            n_in,
            self.r_out if self.output_layer else n_out or n_in,
            self.bias_alpha,
            self.output_layer,
            self.layernorm,
            inf_layer=self,
            prev_omega=prev_omega,
        )

    def to_moments(
        self, degree: int | None = None, fit: str | None = None, fused: bool = False
    ) -> InfPiLinear:
        """All rows as one matrix of fixed size: the same function up to the truncation of the
        kernel (default: degree 2)."""
        return to_moments(self, degree, fit, fused)

    def merge(self, cosine: float = 0.95) -> Report:
        """Sum rows of the same sample whose directions agree; see `rows.merge.merge`."""
        return merge(self, cosine)

    def compress(self, tol: float) -> Report:
        """Keep as few rows as a relative error `tol` allows, with new coefficients; see
        `rows.compress.compress`."""
        return compress(self, tol)

    def extra_repr(self) -> str:
        return (
            f"r={self.r}, o={self.r_out}, rows={len(self)}, bias_alpha={self.bias_alpha}, "
            f"output_layer={self.output_layer}, layernorm={self.layernorm}, "
            f"row_dtype={self.A.blocks.storage}"
        )

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "bias_alpha"] = torch.tensor(self.bias_alpha, dtype=torch.float64)

    def entry_misfits(self, state: Mapping[str, Any], prefix: str, strict: bool) -> Iterator[str]:
        yield from super().entry_misfits(state, prefix, strict)
        yield from bias_misfits(self, state, prefix)

    def _take_settings(self, state: dict, prefix: str) -> None:
        super()._take_settings(state, prefix)
        take_bias_alpha(self, state, prefix)
