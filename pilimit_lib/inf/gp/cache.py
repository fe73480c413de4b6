"""A kernel matrix in a file that resumes, with a note beside it of what is in it.

The note names kernel, weights, data and blocks, and holds a digest of each finished block, which is
compared when the file is opened: a matrix cut short, or one of another kernel, is an error instead
of another result.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...core import full_disk, write_text

FORMAT = 2


class MatrixCache:
    """The symmetric matrix [a a] of `kernel` on samples x [a …], computed in blocks of `block`
    samples: `matrix` lies in the .npy file of `path`, `done` holds the blocks (i, j) that are
    finished.

    Raises ValueError where the file holds another matrix, or is not as it was written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        kernel: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        dtype: torch.dtype,
        block: int,
    ) -> None:
        self.path = Path(path).with_suffix(".npy")
        self.note = self.path.with_suffix(".json")
        self.block = block
        self.done: dict[tuple[int, int], str] = {}
        self.identity = {
            "format": FORMAT,
            "kernel": re.sub(r" at 0x[0-9a-fA-F]+", "", repr(kernel)),
            "weights": digest_of(kernel),
            "data": digest_of(x),
            "samples": len(x),
            "dtype": str(dtype),
            "block": block,
        }
        if self.note.exists():
            self.done = self._noted()
        elif self.path.exists():
            raise ValueError(
                f"{self.path} exists without its {self.note.name}: name another file, or delete it"
            )
        kind = torch.empty(0, dtype=dtype).numpy().dtype
        # A note without blocks is what is left of a run that was killed while it made the file.
        self.stored = self._open(kind) if self.done else self._create(kind)
        self.matrix = torch.from_numpy(self.stored)

    def private(self) -> Tensor:
        """The matrix for work in place: what is written to it never reaches the file."""
        return torch.from_numpy(np.load(self.path, mmap_mode="c"))

    def record(self, i: int, j: int) -> None:
        """The block's numbers reach the file before the note says so."""
        self.stored.flush()
        self.done[i, j] = self._block_digest(i, j)
        self._write_note()

    def _noted(self) -> dict[tuple[int, int], str]:
        try:
            found = json.loads(self.note.read_text(encoding="utf-8"))
            differing = [key for key, value in self.identity.items() if found.get(key) != value]
            done = found["done"] if differing else {(i, j): text for i, j, text in found["done"]}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{self.note} is damaged ({error}): delete it and {self.path.name}"
            ) from error
        if differing:
            raise ValueError(
                f"{self.path} holds another kernel matrix (other {', '.join(differing)}): "
                "name another file, or delete this one and its .json"
            )
        return done

    def _open(self, kind: np.dtype) -> np.ndarray:
        samples = self.identity["samples"]
        try:
            # Opened for writing, a file that was cut would be filled with zeros.
            found = np.lib.format.open_memmap(self.path, mode="r")
        except Exception as error:  # a damaged head can fail in many ways
            raise ValueError(
                f"{self.path} is damaged, cut short or gone ({error}): delete it and its .json"
            ) from error
        if found.shape != (samples, samples) or found.dtype != kind:
            raise ValueError(
                f"{self.path} holds {found.dtype} {found.shape}; expected {kind} "
                f"{(samples, samples)}: delete it and its .json"
            )
        self.stored = found
        for (i, j), noted in self.done.items():
            if self._block_digest(i, j) != noted:
                raise ValueError(
                    f"{self.path} is damaged: the block at row {i}, column {j} is not the one that "
                    "was written; delete the file and its .json"
                )
        return np.lib.format.open_memmap(self.path, mode="r+")

    def _create(self, kind: np.dtype) -> np.ndarray:
        self._write_note()
        shape = (self.identity["samples"],) * 2
        try:
            stored = np.lib.format.open_memmap(self.path, mode="w+", dtype=kind, shape=shape)
            self._take_room()
        except OSError as error:
            self.path.unlink(missing_ok=True)
            self.note.unlink()
            if full_disk(error) is None:
                raise
            size = shape[0] ** 2 * kind.itemsize / 1e9
            raise OSError(
                error.errno,
                f"the disk is full: a kernel matrix of {size:.1g} GB does not fit, and nothing of "
                "it is left",
                str(self.path),
            ) from error
        return stored

    def _take_room(self) -> None:
        """Have the file's blocks on the disk: without them, writing to the mapped file ends the
        process once the disk is full."""
        if not hasattr(os, "posix_fallocate"):
            return
        with self.path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise  # other than a file system that can't be asked

    def _block_digest(self, i: int, j: int) -> str:
        """Of the block and of its mirror image."""
        rows, cols = slice(i, i + self.block), slice(j, j + self.block)
        found = hashlib.blake2b(digest_size=16)
        for block in (self.stored[rows, cols], self.stored[cols, rows]):
            found.update(np.ascontiguousarray(block))
        return found.hexdigest()

    def _write_note(self) -> None:
        done = [[i, j, noted] for (i, j), noted in sorted(self.done.items())]
        write_text(self.note, json.dumps({**self.identity, "done": done}))


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
