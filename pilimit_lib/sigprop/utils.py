"""Small helpers under the names that examples of the paper's code use."""

from __future__ import annotations

import math
from collections.abc import Sequence


def shape_numel(shape: Sequence[int]) -> int:
    """How many numbers a tensor of `shape` holds; 1 for an empty shape."""
    return math.prod(shape)
