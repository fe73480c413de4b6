"""Training of a network on arrays, by mini-batches: memory does not grow with the samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm

from ..clip import clip_grad_norm_
from ..mlp import InfMLP
from ..optim import PiSGD, param_groups
from .checking import CHUNK

Loss = Callable[[Tensor, Tensor], Tensor]
RATES = {"adam": 2e-3, "sgd": 0.1}  # of learning where none is asked for


@dataclass(frozen=True)
class Samples:
    """Arrays as the network sees them: X [n d] standardised by `scaler`, and targets [n ...] made
    of y by `encode`. `index`: which of the samples, default all."""

    X: np.ndarray
    y: np.ndarray
    scaler: StandardScaler
    encode: Callable[[np.ndarray], np.ndarray]
    index: np.ndarray | None = None
    dtype: torch.dtype = torch.float32

    def __len__(self) -> int:
        return len(self.X) if self.index is None else len(self.index)

    def part(self, index: np.ndarray) -> Samples:
        return Samples(self.X, self.y, self.scaler, self.encode, index, self.dtype)

    def batches(self, size: int, random: np.random.RandomState | None = None) -> Iterator:
        """Pairs of tensors of `size` samples, in an order drawn from `random` where it is given."""
        index = np.arange(len(self.X)) if self.index is None else self.index
        if random is not None:
            index = random.permutation(index)
        for start in range(0, len(index), size):
            rows = index[start : start + size]
            target = torch.from_numpy(self.encode(self.y[rows]))
            if target.is_floating_point():
                target = target.to(self.dtype)
            yield standardised(self.scaler, self.X[rows], self.dtype), target


def standardised(scaler: StandardScaler, X: np.ndarray, dtype: torch.dtype) -> Tensor:
    """X [b d] less its mean over its deviation, computed in float64."""
    return torch.from_numpy((X - scaler.mean_) / scaler.scale_).to(dtype)


def observe(scaler: StandardScaler, values: np.ndarray) -> StandardScaler:
    """Take mean and deviation of `values` [n d] in, chunk by chunk, beside those seen before."""
    for start in range(0, len(values), CHUNK):
        scaler.partial_fit(values[start : start + CHUNK].astype(np.float64))
    return scaler


def optimizer_for(
    net: InfMLP, name: str, rate: float | None, weight_decay: float
) -> torch.optim.Optimizer:
    rate = RATES[name] if rate is None else rate
    groups = param_groups(net, rate, weight_decay, optimizer=name)
    return PiSGD(groups, rate) if name == "sgd" else torch.optim.AdamW(groups, rate)


@dataclass
class Course:
    """The course of a training: loss per sample of each epoch, score on held-out samples, and the
    best state."""

    losses: list[float]
    scores: list[float]
    best: dict | None = None
    best_epoch: int = 0

    def improved(self, score: float, net: InfMLP, tol: float) -> None:
        self.scores.append(score)
        if self.best is None or score > self.scores[self.best_epoch] + tol:
            self.best, self.best_epoch = copy.deepcopy(net.state_dict()), len(self.scores) - 1

    def stalled(self, patience: int) -> bool:
        return len(self.scores) - 1 - self.best_epoch >= patience


def train(
    net: InfMLP,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    samples: Samples,
    random: np.random.RandomState,
    *,
    epochs: int,
    batch_size: int,
    clip: float | None,
    anneal: bool,
    bar: tqdm,
    held_out: Samples | None = None,
    patience: int = 10,
    tol: float = 1e-4,
) -> Course:
    """At most `epochs` passes over `samples`. With `anneal` rates fall to zero along a cosine. With
    `held_out` samples the network ends as it was when their loss was lowest, and stops after
    `patience` epochs without a better one.

    Raises ArithmeticError as soon as a loss is not finite.
    """
    course = Course([], [])
    steps = epochs * math.ceil(len(samples) / batch_size)
    rates = [group["lr"] for group in optimizer.param_groups]
    step = 0
    for epoch in range(epochs):
        total = 0.0
        for x, y in samples.batches(batch_size, random):
            if anneal:
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            value = loss(net(x), y)
            value.backward()
            if clip is not None:
                clip_grad_norm_(net, clip)
            if not math.isfinite(value.item()):
                raise ArithmeticError(
                    f"the loss became {value.item()} in epoch {epoch + 1}: lower learning_rate, or "
                    "set max_norm"
                )
            optimizer.step()
            total += value.item() * len(x)
            step += 1
            bar.update(len(x))
        course.losses.append(total / len(samples))
        bar.set_postfix(loss=f"{course.losses[-1]:.3g}", refresh=False)
        if held_out is not None:
            course.improved(-mean_loss(net, loss, held_out), net, tol)
            if course.stalled(patience):
                break
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    if course.best is not None:
        net.load_state_dict(course.best)
    return course


@torch.no_grad()
def mean_loss(net: InfMLP, loss: Loss, samples: Samples) -> float:
    total = sum(float(loss(net(x), y)) * len(x) for x, y in samples.batches(CHUNK))
    return total / len(samples)
