"""Formatters: from what the data loader gives (class numbers) to what a generator takes
(vectors)."""

from __future__ import annotations

import torch

from ..functional import signals as functional
from .base import Formatter


class LabelNumberToOnehot(Formatter):
    """Class numbers [b] or [b 1] become one-hot rows [b num_classes] of the model's dtype; labels
    outside of the classes are refused. Rows [b num_classes], soft labels, pass as they are."""

    def __init__(self, num_classes: int | None = None):
        super().__init__()
        self.num_classes = num_classes
        # follows model.double(), .half() and .to(...), as parameters do
        self.register_buffer("_like", torch.zeros(()), persistent=False)

    def forward(self, input):
        h, t = input
        return h, functional.label_number_to_onehot(t, self.num_classes, self._like.dtype)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}"


class DistinctBatchLabelsOnehot(Formatter):
    """One target row per class instead of one per sample: one-hot rows [b classes] become the
    identity [classes classes]."""

    class_rows = True

    def forward(self, input):
        h, t = input
        return h, functional.distinct_batch_labels_onehot(t)


class DistinctBatchLabels(Formatter):
    """One target number per class: one-hot rows [b classes] become 0. .. classes - 1."""

    class_rows = True

    def forward(self, input):
        h, t = input
        return h, functional.distinct_batch_labels(t)


class LabelVectorToNumber(Formatter):
    """One-hot rows [b classes] become class numbers [b 1] of type float."""

    def forward(self, input):
        h, t = input
        return h, functional.label_vector_to_number(t)
