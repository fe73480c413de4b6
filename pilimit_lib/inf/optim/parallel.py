"""Data parallel training in several processes: the gradients of all ranks as one, in whichever form
they are.

    loss = cross_entropy(net(x_here), y_here) * len(y_here) / samples_of_all_ranks
    loss.backward()
    sum_gradients_(net)              # between the backward pass, and clipping and the step
    clip_grad_norm_(net, 0.4)
    optimizer.step()

Every rank holds the whole network and sees its share of a batch; a rank whose share is empty leaves
the backward pass out and still calls `sum_gradients_`. Rows that are pending, and gradients of
moments in factors, are no tensors of the parameter's shape: all ranks gather the two factors,
b·(r + o) numbers, in place of a sum of P·o. Index legend: b samples of all ranks, r rank in, o rank
out, P moments.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...core.collectives import gathered, sum_
from ..layers import InfPiInputLinearReLU
from ..moments.parameter import FactoredParameter, Factors
from ..numerics import accumulator
from ..rows.parameter import InfPiParameter
from ..rows.pending import PendingRows, Rows

NONE, TENSOR = -1, 0  # what stands for a gradient in place of its number of rows
# how many times less gathering must receive than a sum: each rank then multiplies factors of all
CHEAPER = 8
BUCKET = 1 << 18  # tensors of fewer numbers are summed together


class _Gradient(Protocol):
    """A gradient as it is exchanged."""

    parameter: nn.Parameter

    def rows(self) -> int:
        """The number of rows of its factors, or NONE, or TENSOR."""

    def kinds(self) -> list[tuple[int | None, torch.dtype]]:
        """Width (None: a vector) and dtype of each factor, known also where there is none."""

    def factors(self) -> tuple[Tensor, ...]:
        """What is gathered: tensors [rows, …]."""

    def take(self, factors: list[Tensor]) -> None:
        """Hold the factors of all ranks."""

    def worth_gathering(self, rows: int, ranks: int) -> bool:
        """Whether gathering `rows` of each rank receives far less than a sum over ranks does."""


class _Tensor:
    """A gradient that is a tensor in `.grad`."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    def rows(self) -> int:
        return NONE if self.parameter.grad is None else TENSOR


class _Factors:
    """The gradient of a fused layer of moments, while it is in factors."""

    def __init__(self, parameter: FactoredParameter) -> None:
        self.parameter = parameter

    def rows(self) -> int:
        if self.parameter.in_factors:
            return len(self.parameter.factors().unit)
        return NONE if self.parameter.grad is None else TENSOR

    def kinds(self) -> list[tuple[int | None, torch.dtype]]:
        dtype = accumulator(self.parameter.dtype)
        return [(self.parameter.features.r, dtype), (self.parameter.shape[1], dtype)]

    def factors(self) -> tuple[Tensor, ...]:
        held = self.parameter.factors()
        return held.unit, held.delta

    def take(self, factors: list[Tensor]) -> None:
        self.parameter.parts = [Factors(*factors)]

    def worth_gathering(self, rows: int, ranks: int) -> bool:
        numbers = self.parameter.features.r + self.parameter.shape[1]
        return CHEAPER * ranks * rows * numbers < 2 * self.parameter.numel()


class InputFactors:
    """The gradients of `net`'s input layers in factors too, ∂A = xᵀ ∂g with x [b d] and ∂g [b r],
    which passes through `net` leave here for `sum_gradients_`. Of images ∂A is the largest tensor
    that small ranks have to exchange. For training whose gradients all come from plain backward
    passes: derivatives taken on the way would be counted too."""

    def __init__(self, net: nn.Module) -> None:
        layers = [layer for layer in net.modules() if isinstance(layer, InfPiInputLinearReLU)]
        self.parameters = {layer.A for layer in layers}
        self.parts: dict[nn.Parameter, list[tuple[Tensor, Tensor]]] = {}
        for layer in layers:
            layer.register_forward_hook(self._watch)

    def _watch(self, layer: InfPiInputLinearReLU, given: tuple[Tensor], g: Tensor) -> None:
        if torch.is_grad_enabled() and layer.A.requires_grad:
            x = given[0].detach().reshape(-1, layer.r)
            g.register_hook(partial(self._keep, layer.A, x))

    def _keep(self, parameter: nn.Parameter, x: Tensor, grad: Tensor) -> None:
        delta = grad.detach().reshape(len(x), -1)
        self.parts.setdefault(parameter, []).append((x.to(delta.dtype), delta))

    def taken(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor] | None:
        """x and ∂g of all backward passes since the last call."""
        found = self.parts.pop(parameter, None)
        return None if found is None else tuple(torch.cat(factor) for factor in zip(*found))


class _InputLayer:
    """The gradient of an input layer, whose factors are known."""

    def __init__(self, parameter: nn.Parameter, inputs: InputFactors) -> None:
        self.parameter, self.held = parameter, inputs.taken(parameter)

    def rows(self) -> int:
        if self.held is None or self.parameter.grad is None:
            return NONE if self.parameter.grad is None else TENSOR
        return len(self.held[0])

    def kinds(self) -> list[tuple[int | None, torch.dtype]]:
        return [(size, self.parameter.dtype) for size in self.parameter.shape]

    def factors(self) -> tuple[Tensor, ...]:
        return self.held

    def take(self, factors: list[Tensor]) -> None:
        x, delta = factors
        self.parameter.grad = x.T @ delta

    def worth_gathering(self, rows: int, ranks: int) -> bool:
        numbers = sum(self.parameter.shape)
        return CHEAPER * ranks * rows * numbers < 2 * self.parameter.numel()


class _PendingRows:
    """Rows that a layer of rows is about to append."""

    def __init__(self, pending: PendingRows) -> None:
        self.pending, self.parameter = pending, pending.parameter
        if pending.layer.shard is not None:
            raise RuntimeError(
                f"the rows of {pending.layer} are sharded: every rank sees the whole batch, and "
                "its gradients are those of all. Call sum_gradients_ for networks that are whole "
                "on every rank only"
            )

    def rows(self) -> int:
        return len(self.pending.rows()) if self.pending else NONE

    def kinds(self) -> list[tuple[int | None, torch.dtype]]:
        layer, dtype = self.pending.layer, accumulator(self.pending.layer.dtype)
        return [(layer.r_out, dtype), (layer.r, dtype), (None, torch.long)]

    def factors(self) -> tuple[Tensor, ...]:
        rows = self.pending.rows()
        return rows.A, rows.B, rows.origin

    def take(self, factors: list[Tensor]) -> None:
        self.pending.parts = [Rows(*factors, kernel=self.pending.layer.row_kernel)]
        self.pending.spent = None

    def worth_gathering(self, rows: int, ranks: int) -> bool:
        return True  # they have no other form


@torch.no_grad()
def sum_gradients_(
    net_or_params: nn.Module | Iterable[Tensor],
    group: Any = None,
    inputs: InputFactors | None = None,
) -> None:
    """Make the gradients of every rank of `group` (default: all processes) their sum over ranks, in
    whichever form they are; a gradient that no rank has stays None.

    Rows and factors come in the order of ranks, so that a batch cut into consecutive parts keeps
    its order. A gradient of moments is summed as ∂V [P o] where the factors are not far less.

    Args:
        inputs: knows the factors of input layers, whose gradients are tensors otherwise.
    """
    parameters = net_or_params
    if isinstance(net_or_params, nn.Module):
        parameters = net_or_params.parameters()
    slots = _slots(parameters, inputs)
    if not slots:
        return
    device = slots[0].parameter.device
    counts = torch.tensor([slot.rows() for slot in slots], device=device)
    of_ranks = torch.stack(gathered(counts, group)).tolist()
    factored, summed = [], []
    for slot, counts in zip(slots, zip(*of_ranks)):
        if max(counts) > TENSOR and TENSOR not in counts:
            if slot.worth_gathering(max(counts), len(counts)):
                factored.append((slot, counts))
                continue
        if max(counts) > NONE:
            summed.append(slot.parameter)
    _gather(factored, group, device)
    _sum(summed, group)


def _slots(parameters: Iterable[Tensor], inputs: InputFactors | None) -> list[_Gradient | _Tensor]:
    """The gradients of parameters that train, each once."""
    found: dict[int, _Gradient | _Tensor] = {}
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if isinstance(parameter, InfPiParameter):
            if id(parameter.pending) not in found:
                found[id(parameter.pending)] = _PendingRows(parameter.pending)
        elif isinstance(parameter, FactoredParameter):
            found[id(parameter)] = _Factors(parameter)
        elif inputs is not None and parameter in inputs.parameters:
            found[id(parameter)] = _InputLayer(parameter, inputs)
        else:
            found[id(parameter)] = _Tensor(parameter)
    return list(found.values())


def _gather(
    slots: list[tuple[_Gradient, tuple[int, ...]]], group: Any, device: torch.device
) -> None:
    """All ranks hold the factors of all, gathered at once; with each slot come the numbers of rows
    by rank."""
    if not slots:
        return
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    lengths = [sum(_bytes(slot, counts[other]) for slot, counts in slots) for other in range(ranks)]
    mine = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    here = [
        factor.to(kind).contiguous().view(-1).view(torch.uint8)
        for slot, counts in slots
        if counts[rank] > NONE
        for factor, (_, kind) in zip(slot.factors(), slot.kinds())
    ]
    if here:
        mine[: lengths[rank]] = torch.cat([part.to(device) for part in here])
    of_ranks, places = gathered(mine, group), [0] * ranks
    for slot, counts in slots:
        factors = []
        for width, kind in slot.kinds():
            parts = []
            for other, count in enumerate(counts):
                size = max(count, 0) * (width or 1) * kind.itemsize
                piece = of_ranks[other][places[other] : places[other] + size]
                places[other] += size
                # a copy begins where its dtype may begin
                parts.append(piece.clone().view(kind).view(-1, *(() if width is None else [width])))
            factors.append(torch.cat(parts).to(slot.parameter.device))
        slot.take(factors)


def _bytes(slot: _Gradient, rows: int) -> int:
    return sum(max(rows, 0) * (width or 1) * kind.itemsize for width, kind in slot.kinds())


def _sum(parameters: list[nn.Parameter], group: Any) -> None:
    """Sum the gradients of parameters, small ones together. A rank that has none adds zero."""
    small: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, requires_grad=False)
        if parameter.numel() < BUCKET:
            small.setdefault((parameter.grad.dtype, parameter.device), []).append(parameter)
        elif parameter.grad.is_contiguous():
            sum_(parameter.grad, group)
        else:
            parameter.grad.copy_(sum_(parameter.grad.contiguous(), group))
    for together in small.values():
        flat = sum_(torch.cat([parameter.grad.reshape(-1) for parameter in together]), group)
        parts = flat.split([parameter.numel() for parameter in together])
        for parameter, part in zip(together, parts):
            parameter.grad.copy_(part.view_as(parameter.grad))
