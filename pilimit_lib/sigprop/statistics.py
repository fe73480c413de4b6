"""Running statistics of batch norms, measured anew once the weights stand still."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of every batch norm in `model` to the mean over `batches` of
    inputs, without learning.

    Where layers learn at a high rate, the averages that training leaves lag behind the layers
    before them: inference then normalises by statistics of a network that no longer exists. Call it
    before evaluating, with a few thousand training inputs. Each batch weighs the same.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    with _measuring(model, norms), torch.no_grad():
        seen = 0
        for x in batches:
            if not seen:
                for norm in norms:
                    norm.reset_running_stats()
            model(x)
            seen += 1
    if not seen:
        raise ValueError("recalibrate needs at least one batch of inputs, got none")


@contextmanager
def _measuring(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """Evaluation, but for the batch norms, which measure; afterwards each module as it was."""
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    model.eval()
    try:
        for norm in norms:
            norm.training, norm.momentum = True, None  # None: the mean over all batches
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
