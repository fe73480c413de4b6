"""Layers and networks that count, and forward passes that nobody counts. The layers hold the same
parameters as torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...core import rng_state, set_rng_state
from .counters import Neurons, TrackingMode
from .geometry import incoming_count, neuron_count, spatial_dims


class NeuronOps:
    """What a layer with neurons adds to torch's: counting triggers, and learning rates of single
    neurons.

    The counters are kept beside the layer, not in its `state_dict`, which stays that of the plain
    torch layer.
    """

    tracking_mode = TrackingMode.DISABLED

    @property
    def neurons(self) -> Neurons:
        """Counters and rates, made when first asked for."""
        held = self.__dict__.get("_neurons")
        if held is None:
            held = Neurons(neuron_count(self), incoming_count(self), self.weight.device)
            self.__dict__["_neurons"] = held
        return held

    def forward(self, input: Tensor, skip_register: bool = False) -> Tensor:
        """As torch's layer; triggers are counted in the current tracking mode unless
        `skip_register`."""
        output = super().forward(input)
        if not skip_register and self.tracking_mode is not TrackingMode.DISABLED:
            self.neurons.count(output, spatial_dims(self), self.tracking_mode)
        return output

    def set_per_neuron_learning_rate(self, neuron_ids: Iterable[int], lr: float) -> None:
        """Let these neurons learn at `lr` (0 to 1) times the learning rate; at 0 their weights and
        bias stay bit for bit."""
        self.neurons.set_rate(neuron_ids, lr)

    def set_per_incoming_neuron_learning_rate(self, neuron_ids: Iterable[int], lr: float) -> None:
        """The same for the weights that lead from these incoming features or channels into the
        layer."""
        self.neurons.set_rate(neuron_ids, lr, incoming=True)


class Conv2dWithNeuronOps(NeuronOps, nn.Conv2d):
    """`nn.Conv2d` whose neurons (output channels) are counted and have learning rates."""


class LinearWithNeuronOps(NeuronOps, nn.Linear):
    """`nn.Linear` whose neurons (output features) are counted and have learning rates."""


class TrackedNetwork(nn.Module):
    """A network that knows its age and tells its layers into which counters to count."""

    def __init__(self) -> None:
        super().__init__()
        self._tracking_mode = TrackingMode.DISABLED
        self._chosen_mode: TrackingMode | None = None
        self._age = 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: held for name, held in self.__dict__.items() if name != "_session"}

    @property
    def tracking_mode(self) -> TrackingMode:
        """Which counters a forward pass feeds. In an experiment that is TRAIN in training steps,
        EVAL in evaluation, and DISABLED otherwise; a mode set by hand wins until None is set."""
        return self._tracking_mode

    @tracking_mode.setter
    def tracking_mode(self, mode: TrackingMode | None) -> None:
        self.count_into(TrackingMode.DISABLED if mode is None else TrackingMode(mode))
        self.__dict__["_chosen_mode"] = None if mode is None else self._tracking_mode

    def count_into(self, mode: TrackingMode) -> None:
        """Set the mode for the time being: not one that was set by hand."""
        self._tracking_mode = mode
        self._spread_mode()

    def _spread_mode(self) -> None:
        for module in self.modules():
            if isinstance(module, NeuronOps):
                module.tracking_mode = self._tracking_mode
        self.__dict__["_modes_spread"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["_modes_spread"] = False  # layers may have come after the mode was set
        super().__setattr__(name, value)

    @property
    def age(self) -> int:
        """How many training samples the network has seen, as `maybe_update_age` counted them."""
        return self._age

    def maybe_update_age(self, input: Tensor) -> None:
        """Call at the start of `forward`: counts training samples, and remembers what an input
        looks like for planning."""
        if not self.__dict__.get("_modes_spread"):
            self._spread_mode()
        self.__dict__["_example"] = input.detach()[:2]
        if self._tracking_mode is TrackingMode.TRAIN:
            self.__dict__["_age"] += input.shape[0]


class Hook:
    """A hook of the lab on a module. It rests while the lab itself runs the model, and for good in
    a copy of the model, so that copies feed no counters."""

    def __init__(self, act: Callable[..., None] | None = None) -> None:
        self.act = act
        self.resting = act is None

    def __call__(self, *args: Any) -> None:
        if not self.resting:
            self.act(*args)

    def __reduce__(self) -> tuple:
        return Hook, ()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the model for our own purposes without leaving a trace: in evaluation mode and uncounted;
    afterwards modes, buffers, ages and generators are as they were."""
    modules = list(model.modules())
    training = [(module, module.training) for module in modules]
    hooks = [(hook, hook.resting) for module in modules for hook in _hooks_of(module)]
    layers = [(m, m.tracking_mode) for m in modules if isinstance(m, NeuronOps)]
    networks = [(m, m.__dict__["_tracking_mode"]) for m in modules if isinstance(m, TrackedNetwork)]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    generators, numpys = rng_state(), np.random.get_state()
    try:
        model.eval()
        for hook, _ in hooks:
            hook.resting = True
        for layer, _ in layers:
            layer.tracking_mode = TrackingMode.DISABLED
        for network, _ in networks:
            network.__dict__.update(_tracking_mode=TrackingMode.DISABLED, _modes_spread=True)
        yield
    finally:
        for module, was in training:
            module.training = was
        for hook, was in hooks:
            hook.resting = was
        for layer, was in layers:
            layer.tracking_mode = was
        for network, was in networks:
            network.__dict__.update(_tracking_mode=was, _modes_spread=False)
        with torch.no_grad():
            for buffer, value in buffers:
                # writing unasked would spoil graphs that are still alive
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        set_rng_state(generators)
        np.random.set_state(numpys)


def _hooks_of(module: nn.Module) -> list[Hook]:
    held = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return [hook for hook in held if isinstance(hook, Hook)]
