"""Ways to train one network: by signal propagation, by backprop, or its output layer alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pilimit_lib import sigprop

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
        return model, torch.optim.Adam(model.parameters(), settings.lr, fused=True)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {METHODS}")
    signal = sigprop.signals.project_labels(
        settings.classes, shape, first, per_class=settings.per_class
    )
    watch = {}
    if monitors is not None:
        watch = {"monitor": sigprop.monitors.loss.LabelMetrics, "monitors": monitors}

    def builder(module: nn.Module) -> torch.optim.Optimizer | None:
        # Frozen layers are those same propagators without an optimiser: batch norms still measure,
        # no weight moves.
        if method == "frozen":
            return None
        return torch.optim.Adam(module.parameters(), settings.lr, fused=True)

    model = sigprop.wrap(
        [*blocks, output], signal=signal, loss=loss_of(settings), optimizer=builder, **watch
    )
    return model, torch.optim.Adam(model.parameters(), settings.output_lr, fused=True)


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
