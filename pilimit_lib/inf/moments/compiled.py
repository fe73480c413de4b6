"""Moments under torch.compile and torch.export: operators that stay whole.

The compiler can't trace through the autograd Functions of `feature_linear` and `conv_operator`, and
would store all of Φ for the plain products that it can trace. These operators call the same
`forward` and `backward` as eager mode, Φ a chunk at a time. They are handed tensors and numbers
only, and differentiate once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..conv import sums as conv_operator
from ..conv.geometry import Geometry
from ..dual.features import PolynomialFeatures
from . import sums as feature_linear


@functools.lru_cache(maxsize=64)
def shared_features(r: int, kappa: tuple[float, ...]) -> PolynomialFeatures:
    """The same object for the same arguments, with the tables that it has made."""
    return PolynomialFeatures(r, kappa)


@torch.library.custom_op(
    "pilimit::feature_linear",
    mutates_args=(),
    schema="(Tensor u, Tensor V, float[] kappa) -> Tensor",
)
def linear(u: Tensor, V: Tensor, kappa: Sequence[float]) -> Tensor:
    """Φ(u) V, see `feature_linear.feature_linear`."""
    return feature_linear.forward(shared_features(u.shape[1], tuple(kappa)), u, V)


@torch.library.custom_op(
    "pilimit::feature_linear_backward",
    mutates_args=(),
    schema=(
        "(Tensor u, Tensor V, Tensor grad, float[] kappa, bool need_u, bool need_V) -> (Tensor, "
        "Tensor)"
    ),
)
def linear_backward(
    u: Tensor, V: Tensor, grad: Tensor, kappa: Sequence[float], need_u: bool, need_V: bool
) -> tuple[Tensor, Tensor]:
    du, dV = feature_linear.backward(
        shared_features(u.shape[1], tuple(kappa)), u, V, grad, need_u, need_V
    )
    return u.new_empty(0) if du is None else du.contiguous(), V.new_empty(
        0
    ) if dV is None else dV.to(V.dtype)


@linear.register_fake
def _(u: Tensor, V: Tensor, kappa: Sequence[float]) -> Tensor:
    return u.new_empty(u.shape[0], V.shape[1])


@linear_backward.register_fake
def _(
    u: Tensor, V: Tensor, grad: Tensor, kappa: Sequence[float], need_u: bool, need_V: bool
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape if need_u else 0), V.new_empty(V.shape if need_V else 0)


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
    """The convolution of features, see `conv_operator.feature_conv2d`. `geometry`: its
    `numbers`."""
    features = shared_features(g.shape[1], tuple(kappa))
    return conv_operator.forward(
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
    dg, dV = conv_operator.backward(
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
    return g.new_empty(0) if dg is None else dg.transpose(0, 1), V.new_empty(
        0
    ) if dV is None else dV


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


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.numbers = inputs[2:]


def _hand_back(backward):
    def hand_back(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[:2]
        found = backward(*ctx.saved_tensors, grad, *ctx.numbers, *need)
        return *(tensor if wanted else None for tensor, wanted in zip(found, need)), *(
            None for _ in ctx.numbers
        )

    return hand_back


linear.register_autograd(_hand_back(linear_backward), setup_context=_keep)
conv2d.register_autograd(_hand_back(conv2d_backward), setup_context=_keep)
