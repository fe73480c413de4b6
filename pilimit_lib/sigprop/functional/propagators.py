"""Stateless propagators: an operation between layers, such as a reshape, on the triple (h, t,
context)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..flow import Flow


def identity(input: tuple, func: Callable[[Tensor], Tensor]) -> Flow:
    """`func` on the input stream; the target stream passes as it is. Gradients pass."""
    h, t, context = input
    return Flow(func(h), t, context)


def forward(input: tuple, func: Callable[[Tensor], Tensor]) -> Flow:
    """`func` on both streams. Gradients pass."""
    h, t, context = input
    return Flow(func(h), None if t is None else func(t), context)


def fixed(input: tuple, func: Callable[[Tensor], Tensor]) -> Flow:
    """`func` on both streams, without a graph: no gradient passes."""
    with torch.no_grad():
        return forward(input, func)
