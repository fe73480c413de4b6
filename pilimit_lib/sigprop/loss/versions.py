"""The losses of the paper's code by its numbers, called as `loss(sp_learn, h1, t1, h0, t0, y)`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..functional.contrast import similarity
from .base import class_labels, class_rows, class_shares
from .contrast import Contrast

_MAX_ALL = Contrast("max_all")
_MAX_RAND = Contrast("max_rand")


def v1_input_label_direct(
    sp_learn, h1: Tensor, t1: Tensor, h0: Tensor, t0: Tensor, y: Tensor
) -> Tensor:
    """Classify by the targets themselves: cross-entropy of the similarities to one target row per
    class; y class numbers, or soft labels [b classes]."""
    if sp_learn is not None and not class_rows(sp_learn, h1, t1):
        raise ValueError(
            f"v1 compares with one target row per class, but the {len(t1)} target rows stand for "
            "samples: make them by signals.project_labels(..., per_class=True) or "
            "signals.DistinctBatchLabelsOnehot (a formatter of your own that does so says "
            "class_rows = True)"
        )
    similar = similarity(h1, t1)
    shares = class_shares(t1, y)
    if shares is not None:
        return F.cross_entropy(similar, shares.to(similar.dtype))
    return F.cross_entropy(similar, class_labels(h1, t1, y))


def v9_input_target_max_all(
    sp_learn, h1: Tensor, t1: Tensor, h0: Tensor, t0: Tensor, y: Tensor
) -> Tensor:
    """Partners are all targets that were closest before the layer; with m of them a sample weighs m
    times."""
    return _MAX_ALL(sp_learn, h1, t1, h0, t0, y)


def v14_input_target_max_rand(
    sp_learn, h1: Tensor, t1: Tensor, h0: Tensor, t0: Tensor, y: Tensor
) -> Tensor:
    """One partner: the closest target before the layer, equally close ones drawn by lot
    (`Contrast("max_first")`: the first)."""
    return _MAX_RAND(sp_learn, h1, t1, h0, t0, y)


def v15_input_target_topk(k: int | None = None, *, topk: int | None = None) -> Contrast:
    """The loss whose partners are the `k` closest targets before the layer (`topk` is the same);
    training batches need at least k samples."""
    if (k is None) == (topk is None):
        raise ValueError(f"say once how many partners: k or topk, got k={k!r} and topk={topk!r}")
    return Contrast("topk", k=topk if k is None else k)
