"""Infinitely wide layers as rows. A layer hands on *pre-activations*; the ReLU belongs to the layer
that receives them.

    input layer    g = x A + bias_alpha · bias                                     A [d r]
    π-layer        g_out = s · Σ_m Amult_m A_m k(⟨B_m, ĝ⟩) + bias_alpha · bias     A [m o], Amult [m], B [m r]

Training appends one row per sample and step: see `PiSGD`. Source: Yang, Santacroce & Hu 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from opt_einsum import contract
from torch import Tensor, nn

from ..core import UNKNOWN, Axis, Blocks
from .bias import BiasedLayer, bias_parameter, take_bias_alpha
from .finite.layers import FinPiInputLinearReLU, FinPiLinearReLU
from .moments.sums import moments_output
from .rows.autograd import accumulator, inf_linear
from .rows.compress import compress
from .rows.merge import FoldedRows, Report, RowLimits, merge
from .rows.parameter import ROWS, InfPiParameter, Pending, convert_rows
from .rows.storage import (
    check_storage,
    elsewhere,
    new_blocks,
    pop_rows,
    put_rows,
    require_whole,
    take_rows,
)

if TYPE_CHECKING:
    from .moments.layer import InfPiLinear
    from .rows.shard import Shard

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
        self.r, self.r_out, self.bias_alpha, self.layernorm = (
            r,
            r if r_out is None else r_out,
            float(bias_alpha or 0),
            layernorm,
        )
        check_sizes(r, self.r_out)
        self.A = nn.Parameter(torch.empty(r, self.r_out, device=device, dtype=dtype))
        self.bias = bias_parameter(self.bias_alpha, self.r_out, device, dtype)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Columns of A uniform on the unit sphere, bias 0."""
        self.A.normal_()
        self.A /= torch.linalg.vector_norm(self.A, dim=0)
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


class InfPiLinearReLU(nn.Module):
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
        super().__init__()
        self.r, self.r_out, self.bias_alpha, self.layernorm = (
            r,
            r if r_out is None else r_out,
            float(bias_alpha or 0),
            layernorm,
        )
        check_sizes(r, self.r_out)
        self.shard: Shard | None = None  # set by shard_rows
        self.output_layer = output_layer
        row_dtype = row_dtype or dtype or torch.get_default_dtype()
        self.limits = (
            None
            if row_budget is None and merge is None
            else RowLimits(row_budget, merge).to(device)
        )
        self.folded = (
            None
            if row_budget is None
            else FoldedRows(r, self.r_out, degree, fit, device, accumulator(row_dtype))
        )
        self.pending = Pending()
        for name, tail in (("A", (self.r_out,)), ("Amult", ()), ("B", (r,))):
            self.register_parameter(
                name, InfPiParameter(new_blocks(name, tail, row_dtype, device), self.pending, name)
            )
        self.origin_blocks = Blocks(dtype=torch.long, device=device)
        self.bias = bias_parameter(self.bias_alpha, self.r_out, device, dtype)
        self.initialize()
        self.axis = Axis("rows")
        for name in ROWS:
            self.axis.join(self, name)
        self.axis.join(self, "origin_blocks", label="origin")
        self.pending.axis = self.axis

    @torch.no_grad()
    def initialize(self) -> None:
        """As many rows as the rank: B uniform on the sphere, A ~ N(0, 1/o) (0 in a readout), Amult
        1, bias 0."""
        B = torch.randn(self.r, self.r)
        A = (
            torch.zeros(self.r, self.r_out)
            if self.output_layer
            else torch.randn(self.r, self.r_out) / math.sqrt(self.r_out)
        )
        self.set_rows(A, torch.ones(self.r), B / torch.linalg.vector_norm(B, dim=1, keepdim=True))
        self.pending.clear()
        for module in (self.limits, self.folded):
            if module is not None:
                module.reset_()
        if self.bias is not None:
            self.bias.zero_()

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.A.blocks)

    def __bool__(self) -> bool:
        return True  # a layer without rows is still a layer

    @property
    def origin(self) -> Tensor:
        """Id of the sample that made each row, -1 where unknown: LongTensor [m]."""
        return self.origin_blocks.dense()

    @property
    def row_bytes(self) -> int:
        """Memory of A and B, and of the moments of folded rows, in bytes."""
        rows = self.A.blocks.nbytes + self.B.blocks.nbytes
        return (
            rows
            if self.folded is None
            else rows + self.folded.V.numel() * self.folded.V.element_size()
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    @property
    def device(self) -> torch.device:
        return self.A.device

    def row_blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Views (A [k o], Amult [k], B [k r]) of the rows, block by block."""
        require_whole(self, "what reads all rows")
        return zip(*(getattr(self, name).blocks.views() for name in ROWS))

    @property
    def edits(self) -> int:
        """How often existing rows were changed (not how often rows were appended)."""
        return self.A.blocks.edits + self.Amult.blocks.edits + self.B.blocks.edits

    def set_rows(self, A: Tensor, Amult: Tensor, B: Tensor, origin: Tensor | None = None) -> None:
        """Hold exactly these rows: A [m o], Amult [m], B [m r] of unit rows, origin [m] (default:
        unknown)."""
        require_whole(self, "set_rows")
        origin = torch.full((len(A),), UNKNOWN) if origin is None else origin
        given = {"A": A, "Amult": Amult, "B": B, "origin": origin}
        for name, value in given.items():
            self.row_storage(name).check(value, name)
        check_storage(self, given)
        if len({len(value) for value in given.values()}) != 1:
            raise ValueError(
                f"rows of different number: { {name: len(value) for name, value in given.items()} }"
            )
        for name, value in given.items():
            self.row_storage(name).set(value.detach())

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
            total += contract("mo,m,mn->on", A, Amult, torch.relu(B @ omega.to(total).T))
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
        from .moments.layer import to_moments

        return to_moments(self, degree, fit, fused)

    def merge(self, cosine: float = 0.95) -> Report:
        """Sum rows of the same sample whose directions agree; see `bounded.merge`."""
        return merge(self, cosine)

    def compress(self, tol: float) -> Report:
        """Keep as few rows as a relative error `tol` allows, with new coefficients; see
        `compress.compress`."""
        return compress(self, tol)

    def structure(self) -> dict[str, Any]:
        return {"rows": len(self)}

    def restructure(self, structure: dict[str, Any]) -> None:
        if elsewhere():
            return
        rows = structure["rows"]
        self.set_rows(torch.zeros(rows, self.r_out), torch.zeros(rows), torch.zeros(rows, self.r))

    def extra_repr(self) -> str:
        return (
            f"r={self.r}, o={self.r_out}, rows={len(self)}, bias_alpha={self.bias_alpha}, "
            f"output_layer={self.output_layer}, layernorm={self.layernorm}, "
            f"row_dtype={self.A.blocks.storage}"
        )

    def row_storage(self, name: str) -> Blocks:
        """The blocks of "A", "Amult", "B" or "origin"."""
        return self.origin_blocks if name == "origin" else getattr(self, name).blocks

    def _apply(self, fn, recurse: bool = True) -> InfPiLinearReLU:
        return convert_rows(self, fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if keep_vars:
            destination.update(
                {prefix + name: getattr(self, name) for name in ROWS},
                **{prefix + "origin": self.origin},
            )
        else:
            put_rows(self, destination, prefix)
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        destination[prefix + "bias_alpha"] = torch.tensor(self.bias_alpha, dtype=torch.float64)

    def _load_from_state_dict(
        self,
        state: dict,
        prefix: str,
        metadata: dict,
        strict: bool,
        missing: list,
        unexpected: list,
        errors: list,
    ) -> None:
        """Rows may be more or fewer than here. Checkpoints of the original code, which lack
        `origin`, load too."""
        take_bias_alpha(self, state, prefix, errors)
        # the original's learning-rate multiplier of Amult: the optimiser's matter
        state.pop(prefix + "layer_alpha", None)
        found, origin = pop_rows(state, prefix), state.pop(prefix + "origin", None)
        absent = [prefix + name for name in ROWS if name not in found and not elsewhere()]
        missing += absent
        if not absent and not elsewhere():
            try:
                take_rows(self, found, origin)
            except ValueError as error:
                errors.append(f"{prefix}rows: {error}")
        fronts = {name: self._parameters.pop(name) for name in ROWS}
        try:
            super()._load_from_state_dict(
                state, prefix, metadata, strict, missing, unexpected, errors
            )
        finally:
            others = dict(self._parameters)
            self._parameters.clear()
            self._parameters.update(fronts | others)


def row_layers(model: nn.Module) -> list[tuple[str, InfPiLinearReLU]]:
    """The layers of `model` that keep rows, with their names."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, InfPiLinearReLU)
    ]


def check_sizes(r: int, r_out: int) -> None:
    if r < 1 or r_out < 1:
        raise ValueError(f"a layer needs positive sizes, got r={r}, r_out={r_out}")
