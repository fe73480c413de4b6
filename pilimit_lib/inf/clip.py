"""Gradient clipping that knows rows: one norm over ordinary gradients and pending rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .optim.pending import Gradient, gradient_of


@torch.no_grad()
def clip_grad_norm_(
    net_or_params: nn.Module | Tensor | Iterable[Tensor], max_norm: float, per_param: bool = False
) -> Tensor:
    """Scale gradients so that their norm is at most `max_norm`; returns the total norm before
    clipping.

    The norm of a π-layer's update is that of the function it changes, |ΔW|² = Σ_ij A_i·A_j
    k(B_i·B_j) over the rows about to be appended; only their A is scaled. A, Amult and B of one
    layer count once, whichever of them are listed.

    Args:
        net_or_params: a module or parameters, π-layers and others mixed.
        max_norm: positive; each gradient is multiplied by min(1, max_norm / (norm + 1e-6)).
        per_param: clip every parameter (every π-layer) by its own norm instead of all by the total.
    """
    if not max_norm > 0:
        raise ValueError(
            f"max_norm is {max_norm}; a positive bound was expected (leave the call out to not "
            "clip)"
        )
    gradients = _gradients(net_or_params)
    if not gradients:
        return torch.tensor(0.0)
    norms = [gradient.norm() for gradient in gradients]
    stacked = torch.stack([norm.to(norms[0]) for norm in norms])
    total = torch.linalg.vector_norm(stacked)
    if stacked.device.type == "cpu" and len({norm.dtype for norm in norms}) == 1:
        compared = stacked if per_param else total.expand_as(stacked)
        factors = (max_norm / (compared + 1e-6)).clamp(max=1)
        for number, factor in enumerate(factors.tolist()):
            if factor != 1:  # times 1 a gradient stays what it is
                gradients[number].scale_(factors[number])
        return total
    for gradient, norm in zip(gradients, norms):
        factor = max_norm / ((norm if per_param else total) + 1e-6)
        gradient.scale_(factor.clamp(max=1))
    return total


@torch.no_grad()
def store_pi_grad_norm_(
    modules: Iterable[nn.Module], exclude_last_layer: bool = False, buffer: Any = None
) -> None:
    """Do nothing: `clip_grad_norm_` computes the norms of pending rows itself. Callable because the
    original needs the call."""
    if exclude_last_layer or buffer is not None:
        raise ValueError(
            "store_pi_grad_norm_ no longer stores anything, so it can't exclude layers or read a "
            "buffer; "
            "pass the parameters that shall count to clip_grad_norm_"
        )


def _gradients(net_or_params: nn.Module | Tensor | Iterable[Tensor]) -> list[Gradient]:
    if isinstance(net_or_params, nn.Module):
        net_or_params = net_or_params.parameters()
    elif isinstance(net_or_params, Tensor):
        net_or_params = [net_or_params]
    found = {}
    for parameter in net_or_params:
        gradient = gradient_of(parameter)
        if gradient is not None:
            found[id(gradient)] = gradient
    return list(found.values())
