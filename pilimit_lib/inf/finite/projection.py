"""Gradients that have an infinitely wide counterpart: G ← Ω (ΩᵀΩ)^-1 Ωᵀ G, their part along the
range of Ω.

That happens inside the backward pass, so that any optimiser and any clipping sees projected
gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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


def projections(net: nn.Module) -> list[bool]:
    """Which of the layers of a finite network project their gradients, for its checkpoints."""
    return [layer.project for layer in net.layers]


def projection_misfits(net: nn.Module, settings: Mapping[str, Any]) -> Iterator[str]:
    """Why the layers of `net` can't project as a checkpoint's settings say."""
    found = settings.get("project")
    fits = isinstance(found, list | tuple) and len(found) == len(net.layers)
    if not fits or any(
        not isinstance(project, bool) or (project and layer.basis is None)
        for project, layer in zip(found, net.layers)
    ):
        yield f"project is {found!r:.80} in the checkpoint; a flag for each layer was expected"


def set_projections(net: nn.Module, settings: Mapping[str, Any]) -> None:
    """Let the layers of `net` project as a checkpoint's settings say."""
    for layer, project in zip(net.layers, settings["project"]):
        layer.project = project
