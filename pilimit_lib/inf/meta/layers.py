"""What a gradient step on one layer does to its outputs, for every kind of layer, without touching
the layer.

A step on samples i with output gradients δ_i adds to the outputs of a layer

    z ↦ −η Σ_i ⟨ψ(z), ψ(z_i)⟩ δ_i        ψ: what the layer's weights are multiplied by

    input layers, of any width     ψ(x) = x
    rows, moments                  ⟨ψ(g), ψ(g')⟩ = s s' k(⟨ĝ, ĝ'⟩), k the layer's dual kernel;
                                   s = 1 under layer norm
    finite layers                  ψ(h) = φ(h), and δ is projected onto the range of Ω
    kernel readouts                ⟨ψ(x), ψ(x')⟩ = K(x, x')

so a step of a task is as many *fast rows* (ψ(z_i), δ_i) as it has samples. Index legend: t tasks, b
samples, m fast rows, r features in, o outputs. Source: Yang, Santacroce & Hu 2022, section 5; Finn,
Abbeel & Levine 2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn

from ..dual.relu import relu_k, relu_k_prime
from ..finite.layers import FinPiInputLinearReLU, FinPiLinearReLU
from ..gp.learner import KernelReadout
from ..layers import InfPiInputLinearReLU, InfPiLinearReLU
from ..moments.layer import InfPiLinear
from ..numerics import accumulator, direction, output_scale


@dataclass(frozen=True)
class Keys:
    """ψ of a batch of each task: features [t b r] and the factor `scale` [t b 1] that they carry
    outside of the kernel."""

    features: Tensor
    scale: Tensor | None = None


class _ReLUKernel(torch.autograd.Function):
    """k(c) of ReLU with k'(c) as derivative, also at c = ±1, where that of its formula is infinity
    times zero."""

    @staticmethod
    def forward(ctx, c: Tensor) -> Tensor:
        ctx.save_for_backward(c)
        return relu_k(c)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * relu_k_prime(*ctx.saved_tensors)


@singledispatch
def keys(layer: nn.Module, z: Tensor) -> Keys:
    """ψ of inputs `z` [t b ...] of `layer`. Raises TypeError for layers that can't be adapted."""
    raise TypeError(
        f"a {type(layer).__name__} can't be adapted; finite and infinite π-layers and "
        "KernelReadout can"
    )


@singledispatch
def kernel(layer: nn.Module, left: Tensor, right: Tensor) -> Tensor:
    """Inner products of features [t b r] and [t m r], by the layer's kernel: [t b m]."""
    return left @ right.mT


def projected(layer: nn.Module, delta: Tensor, project: bool | None = None) -> Tensor:
    """The part of output gradients `delta` [t b o] that a finite layer learns from, all of it for
    every other layer.

    `project`: whether that is its part along the range of Ω; None: as the layer's own gradients
    are.
    """
    basis = getattr(layer, "basis", None)
    if basis is None or not (layer.project if project is None else project):
        return delta
    return (delta @ basis) @ basis.T


@keys.register(InfPiInputLinearReLU)
@keys.register(FinPiInputLinearReLU)
@keys.register(KernelReadout)
def _(layer: nn.Module, z: Tensor) -> Keys:
    return Keys(z)


@keys.register(InfPiLinearReLU)
@keys.register(InfPiLinear)
def _(layer: InfPiLinearReLU | InfPiLinear, z: Tensor) -> Keys:
    unit, s = direction(z.to(accumulator(layer.dtype)))
    return Keys(unit, output_scale(s, layer.layernorm))


@keys.register(FinPiLinearReLU)
def _(layer: FinPiLinearReLU, z: Tensor) -> Keys:
    return Keys(layer.nonlin(direction(z)[0] if layer.layernorm else z))


@kernel.register(InfPiLinearReLU)
def _(layer: InfPiLinearReLU, left: Tensor, right: Tensor) -> Tensor:
    return _ReLUKernel.apply(left @ right.mT)


@kernel.register(InfPiLinear)
def _(layer: InfPiLinear, left: Tensor, right: Tensor) -> Tensor:
    return layer.features.kernel(left @ right.mT)


@kernel.register(KernelReadout)
def _(layer: KernelReadout, left: Tensor, right: Tensor) -> Tensor:
    # Kernels are functions of two sets of samples; the tasks of a batch are few, so a loop over
    # them costs nothing.
    return torch.stack([layer.kernel(*pair) for pair in zip(left, right)]).to(left)
