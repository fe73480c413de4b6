"""Kernel matrices computed block by block: symmetric ones half, with a progress bar, in memory or
in a file that resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...core import write_text

Kernel = Callable[[Tensor, Tensor], Tensor]


def kernel_matrix(
    kernel: Kernel,
    x: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    block: int = 2048,
    cache: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Tensor:
    """K(x, x) [a a] of samples x [a …] in `dtype`; each pair is computed once, in the kernel's own
    precision.

    `cache` names a .npy file (beside it, .json says which blocks are done): the matrix lies there,
    an interrupted computation goes on where it stopped, and a finished one is only opened. A cache
    of other data or another kernel is an error.
    """
    count = len(x)
    starts = range(0, count, block)
    pairs = [(i, j) for i in starts for j in starts if j >= i]
    store = _Cache(cache, kernel, x, dtype, block) if cache is not None else None
    out = store.matrix if store else torch.empty(count, count, dtype=dtype)
    todo = [pair for pair in pairs if not store or pair not in store.done]
    for i, j in tqdm(todo, desc=f"kernel of {count} samples", disable=not progress or not todo):
        rows, cols = slice(i, i + block), slice(j, j + block)
        part = kernel(x[rows].to(device), x[cols].to(device)).to(out)
        if i == j:
            part = (part + part.T) / 2
        out[rows, cols] = part
        if j > i:
            out[cols, rows] = part.T
        if store:
            store.record(i, j)
    return store.private() if store else out


def kernel_product(
    kernel: Kernel,
    x: Tensor,
    y: Tensor,
    coefficients: Tensor,
    *,
    block: int = 2048,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Tensor:
    """K(x, y) applied to coefficients [..., b, o]: [..., a, o], without ever holding more than one
    block of K."""
    lead, out_size = coefficients.shape[:-2], coefficients.shape[-1]
    if coefficients.shape[-2] != len(y):
        raise ValueError(
            f"coefficients of {coefficients.shape[-2]} samples for {len(y)} training samples"
        )
    right = coefficients.movedim(-2, 0).reshape(len(y), -1).double()
    out = torch.zeros(len(x), right.shape[1], dtype=torch.float64)
    for i in tqdm(
        range(0, len(x), block), desc=f"kernel with {len(x)} samples", disable=not progress
    ):
        for j in range(0, len(y), block):
            part = kernel(x[i : i + block].to(device), y[j : j + block].to(device))
            out[i : i + block] += part.double().cpu() @ right[j : j + block]
    return out.reshape(len(x), *lead, out_size).movedim(0, -2)


class _Cache:
    """A matrix in a file, and a note of its finished blocks that is only ever replaced whole."""

    def __init__(
        self, path: str | os.PathLike, kernel: Kernel, x: Tensor, dtype: torch.dtype, block: int
    ) -> None:
        self.path, self.done = Path(path).with_suffix(".npy"), set()
        self.note = self.path.with_suffix(".json")
        self.identity = {
            "kernel": repr(kernel),
            "data": _digest(x),
            "samples": len(x),
            "dtype": str(dtype),
            "block": block,
        }
        shape, kind = (len(x), len(x)), torch.empty(0, dtype=dtype).numpy().dtype
        if self.note.exists():
            found = self._read_note()
            differing = [key for key, value in self.identity.items() if found.get(key) != value]
            if differing:
                raise ValueError(
                    f"{self.path} holds another kernel matrix (other {', '.join(differing)}): "
                    "name another file, or delete this one and its .json"
                )
            self.done = {tuple(pair) for pair in found["done"]}
            stored = np.lib.format.open_memmap(self.path, mode="r+")
            if stored.shape != shape or stored.dtype != kind:
                raise ValueError(
                    f"{self.path} holds {stored.dtype} {stored.shape}; expected {kind} {shape}: "
                    "delete it"
                )
        else:
            if self.path.exists():
                raise ValueError(
                    f"{self.path} exists without its {self.note.name}: name another file, or "
                    "delete it"
                )
            self.path.parent.mkdir(parents=True, exist_ok=True)
            stored = np.lib.format.open_memmap(self.path, mode="w+", dtype=kind, shape=shape)
            self._write_note()
        self.stored = stored
        self.matrix = torch.from_numpy(stored)

    def private(self) -> Tensor:
        """The matrix for work in place: what is written to it never reaches the file."""
        return torch.from_numpy(np.load(self.path, mmap_mode="c"))

    def record(self, i: int, j: int) -> None:
        """The block's numbers reach the file before the note says so."""
        self.stored.flush()
        self.done.add((i, j))
        self._write_note()

    def _read_note(self) -> dict:
        try:
            return json.loads(self.note.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.note} is damaged ({error}): delete it and {self.path.name}"
            ) from error

    def _write_note(self) -> None:
        write_text(self.note, json.dumps({**self.identity, "done": sorted(self.done)}))


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.detach().cpu().contiguous().numpy()).hexdigest()[:32]
