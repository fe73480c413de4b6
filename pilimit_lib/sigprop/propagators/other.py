"""Propagators that do not learn by themselves."""

from __future__ import annotations

import torch

from ..functional import propagators as functional
from ..streams import run
from .base import Propagator, check_flow


class Identity(Propagator):
    """Runs its block on the input stream alone, with the graph kept: the output layer, trained by
    the caller's loss, whose optimiser steps this block."""

    def forward(self, input):
        check_flow(input)
        return functional.identity(input, lambda h: run(self.module, h))


class Forward(Propagator):
    """Runs its block on both streams and keeps the graph, so that a later loss can reach through
    it; does not train it."""

    globally_trained = False

    def forward(self, input):
        return self.carry(input)


class Fixed(Propagator):
    """Runs its block on both streams without a graph: pooling, dropout, an activation, a random
    projection."""

    globally_trained = False

    def forward(self, input):
        with torch.no_grad():
            return self.carry(input)
