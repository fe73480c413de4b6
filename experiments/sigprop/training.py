"""One run: a network, a way to train it, a seed. Interrupted runs go on where they were, bit for
bit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from pilimit_lib import core, sigprop
from pilimit_lib.core import write_text

from ..training.choices import FLIPS, SHIFT
from ..training.images import Batches, ImageSet
from ..training.process import seed_everything
from .evaluation import accuracy, features, probe
from .methods import Settings, make, schedule, step


def examine(model: nn.Module, images: ImageSet, probed: int) -> dict[str, float]:
    """Test accuracy as trained; with `probed` training images also that with batch norms measured
    anew on them, and that of a ridge probe."""
    found = {"accuracy": accuracy(model, images.test_x, images.test_y)}
    if probed:
        x, y = images.train_x[:probed], images.train_y[:probed]
        sigprop.recalibrate(model, x.split(500))
        found["recalibrated"] = accuracy(model, images.test_x, images.test_y)
        test = features(model, images.test_x), images.test_y
        found["probe"] = probe((features(model, x), y), test, images.classes)
    return found


class Progress:
    """Model, optimiser, schedules and the order of batches of one run, with the records so far:
    what its checkpoint holds."""

    def __init__(self, settings: Settings, method: str, seed: int, images: ImageSet, monitors):
        self.settings = settings
        with images.train_x.device:
            self.model, self.optimizer = make(
                settings, method, tuple(images.train_x.shape[1:]), monitors
            )
        augmented = {}
        if settings.augment:
            augmented = {"shift": SHIFT[images.name], "flips": FLIPS[images.name]}
        self.order = Batches(images.train_x, images.train_y, settings.batch, seed, **augmented)
        self.schedules = []
        if settings.decay:
            # a short last batch is left out
            steps = settings.epochs * (len(images.train_x) // settings.batch)
            self.schedules = schedule(self.model, self.optimizer, steps)
        self.records: list[dict] = []

    @property
    def local(self) -> bool:
        return isinstance(self.model, sigprop.models.Model)

    def save(self, path: Path) -> None:
        core.save(
            core.snapshot(
                self.model,
                self.optimizer,
                settings=asdict(self.settings),
                records=self.records,
                local=self.model.optimizer_state_dict() if self.local else {},
                schedule=self.schedules[0].state_dict() if self.schedules else {},
                order=self.order.state(),
                rng=core.rng_state(),
            ),
            path,
        )

    def load(self, path: Path) -> None:
        extras = core.restore(self.model, core.load(path), self.optimizer)
        if extras["settings"] != asdict(self.settings):
            raise ValueError(f"{path} belongs to a run with other settings; choose another --out")
        self.records = extras["records"]
        if self.local:
            self.model.load_optimizer_state_dict(extras["local"])
        if self.schedules:
            self.schedules[0].load_state_dict(extras["schedule"])
        self.order.load_state(extras["order"])
        core.set_rng_state(extras["rng"])


def run(
    settings: Settings,
    method: str,
    seed: int,
    images: ImageSet,
    folder: Path,
    watch: bool = False,
    show: Callable[[str], None] = tqdm.write,
) -> list[dict]:
    """Train and test after every epoch; returns one record per epoch, also written to `folder` with
    a checkpoint."""
    if settings.batch > len(images.train_x):
        raise ValueError(f"{len(images.train_x)} images do not fill a batch of {settings.batch}")
    seed_everything(seed)
    monitors = sigprop.monitors.Group() if watch and method == "sigprop" else None
    progress = Progress(settings, method, seed, images, monitors)
    name = f"{method}-{seed}"
    if (folder / f"{name}.pt").exists():
        progress.load(folder / f"{name}.pt")
    model, order = progress.model, progress.order
    for epoch in range(len(progress.records), settings.epochs):
        model.train()
        if monitors is not None:
            monitors.reset()
        started, losses = time.perf_counter(), []
        for _, x, y in tqdm(order, total=len(order), desc=f"{name}.{epoch}", leave=False):
            # a short last batch may lack the k partners that a loss wants
            if len(x) == settings.batch:
                losses.append(step(model, progress.optimizer, x, y))
                for one in progress.schedules:
                    one.step()
        record = {
            "method": method,
            "seed": seed,
            "epoch": epoch + 1,
            "loss": float(torch.stack(losses).mean()),
            "seconds": time.perf_counter() - started,
            **examine(model, images, settings.probe),
        }
        if monitors is not None:
            show(monitors.metrics())
            for layer, numbers in monitors.as_dict().items():
                record[f"{layer} loss"] = numbers["loss"]
                record[f"{layer} accuracy"] = numbers["accuracy"]
        progress.records.append(record)
        progress.save(folder / f"{name}.pt")
        write_text(folder / f"{name}.csv", pd.DataFrame(progress.records).to_csv(index=False))
    return progress.records
