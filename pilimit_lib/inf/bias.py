"""The bias of an infinitely wide layer and its multiplier: when there is one, and what a checkpoint
says about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .checkpoints.entries import (
    load_whole,
    number_misfit,
    parameter_misfits,
    refused,
    tensor_misfit,
)


def check_sizes(r: int, r_out: int) -> None:
    """Raise where a layer would map from or to nothing."""
    if r < 1 or r_out < 1:
        raise ValueError(f"a layer needs positive sizes, got r={r}, r_out={r_out}")


def bias_parameter(alpha: float, size: int, device, dtype) -> nn.Parameter | None:
    """No multiplier, no bias: one that is never used would still be trained and count in gradient
    norms."""
    return nn.Parameter(torch.zeros(size, device=device, dtype=dtype)) if alpha else None


def bias_misfits(layer: nn.Module, state: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Why the multiplier in a checkpoint, or a bias that one side lacks, can't be loaded into
    `layer`."""
    alpha = state.get(prefix + "bias_alpha", layer.bias_alpha)
    misfit = number_misfit(alpha, prefix + "bias_alpha")
    if misfit is None and layer.bias is None and prefix + "bias" in state:
        bias = state[prefix + "bias"]
        misfit = tensor_misfit(bias, prefix + "bias")
        if misfit is None and float(alpha) and bool(bias.any()):
            misfit = (
                f"{prefix}bias: the checkpoint has one; build the network with "
                f"bias_alpha={float(alpha)}"
            )
    elif misfit is None and layer.bias is not None and prefix + "bias" not in state:
        if not float(alpha):
            misfit = f"{prefix}bias: the checkpoint has none; build the network with bias_alpha=0"
    if misfit:
        yield misfit


def take_bias_alpha(layer: nn.Module, state: dict, prefix: str) -> None:
    """The checkpoint's multiplier counts. Unused zero biases, which the original stores where it is
    0, are passed over. What does not fit was refused before, see `bias_misfits`."""
    alpha = float(state.pop(prefix + "bias_alpha", layer.bias_alpha))
    if layer.bias is None and state.pop(prefix + "bias", None) is not None:
        alpha = 0.0
    layer.bias_alpha = alpha


class BiasedLayer(nn.Module):
    """A layer with a `bias` or None, and its multiplier `bias_alpha`, which checkpoints hold."""

    bias_alpha: float
    also_loads = ("bias", "bias_alpha")
    load_state_dict = load_whole

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "bias_alpha"] = torch.tensor(self.bias_alpha, dtype=torch.float64)

    def entry_misfits(self, state: Mapping[str, Any], prefix: str, strict: bool) -> Iterator[str]:
        yield from parameter_misfits(self, state, prefix, strict)
        yield from bias_misfits(self, state, prefix)

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        if refused(self, state, prefix, errors):
            return
        take_bias_alpha(self, state, prefix)
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
