"""Gradients that have an infinitely wide counterpart: G ← Ω (ΩᵀΩ)^-1 Ωᵀ G, their part along the
range of Ω.

That happens inside the backward pass, so that any optimiser and any clipping sees projected
gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import transformed


def basis_of(omega: Tensor) -> Tensor:
    """Orthonormal columns with the range of Ω [n r]: the projection without an inverse, for n < r
    too."""
    return torch.linalg.qr(omega.double()).Q.to(omega).contiguous()


class _ProjectGradient(torch.autograd.Function):
    """The identity whose gradient is projected onto the columns of `basis` [n k] (orthonormal),
    along dimension 0."""

    @staticmethod
    def forward(ctx, weight: Tensor, basis: Tensor) -> Tensor:
        ctx.save_for_backward(basis)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (basis,) = ctx.saved_tensors
        return basis @ (basis.T @ grad), None


def project_gradient(weight: Tensor, basis: Tensor) -> Tensor:
    """`weight` [n ...] itself, with a derivative that is the projection onto the columns of `basis`
    [n k] (orthonormal), along dimension 0, in reverse and in forward mode."""
    if transformed():
        frozen = weight.detach()
        return frozen + basis @ (basis.T @ (weight - frozen))  # weight + 0
    return _ProjectGradient.apply(weight, basis)
