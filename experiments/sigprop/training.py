"""One run: a network, a way to train it, a seed. Interrupted runs go on where they were, bit for
bit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from experiments.training.images import Batches, ImageSet
from experiments.training.process import seed_everything
from pilimit_lib import core, sigprop
from pilimit_lib.core import write_text

from .networks import build

METHODS = ("sigprop", "backprop", "frozen")


@dataclass(frozen=True)
class Settings:
    """What a run depends on. `lr` serves the hidden layers, `output_lr` the output layer (with
    backprop, `lr` serves all)."""

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
        settings.network, image, settings.classes, settings.width, settings.depth
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


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, size: int = 500) -> float:
    """Share of right answers in evaluation."""
    model.eval()
    right = sum((model(a).argmax(1) == b).sum() for a, b in zip(x.split(size), y.split(size)))
    return float(right) / len(x)


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
    model, optimizer = make(settings, method, tuple(images.train_x.shape[1:]), monitors)
    order = Batches(images.train_x, images.train_y, settings.batch, seed)
    checkpoint = folder / f"{method}-{seed}.pt"
    records, done = [], 0
    if checkpoint.exists():
        extras = core.restore(model, core.load(checkpoint), optimizer)
        if extras["settings"] != asdict(settings):
            raise ValueError(
                f"{checkpoint} belongs to a run with other settings; choose another --out"
            )
        records, done = extras["records"], len(extras["records"])
        if isinstance(model, sigprop.models.Model):
            model.load_optimizer_state_dict(extras["local"])
        order.load_state(extras["order"])
        core.set_rng_state(extras["rng"])
    for epoch in range(done, settings.epochs):
        model.train()
        if monitors is not None:
            monitors.reset()
        started, losses = time.perf_counter(), []
        for _, x, y in tqdm(order, total=len(order), desc=f"{method} {seed}.{epoch}", leave=False):
            # a short last batch may lack the k partners that a loss wants
            if len(x) == settings.batch:
                losses.append(step(model, optimizer, x, y))
        seconds = time.perf_counter() - started
        record = {
            "method": method,
            "seed": seed,
            "epoch": epoch + 1,
            "loss": float(torch.stack(losses).mean()),
            "accuracy": accuracy(model, images.test_x, images.test_y),
            "seconds": seconds,
        }
        if monitors is not None:
            show(monitors.metrics())
            record["layers"] = monitors.as_dict()
        records.append(record)
        local = model.optimizer_state_dict() if isinstance(model, sigprop.models.Model) else {}
        core.save(
            core.snapshot(
                model,
                optimizer,
                settings=asdict(settings),
                records=records,
                local=local,
                order=order.state(),
                rng=core.rng_state(),
            ),
            checkpoint,
        )
        write_text(
            folder / f"{method}-{seed}.jsonl", "".join(json.dumps(r) + "\n" for r in records)
        )
    return records
