"""Ready-made processors and modules under their documented names."""

from .. import spelling
from ..convert import PAISequential
from ..processors import (
    GRUProcessor,
    LSTMCellProcessor,
    LSTMProcessor,
    LSTMProcessorLastHidden,
    MultiOutputProcessor,
)
from ..processors import Processor as PAIProcessor
from ..resnet import ResNetPAI

ResNetPB = ResNetPAI

__all__ = [
    "GRUProcessor",
    "LSTMCellProcessor",
    "LSTMProcessor",
    "LSTMProcessorLastHidden",
    "MultiOutputProcessor",
    "PAIProcessor",
    "PAISequential",
    "ResNetPAI",
    "ResNetPB",
]


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    meant = spelling.respell(name, __all__)
    if meant is None:
        raise spelling.unknown("PBM", name, __all__)
    spelling.warn_once(f"PBM.{name}", f"PBM.{meant}")
    return globals()[meant]
