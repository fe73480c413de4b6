"""Networks as their parts: what stands before the signal's projection, the blocks, and the output
layer."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn

NAMES = ("conv", "mlp", "vgg")


class Parts(NamedTuple):
    """`first` makes the input stream [b *shape] from images; `blocks` learn one by one; `output` is
    trained globally."""

    first: nn.Module
    shape: tuple[int, ...]
    blocks: list[nn.Module]
    output: nn.Module


def build(name: str, image: tuple[int, int, int], classes: int, width: int, depth: int) -> Parts:
    """Network `name` for images [channels height width]; `depth` counts the hidden layers of the
    MLP, the first included."""
    if name == "conv":
        return readme_conv(image, classes, width)
    if name == "mlp":
        return mlp(image, classes, width, depth)
    if name == "vgg":
        return vgg(image, classes, width)
    raise ValueError(f"unknown network {name!r}; there are {NAMES}")


def conv(inputs: int, outputs: int, stride: int = 1, pool: bool = False) -> nn.Sequential:
    layers = nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
    if pool:
        layers.append(nn.MaxPool2d(2))
    return layers


def readme_conv(image: tuple[int, int, int], classes: int, width: int) -> Parts:
    """The network of the quick start: one layer at full size, two with stride two."""
    channels, size, _ = image
    left = math.ceil(math.ceil(size / 2) / 2)
    output = nn.Sequential(nn.Flatten(), nn.Linear(4 * width * left**2, classes))
    return Parts(
        conv(channels, width),
        (width, size, size),
        [conv(width, 2 * width, 2), conv(2 * width, 4 * width, 2)],
        output,
    )


def mlp(image: tuple[int, int, int], classes: int, width: int, depth: int) -> Parts:
    """Linear layers with ReLU."""
    channels, height, breadth = image
    first = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * breadth, width), nn.ReLU())
    blocks = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth - 1)]
    return Parts(first, (width,), blocks, nn.Linear(width, classes))


def vgg(image: tuple[int, int, int], classes: int, width: int) -> Parts:
    """Four 3 x 3 convolutions, three of them pooled, channels width to 4 x width."""
    channels, size, _ = image
    blocks = [
        conv(width, 2 * width, pool=True),
        conv(2 * width, 4 * width, pool=True),
        conv(4 * width, 4 * width, pool=True),
    ]
    output = nn.Sequential(nn.Flatten(), nn.Linear(4 * width * (size // 8) ** 2, classes))
    return Parts(conv(channels, width), (width, size, size), blocks, output)
