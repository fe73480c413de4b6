"""The convolution of features on the tape.

What is computed stands in `sums`; here is only what autograd needs to know.
Index legend: b samples, r rank in, o rank out, h w rows and columns of a map, P moments.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..derivatives.tape import followed, pulled_back
from ..dual.features import PolynomialFeatures
from ..numerics import accumulator, transformed
from . import sums
from .compiled import conv2d
from .geometry import Geometry


class FeatureConv2d(torch.autograd.Function):
    """Puts the convolution on the tape; keeps g and V only. What is more than an ordinary backward
    pass runs through `sums.plain`."""

    @staticmethod
    def forward(
        ctx,
        g: Tensor,
        V: Tensor,
        features: PolynomialFeatures,
        geometry: Geometry,
        layernorm: bool,
        chunk_elements: int | None,
    ) -> Tensor:
        ctx.save_for_backward(g, V)
        ctx.how = features, geometry, layernorm, chunk_elements
        return _forward(features, g, V, geometry, layernorm, chunk_elements)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        g, V = ctx.saved_tensors
        features, geometry, layernorm, chunk_elements = ctx.how
        need = ctx.needs_input_grad[:2]
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.to(g.dtype)
            if followed(grad):
                plain = partial(sums.plain, features, geometry=geometry, layernorm=layernorm)
                return *pulled_back(plain, (g, V), grad, need), None, None, None, None
            across = g.transpose(0, 1), V, geometry, grad.transpose(0, 1)
            dg, dV = sums.backward(features, *across, *need, layernorm, chunk_elements)
        return None if dg is None else dg.transpose(0, 1), dV, None, None, None, None


def _forward(
    features: PolynomialFeatures,
    g: Tensor,
    V: Tensor,
    geometry: Geometry,
    layernorm: bool,
    chunk_elements: int | None,
) -> Tensor:
    """`sums.forward` for g [b r h w]."""
    across = g.transpose(0, 1)
    return sums.forward(features, across, V, geometry, layernorm, chunk_elements).transpose(0, 1)


def feature_conv2d(
    features: PolynomialFeatures,
    g: Tensor,
    V: Tensor,
    geometry: Geometry,
    layernorm: bool = False,
    chunk_elements: int | None = None,
) -> Tensor:
    """Σ_δ s Φ(ĝ) V_δ for pre-activations g [b r h w] and moments V [P kh kw o]: [b o h' w'] in g's
    dtype, sums float32 or better.

    `chunk_elements` bounds how many numbers of Φ exist at a time (at least one row of one map).
    """
    with torch.autocast(g.device.type, enabled=False):
        wide = g.to(accumulator(V.dtype))
        if transformed():
            out = sums.plain(features, wide, V, geometry, layernorm)
        elif torch.compiler.is_compiling():
            out = conv2d(wide, V, features.kappa, geometry.numbers, layernorm, chunk_elements)
        elif torch.is_grad_enabled() and (g.requires_grad or V.requires_grad):
            out = FeatureConv2d.apply(wide, V, features, geometry, layernorm, chunk_elements)
        else:
            out = _forward(features, wide, V, geometry, layernorm, chunk_elements)
        return out.to(g.dtype)
