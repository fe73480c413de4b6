"""Propagators that do not learn by themselves."""

from __future__ import annotations

import torch
from torch import nn

from ..functional import propagators as functional
from ..streams import run
from .base import Propagator, check_flow


class Identity(Propagator):
    """Runs its block on the input stream alone, with the graph kept: the output layer, trained by
    the caller's loss.

    `optimizer` and `loss` are taken so that every propagator can be built alike; the caller's
    optimiser steps this block.
    """

    def __init__(self, module: nn.Module, optimizer=None, loss=None):
        super().__init__(module)

    def forward(self, input):
        check_flow(input)
        return functional.identity(input, lambda h: run(self.module, h))


class Forward(Propagator):
    """Runs its block on both streams and keeps the graph, so that a later loss can reach through
    it; does not train it."""

    globally_trained = False

    def __init__(self, module: nn.Module, optimizer=None, loss=None, *, fuse: bool | str = "auto"):
        super().__init__(module)
        self.fuse = fuse

    def forward(self, input):
        check_flow(input)
        h, t, context = input
        h1, t1, _, _ = self.propagate(h, t)
        return self.route(h1, t1, context)


class Fixed(Forward):
    """Runs its block on both streams without a graph: pooling, dropout, an activation, a random
    projection."""

    def forward(self, input):
        with torch.no_grad():
            return super().forward(input)
