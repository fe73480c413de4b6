"""Losses of layers, all called as `loss(sp_learn, h1, t1, h0, t0, y)`."""

from .base import Loss
from .contrast import Contrast
from .versions import (
    v1_input_label_direct,
    v9_input_target_max_all,
    v14_input_target_max_rand,
    v15_input_target_topk,
)

__all__ = [
    "Contrast",
    "Loss",
    "v14_input_target_max_rand",
    "v15_input_target_topk",
    "v1_input_label_direct",
    "v9_input_target_max_all",
]
