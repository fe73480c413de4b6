"""The bias of an infinitely wide layer and its multiplier: when there is one, and what a checkpoint
says about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def check_sizes(r: int, r_out: int) -> None:
    """Raise where a layer would map from or to nothing."""
    if r < 1 or r_out < 1:
        raise ValueError(f"a layer needs positive sizes, got r={r}, r_out={r_out}")


def bias_parameter(alpha: float, size: int, device, dtype) -> nn.Parameter | None:
    """No multiplier, no bias: one that is never used would still be trained and count in gradient
    norms."""
    return nn.Parameter(torch.zeros(size, device=device, dtype=dtype)) if alpha else None


def bias_misfit(layer: nn.Module, state: Mapping[str, Any], prefix: str) -> str | None:
    """Why the bias in a checkpoint can't be loaded into `layer`, if so."""
    alpha = float(state.get(prefix + "bias_alpha", layer.bias_alpha))
    bias = state.get(prefix + "bias")
    if layer.bias is None and bias is not None and alpha and bool(bias.any()):
        return f"{prefix}bias: the checkpoint has one; build the network with bias_alpha={alpha}"
    if layer.bias is not None and bias is None and not alpha:
        return f"{prefix}bias: the checkpoint has none; build the network with bias_alpha=0"
    return None


def take_bias_alpha(layer: nn.Module, state: dict, prefix: str, errors: list) -> None:
    """The checkpoint's multiplier counts. Unused zero biases, which the original stores where it is
    0, are passed over."""
    misfit = bias_misfit(layer, state, prefix)
    alpha = float(state.pop(prefix + "bias_alpha", layer.bias_alpha))
    if misfit:
        errors.append(misfit)
        return
    if layer.bias is None and state.pop(prefix + "bias", None) is not None:
        alpha = 0.0
    layer.bias_alpha = alpha


class BiasedLayer(nn.Module):
    """A layer with a `bias` or None, and its multiplier `bias_alpha`, which checkpoints hold."""

    bias_alpha: float

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "bias_alpha"] = torch.tensor(self.bias_alpha, dtype=torch.float64)

    def _load_from_state_dict(
        self,
        state: dict,
        prefix: str,
        metadata: dict,
        strict: bool,
        missing: list,
        unexpected: list,
        errors: list,
    ) -> None:
        take_bias_alpha(self, state, prefix, errors)
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
