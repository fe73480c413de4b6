"""Moments under torch.compile and torch.export: operators that stay whole.

The compiler can't trace through the autograd Function of `autograd`, and would store all of Φ for
the plain product that it can trace. These operators call the same `forward` and `backward` as eager
mode, Φ a chunk at a time. They are handed tensors and numbers only, and differentiate once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..derivatives.operators import differentiable, or_empty
from ..dual.shared import shared_features
from . import sums


@torch.library.custom_op(
    "pilimit::feature_linear",
    mutates_args=(),
    schema="(Tensor u, Tensor V, float[] kappa) -> Tensor",
)
def linear(u: Tensor, V: Tensor, kappa: Sequence[float]) -> Tensor:
    """Φ(u) V, see `sums.forward`."""
    return sums.forward(shared_features(u.shape[1], tuple(kappa)), u, V)


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
    du, dV = sums.backward(shared_features(u.shape[1], tuple(kappa)), u, V, grad, need_u, need_V)
    return or_empty(du, u), or_empty(dV, V)


@linear.register_fake
def _(u: Tensor, V: Tensor, kappa: Sequence[float]) -> Tensor:
    return u.new_empty(u.shape[0], V.shape[1])


@linear_backward.register_fake
def _(
    u: Tensor, V: Tensor, grad: Tensor, kappa: Sequence[float], need_u: bool, need_V: bool
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape if need_u else 0), V.new_empty(V.shape if need_V else 0)


differentiable(linear, linear_backward)
