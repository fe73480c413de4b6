"""The one edit: rearrange, drop, add or redraw the slices that belong to neurons, on every tensor
concerned, or on none.

A tensor can be met twice (rows and columns of a convolution inside a residual block). The edits
then *compose*: the second one sees what the first one left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ...core import Axis, Change
from ..neurons.counters import COUNTERS, Neurons
from ..neurons.couplings import Coupling, Tie
from ..neurons.geometry import incoming_dim, is_depthwise, is_layer, neuron_dim

Fill = Callable[[list[int]], Tensor]


@dataclass(frozen=True, eq=False)
class Step:
    """One tensor's part: slice i along `dim` becomes old slice `source[i]`, or a new one from
    `fill` where that is -1."""

    module: nn.Module
    name: str
    dim: int
    label: str
    source: Tensor
    fill: Fill
    # new position -> factor, where outgoing weights are split
    shares: dict[int, Tensor] = field(default_factory=dict)

    @property
    def value(self) -> Tensor:
        return getattr(self.module, self.name)


def drop(tie: Tie, neurons: list[int]) -> Tensor:
    """The source that leaves these neurons out."""
    keep = torch.ones(length(tie), dtype=torch.bool)
    keep[tie.positions[neurons].flatten()] = False
    return keep.nonzero().squeeze(1)


def renew(tie: Tie, neurons: list[int]) -> Tensor:
    """The source in which these neurons' slices are new and all others stay."""
    source = torch.arange(length(tie))
    source[tie.positions[neurons].flatten()] = -1
    return source


def extend(tie: Tie, copies: list[int]) -> Tensor:
    """The source with one more neuron per entry of `copies`: a copy of that neuron, or a new one
    for -1.

    Wherever the last neuron has a contiguous run of slices (a flattened channel; each operand of a
    concatenation), the new neurons' runs follow it, so that what lies behind moves along.
    """
    last, pieces, done = tie.positions[-1].tolist(), [], 0
    starts = [i for i, p in enumerate(last) if i == 0 or p != last[i - 1] + 1]
    for start, stop in zip(starts, starts[1:] + [len(last)]):
        pieces.append(torch.arange(done, last[stop - 1] + 1))
        pieces.extend(
            torch.full((stop - start,), -1) if c < 0 else tie.positions[c, start:stop]
            for c in copies
        )
        done = last[stop - 1] + 1
    return torch.cat([*pieces, torch.arange(done, length(tie))])


def length(tie: Tie) -> int:
    return getattr(tie.module, tie.name).shape[tie.dim]


def fill_of(tie: Tie) -> Fill:
    """What new slices of this tensor start as: rows drawn as torch draws them, columns zero, norms
    neutral."""
    module, name, dim = tie.module, tie.name, tie.dim

    def fill(shape: list[int]) -> Tensor:
        like = getattr(module, name).detach()
        if tie.role == "row" and isinstance(module, nn.Embedding):
            return torch.randn(shape, dtype=like.dtype, device=like.device)
        if tie.role == "row":
            return torch.empty(shape, dtype=like.dtype, device=like.device).uniform_(
                -1, 1
            ) / math.sqrt(_fan_in(module))
        if tie.role in ("scale", "variance"):
            return like.new_ones(shape)
        if tie.role == "other" and like.shape[dim]:
            return like.mean(dim, keepdim=True).expand(shape)
        return like.new_zeros(shape)

    return fill


def _fan_in(layer: nn.Module) -> int:
    """As `reset_parameters` of torch's layers counts it (for a transposed convolution: over
    dimension 1 as well)."""
    return max(1, layer.weight.shape[1] * math.prod(layer.weight.shape[2:]))


def steps_for(
    coupling: Coupling,
    neurons_of: dict[nn.Module, Neurons],
    source_of: Callable[[Tie], Tensor],
    shares_of: Callable[[Tie, Tensor], dict[int, Tensor]] | None = None,
) -> list[Step]:
    """The steps on every tensor of the coupling, and on the counters and rates of the layers
    concerned."""
    steps = []
    for tie in coupling.ties:
        source = source_of(tie)
        shares = shares_of(tie, source) if shares_of and tie.role == "column" else {}
        steps.append(Step(tie.module, tie.name, tie.dim, tie.label, source, fill_of(tie), shares))
        state = neurons_of.get(tie.module)
        if state is None or tie.name != "weight":
            continue
        if tie.role == "column":
            steps.append(
                Step(
                    state,
                    "in_rate",
                    0,
                    f"{tie.path} (rates of incoming neurons)",
                    source,
                    torch.ones,
                )
            )
        elif is_layer(tie.module):
            steps.extend(
                Step(state, name, 0, f"{tie.path} (counter {name})", source, _zero_counts)
                for name in COUNTERS
            )
            steps.append(
                Step(state, "rate", 0, f"{tie.path} (rates of neurons)", source, torch.ones)
            )
    return steps


def _zero_counts(shape: list[int]) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


def carry_out(steps: list[Step]) -> Change:
    """Make the edits and correct the sizes that modules repeat in attributes. The caller undoes
    them if anything raises."""
    depthwise = {step.module for step in steps if is_depthwise(step.module)}
    batches: list[list[Step]] = []
    for step in steps:
        for batch in batches:
            if _same_edit(batch[0], step) and not any(
                s.module is step.module and s.name == step.name for s in batch
            ):
                batch.append(step)
                break
        else:
            batches.append([step])
    change = Change()
    for batch in batches:
        axis = Axis(batch[0].label)
        for step in batch:
            axis.join(step.module, step.name, step.dim, step.label)
        fresh = int((batch[0].source < 0).sum())
        fill = (
            {}
            if not fresh
            else {s.label: s.fill(m.fill_shape(fresh)) for s, m in zip(batch, axis.members)}
        )
        change = change + axis.take(batch[0].source, fill)
        for step in batch:
            _share(step)
    for step in steps:
        _sync(step, depthwise)
    return change


def _same_edit(one: Step, other: Step) -> bool:
    return one.value.shape[one.dim] == other.value.shape[other.dim] and torch.equal(
        one.source, other.source
    )


@torch.no_grad()
def _share(step: Step) -> None:
    for position, factor in step.shares.items():
        step.value.select(step.dim, position).mul_(factor)


def _sync(step: Step, depthwise: set[nn.Module]) -> None:
    module = step.module
    if isinstance(module, Neurons):
        if module.slowed:  # no rearrangement of equal rates makes them differ
            module.refresh()
    elif isinstance(module, _ConvNd):
        size = module.weight.shape[0]
        if module in depthwise:
            module.in_channels = module.out_channels = module.groups = size
        else:
            module.out_channels = module.weight.shape[neuron_dim(module)]
            module.in_channels = module.weight.shape[incoming_dim(module)]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = step.value.shape[0]
