"""What a data set serves, taken apart into arrays: whether it is finite, and whether it is the same
data as before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SAMPLED = 16  # items that stand for a data set


def parts(item: Any) -> list[np.ndarray]:
    """The arrays and numbers that an item consists of, in order; anything else is passed over."""
    if isinstance(item, Tensor):
        item = item.detach().cpu()
        return [
            item.float().numpy() if item.dtype == torch.bfloat16 else item.resolve_conj().numpy()
        ]
    if isinstance(item, np.ndarray | np.generic | bool | int | float | complex):
        return [np.asarray(item)]
    if isinstance(item, Mapping):
        item = list(item.values())
    if isinstance(item, list | tuple):
        return [part for entry in item for part in parts(entry)]
    if hasattr(item, "__array__"):  # a PIL image, a frame
        return [np.asarray(item)]
    return []


def is_finite(item: Any) -> bool:
    """Whether no number in it is NaN or infinite."""
    return all(np.isfinite(part).all() for part in parts(item) if part.dtype.kind in "fc")


def fingerprint(dataset: Dataset) -> list[list[list[Any]]]:
    """What a few items at fixed positions hold: for each part its number of elements and a hash.

    Random transforms start from fixed seeds; a part that differs all the same, when asked twice,
    has the hash None. The caller keeps the generators.
    """
    positions = np.linspace(0, len(dataset) - 1, min(SAMPLED, len(dataset))).astype(int).tolist()
    once, again = ([_hashed(dataset, position) for position in positions] for _ in range(2))
    return [
        [[size, key if key == other else None] for (size, key), (_, other) in zip(one, two)]
        for one, two in zip(once, again)
    ]


def _hashed(dataset: Dataset, position: int) -> list[tuple[int, str]]:
    torch.manual_seed(position)
    random.seed(position)
    np.random.seed(position)
    return [
        (part.size, hashlib.sha256(np.ascontiguousarray(part).tobytes()).hexdigest()[:16])
        for part in parts(dataset[position])
        if part.dtype.kind in "biufc"
    ]
