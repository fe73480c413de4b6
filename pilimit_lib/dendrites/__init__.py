"""Dendrites: networks that grow beside their neurons when learning stalls.

The engine is `DendriteConfig`, `dendritic` and `Growth`; `GPA`, `UPA` and `PBM` are the documented
facade over it.
"""

from .compat import GPA, PBM, UPA
from .config import DendriteConfig
from .conversion import (
    ConversionReport,
    PAISequential,
    Report,
    dendritic,
    dendritic_layers,
    finalize,
    report,
    save_plain,
)
from .decisions.plateau import Decision, Plateau
from .decisions.rules import EveryEpoch, Fixed, History, Never, Patience, Rules
from .growth import Growth, StepResult
from .layers.dimensions import DimensionError
from .layers.exported import PlainDendritic
from .layers.layer import DendriticLayer
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

__all__ = [
    "ConversionReport",
    "Decision",
    "ConversionReport",
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
    "Patience",
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
    "save_plain",
]
