"""Operations on the architecture, for any module: add, prune and redraw neurons, freeze layers, set
rates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...core import Change
from ..errors import NotFound, Refused
from ..neurons.counters import Neurons, indices
from ..neurons.couplings import Coupling, Tie
from ..neurons.geometry import is_layer, neuron_count
from . import plan as plans
from .plan import Plan
from .surgery import Step, drop, extend, renew, steps_for

if TYPE_CHECKING:
    from ..watch import Lab

OPERATIONS = ("add_neurons", "prune", "reinit_neurons")


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


class ModelOps:
    """A model together with what can be done to its architecture; everything else is the model's
    own attribute.

    `layer_index` counts layers in order of execution, or in the order of the model's own list
    `layers` of layers; `layer="features.0"` names one by its path. Each edit is planned and
    validated first, is checked on an example batch, and happens on all tensors, counters and
    optimiser states or on none. Edits return the `Change` of `pilimit_lib.core`.
    """

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    @property
    def module(self) -> nn.Module:
        """The user's model."""
        return self.lab.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.lab.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lab.module, name)

    def __repr__(self) -> str:
        return repr(self.lab.module)

    # ---- layers

    def layer_modules(self) -> list[nn.Module]:
        """The layers in the order in which `layer_index` counts them."""
        own = self.lab.module.__dict__.get("layers", self.lab.module._modules.get("layers"))
        if (
            isinstance(own, list | tuple | nn.ModuleList)
            and len(own)
            and all(is_layer(layer) for layer in own)
        ):
            return list(own)
        return self.lab.execution_order()

    def layer_paths(self) -> list[str]:
        """Their paths in the model."""
        paths = {module: path for path, module in self.lab.module.named_modules()}
        return [paths[layer] for layer in self.layer_modules()]

    @property
    def layers(self) -> list[LayerOps]:
        """A handle on each layer."""
        return [
            LayerOps(layer, path, self.lab.neurons[layer])
            for layer, path in zip(self.layer_modules(), self.layer_paths())
        ]

    def resolve(self, layer_index: int | None, layer: str | nn.Module | None) -> nn.Module:
        """The layer meant by an index, a path or the module itself."""
        if (layer_index is None) == (layer is None):
            raise ValueError("name one layer: either layer_index=... or layer='path.of.the.module'")
        if layer is not None:
            known = {
                path: module for path, module in self.lab.module.named_modules() if is_layer(module)
            }
            if layer in known.values():
                return layer
            if layer not in known:
                raise NotFound(f"no layer '{layer}'; layers are {list(known)}")
            return known[layer]
        layers = self.layer_modules()
        if isinstance(layer_index, bool) or not hasattr(layer_index, "__index__"):
            raise TypeError(
                f"layer_index={layer_index!r}: an integer from 0 to {len(layers) - 1} was expected"
            )
        if not 0 <= layer_index < len(layers):
            raise NotFound(
                f"no layer with index {layer_index}; there are {len(layers)}, counted from 0"
            )
        return layers[layer_index]

    # ---- edits

    def add_neurons(
        self,
        layer_index: int | None = None,
        neuron_count: int = 1,
        *,
        layer: str | nn.Module | None = None,
        init: str = "zero_out",
        allow_output: bool = False,
    ) -> Change:
        """Add neurons at the end of a layer without changing the function of the network.

        `init="zero_out"`: drawn as torch draws the layer, read with weight zero. `init="split"`:
        copies of randomly chosen neurons, which share the outgoing weight with their originals
        (Chen et al., Net2Net, 2016) in unequal parts.
        """
        return self._carry_out(
            self._plan_add(self.resolve(layer_index, layer), neuron_count, init, allow_output)
        )

    def prune(
        self,
        layer_index: int | None = None,
        neuron_indices: Iterable[int] = (),
        *,
        layer: str | nn.Module | None = None,
        allow_output: bool = False,
    ) -> Change:
        """Remove neurons; the network then computes what it would with these neurons masked."""
        return self._carry_out(
            self._plan_prune(self.resolve(layer_index, layer), neuron_indices, allow_output)
        )

    def reinit_neurons(
        self,
        layer_index: int | None = None,
        neuron_indices: Iterable[int] = (),
        *,
        perturbation_ratio: float | None = None,
        layer: str | nn.Module | None = None,
        allow_output: bool = False,
    ) -> Change:
        """Draw neurons anew: fresh incoming weights, outgoing weights zero, neutral batch norm,
        fresh optimiser state.

        With a `perturbation_ratio` r in (0, 1) they are only shaken: each incoming weight and bias
        is multiplied by a number drawn uniformly from [1 - r, 1 + r], and everything else stays.
        """
        target = self.resolve(layer_index, layer)
        if perturbation_ratio is not None:
            return self._carry_out(self._plan_perturb(target, neuron_indices, perturbation_ratio))
        return self._carry_out(self._plan_reinit(target, neuron_indices, allow_output))

    def plan(
        self,
        operation: str,
        layer_index: int | None = None,
        *,
        layer: str | nn.Module | None = None,
        **options: Any,
    ) -> Plan:
        """A dry run of `add_neurons`, `prune` or `reinit_neurons`: the same validation, and every
        tensor that it would touch."""
        if operation not in OPERATIONS:
            raise ValueError(f"no operation '{operation}'; there are {', '.join(OPERATIONS)}")
        target, allow = self.resolve(layer_index, layer), options.pop("allow_output", False)
        if operation == "add_neurons":
            return self._plan_add(
                target,
                options.pop("neuron_count", 1),
                options.pop("init", "zero_out"),
                allow,
                **options,
            )
        chosen, ratio = options.pop("neuron_indices", ()), options.pop("perturbation_ratio", None)
        if operation == "prune":
            return self._plan_prune(target, chosen, allow, **options)
        if ratio is not None:
            return self._plan_perturb(target, chosen, ratio, **options)
        return self._plan_reinit(target, chosen, allow, **options)

    def _carry_out(self, plan: Plan) -> Change:
        with self.lab.history.one(plan.summary):
            return plans.apply(plan, self.lab)

    def _coupling(self, layer: nn.Module, allow_output: bool) -> Coupling:
        coupling = self.lab.planner().coupling(layer)
        if not coupling.columns() and not allow_output:
            raise Refused(
                f"'{coupling.path}' feeds no other layer: it is an output layer, and its neurons "
                "are the answers of "
                "the model; pass allow_output=True if that is meant"
            )
        return coupling

    def _plan(
        self,
        operation: str,
        summary: str,
        coupling: Coupling,
        steps: list[Step],
        preserves: str | None,
        removed: list[int],
    ) -> Plan:
        return Plan(
            operation,
            summary,
            coupling,
            steps,
            preserves,
            tuple(removed),
            plans.touched(steps, self.lab),
        )

    def _plan_add(self, layer: nn.Module, count: int, init: str, allow_output: bool) -> Plan:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(
                f"neuron_count={count!r}: a number of neurons of at least 1 was expected"
            )
        if init not in ("zero_out", "split"):
            raise ValueError(f"init='{init}': 'zero_out' or 'split' was expected")
        coupling = self._coupling(layer, allow_output)
        if init == "split" and not coupling.columns():
            raise Refused(
                f"'{coupling.path}' feeds no other layer, so no outgoing weight can be split"
            )
        copies = [-1] * count
        if init == "split":
            copies = [int(torch.randperm(coupling.size)[0]) for _ in range(count)]
        steps = steps_for(
            coupling,
            self.lab.neurons,
            lambda tie: extend(tie, copies),
            (lambda tie, source: _shares(tie, source, copies)) if init == "split" else None,
        )
        return self._plan(
            "add_neurons",
            f"add {count} neurons to '{coupling.path}' ({init})",
            coupling,
            steps,
            None if allow_output or not coupling.columns() else "itself",
            [],
        )

    def _plan_prune(
        self, layer: nn.Module, neuron_indices: Iterable[int], allow_output: bool
    ) -> Plan:
        chosen = self._chosen(layer, neuron_indices)
        if len(chosen) == neuron_count(layer):
            raise Refused(
                f"this would remove all {len(chosen)} neurons of the layer; at least one has to "
                "stay"
            )
        coupling = self._coupling(layer, allow_output)
        steps = steps_for(coupling, self.lab.neurons, lambda tie: drop(tie, chosen))
        return self._plan(
            "prune",
            f"prune neurons {_short(chosen)} of '{coupling.path}'",
            coupling,
            steps,
            None if allow_output else "masked",
            chosen,
        )

    def _plan_reinit(
        self, layer: nn.Module, neuron_indices: Iterable[int], allow_output: bool
    ) -> Plan:
        chosen = self._chosen(layer, neuron_indices)
        coupling = self._coupling(layer, allow_output)
        steps = steps_for(coupling, self.lab.neurons, lambda tie: renew(tie, chosen))
        return self._plan(
            "reinit_neurons",
            f"reinitialise neurons {_short(chosen)} of '{coupling.path}'",
            coupling,
            steps,
            None if allow_output else "masked",
            chosen,
        )

    def _plan_perturb(self, layer: nn.Module, neuron_indices: Iterable[int], ratio: float) -> Plan:
        if (
            isinstance(ratio, bool)
            or not isinstance(ratio, int | float)
            or not math.isfinite(ratio)
            or not 0 < ratio < 1
        ):
            raise ValueError(
                f"perturbation_ratio={ratio!r}: a number strictly between 0 and 1 was expected"
            )
        chosen = self._chosen(layer, neuron_indices)
        coupling = self._coupling(layer, True)
        rows = [tie for tie in coupling.ties if tie.module is layer and tie.role == "row"]
        everything = steps_for(
            Coupling(layer, coupling.path, coupling.size, tuple(rows)),
            {},
            lambda tie: torch.arange(getattr(tie.module, tie.name).shape[tie.dim]),
        )

        @torch.no_grad()
        def shake() -> None:
            for step in everything:
                index = torch.tensor(chosen, device=step.value.device)
                old = step.value.index_select(step.dim, index)
                noise = torch.empty_like(old).uniform_(1 - ratio, 1 + ratio)
                step.value.index_copy_(step.dim, index, old * noise)

        return Plan(
            "reinit_neurons",
            f"perturb neurons {_short(chosen)} of '{coupling.path}' by {ratio}",
            coupling,
            everything,
            None,
            (),
            plans.touched(everything, self.lab),
            shake,
        )

    def _chosen(self, layer: nn.Module, neuron_indices: Iterable[int]) -> list[int]:
        chosen = indices(neuron_indices, neuron_count(layer), "neurons")
        if not chosen:
            raise ValueError("neuron_indices is empty; name at least one neuron")
        return chosen

    # ---- freezing

    def freeze_layers_up_to_idx(self, layer_index: int) -> None:
        """Stop learning in all layers up to and including this one: no gradient, so neither
        momentum nor decay moves them."""
        self.resolve(layer_index, None)
        self._set_learning(self.layer_modules()[: layer_index + 1], False)

    def unfreeze_layers_from_idx(self, layer_index: int) -> None:
        """Let all layers from this one on learn again."""
        self.resolve(layer_index, None)
        self._set_learning(self.layer_modules()[layer_index:], True)

    def _set_learning(self, layers: list[nn.Module], learning: bool) -> None:
        for layer in layers:
            for parameter in layer.parameters():
                parameter.requires_grad_(learning)
                if not learning:
                    # a gradient of zero would still be moved by momentum and decay
                    parameter.grad = None
        paths = {module: path for path, module in self.lab.module.named_modules()}
        self.lab.note(
            "unfreeze" if learning else "freeze", layers=[paths[layer] for layer in layers]
        )


def _short(chosen: list[int]) -> str:
    return str(chosen) if len(chosen) <= 8 else f"{str(chosen[:6])[:-1]}, ...] ({len(chosen)})"


def _shares(tie: Tie, source: Tensor, copies: list[int]) -> dict[int, Tensor]:
    """Factors of outgoing weights by new position: those of a neuron and its copies add up to one,
    in unequal parts."""
    factors = {}
    for neuron in set(copies):
        parts = 0.5 + torch.rand(1 + copies.count(neuron))
        parts = parts / parts.sum()
        for old in tie.positions[neuron].tolist():
            for position, part in zip((source == old).nonzero().flatten().tolist(), parts):
                factors[position] = part
    return factors
