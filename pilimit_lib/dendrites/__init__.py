"""Dendrites: networks that grow beside their neurons when learning stalls.

The engine is `DendriteConfig`, `dendritic` and `Growth`; `GPA`, `UPA` and `PBM` are the documented
facade over it.
"""

from .compat import GPA, PBM, UPA
from .config import DendriteConfig
from .convert import PAISequential, Report, dendritic, dendritic_layers, finalize, report
from .dimensions import DimensionError
from .growth import Growth, StepResult
from .layer import DendriticLayer
from .plain import PlainDendritic
from .plateau import Decision, Plateau
from .preview import LayerGain, preview
from .processors import (
    GRUProcessor,
    LSTMCellProcessor,
    LSTMProcessor,
    LSTMProcessorLastHidden,
    MultiOutputProcessor,
    Processor,
)
from .prune import Pruned, prune
from .rules import EveryEpoch, Fixed, History, Never, Rules

__all__ = [
    "Decision",
    "DendriteConfig",
    "DendriticLayer",
    "DimensionError",
    "EveryEpoch",
    "Fixed",
    "GPA",
    "GRUProcessor",
    "Growth",
    "History",
    "LSTMCellProcessor",
    "LSTMProcessor",
    "LSTMProcessorLastHidden",
    "LayerGain",
    "MultiOutputProcessor",
    "Never",
    "PAISequential",
    "PBM",
    "PlainDendritic",
    "Plateau",
    "Processor",
    "Pruned",
    "Report",
    "Rules",
    "StepResult",
    "UPA",
    "dendritic",
    "dendritic_layers",
    "finalize",
    "preview",
    "prune",
    "report",
]
