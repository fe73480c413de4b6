"""One switch for the implementations of a π-layer's sums over rows.

    plain      the semantics, in plain torch
    chunked    the same for a CPU's caches, any dtype and device; the default
    native     C++ for a CPU, compiled at the first use; has to be asked for: it needs a compiler
    triton     Triton for CUDA, not yet measured on a GPU, so it has to be asked for

A twin may refuse (dtype, device, size); then the next simpler one runs. `row_twin(..., debug=True)`
records why.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType

from torch import Tensor

from ..layer import RowLayer
from . import chunked, native, triton_launch

logger = logging.getLogger(__name__)

MODULES = {"triton": triton_launch, "native": native, "chunked": chunked}
FALLBACK = {
    "native": ("native", "chunked"),
    "triton": ("triton", "chunked"),
    "chunked": ("chunked",),
    "plain": (),
}


@dataclass(frozen=True)
class _Choice:
    name: str = "chunked"
    debug: bool = False
    seen: list[str] = field(default_factory=list)


_choice: ContextVar[_Choice | None] = ContextVar("pilimit_row_twin", default=None)


@contextmanager
def row_twin(name: str = "chunked", debug: bool = False) -> Iterator[list[str]]:
    """Inside the `with`, forward passes of π-layers use this twin: "plain", "chunked", "native" or
    "triton".

    The backward pass of a graph uses the twin of its forward pass. With `debug`, the list that the
    `with` yields tells which twin ran and why others refused, one line per new reason; the same
    lines go to the logger of this module.
    """
    if name not in FALLBACK:
        raise ValueError(f"there is no twin {name!r}; choose one of {', '.join(FALLBACK)}")
    choice = _Choice(name, debug)
    token = _choice.set(choice)
    try:
        yield choice.seen
    finally:
        _choice.reset(token)


def pick(layer: RowLayer, unit: Tensor) -> ModuleType | None:
    """The twin to run for directions `unit` [b r]; None stands for the plain functions."""
    choice = _choice.get() or _Choice()
    for name in FALLBACK[choice.name]:
        twin = MODULES[name]
        reason = twin.refuses(layer, unit)
        if reason is None:
            _tell(choice, f"{name} runs")
            return twin
        _tell(choice, f"{name} refuses: {reason}")
    _tell(choice, "plain runs")
    return None


def _tell(choice: _Choice, line: str) -> None:
    if choice.debug and line not in choice.seen:
        choice.seen.append(line)
        logger.warning("rows of a π-layer: %s", line)
