"""Files of a run, written once per epoch and therefore cheaply: all tensors as one, all else as
JSON, atomically.

`torch.save` costs about 0.1 ms for each tensor and a persistent-id call for each number; a small
network with optimiser state and the best weights has a hundred tensors, which would be a tenth of
its epoch. Files load under weights_only like all others.
Nothing is flushed to the platter here: a rename survives the death of the process, which is what
interrupts a run.
"""

import io
import json
import os
from typing import Any

import torch
from torch import Tensor

from ...core import load, write_bytes

PLAIN = {int, float, str, bool, type(None)}
TENSOR, TUPLE, PAIRS, PART = "\x00tensor", "\x00tuple", "\x00pairs", "\x00part"


class Packed(dict):
    """A packed state, {"json": text, "data": one uint8 tensor}; inside of another state it is taken
    over as it is."""


def pack(state: Any) -> Packed:
    """A nested state of tensors and builtins as {"json": text, "data": one uint8 tensor}."""
    chunks: list[Tensor] = []
    seen: dict[int, list] = {}
    keep: list[Tensor] = []
    offset = 0

    def walk(value):
        nonlocal offset
        if isinstance(value, Tensor):
            if id(value) not in seen:
                flat = value.detach().cpu().reshape(-1).view(torch.uint8)
                seen[id(value)] = [
                    str(value.dtype).removeprefix("torch."),
                    list(value.shape),
                    offset,
                ]
                offset += flat.numel()
                chunks.append(flat)
                keep.append(value)  # an id is only unique while its object lives
            return {TENSOR: seen[id(value)]}
        if isinstance(value, Packed):
            start, offset = offset, offset + value["data"].numel()
            chunks.append(value["data"])
            return {PART: [value["json"], start, offset]}
        if isinstance(value, dict):
            if all(isinstance(k, str) for k in value):
                return {k: walk(v) for k, v in value.items()}
            return {PAIRS: [[walk(k), walk(v)] for k, v in value.items()]}
        if isinstance(value, tuple):
            return {TUPLE: [walk(v) for v in value]}
        if isinstance(value, list):
            return value if set(map(type, value)) <= PLAIN else [walk(v) for v in value]
        return value

    text = json.dumps(walk(state))
    return Packed(
        json=text, data=torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.uint8)
    )


def unpack(packed: dict[str, Any]) -> Any:
    """The inverse of pack; every tensor is a copy of its own."""
    data = packed["data"]

    def walk(value):
        if isinstance(value, list):
            return [walk(v) for v in value]
        if not isinstance(value, dict):
            return value
        if TENSOR in value:
            name, shape, offset = value[TENSOR]
            dtype = getattr(torch, name)
            size = torch.Size(shape).numel() * dtype.itemsize
            return data[offset : offset + size].clone().view(dtype).reshape(shape)
        if PART in value:
            text, start, end = value[PART]
            return unpack({"json": text, "data": data[start:end]})
        if TUPLE in value:
            return tuple(walk(v) for v in value[TUPLE])
        if PAIRS in value:
            return {walk(k): walk(v) for k, v in value[PAIRS]}
        return {k: walk(v) for k, v in value.items()}

    return walk(json.loads(packed["json"]))


def encode(state: Any) -> bytes:
    """The content of a file that holds a nested state of tensors and builtins."""
    buffer = io.BytesIO()
    torch.save(dict(pack(state)), buffer)
    return buffer.getvalue()


def save_state(state: Any, path: str | os.PathLike) -> None:
    """Write a nested state of tensors and builtins."""
    write_bytes(path, encode(state))


def load_state(path: str | os.PathLike) -> Any:
    """Read what save_state wrote, or any checkpoint of plain tensors and builtins."""
    state = load(path)
    return unpack(state) if isinstance(state, dict) and set(state) == {"json", "data"} else state
