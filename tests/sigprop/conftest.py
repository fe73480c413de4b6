"""Small networks and data that the tests share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pilimit_lib import sigprop


@pytest.fixture
def data():
    """24 samples of 12 numbers, 3 classes."""
    g = torch.Generator().manual_seed(3)
    return torch.randn(24, 12, generator=g), torch.randint(3, (24,), generator=g)


@pytest.fixture
def make():
    """Builder of a wrapped MLP 12-8-8-8-3."""

    def build(
        per_class=False,
        norm=False,
        lr=0.1,
        optimizer=None,
        loss=sigprop.loss.v9_input_target_max_all,
        signal=None,
        depth=3,
        dtype=torch.float32,
        **options,
    ):
        def block(width):
            layers = nn.Sequential(nn.Linear(width, 8))
            if norm:
                layers.append(nn.BatchNorm1d(8))
            return layers.append(nn.ReLU())

        layers = nn.Sequential(*[block(8) for _ in range(depth - 1)], nn.Linear(8, 3))
        if signal is None:
            signal = sigprop.signals.project_labels(3, (8,), block(12), per_class=per_class)
        builder = optimizer or (lambda m: torch.optim.SGD(m.parameters(), lr))
        return sigprop.wrap(
            layers.to(dtype), signal=signal.to(dtype), loss=loss, optimizer=builder, **options
        )

    return build
