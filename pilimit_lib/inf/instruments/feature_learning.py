"""Lazy or rich: how far the kernels of a network have moved since a checkpoint, and towards the
task.

A lazy network is its linearisation at the start: feature kernels and tangent kernel stay. One that
learns features moves both, towards the kernel of its labels. Sources: Jacot et al. 2018; Chizat,
Oyallon & Bach 2019; Yang & Hu 2021; Kornblith et al. 2019 (CKA).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ...core import load
from .features import feature_kernels
from .similarity import alignment, cka, relative_change, target_kernel
from .tangent import empirical_ntk

Since = nn.Module | Mapping[str, Any] | str | os.PathLike
NTK = "NTK"


@dataclass(frozen=True)
class KernelChange:
    """What became of one kernel: the feature kernel that a layer receives, or "NTK".

    `change` is |K' - K|_F / |K|_F; `alignment` the cosine between the two and `cka` that of the
    centered ones, 1 where they are the same up to a factor. `task_before` and `task_now` are the
    CKA with the kernel of the labels, NaN where none were given.
    """

    kernel: str
    change: float
    alignment: float
    cka: float
    task_before: float
    task_now: float


@dataclass(frozen=True)
class FeatureLearning:
    """The change of every feature kernel, in the order of the layers, and of the NTK, where it was
    asked for. A frame of it: `pandas.DataFrame(found.records())`."""

    kernels: tuple[KernelChange, ...]
    samples: int
    ntk_samples: int

    def __iter__(self) -> Iterator[KernelChange]:
        return iter(self.kernels)

    def __getitem__(self, kernel: str) -> KernelChange:
        for found in self.kernels:
            if found.kernel == kernel:
                return found
        raise KeyError(f"no kernel '{kernel}'; there are {[k.kernel for k in self.kernels]}")

    def lazy(self, tolerance: float = 0.05) -> bool:
        """Whether every kernel is what it was, up to a relative change of `tolerance`."""
        return all(found.change <= tolerance for found in self.kernels)

    def records(self) -> list[dict[str, Any]]:
        """One dictionary per kernel."""
        return [asdict(found) for found in self.kernels]

    def __str__(self) -> str:
        names = [field.name for field in fields(KernelChange)]
        lines = [[found.kernel, *(f"{v:.4g}" for v in astuple(found)[1:])] for found in self]
        widths = [max(map(len, column)) for column in zip(names, *lines)]
        rows = [
            "  ".join(text.ljust(widths[0]) if i == 0 else text.rjust(widths[i]) for i, text in row)
            for row in (list(enumerate(line)) for line in (names, *lines))
        ]
        return "\n".join([*rows, f"({self.samples} samples, of which {self.ntk_samples} for NTK)"])


def feature_learning(
    net: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    since: Since,
    ntk: int = 64,
    batch_size: int = 256,
) -> FeatureLearning:
    """How far the feature kernels and the tangent kernel of `net` have moved on samples `x`
    [a ...], since the checkpoint `since`.

    Args:
        y: labels [a] (classes), or values [a o]: what the kernels are compared with.
        since: a state dict of `net` at another time, a snapshot or a path of either (read by
            `core.load`), or a network of any kind with the same layers.
        ntk: of how many of the samples the tangent kernel is made (0: not at all); it costs a
            Jacobian per sample.

    `net` stays as it is; a copy of it is made for a state dict.
    """
    if len(x) < 2:
        raise ValueError(f"{len(x)} samples; kernels are compared on two or more")
    if y is not None and len(y) != len(x):
        raise ValueError(f"{len(x)} samples and {len(y)} labels; one for each was expected")
    ntk = min(ntk, len(x))
    earlier = _network_of(net, since)
    pairs = _pairs(feature_kernels(earlier, x, batch_size), feature_kernels(net, x, batch_size))
    if ntk:
        pairs[NTK] = (empirical_ntk(earlier, x[:ntk]), empirical_ntk(net, x[:ntk]))
    task = None if y is None else target_kernel(y)
    found = [_compared(name, before, now, task) for name, (before, now) in pairs.items()]
    return FeatureLearning(tuple(found), len(x), ntk)


def _compared(name: str, before: Tensor, now: Tensor, task: Tensor | None) -> KernelChange:
    nan = float("nan")
    labels = None if task is None else task[: len(now), : len(now)]
    return KernelChange(
        name,
        relative_change(now, before),
        alignment(now, before),
        cka(now, before),
        nan if labels is None else cka(before, labels),
        nan if labels is None else cka(now, labels),
    )


def _pairs(before: dict[str, Tensor], now: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    if list(before) != list(now):
        raise ValueError(
            f"the network then received features in {list(before)}, and now in {list(now)}; the "
            "same layers were expected"
        )
    return {name: (before[name], now[name]) for name in now}


def _network_of(net: nn.Module, since: Since) -> nn.Module:
    """The network at the time of `since`."""
    if isinstance(since, nn.Module):
        return since
    state = load(since) if isinstance(since, str | os.PathLike) else since
    if not isinstance(state, Mapping):
        raise TypeError(
            f"since is a {type(state).__name__}; a state dict, a snapshot, a path or a network was "
            "expected"
        )
    if isinstance(state.get("model"), Mapping):
        state = state["model"]  # a snapshot holds the network beside the optimiser
    earlier = copy.deepcopy(net)
    with torch.no_grad():
        earlier.load_state_dict(state)
    return earlier
