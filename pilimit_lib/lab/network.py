"""The documented classes: layers and networks that know their neurons. They hold the same
parameters as torch's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .neurons.counters import Neurons, TrackingMode
from .neurons.geometry import incoming_count, neuron_count, spatial_dims

if TYPE_CHECKING:
    from .edits.ops import ModelOps


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


class NetworkWithOps(nn.Module):
    """A network whose neurons can be added, removed and drawn anew. Subclass it, call
    `maybe_update_age(input)` in `forward`.

    `self.layers = [...]` fixes what `layer_index` counts; without it, layers are counted in order
    of execution. Inside an `Experiment` the optimiser follows each edit; alone, hand the returned
    change to `core.follow(optimizer, change)`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tracking_mode = TrackingMode.DISABLED
        self._age = 0
        self.__dict__["_lab"] = None

    def __getattr__(self, name: str) -> Any:
        if name == "layers":
            return self.ops.layer_modules()
        return super().__getattr__(name)

    @property
    def ops(self) -> ModelOps:
        """The operations themselves, also those not named here."""
        if self.__dict__.get("_lab") is None:
            from .watch import Lab

            Lab(self)
        return self.__dict__["_lab"].ops

    @property
    def tracking_mode(self) -> TrackingMode:
        """Which counters a forward pass feeds; an experiment sets it to TRAIN in training steps, to
        EVAL in evaluation."""
        return self._tracking_mode

    @tracking_mode.setter
    def tracking_mode(self, mode: TrackingMode) -> None:
        self._tracking_mode = TrackingMode(mode)
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

    def add_neurons(
        self, layer_index: int | None = None, neuron_count: int = 1, **options: Any
    ) -> Any:
        """See `ModelOps.add_neurons`."""
        return self.ops.add_neurons(layer_index, neuron_count, **options)

    def prune(
        self, layer_index: int | None = None, neuron_indices: Iterable[int] = (), **options: Any
    ) -> Any:
        """See `ModelOps.prune`."""
        return self.ops.prune(layer_index, neuron_indices, **options)

    def reinit_neurons(
        self, layer_index: int | None = None, neuron_indices: Iterable[int] = (), **options: Any
    ) -> Any:
        """See `ModelOps.reinit_neurons`."""
        return self.ops.reinit_neurons(layer_index, neuron_indices, **options)

    def plan(self, operation: str, layer_index: int | None = None, **options: Any) -> Any:
        """See `ModelOps.plan`."""
        return self.ops.plan(operation, layer_index, **options)

    def freeze_layers_up_to_idx(self, layer_index: int) -> None:
        """See `ModelOps.freeze_layers_up_to_idx`."""
        self.ops.freeze_layers_up_to_idx(layer_index)

    def unfreeze_layers_from_idx(self, layer_index: int) -> None:
        """See `ModelOps.unfreeze_layers_from_idx`."""
        self.ops.unfreeze_layers_from_idx(layer_index)
