"""Infinitely wide convolutional layers in constant memory. A layer hands on *pre-activations*, as
`InfPiLinear` does.

    input layer   g(p) = Σ_δ W_δ x(p+δ) + bias_alpha · bias                an ordinary convolution
    π-layer       g_out(p) = Σ_δ s(p+δ) Φ(ĝ(p+δ)) V_δ + bias_alpha · bias

V [P kh kw o] holds one V_δ for each offset of the kernel.

All samples and positions share the neurons ω. Index legend: b samples, r rank in, o rank out, h w
rows and columns, P monomials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..bias import BiasedLayer, bias_parameter, check_sizes
from ..checks import check_memory
from ..dual.features import PolynomialFeatures
from ..dual.hermite import hermite_series
from ..finite.activation import TruncatedActivation
from ..moments.finite_weight import finite_moments
from ..moments.layer import MomentsLayer
from ..moments.sums import moments_of
from .autograd import feature_conv2d
from .finite import FinPiConv2d
from .geometry import Size, check_map, convolve, describe, geometry_of, with_border


class InfPiInputConv2d(BiasedLayer):
    """The first layer of an infinitely wide ConvNet: images [b c h w] to pre-activations
    [b r h' w'].

    Args:
        channels: of the images; r_out: rank of the pre-activations.
        kernel_size, stride, padding, dilation, padding_mode: as in `nn.Conv2d`.
        bias_alpha: multiplier of the bias; 0 or None means no bias.

    At the start weights are N(0, 1/(r_out · inputs of an output)), so that |g(p)| is about the root
    mean square of the pixels.
    """

    layernorm = output_layer = False

    def __init__(
        self,
        channels: int,
        r_out: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        *,
        padding_mode: str = "zeros",
        bias_alpha: float | None = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.r_out, self.bias_alpha = channels, r_out, float(bias_alpha or 0)
        check_sizes(channels, r_out)
        self.geometry = geometry_of(
            kernel_size, stride, padding, dilation, padding_mode=padding_mode
        )
        self.weight = nn.Parameter(
            torch.empty(r_out, channels, *self.geometry.kernel, device=device, dtype=dtype)
        )
        self.bias = bias_parameter(self.bias_alpha, r_out, device, dtype)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        self.weight.normal_(std=1 / math.sqrt(self.weight.numel()))
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        check_map(self, x, self.channels, "images", self.geometry)
        return convolve(self.geometry, x, self.weight, self.bias, self.bias_alpha)

    @property
    def r(self) -> int:
        """What comes in: channels of the images."""
        return self.channels

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def finite_activation(self) -> None:
        """A finite layer applies none to images."""

    def finite_weight(self, omega: Tensor | None) -> Tensor:
        """[r c kh kw], before a finite layer's ω and scaling."""
        return self.weight

    def sample(
        self, n_in: int | None = None, n_out: int = 256, omega: Tensor | None = None
    ) -> FinPiConv2d:
        """A finite layer with `n_out` channels that computes the same function as n_out → ∞.
        `n_in`: channels of the images."""
        return FinPiConv2d(self, self.channels if n_in is None else n_in, n_out, omega=omega)

    def extra_repr(self) -> str:
        return (
            f"input, {self.channels} -> {self.r_out}, {describe(self.geometry)}, "
            f"bias_alpha={self.bias_alpha}"
        )


class InfPiConv2d(MomentsLayer):
    """An infinitely wide convolution that learns features: pre-activations [b r h w] to
    pre-activations [b r_out h' w'].

    `V` [P kh kw o] is an ordinary parameter. Each position's activation is that of its direction
    scaled by its length, see `InfPiLinear`; beyond the border of the map lie zeros, or what
    `padding_mode` says.

    Args:
        r: rank of the pre-activations that come in; r_out: of those that go out, default `r`.
        kernel_size, stride, padding (also "same" or "valid"), dilation, padding_mode: as in
        `nn.Conv2d`.
        groups: 1; what others would mean stands in the README.
        pool: average the *activations* over windows of this size before the convolution. (Pooling
            pre-activations needs no layer: use `nn.AvgPool2d`.)
        activation, degree, fit: see `hermite_series`. layernorm: use the direction of g at each
        position only.
        bias_alpha: multiplier of the bias; 0 or None means no bias. output_layer: a readout, whose
        V starts at zero.
        gain: length of the outputs at the start relative to that of the inputs.
        start_degree: monomials of a higher degree have V = 0 at the start (None: none has).
        chunk_elements: how many numbers of Φ may exist at a time, see `feature_conv2d`.
        dtype: of the bias; V_dtype: of V (sums are float32 or float64).

    At the start V is N(0, gain² / (k_D(1) · o · offsets)): the Gaussian process of covariance s s'
    k_D(c) that a finite layer of independent weights tends to. `truncation` is the largest error of
    the dual kernel; `series` holds the rest.
    """

    def __init__(
        self,
        r: int,
        r_out: int | None = None,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        *,
        pool: Size = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        activation: str | Callable[[Tensor], Tensor] = "relu",
        degree: int = 2,
        fit: str = "minimax",
        layernorm: bool = False,
        bias_alpha: float | None = 0,
        output_layer: bool = False,
        gain: float = 1.0,
        start_degree: int | None = None,
        chunk_elements: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        V_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.r, self.r_out = r, r if r_out is None else r_out
        check_sizes(r, self.r_out)
        if groups != 1:
            raise ValueError(
                f"groups is {groups}; 1 was expected. A group of channels is a population with a "
                "map of its own: keep one map and one layer for each group, and let a layer over "
                "all of them be the sum of one for each. Groups whose number grows with the width "
                "(depthwise) have no limit of this form"
            )
        self.bias_alpha, self.layernorm = float(bias_alpha or 0), layernorm
        if chunk_elements is not None and chunk_elements < 1:
            raise ValueError(
                f"chunk_elements is {chunk_elements}; a positive count of numbers, or None, was "
                "expected"
            )
        self.geometry = geometry_of(kernel_size, stride, padding, dilation, pool, padding_mode)
        self.output_layer, self.gain = output_layer, float(gain)
        self.chunk_elements = chunk_elements
        self.series = hermite_series(activation, degree, fit)
        self.features = PolynomialFeatures(r, self.series.kappa)
        if start_degree is not None and not sum(self.series.kappa[: max(0, start_degree + 1)]) > 0:
            raise ValueError(
                f"start_degree is {start_degree}, and the kernel {list(self.series.kappa)} has no "
                "monomials up to it: outputs would begin at 0; use a higher one, or None"
            )
        self.start_degree = start_degree
        V_dtype = V_dtype or dtype or torch.get_default_dtype()
        try:
            check_memory(
                self.features.P, self.r_out * self.geometry.offsets, V_dtype, device, r, degree
            )
        except MemoryError as error:
            raise MemoryError(
                f"InfPiConv2d(r={r}, r_out={self.r_out}, {describe(self.geometry)}): {error}"
            ) from None
        shape = self.features.P, *self.geometry.kernel, self.r_out
        self.V = nn.Parameter(torch.empty(shape, device=device, dtype=V_dtype))
        self.bias = bias_parameter(self.bias_alpha, self.r_out, device, dtype)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Gaussian V, 0 in a readout and for monomials beyond `start_degree`; bias 0."""
        if self.output_layer:
            self.V.zero_()
        else:
            begun = len(self.series.kappa) if self.start_degree is None else self.start_degree + 1
            size = sum(self.series.kappa[:begun]) * self.r_out * self.geometry.offsets
            self.V.normal_(std=self.gain / math.sqrt(size))
            beyond = [s for degree, s in self.features.starts.items() if degree >= begun]
            self.V[min(beyond, default=self.P) :].zero_()
        if self.bias is not None:
            self.bias.zero_()

    @torch.no_grad()
    def set_rows(self, blocks: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Hold the moments of exactly these rows: an iterable of blocks (A [m kh kw o], Amult [m],
        B [m r] of unit rows)."""
        flat = ((A.flatten(1), Amult, B) for A, Amult, B in blocks)
        self.V.copy_(moments_of(self.features, flat, self.V[0].numel(), self.V).view_as(self.V))

    def forward(self, g: Tensor) -> Tensor:
        check_map(self, g, self.r, "pre-activations", self.geometry)
        batched, geometry = with_border(g if g.ndim == 4 else g[None], self.geometry)
        out = feature_conv2d(
            self.features, batched, self.V, geometry, self.layernorm, self.chunk_elements
        )
        out = out if g.ndim == 4 else out[0]
        return out if self.bias is None else out + self.bias_alpha * self.bias[:, None, None]

    def finite_activation(self) -> TruncatedActivation:
        """What a finite layer applies to the channels of each position first."""
        return TruncatedActivation(self.series.coefficients)

    def finite_weight(self, omega: Tensor) -> Tensor:
        """Σ_m Amult_m A_m p(Ω B_m)ᵀ of every offset for ω [n r]: [o n kh kw], before a finite
        network's scaling."""
        total = finite_moments(self.features, self.series.coefficients, omega, self.V.flatten(1))
        return total.view(len(omega), *self.geometry.kernel, self.r_out).permute(3, 0, 1, 2)

    def sample(
        self,
        n_in: int,
        n_out: int | None = None,
        prev_omega: Tensor | None = None,
        omega: Tensor | None = None,
    ) -> FinPiConv2d:
        """A finite layer between `n_in` and `n_out` channels (a readout keeps its o outputs) with
        the same limit.

        `prev_omega` [n_in r]: the ω of the finite layer below. `omega` [n_out r_out]: that of a
        layer whose outputs are added.
        """
        return FinPiConv2d(self, n_in, n_out, prev_omega, omega)

    def extra_repr(self) -> str:
        return (
            f"moments, {self.r} -> {self.r_out}, {describe(self.geometry)}, "
            f"{self.describe_memory()}, bias_alpha={self.bias_alpha}, "
            f"output_layer={self.output_layer}, layernorm={self.layernorm}"
        )
