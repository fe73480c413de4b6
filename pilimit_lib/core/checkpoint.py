"""Checkpoints of networks that change shape: sizes first, tensors second.

A snapshot holds plain tensors and builtins only, so that it loads with `weights_only=True` and can
never run code.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .archive import read_archive
from .change import Change
from .files import replacing
from .follow import follow, parameters_of

FORMAT = 1


@runtime_checkable
class Growable(Protocol):
    """A module whose tensors or children are not fixed by its constructor."""

    def structure(self) -> Any:
        """What is needed to make the sizes and children right again: plain builtins."""

    def restructure(self, structure: Any) -> Change | None:
        """Make sizes and children as `structure` says, contents arbitrary; the change, if
        parameters were replaced."""


def snapshot(model: nn.Module, optimizer: Optimizer | None = None, **extras: Any) -> dict[str, Any]:
    """Everything needed to go on from here: structure, tensors, optimiser state, and `extras`, all
    cloned.

    Optimiser state is kept by parameter *name*: positions in the groups depend on the order in
    which parameters were added.
    """
    state = {
        "format": FORMAT,
        "structure": {
            name: module.structure()
            for name, module in model.named_modules()
            if isinstance(module, Growable)
        },
        "model": _copied(dict(model.state_dict()), "model"),
        "extras": _copied(extras, "extras"),
    }
    if optimizer is not None:
        state["optimizer"] = _optimizer_snapshot(model, optimizer)
    return state


def restore(
    model: nn.Module, state: dict[str, Any], optimizer: Optimizer | None = None
) -> dict[str, Any]:
    """Bring `model` (and `optimizer`) to a `snapshot`, bit for bit; returns the extras.

    The model needs the same class and constructor arguments, not the same sizes. On any error both
    are left as they were.
    """
    _check_format(state)
    if optimizer is not None and "optimizer" not in state:
        raise ValueError(
            "the snapshot holds no optimiser state; take it with snapshot(model, optimizer)"
        )
    before = snapshot(model, optimizer)
    try:
        _restore(model, state, optimizer)
    except Exception:
        _restore(model, before, optimizer)
        raise
    return copy.deepcopy(state["extras"])


def save(obj: Any, path: str | os.PathLike) -> None:
    """Write `obj` to `path` whole or not at all: beside it first, then renamed over it."""
    with replacing(path) as beside, beside.open("xb") as file:
        torch.save(obj, file)
        file.flush()
        os.fsync(file.fileno())


def load(path: str | os.PathLike, map_location: str | torch.device = "cpu") -> Any:
    """Read what `save` (or `torch.save` of plain tensors and builtins) wrote.

    Nothing in the file is ever executed, with any version of torch; a file that was cut, or whose
    bits were flipped, is a ValueError with its name. See `archive`.
    """
    return read_archive(path, map_location)


def _check_format(state: dict[str, Any]) -> None:
    if not isinstance(state, dict) or not {"format", "structure", "model", "extras"} <= set(state):
        found = sorted(map(str, state))[:6] if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"not a snapshot: found {found}; pass what snapshot() returned (a state_dict goes to "
            "load_state_dict)"
        )
    if state["format"] != FORMAT:
        raise ValueError(
            f"the snapshot has format {state['format']}, this version reads {FORMAT}; update "
            "pilimit"
        )


def _restore(model: nn.Module, state: dict[str, Any], optimizer: Optimizer | None) -> None:
    unmet = set(state["structure"])
    for name, module in _top_down("", model):
        if name in state["structure"]:
            unmet.discard(name)
            if not isinstance(module, Growable):
                raise ValueError(
                    f"'{name}' changed size in the snapshot, but here it is a "
                    f"{type(module).__name__}, which cannot"
                )
            change = module.restructure(state["structure"][name])
            if change is not None and optimizer is not None:
                follow(optimizer, change)
    if unmet:
        raise ValueError(
            f"the snapshot speaks of modules that the model lacks: {sorted(unmet)}; "
            "build it with the same arguments"
        )
    model.load_state_dict(state["model"])
    if optimizer is not None:
        _restore_optimizer(model, optimizer, state["optimizer"])


def _top_down(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with their names, children asked for only after the parent was visited: it may just
    have created them."""
    yield name, module
    for child_name, child in list(module.named_children()):
        yield from _top_down(f"{name}.{child_name}" if name else child_name, child)


def _optimizer_snapshot(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in parameters_of(optimizer):
        if parameter not in names:
            raise ValueError(
                f"the optimiser holds a parameter of shape {list(parameter.shape)} that is not in "
                "the model "
                "(after an edit, call follow(optimizer, change))"
            )
    groups = [
        {**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups
    ]
    state = {names[p]: dict(entry) for p, entry in optimizer.state.items() if p in names}
    return _copied({"groups": groups, "state": state}, "optimizer")


def _restore_optimizer(model: nn.Module, optimizer: Optimizer, saved: dict[str, Any]) -> None:
    parameters = dict(model.named_parameters())
    names = [name for group in saved["groups"] for name in group["params"]]
    missing = sorted(set(names) - set(parameters))
    if missing:
        raise ValueError(
            f"the optimiser state speaks of parameters that the model lacks: {missing}"
        )
    if len(saved["groups"]) != len(optimizer.param_groups):
        raise ValueError(
            f"the snapshot has {len(saved['groups'])} parameter groups, the optimiser "
            f"{len(optimizer.param_groups)}"
        )
    for group, entry in zip(optimizer.param_groups, saved["groups"]):
        group.pop("param_names", None)  # names those that were held before
        group.update(copy.deepcopy({key: value for key, value in entry.items() if key != "params"}))
        group["params"] = [parameters[name] for name in entry["params"]]
    optimizer.state.clear()
    for name, entry in saved["state"].items():
        # Tensors of the parameter's kind live on its device; step counters stay where the optimiser
        # keeps them.
        optimizer.state[parameters[name]] = {
            key: value.clone().to(parameters[name].device)
            if isinstance(value, Tensor) and value.ndim
            else copy.deepcopy(value)
            for key, value in entry.items()
        }


_PLAIN = (bool, int, float, complex, str, bytes)


@cache
def _loads(kind: type) -> bool:
    """Whether this torch reads bytes, or complex numbers, under weights_only: 2.4 does not."""
    buffer = io.BytesIO()
    torch.save(b"x" if issubclass(kind, bytes) else 1j, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


def _copied(value: Any, where: str) -> Any:
    """A deep copy of plain things, in which every tensor is detached and owns its elements: a saved
    view would drag its buffer along. Anything else is refused now, because the file with it could
    be written but never read."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        entries = {key: _copied(entry, f"{where}.{key}") for key, entry in value.items()}
        # a scheduler's milestones
        return Counter(entries) if isinstance(value, Counter) else entries
    if isinstance(value, list | tuple):
        entries = [_copied(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
        if isinstance(value, torch.Size):
            return torch.Size(entries)
        return tuple(entries) if isinstance(value, tuple) else entries
    if isinstance(value, bytes | complex) and not _loads(type(value)):
        raise TypeError(
            f"{where} is {type(value).__name__}, which torch {torch.__version__} writes but does "
            "not read as plain data; pass a tensor, or update torch"
        )
    if value is None or type(value) in (*_PLAIN, torch.dtype, torch.device):
        return value
    for kind in _PLAIN:
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}; a checkpoint holds "
        "tensors, numbers, "
        "strings, None, and lists, tuples and dicts of them. Pass a state_dict(), .item() or "
        "torch.as_tensor() of it"
    )
