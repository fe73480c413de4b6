"""The sum over rows as a function of plain tensors, which torch can differentiate many times.

For what the tape of `rows.autograd` is not made for: transforms of `torch.func`, forward-mode
derivatives, and rows that were handed in as tensors (`functional_call`). All cosines [b m] are in
memory together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...dual.relu import TWO_PI, relu_k, relu_k_prime


class _Slope(torch.autograd.Function):
    """k'(c). Its derivative 1 / (2π sqrt(1 - c²)) is infinite at ±1, where the cosine itself is
    stationary: what reaches a pre-activation is 0 there."""

    generate_vmap_rule = True

    @staticmethod
    def forward(c: Tensor) -> Tensor:
        return relu_k_prime(c)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * _curvature(*ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return tangent * _curvature(*ctx.saved_tensors)


class _Kernel(torch.autograd.Function):
    """k(c), whose derivative by the chain rule is a difference of infinities at ±1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(c: Tensor) -> Tensor:
        return relu_k(c)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * _Slope.apply(*ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return tangent * _Slope.apply(*ctx.saved_tensors)


def row_kernel(c: Tensor) -> Tensor:
    """k(c) of cosines `c` of any shape, with a derivative at ±1 too."""
    return _Kernel.apply(c)


def _curvature(c: Tensor) -> Tensor:
    rest = 1 - c * c
    return torch.where(rest > 0, 1 / (TWO_PI * torch.where(rest > 0, rest, 1).sqrt()), 0)


def backward(
    A: Tensor, Amult: Tensor, B: Tensor, unit: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """For ∂out `grad` [... o]: Σ_m dγ k'(q) B [... r] and Σ_m dγ (k − q k')(q) [... 1], in
    operations that every kind of batching of torch knows."""
    q = unit @ B.mT
    slope = relu_k_prime(q)
    dgamma = (grad @ A.mT) * Amult
    return (dgamma * slope) @ B, (dgamma * (relu_k(q) - q * slope)).sum(-1, keepdim=True)


def forward(A: Tensor, Amult: Tensor, B: Tensor, unit: Tensor) -> Tensor:
    """Σ_m Amult_m A_m k(⟨B_m, ĝ⟩) for rows A [m o], Amult [m], B [m r] and directions `unit`
    [... r]: [... o]."""
    return (_Kernel.apply(unit @ B.mT) * Amult) @ A
