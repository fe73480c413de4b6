"""Who is in this batch: sample ids as ambient knowledge.

Rows, statistics and ledgers want to know which samples a forward pass was about, without every layer's signature carrying
them. A context variable is local to the thread and to the task, and it ends with its `with`.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

UNKNOWN = -1  # the id of a sample that nobody named

_ids: ContextVar[Tensor | None] = ContextVar("pilimit_batch_ids", default=None)


@contextmanager
def batch(ids: Tensor | list[int]) -> Iterator[Tensor]:
    """Name the samples of every forward pass inside the `with`: `ids` [b], non-negative integers."""
    ids = torch.as_tensor(ids)
    if list(ids.shape) == [0]:
        ids = ids.long()  # an empty list says nothing about its dtype
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"batch ids must be a vector of integers, got {ids.dtype} of shape {list(ids.shape)}")
    if len(ids) and int(ids.min()) < 0:
        raise ValueError(f"batch ids must not be negative, got {int(ids.min())}; {UNKNOWN} stands for an unknown sample")
    token = _ids.set(ids.to(torch.long))
    try:
        yield _ids.get()
    finally:
        _ids.reset(token)


def current_ids(size: int | None = None) -> Tensor | None:
    """The ids [b] of the surrounding `batch`, or None outside of one; `size` says how many the caller has samples."""
    ids = _ids.get()
    if ids is not None and size is not None and len(ids) != size:
        raise ValueError(f"a batch of {size} samples inside `with batch(ids)` that names {len(ids)}; "
                         "name every sample of the forward pass, or leave the `with` before other data are run")
    return ids
