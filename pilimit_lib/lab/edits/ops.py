"""Operations on the architecture, for any module: add, prune and redraw neurons, freeze layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core import Change
from ..errors import NotFound, Refused
from ..neurons.couplings import Coupling, Tie
from ..neurons.geometry import indices, is_layer, neuron_count
from ..run.session import Session
from .plan import Plan, touched
from .rollback import apply
from .surgery import Step, drop, extend, length, renew, steps_for


class Operations:
    """What can be done to the architecture of the model of `_session`.

    `layer_index` counts layers in order of execution, or in the order of the model's own list
    `layers` of layers; `layer="features.0"` names one by its path. Each edit is planned and
    validated first, is checked on an example batch, and happens on all tensors, counters and
    optimiser states or on none. Edits return the `Change` of `pilimit_lib.core`.
    """

    _session: Session

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
        target = resolve(self._session, layer_index, layer)
        plan = _plan_add(self._session, target, neuron_count, init, allow_output)
        return apply(plan, self._session)

    def prune(
        self,
        layer_index: int | None = None,
        neuron_indices: Iterable[int] = (),
        *,
        layer: str | nn.Module | None = None,
        allow_output: bool = False,
    ) -> Change:
        """Remove neurons; the network then computes what it would with these neurons masked."""
        target = resolve(self._session, layer_index, layer)
        plan = _plan_prune(self._session, target, neuron_indices, allow_output)
        return apply(plan, self._session)

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
        target = resolve(self._session, layer_index, layer)
        plan = _plan_reinit(self._session, target, neuron_indices, perturbation_ratio, allow_output)
        return apply(plan, self._session)

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
        if operation not in PLANS:
            raise ValueError(f"no operation '{operation}'; there are {', '.join(PLANS)}")
        target = resolve(self._session, layer_index, layer)
        plan = PLANS[operation](self._session, target, **options)
        return replace(plan, tensors=touched(plan.steps, self._session.optimizer))

    def freeze_layers_up_to_idx(self, layer_index: int) -> None:
        """Stop learning in all layers up to and including this one: no gradient, so neither
        momentum nor decay moves them."""
        resolve(self._session, layer_index, None)
        _set_learning(self._session, self._session.layers()[: layer_index + 1], False)

    def unfreeze_layers_from_idx(self, layer_index: int) -> None:
        """Let all layers from this one on learn again."""
        resolve(self._session, layer_index, None)
        _set_learning(self._session, self._session.layers()[layer_index:], True)


def resolve(session: Session, layer_index: int | None, layer: str | nn.Module | None) -> nn.Module:
    """The layer meant by an index, a path or the module itself."""
    if (layer_index is None) == (layer is None):
        raise ValueError("name one layer: either layer_index=... or layer='path.of.the.module'")
    if layer is not None:
        modules = session.module.named_modules()
        known = {path: module for path, module in modules if is_layer(module)}
        if layer in known.values():
            return layer
        if layer not in known:
            raise NotFound(f"no layer '{layer}'; layers are {list(known)}")
        return known[layer]
    layers = session.layers()
    if isinstance(layer_index, bool) or not hasattr(layer_index, "__index__"):
        raise TypeError(
            f"layer_index={layer_index!r}: an integer from 0 to {len(layers) - 1} was expected"
        )
    if not 0 <= layer_index < len(layers):
        raise NotFound(
            f"no layer with index {layer_index}; there are {len(layers)}, counted from 0"
        )
    return layers[layer_index]


def _set_learning(session: Session, layers: list[nn.Module], learning: bool) -> None:
    for layer in layers:
        for parameter in layer.parameters():
            parameter.requires_grad_(learning)
            if not learning:
                # a gradient of zero would still be moved by momentum and decay
                parameter.grad = None
    paths = session.paths()
    session.note("unfreeze" if learning else "freeze", layers=[paths[layer] for layer in layers])


def _plan_add(
    session: Session,
    layer: nn.Module,
    neuron_count: int = 1,
    init: str = "zero_out",
    allow_output: bool = False,
) -> Plan:
    count = neuron_count
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"neuron_count={count!r}: a number of neurons of at least 1 was expected")
    if init not in ("zero_out", "split"):
        raise ValueError(f"init='{init}': 'zero_out' or 'split' was expected")
    coupling = _coupling(session, layer, allow_output)
    copies, shares = [-1] * count, None
    if init == "split":
        if not coupling.columns():
            raise Refused(
                f"'{coupling.path}' feeds no other layer, so no outgoing weight can be split"
            )
        copies = [int(torch.randperm(coupling.size)[0]) for _ in range(count)]
        shares = partial(_shares, copies=copies)
    return Plan(
        "add_neurons",
        f"add {count} neurons to '{coupling.path}' ({init})",
        coupling,
        steps_for(coupling, session.neurons, lambda tie: extend(tie, copies), shares),
        None if allow_output or not coupling.columns() else "itself",
    )


def _plan_prune(
    session: Session,
    layer: nn.Module,
    neuron_indices: Iterable[int] = (),
    allow_output: bool = False,
) -> Plan:
    chosen = _chosen(layer, neuron_indices)
    if len(chosen) == neuron_count(layer):
        raise Refused(
            f"this would remove all {len(chosen)} neurons of the layer; at least one has to stay"
        )
    coupling = _coupling(session, layer, allow_output)
    return Plan(
        "prune",
        f"prune neurons {_short(chosen)} of '{coupling.path}'",
        coupling,
        steps_for(coupling, session.neurons, lambda tie: drop(tie, chosen)),
        None if allow_output else "masked",
        tuple(chosen),
    )


def _plan_reinit(
    session: Session,
    layer: nn.Module,
    neuron_indices: Iterable[int] = (),
    perturbation_ratio: float | None = None,
    allow_output: bool = False,
) -> Plan:
    if perturbation_ratio is not None:
        return _plan_perturb(session, layer, neuron_indices, perturbation_ratio)
    chosen = _chosen(layer, neuron_indices)
    coupling = _coupling(session, layer, allow_output)
    return Plan(
        "reinit_neurons",
        f"reinitialise neurons {_short(chosen)} of '{coupling.path}'",
        coupling,
        steps_for(coupling, session.neurons, lambda tie: renew(tie, chosen)),
        None if allow_output else "masked",
        tuple(chosen),
    )


def _plan_perturb(
    session: Session, layer: nn.Module, neuron_indices: Iterable[int], ratio: float
) -> Plan:
    number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    if not number or not math.isfinite(ratio) or not 0 < ratio < 1:
        raise ValueError(
            f"perturbation_ratio={ratio!r}: a number strictly between 0 and 1 was expected"
        )
    chosen = _chosen(layer, neuron_indices)
    coupling = _coupling(session, layer, True)
    rows = tuple(tie for tie in coupling.ties if tie.module is layer and tie.role == "row")
    own = replace(coupling, ties=rows)
    # Every tensor is replaced by a copy of itself, so that a failed edit finds the old one as it
    # was; the copy is shaken.
    steps = steps_for(own, {}, lambda tie: torch.arange(length(tie)))
    return Plan(
        "reinit_neurons",
        f"perturb neurons {_short(chosen)} of '{coupling.path}' by {ratio}",
        coupling,
        steps,
        None,
        finish=partial(_shake, steps, chosen, ratio),
    )


@torch.no_grad()
def _shake(steps: list[Step], chosen: list[int], ratio: float) -> None:
    for step in steps:
        index = torch.tensor(chosen, device=step.value.device)
        old = step.value.index_select(step.dim, index)
        noise = torch.empty_like(old).uniform_(1 - ratio, 1 + ratio)
        step.value.index_copy_(step.dim, index, old * noise)


PLANS: dict[str, Callable[..., Plan]] = {
    "add_neurons": _plan_add,
    "prune": _plan_prune,
    "reinit_neurons": _plan_reinit,
}


def _coupling(session: Session, layer: nn.Module, allow_output: bool) -> Coupling:
    coupling = session.planner().coupling(layer)
    if not coupling.columns() and not allow_output:
        raise Refused(
            f"'{coupling.path}' feeds no other layer: it is an output layer, and its neurons are "
            "the answers of the model; pass allow_output=True if that is meant"
        )
    return coupling


def _chosen(layer: nn.Module, neuron_indices: Iterable[int]) -> list[int]:
    chosen = indices(neuron_indices, neuron_count(layer), "neurons")
    if not chosen:
        raise ValueError("neuron_indices is empty; name at least one neuron")
    return chosen


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
