"""The networks of `cifar10conv`: infinite, the finite twin sampled from it, and ordinary ReLU
networks of the same shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.cifar10.conv_settings import Settings
from experiments.training.distributed import ALONE, Ranks
from experiments.training.images import ImageSet
from pilimit_lib.inf import InfPiConvNet

BASE_WIDTH = 16  # at this many channels the learning rates of a μ-network are those given


class ReLUConvNet(nn.Module):
    """An ordinary ConvNet of the shape of an `InfPiConvNet`: as many layers, pools and shortcuts,
    `width` channels everywhere.

    `kind` "batchnorm" normalises every convolution's outputs over the batch; "mup" has the
    initialisation and the learning rates of the maximal update parametrisation instead (Yang & Hu
    2021; Yang et al. 2022, table 3), see `groups`.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        width: int,
        pools: Sequence[int],
        shortcuts: Sequence[tuple[int, int]],
        kind: str,
    ) -> None:
        super().__init__()
        self.kind, self.width, self.pools = kind, width, tuple(pools)
        self.sources = {end: begin for begin, end in shortcuts}
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for number in range(len(pools) + 1):
            self.convs.append(
                nn.Conv2d(width if number else channels, width, 3, padding=1, bias=False)
            )
            nn.init.normal_(
                self.convs[-1].weight,
                std=((2 if number else 1) / self.convs[-1].weight[0].numel()) ** 0.5,
            )
            self.norms.append(nn.BatchNorm2d(width) if kind == "batchnorm" else nn.Identity())
        self.readout = nn.Linear(width, classes)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def forward(self, x: Tensor) -> Tensor:
        h, kept = self.norms[0](self.convs[0](x)), {}
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            if number:
                a = torch.relu(h)
                h = norm(
                    conv(
                        F.avg_pool2d(a, self.pools[number - 1]) if self.pools[number - 1] > 1 else a
                    )
                )
                if number in self.sources:
                    h = h + kept[self.sources[number]]
            kept[number] = h
        return self.readout(torch.relu(h).mean((2, 3)))

    def groups(self, lr: float, wd: float, optimizer: str) -> list[dict[str, Any]]:
        """Parameter groups with their learning rates. With "mup" the input layer's is ∝ width, 1
        for SGD, Adam; the hidden ones' ∝ 1, 1/width; the readout's ∝ 1/width, 1/width, but for its
        bias."""
        ratio = self.width / BASE_WIDTH if self.kind == "mup" else 1.0
        sgd = optimizer == "sgd"
        parts = [
            (self.convs[0].parameters(), ratio if sgd else 1.0),
            (self.convs[1:].parameters(), 1.0 if sgd else 1 / ratio),
            ([self.readout.weight], 1 / ratio),
            ([self.readout.bias, *self.norms.parameters()], 1.0),
        ]
        return [
            {"params": list(params), "lr": lr * factor, "weight_decay": wd}
            for params, factor in parts
        ]


def build(settings: Settings, data: ImageSet) -> nn.Module:
    """The network that the settings describe, freshly initialised from torch's generator."""
    channels = data.train_x.shape[1]
    if settings.network in ("mup", "batchnorm"):
        return ReLUConvNet(
            channels,
            data.classes,
            settings.width,
            settings.pool_list,
            settings.shortcut_list,
            settings.network,
        )
    net = InfPiConvNet(
        channels,
        data.classes,
        settings.rank_list,
        pools=settings.pool_list,
        shortcuts=settings.shortcut_list,
        branch_gain=settings.branch_gain,
        degree=settings.degree,
        fit=settings.fit,
        activation=settings.activation,
        layernorm=settings.layernorm,
        first_layer_alpha=settings.first_layer_alpha,
        last_layer_alpha=settings.last_layer_alpha,
        bias_alpha=settings.bias_alpha,
    )
    return net if settings.network == "infinite" else net.sample(settings.width)


def groups(net: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    if isinstance(net, ReLUConvNet):
        return net.groups(settings.lr, settings.wd, settings.optimizer)
    return [{"params": list(net.parameters()), "lr": settings.lr, "weight_decay": settings.wd}]


def optimizer_of(settings: Settings, net: nn.Module) -> torch.optim.Optimizer:
    parts = groups(net, settings)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parts, settings.lr, momentum=settings.momentum)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    return kind(parts, settings.lr, fused=True)


def scheduler_of(
    settings: Settings, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Schedules advance with every step, of which there are `steps`."""
    schedulers = torch.optim.lr_scheduler
    if settings.scheduler == "onecycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        # Momentum stays as it is: cycling it would make a different SGD of every step.
        return schedulers.OneCycleLR(optimizer, rates, total_steps=steps, cycle_momentum=False)
    if settings.scheduler == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, steps)
    return None


@torch.no_grad()
def evaluate(
    net: nn.Module, x: Tensor, y: Tensor, size: int, ranks: Ranks = ALONE
) -> tuple[float, float]:
    """(mean cross entropy, accuracy as a fraction) over all images, shared out over the
    processes."""
    training = net.training
    net.eval()
    output = ranks.mapped(net, list(x.split(size)))
    net.train(training)
    return F.cross_entropy(output, y).item(), (output.argmax(1) == y).float().mean().item()


def cutout(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Each image [b c h w] with a square of `size` pixels around a random place set to 0, the
    mean."""
    b, _, h, w = x.shape

    def covered(length: int) -> Tensor:
        """Which places along a side lie in the square: [b length]."""
        middle = torch.randint(0, length, (b, 1), generator=generator).to(x.device)
        begin = middle - size // 2
        place = torch.arange(length, device=x.device)
        return (place >= begin) & (place < begin + size)

    rows, columns = covered(h), covered(w)
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
