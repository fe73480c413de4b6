"""Whether the entries of a state dict can be loaded into a module: asked of all of them before
anything is changed, since torch would find out halfway through, or not at all.

A module that loads in its own way says what does not fit in `entry_misfits(state, prefix, strict)`,
and in `also_loads` which names it takes beside those of its tensors. Of any other, parameters and
buffers of their shapes are expected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def misfits(module: nn.Module, state: Mapping[str, Any], prefix: str, strict: bool) -> list[str]:
    """What of `state`, under names that begin with `prefix`, can't be loaded into `module` and
    what it is made of. `strict`: what is missing does not fit either."""
    found, known = [], set()
    for name, part in module.named_modules():
        inner = f"{prefix}{name}." if name else prefix
        own = getattr(part, "entry_misfits", None)
        if own is None:
            found += parameter_misfits(part, state, inner, strict)
        else:
            found += own(state, inner, strict)
        known |= {inner + key for key in (*_tensors(part), *getattr(part, "also_loads", ()))}
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            known.add(f"{inner}_extra_state")
    unknown = sorted(key for key in state if key.startswith(prefix) and key not in known)
    if strict and unknown:
        found.append(f"unknown entries: {unknown[:8]}")
    return found


def load_whole(module: nn.Module, state_dict: Any, strict: bool = True, assign: bool = False):
    """The `load_state_dict` of our modules: load a checkpoint, or raise RuntimeError with all that
    does not fit and stay as before. Torch alone would load the other entries first."""
    if isinstance(state_dict, Mapping):  # torch says what else it takes
        strange = [key for key in state_dict if not isinstance(key, str)]
        problems = [f"{key!r:.40} is not the name of an entry" for key in strange[:1]]
        problems = problems or misfits(module, state_dict, "", strict)
        if problems:
            kind = type(module).__name__
            builds = hasattr(module, "from_state_dict")
            remedy = f" ({kind}.from_state_dict builds one that fits)" if builds else ""
            raise RuntimeError(
                f"the checkpoint does not fit this {kind}{remedy}:\n  " + "\n  ".join(problems)
            )
    return nn.Module.load_state_dict(module, state_dict, strict=strict, assign=assign)


def refused(module: nn.Module, state: dict, prefix: str, errors: list[str]) -> bool:
    """For `_load_from_state_dict`: whether `state` does not fit. Then the reasons are in `errors`,
    and what belongs to the module and its parts is out of `state`, so that nothing is loaded.

    What is missing or unknown is no reason: torch compares names itself, and asks its modules in
    one way whether the caller was strict or not.
    """
    mine = [key for key in state if key.startswith(prefix)]
    if errors and not mine:
        return True  # what contains the module was refused
    found = misfits(module, state, prefix, strict=False)
    errors += found
    if found:
        for key in mine:
            del state[key]
    return bool(found)


class LoadsWhole(nn.Module):
    """A module that loads all of its entries or none, and saves them packed, as what stores tensors
    alone demands."""

    load_state_dict = load_whole

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            for name in _tensors(self):
                destination[prefix + name] = destination[prefix + name].contiguous()

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        if not refused(self, state, prefix, errors):
            super()._load_from_state_dict(
                state, prefix, metadata, strict, missing, unexpected, errors
            )


def parameter_misfits(
    module: nn.Module,
    state: Mapping[str, Any],
    prefix: str,
    strict: bool,
    but: Iterable[str] = (),
) -> Iterator[str]:
    """Of the module's own parameters and buffers, except those named in `but`."""
    for name, mine in _tensors(module).items():
        if name in but:
            continue
        if prefix + name not in state:
            if strict:
                yield f"{prefix}{name} is missing"
            continue
        misfit = tensor_misfit(
            state[prefix + name],
            prefix + name,
            whole=not mine.is_floating_point(),
            meta=mine.is_meta,
        )
        if misfit:
            yield misfit
        elif state[prefix + name].shape != mine.shape:
            shape = list(state[prefix + name].shape)
            yield f"{prefix}{name} has shape {shape}; expected {list(mine.shape)}"


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters and buffers that a state dict holds."""
    buffers = {
        name: value
        for name, value in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return dict(module.named_parameters(recurse=False)) | buffers


def tensor_misfit(
    value: Any,
    name: str,
    *,
    ndim: int | None = None,
    whole: bool = False,
    meta: bool = False,
    anything: bool = False,
) -> str | None:
    """Why `value` is no dense tensor of floating-point numbers (`whole`: of whole ones; `anything`:
    of either) with `ndim` dimensions. `meta`: it need not hold any."""
    if not isinstance(value, Tensor):
        return f"{name} is {value!r:.40} ({type(value).__name__}); a tensor was expected"
    if value.is_nested or value.layout != torch.strided or value.is_quantized:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        return f"{name} is a {kind} tensor; a dense one was expected (.to_dense() makes one)"
    if value.is_meta and not meta:
        return f"{name} is on the meta device, so that it holds no numbers"
    counts = not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
    if not ((value.is_floating_point() and not whole) or (counts and (whole or anything))):
        kind = "whole" if whole else "floating-point"
        return f"{name} holds {value.dtype}; {kind} numbers were expected"
    if ndim is not None and value.ndim != ndim:
        return f"{name} has shape {list(value.shape)}; {ndim} dimensions were expected"
    return None


def number_misfit(value: Any, name: str) -> str | None:
    """Why `value` is not one finite number: a multiplier, say."""
    if isinstance(value, Tensor):
        misfit = tensor_misfit(value, name, anything=True)
        if misfit:
            return misfit
        if value.numel() != 1:
            return f"{name} has shape {list(value.shape)}; one number was expected"
    elif isinstance(value, bool) or not isinstance(value, int | float):
        return f"{name} is {value!r:.40} ({type(value).__name__}); a finite number was expected"
    if isinstance(value, int) or math.isfinite(value):
        return None
    return f"{name} is {float(value)}; a finite number was expected"
