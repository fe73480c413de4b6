"""Batches that are not finite: found before the first layer, located, or passed over."""

from __future__ import annotations

import torch
from torch import Tensor

from ..propagators import NonFinite
from ..propagators.finite import finite, nonfinite_rows
from .trial import evaluation

MODES = ("raise", "skip", "allow")


def check_batch(x, context) -> None:
    """Refuse inputs or a context with infinite or NaN numbers, naming the samples."""
    for name, part in (("inputs", x), ("the context", context)):
        if not finite(part):
            rows = nonfinite_rows(part)
            more = ", ..." if len(rows) > 10 else ""
            raise NonFinite(
                f"{name} of {len(rows)} of {len(part)} samples hold infinite or NaN numbers (rows "
                f"{', '.join(map(str, rows[:10]))}{more} of the batch); no layer has learnt from "
                "it. Mend the data, or set model.nonfinite = 'skip' to pass over such batches"
            )


def locate(model, error: NonFinite) -> None:
    """Add to `error` which propagator of `model` raised it."""
    for name, learner in model.learners().items():
        if learner is error.where:
            error.add_note(
                f"raised in '{name}' ({learner}); layers before it have learnt from this batch"
            )


def inferred(model, x) -> Tensor:
    """What inference makes of x with zeros in place of what is not finite; backward through it
    reaches no parameter."""
    if isinstance(x, Tensor) and x.is_floating_point():
        x = x.nan_to_num(0.0, 0.0, 0.0)
    with evaluation(model), torch.no_grad():
        out = model.forward((x, None))
    return out.nan_to_num(0.0, 0.0, 0.0).detach().requires_grad_()
