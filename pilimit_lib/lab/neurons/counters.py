"""What the lab knows of each neuron of a layer: how often it triggered, and how fast it may
learn."""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import Enum

import torch
from torch import Tensor, nn

from .geometry import indices

COUNTERS = ("train_triggers", "train_seen", "eval_triggers", "eval_seen")
EXACT_FLOAT = 2**24  # the largest count up to which every integer is a float32


class TrackingMode(Enum):
    """Which counters a forward pass feeds."""

    DISABLED = "disabled"
    TRAIN = "train"
    EVAL = "eval"


def checked_rate(lr: float) -> float:
    """A learning rate multiplier: a number in [0, 1]."""
    if (
        isinstance(lr, bool)
        or not isinstance(lr, int | float)
        or not math.isfinite(lr)
        or not 0 <= lr <= 1
    ):
        raise ValueError(
            f"lr={lr!r} is not a multiplier of the learning rate; a number from 0 (frozen) to 1 "
            "was expected"
        )
    return float(lr)


def count_triggers(output: Tensor, spatial: int) -> Tensor:
    """How many positions of each neuron are above zero: int64 [n], from `output` [b, n, *spatial]
    or [..., n]."""
    channel = output.ndim - spatial - 1
    others = [dim for dim in range(output.ndim) if dim != channel]
    if output.is_cuda or output.numel() // max(output.shape[channel], 1) >= EXACT_FLOAT:
        return (output > 0).sum(others) if others else (output > 0).long()
    # Comparing into floats and summing those is several times faster on a CPU than summing
    # booleans.
    above = torch.gt(output, 0, out=torch.empty_like(output, dtype=torch.float32))
    return (above.sum(others) if others else above).long()


class Neurons(nn.Module):
    """Counters and rates of one layer's neurons; the tensors are rearranged with the neurons by
    every edit.

    `train_triggers`, `train_seen`, `eval_triggers`, `eval_seen`: int64 [n]. `seen` counts samples
    since the neuron exists. `rate` [n] and `in_rate` [incoming]: multipliers of the learning rate.
    """

    def __init__(self, neurons: int, incoming: int, device: torch.device | None = None) -> None:
        super().__init__()
        for name in COUNTERS:
            self.register_buffer(name, torch.zeros(neurons, dtype=torch.long, device=device))
        self.register_buffer("rate", torch.ones(neurons, device=device))
        self.register_buffer("in_rate", torch.ones(incoming, device=device))
        self.slowed = False  # kept beside the tensors, so that asking does not wait for a GPU

    @torch.no_grad()
    def count(self, output: Tensor, spatial: int, mode: TrackingMode) -> None:
        """Add one forward pass: `output` is what the layer returned, before any non-linearity."""
        if mode is TrackingMode.DISABLED:
            return
        if self.rate.device != output.device:
            self.to(output.device)  # the model was moved after it was first watched
        samples = output.shape[0] if output.ndim > spatial + 1 else 1
        train = mode is TrackingMode.TRAIN
        (self.train_triggers if train else self.eval_triggers).add_(
            count_triggers(output.detach(), spatial)
        )
        (self.train_seen if train else self.eval_seen).add_(samples)

    def set_rate(self, neuron_ids: Iterable[int], lr: float, *, incoming: bool = False) -> None:
        """Let these neurons (or these incoming ones) learn at `lr` times the learning rate."""
        target = self.in_rate if incoming else self.rate
        chosen = indices(neuron_ids, len(target), "incoming neurons" if incoming else "neurons")
        target[chosen] = checked_rate(lr)
        self.refresh()

    def refresh(self) -> None:
        """Look again whether any rate differs from 1, after the tensors were replaced."""
        self.slowed = bool((self.rate != 1).any() or (self.in_rate != 1).any())

    def rates(self, mode: TrackingMode) -> Tensor:
        """Triggers per sample, float64 [n]; NaN where no sample was seen."""
        train = mode is TrackingMode.TRAIN
        triggers, seen = (
            (self.train_triggers, self.train_seen)
            if train
            else (self.eval_triggers, self.eval_seen)
        )
        return triggers.double() / torch.where(seen > 0, seen, torch.nan)

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over the tensors of `state_dict()` of another moment, whatever their length."""
        for name, value in state.items():
            setattr(self, name, value.clone().to(getattr(self, name).device))
        self.refresh()
