"""What autograd is doing right now, as far as it decides how a derivative is computed.

The sums of moments work in place, tile by tile, and without the tape: what an ordinary backward
pass needs, and what no transform of torch.func, no forward mode and no derivative of a derivative
can follow. Where one of these is under way, a layer computes its definition in plain torch
operations instead, from which torch derives the rest, to any order. Φ is then formed as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from ..numerics import transformed


def followed(grad: Tensor) -> bool:
    """Whether a backward pass that was handed `grad` must be made of plain operations: it is itself
    differentiated, transformed, or run for many gradients at once (`is_grads_batched`)."""
    batched = torch._C._functorch.is_legacy_batchedtensor(grad)
    return torch.is_grad_enabled() or batched or transformed()


def accumulates(leaf: Tensor, node: Node | None = None) -> bool:
    """Whether the backward pass under way will add to `leaf.grad`, as `backward()` does;
    `torch.autograd.grad` only hands gradients back. `node`: that of the tape which adds, where it
    is at hand."""
    try:
        return torch._C._will_engine_execute_node(node or get_gradient_edge(leaf).node)
    except RuntimeError:
        return False  # the gradient of this very leaf was asked for


def pulled_back(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of `function` at `inputs`, for a gradient of its output, as plain operations;
    None for what is not needed."""
    places = [place for place, wanted in enumerate(needed) if wanted]

    def of_needed(*some: Tensor) -> Tensor:
        whole = list(inputs)
        for place, value in zip(places, some):
            whole[place] = value
        return function(*whole)

    found = torch.func.vjp(of_needed, *(inputs[place] for place in places))[1](grad)
    gradients = dict(zip(places, found))
    return tuple(gradients.get(place) for place in range(len(inputs)))
