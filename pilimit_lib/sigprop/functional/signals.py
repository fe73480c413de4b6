"""Stateless formatters: from labels to the targets that enter the network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .contrast import check_labels, labels_of


def label_number_to_onehot(
    t: Tensor | None, num_classes: int | None = None, dtype: torch.dtype | None = None
) -> Tensor | None:
    """Class numbers [b] or [b 1] as one-hot rows [b num_classes] of `dtype` (torch's default);
    without `num_classes`, the largest number sets it. Rows [b num_classes] (soft labels) stay."""
    if t is None:
        return None
    dtype = dtype or torch.get_default_dtype()
    if t.ndim == 2 and t.shape[1] != 1:
        if num_classes not in (None, t.shape[1]):
            raise ValueError(
                f"soft labels must be rows [b {num_classes}] for {num_classes} classes, got "
                f"{list(t.shape)}"
            )
        return t.to(dtype)
    if t.ndim > 2:
        raise ValueError(
            f"labels must be class numbers [b] or [b 1], or rows [b classes], got {list(t.shape)}"
        )
    labels = labels_of(t)
    if num_classes is None:
        num_classes = int(labels.max()) + 1
    check_labels(labels, num_classes)
    return F.one_hot(labels, num_classes).to(dtype)


def distinct_batch_labels_onehot(t: Tensor | None) -> Tensor | None:
    """One target row per class: the identity [classes classes] for one-hot rows t [b classes]."""
    if t is None:
        return None
    dtype = t.dtype if t.is_floating_point() else None
    return torch.eye(_classes(t), device=t.device, dtype=dtype)


def distinct_batch_labels(t: Tensor | None) -> Tensor | None:
    """One target number per class: 0. .. classes - 1 for one-hot rows t [b classes]."""
    return (
        None
        if t is None
        else torch.arange(_classes(t), device=t.device, dtype=torch.get_default_dtype())
    )


def label_vector_to_number(t: Tensor | None) -> Tensor | None:
    """One-hot rows (or scores) [b classes] as class numbers [b 1], of type float."""
    if t is None:
        return None
    _classes(t)
    return t.argmax(1, keepdim=True).to(torch.get_default_dtype())


def _classes(t: Tensor) -> int:
    if t.ndim != 2:
        raise ValueError(
            f"expected one-hot rows [b classes], got shape {list(t.shape)}; put "
            "LabelNumberToOnehot before"
        )
    return t.shape[1]
