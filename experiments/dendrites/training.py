"""An epoch and an accuracy: the plain training that all image experiments here share."""

import torch
from torch import Tensor, nn


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, batch: int = 64
) -> None:
    """One pass over the data in random order with the cross-entropy loss."""
    model.train()
    for part in torch.randperm(len(x)).split(batch):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 1000) -> float:
    """Share of right answers in per cent."""
    model.eval()
    with torch.no_grad():
        return (
            100
            * sum(
                (model(a).argmax(1) == b).sum().item()
                for a, b in zip(x.split(batch), y.split(batch))
            )
            / len(x)
        )
