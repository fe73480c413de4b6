"""A kernel matrix in a file that resumes, with a note beside it of what is in it.

The note names kernel, weights, data and blocks, and holds a digest of each finished block, which is
compared when the file is opened: a matrix cut short, or one of another kernel, is an error instead
of another result.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...core import full_disk, write_text
from .digest import digest_of

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
