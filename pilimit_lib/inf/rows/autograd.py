"""A π-layer on the tape: which sums run, and the rows that a backward pass leaves for a step.

Formulas and the index legend stand in `sums.plain`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ...core import UNKNOWN, current_ids
from ..numerics import accumulator, direction, output_scale
from .layer import RowLayer
from .pending import Rows
from .sums.choice import pick

# below this, cosines are kept for the backward pass; above, only up to 5 % of the rows' bytes
SAVED_COSINES_BYTES = 8 << 20
# larger batches are walked in pieces, which bounds the cosines of one block
BATCH_CHUNK = 1024


@dataclass
class _Embedded:
    """What the backward pass needs of the forward pass: ĝ [b r], s [b 1], the factor of the output
    [b 1], saved cosines, the
    implementation."""

    unit: Tensor
    s: Tensor
    scale: Tensor
    cosines: list[Tensor]
    sums: ModuleType


def _embed(layer: RowLayer, g: Tensor, save: bool) -> tuple[Tensor, _Embedded]:
    """The output [b o] for pre-activations `g`, and what a backward pass will need (with cosines if
    they are to be saved)."""
    with torch.autocast(g.device.type, enabled=False):
        unit, s = direction(g.to(accumulator(layer.A.dtype)))
        scale = output_scale(s, layer.layernorm)
        size = len(layer) * len(unit) * unit.element_size()
        save = (
            save
            and size <= max(SAVED_COSINES_BYTES, layer.row_bytes // 20)
            and len(unit) <= BATCH_CHUNK
        )
        sums = pick(layer, unit)
        parts = [sums.forward(layer, len(layer), part, save) for part in unit.split(BATCH_CHUNK)]
        out = torch.cat([part for part, _ in parts]) if len(parts) > 1 else parts[0][0]
        if layer.shard is not None:
            out = layer.shard.sum(out)
        return (out * scale).to(g.dtype), _Embedded(unit, s, scale, parts[0][1], sums)


def inf_linear(layer: RowLayer, g: Tensor) -> Tensor:
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
    def forward(ctx, g: Tensor, probe: Tensor, layer: RowLayer) -> Tensor:
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
            parts = [
                ctx.embedded.sums.backward(layer, ctx.rows, *part, ctx.embedded.cosines)
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
