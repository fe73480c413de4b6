"""The mathematics of the losses: who resembles whom, who should, and the price of the difference.

Index legend: `b` input rows (samples), `r` target rows (one per sample, or one per class), `c`
channels, `s` positions.
Source: Kohan, Rietman, Siegelmann, "Signal Propagation: The Framework for Learning and Inference in
a Forward Pass" (2023).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("max_all", "max_rand", "max_first", "topk")
PARTNERS_BY = ("product", "cosine", "label")
IGNORED = -100  # the label that F.cross_entropy passes over by default


def similarity(h: Tensor, t: Tensor, *, normalize: bool = False) -> Tensor:
    """How alike each input row is to each target row: y_ij = (1/S) sum_s sum_c h_ics t_jcs, or the
    cosine of the whole rows.

    h [b c *s], t [r c *s] -> [b r], in single precision at least, also under autocast: sums over a
    feature map overflow fp16.
    """
    if h.shape[1:] != t.shape[1:]:
        raise ValueError(
            f"the streams do not match: input rows have shape {list(h.shape[1:])}, target rows "
            f"{list(t.shape[1:])}; "
            "the signal must give both the same shape, and each block must treat them alike"
        )
    positions = math.prod(h.shape[2:])
    with torch.autocast(h.device.type, enabled=False):
        h, t = _wide(h).reshape(len(h), -1), _wide(t).reshape(len(t), -1)
        if normalize:
            return F.normalize(h, dim=1) @ F.normalize(t, dim=1).T
        return h @ t.T / positions


def partners(
    t0: Tensor,
    mode: str = "max_all",
    *,
    k: int | None = None,
    by: str = "product",
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which target rows count as right for which: weights [r r] of zeros and ones, from the targets
    t0 [r c *s] before the layer.

    `mode`: every row that is equally close ("max_all"), one of them drawn at random ("max_rand"),
    the first of them ("max_first"), or the `k` closest ("topk"). `by`: closeness as the plain
    "product" of the paper's code, as "cosine", or by "label" [r], where only rows of the same class
    can be partners, however the representation drifts.
    """
    if mode not in MODES or by not in PARTNERS_BY:
        raise ValueError(
            f"partners by mode={mode!r}, by={by!r}: mode is one of {MODES}, by one of {PARTNERS_BY}"
        )
    if mode == "topk":
        check_k(k, len(t0))
    if by == "label" and labels is None:
        raise ValueError("partners by label need the labels of the target rows: pass labels=")
    with torch.no_grad():
        if by == "label":
            allowed = labels[:, None] == labels[None, :]  # [r r]
            # Among rows of one class all are equally close, unless the k closest of them are asked
            # for.
            g = similarity(t0, t0) if mode == "topk" else _wide(t0).new_zeros(allowed.shape)
            g = g.masked_fill(~allowed, -math.inf)
        else:
            g = similarity(t0, t0, normalize=by == "cosine")
            allowed = torch.ones_like(g, dtype=torch.bool)
        return _select(g, allowed, mode, k, generator).to(g.dtype)


def contrast(
    y: Tensor,
    w: Tensor,
    *,
    temperature: float = 1.0,
    normalize: bool = False,
    counts: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of similarities y [b r] against partners w [b r]: (1/B) sum_i sum_j -w_ij log
    softmax_j(y_i / temperature).

    Rows of `w` are used as they are, so a sample with m partners weighs m times (its minimum is m
    log m), unless `normalize` makes each row sum to one. `counts` [r] says that target row j stands
    for counts[j] equal rows: the loss is then what the repeated rows would give.
    """
    if y.shape != w.shape:
        raise ValueError(
            f"similarities {list(y.shape)} and partners {list(w.shape)} must have the same shape"
        )
    y = y / temperature
    if counts is not None:
        counts = counts.to(y.dtype)
        log_p = y - torch.logsumexp(y + counts.log(), dim=1, keepdim=True)
        w = w * counts
    else:
        log_p = F.log_softmax(y, dim=1)
    if normalize:
        w = w / w.sum(1, keepdim=True)
    return -(w * log_p).sum(1).mean()


def labels_of(context: Tensor | None, rows: int | None = None) -> Tensor:
    """Class numbers [b] of a context given as class numbers [b] or [b 1], or as one-hot or soft
    rows [b classes], whose largest entry is taken."""
    if context is None:
        raise ValueError("this needs labels, but the context is None: call model(x, y)")
    if context.ndim == 2 and context.shape[1] > 1:
        labels = context.argmax(1)
    elif context.ndim == 1 or (context.ndim == 2 and context.shape[1] == 1):
        check_whole(context)
        labels = context.reshape(-1).long()
    else:
        raise ValueError(
            f"cannot read labels from a context of shape {list(context.shape)}; "
            "expected class numbers [b] or [b 1], or one-hot rows [b classes]"
        )
    if rows is not None and len(labels) != rows:
        raise ValueError(f"{rows} input rows but {len(labels)} labels; each sample needs its label")
    return labels


def shares_of(context: Tensor | None) -> Tensor | None:
    """The context as shares of each class [b classes] where it is given so (one-hot, smoothed or
    mixed labels); None where it is class numbers."""
    if context is not None and context.ndim == 2 and context.shape[1] > 1:
        return context
    return None


def not_ignored(context: Tensor) -> Tensor | None:
    """Which samples [b] have a class number other than IGNORED; None if all have."""
    numbers = context.ndim == 1 or (context.ndim == 2 and context.shape[1] == 1)
    if not numbers or context.is_floating_point() or not context.dtype.is_signed:
        return None
    kept = context.reshape(-1) != IGNORED
    return None if bool(kept.all()) else kept


def check_rows(x: Tensor, context: Tensor) -> None:
    """Refuse an empty batch, and one whose context is not one entry per sample."""
    if context.ndim == 0 or len(context) != len(x):
        raise ValueError(
            f"{len(x)} inputs but a context of shape {list(context.shape)}; each sample needs its "
            "own"
        )
    if not len(x):
        raise ValueError(
            "the batch is empty: there is nothing to learn from or to compare; pass over it"
        )


def check_whole(labels: Tensor) -> None:
    """Refuse class numbers between two classes."""
    if labels.is_floating_point() and bool((broken := labels != labels.round()).any()):
        raise ValueError(
            f"class numbers must be whole, got {float(labels[broken][0]):g}; shares of classes are "
            "given as rows [b classes]"
        )


def check_k(k: int | None, rows: int) -> None:
    """Refuse a number of partners that the target rows cannot supply."""
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"top-k partners need a whole number k >= 1, got {k!r}")
    if k > rows:
        raise ValueError(
            f"top-k wants k={k} partners but there are only {rows} target rows; "
            "use a larger batch (DataLoader(drop_last=True) drops a short last one) or a smaller k"
        )


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse class numbers outside of 0 .. num_classes - 1."""
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise ValueError(
            f"labels must lie in 0 .. {num_classes - 1} for {num_classes} classes, "
            f"got values from {int(labels.min())} to {int(labels.max())}"
        )


def _select(
    g: Tensor, allowed: Tensor, mode: str, k: int | None, generator: torch.Generator | None
) -> Tensor:
    if mode == "topk":
        chosen = g.topk(k, dim=1).indices
        return torch.zeros_like(allowed).scatter_(1, chosen, True) & allowed
    best = g.amax(1, keepdim=True)
    # Equal rows give products that differ in the last bits, depending on how the matrix product is
    # cut into tiles.
    ties = (g >= best - 64 * torch.finfo(g.dtype).eps * best.abs()) & allowed
    if mode == "max_all":
        return ties
    if mode == "max_rand":
        chosen = torch.multinomial(ties.to(g.dtype), 1, generator=generator)
    else:
        chosen = ties.to(torch.uint8).argmax(1, keepdim=True)
    return torch.zeros_like(ties).scatter_(1, chosen, True)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
