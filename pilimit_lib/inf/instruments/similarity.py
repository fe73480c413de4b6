"""How alike two kernel matrices are, and a kernel and labels.

    change       |K' - K|_F / |K|_F
    alignment    ⟨K, K'⟩ / |K| |K'|                            Cristianini et al. 2001
    CKA          the same of H K H and H K' H, H = 1 - 11ᵀ/a

Kornblith et al. 2019; Cortes, Mohri & Rostamizadeh 2012.

Kernels are [a a] of the same samples in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def relative_change(now: Tensor, before: Tensor) -> float:
    """|now - before|_F / |before|_F; 0 where both are zero, infinity where only `before` is."""
    difference = float(torch.linalg.matrix_norm(now - before))
    size = float(torch.linalg.matrix_norm(before))
    if size:
        return difference / size
    return float("inf") if difference else 0.0


def alignment(one: Tensor, other: Tensor) -> float:
    """The cosine between two kernels as vectors of numbers: 1 where they are proportional; NaN
    where one is zero."""
    _check(one, other)
    sizes = torch.linalg.matrix_norm(one) * torch.linalg.matrix_norm(other)
    return float((one * other).sum() / sizes) if sizes else float("nan")


def centered(kernel: Tensor) -> Tensor:
    """H K H: the kernel of the features minus their mean over the samples."""
    rows = kernel - kernel.mean(0, keepdim=True)
    return rows - rows.mean(1, keepdim=True)


def cka(one: Tensor, other: Tensor) -> float:
    """Centered kernel alignment: `alignment` of the kernels of centered features."""
    _check(one, other)
    return alignment(centered(one), centered(other))


def target_kernel(y: Tensor) -> Tensor:
    """Y Yᵀ of labels: one-hot of classes [a] (integers), or of values [a] or [a o] (floating
    point)."""
    if y.ndim == 1 and not y.is_floating_point():
        y = F.one_hot(y.long())
    y = y.reshape(len(y), -1).double().cpu()
    return y @ y.T


def _check(one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape or one.ndim != 2 or one.shape[0] != one.shape[1]:
        raise ValueError(
            f"kernels of shapes {list(one.shape)} and {list(other.shape)}; two [a a] of the same "
            "samples were expected"
        )
