"""Small helpers under the names that the original's users import."""

from __future__ import annotations

from torch import nn

from .clip import clip_grad_norm_, store_pi_grad_norm_
from .layers import InfPiInputLinearReLU, InfPiLinearReLU
from .moments.layer import InfPiLinear
from .rows.layer import row_layers

__all__ = ["clip_grad_norm_", "pi_init", "stage_grad", "store_pi_grad_norm_", "unstage_grad"]


def stage_grad(module: nn.Module) -> None:
    """Put the pending rows of every π-layer aside, where `zero_grad` does not reach them."""
    for _, layer in row_layers(module):
        layer.pending.stage()


def unstage_grad(module: nn.Module) -> None:
    """Take the rows that `stage_grad` put aside back, before those made since."""
    for _, layer in row_layers(module):
        layer.pending.unstage()


def pi_init(module: nn.Module) -> None:
    """Initialise every infinitely wide layer of `module` anew."""
    for layer in module.modules():
        if isinstance(layer, InfPiInputLinearReLU | InfPiLinearReLU | InfPiLinear):
            layer.initialize()
