"""Feature kernels of trained networks, from the embeddings that feed their readout.

Index legend: a, b samples, r rank, n finite width. Source: Yang, Santacroce & Hu 2022, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..dual.relu import relu_k


@dataclass(frozen=True)
class InfiniteFeatures:
    """The kernel k(⟨ĝ, ĝ'⟩) of a trained infinite network's features, from embeddings ĝ [a r] (unit
    rows, or zero)."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        # No direction, no activation: φ(0) = 0.
        return relu_k(x.double() @ y.double().T) * torch.outer(x.any(1), y.any(1))


@dataclass(frozen=True)
class FiniteFeatures:
    """The kernel ⟨φ(ĥ), φ(ĥ')⟩ of a finite network's features, from embeddings ĥ [a n]; tends to
    InfiniteFeatures as n → ∞."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(x.double()) @ torch.relu(y.double()).T


def features_of(net: nn.Module) -> InfiniteFeatures | FiniteFeatures:
    """The feature kernel that goes with `net.embedding`."""
    return FiniteFeatures() if hasattr(net, "n") else InfiniteFeatures()


@torch.no_grad()
def embed(net: nn.Module, images: Tensor, batch_size: int = 500, progress: bool = True) -> Tensor:
    """Directions [a r] (finite networks: [a n]) of the pre-activations that feed the readout of
    `net`, on the CPU in float32."""
    first = next(net.parameters())
    images = images.reshape(len(images), -1)
    parts = [
        net.embedding(part.to(first.device, first.dtype)).float().cpu()
        for part in tqdm(images.split(batch_size), desc="embedding", disable=not progress)
    ]
    return torch.cat(parts)
