"""Small networks and hands for the tests of dendrites."""

import torch
from torch import nn

from pilimit_lib.dendrites import dendritic_layers


def grow_all(model, seed=0, times=1, loud=True):
    """Grow every layer; with ``loud`` give all new weights values that matter, so that mistakes
    show."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(times):
        for _, layer in dendritic_layers(model):
            dendrite = layer.grow(generator)
            if loud:
                with torch.no_grad():
                    for parameter in dendrite.parameters():
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def mlp(seed=0, sizes=(5, 7, 3)):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.ReLU(), nn.Linear(sizes[1], sizes[2]))


class ConvNet(nn.Module):
    """A conv net with batch norm in blocks, for images of any size."""

    def __init__(self, block=nn.Sequential, width=4, classes=3):
        super().__init__()
        self.block1 = (
            block(*self._pair(1, width)) if block is nn.Sequential else block(self._pair(1, width))
        )
        self.block2 = (
            block(*self._pair(width, width))
            if block is nn.Sequential
            else block(self._pair(width, width))
        )
        self.fc = nn.Linear(width, classes)

    @staticmethod
    def _pair(a, b):
        return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b)]

    def forward(self, x):
        x = torch.relu(self.block2(torch.relu(self.block1(x))))
        return self.fc(x.mean((2, 3)))
