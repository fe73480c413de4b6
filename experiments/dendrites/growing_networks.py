"""Networks that can grow in two ways at the same place: dendrites beside hidden units, or more of
these units. Both leave the function as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pilimit_lib.dendrites import PAISequential


class Kind(NamedTuple):
    """``network(hidden)``; ``widened(net, more)``: the same function with more hidden units;
    ``grows``: the names of the layers that get dendrites, whose units have ``neurons(hidden)``
    outputs in all."""

    network: Callable[[int], nn.Module]
    widened: Callable[[nn.Module, int], nn.Module]
    grows: tuple[str, ...]
    neurons: Callable[[int], int]


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def unit_cost(kind: Kind) -> int:
    """Parameters of one hidden unit."""
    return parameters(kind.network(2)) - parameters(kind.network(1))


def size_of_a_generation(kind: Kind, hidden: int) -> int:
    """Hidden units that have as many parameters as the first dendrites of all growing layers."""
    modules = dict(kind.network(hidden).named_modules())
    bodies = sum(parameters(modules[name]) for name in kind.grows)
    return max(1, round((bodies + kind.neurons(hidden)) / unit_cost(kind)))


def units_for(kind: Kind, count: int) -> int:
    """Hidden units of the network whose parameters are nearest to ``count``."""
    return max(1, round((count - parameters(kind.network(1))) / unit_cost(kind)) + 1)


def mlp(inputs: int) -> Kind:
    """inputs - hidden - 10 with ReLU; both layers may grow."""

    def network(hidden: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        )

    def widened(net: nn.Sequential, more: int) -> nn.Sequential:
        new = network(net[1].out_features + more)
        with torch.no_grad():
            more_outputs(new[1], net[1])
            more_inputs(new[3], net[3])
        return new

    return Kind(network, widened, ("1", "3"), lambda hidden: hidden + 10)


class Block(nn.Module):
    """A residual block; ``inner``: channels between its two convolutions."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int = 1):
        super().__init__()
        self.first = conv(inputs, inner, stride)
        self.second = conv(inner, outputs)
        plain = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if plain else conv(inputs, outputs, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


def conv(inputs: int, outputs: int, stride: int = 1, size: int = 3) -> PAISequential:
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return PAISequential([layer, nn.BatchNorm2d(outputs)])


class ResNet(nn.Module):
    """Three residual blocks on images of one channel; ``hidden``: inner channels of the last."""

    def __init__(self, hidden: int):
        super().__init__()
        self.stem = conv(1, 8, 2)
        self.block1 = Block(8, 8, 8)
        self.block2 = Block(8, 16, 16, 2)
        self.block3 = Block(16, hidden, 16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(torch.relu(self.stem(x)))))
        return self.fc(x.mean((2, 3)))


def widened_resnet(net: ResNet, more: int) -> ResNet:
    hidden = net.block3.first[0].out_channels
    new = ResNet(hidden + more)
    for (name, child), old in zip(new.named_children(), net.children()):
        if name != "block3":
            child.load_state_dict(old.state_dict())
    with torch.no_grad():
        more_outputs(new.block3.first[0], net.block3.first[0])
        for key, value in net.block3.first[1].state_dict().items():
            target = new.block3.first[1].state_dict()[key]
            (target[:hidden] if value.dim() else target).copy_(value)
        more_inputs(new.block3.second[0], net.block3.second[0])
        new.block3.second[1].load_state_dict(net.block3.second[1].state_dict())
    return new


def resnet() -> Kind:
    """The ResNet above; the last block, before the last layer, may grow."""
    grows = ("block3.first", "block3.second")
    return Kind(ResNet, widened_resnet, grows, lambda hidden: hidden + 16)


def more_outputs(new: nn.Module, old: nn.Module) -> None:
    """Further units as they are drawn."""
    new.weight[: len(old.weight)] = old.weight
    if old.bias is not None:
        new.bias[: len(old.bias)] = old.bias


def more_inputs(new: nn.Module, old: nn.Module) -> None:
    """Nothing comes from further units at first."""
    new.weight.zero_()
    new.weight[:, : old.weight.shape[1]] = old.weight
    if old.bias is not None:
        new.bias.copy_(old.bias)
