"""What a named run will take, measured by a few steps of it before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from pilimit_lib.inf.gp import memory_needed

from ..cifar10 import cifar10mlp, cifar10test
from ..imagenet.cost import cost as cost_of_training
from ..meta import train as meta_train
from ..meta.learner import size_of
from ..meta.settings import Settings
from ..training.process import human_bytes
from .commands import settings_of_run
from .runs import Run

WARM, STEPS = 3, 12  # steps before the clock runs, and while it does
BLOCK = 1024  # samples on a side of the block of a kernel that is timed


@dataclass(frozen=True)
class Cost:
    """Bytes of the network or matrix at the end, and seconds if the machine stays as busy as it
    is."""

    bytes: float
    seconds: float

    def __str__(self) -> str:
        hours = self.seconds / 3600
        long = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
        return f"{human_bytes(self.bytes)}, about {long} at the speed of a few steps just now"


def cost_of(run: Run, seed: int, data: str) -> Cost | None:
    """What the run will take; None where the command says so itself once it has its data."""
    settings = settings_of_run(run)
    if run.command == "cifar10.cifar10mlp":
        return _of_training(settings, data, seed)
    if run.command == "cifar10.cifar10test":
        return _of_kernel(settings, data)
    if run.command == "meta.train":
        return _of_meta(settings, data, seed)
    return None


def _timed(step: Callable[..., Any], batches: Iterable[tuple]) -> float:
    """Seconds of one step."""
    steps = iter(batches)
    for batch in islice(steps, WARM):
        step(*batch)
    count, started = 0, time.perf_counter()
    for batch in islice(steps, STEPS):
        step(*batch)
        count += 1
    return (time.perf_counter() - started) / max(count, 1)


def _of_training(settings: cifar10mlp.Settings, data: str, seed: int) -> Cost:
    settings = replace(settings, data=data, seed=seed)
    images = cifar10mlp.images_of(settings).hold_out(settings.held_out)
    trainer = cifar10mlp.Trainer(settings, images, torch.device("cpu"))
    expected = cost_of_training(settings, len(images.train_y), images.features, images.classes)
    seconds = _timed(trainer.step, trainer.batches) * len(trainer.batches) * settings.epochs
    if expected.rows:
        # The steps that are timed had next to no rows: what they took is the input layer's.
        first_layer = 3 * len(images.train_y) * images.features * settings.r
        seconds *= (expected.first_epoch + expected.last_epoch) / 2 / first_layer
    return Cost(expected.bytes, seconds)


def _of_kernel(settings: cifar10test.Settings, data: str) -> Cost:
    settings = replace(settings, data=data)
    images, kernel = cifar10test.images_for(settings, None), cifar10test.kernel_of(settings)
    dtype = torch.float32 if settings.float else torch.float64
    count, x = len(images.train_y), images.train_x[:BLOCK].flatten(1)
    a_pair = _timed(kernel, [(x, x)] * (WARM + STEPS)) / len(x) ** 2
    square = torch.randn(BLOCK, BLOCK, dtype=dtype)
    a_product = _timed(torch.matmul, [(square, square)] * (WARM + STEPS)) / BLOCK**3
    # half of the pairs of training images, all pairs with those that are judged; n³/6 products
    pairs = count**2 / 2 + count * (len(images.test_y) + settings.held_out)
    seconds = pairs * a_pair + len(settings.regs) * count**3 / 6 * a_product
    return Cost(memory_needed(count, dtype, settings.method, len(settings.regs)), seconds)


def _of_meta(settings: Settings, data: str, seed: int) -> Cost:
    settings = replace(settings, folder=data, seed=seed)
    trainer = meta_train.Trainer(settings, torch.device("cpu"), quiet=True)
    seconds = _timed(trainer.step, trainer.batches)
    batches = settings.num_epochs * settings.num_batches
    return Cost(size_of(trainer.net)["bytes"], seconds * batches)
