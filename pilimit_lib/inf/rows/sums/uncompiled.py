"""Sums over rows are left alone by the compiler of torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

REASON = (
    "a layer of rows grows with every step, so it runs uncompiled; memory='moments' "
    "(net.to_moments()) compiles as a whole"
)
SAID = "reason" in inspect.signature(torch.compiler.disable).parameters  # not by torch 2.4


@torch.compiler.disable(**({"reason": REASON} if SAID else {}))
def eagerly(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), uncompiled: the graph around it breaks here."""
    return function(*args)
