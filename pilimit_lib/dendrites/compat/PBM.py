"""Ready-made processors and modules under their documented names."""

from .. import spelling
from ..conversion import PAISequential
from ..processors import (
    GRUProcessor,
    LSTMCellProcessor,
    LSTMProcessor,
    LSTMProcessorLastHidden,
    MultiOutputProcessor,
)
from ..processors import Processor as PAIProcessor
from .resnet import ResNetPAI

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


__getattr__ = spelling.reader("PBM", __all__, globals())
