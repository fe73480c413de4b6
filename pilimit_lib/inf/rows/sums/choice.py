"""Which implementation sums the rows of a layer; see `inf.implementation`."""

from __future__ import annotations

import logging
from types import ModuleType

from torch import Tensor

from ...implementation import Implementation, chosen, row_twin
from ..layer import RowLayer
from . import chunked, native, plain, triton_launch

__all__ = ["pick", "row_twin"]

logger = logging.getLogger(__name__)

MODULES = {"triton": triton_launch, "native": native, "chunked": chunked, "plain": plain}
FALLBACK = {
    "native": ("native", "chunked"),
    "triton": ("triton", "chunked"),
    "chunked": ("chunked",),
    "plain": ("plain",),
}


def pick(layer: RowLayer, unit: Tensor) -> ModuleType:
    """The module whose `forward` and `backward` run for directions `unit` [b r]."""
    choice = chosen()
    for name in FALLBACK[choice.rows]:
        module = MODULES[name]
        reason = module.refuses(layer, unit)
        if reason is None:
            _tell(choice, f"{name} runs")
            return module
        _tell(choice, f"{name} refuses: {reason}")
    raise AssertionError("the last of every list refuses nothing")


def _tell(choice: Implementation, line: str) -> None:
    if choice.debug and line not in choice.seen:
        choice.seen.append(line)
        logger.warning("rows of a π-layer: %s", line)
