"""The usual label signal in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from .formatter import DistinctBatchLabelsOnehot, LabelNumberToOnehot
from .generators import ProjectionContext, ProjectionContextInput


def project_labels(
    num_classes: int,
    output_shape: Sequence[int],
    module_input: nn.Module | None = None,
    *,
    per_class: bool = False,
    fixed: bool = False,
) -> nn.Sequential:
    """Class numbers -> one-hot -> Linear, LayerNorm, ReLU -> `output_shape`, beside the input
    (through `module_input`, if given).

    `per_class`: one target row per class instead of one per sample, which about halves the work of
    a training step.
    """
    size = math.prod(output_shape)
    module_context = nn.Sequential(
        nn.Linear(num_classes, size, bias=False), nn.LayerNorm(size), nn.ReLU()
    )
    shapes = ((num_classes,), output_shape, fixed)
    generator = (
        ProjectionContext(module_context, *shapes)
        if module_input is None
        else ProjectionContextInput(module_context, module_input, *shapes)
    )
    signal = nn.Sequential(LabelNumberToOnehot(num_classes))
    if per_class:
        signal.append(DistinctBatchLabelsOnehot())
    return signal.append(generator)
