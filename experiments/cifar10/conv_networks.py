"""The networks of `cifar10conv`: infinite, the finite twin sampled from it, and ordinary ReLU
networks of the same shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pilimit_lib.inf import DegreeRates, InfPiConvNet, whiten_
from pilimit_lib.inf.conv.geometry import Geometry
from pilimit_lib.inf.conv.plan import Plan
from pilimit_lib.inf.conv.whitening import patch_moments, whitening

from ..training.distributed import ALONE, Ranks
from ..training.flags import milestones
from ..training.images import ImageSet
from .conv_settings import Settings

WHITENED = 1000  # training images whose patches the input layer whitens, the first ones
BASE_WIDTH = 16  # at this many channels the learning rates of a μ-network are those given


class ReLUConvNet(nn.Module):
    """An ordinary ConvNet of the shape of an `InfPiConvNet`: its layers, kernels, strides, pools
    and shortcuts, with `width` channels everywhere.

    `kind` "batchnorm" normalises every convolution's outputs over the batch; "plain" does not, and
    is the same otherwise; "mup" has the initialisation and the learning rates of the maximal update
    parametrisation instead (Yang & Hu 2021; Yang et al. 2022, table 3), see `groups`.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        width: int,
        plan: Plan,
        kind: str,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        self.kind, self.width, self.pools = kind, width, plan.pools
        self.sources = {end: begin for begin, end in plan.shortcuts}
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for number, stride in enumerate((plan.input_stride, *plan.strides)):
            self.convs.append(
                nn.Conv2d(
                    width if number else channels,
                    width,
                    plan.kernels[number],
                    stride,
                    plan.padding(number),
                    padding_mode=padding_mode,
                    bias=False,
                )
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
    plan = settings.plan
    if settings.network in ("mup", "batchnorm", "plain"):
        net = ReLUConvNet(
            channels,
            data.classes,
            settings.width,
            plan,
            settings.network,
            settings.padding_mode,
        )
        if settings.whiten:
            whiten_channels_(net.convs[0], data.train_x[:WHITENED])
        return net.to(memory_format=torch.channels_last) if settings.channels_last else net
    net = InfPiConvNet(
        channels,
        data.classes,
        plan.ranks,
        pools=plan.pools,
        strides=plan.strides,
        kernels=plan.kernels,
        input_stride=plan.input_stride,
        padding_mode=settings.padding_mode,
        shortcuts=plan.shortcuts,
        start_degree=settings.start_degree,
        norm=None if settings.norm == "none" else settings.norm,
        noise_width=settings.noise_width,
        branch_gain=settings.branch_gain,
        degree=settings.degree,
        fit=settings.fit,
        activation=settings.activation,
        layernorm=settings.layernorm,
        first_layer_alpha=settings.first_layer_alpha,
        last_layer_alpha=settings.last_layer_alpha,
        bias_alpha=settings.bias_alpha,
    )
    if settings.whiten:
        whiten_(net.layers[0], data.train_x[:WHITENED])
    return net if settings.network == "infinite" else net.sample(settings.width)


@torch.no_grad()
def whiten_channels_(conv: nn.Conv2d, images: Tensor) -> None:
    """Let the channels of a finite input layer see whitened patches by the weights that it had for
    patches: what a wide network sampled from a whitened infinite one starts as."""
    geometry = Geometry(conv.kernel_size, conv.stride)
    matrix, _ = whitening(patch_moments(images, geometry)[0])
    weight = conv.weight.flatten(1) @ matrix.to(conv.weight)
    conv.weight.copy_(weight.view_as(conv.weight))


def groups(net: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    if isinstance(net, ReLUConvNet):
        return net.groups(settings.lr, settings.wd, settings.optimizer)
    return [{"params": list(net.parameters()), "lr": settings.lr, "weight_decay": settings.wd}]


def optimizer_of(settings: Settings, net: nn.Module) -> torch.optim.Optimizer:
    parts = groups(net, settings)
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(parts, settings.lr, momentum=settings.momentum)
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
        optimizer = kind(parts, settings.lr, tuple(settings.beta_list), fused=True)
    if settings.high_degree_lr != 1 and isinstance(net, InfPiConvNet):
        DegreeRates(net, optimizer, settings.high_degree_lr)
    return optimizer


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
    if settings.scheduler == "multistep":
        an_epoch = steps // settings.epochs
        drops = [epoch * an_epoch for epoch in milestones(settings.lr_drop_milestones)]
        return schedulers.MultiStepLR(optimizer, drops, settings.lr_drop_ratio)
    return None


@torch.no_grad()
def megaflops(net: nn.Module, x: Tensor) -> float:
    """Million floating-point operations that products of matrices and convolutions take for the
    forward pass of one of the images `x`; a training step takes about three times as many."""
    training = net.training
    net.eval()
    with FlopCounterMode(display=False) as counter:
        net(x[:1])
    net.train(training)
    return counter.get_total_flops() / 1e6


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
