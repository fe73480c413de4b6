"""The counters of all layers of a model: hooks where layers do not count by themselves, and the
mode that says into which counters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .counters import Neurons, TrackingMode
from .geometry import incoming_count, is_layer, neuron_count, spatial_dims
from .tracked import Hook, NeuronOps, TrackedNetwork


class Tracking:
    """The counters of a model's layers. The documented layers count by themselves; plain ones are
    hooked.

    `auto`: before each forward pass of the model the mode follows `model.training`.
    """

    def __init__(self, module: nn.Module, auto: bool) -> None:
        self.module, self.auto = module, auto
        self.example: tuple | None = None  # the start of the first input that came by
        self._mode = TrackingMode.DISABLED
        self.neurons = {layer: _neurons_of(layer) for layer in module.modules() if is_layer(layer)}
        self.entry = Hook(self._entered)
        self.handles = [module.register_forward_pre_hook(self.entry)]
        for layer in self.neurons:
            if not isinstance(layer, NeuronOps):
                self.handles.append(layer.register_forward_hook(Hook(self._counter(layer))))

    def _counter(self, layer: nn.Module) -> Callable[..., None]:
        neurons, spatial = self.neurons[layer], spatial_dims(layer)

        def count(module: nn.Module, args: tuple, output: Tensor) -> None:
            neurons.count(output, spatial, self.mode)

        return count

    def _entered(self, module: nn.Module, args: tuple) -> None:
        if self.auto:
            mode = TrackingMode.TRAIN if module.training else TrackingMode.EVAL
            if self.mode is not mode:
                self.mode = mode
        if self.example is None and args and isinstance(args[0], Tensor):
            self.example = tuple(
                arg.detach()[:2].clone() if isinstance(arg, Tensor) else arg for arg in args
            )

    @property
    def mode(self) -> TrackingMode:
        """Which counters a forward pass feeds."""
        return self.module.tracking_mode if isinstance(self.module, TrackedNetwork) else self._mode

    @mode.setter
    def mode(self, mode: TrackingMode) -> None:
        if isinstance(self.module, TrackedNetwork):
            self.module.tracking_mode = mode
            return
        self._mode = TrackingMode(mode)
        for layer in self.neurons:
            if isinstance(layer, NeuronOps):
                layer.tracking_mode = self._mode

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Forward passes inside the `with` are not counted."""
        mode, resting = self.mode, self.entry.resting
        self.mode, self.entry.resting = TrackingMode.DISABLED, True
        try:
            yield
        finally:
            self.mode, self.entry.resting = mode, resting

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


def _neurons_of(layer: nn.Module) -> Neurons:
    if isinstance(layer, NeuronOps):
        return layer.neurons
    return Neurons(neuron_count(layer), incoming_count(layer), layer.weight.device)
