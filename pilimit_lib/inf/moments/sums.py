"""Φ(u) V without Φ: forward, backward and the rank-b update of V, tile by tile.

    forward    out = Φ(u) V                                  u [b r], V [P o]
    backward   ∂V = Φ(u)ᵀ ∂out ,  ∂Φ = ∂out Vᵀ ,  ∂u from ∂Φ by `Adjoint`
    update     V ← decay·V - lr·Φ(u)ᵀ ∂out                   reads and writes V once, ∂V is never formed

V may be float16 or bfloat16: each tile of it is converted, and sums are float32 or better.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from ..dual.features import BATCH_CHUNK, Adjoint, Basis, PolynomialFeatures
from ..numerics import accumulator, direction

ROWS_AT_ONCE = 8192  # rows that are summed into moments at a time
# 16 MiB of float32: what monomials of lower degrees may take however small V is
LOWER_ELEMENTS = 1 << 22
# of V updated at a time: BLAS decays and adds in two passes, the second then from cache
BLOCK_ELEMENTS = 1 << 18

_triton: ContextVar[bool] = ContextVar("pilimit_triton_features", default=False)


@contextmanager
def triton_kernels(enabled: bool = True) -> Iterator[None]:
    """Inside the `with`, forward passes and fused steps of degree at most 2 run as Triton kernels
    where they can.

    Off by default: the kernels agree with this module under Triton's interpreter, but have not been
    run on a GPU yet.
    """
    token = _triton.set(enabled)
    try:
        yield
    finally:
        _triton.reset(token)


def triton_wanted() -> bool:
    """Whether a `with triton_kernels()` surrounds the caller."""
    return _triton.get()


def _twin(features: PolynomialFeatures, u: Tensor, V: Tensor) -> ModuleType | None:
    """The Triton implementation, where it was asked for and does not refuse."""
    if not triton_wanted():
        return None
    from . import triton_kernels as triton_features

    return triton_features if triton_features.usable(features, u, V) else None


@torch.no_grad()
def forward(features: PolynomialFeatures, u: Tensor, V: Tensor) -> Tensor:
    """Φ(u) V: [b o] in u's dtype."""
    twin = _twin(features, u, V)
    if twin is not None:
        return twin.forward(features, u, V)
    out = u.new_zeros(len(u), V.shape[1])
    for basis, part in _pieces(features, u, out):
        space = _space(features, basis)
        for tile in features.tiles(basis.u.shape[1]):
            part.addmm_(
                features.tile(tile, basis, space[: len(tile)]).T,
                V[tile.start : tile.stop].to(u.dtype),
            )
    return out


@torch.no_grad()
def backward(
    features: PolynomialFeatures, u: Tensor, V: Tensor, grad: Tensor, need_u: bool, need_V: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(∂u [b r], ∂V [P o]) for ∂out `grad` [b o] in u's dtype; None for what is not needed."""
    dV = torch.empty_like(V, dtype=u.dtype, requires_grad=False) if need_V else None
    totals = []
    for number, (basis, part) in enumerate(_pieces(features, u, grad)):
        transposed, adjoint, space = (
            part.T.contiguous(),
            Adjoint(features, basis),
            _space(features, basis),
        )
        for tile in features.tiles(basis.u.shape[1]):
            if need_V:
                dV[tile.start : tile.stop].addmm_(
                    features.tile(tile, basis, space[: len(tile)]), part, beta=int(number > 0)
                )
            if need_u:
                block = V[tile.start : tile.stop].to(u.dtype)
                adjoint.add(tile, torch.mm(block, transposed, out=space[: len(tile)]))
        if need_u:
            totals.append(adjoint.total())
    return torch.cat(totals) if need_u else None, None if dV is None else dV.to(V.dtype)


@torch.no_grad()
def update_(
    features: PolynomialFeatures,
    V: Tensor,
    u: Tensor,
    delta: Tensor,
    scale: float,
    decay: float = 1.0,
) -> None:
    """V ← decay·V + scale·Φ(u)ᵀ delta in place, for u [b r], delta [b o]: as many rows folded into
    V as there are samples."""
    twin = _twin(features, u, V)
    if twin is not None:
        return twin.update_(features, V, u, delta, scale, decay)
    rows = max(1, BLOCK_ELEMENTS // V.shape[1])
    # rounded once only
    total = (
        V
        if V.dtype == u.dtype or len(u) <= samples_at_once(features, V.shape[1])
        else V.to(u.dtype)
    )
    for number, (basis, part) in enumerate(_pieces(features, u, delta)):
        space = _space(features, basis)
        for tile in features.tiles(basis.u.shape[1]):
            block = total[tile.start : tile.stop]
            values = block if block.dtype == u.dtype else block.to(u.dtype)
            columns = features.tile(tile, basis, space[: len(tile)])
            for some, their in zip(values.split(rows), columns.split(rows)):
                some.addmm_(their, part, beta=1.0 if number else decay, alpha=scale)
            if values is not block:
                block.copy_(values)
    if total is not V:
        V.copy_(total)


def factored_norm(features: PolynomialFeatures, u: Tensor, delta: Tensor) -> Tensor:
    """Frobenius norm of Φ(u)ᵀ delta, from the kernel alone: sqrt(Σ_ij δ_i·δ_j k(u_i·u_j))."""
    return (features.kernel(u @ u.T) * (delta @ delta.T)).sum().clamp_min(0).sqrt()


def _pieces(
    features: PolynomialFeatures, u: Tensor, other: Tensor
) -> Iterator[tuple[Basis, Tensor]]:
    size = samples_at_once(features, other.shape[1])
    for part, rest in zip(u.split(size), other.split(size)):
        yield Basis(features, part), rest


def samples_at_once(features: PolynomialFeatures, r_out: int) -> int:
    """How many samples share a pass over V: from degree 3 on, so few that the lower monomials of
    all stay small beside V."""
    if features.degree < 3:
        return BATCH_CHUNK
    lower = sum(math.comb(features.r + degree - 1, degree) for degree in range(2, features.degree))
    return min(BATCH_CHUNK, max(1, max(LOWER_ELEMENTS, features.P * r_out // 8) // lower))


def _space(features: PolynomialFeatures, basis: Basis) -> Tensor:
    """Memory for one tile, used for all tiles of a call: [columns b]."""
    batch = basis.u.shape[1]
    return basis.u.new_empty(min(features.columns(batch), features.P), batch)


@dataclass
class Factors:
    """A gradient of V as its two factors, ∂V = Φ(unit)ᵀ delta: unit [b r], delta [b o]."""

    unit: Tensor
    delta: Tensor


class FactoredParameter(nn.Parameter):
    """V of a fused layer: its gradient stays in factors until someone asks for `.grad`.

    `PiSGD` applies the factors in place and `clip_grad_norm_` of this package measures and scales
    them. Whatever else reads `.grad` (another optimiser, torch's clipping) gets the matrix ∂V [P
    o], formed on demand, so that no step is ever lost. Every backward pass that reaches V adds to
    it, also that of `torch.autograd.grad`: wrap such calls in a `zero_grad`, or freeze V with
    `requires_grad_(False)` around them.
    """

    features: PolynomialFeatures
    pending: list[Factors]

    def __new__(
        cls, data: Tensor, features: PolynomialFeatures, requires_grad: bool = True
    ) -> FactoredParameter:
        self = super().__new__(cls, data, requires_grad)
        self.features, self.pending = features, []
        return self

    def factors(self) -> Factors | None:
        """All pending factors as one pair, or None."""
        if len(self.pending) > 1:
            self.pending = [
                Factors(
                    torch.cat([f.unit for f in self.pending]),
                    torch.cat([f.delta for f in self.pending]),
                )
            ]
        return self.pending[0] if self.pending else None

    def scale_(self, factor: Tensor) -> None:
        """Multiply the pending gradient by `factor`, whether it is in factors or formed."""
        for part in self.pending:
            part.delta = part.delta * factor.to(part.delta)
        formed = nn.Parameter.grad.__get__(self)
        if formed is not None:
            formed.mul_(factor.to(formed))

    def gradient_norm(self) -> Tensor:
        """Frobenius norm of the pending gradient, without forming it where it is in factors."""
        if self.in_factors:
            factors = self.factors()
            return factored_norm(self.features, factors.unit, factors.delta)
        return torch.linalg.vector_norm(self.grad)

    @property
    def in_factors(self) -> bool:
        """Whether the whole gradient is still in factors."""
        return bool(self.pending) and nn.Parameter.grad.__get__(self) is None

    @property
    def grad(self) -> Tensor | None:
        formed = nn.Parameter.grad.__get__(self)
        parts = self.factors()
        if parts is not None:
            gradient = backward(self.features, parts.unit, self, parts.delta, False, True)[1]
            nn.Parameter.grad.__set__(self, gradient if formed is None else formed.add_(gradient))
            self.pending = []
        return nn.Parameter.grad.__get__(self)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.pending = []
        nn.Parameter.grad.__set__(self, value)

    def __deepcopy__(self, memo: dict) -> FactoredParameter:
        if id(self) not in memo:  # copies have no gradient, as with torch's own parameters
            memo[id(self)] = type(self)(
                self.detach().clone(), copy.deepcopy(self.features, memo), self.requires_grad
            )
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int):
        return type(self), (self.detach(), self.features, self.requires_grad)


def _refuse_ddp() -> None:
    """Gradients in factors pass DistributedDataParallel by, and ranks would drift apart without a
    word."""
    active = getattr(nn.parallel.DistributedDataParallel, "_get_active_ddp_module", lambda: None)()
    if active is not None:
        raise RuntimeError(
            "a fused layer keeps the gradient of V out of DistributedDataParallel's reach, so its "
            "ranks would "
            "train apart; build it with fused=False"
        )


class FeatureLinear(torch.autograd.Function):
    """Puts Φ(u) V on the tape. Differentiable twice: with create_graph the backward pass is that of
    the plain product."""

    @staticmethod
    def forward(ctx, u: Tensor, V: Tensor, features: PolynomialFeatures) -> Tensor:
        if isinstance(V, FactoredParameter):
            _refuse_ddp()
        ctx.save_for_backward(u, V)
        ctx.features, ctx.parameter = features, V if isinstance(V, FactoredParameter) else None
        return forward(features, u, V)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        u, V = ctx.saved_tensors
        need_u, need_V, _ = ctx.needs_input_grad
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.to(u.dtype)
            if torch.is_grad_enabled():
                return _taped_backward(ctx, u, V, grad)
            if need_V and ctx.parameter is not None:
                ctx.parameter.pending.append(Factors(u.detach(), grad))
                need_V = False
            return *backward(ctx.features, u, V, grad, need_u, need_V), None


def _taped_backward(
    ctx, u: Tensor, V: Tensor, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, None]:
    if ctx.parameter is not None:
        raise RuntimeError(
            "a fused layer keeps the gradient of V off the tape, so it can't be differentiated "
            "twice; "
            "build it with fused=False for second-order methods"
        )
    need = ctx.needs_input_grad[:2]
    inputs = [tensor for tensor, wanted in zip((u, V), need) if wanted]
    found = iter(
        torch.autograd.grad(ctx.features.matrix(u) @ V.to(u.dtype), inputs, grad, create_graph=True)
    )
    return *(next(found) if wanted else None for wanted in need), None


def feature_linear(features: PolynomialFeatures, u: Tensor, V: Tensor) -> Tensor:
    """Φ(u) V [b o] for directions u [b r] and moments V [P o]; summed in u's dtype, which is
    float32 or float64."""
    if torch.compiler.is_compiling():
        from .compiled import linear

        return linear(u, V, features.kappa)
    if torch.is_grad_enabled() and (u.requires_grad or V.requires_grad):
        return FeatureLinear.apply(u, V, features)
    return forward(features, u, V)


def moments_output(features: PolynomialFeatures, g: Tensor, V: Tensor, layernorm: bool) -> Tensor:
    """s · Φ(ĝ) V for pre-activations `g` [b r]: [b o] in g's dtype. Where g = 0 it is 0, as in
    `functional`."""
    with torch.autocast(g.device.type, enabled=False):
        unit, s = direction(g.to(accumulator(V.dtype)))
        scale = (s > 0).to(s.dtype) if layernorm else s
        return (feature_linear(features, unit, V) * scale).to(g.dtype)


def moments_of(features: PolynomialFeatures, blocks, r_out: int, like: Tensor) -> Tensor:
    """Σ_m Amult_m Φ(B_m) A_mᵀ [P o] of blocks of rows (A [m o], Amult [m], B [m r]), on `like`'s
    device, in its precision."""
    V = torch.zeros(features.P, r_out, device=like.device, dtype=accumulator(like.dtype))
    for A, Amult, B in blocks:
        # rows may be mapped from a large file
        for part in zip(*(tensor.split(ROWS_AT_ONCE) for tensor in (A, Amult, B))):
            A_part, Amult_part, B_part = (tensor.to(V) for tensor in part)
            update_(features, V, B_part, A_part * Amult_part[:, None], 1.0)
    return V
