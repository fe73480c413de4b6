"""One run: a network, a way to train it, a seed. Interrupted runs go on where they were, bit for
bit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from experiments.training.images import FLIPS, SHIFT, Batches, ImageSet
from experiments.training.process import seed_everything
from pilimit_lib import core, sigprop
from pilimit_lib.core import write_text

from .evaluation import accuracy, features, probe
from .networks import build

METHODS = ("sigprop", "backprop", "frozen")


@dataclass(frozen=True)
class Settings:
    """What a run depends on. `lr` serves the hidden layers, `output_lr` the output layer (with
    backprop, `lr` serves all); with `decay` every rate falls to zero along a cosine.

    `probe`: so many training images measure batch norms anew and train a ridge probe after every
    epoch; 0: neither.
    """

    dataset: str = "digits"
    network: str = "conv"
    width: int = 8
    depth: int = 4
    classes: int = 10
    loss: str = "v9"
    k: int = 6
    partners: str = "product"
    per_class: bool = False
    cosine: bool = False
    temperature: float = 1.0
    epochs: int = 8
    batch: int = 64
    lr: float = 1e-3
    output_lr: float = 1e-3
    norm: str = "batch"
    decay: bool = False
    augment: bool = False
    probe: int = 0
    train: int | None = None
    test: int | None = None


def loss_of(settings: Settings) -> sigprop.loss.Contrast:
    """The local loss that the settings name."""
    modes = {"v9": "max_all", "v14": "max_rand", "v15": "topk"}
    if settings.loss not in modes:
        raise ValueError(f"unknown loss {settings.loss!r}; there are {tuple(modes)}")
    mode = modes[settings.loss]
    return sigprop.loss.Contrast(
        mode,
        k=settings.k if mode == "topk" else None,
        by=settings.partners,
        cosine=settings.cosine,
        temperature=settings.temperature,
    )


def make(
    settings: Settings,
    method: str,
    image: tuple[int, int, int],
    monitors: sigprop.monitors.Group | None = None,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and global optimiser. All methods share the layers and, for one seed, their initial
    values."""
    first, shape, blocks, output = build(
        settings.network, image, settings.classes, settings.width, settings.depth, settings.norm
    )
    if method == "backprop":
        model = nn.Sequential(first, *blocks, output)
        return model, torch.optim.Adam(model.parameters(), settings.lr)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {METHODS}")
    signal = sigprop.signals.project_labels(
        settings.classes, shape, first, per_class=settings.per_class
    )
    watch = (
        {}
        if monitors is None
        else {"monitor": sigprop.monitors.loss.LabelMetrics, "monitors": monitors}
    )
    # Frozen layers are those same propagators without an optimiser: batch norms still measure, no
    # weight moves.
    builder = (
        (lambda m: torch.optim.Adam(m.parameters(), settings.lr))
        if method == "sigprop"
        else (lambda m: None)
    )
    model = sigprop.wrap(
        [*blocks, output], signal=signal, loss=loss_of(settings), optimizer=builder, **watch
    )
    return model, torch.optim.Adam(model.parameters(), settings.output_lr)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """One training step; the hidden layers of a sigprop model learn inside of the call."""
    out = model(x, y) if isinstance(model, sigprop.models.Model) else model(x)
    loss = F.cross_entropy(out, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def schedule(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list:
    """Every rate, local ones too, down to zero over `steps` along a cosine; step each of these
    after each training step."""

    def cosine(o: torch.optim.Optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(o, steps)

    schedules = [cosine(optimizer)]
    if isinstance(model, sigprop.models.Model):
        schedules.append(model.schedule(cosine))
    return schedules


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
