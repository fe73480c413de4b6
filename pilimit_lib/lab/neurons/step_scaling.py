"""Learning rates of single neurons, right for any optimiser: the step itself is scaled, not the
gradient.

Scaling gradients would do nothing under Adam, and weight decay or momentum would still move a
neuron whose gradient is zero. So the weights are remembered before a step, and the step is scaled
after it: w = old + rate * (new - old). Where the rate is 0 the old bits are put back. The
optimiser's moments go on building up meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .counters import Neurons
from .geometry import incoming_dim, neuron_dim


class StepScaling:
    """Hooks on one optimiser. Layers whose rates are all 1 cost nothing but the question.

    `before_step` is called before each step, and may refuse it by raising.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        neurons: dict[nn.Module, Neurons],
        before_step: Callable[[], None],
    ) -> None:
        self.neurons, self.before_step = neurons, before_step
        self.before: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        self.handles = [
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._scale),
        ]

    def __deepcopy__(self, memo: dict) -> None:
        return None

    @torch.no_grad()
    def _remember(self, *_: Any) -> None:
        self.before_step()
        slowed = [(layer, held) for layer, held in self.neurons.items() if held.slowed]
        self.before = [
            (parameter, parameter.detach().clone(), rate)
            for layer, neurons in slowed
            for parameter, rate in _rates(layer, neurons)
        ]

    @torch.no_grad()
    def _scale(self, *_: Any) -> None:
        for parameter, old, rate in self.before:
            scaled = torch.where(rate == 0, old, old + rate * (parameter - old))
            parameter.copy_(torch.where(rate == 1, parameter, scaled))
        self.before = []

    def remove(self) -> None:
        """Take the hooks off the optimiser."""
        for handle in self.handles:
            handle.remove()


def _rates(layer: nn.Module, neurons: Neurons) -> list[tuple[nn.Parameter, Tensor]]:
    """The layer's parameters with a rate for each entry (broadcast)."""
    weight = layer.weight
    rows, columns = [1] * weight.ndim, [1] * weight.ndim
    rows[neuron_dim(layer)], columns[incoming_dim(layer)] = -1, -1
    pairs = [(weight, (neurons.rate.view(rows) * neurons.in_rate.view(columns)).to(weight))]
    if layer.bias is not None:
        pairs.append((layer.bias, neurons.rate.to(layer.bias)))
    return pairs
