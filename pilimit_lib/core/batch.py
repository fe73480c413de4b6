"""Who is in this batch: sample ids as ambient knowledge.

Rows, statistics and ledgers want to know which samples a forward pass was about, without every
layer's signature carrying them. A context variable is local to the thread and to the task, and it
ends with its `with`.
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
def sample_ids(ids: Tensor | list[int] | None) -> Iterator[Tensor | None]:
    """Name the samples of every forward pass inside the `with`: `ids` [b], non-negative integers.

    `sample_ids(None)` suspends a surrounding one, for data that are no samples of it. `batch` is
    the same under its short name.
    """
    ids = None if ids is None else _checked(ids)
    token = _ids.set(ids)
    try:
        yield ids
    finally:
        _ids.reset(token)


batch = sample_ids


def _checked(ids: Tensor | list[int]) -> Tensor:
    ids = torch.as_tensor(ids)
    if list(ids.shape) == [0]:
        ids = ids.long()  # an empty list says nothing about its dtype
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(
            f"batch ids must be a vector of integers, got {ids.dtype} of shape {list(ids.shape)}"
        )
    if len(ids) and int(ids.min()) < 0:
        raise ValueError(
            f"batch ids must not be negative, got {int(ids.min())}; {UNKNOWN} stands for an "
            "unknown sample"
        )
    return ids.to(torch.long)


def current_ids(size: int | None = None) -> Tensor | None:
    """The ids [b] of the surrounding `batch`, or None outside of one; `size` says how many the
    caller has samples."""
    ids = _ids.get()
    if ids is not None and size is not None and len(ids) != size:
        raise ValueError(
            f"a batch of {size} samples inside `with batch(ids)` that names {len(ids)}; "
            "name every sample of the forward pass, or run other data inside `with batch(None)`"
        )
    return ids
