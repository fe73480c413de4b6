"""The convolution of features under torch.compile and torch.export: operators that stay whole, as
in `moments.compiled`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..derivatives.operators import differentiable, or_empty
from ..dual.shared import shared_features
from . import sums
from .geometry import Geometry


@torch.library.custom_op(
    "pilimit::feature_conv2d",
    mutates_args=(),
    schema=(
        "(Tensor g, Tensor V, float[] kappa, int[] geometry, bool layernorm, int? chunk_elements) "
        "-> Tensor"
    ),
)
def conv2d(
    g: Tensor,
    V: Tensor,
    kappa: Sequence[float],
    geometry: Sequence[int],
    layernorm: bool,
    chunk_elements: int | None,
) -> Tensor:
    """The convolution of features, see `sums.forward`. `geometry`: its
    `numbers`."""
    features = shared_features(g.shape[1], tuple(kappa))
    return sums.forward(
        features, g.transpose(0, 1), V, Geometry.of(geometry), layernorm, chunk_elements
    ).transpose(0, 1)


@torch.library.custom_op(
    "pilimit::feature_conv2d_backward",
    mutates_args=(),
    schema=(
        "(Tensor g, Tensor V, Tensor grad, float[] kappa, int[] geometry, bool layernorm, int? "
        "chunk_elements, bool need_g, "
        "bool need_V) -> (Tensor, Tensor)"
    ),
)
def conv2d_backward(
    g: Tensor,
    V: Tensor,
    grad: Tensor,
    kappa: Sequence[float],
    geometry: Sequence[int],
    layernorm: bool,
    chunk_elements: int | None,
    need_g: bool,
    need_V: bool,
) -> tuple[Tensor, Tensor]:
    dg, dV = sums.backward(
        shared_features(g.shape[1], tuple(kappa)),
        g.transpose(0, 1),
        V,
        Geometry.of(geometry),
        grad.transpose(0, 1),
        need_g,
        need_V,
        layernorm,
        chunk_elements,
    )
    return or_empty(None if dg is None else dg.transpose(0, 1), g), or_empty(dV, V)


@conv2d.register_fake
def _(
    g: Tensor,
    V: Tensor,
    kappa: Sequence[float],
    geometry: Sequence[int],
    layernorm: bool,
    chunk_elements: int | None,
) -> Tensor:
    return g.new_empty(
        V.shape[3], g.shape[0], *Geometry.of(geometry).output(tuple(g.shape[2:]))
    ).transpose(0, 1)


@conv2d_backward.register_fake
def _(
    g: Tensor,
    V: Tensor,
    grad: Tensor,
    kappa: Sequence[float],
    geometry: Sequence[int],
    layernorm: bool,
    chunk_elements: int | None,
    need_g: bool,
    need_V: bool,
) -> tuple[Tensor, Tensor]:
    dg = (
        g.new_empty(g.shape[1], g.shape[0], *g.shape[2:]).transpose(0, 1)
        if need_g
        else g.new_empty(0)
    )
    return dg, V.new_empty(V.shape if need_V else 0)


differentiable(conv2d, conv2d_backward)
