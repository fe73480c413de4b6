"""The semantics of a π-layer in plain torch: forward, backward, and the rows that a step will
append.

Index legend: b batch, m rows, r rank in, o rank out. With s = |g|, ĝ = g/s, q = ĝ Bᵀ [b m]:

    forward    out = s · (k(q) ∘ Amult) A                                                    [b o]
    backward   dγ = (∂out Aᵀ) ∘ Amult ,  ∂g = (dγ ∘ k'(q)) B + (Σ_m dγ ∘ (k − q k')(q)) ĝ     [b r]
    rows       A ← s ∂out ,  B ← ĝ                                                           one per sample

With layer norm s is 1 in the forward pass, and ∂g loses its part along ĝ and is divided by |g|.
Where g = 0 a ReLU network of any width returns 0 and passes no gradient, so the direction ĝ is set
to 0 there, and s (also under layer norm) too.

Rows are walked block by block, so that no [b m] array is needed beyond a small budget and A·Amult
is never materialised. The functions here are the semantics; `twins` says which faster
implementation of the two sums over rows runs instead.
Source: Yang, Santacroce & Hu 2022, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core import UNKNOWN, current_ids
from ..dual.relu import TWO_PI, relu_k, relu_k_parts
from .sums.choice import pick

if TYPE_CHECKING:
    from ..layers import InfPiLinearReLU

# below this, cosines are kept for the backward pass; above, only up to 5 % of the rows' bytes
SAVED_COSINES_BYTES = 8 << 20
# larger batches are walked in pieces, which bounds the cosines of one block
BATCH_CHUNK = 1024


def relu_kernel(left: Tensor, right: Tensor) -> Tensor:
    """k(⟨·, ·⟩) of two sets of unit rows, [a r] and [b r]: [a b]."""
    return relu_k(left @ right.T)


@dataclass
class Rows:
    """Rows that one backward pass made: A [b o], B [b r], and the ids [b] of the samples they come
    from.

    `kernel` of two sets of B gives the inner products of what the rows stand for.
    """

    A: Tensor
    B: Tensor
    origin: Tensor
    kernel: Callable[[Tensor, Tensor], Tensor] = relu_kernel

    def __len__(self) -> int:
        return len(self.A)

    def norm(self) -> Tensor:
        """Size of the update that these rows stand for: sqrt(Σ_ij A_i·A_j k(B_i, B_j)), the norm
        that clipping uses."""
        A, B = self.A.to(accumulator(self.A.dtype)), self.B.to(accumulator(self.B.dtype))
        # A row without direction (B = 0) has A = 0 too, so its k(0) does not count.
        return (self.kernel(B, B).to(A) * (A @ A.T)).sum().clamp_min(0).sqrt()

    @staticmethod
    def joined(parts: list[Rows]) -> Rows:
        if len(parts) == 1:
            return parts[0]
        return replace(
            parts[0],
            **{
                name: torch.cat([getattr(part, name) for part in parts])
                for name in ("A", "B", "origin")
            },
        )


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The precision in which rows of `dtype` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def length(g: Tensor) -> Tensor:
    """s [b 1], the length of each pre-activation; where it is 0 all its derivatives are 0."""
    with torch.no_grad():
        s = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
    if not (torch.is_grad_enabled() and g.requires_grad):
        return s
    # torch's second derivative of a norm at 0 is NaN: take it elsewhere, and mask the result.
    return torch.linalg.vector_norm(g + (s == 0), dim=-1, keepdim=True) * (s != 0)


def direction(g: Tensor) -> tuple[Tensor, Tensor]:
    """(ĝ [b r], s [b 1]): unit vector and length of each pre-activation; zero vectors have
    direction zero."""
    s = length(g)
    return g / torch.where(s > 0, s, 1), s


def _blocks(
    layer: InfPiLinearReLU, rows: int, like: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A, Amult / 2π and B of the first `rows` rows, block by block, in the accumulating
    precision."""
    for A, Amult, B in zip(
        *(getattr(layer, name).blocks.parts(rows) for name in ("A", "Amult", "B"))
    ):
        A, Amult, B = (part.dense(like.dtype).to(like.device) for part in (A, Amult, B))
        yield A, Amult / TWO_PI, B


def inf_linear_forward(
    layer: InfPiLinearReLU, rows: int, unit: Tensor, save: bool = False
) -> tuple[Tensor, list[Tensor]]:
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


def inf_linear_backward(
    layer: InfPiLinearReLU, rows: int, grad: Tensor, unit: Tensor, cosines: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """For ∂out `grad` [b o]: Σ_m dγ k'(q) B [b r] and Σ_m dγ (k − q k')(q) [b 1]; cosines are
    recomputed where not saved."""
    along_rows, along_unit = torch.zeros_like(unit), unit.new_zeros(len(unit), 1)
    for number, (A, weight, B) in enumerate(_blocks(layer, rows, unit)):
        q = cosines[number] if cosines else (unit @ B.T).clamp_(-1, 1)
        angle, root = relu_k_parts(q)
        dgamma = (grad @ A.T).mul_(weight)
        along_unit += root.mul_(dgamma).sum(1, keepdim=True)
        along_rows.addmm_(angle.mul_(dgamma), B)
    return along_rows, along_unit


@dataclass
class _Embedded:
    """What the backward pass needs of the forward pass: ĝ [b r], s [b 1], the factor of the output
    [b 1], saved cosines, twin."""

    unit: Tensor
    s: Tensor
    scale: Tensor
    cosines: list[Tensor]
    twin: ModuleType | None


def _embed(layer: InfPiLinearReLU, g: Tensor, save: bool) -> tuple[Tensor, _Embedded]:
    """The output [b o] for pre-activations `g`, and what a backward pass will need (with cosines if
    they are to be saved)."""
    with torch.autocast(g.device.type, enabled=False):
        unit, s = direction(g.to(accumulator(layer.A.dtype)))
        scale = (s > 0).to(s.dtype) if layer.layernorm else s
        size = len(layer) * len(unit) * unit.element_size()
        save = (
            save
            and size <= max(SAVED_COSINES_BYTES, layer.row_bytes // 20)
            and len(unit) <= BATCH_CHUNK
        )
        twin = pick(layer, unit)
        forward = inf_linear_forward if twin is None else twin.forward
        parts = [forward(layer, len(layer), part, save) for part in unit.split(BATCH_CHUNK)]
        out = torch.cat([part for part, _ in parts]) if len(parts) > 1 else parts[0][0]
        if layer.shard is not None:
            out = layer.shard.sum(out)
        return (out * scale).to(g.dtype), _Embedded(unit, s, scale, parts[0][1], twin)


def inf_linear(layer: InfPiLinearReLU, g: Tensor) -> Tensor:
    """The π-layer without bias applied to pre-activations `g` [b r]: [b o], in g's dtype, summed in
    float32 or better."""
    if torch.is_grad_enabled() and (g.requires_grad or layer.A.requires_grad):
        return InfPiLinearFunction.apply(g, layer.A, layer)
    return _embed(layer, g, save=False)[0]


class InfPiLinearFunction(torch.autograd.Function):
    """Puts a π-layer on the tape. Its backward pass leaves the rows to be appended in
    `layer.pending`.

    `probe` is the layer's A: a Function none of whose inputs needs a gradient is not taped, and the
    rows would be lost.
    """

    @staticmethod
    def forward(ctx, g: Tensor, probe: Tensor, layer: InfPiLinearReLU) -> Tensor:
        out, ctx.embedded = _embed(layer, g, save=ctx.needs_input_grad[0])
        ctx.layer, ctx.rows, ctx.edits, ctx.dtype = layer, len(layer), layer.edits, g.dtype
        # Captured now: backward may run in another thread, where the surrounding `batch` is not
        # visible.
        ids = current_ids(len(g))
        ctx.ids = (
            torch.full((len(g),), UNKNOWN, device=g.device) if ids is None else ids.to(g.device)
        )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, None]:
        layer, unit, s = ctx.layer, ctx.embedded.unit, ctx.embedded.s
        if ctx.edits != layer.edits:
            raise RuntimeError(
                "rows of a π-layer were changed or removed between this graph's forward and "
                "backward pass "
                "(an optimizer step, a rewind, or a load); run the forward pass again"
            )
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.to(unit.dtype)
            if ctx.needs_input_grad[1]:
                layer.pending.add(Rows(grad * ctx.embedded.scale, unit, ctx.ids))
            if not ctx.needs_input_grad[0]:
                return None, None, None
            backward = (
                inf_linear_backward if ctx.embedded.twin is None else ctx.embedded.twin.backward
            )
            parts = [
                backward(layer, ctx.rows, *part, ctx.embedded.cosines)
                for part in zip((grad * (s > 0)).split(BATCH_CHUNK), unit.split(BATCH_CHUNK))
            ]
            along_rows, along_unit = (torch.cat(tensors) for tensors in zip(*parts))
            if layer.shard is not None:
                along_rows, along_unit = layer.shard.sum(
                    torch.cat([along_rows, along_unit], 1)
                ).split([layer.r, 1], 1)
            if layer.layernorm:
                radial = (along_rows * unit).sum(1, keepdim=True)
                result = (along_rows - radial * unit) / torch.where(s > 0, s, 1)
            else:
                result = along_rows + along_unit * unit
            return result.to(ctx.dtype), None, None
