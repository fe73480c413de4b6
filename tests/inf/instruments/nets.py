"""Small networks of every kind, and a step of training for each."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pilimit_lib.inf import InfMLP, InfPiConvNet, PiSGD

F64 = torch.float64


def small(kind: str, layernorm: bool = False, dtype: torch.dtype = F64) -> nn.Module:
    """A network of 5 features and 3 outputs whose readout is not zero any more; "convnet" and
    "finite convnet": of images [1 4 4]."""
    if "convnet" in kind:
        net = InfPiConvNet(1, 3, (4, 4), bias_alpha=0.5, layernorm=layernorm, dtype=dtype)
    else:
        memory = "moments" if "moments" in kind else "rows"
        net = InfMLP(
            5, 3, r=4, L=1, bias_alpha=0.5, memory=memory, layernorm=layernorm, dtype=dtype
        )
    x, y = data(kind, 6, dtype)
    train(net, x, y, steps=3)
    return net.sample(12) if kind.startswith("finite") else net


def data(kind: str, size: int = 6, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    shape = (1, 4, 4) if "convnet" in kind else (5,)
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, *shape, generator=generator, dtype=F64).to(dtype)
    return x, torch.randint(0, 3, (size,), generator=generator)


def train(net: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float = 0.5) -> None:
    optimizer = PiSGD(net.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
