"""The optimiser and scheduler of a run, and what becomes of new parameters."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ...core import Change, follow, restore
from ..layers.layer import DendriticLayer
from .learning_rates import first_rate, scale_rates
from .run import Run


def attach(run: Run, optimizer: Optimizer, scheduler: Any = None) -> None:
    """Work with this optimiser (and scheduler) from now on, at the learning rate or in the state
    that growth left pending."""
    run.optimizer, run.scheduler = optimizer, scheduler
    kind, value = run.pending or (None, None)
    run.pending = None
    if kind == "rate":
        scale_rates(optimizer, scheduler, value)
    elif kind == "state" and "optimizer" in value:
        extras = restore(run.network, value, optimizer)
        if scheduler is not None and extras.get("scheduler") is not None:
            scheduler.load_state_dict(extras["scheduler"])
    if kind != "state":
        run.plateau.start_rate(None if scheduler is None else first_rate(optimizer))


def step_scheduler(scheduler: Any, score: float) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(score)
    elif scheduler is not None:
        scheduler.step()


def include(run: Run, grown: Iterable[str]) -> None:
    """The newest dendrites of the layers named join the run's optimiser: each parameter in the
    group of its twin among the neurons, and in the place that ``named_parameters`` gives it.

    An optimiser that is built over the grown network has its parameters in the same groups and the
    same order, so trainers that save optimiser states by position can resume. The dendrites of a
    layer that the optimiser does not hold are another optimiser's, unless the layer is frozen and
    this one trains what surrounds it.
    """
    optimizer = run.optimizer
    rank = {p: i for i, p in enumerate(run.network.parameters())}
    in_order = [
        group
        for group in optimizer.param_groups
        if (ranks := [rank.get(p, -1) for p in group["params"]]) == sorted(ranks)
    ]
    groups = {p: i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    change = Change()
    for name in grown:
        for parameter, beside in _beside_twins(run, name, groups):
            change += Change.adding(parameter, beside)
    follow(optimizer, change)
    for group in in_order:
        group["params"].sort(key=lambda p: rank.get(p, -1))


def _beside_twins(
    run: Run, name: str, groups: dict[nn.Parameter, int]
) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Each parameter of a layer's newest dendrite with the one to stand after; ``groups`` says in
    which group of the optimiser a parameter is, and is kept up to date."""
    layer: DendriticLayer = run.network.get_submodule(name)
    neurons = dict(layer.neuron.named_parameters())
    if not any(p in groups for p in neurons.values()) and not _frozen_inside(run, name, groups):
        return
    last = {groups[p]: p for p in layer.parameters() if p in groups}  # of each group
    first = max(neurons, key=lambda own: neurons[own].ndim)  # w and v go with the weights
    for own, parameter in layer.dendrites[-1].named_parameters():
        kin = own.removeprefix("body.") if own.startswith("body.") else first
        group = groups.get(neurons[kin])
        if group is None:
            group = _group_of_the_like(run, kin, neurons[kin], groups)
        if group not in last:
            last[group] = next(p for p in reversed(groups) if groups[p] == group)
        yield parameter, last[group]
        groups[parameter], last[group] = group, parameter


def _frozen_inside(run: Run, name: str, groups: dict[nn.Parameter, int]) -> bool:
    """Whether a layer was frozen from the start, and the optimiser holds all that is trained in the
    nearest module around it in which something is trained."""
    parameters = dict(run.network.named_parameters())
    frozen = {parameters[key] for key in run.frozen if key in parameters}
    if not frozen.issuperset(run.network.get_submodule(name).neuron.parameters()):
        return False
    while name:
        name = name.rpartition(".")[0]
        around = run.network.get_submodule(name).named_parameters()
        trained = [p for key, p in around if p not in frozen and "dendrites." not in key]
        if trained:
            return all(p in groups for p in trained)
    return False


def _group_of_the_like(
    run: Run, name: str, twin: nn.Parameter, groups: dict[nn.Parameter, int]
) -> int:
    """The group of a parameter that is named alike and has as many dimensions, where the twin
    itself is in none because it is frozen."""
    leaf = name.rpartition(".")[2]
    held = [(k.rpartition(".")[2], p) for k, p in run.network.named_parameters() if p in groups]
    same = [p for _, p in held if p.ndim == twin.ndim]
    alike = [p for own, p in held if own == leaf and p.ndim == twin.ndim]
    return groups[next(iter([*alike, *same, *(p for _, p in held)]))]
