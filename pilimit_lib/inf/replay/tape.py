"""Steps of a recorded run as functions of tensors, and their derivatives in reverse.

The row that a step appends depends on all rows before it,

    A_new = s ∂L/∂out ,  B_new = ĝ ,

so the derivatives of a step are those of a gradient. Multipliers of rows depend on rates only.
Rows are appended and never changed, so those of every earlier network are the first rows of the
last. Index legend: q queries, b batch, m rows, r rank in, o rank out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap

from ..numerics import direction, output_scale
from ..optim.sgd import PiSGD
from ..rows.layer import row_layers
from ..rows.sums.differentiable import row_kernel
from .record import RunRecord, ordinary_parameters
from .retrain import Loss, batch_loss

QUERY_CHUNK = 16  # queries whose first derivatives are taken together
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class State:
    """A network before a step: ordinary parameters, their velocities (where there is momentum), and
    Amult [m] of each layer of rows, whose A and B are the first m of those at the end."""

    ordinary: Tensors
    velocity: Tensors
    Amult: Tensors


@dataclass(frozen=True)
class Adjoint:
    """∂ query / ∂ (state), for each query: as in `State`, and of A [q m o] and B [q m r]."""

    ordinary: Tensors
    velocity: Tensors
    A: Tensors
    B: Tensors


def state_of(net: nn.Module, optimizer: PiSGD) -> State:
    ordinary = ordinary_parameters(net)
    parameters = dict(net.named_parameters())
    buffers = {name: optimizer.state.get(parameters[name], {}) for name in ordinary}
    velocity = {
        name: found["momentum_buffer"].detach().clone()
        for name, found in buffers.items()
        if found.get("momentum_buffer") is not None
    }
    rows = {name: layer.Amult.blocks.dense() for name, layer in row_layers(net)}
    return State(ordinary, velocity, rows)


def require_appending(net: nn.Module) -> None:
    """Raise where a step does more to a layer of rows than to append some."""
    for name, layer in row_layers(net):
        if layer.limits is not None or layer.folded is not None or layer.shard is not None:
            raise ValueError(
                f"{name} merges, folds or shards its rows, so a step does not only append; train "
                "with plain rows, or with memory='moments'"
            )
        if hasattr(layer, "kernel"):
            raise ValueError(
                f"{name} has no features to differentiate through: its kernel is fixed"
            )


class Tape:
    """Steps of a run as functions of tensors, and their derivatives in reverse."""

    def __init__(
        self,
        net: nn.Module,
        record: RunRecord,
        loss: Loss,
        average: str,
    ) -> None:
        self.net, self.record = net, record
        self.loss, self.average = loss, average
        self.groups = {  # the parameter group of each parameter
            name: number
            for number, group in enumerate(record.start["optimizer"]["groups"])
            for name in group["params"]
        }
        self.frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
        self.layers = {n: layer for n, layer in row_layers(net) if layer.A.requires_grad}
        self.A = {name: layer.A.blocks.dense() for name, layer in self.layers.items()}
        self.B = {name: layer.B.blocks.dense() for name, layer in self.layers.items()}

    def of_queries(self, last: State, queries: Tensor, targets: Tensor, query: Loss) -> Adjoint:
        """That of the state after the last step."""

        def asked(ordinary: Tensors, A: Tensors, B: Tensors, x: Tensor, y: Tensor) -> Tensor:
            return query(self.outputs(last, ordinary, A, B, x[None]), y[None])[0]

        each = vmap(grad(asked, argnums=(0, 1, 2)), in_dims=(None, None, None, 0, 0))
        parts = [
            each(last.ordinary, self.A, self.B, x, y)
            for x, y in zip(queries.split(QUERY_CHUNK), targets.split(QUERY_CHUNK))
        ]
        ordinary, A, B = (_joined([part[i] for part in parts]) for i in range(3))
        velocity = {
            name: value.new_zeros(len(queries), *value.shape)
            for name, value in last.velocity.items()
        }
        return Adjoint(ordinary, velocity, A, B)

    def back(
        self, state: State, after: Adjoint, step: int, x: Tensor, y: Tensor
    ) -> tuple[Adjoint, Tensor]:
        """That of the state before a step from that after it, and ∂ query / ∂ weights [q b]."""
        count = {name: len(state.Amult[name]) for name in self.layers}
        A = {name: self.A[name][:m] for name, m in count.items()}
        B = {name: self.B[name][:m] for name, m in count.items()}
        weights = torch.ones(len(x), dtype=x.dtype, device=x.device)

        def function(*variables: Any) -> tuple[Tensors, ...]:
            return self.step(state, step, x, y, *variables)

        _, pull = vjp(function, state.ordinary, state.velocity, A, B, weights)
        new_A = {name: after.A[name][:, m:] for name, m in count.items()}
        new_B = {name: after.B[name][:, m:] for name, m in count.items()}
        ordinary, velocity, A, B, weight = vmap(pull)(
            (after.ordinary, after.velocity, new_A, new_B)
        )
        A = {name: after.A[name][:, :m] + A[name] for name, m in count.items()}
        B = {name: after.B[name][:, :m] + B[name] for name, m in count.items()}
        return Adjoint(ordinary, velocity, A, B), weight

    def step(
        self,
        state: State,
        step: int,
        x: Tensor,
        y: Tensor,
        ordinary: Tensors,
        velocity: Tensors,
        A: Tensors,
        B: Tensors,
        weights: Tensor,
    ) -> tuple[Tensors, Tensors, Tensors, Tensors]:
        """Ordinary parameters and velocities after a step, and A and B of the rows that it
        appends."""
        rows = self._rows(state, A, B)
        probes = {
            name: A[name].new_zeros(len(x), layer.r_out) for name, layer in self.layers.items()
        }

        def objective(ordinary: Tensors, probes: Tensors) -> tuple[Tensor, Tensors]:
            out, received = self._run(ordinary, rows, probes, x)
            return batch_loss(self.loss(out, y), weights, len(x), self.average), received

        (gradient, at_outputs), received = grad(objective, argnums=(0, 1), has_aux=True)(
            ordinary, probes
        )
        new_A, new_B = {}, {}
        for name, layer in self.layers.items():
            new_B[name], s = direction(received[name])
            new_A[name] = at_outputs[name] * output_scale(s, layer.layernorm)
        gradient, new_A = self._clipped(gradient, new_A, new_B)
        moved, velocities = dict(ordinary), {}
        for name in ordinary:
            if name not in self.frozen:
                rate = self.record.rates_at(step)[self.groups[name]]
                moved[name], buffer = _sgd(ordinary[name], gradient[name], velocity.get(name), rate)
                if buffer is not None:
                    velocities[name] = buffer
        return moved, velocities, new_A, new_B

    def outputs(self, last: State, ordinary: Tensors, A: Tensors, B: Tensors, x: Tensor) -> Tensor:
        """What the network after the last step gives for `x`, with these parameters and rows."""
        return self._run(ordinary, self._rows(last, A, B), {}, x)[0]

    def _clipped(self, gradient: Tensors, A: Tensors, B: Tensors) -> tuple[Tensors, Tensors]:
        """What `clip_grad_norm_` does, as a function that can be differentiated."""
        record = self.record
        if record.clip is None:
            return gradient, A
        norms = {
            ("ordinary", name): _length(value)
            for name, value in gradient.items()
            if name not in self.frozen
        }
        for name in A:
            inner = (row_kernel(B[name] @ B[name].mT) * (A[name] @ A[name].mT)).sum()
            norms["rows", name] = _root(inner)
        total = _length(torch.stack(list(norms.values())))

        def factor(kind: str, name: str) -> Tensor:
            norm = norms[kind, name] if record.per_param else total
            return (record.clip / (norm + 1e-6)).clamp(max=1)

        gradient = {
            name: value if name in self.frozen else value * factor("ordinary", name)
            for name, value in gradient.items()
        }
        return gradient, {name: value * factor("rows", name) for name, value in A.items()}

    def _rows(self, state: State, A: Tensors, B: Tensors) -> Tensors:
        """The rows of all layers that append some, under the names of their parameters."""
        found = {}
        for name in self.layers:
            found |= {
                f"{name}.A": A[name],
                f"{name}.Amult": state.Amult[name],
                f"{name}.B": B[name],
            }
        return found

    def _run(
        self, ordinary: Tensors, rows: Tensors, probes: Tensors, x: Tensor
    ) -> tuple[Tensor, Tensors]:
        """Outputs [b o] with `probes` added to those of layers of rows, and what these received."""
        received: Tensors = {}

        def hook_of(name: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
                if name in received or args[0].ndim != 2:
                    raise ValueError(
                        f"{name} runs more than once, or on more than [b r]; influence "
                        "differentiates through networks in which each layer of rows runs once"
                    )
                received[name] = args[0]
                return out + probes[name] if name in probes else out

            return hook

        handles = [
            layer.register_forward_hook(hook_of(name)) for name, layer in self.layers.items()
        ]
        try:
            out = functional_call(self.net, ordinary | rows, (x,))
        finally:
            for handle in handles:
                handle.remove()
        return out, received


def _sgd(
    value: Tensor, gradient: Tensor, buffer: Tensor | None, rate: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """A parameter after a step of SGD, and its velocity where there is momentum."""
    change = gradient + rate["weight_decay"] * value
    if not rate["momentum"]:
        return value - rate["lr"] * change, None
    if buffer is None:
        buffer = change
    else:
        buffer = rate["momentum"] * buffer + (1 - rate["dampening"]) * change
    change = change + rate["momentum"] * buffer if rate["nesterov"] else buffer
    return value - rate["lr"] * change, buffer


def _length(value: Tensor) -> Tensor:
    return _root(value.square().sum())


def _root(value: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1).sqrt(), 0)


def _joined(parts: list[Tensors]) -> Tensors:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
