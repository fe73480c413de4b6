"""What a network has learnt: its own accuracy, and what a linear reader makes of its last hidden
layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pilimit_lib import sigprop

# of the standardised features' Gram matrix, per sample
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, size: int = 500) -> float:
    """Share of right answers in evaluation."""
    model.eval()
    right = sum((model(a).argmax(1) == b).sum() for a, b in zip(x.split(size), y.split(size)))
    return float(right) / len(x)


@torch.no_grad()
def features(model: nn.Module, x: Tensor, size: int = 500) -> Tensor:
    """What the output layer gets, flattened [b features], in evaluation."""
    output = model.model[-1].module if isinstance(model, sigprop.models.Model) else model[-1]
    found: list[Tensor] = []
    handle = output.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(1)))
    model.eval()
    try:
        for part in x.split(size):
            model(part)
    finally:
        handle.remove()
    return torch.cat(found)


def probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int) -> float:
    """Test accuracy of a ridge regression from features [b features] to one-hot labels [b].

    The penalty is the one of PENALTIES that does best on the last fifth of the training rows; the
    regression is then fitted to all of them. Features are standardised by the training rows.
    """
    (x, y), (test_x, test_y) = train, test
    mean, deviation = x.mean(0), x.std(0) + 1e-5
    x, test_x = (x - mean) / deviation, (test_x - mean) / deviation
    fitted = len(x) * 4 // 5

    def right(penalty: float, rows: int, other_x: Tensor, other_y: Tensor) -> float:
        weights = ridge(x[:rows], y[:rows], classes, penalty)
        return float(((other_x @ weights).argmax(1) == other_y).float().mean())

    best = max(PENALTIES, key=lambda penalty: right(penalty, fitted, x[fitted:], y[fitted:]))
    return right(best, len(x), test_x, test_y)


def ridge(x: Tensor, y: Tensor, classes: int, penalty: float) -> Tensor:
    """Weights [features classes] of the least squares with `penalty` per row on their norm."""
    target = F.one_hot(y, classes).to(x.dtype)
    target = target - target.mean(0)
    gram = x.T @ x + penalty * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(gram, x.T @ target)
