"""The way back from a failed edit: every object that an edit replaces, by reference."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from ..neurons.counters import Neurons
from ..neurons.geometry import size_attributes


class Memento:
    """What model, counters and optimiser consist of at this moment. Edits replace tensors and never
    write into old ones, so
    references are enough: going back is exact, down to the identity of the parameters. Rates are
    written in place, and
    freezing changes flags: those are kept by value."""

    def __init__(self, roots: list[nn.Module], optimizer: Optimizer | None) -> None:
        self.modules = [
            (m, dict(m._parameters), dict(m._buffers), size_attributes(m))
            for root in roots
            for m in root.modules()
        ]
        self.flags = [(p, p.requires_grad, p.grad) for root in roots for p in root.parameters()]
        self.counters = [
            (m, {name: value.clone() for name, value in m._buffers.items()})
            for m, *_ in self.modules
            if isinstance(m, Neurons)
        ]
        self.optimizer = optimizer
        if optimizer is not None:
            self.groups = [list(group["params"]) for group in optimizer.param_groups]
            self.state = {parameter: dict(entry) for parameter, entry in optimizer.state.items()}

    def restore(self) -> None:
        """Put everything back."""
        for module, parameters, buffers, sizes in self.modules:
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
            for name, size in sizes.items():
                setattr(module, name, size)
        for parameter, learning, gradient in self.flags:
            parameter.requires_grad_(learning).grad = gradient
        for neurons, values in self.counters:
            neurons.load(values)
        if self.optimizer is not None:
            for group, params in zip(self.optimizer.param_groups, self.groups):
                group["params"] = params
            self.optimizer.state.clear()
            self.optimizer.state.update(self.state)
