"""The convolution of features on the tape.

What is computed stands in `sums`; here is only what autograd needs to know.
Index legend: b samples, r rank in, o rank out, h w rows and columns of a map, P moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dual.features import PolynomialFeatures
from ..numerics import accumulator
from . import sums
from .compiled import conv2d
from .geometry import Geometry


class FeatureConv2d(torch.autograd.Function):
    """Puts the convolution on the tape; keeps g and V only. Differentiable twice through
    `sums.plain`."""

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
        return sums.forward(
            features, g.transpose(0, 1), V, geometry, layernorm, chunk_elements
        ).transpose(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        g, V = ctx.saved_tensors
        features, geometry, layernorm, chunk_elements = ctx.how
        need = ctx.needs_input_grad[:2]
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.to(g.dtype)
            if torch.is_grad_enabled():
                inputs = [tensor for tensor, wanted in zip((g, V), need) if wanted]
                found = iter(
                    torch.autograd.grad(
                        sums.plain(features, g, V, geometry, layernorm),
                        inputs,
                        grad,
                        create_graph=True,
                    )
                )
                return *(next(found) if wanted else None for wanted in need), None, None, None, None
            dg, dV = sums.backward(
                features,
                g.transpose(0, 1),
                V,
                geometry,
                grad.transpose(0, 1),
                *need,
                layernorm,
                chunk_elements,
            )
        return None if dg is None else dg.transpose(0, 1), dV, None, None, None, None


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
        if torch.compiler.is_compiling():
            out = conv2d(wide, V, features.kappa, geometry.numbers, layernorm, chunk_elements)
        elif torch.is_grad_enabled() and (g.requires_grad or V.requires_grad):
            out = FeatureConv2d.apply(wide, V, features, geometry, layernorm, chunk_elements)
        else:
            out = sums.forward(
                features, wide.transpose(0, 1), V, geometry, layernorm, chunk_elements
            ).transpose(0, 1)
        return out.to(g.dtype)
