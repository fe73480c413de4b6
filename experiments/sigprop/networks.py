"""Networks as their parts: what stands before the signal's projection, the blocks, and the output
layer."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn

NAMES = ("conv", "mlp", "vgg", "strided")
NORMS = ("batch", "instance")


class Parts(NamedTuple):
    """`first` makes the input stream [b *shape] from images; `blocks` learn one by one; `output` is
    trained globally."""

    first: nn.Module
    shape: tuple[int, ...]
    blocks: list[nn.Module]
    output: nn.Module


def build(
    name: str,
    image: tuple[int, int, int],
    classes: int,
    width: int,
    depth: int,
    norm: str = "batch",
) -> Parts:
    """Network `name` for images [channels height width]; `depth` counts the hidden layers of the
    MLP, the first included; `norm` is that of the convolutions."""
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; there are {NORMS}")
    if name == "conv":
        return readme_conv(image, classes, width, norm)
    if name == "mlp":
        return mlp(image, classes, width, depth)
    if name == "vgg":
        return vgg(image, classes, width, norm)
    if name == "strided":
        return strided(image, classes, width, norm)
    raise ValueError(f"unknown network {name!r}; there are {NAMES}")


def conv(
    inputs: int, outputs: int, stride: int = 1, pool: bool = False, norm: str = "batch"
) -> nn.Sequential:
    layers = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False))
    if norm == "batch":
        layers.append(nn.BatchNorm2d(outputs))
    else:
        layers.append(nn.InstanceNorm2d(outputs, affine=True))
    layers.append(nn.ReLU())
    if pool:
        layers.append(nn.MaxPool2d(2))
    return layers


def readme_conv(image: tuple[int, int, int], classes: int, width: int, norm: str) -> Parts:
    """The network of the quick start: one layer at full size, two with stride two."""
    channels, size, _ = image
    left = math.ceil(math.ceil(size / 2) / 2)
    output = nn.Sequential(nn.Flatten(), nn.Linear(4 * width * left**2, classes))
    first = conv(channels, width, norm=norm)
    blocks = [conv(width, 2 * width, 2, norm=norm), conv(2 * width, 4 * width, 2, norm=norm)]
    return Parts(first, (width, size, size), blocks, output)


def strided(image: tuple[int, int, int], classes: int, width: int, norm: str) -> Parts:
    """As the quick start's, but its first layer has stride two as well: a fifth of the work."""
    channels, size, _ = image
    half = math.ceil(size / 2)
    _, _, blocks, output = readme_conv((channels, half, half), classes, width, norm)
    return Parts(conv(channels, width, 2, norm=norm), (width, half, half), blocks, output)


def mlp(image: tuple[int, int, int], classes: int, width: int, depth: int) -> Parts:
    """Linear layers with ReLU."""
    channels, height, breadth = image
    first = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * breadth, width), nn.ReLU())
    blocks = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth - 1)]
    return Parts(first, (width,), blocks, nn.Linear(width, classes))


def vgg(image: tuple[int, int, int], classes: int, width: int, norm: str) -> Parts:
    """Four 3 x 3 convolutions, three of them pooled, channels width to 4 x width."""
    channels, size, _ = image
    blocks = [
        conv(width, 2 * width, pool=True, norm=norm),
        conv(2 * width, 4 * width, pool=True, norm=norm),
        conv(4 * width, 4 * width, pool=True, norm=norm),
    ]
    output = nn.Sequential(nn.Flatten(), nn.Linear(4 * width * (size // 8) ** 2, classes))
    return Parts(conv(channels, width, norm=norm), (width, size, size), blocks, output)
