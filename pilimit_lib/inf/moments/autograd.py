"""Φ(u) V on the tape, and the outputs of a layer of moments.

What is computed stands in `sums`; here is only what autograd needs to know. Index legend: b batch,
r rank in, o rank out, P moments.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..derivatives.tape import accumulates, followed, pulled_back
from ..dual.features import PolynomialFeatures
from ..numerics import accumulator, direction, output_scale, transformed
from . import sums
from .compiled import linear
from .parameter import FactoredParameter, Factors, refuse_ddp


class FeatureLinear(torch.autograd.Function):
    """Puts Φ(u) V on the tape. What is more than an ordinary backward pass runs through
    `sums.plain`."""

    @staticmethod
    def forward(ctx, u: Tensor, V: Tensor, features: PolynomialFeatures) -> Tensor:
        if isinstance(V, FactoredParameter):
            refuse_ddp()
        ctx.save_for_backward(u, V)
        ctx.features, ctx.parameter = features, V if isinstance(V, FactoredParameter) else None
        return sums.forward(features, u, V)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        u, V = ctx.saved_tensors
        need_u, need_V, _ = ctx.needs_input_grad
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.to(u.dtype)
            if followed(grad):
                plain = partial(sums.plain, ctx.features)
                return *pulled_back(plain, (u, V), grad, (need_u, need_V)), None
            in_factors = need_V and ctx.parameter is not None and not ctx.parameter.watched
            if in_factors and accumulates(ctx.parameter):
                ctx.parameter.parts.append(Factors(u.detach(), grad))
                need_V = False
            return *sums.backward(ctx.features, u, V, grad, need_u, need_V), None


def feature_linear(features: PolynomialFeatures, u: Tensor, V: Tensor) -> Tensor:
    """Φ(u) V [b o] for directions u [b r] and moments V [P o]; summed in u's dtype, which is
    float32 or float64."""
    if transformed():
        return sums.plain(features, u, V)
    if torch.compiler.is_compiling():
        return linear(u, V, features.kappa)
    if torch.is_grad_enabled() and (u.requires_grad or V.requires_grad):
        return FeatureLinear.apply(u, V, features)
    return sums.forward(features, u, V)


def moments_output(features: PolynomialFeatures, g: Tensor, V: Tensor, layernorm: bool) -> Tensor:
    """s · Φ(ĝ) V for pre-activations `g` [b r]: [b o] in g's dtype. Where g = 0 it is 0, as in
    `functional`."""
    with torch.autocast(g.device.type, enabled=False):
        unit, s = direction(g.to(accumulator(V.dtype)))
        out = feature_linear(features, unit, V) * output_scale(s, layernorm)
        return out.to(g.dtype)
