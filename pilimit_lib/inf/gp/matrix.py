"""Kernel matrices computed block by block: symmetric ones half, with a progress bar, in memory or
in a file that resumes."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from .cache import MatrixCache

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
    of other data or another kernel, or one that is not as it was written, is an error; see
    `MatrixCache`.
    """
    count = len(x)
    starts = range(0, count, block)
    pairs = [(i, j) for i in starts for j in starts if j >= i]
    store = MatrixCache(cache, kernel, x, dtype, block) if cache is not None else None
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
