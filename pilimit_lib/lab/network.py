"""Models together with what can be done to their architecture."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from torch import nn

from .edits.ops import Operations
from .errors import Refused
from .neurons.counters import Neurons
from .neurons.tracked import TrackedNetwork
from .run.session import Session


class NetworkWithOps(Operations, TrackedNetwork):
    """A network whose neurons can be added, removed and drawn anew. Subclass it, call
    `maybe_update_age(input)` in `forward`.

    `self.layers = [...]` fixes what `layer_index` counts; without it, layers are counted in order
    of execution. Inside an `Experiment` the optimiser follows each edit; alone, hand the returned
    change to `core.follow(optimizer, change)`.
    """

    @cached_property
    def _session(self) -> Session:
        return Session(self)

    @property
    def ops(self) -> ModelOps:
        """The operations on their own."""
        return ModelOps(self._session)

    @property
    def layers(self) -> Any:
        """The layers in the order in which `layer_index` counts them."""
        own = self.__dict__.get("layers", self._modules.get("layers"))
        return self._session.layers() if own is None else own

    @layers.setter
    def layers(self, own: Any) -> None:
        self.__dict__["layers"] = own


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile(model)` runs, or the model itself: what is counted and edited.

    The compiled module follows: its guards see counters, modes and new shapes.
    """
    if type(model).__name__ == "OptimizedModule":
        model = model._orig_mod
    for path, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise Refused(
                f"'{path or type(model).__name__}' was compiled in place, so the lab could neither "
                "trace nor edit it; compile the whole model instead, model = torch.compile(model), "
                "and pass that"
            )
    return model


class ModelOps(Operations):
    """Any model together with the operations; everything else is the model's own attribute."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def module(self) -> nn.Module:
        """The user's model."""
        return self._session.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_session":  # asked for while a copy is being made
            raise AttributeError(name)
        return getattr(self.module, name)

    def __repr__(self) -> str:
        return repr(self.module)

    @property
    def layers(self) -> list[LayerOps]:
        """A handle on each layer."""
        session = self._session
        handles = zip(session.layers(), session.layer_paths())
        return [LayerOps(layer, path, session.neurons[layer]) for layer, path in handles]


class LayerOps:
    """A handle on one layer: its own attributes, and rates of its neurons."""

    def __init__(self, module: nn.Module, path: str, neurons: Neurons) -> None:
        self.module, self.path, self.neurons = module, path, neurons

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __repr__(self) -> str:
        return f"{self.path}: {self.module}"

    def set_per_neuron_learning_rate(self, neuron_ids: Iterable[int], lr: float) -> None:
        """Let these neurons learn at `lr` (0 to 1) times the learning rate; at 0 their weights and
        bias stay bit for bit."""
        self.neurons.set_rate(neuron_ids, lr)

    def set_per_incoming_neuron_learning_rate(self, neuron_ids: Iterable[int], lr: float) -> None:
        """The same for the weights that lead from these incoming features or channels into the
        layer."""
        self.neurons.set_rate(neuron_ids, lr, incoming=True)
