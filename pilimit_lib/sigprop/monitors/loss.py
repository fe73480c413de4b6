"""Monitors around a loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..functional.contrast import labels_of, similarity
from ..loss.base import class_rows


class LabelMetrics(nn.Module):
    """A loss that also counts: its mean, and how often a layer's activations resemble a target of
    the right class most.

    Called like the loss that it wraps, whose value it returns as it is. `loss_sum` and `acc_sum`
    add up over samples, `loss_last` and `acc_last` are of the last batch, `count` is the samples so
    far.
    """

    def __init__(self, name: str, loss: Callable):
        super().__init__()
        self.name, self.loss = name, loss
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.count = 0
        self.loss_sum = self.acc_sum = self.loss_last = self.acc_last = torch.zeros(())

    def check(self, sp_learn, rows: int, context: Tensor) -> None:
        """What the loss itself refuses."""
        check = getattr(self.loss, "check", None)
        if check is not None:
            check(sp_learn, rows, context)

    def forward(self, sp_learn, h1, t1, h0, t0, y):
        loss = self.loss(sp_learn, h1, t1, h0, t0, y)
        with torch.no_grad():
            labels = labels_of(y, len(h1))
            best = similarity(h1, t1).argmax(1)
            found = best if class_rows(sp_learn, h1, t1) else labels[best]
            self.loss_last, self.acc_last = loss.detach(), (found == labels).float().mean()
            # Kept as tensors: reading a number would make the device wait in every layer.
            self.loss_sum = self.loss_sum.to(loss.device) + self.loss_last * len(h1)
            self.acc_sum = self.acc_sum.to(loss.device) + self.acc_last * len(h1)
            self.count += len(h1)
        return loss

    def as_dict(self) -> dict[str, float]:
        """Means since the last reset, the last batch, and the number of samples."""
        samples = max(self.count, 1)
        return {
            "loss": float(self.loss_sum) / samples,
            "accuracy": float(self.acc_sum) / samples,
            "loss_last": float(self.loss_last),
            "accuracy_last": float(self.acc_last),
            "count": self.count,
        }

    def metrics(self) -> str:
        """One line for the terminal."""
        m = self.as_dict()
        return (
            f"{self.name}: loss {m['loss']:.4f} (last {m['loss_last']:.4f}), "
            f"accuracy {m['accuracy']:.4f} (last {m['accuracy_last']:.4f})"
        )
