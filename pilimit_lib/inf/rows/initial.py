"""What infinitely wide layers, and finite ones sampled from them, begin with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def initial_rows(r: int, r_out: int, readout: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """A [r o], Amult [r], B [r r] of a fresh layer: as many rows as the rank, so that its function
    is that of a random network.

    B uniform on the sphere, A ~ N(0, 1/o) (0 in a `readout`), Amult 1. Random numbers are drawn for
    B first, then for A.
    """
    B = torch.randn(r, r)
    A = torch.zeros(r, r_out) if readout else torch.randn(r, r_out) / math.sqrt(r_out)
    return A, torch.ones(r), B / torch.linalg.vector_norm(B, dim=1, keepdim=True)


def initial_columns_(A: Tensor) -> Tensor:
    """Make the columns of an input layer's A [d r] uniform on the unit sphere."""
    A.normal_()
    A /= torch.linalg.vector_norm(A, dim=0)
    return A
