"""Taking away dendrites that do nothing."""

from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from pilimit_lib.core import Axis, Change, follow

from .conversion import dendritic_layers
from .layers.dendrite import removing
from .layers.layer import DendriticLayer


@dataclass(frozen=True)
class Pruned:
    """What went: (layer, number of the dendrite as it was, from 0), the parameters saved, and the
    change for further optimisers."""

    removed: tuple[tuple[str, int], ...]
    parameters: int
    change: Change


def prune(model, threshold: float = 1e-3, optimizer: Optimizer | None = None) -> Pruned:
    """Remove every dendrite whose weights w, and whose v into later dendrites that stay, are
    nowhere above ``threshold``.

    The output moves by at most threshold · max|a| for each dendrite removed, and not at all at
    threshold 0. The optimiser follows.
    """
    if threshold < 0:
        raise ValueError(f"threshold got {threshold}; give a number ≥ 0")
    layers = list(dendritic_layers(model))
    learning = [name for name, layer in layers if any(d.candidate for d in layer.dendrites)]
    if learning:
        raise RuntimeError(
            f"candidates are being trained in {learning}; prune after the correlation phase"
        )
    before = sum(p.numel() for p in model.parameters())
    change, removed = Change(), []
    for name, layer in layers:
        for k in _negligible(layer, threshold):
            change += _remove(layer, k)
            removed.append((name, k))
    if optimizer is not None:
        follow(optimizer, change)
    return Pruned(tuple(removed), before - sum(p.numel() for p in model.parameters()), change)


def _negligible(layer: DendriticLayer, threshold: float) -> list[int]:
    """Numbers of the dendrites that do nothing, the last first: a dendrite may count only for later
    ones that do nothing themselves."""
    found: list[int] = []
    for k in reversed(range(len(layer.dendrites))):
        reached = [layer.dendrites[k].w]
        reached += [
            layer.dendrites[l].v[k] for l in range(k + 1, len(layer.dendrites)) if l not in found
        ]
        if all(weights.detach().abs().max() <= threshold for weights in reached):
            found.append(k)
    return found


def _remove(layer: DendriticLayer, k: int) -> Change:
    change = removing(layer.dendrites[k])
    del layer.dendrites[k]
    for later in layer.dendrites[k:]:
        rows = later.v.shape[0]
        if rows == 1:
            change += Change.removing(later.v)
            later.v = None
        else:
            keep = torch.tensor([j for j in range(rows) if j != k])
            change += Axis("earlier dendrites").join(later, "v", 0).keep(keep)
    return change
