"""What a loss of a layer is."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional.contrast import labels_of, shares_of


class Loss(nn.Module):
    """Base of losses written as classes: `forward(sp_learn, h1, t1, h0, t0, y)` returns one number.

    `sp_learn` is the propagator that asks; h1 [b ...] and t1 [r ...] are its streams after the
    block, h0 and t0 before it (in a signal: the raw input and the formatted context); y is the
    context as given to the model. A plain function serves as well.
    """

    def check(self, sp_learn, rows: int, context: Tensor) -> None:
        """Refuse a batch of `rows` samples that cannot work, before any layer has learnt from
        it."""


def class_rows(sp_learn, h: Tensor, t: Tensor) -> bool:
    """Whether the target rows stand for classes: so said by the signal, or evident from their
    number."""
    return bool(getattr(sp_learn, "class_rows", False)) or len(h) != len(t)


def class_labels(h1: Tensor, t1: Tensor, context: Tensor) -> Tensor:
    """Labels [b] that index target rows of classes [classes ...]; out of range they are refused (on
    a GPU, by the indexing)."""
    labels = labels_of(context, len(h1))
    if (
        not labels.is_cuda
        and len(labels)
        and (int(labels.min()) < 0 or int(labels.max()) >= len(t1))
    ):
        raise ValueError(
            f"labels from {int(labels.min())} to {int(labels.max())} do not index the {len(t1)} "
            "target rows; "
            "give one target row per sample, or one per class (signals.DistinctBatchLabelsOnehot "
            "makes the latter)"
        )
    return labels


def class_shares(t1: Tensor, context: Tensor) -> Tensor | None:
    """Soft labels as shares [b classes] of the target rows of classes; None for class numbers."""
    shares = shares_of(context)
    if shares is not None and shares.shape[1] != len(t1):
        raise ValueError(
            f"soft labels have {shares.shape[1]} classes but there are {len(t1)} target rows of "
            "classes"
        )
    return shares
