"""Sizes of any module, as data, and making a module have them: what a checkpoint needs before its
tensors fit."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from ...core import Axis, Blocks, Change, Growable
from ..neurons.geometry import size_attributes


def sizes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By module path: its class, the sizes it repeats in attributes, and the shapes of its own
    tensors."""
    return {
        path: {
            "class": type(module).__name__,
            "sizes": size_attributes(module),
            "shapes": {name: list(tensor.shape) for name, tensor in _tensors(module)},
        }
        for path, module in model.named_modules()
    }


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    own = {**module._parameters, **module._buffers}
    unsaved = module._non_persistent_buffers_set
    return [
        (name, tensor) for name, tensor in own.items() if tensor is not None and name not in unsaved
    ]


def digest(value: Any) -> str:
    """A hash of plain data: equal for equal data, in whatever process."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def check_fits(model: nn.Module, stored: dict[str, dict[str, Any]]) -> None:
    """Raise unless `stored` are sizes of this architecture, possibly other sizes. Growable modules
    see to themselves."""
    here = {path: module for path, module in model.named_modules()}
    grown = [path for path, module in here.items() if isinstance(module, Growable)]

    def ours(path: str) -> bool:
        return not any(path == g or g == "" or path.startswith(f"{g}.") for g in grown)

    missing = sorted(path for path in set(stored) ^ set(here) if ours(path))
    if missing:
        raise ValueError(
            f"the checkpoint is of another architecture: modules {missing[:6]} are on one side only"
        )
    for path, entry in stored.items():
        if not ours(path):
            continue
        shapes = {name: list(tensor.shape) for name, tensor in _tensors(here[path])}
        if (
            entry["class"] != type(here[path]).__name__
            or set(shapes) != set(entry["shapes"])
            or any(len(shapes[name]) != len(shape) for name, shape in entry["shapes"].items())
        ):
            raise ValueError(
                f"the checkpoint is of another architecture: '{path}' is a {entry['class']} with "
                f"{entry['shapes']} "
                f"there, a {type(here[path]).__name__} with {shapes} here"
            )


def resize(model: nn.Module, stored: dict[str, dict[str, Any]]) -> Change:
    """Give every tensor the stored shape, contents arbitrary; the change, for the optimiser to
    follow."""
    change = Change()
    for path, module in model.named_modules():
        entry = stored.get(path)
        if entry is None or isinstance(module, Growable):
            continue
        for name, shape in entry["shapes"].items():
            for dim, size in enumerate(shape):
                held = getattr(module, name)
                if (
                    not isinstance(held, Blocks)
                    and held.ndim == len(shape)
                    and held.shape[dim] != size
                ):
                    kept = min(held.shape[dim], size)
                    source = torch.cat([torch.arange(kept), torch.full((size - kept,), -1)])
                    change = change + Axis(f"{path}.{name}").join(module, name, dim).take(source)
        for name, size in entry["sizes"].items():
            setattr(module, name, size)
    return change
