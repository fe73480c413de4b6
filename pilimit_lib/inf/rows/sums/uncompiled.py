"""Sums over rows are left alone by the compiler of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(
    reason="a layer of rows grows with every step, so it runs uncompiled; memory='moments' "
    "(net.to_moments()) compiles as a whole"
)
def eagerly(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), uncompiled: the graph around it breaks here."""
    return function(*args)
