"""Collectives of `torch.distributed`: errors that say what usually lies behind them, and a count of
the bytes that were exchanged.

A rank that ends makes the others raise `RankLost`; one that hangs does so after the timeout given
to `init_process_group`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RankLost(RuntimeError):
    """A collective failed, since another rank ended or hangs."""


@dataclass
class Traffic:
    """What this rank received: `bytes` from others (what it sent is as much), in so many `calls`.

    A gathered tensor comes from each of the k − 1 others; of a sum of n bytes 2 (k − 1)/k · n
    arrive, as rings and halving need at least.
    """

    bytes: float = 0.0
    calls: int = 0


# a list and no context variable: backward passes run in threads of their own
_counting: list[Traffic] = []


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts what is exchanged inside the `with`, in every thread."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting[:] = [other for other in _counting if other is not traffic]


def sum_(tensor: Tensor, group: Any = None) -> Tensor:
    """The sum over ranks, in place, the same bits on each."""
    size = dist.get_world_size(group)
    with explained(2 * (size - 1) / size * _bytes(tensor)):
        dist.all_reduce(tensor, group=group)
    return tensor


def gathered(tensor: Tensor, group: Any = None) -> list[Tensor]:
    """The tensors of all ranks in their order; they have the same shape and dtype."""
    size = dist.get_world_size(group)
    found = [torch.empty_like(tensor) for _ in range(size)]
    with explained((size - 1) * _bytes(tensor)):
        dist.all_gather(found, tensor.contiguous(), group=group)
    return found


def collected(tensor: Tensor, group: Any = None) -> list[Tensor] | None:
    """`gathered` on the first rank only; None on the others."""
    size, first = dist.get_world_size(group), dist.get_rank(group) == 0
    found = [torch.empty_like(tensor) for _ in range(size)] if first else None
    root = 0 if group is None else dist.get_global_rank(group, 0)
    with explained((size - 1) * _bytes(tensor) if first else 0):
        dist.gather(tensor.contiguous(), found, dst=root, group=group)
    return found


@contextmanager
def explained(received: float = 0.0) -> Iterator[None]:
    """Around a collective by which this rank receives so many bytes."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(
            f"a collective failed on rank {dist.get_rank()}: another rank ended, hangs, or was fed "
            f"a batch of another size. Start all ranks again from a checkpoint ({error})"
        ) from error
    for traffic in _counting:
        traffic.bytes += received
        traffic.calls += 1


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
