"""An optimiser follows the tensors that it optimises when they change shape."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from .change import Change, Edit


def follow(optimizer: Optimizer, change: Change) -> None:
    """Re-key `optimizer` after `change`: parameters that were replaced take their groups and state
    along.

    Every state tensor that extends along the changed dimension (momentum, Adam's moments) is
    rearranged like the parameter, new slices starting at zero; step counters, groups and
    hyper-parameters stay, so schedulers remain valid. Parameters that
    this optimiser does not hold are passed over: it may be one of several.
    """
    for step in change.steps or (change,):
        for edit in step.edits:
            _follow_edit(optimizer, edit)
        for parameter in step.removed:
            _remove(optimizer, parameter)
        for parameter, beside in step.added:
            _add(optimizer, parameter, beside)


def _place(optimizer: Optimizer, parameter: Tensor) -> tuple[dict, int] | None:
    for group in optimizer.param_groups:
        for position, held in enumerate(group["params"]):
            if held is parameter:
                return group, position
    return None


def _follow_edit(optimizer: Optimizer, edit: Edit) -> None:
    place = _place(optimizer, edit.old) if isinstance(edit.old, Tensor) else None
    if place is None:
        return
    group, position = place
    group["params"][position] = edit.new
    if edit.old not in optimizer.state:
        return
    state = optimizer.state.pop(edit.old)
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or value.ndim != len(edit.old_shape):
            continue
        if value.shape[edit.dim] == edit.old_shape[edit.dim]:
            state[key] = edit.origin.apply(value, edit.dim, None)
    optimizer.state[edit.new] = state


def _remove(optimizer: Optimizer, parameter: Tensor) -> None:
    place = _place(optimizer, parameter)
    if place is not None:
        group, position = place
        for key in {"params", "param_names"} & set(group):
            del group[key][position]
    optimizer.state.pop(parameter, None)


def _add(optimizer: Optimizer, parameter: Tensor, beside: Tensor | None) -> None:
    if _place(optimizer, parameter) is not None:
        raise ValueError(
            f"a parameter of shape {list(parameter.shape)} was added that the optimiser already "
            "holds"
        )
    if beside is None:
        optimizer.param_groups[-1]["params"].append(parameter)
    else:
        place = _place(optimizer, beside)
        if place is None:
            return
        group, position = place
        group["params"].insert(position + 1, parameter)
    # torch's optional record of names would be one short: nobody told the name of the new
    # parameter.
    for group in optimizer.param_groups:
        group.pop("param_names", None)


def parameters_of(optimizer: Optimizer) -> list[torch.nn.Parameter]:
    """Every parameter that the optimiser holds, in order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
