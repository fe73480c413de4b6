"""Digests of functions: whether a kernel is the same one as in another process."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def digest_of(value: Any) -> str:
    """A digest of all numbers and names that `value` is made of: tensors, modules, functions with
    what they enclose, and objects by their attributes."""
    found = hashlib.blake2b(digest_size=16)
    for piece in _pieces(value, set()):
        found.update(piece)
    return found.hexdigest()


def _pieces(value: Any, seen: set[int]) -> Iterator[bytes]:
    if id(value) in seen:
        return
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {list(value.shape)}".encode()
        # Through bytes, since numpy has no bfloat16.
        yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return
    if isinstance(value, np.ndarray):
        yield f"array {value.dtype} {value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
        return
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | type):
        yield f"{type(value).__name__} {value!r}".encode()
        return
    seen = seen | {id(value)}  # those above: what is held twice counts twice, a circle once
    yield f"<{type(value).__module__}.{type(value).__qualname__}".encode()
    for name, part in _parts(value):
        yield f" {name}=".encode()
        yield from _pieces(part, seen)
    yield b">"


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a composed value is made of, by names that do not change from process to process."""
    if isinstance(value, nn.Module):
        # Other attributes may be what a forward pass leaves behind; settings are in the repr.
        yield from value.named_parameters(remove_duplicate=False)
        yield from value.named_buffers(remove_duplicate=False)
    elif isinstance(value, Mapping):
        yield from sorted(((str(key), part) for key, part in value.items()), key=lambda p: p[0])
    elif isinstance(value, list | tuple):
        yield from ((str(number), part) for number, part in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif hasattr(value, "__func__"):
        yield from (("self", value.__self__), ("function", value.__func__))
    elif hasattr(value, "__code__"):
        yield "name", f"{value.__module__}.{value.__qualname__}"
        yield "code", value.__code__.co_code
        yield (
            "constants",
            [part for part in value.__code__.co_consts if not hasattr(part, "co_code")],
        )
        yield "defaults", value.__defaults__
        yield "enclosed", [cell.cell_contents for cell in value.__closure__ or ()]
    else:
        yield from sorted(getattr(value, "__dict__", {}).items())
