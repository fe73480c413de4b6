"""The input-target losses: every sample's activations shall resemble the targets of its partners
more than the other targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional.contrast import (
    MODES,
    PARTNERS_BY,
    check_k,
    contrast,
    labels_of,
    partners,
    similarity,
)
from .base import Loss, class_labels, class_rows, class_shares


class Contrast(Loss):
    """-(1/B) sum_i sum_j w_ij log softmax_j(y_ij / temperature): similarities y after the block,
    partners w from before it.

    `mode`, `k`, `by`: how partners are chosen, see `functional.partners`. The default "product" is
    the paper's code, in which deep layers drift to wrong partners: a target of large norm resembles
    everyone most. "label" cannot drift, "cosine" less. `cosine`: similarities y as cosines (then a
    temperature near 0.1 is usual). `normalize`: partners weigh one in sum. `counts`: with one
    target row per class, weigh each class by its samples in the batch, so that the loss (for mode
    "max_all") equals that of one target row per sample.

    Target rows may stand for samples or for classes; see `class_rows`. Soft labels [b classes]
    share out the partners of class rows; among rows of samples their largest class counts.
    """

    def __init__(
        self,
        mode: str = "max_all",
        *,
        k: int | None = None,
        by: str = "product",
        cosine: bool = False,
        temperature: float = 1.0,
        normalize: bool = False,
        counts: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if mode not in MODES or by not in PARTNERS_BY:
            raise ValueError(
                f"mode={mode!r}, by={by!r}: mode is one of {MODES}, by one of {PARTNERS_BY}"
            )
        if (mode == "topk") != (k is not None):
            raise ValueError(
                f"k belongs to mode 'topk' and must be given there, got mode={mode!r}, k={k!r}"
            )
        if k is not None:
            check_k(k, k)
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if counts and mode != "max_all":
            raise ValueError(
                "counts stands for repeated rows that are all partners: mode 'max_all', got "
                f"{mode!r}"
            )
        self.mode, self.k, self.by = mode, k, by
        self.cosine, self.temperature = cosine, temperature
        self.normalize, self.counts = normalize, counts
        self.generator = generator

    def check(self, sp_learn, rows, context):
        if self.mode == "topk" and not getattr(sp_learn, "class_rows", False):
            check_k(self._k(sp_learn, rows), rows)
        if self.by == "label":
            labels_of(context, rows)

    def forward(self, sp_learn, h1, t1, h0, t0, y):
        similar = similarity(h1, t1, normalize=self.cosine)  # [b r]
        k = self._k(sp_learn, len(t0))
        if class_rows(sp_learn, h1, t1):
            labels, shares = class_labels(h1, t1, y), class_shares(t1, y)
            return self._among_classes(similar, labels, shares, t0, k)
        w = self._partners(t0, labels_of(y, len(h1)) if self.by == "label" else None, k)
        return self._contrast(similar, w)

    def _among_classes(
        self, similar: Tensor, labels: Tensor, shares: Tensor | None, t0: Tensor, k: int | None
    ) -> Tensor:
        """The loss where target rows [classes ...] stand for classes; soft labels share out their
        partners."""
        shares = None if shares is None else shares.to(similar.dtype)
        if self.by == "label" and not self.counts:
            # each class is its only partner
            return F.cross_entropy(similar / self.temperature, labels if shares is None else shares)
        classes = torch.arange(len(t0), device=labels.device)
        counts = None
        if self.counts:
            if shares is None:
                counts = torch.bincount(labels, minlength=len(t0))
            else:
                counts = shares.sum(0)
            # as with repeated rows, a class that the batch lacks is nobody's partner
            present = classes[counts > 0]
            w = similar.new_zeros(len(t0), len(t0))
            w[present[:, None], present] = self._partners(t0[present], present, k)
        else:
            w = self._partners(t0, classes, k)  # [classes classes]
        return self._contrast(similar, w[labels] if shares is None else shares @ w, counts)

    def _contrast(self, similar: Tensor, w: Tensor, counts: Tensor | None = None) -> Tensor:
        return contrast(
            similar, w, temperature=self.temperature, normalize=self.normalize, counts=counts
        )

    def _k(self, sp_learn, rows: int) -> int | None:
        """How many partners: a short last batch can be evaluated, though not learnt from."""
        evaluating = not self.training or not getattr(sp_learn, "training", True)
        return min(self.k, rows) if evaluating and self.k is not None else self.k

    def _partners(self, t0: Tensor, labels: Tensor | None, k: int | None) -> Tensor:
        return partners(t0, self.mode, k=k, by=self.by, labels=labels, generator=self.generator)

    def extra_repr(self) -> str:
        return (
            f"mode={self.mode!r}, k={self.k}, by={self.by!r}, cosine={self.cosine}, "
            f"temperature={self.temperature}"
        )
