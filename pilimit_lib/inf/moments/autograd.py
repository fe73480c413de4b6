"""Φ(u) V on the tape, and the outputs of a layer of moments.

What is computed stands in `sums`; here is only what autograd needs to know. Index legend: b batch,
r rank in, o rank out, P moments.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ..derivatives.tape import accumulates, followed, pulled_back
from ..dual.features import PolynomialFeatures
from ..implementation import chosen
from ..numerics import accumulator, direction, output_scale, transformed
from . import native, sums
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
            need_V = need_V and not _kept_in_factors(ctx.parameter, u.detach(), grad)
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


class NativeLayer(torch.autograd.Function):
    """Puts a whole layer on the tape, in one piece: what small batches spend their time on is the
    number of operations. What is more than an ordinary backward pass runs through `composed`."""

    @staticmethod
    def forward(ctx, g: Tensor, V: Tensor, bias: Tensor | None, how: native.Layer) -> Tensor:
        if isinstance(V, FactoredParameter):
            refuse_ddp()
        found = native.layer(how, g, V, bias)
        ctx.save_for_backward(g, V, bias, *found[1:])
        ctx.how, ctx.parameter = how, V if isinstance(V, FactoredParameter) else None
        return found.out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        g, V, bias, *kept = ctx.saved_tensors
        need_g, need_V, need_bias, _ = ctx.needs_input_grad
        if followed(grad):
            function, needed = partial(composed, ctx.how), (need_g, need_V, need_bias)
            with torch.autocast(grad.device.type, enabled=False):
                return *pulled_back(function, (g, V, bias), grad, needed), None
        outputs = native.Outputs(grad, *kept)
        delta, dg, dbias = native.layer_backward(ctx.how, outputs, V, grad, need_g, need_bias)
        adds = ctx.next_functions[1][0]  # g and V are the first two
        need_V = need_V and not _kept_in_factors(ctx.parameter, outputs.u, delta, adds)
        features = ctx.how.features
        dV = native.backward(features, outputs.u, V, delta, False, True)[1] if need_V else None
        return dg, dV, dbias, None


def _kept_in_factors(
    parameter: FactoredParameter | None, u: Tensor, delta: Tensor, adds: Node | None = None
) -> bool:
    """Whether the gradient of a fused layer's V was left with it, as its two factors. `adds`: see
    `accumulates`."""
    if parameter is None or parameter.watched or not accumulates(parameter, adds):
        return False
    parameter.parts.append(Factors(u, delta))
    return True


def composed(how: native.Layer, g: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
    """A layer of moments by its definition, all of Φ at once: differentiable to any order."""
    unit, s = direction(g)
    out = sums.plain(how.features, unit, V) * output_scale(s, how.layernorm)
    return out if bias is None else out + how.alpha * bias


def moments_output(
    features: PolynomialFeatures,
    g: Tensor,
    V: Tensor,
    layernorm: bool,
    bias: Tensor | None = None,
    alpha: float = 0.0,
) -> Tensor:
    """s · Φ(ĝ) V + alpha · bias for pre-activations `g` [b r]: [b o] in g's dtype. Where g = 0 the
    sum is 0, as in `functional`."""
    if _natively(features, g, V, bias):
        how, given = native.Layer(features, layernorm, alpha), (g, V, bias)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
            return NativeLayer.apply(*given, how)
        with torch.no_grad():
            return native.layer(how, *given).out
    with torch.autocast(g.device.type, enabled=False):
        unit, s = direction(g.to(accumulator(V.dtype)))
        out = feature_linear(features, unit, V) * output_scale(s, layernorm)
        out = out.to(g.dtype)
    return out if bias is None else out + alpha * bias


def _natively(features: PolynomialFeatures, g: Tensor, V: Tensor, bias: Tensor | None) -> bool:
    """Whether C++ computes the whole layer. Where it refuses, `sums` says why."""
    if transformed() or torch.compiler.is_compiling() or chosen().moments != "native":
        return False
    if native.refuses(features, g, V) is not None or torch.jit.is_tracing():
        return False
    chosen().tell("native runs")
    return bias is None or (bias.dtype == torch.float32 and bias.device.type == "cpu")
