"""Models: how often the streams pass through the network, and what the target stream starts
from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from ..streams import own_statistics
from .base import Model


class Forward(Model):
    """The base model: one pass in which each layer learns as soon as input and target have
    arrived."""

    def forward(self, input):
        return self.flow(*input)


def _with_error(
    self: Model,
    model: nn.Module,
    signal: nn.Module,
    error: Callable,
    optimizer: Callable | None = None,
):
    """A model whose last pass learns from `error(output, context)`."""
    Model.__init__(self, model, signal, optimizer)
    if not callable(error):
        raise TypeError(
            f"error must be callable as error(output, context), got {type(error).__name__}"
        )
    self.error = error


class LoopBack(Model):
    """A pass without targets, whose `error(output, context)` is the target of a second, learning
    pass (one update per layer)."""

    __init__ = _with_error

    def forward(self, input):
        x, context = input
        if context is None:
            return self.flow(x, None)
        # Each batch counts once in the running statistics: in the learning pass.
        with torch.no_grad(), own_statistics(self) if self.training else nullcontext():
            out = self.flow(x, None)
        return self.flow(x, context, self.error(out, context).detach())


class ForwardLoopBack(Model):
    """A learning pass on the context, whose error is the target of a second one (two updates per
    layer)."""

    __init__ = _with_error

    def forward(self, input):
        x, context = input
        out = self.flow(x, context)
        if context is None:
            return out
        return self.flow(x, context, self.error(out, context).detach())
