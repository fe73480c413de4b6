"""The counters of all layers of a model: hooks where layers do not count by themselves, and the
mode that says into which counters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .counters import Neurons, TrackingMode
from .forward_state import ForwardState
from .geometry import incoming_count, is_layer, neuron_count, spatial_dims
from .tracked import Hook, NeuronOps, TrackedNetwork


class Tracking:
    """The counters of a model's layers. The documented layers count by themselves; plain ones are
    hooked.

    Counted are forward passes within training and evaluation *steps*, into the training or the
    evaluation counters by `model.training`. Anything else is looking, and leaves no trace. A mode
    that was chosen by hand wins over both.

    `always`: there is nobody to say when a step begins and ends, so every forward pass is one.
    `manual`: nothing is counted but in a chosen mode.
    """

    def __init__(self, module: nn.Module, *, always: bool = False, manual: bool = False) -> None:
        self.module, self.manual, self.always = module, manual, always
        self.stepping = always
        self.example: tuple | None = None  # the start of the first input that came by
        self.before: ForwardState | None = None  # as it was when the batch that is out came
        self._chosen: TrackingMode | None = None
        self.neurons = {layer: _neurons_of(layer) for layer in module.modules() if is_layer(layer)}
        self.counting = [layer for layer in self.neurons if isinstance(layer, NeuronOps)]
        self.entry = Hook(self._entered)
        self.handles = [module.register_forward_pre_hook(self.entry)]
        for layer in self.neurons:
            if not isinstance(layer, NeuronOps):
                self.handles.append(layer.register_forward_hook(Hook(self._counter(layer))))
        if isinstance(module, TrackedNetwork) and not manual:
            module.tracking_mode = None  # what its constructor said was for the time before

    def _counter(self, layer: nn.Module) -> Callable[..., None]:
        neurons, spatial = self.neurons[layer], spatial_dims(layer)

        def count(module: nn.Module, args: tuple, output: Tensor) -> None:
            neurons.count(output, spatial, self.mode)

        return count

    def _entered(self, module: nn.Module, args: tuple) -> None:
        self._spread()
        if self.example is None and args and isinstance(args[0], Tensor):
            self.example = tuple(
                arg.detach()[:2].clone() if isinstance(arg, Tensor) and arg.ndim else arg
                for arg in args
            )

    @property
    def mode(self) -> TrackingMode:
        """Which counters a forward pass feeds. Setting it chooses, until None is set."""
        chosen = self.chosen
        if chosen is not None:
            return chosen
        if not self.stepping or self.manual:
            return TrackingMode.DISABLED
        return TrackingMode.TRAIN if self.module.training else TrackingMode.EVAL

    @mode.setter
    def mode(self, mode: TrackingMode | None) -> None:
        self._chosen = None if mode is None else TrackingMode(mode)
        if isinstance(self.module, TrackedNetwork):
            self.module.tracking_mode = self._chosen
        self._spread()

    @property
    def chosen(self) -> TrackingMode | None:
        """The mode that was chosen by hand, on the lab or on the network."""
        own = isinstance(self.module, TrackedNetwork)
        return self.module.__dict__["_chosen_mode"] if own else self._chosen

    def _spread(self) -> None:
        """Tell the layers that count by themselves."""
        mode = self.mode
        if isinstance(self.module, TrackedNetwork):
            if self.module.tracking_mode is not mode:
                self.module.count_into(mode)
        elif self.counting and self.counting[0].tracking_mode is not mode:
            for layer in self.counting:
                layer.tracking_mode = mode

    def begin(self) -> None:
        """The forward passes from here on belong to a step."""
        self.stepping = True

    def end(self) -> None:
        """The step is over: whoever runs the model now is looking."""
        self.stepping = self.always
        self._spread()

    def served(self, out: bool) -> None:
        """A loader says that a batch is out, or that its loop has come back for the next."""
        self.before = ForwardState(self.module, self.neurons.values()) if out else None
        self.begin() if out else self.end()

    def take_back(self) -> None:
        """What forward passes on the present batch moved is as it was before."""
        if self.before is not None:
            self.before.restore()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Forward passes inside the `with` belong to a step, on one batch."""
        self.served(True)
        try:
            yield
        finally:
            self.served(False)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Forward passes inside the `with` are not counted."""
        chosen, self.mode = self.chosen, TrackingMode.DISABLED
        try:
            yield
        finally:
            self.mode = chosen

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


def _neurons_of(layer: nn.Module) -> Neurons:
    if isinstance(layer, NeuronOps):
        return layer.neurons
    return Neurons(neuron_count(layer), incoming_count(layer), layer.weight.device)
