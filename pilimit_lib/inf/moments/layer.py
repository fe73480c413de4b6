"""π-layers in constant memory: all rows ever appended as one matrix of fixed size.

    g_out = s · Φ(ĝ) V + bias_alpha · bias        V = Σ_m Amult_m Φ(B_m) A_mᵀ  [P o]

For a polynomial dual kernel k_D(c) = Σ_j κ_j c^j this is the layer of rows, exactly: an SGD step on
V appends rows, weight decay on V decays Amult, and the norm of ∂L/∂V is the norm of the function
that clipping uses. Index legend as in `features`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..bias import bias_misfits, bias_parameter, check_sizes, take_bias_alpha
from ..checkpoints.entries import load_whole, parameter_misfits, refused, tensor_misfit
from ..checks import check_memory
from ..dual.features import PolynomialFeatures
from ..dual.hermite import Series, hermite_series
from ..finite.activation import TruncatedActivation
from ..finite.layers import FinPiLinearReLU
from ..numerics import accumulator
from ..rows.initial import initial_rows
from ..rows.layer import RowLayer
from ..rows.parameter import ROWS
from ..rows.storage import BESIDE, as_rows, pop_rows, rows_misfits
from .autograd import moments_output
from .finite_weight import finite_moments
from .parameter import FactoredParameter
from .sums import moments_of


class MomentsLayer(nn.Module):
    """What layers of moments have in common: V [P ...], the series of the kernel and the features
    that it belongs to, and the multiplier of the bias."""

    V: nn.Parameter
    bias_alpha: float
    also_loads: tuple[str, ...] = ("bias", "bias_alpha", "kappa")
    load_state_dict = load_whole
    series: Series
    features: PolynomialFeatures

    @property
    def truncation(self) -> float:
        """The largest difference between the dual kernel of the activation and that of this layer,
        on [-1, 1]."""
        return self.series.error

    @property
    def P(self) -> int:
        """Number of features: the length of V."""
        return self.features.P

    @property
    def row_bytes(self) -> int:
        """Memory of V in bytes: what takes the place of the rows."""
        return self.V.numel() * self.V.element_size()

    def describe_memory(self) -> str:
        """Kernel, number of features and bytes, for `repr`."""
        series = self.series
        return (
            f"activation={series.activation}, degree={series.degree}, fit={series.fit}, "
            f"truncation={self.truncation:.2g}, P={self.P:,}, {self.row_bytes:,} bytes"
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.V.dtype

    @property
    def device(self) -> torch.device:
        return self.V.device

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "bias_alpha"] = torch.tensor(self.bias_alpha, dtype=torch.float64)
        destination[prefix + "kappa"] = torch.tensor(self.series.kappa, dtype=torch.float64)

    def entry_misfits(self, state: Mapping[str, Any], prefix: str, strict: bool) -> Iterator[str]:
        """What keeps entries of a state dict from being loaded: moments of another kernel would
        mean another function here."""
        yield from parameter_misfits(self, state, prefix, strict)
        yield from bias_misfits(self, state, prefix)
        yield from kappa_misfits(self.series, state, prefix, "kappa")

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        if refused(self, state, prefix, errors):
            return
        state.pop(prefix + "kappa", None)
        take_bias_alpha(self, state, prefix)
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)


class InfPiLinear(MomentsLayer):
    """An infinitely wide layer of constant size: pre-activations g [..., r] to pre-activations
    [..., o].

    `V` [P o] is an ordinary parameter, so any optimiser, clipping, autocast and wrapper of torch
    applies. The activation is applied to the normalised pre-activation and scaled back (that is
    what ReLU does by itself): φ_D(h) = n^-½ ‖h‖ p(√n h/‖h‖).

    Args:
        r: rank of the pre-activations that come in; r_out: of those that go out, default `r`.
        activation: relu, gelu, erf, tanh, silu, or an elementwise function; degree, fit: see
        `hermite_series`.
        bias_alpha, output_layer, layernorm: as in `InfPiLinearReLU`.
        dtype: of the bias; V_dtype: of V (bfloat16 halves its memory; sums are float32, but each
        step is rounded to V's dtype).
        fused: leave the gradient of V in its factors. `PiSGD` then updates V in place; see
            `FactoredParameter`. Several processes sum such gradients with `sum_gradients_`, not
            with DistributedDataParallel.

    `truncation` is the largest error of the dual kernel on [-1, 1]; `series` holds the rest.
    """

    also_loads = (*MomentsLayer.also_loads, *ROWS, *BESIDE)

    def __init__(
        self,
        r: int,
        r_out: int | None = None,
        *,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        degree: int = 2,
        fit: str = "hermite",
        layernorm: bool = False,
        bias_alpha: float | None = 1,
        output_layer: bool = False,
        fused: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        V_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.r, self.r_out = r, r if r_out is None else r_out
        check_sizes(r, self.r_out)
        self.bias_alpha, self.layernorm = float(bias_alpha or 0), layernorm
        self.output_layer, self.fused = output_layer, fused
        self.series = hermite_series(activation, degree, fit)
        self.features = PolynomialFeatures(r, self.series.kappa)
        V_dtype = V_dtype or dtype or torch.get_default_dtype()
        check_memory(self.features.P, self.r_out, V_dtype, device, r, degree, ", or keep rows")
        V = torch.empty(self.features.P, self.r_out, device=device, dtype=V_dtype)
        self.V = FactoredParameter(V, self.features) if fused else nn.Parameter(V)
        self.bias = bias_parameter(self.bias_alpha, self.r_out, device, dtype)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """The moments of the initial rows of `InfPiLinearReLU`; 0 in a readout. Bias 0."""
        self.V.grad = None
        if self.output_layer:
            self.V.zero_()
        else:
            self.set_rows([initial_rows(self.r, self.r_out)])
        if self.bias is not None:
            self.bias.zero_()

    @torch.no_grad()
    def set_rows(self, blocks: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Hold the moments of exactly these rows: an iterable of blocks (A [m o], Amult [m], B [m
        r] of unit rows)."""
        self.V.copy_(moments_of(self.features, blocks, self.r_out, self.V))

    def forward(self, g: Tensor) -> Tensor:
        if g.shape[-1] != self.r:
            raise ValueError(
                f"InfPiLinear expects pre-activations [..., {self.r}], got {list(g.shape)}"
            )
        rows = g if g.dim() == 2 else g.reshape(-1, self.r)
        out = moments_output(
            self.features, rows, self.V, self.layernorm, self.bias, self.bias_alpha
        )
        return out if g.dim() == 2 else out.reshape(*g.shape[:-1], self.r_out)

    def sample(
        self, n_in: int, n_out: int | None = None, prev_omega: Tensor | None = None
    ) -> FinPiLinearReLU:
        """A finite layer between widths `n_in` and `n_out` with the same limit; its activation is
        the truncated one.

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
            nonlin=lambda: TruncatedActivation(self.series.coefficients),
        )

    def finite_weight(self, omega: Tensor) -> Tensor:
        """Σ_m Amult_m A_m p(Ω B_m)ᵀ for ω [n r]: [o n], the readout of a finite network before its
        scaling."""
        return finite_moments(self.features, self.series.coefficients, omega, self.V).T

    def structure(self) -> dict[str, Any]:
        return {"rows": 0}

    def restructure(self, structure: dict[str, Any]) -> None:
        """Nothing changes size here. The method exists so that a snapshot of rows, which do,
        restores into moments."""

    def extra_repr(self) -> str:
        return (
            f"moments, {self.r} -> {self.r_out}, {self.describe_memory()}, "
            f"bias_alpha={self.bias_alpha}, output_layer={self.output_layer}, "
            f"layernorm={self.layernorm}, fused={self.fused}"
        )

    def entry_misfits(self, state: Mapping[str, Any], prefix: str, strict: bool) -> Iterator[str]:
        if prefix + "A" not in state:
            yield from super().entry_misfits(state, prefix, strict)
        elif prefix + "V" in state:
            yield f"{prefix}A and {prefix}V: rows and moments; one of them was expected"
        elif self.series.activation != "relu":
            yield (
                f"{prefix}A holds rows of ReLU units, this layer has activation "
                f"{self.series.activation}"
            )
        else:
            yield from rows_misfits(state, prefix, self.r, self.r_out, strict=True)
            yield from parameter_misfits(self, state, prefix, strict, but=("V",))
            yield from bias_misfits(self, state, prefix)
            yield from kappa_misfits(self.series, state, prefix, "folded.kappa")
            if prefix + "folded.V" in state:
                misfit = tensor_misfit(state[prefix + "folded.V"], prefix + "folded.V")
                if misfit:
                    yield misfit
                elif state[prefix + "folded.V"].shape != self.V.shape:
                    shape = list(state[prefix + "folded.V"].shape)
                    yield f"{prefix}folded.V has shape {shape}; expected {list(self.V.shape)}"

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        """A checkpoint of rows loads too: its rows are summed into V."""
        if refused(self, state, prefix, errors):
            return
        if prefix + "A" in state:
            state[prefix + "V"] = self._moments_of_state(state, prefix)
        if isinstance(self.V, FactoredParameter):
            self.V.parts = []
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)

    def _moments_of_state(self, state: dict, prefix: str) -> Tensor:
        """V of the rows in a state dict that fits, which are taken out of it."""
        rows = {name: as_rows(pieces, name) for name, pieces in pop_rows(state, prefix).items()}
        folded = state.get(prefix + "folded.V")
        for name in BESIDE:
            state.pop(prefix + name, None)
        V = moments_of(self.features, [tuple(rows.values())], self.r_out, self.V)
        return V if folded is None else V + folded.to(V)


def kappa_misfits(
    series: Series, state: Mapping[str, Any], prefix: str, name: str
) -> Iterator[str]:
    """Why the kernel's coefficients of a checkpoint are not those of `series`; it may lack them."""
    if prefix + name in state:
        misfit = tensor_misfit(state[prefix + name], prefix + name, ndim=1)
        other = None if misfit else series_misfit(series, state[prefix + name])
        if misfit or other:
            yield misfit or f"{prefix}: {other}"


def series_misfit(series: Series, kappa: Tensor) -> str | None:
    """Why moments made with the coefficients `kappa` mean nothing to a layer with this series; None
    if they fit."""
    theirs = [float(value) for value in kappa]
    longest = max(len(theirs), len(series.kappa))
    pairs = zip(*((list(values) + [0.0] * longest)[:longest] for values in (theirs, series.kappa)))
    if all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in pairs):
        return None
    return (
        f"moments with kernel coefficients {[round(value, 6) for value in theirs]} don't fit a "
        "layer with "
        f"{[round(value, 6) for value in series.kappa]}; use the same activation, degree and fit"
    )


def to_moments(
    layer: RowLayer, degree: int | None = None, fit: str | None = None, fused: bool = False
) -> InfPiLinear:
    """The moments of all rows of `layer`, as a new layer: the same function up to the truncation of
    the kernel."""
    if layer.pending.rows() is not None:
        raise ValueError(
            "the layer has pending rows that no step has appended; call optimizer.step() or "
            "zero_grad() first"
        )
    folded = layer.folded
    usual = (2, "hermite") if folded is None else (folded.series.degree, folded.series.fit)
    degree = usual[0] if degree is None else degree
    fit = usual[1] if fit is None else fit
    bias = layer.bias
    moments = InfPiLinear(
        layer.r,
        layer.r_out,
        degree=degree,
        fit=fit,
        layernorm=layer.layernorm,
        bias_alpha=layer.bias_alpha,
        output_layer=layer.output_layer,
        fused=fused,
        device=layer.A.device,
        V_dtype=accumulator(layer.A.dtype),
        dtype=None if bias is None else bias.dtype,
    )
    moments.set_rows(layer.row_blocks())
    with torch.no_grad():
        if folded is not None:
            problem = series_misfit(moments.series, torch.tensor(folded.series.kappa))
            if problem:
                raise ValueError(f"the layer's older rows are folded already; {problem}")
            moments.V += folded.V.to(moments.V)
        if bias is not None:
            moments.bias.copy_(bias)
    moments.train(layer.training)
    for mine, theirs in ((moments.V, layer.A), (moments.bias, bias)):
        if mine is not None:
            mine.requires_grad_(theirs.requires_grad)
    return moments
