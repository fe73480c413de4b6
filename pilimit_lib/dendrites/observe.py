"""Looking at the errors that reach layers, while nothing in the network changes."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .layers.layer import DendriticLayer


class Watcher(Protocol):
    """Sits in a layer's forward pass. ``seen``: for each pass whose error is still to come, the
    probe, zero, that was added to the output, and what `take` needs to know of the pass."""

    seen: list[tuple[Tensor, Any]]

    def __call__(self, y: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """The layer's output y with a probe added."""

    def take(self, known: Any, error: Tensor) -> None:
        """Receive the error at the output of a pass."""


def observe(
    model: nn.Module,
    layers: Mapping[str, DendriticLayer],
    watchers: Mapping[str, Watcher],
    losses: Callable[[nn.Module], Iterable[Tensor]],
) -> None:
    """Let each watcher see the inputs, outputs and errors of its layer for every loss, in
    evaluation: batch norm and dropout must not move or blur what is seen."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for name, watcher in watchers.items():
            layers[name].observer = watcher
        with torch.enable_grad():
            for value in losses(model):
                passes = [(w, *entry) for w in watchers.values() for entry in w.seen]
                if not passes:
                    raise RuntimeError("the loss ran no dendritic layer of this model")
                errors = torch.autograd.grad(value, [p[1] for p in passes], allow_unused=True)
                for watcher in watchers.values():
                    watcher.seen = []
                for (watcher, probe, known), error in zip(passes, errors):
                    if error is None:  # another loss may depend on it
                        watcher.seen.append((probe, known))
                    else:
                        watcher.take(known, error)
    finally:
        for name in watchers:
            layers[name].observer = None
            layers[name].clear_processors()
        for module, training in was_training.items():
            module.training = training
