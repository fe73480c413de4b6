"""Signals: they make the target stream from the labels and stand before the first layer."""

from .base import Formatter, Generator, Signal
from .build import project_labels
from .formatter import (
    DistinctBatchLabels,
    DistinctBatchLabelsOnehot,
    LabelNumberToOnehot,
    LabelVectorToNumber,
)
from .generators import FixedDrawContext, ProjectionContext, ProjectionContextInput

__all__ = [
    "DistinctBatchLabels",
    "DistinctBatchLabelsOnehot",
    "FixedDrawContext",
    "Formatter",
    "Generator",
    "LabelNumberToOnehot",
    "LabelVectorToNumber",
    "ProjectionContext",
    "ProjectionContextInput",
    "Signal",
    "project_labels",
]
