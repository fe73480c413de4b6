"""A short run on digits whose every step is recorded: what forgetting and attribution are measured
on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pilimit_lib.core import batch, load, save
from pilimit_lib.inf import InfMLP, PiSGD, clip_grad_norm_, param_groups
from pilimit_lib.inf.replay import Recorder, RunRecord

from ..training.images import Batches, load_images
from ..training.process import seed_everything


@dataclass(frozen=True)
class Run:
    """The network and its training; `flipped`: the part of the labels that are wrong."""

    samples: int = 200
    r: int = 16
    depth: int = 1
    memory: str = "rows"
    lr: float = 1.0
    gclip: float = 0.4
    batch_size: int = 10
    epochs: int = 5
    flipped: float = 0.0


@dataclass(frozen=True)
class Trained:
    """A run from its files: the network, how it was trained, and on what."""

    net: InfMLP
    record: RunRecord
    x: Tensor
    y: Tensor
    wrong: Tensor  # [n] whether a label was flipped
    checkpoints: list[InfMLP]  # after each epoch


def data_of(run: Run, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [n d], labels [n], and which of these are wrong [n]."""
    images = load_images("digits")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images.train_x), generator=generator)[: run.samples]
    x, y = images.train_x[chosen].flatten(1), images.train_y[chosen].clone()
    wrong = torch.zeros(run.samples, dtype=torch.bool)
    count = round(run.flipped * run.samples)
    wrong[torch.randperm(run.samples, generator=generator)[:count]] = True
    shift = torch.randint(1, images.classes, (count,), generator=generator)
    y[wrong] = (y[wrong] + shift) % images.classes
    return x, y, wrong


def trained(run: Run, seed: int, folder: Path) -> Trained:
    """Train, or read what was trained before in `folder`."""
    x, y, wrong = data_of(run, seed)
    if not (folder / "record.pt").exists():
        _train(run, seed, folder, x, y)
    networks = [
        InfMLP.from_state_dict(load(folder / f"model_epoch_{epoch}.th"))
        for epoch in range(1, run.epochs + 1)
    ]
    return Trained(networks[-1], RunRecord.load(folder / "record.pt"), x, y, wrong, networks)


def _train(run: Run, seed: int, folder: Path, x: Tensor, y: Tensor) -> None:
    seed_everything(seed)
    net = InfMLP(x.shape[1], 10, run.r, run.depth, 1.0, 0.5, 0.5, memory=run.memory)
    groups = param_groups(
        net, run.lr, first_layer_lr_mult=0.1, last_layer_lr_mult=4, bias_lr_mult=0.5
    )
    optimizer = PiSGD(groups, lr=run.lr)
    batches = Batches(x, y, run.batch_size, seed)
    folder.mkdir(parents=True, exist_ok=True)
    with Recorder(net, optimizer, run.gclip, per_param=True) as recorder:
        for epoch in range(1, run.epochs + 1):
            for ids, images, labels in batches:
                optimizer.zero_grad()
                with batch(ids):
                    out = net(images)
                F.cross_entropy(out, labels).backward()
                clip_grad_norm_(net, run.gclip, per_param=True)
                optimizer.step()
            save(net.state_dict(), folder / f"model_epoch_{epoch}.th")
    recorder.record.save(folder / "record.pt")
