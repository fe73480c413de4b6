"""A learning rate of its own for the monomials of high degree in V, whatever the optimiser."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.optim import Optimizer

from ..moments.layer import MomentsLayer
from ..moments.parameter import FactoredParameter


class DegreeRates:
    """Steps the monomials of degree `from_degree` and more in V with `factor` times the learning
    rate.

    A rate is what a step of every optimiser of torch is proportional to, given its moments and
    velocities, which do not contain it: so the change of those rows of V, decay included, is
    multiplied by `factor` after each step. It is as if they were a parameter of a group of their
    own, and V stays one tensor. The hooks go where the optimiser goes, but not into a copy of it or
    a checkpoint: attach them again there.

    Args:
        net: whose layers of moments are meant. optimizer: which holds their V.
        factor: 0 keeps the block as it is.
    """

    def __init__(
        self, net: nn.Module, optimizer: Optimizer, factor: float, from_degree: int = 2
    ) -> None:
        if not 0 <= factor < float("inf"):
            raise ValueError(
                f"factor is {factor}; a share of the learning rate, from 0, was expected"
            )
        self.factor, self.from_degree = float(factor), from_degree
        self.blocks = list(_blocks(net, optimizer, from_degree))
        self._before: list[torch.Tensor] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._keep),
            optimizer.register_step_post_hook(self._scale),
        ]

    def remove(self) -> None:
        """From now on all of V is stepped with the rate of its group."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _keep(self, *_: object) -> None:
        self._before = [V[start:].detach().clone() for V, start in self.blocks]

    @torch.no_grad()
    def _scale(self, *_: object) -> None:
        for (V, start), before in zip(self.blocks, self._before):
            V[start:].sub_(before).mul_(self.factor).add_(before)
        self._before = []


def _blocks(
    net: nn.Module, optimizer: Optimizer, from_degree: int
) -> Iterator[tuple[nn.Parameter, int]]:
    """(V, where its monomials of degree `from_degree` begin) of every layer of moments."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    layers = [module for module in net.modules() if isinstance(module, MomentsLayer)]
    if not layers:
        raise ValueError(
            f"{type(net).__name__} has no layer of moments, so no V whose degrees could have rates"
        )
    for layer in layers:
        if isinstance(layer.V, FactoredParameter):
            raise ValueError(
                "a fused layer's V is stepped in place by its factors, for all degrees at once; "
                "build the layer with fused=False"
            )
        if id(layer.V) not in held:
            continue
        starts = [s for degree, s in layer.features.starts.items() if degree >= from_degree]
        if starts:
            yield layer.V, min(starts)
