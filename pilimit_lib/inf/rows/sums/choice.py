"""Which implementation sums the rows of a layer; see `inf.implementation`."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ...implementation import chosen, row_twin
from ..layer import RowLayer
from . import chunked, native, plain, triton_launch

__all__ = ["pick", "row_twin"]

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
            choice.tell(f"{name} runs")
            return module
        choice.tell(f"{name} refuses: {reason}")
    raise AssertionError("the last of every list refuses nothing")
