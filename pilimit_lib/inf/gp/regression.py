"""Kernel ridge regression from samples to predictions: matrix, solution and product in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .matrix import kernel_matrix, kernel_product
from .solve import kernel_ridge, memory_needed, require_memory


def kernel_regression(
    kernel: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    targets: Tensor,
    x_test: Tensor,
    ridges: Sequence[float],
    *,
    dtype: torch.dtype = torch.float64,
    method: str = "auto",
    block: int = 2048,
    cache: str | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Tensor:
    """Predictions [len(ridges), b, o] on x_test [b d] of kernel ridge regression on x [a d],
    targets [a o].

    Each ridge is relative to the mean of the kernel's diagonal. `cache` is a file in which the
    training kernel is kept: an interrupted computation goes on from there and a finished one is
    read. See `kernel_matrix` and `kernel_ridge`. Raises MemoryError before anything is computed
    where the machine's memory does not suffice.
    """
    require_memory(memory_needed(len(x), dtype, method, len(ridges)))
    K = kernel_matrix(
        kernel, x, dtype=dtype, block=block, cache=cache, device=device, progress=progress
    )
    coefficients = kernel_ridge(K, targets, ridges, method=method, progress=progress)
    return kernel_product(
        kernel, x_test, x, coefficients, block=block, device=device, progress=progress
    )
