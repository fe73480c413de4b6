"""The semantics of a π-layer in plain torch: forward, backward, and the rows that a step will
append.

Index legend: b batch, m rows, r rank in, o rank out. With s = |g|, ĝ = g/s, q = ĝ Bᵀ [b m]:

    forward    out = s · (k(q) ∘ Amult) A                                            [b o]
    backward   dγ = (∂out Aᵀ) ∘ Amult
               ∂g = (dγ ∘ k'(q)) B + (Σ_m dγ ∘ (k − q k')(q)) ĝ                      [b r]
    rows       A ← s ∂out ,  B ← ĝ                                                   one per sample

With layer norm s is 1 in the forward pass, and ∂g loses its part along ĝ and is divided by |g|.
Where g = 0 a ReLU network of any width returns 0 and passes no gradient, so the direction ĝ is set
to 0 there, and s (also under layer norm) too.

Rows are walked block by block, so that no [b m] array is needed beyond a small budget and A·Amult
is never materialised. The functions here are the semantics; its siblings are faster
implementations, and `choice` says which one runs.
Source: Yang, Santacroce & Hu 2022, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...dual.relu import TWO_PI, relu_k_parts
from ..layer import RowLayer


def refuses(layer: RowLayer, unit: Tensor) -> str | None:
    """Why this implementation can't run: it always can."""
    return None


def _blocks(layer: RowLayer, rows: int, like: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A, Amult / 2π and B of the first `rows` rows, block by block, in the accumulating
    precision."""
    for A, Amult, B in layer.parts(rows):
        A, Amult, B = (part.dense(like.dtype).to(like.device) for part in (A, Amult, B))
        yield A, Amult / TWO_PI, B


def forward(layer: RowLayer, rows: int, unit: Tensor, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Σ_m Amult_m A_m k(⟨B_m, ĝ⟩) for directions `unit` [b r]: [b o], and the cosines of each block
    where `save`."""
    out = unit.new_zeros(len(unit), layer.r_out)
    cosines = []
    for A, weight, B in _blocks(layer, rows, unit):
        q = (unit @ B.T).clamp_(-1, 1)
        angle, root = relu_k_parts(q)
        out.addmm_(root.addcmul_(q, angle).mul_(weight), A)
        if save:
            cosines.append(q)
    return out, cosines


def backward(
    layer: RowLayer, rows: int, grad: Tensor, unit: Tensor, saved: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """For ∂out `grad` [b o]: Σ_m dγ k'(q) B [b r] and Σ_m dγ (k − q k')(q) [b 1]; cosines are
    recomputed where not saved."""
    along_rows, along_unit = torch.zeros_like(unit), unit.new_zeros(len(unit), 1)
    for number, (A, weight, B) in enumerate(_blocks(layer, rows, unit)):
        q = saved[number] if saved else (unit @ B.T).clamp_(-1, 1)
        angle, root = relu_k_parts(q)
        dgamma = (grad @ A.T).mul_(weight)
        along_unit += root.mul_(dgamma).sum(1, keepdim=True)
        along_rows.addmm_(angle.mul_(dgamma), B)
    return along_rows, along_unit
