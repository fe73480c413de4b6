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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core import load, write_bytes

PLAIN = {int, float, str, bool, type(None)}
TENSOR, TUPLE, PAIRS = "\x00tensor", "\x00tuple", "\x00pairs"
PART = "\x00part"  # of files written before parts were left in files of their own
FILE = "\x00file"


def pack(state: Any) -> dict[str, Any]:
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
    data = torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.uint8)
    return {"json": text, "data": data}


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
    torch.save(pack(state), buffer)
    return buffer.getvalue()


def save_state(state: Any, path: str | os.PathLike) -> None:
    """Write a nested state of tensors and builtins."""
    write_bytes(path, encode(state))


def load_state(path: str | os.PathLike) -> Any:
    """Read what save_state wrote, or any checkpoint of plain tensors and builtins.

    Entries that are references, {FILE: [name, key, token]}, are read from the entry ``key`` of the
    file ``name`` beside it (None: all of it), which must bear the token; the references themselves
    are handed on as the entry "references".
    """
    state = _read(Path(path))
    if not isinstance(state, dict):
        return state
    places = {k: v[FILE] for k, v in state.items() if isinstance(v, dict) and FILE in v}
    if places:
        state |= {key: _referred(Path(path), *place) for key, place in places.items()}
        state["references"] = places
    return state


def _read(path: Path) -> Any:
    state = load(path)
    return unpack(state) if isinstance(state, dict) and set(state) == {"json", "data"} else state


def _referred(path: Path, name: str, key: str | None, token: str) -> Any:
    other = path.with_name(name)
    if not other.is_file():
        raise FileNotFoundError(
            f"{path} refers to {name} beside it, which is not there; keep a run's folder together, "
            "or write a file that needs no other with growth.save(path) (UPA.save_system)"
        )
    state = _read(other)
    if state.get("token") != token:
        raise ValueError(
            f"{path} refers to a {name} that has been overwritten since, by another run or after a "
            f"copy; load '{other}' itself, or another checkpoint"
        )
    return state if key is None else state[key]
