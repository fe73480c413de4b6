"""What is infinite or NaN is refused before it is learnt: a local step happens inside of the
forward pass, where nobody else can step in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class NonFinite(ValueError):
    """Numbers that are infinite or NaN, found before a layer has learnt from them.

    `where` is the propagator that found them; None: the model, in the batch itself.
    """

    def __init__(self, message: str, where: nn.Module | None = None):
        super().__init__(message)
        self.where = where


def finite(*tensors) -> bool:
    """Whether every number of all floating tensors among `tensors` is finite; others do not
    count."""
    read = [x.detach() for x in tensors if _readable(x)]
    # A finite sum has finite terms, and is found in one pass with one wait for the device. A sum
    # that is not may have overflowed, so only then are the numbers looked at one by one.
    total = sum(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)) for x in read)
    return math.isfinite(total) or all(bool(x.isfinite().all()) for x in read)


def nonfinite_rows(x: Tensor) -> list[int]:
    """Numbers of the rows of x [b ...] that are not finite throughout."""
    return (~x.isfinite().reshape(len(x), -1).all(1)).nonzero()[:, 0].tolist()


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Running statistics of batch norms inside are put back if the body ends in NonFinite."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [{name: b.clone() for name, b in m.named_buffers(recurse=False)} for m in norms]
    try:
        yield
    except NonFinite:
        for norm, buffers in zip(norms, before):
            for name, value in buffers.items():
                getattr(norm, name).copy_(value)
        raise


def _readable(x) -> bool:
    return (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and x.layout is torch.strided
        and not x.is_meta
        and x.numel() > 0
    )
