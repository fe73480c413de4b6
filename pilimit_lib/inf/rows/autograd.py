"""A π-layer on the tape: which sums run, and the rows that a backward pass leaves for a step.

Formulas and the index legend stand in `sums.plain`. A backward pass hands its rows to the layer
together with an empty gradient for A; they become pending when autograd accumulates that, as only
`backward()` does (see `parameter`).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from ...core import UNKNOWN, current_ids
from ..numerics import accumulator, direction, full_precision, output_scale, transformed
from .layer import RowLayer
from .parameter import ROWS, InfPiParameter
from .pending import Rows
from .sums import differentiable
from .sums.choice import pick

# below this, cosines are kept for the backward pass; above, only up to 5 % of the rows' bytes
SAVED_COSINES_BYTES = 8 << 20
# larger batches are walked in pieces, which bounds the cosines of one block
BATCH_CHUNK = 1024


@dataclass
class _Embedded:
    """What the backward pass needs of the forward pass: ĝ [b r], s [b 1], the factor of the output
    [b 1], saved cosines, the implementation."""

    unit: Tensor
    s: Tensor
    scale: Tensor
    cosines: list[Tensor]
    sums: ModuleType


def inf_linear(layer: RowLayer, g: Tensor) -> Tensor:
    """The π-layer without bias applied to pre-activations `g` [b r]: [b o], in g's dtype, summed in
    float32 or better."""
    if torch.compiler.is_dynamo_compiling():
        from .sums.uncompiled import eagerly  # which loads the compiler of torch

        return eagerly(inf_linear, layer, g)
    held = [getattr(layer, name) for name in ROWS]
    if not all(_is_own(layer, parameter) for parameter in held):
        return _of_handed_in(layer, g, held)
    if transformed():
        return _transformed(layer, g)
    if torch.is_grad_enabled() and held[0].requires_grad:
        refuse_ddp(layer)
        return InfPiLinearFunction.apply(g, held[0], layer)
    if torch.is_grad_enabled() and g.requires_grad:
        return InfPiLinearFunction.apply(g, None, layer)
    return _embed(layer, g, save=False)[0]


def _embed(layer: RowLayer, g: Tensor, save: bool) -> tuple[Tensor, _Embedded]:
    """The output [b o] for pre-activations `g`, and what a backward pass will need (with cosines if
    they are to be saved)."""
    with full_precision(g):
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


class InfPiLinearFunction(torch.autograd.Function):
    """Puts a π-layer on the tape: a Function none of whose inputs needs a gradient is not taped, so
    A is among them, or None where it is frozen."""

    @staticmethod
    def forward(ctx, g: Tensor, A: InfPiParameter | None, layer: RowLayer) -> Tensor:
        out, ctx.embedded = _embed(layer, g, save=ctx.needs_input_grad[0])
        ctx.layer, ctx.rows, ctx.edits, ctx.dtype = layer, len(layer), layer.edits, g.dtype
        ctx.trains = A is not None
        # Captured now: backward may run in another thread, where the surrounding `batch` is not
        # visible.
        ids = current_ids(len(g))
        ctx.ids = (
            torch.full((len(g),), UNKNOWN, device=g.device) if ids is None else ids.to(g.device)
        )
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer, unit = ctx.layer, ctx.embedded.unit
        refuse_second_order(layer)
        if ctx.edits != layer.edits:
            raise RuntimeError(
                "rows of a π-layer were changed or removed between this graph's forward and "
                "backward pass "
                "(an optimizer step, a rewind, or a load); run the forward pass again"
            )
        with full_precision(grad):
            grad = grad.to(unit.dtype)
            empty = None
            if ctx.trains:
                empty = layer.deliver(Rows(grad * ctx.embedded.scale, unit, ctx.ids))
            if not ctx.needs_input_grad[0]:
                return None, empty, None
            parts = [
                _sums(ctx, *part)
                for part in zip(
                    (grad * (ctx.embedded.s > 0)).split(BATCH_CHUNK), unit.split(BATCH_CHUNK)
                )
            ]
            along_rows, along_unit = (torch.cat(tensors) for tensors in zip(*parts))
            if layer.shard is not None:
                both = layer.shard.sum(torch.cat([along_rows, along_unit], 1))
                along_rows, along_unit = both.split([layer.r, 1], 1)
            if layer.layernorm:
                s = ctx.embedded.s
                radial = (along_rows * unit).sum(1, keepdim=True)
                result = (along_rows - radial * unit) / torch.where(s > 0, s, 1)
            else:
                result = along_rows + along_unit * unit
            return result.to(ctx.dtype), empty, None


def _sums(ctx, grad: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over rows of the backward pass for ∂out `grad` [b o] and directions [b r]."""
    layer, embedded = ctx.layer, ctx.embedded
    if not (transformed() or torch._C._functorch.is_legacy_batchedtensor(grad)):
        return embedded.sums.backward(layer, ctx.rows, grad, unit, embedded.cosines)
    # gradients of several outputs at once (is_grads_batched), which fill no buffer of ours
    layer.require_whole("is_grads_batched")
    A, Amult, B = (values[: ctx.rows].to(unit) for values in layer.dense_rows())
    return differentiable.backward(A, Amult, B, unit, grad)


def _transformed(layer: RowLayer, g: Tensor) -> Tensor:
    """Inside transforms of `torch.func`. Under `vmap` alone the samples of all its slices are one
    batch, and train as such; under others the rows are constants."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    if stack and not torch._C._functorch.is_functorch_wrapped_tensor(g):
        with torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack():
            return inf_linear(layer, g)  # nothing that is transformed reaches this layer
    kinds = [interpreter.key() for interpreter in stack]
    vmap, jvp = torch._C._functorch.TransformType.Vmap, torch._C._functorch.TransformType.Jvp
    if kinds and all(kind == vmap for kind in kinds):
        return _Vectorised.apply(g, layer)
    if kinds.count(jvp) > 1:
        raise RuntimeError(
            f"forward-mode differentiation inside forward-mode through {layer} is not supported; "
            "nest reverse mode instead, as torch.func.hessian does (jacfwd of jacrev)"
        )
    layer.require_whole("a transform of torch.func")
    out = _of_tensors(layer, g, *layer.dense_rows())
    return out + untrainable(layer, layer.A) if layer.A.requires_grad else out


class _Vectorised(torch.autograd.Function):
    """A π-layer under `vmap`."""

    @staticmethod
    def forward(g: Tensor, layer: RowLayer) -> Tensor:
        raise AssertionError("called under vmap only")

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info, in_dims: tuple, g: Tensor, layer: RowLayer) -> tuple[Tensor, int]:
        g = g.movedim(in_dims[0], 0)
        return inf_linear(layer, g.reshape(-1, layer.r)).reshape(*g.shape[:-1], layer.r_out), 0


def _of_tensors(layer: RowLayer, g: Tensor, A: Tensor, Amult: Tensor, B: Tensor) -> Tensor:
    """The layer with these rows, as an ordinary function of tensors."""
    with full_precision(g):
        unit, s = direction(g.to(accumulator(layer.A.dtype)))
        A, Amult, B = (tensor.to(unit.dtype) for tensor in (A, Amult, B))
        out = differentiable.forward(A, Amult, B, unit)
        return (out * output_scale(s, layer.layernorm)).to(g.dtype)


def _is_own(layer: RowLayer, parameter: Tensor) -> bool:
    # To torch 2.4 any wrapped subclass is an instance of every kind of parameter.
    return issubclass(type(parameter), InfPiParameter) and parameter.pending is layer.pending


def _exporting() -> bool:
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def _of_handed_in(layer: RowLayer, g: Tensor, held: list[Tensor]) -> Tensor:
    """The layer where some of A, Amult and B were replaced by plain tensors, as `functional_call`
    does for the time of a call."""
    own = [parameter for parameter in held if _is_own(layer, parameter)]
    others = [value for value in held if not _is_own(layer, value)]
    rows = [value.blocks.dense() if _is_own(layer, value) else value for value in held]
    lengths = {len(value) for value in rows}
    lost = 0 in lengths and len(layer.origin_blocks)
    wrapped = any(isinstance(value, nn.Parameter) for value in others)
    if lost or len(lengths) > 1 or (wrapped and not _exporting()):
        raise RuntimeError(
            f"A, Amult and B of {type(layer).__name__} were replaced by "
            f"{[type(value).__name__ for value in held]} of {[len(value) for value in held]} rows, "
            f"and the layer has {len(layer.origin_blocks)}. Its parameters hold their rows outside "
            "of the tensor that torch sees, so they can't be wrapped or handed in themselves: hand "
            "in plain tensors, {name: p.detach() for name, p in net.named_parameters()}, or use "
            "memory='moments'"
        )
    out = _of_tensors(layer, g, *rows)
    training = [parameter for parameter in own if parameter.requires_grad]
    return out + untrainable(layer, training[0]) if training else out


class _Untrainable(torch.autograd.Function):
    """A zero that depends on a parameter: what a backward pass that would train the rows meets."""

    @staticmethod
    def forward(ctx, parameter: InfPiParameter, layer: RowLayer) -> Tensor:
        ctx.layer = layer
        return torch.zeros((), dtype=parameter.dtype, device=parameter.device)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            f"a backward pass reached {ctx.layer}, which was called inside a transform of "
            "torch.func or with some of its parameters replaced: rows are constants there, and "
            "would not be trained. Freeze the network (requires_grad_(False)) or detach the "
            "result, or use memory='moments' (net.to_moments())"
        )


def untrainable(layer: RowLayer, parameter: InfPiParameter) -> Tensor:
    """A zero to be added to what a layer computes from its rows as constants: a backward pass that
    would have to train them is an error."""
    with torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack():
        return _Untrainable.apply(parameter, layer)


def refuse_second_order(layer: RowLayer) -> None:
    """Called in a backward pass: raise where it is itself recorded, by `create_graph=True`."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"a derivative of second order (create_graph=True) through {layer}: the gradient with "
            "respect to rows is a set of rows, which can't be differentiated again. Use "
            "memory='moments' (net.to_moments()), or torch.func without training"
        )


def refuse_ddp(layer: RowLayer) -> None:
    """Pending rows pass DistributedDataParallel by, and ranks would drift apart without a word."""
    active = getattr(nn.parallel.DistributedDataParallel, "_get_active_ddp_module", lambda: None)()
    if active is not None:
        raise RuntimeError(
            f"DistributedDataParallel does not see the rows that {layer} appends, so its ranks "
            "would train apart. Spread the rows with pilimit_lib.inf.shard_rows(net), the same "
            "batch on every rank, or use memory='moments' (net.to_moments())"
        )
