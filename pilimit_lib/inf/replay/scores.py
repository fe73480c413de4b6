"""How well attributions predict retraining, and how well scores find the bad samples.

Linear datamodelling score (Park et al. 2023, as dattri measures it): for each query, Spearman's
rank correlation over random subsets between what an attribution predicts, the sum over the samples
left out, and what training without them led to; the mean over queries. Index legend: k subsets, n
samples, q queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_datamodelling_score(values: Tensor, left_out: Tensor, retrained: Tensor) -> Tensor:
    """For attributions `values` [n q] (the change of a query if a sample is left out), subsets
    `left_out` [k n] (bool) and the changes or values `retrained` [k q]: the score of each query
    [q]."""
    if left_out.dtype != torch.bool or left_out.shape != (len(retrained), len(values)):
        raise ValueError(
            f"left_out is {left_out.dtype} {list(left_out.shape)}; a mask "
            f"[{len(retrained)}, {len(values)}] (subsets, samples) was expected"
        )
    if len(retrained) < 2 or values.shape[1] != retrained.shape[1]:
        raise ValueError(
            f"attributions {list(values.shape)} and retrained queries {list(retrained.shape)}: two "
            "or more subsets and the same queries were expected"
        )
    predicted = left_out.double() @ values.double()
    return spearman(predicted, retrained.double())


def spearman(one: Tensor, other: Tensor) -> Tensor:
    """Rank correlation of the columns of [k q] and [k q]: [q]; 0 for a column that is constant."""
    a, b = (ranks(values) - (len(values) + 1) / 2 for values in (one, other))
    sizes = torch.linalg.vector_norm(a, dim=0) * torch.linalg.vector_norm(b, dim=0)
    return (a * b).sum(0) / torch.where(sizes > 0, sizes, 1)


def ranks(values: Tensor) -> Tensor:
    """Ranks 1 ... k within each column of [k q], ties sharing their mean."""
    less = (values[None] < values[:, None]).double().sum(1)
    same = (values[None] == values[:, None]).double().sum(1)
    return less + (same + 1) / 2


def auc(scores: Tensor, bad: Tensor) -> float:
    """The probability that a bad sample has a larger score than a good one: `scores` [n], `bad` [n]
    (bool)."""
    count = int(bad.sum())
    if not 0 < count < len(bad):
        raise ValueError(f"{count} of {len(bad)} samples are bad; some of both kinds are needed")
    position = ranks(scores[:, None].double())[:, 0]
    return float((position[bad].sum() - count * (count + 1) / 2) / (count * (len(bad) - count)))


def random_subsets(n: int, fraction: float, count: int, seed: int) -> Tensor:
    """`count` masks [count n] of samples to be left out, each of `fraction` of them (one at
    least)."""
    if not 0 < fraction < 1:
        raise ValueError(
            f"the fraction left out is {fraction}; a number between 0 and 1 was expected"
        )
    generator = torch.Generator().manual_seed(seed)
    size = max(1, round(fraction * n))
    masks = torch.zeros(count, n, dtype=torch.bool)
    for mask in masks:
        mask[torch.randperm(n, generator=generator)[:size]] = True
    return masks


def mean_and_error(values: Sequence[float] | Tensor) -> tuple[float, float]:
    """Mean and standard error."""
    found = torch.as_tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std() / len(found) ** 0.5)
