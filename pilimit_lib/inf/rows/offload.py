"""Rows that live elsewhere than the network computes: in memory of the CPU, or in files that are
mapped.

For networks larger than a GPU's memory, or than any memory: a step streams the blocks of rows
through, once forward and once backward. On a GPU only the chunk that is being summed is there (the
chunked twin copies it); rows in files are paged in by the operating system, which keeps those that
fit. Streaming to a GPU is not yet measured.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from ...core import in_memory
from .layer import row_layers


class HostMemory:
    """Blocks in memory of the CPU, page-locked where there is a GPU to copy them to."""

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())


class MappedFiles:
    """Blocks in files of `folder`, one each. Files disappear with the blocks; what shall stay is
    written by `save_rows`."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        handle, name = tempfile.mkstemp(suffix=".rows", dir=self.folder)
        try:
            size = count * dtype.itemsize
            os.truncate(name, size)
            if hasattr(os, "posix_fallocate"):
                # a full disk is an error here, and no bus error later
                os.posix_fallocate(handle, 0, size)
            tensor = torch.from_file(name, shared=True, size=count, dtype=dtype)
        finally:
            os.close(handle)
            os.unlink(name)  # the map keeps the file alive for as long as it is used
        return tensor.view(shape)


def pi_offload(model: nn.Module, to: str | os.PathLike = "cpu") -> nn.Module:
    """Keep A and B of every π-layer in `model` outside the device that computes, from now on;
    returns the model.

    Args:
        to: "cpu" for memory of the CPU; a folder for files in it that are mapped into memory;
            "device" to take rows back to where the layer's other parameters are.

    Rows stay there through `model.to(device)`; steps, checkpoints and everything else work as
    before. Amult (4 bytes per row) and origin stay in memory.
    """
    layers = [layer for _, layer in row_layers(model)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer that keeps rows (InfPiLinearReLU), so there is "
            "nothing to offload"
        )
    if to == "device":
        allocate = in_memory
    elif to == "cpu":
        allocate = HostMemory()
    else:
        if Path(to).exists() and not Path(to).is_dir():
            raise NotADirectoryError(
                f"{to} is a file; pi_offload needs 'cpu', 'device' or a folder for the rows' files"
            )
        allocate = MappedFiles(to)
    for layer in layers:
        for parameter in (layer.A, layer.B):
            parameter.blocks.move(allocate, layer.Amult.device if to == "device" else "cpu")
            parameter.refreshed()
    return model
