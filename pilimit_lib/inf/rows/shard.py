"""Rows of π-layers spread over the processes of a `torch.distributed` group: beyond the memory of
one machine.

Every rank runs the same program on the same batch. Row n of a layer lives on rank n mod k, so
shares stay within one row of each other; each rank sums over its own rows, and the sums [b o] and
gradients [b r] are all-reduced. Everything else (input layer, biases, pending rows) is the same on
every rank and stays so. Gloo on CPUs, NCCL on GPUs (not yet run there).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ...core import follow, snapshot
from ...core.collectives import collected, gathered, sum_
from .layer import row_layers
from .parameter import ROWS
from .pending import Rows
from .storage import rows_elsewhere as without_rows

MOMENTUM = "momentum_buffer"


@dataclass(eq=False)
class Shard:
    """A rank's share of one layer: `total` counts the rows of all ranks."""

    group: Any
    total: int

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    def count(self, total: int) -> int:
        """How many of the first `total` rows are here."""
        return (total - self.rank + self.size - 1) // self.size

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, the same bits on each."""
        return sum_(tensor.contiguous(), self.group)

    def share(self, rows: Rows) -> Rows:
        """Those of the rows about to be appended that belong here."""
        numbers = torch.arange(self.total, self.total + len(rows), device=rows.A.device)
        mine = (numbers % self.size == self.rank).nonzero().squeeze(1)
        return rows[mine]

    def check(self, rows: Rows, held: int) -> None:
        """Raise unless all ranks are about to append these `rows`; `held` is how many are here now.

        Ranks that were fed different batches would all go on, each with another network.
        """
        if held != self.count(self.total):
            raise RuntimeError(
                f"rank {self.rank} holds {held} rows of {self.total}, not every {self.size}th: "
                "rows of a sharded "
                "layer were removed or set. Call gather_rows first, edit, and shard_rows again"
            )
        mine = torch.cat(
            [
                torch.tensor([len(rows)], dtype=torch.float64, device=rows.A.device),
                *map(_marks, (rows.A, rows.B)),
            ]
        )
        for rank, other in enumerate(gathered(mine, self.group)):
            # Inputs are the same on all ranks, but machines of different kinds may round
            # differently.
            if not torch.allclose(other, mine, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise RuntimeError(
                    f"ranks {self.rank} and {rank} are about to append different rows "
                    f"({mine.tolist()} and {other.tolist()}: number, size and projections of A and "
                    "B); with "
                    "sharded rows every rank runs on the same batch"
                )

    def __deepcopy__(self, memo: dict) -> Shard:
        return Shard(self.group, self.total)  # a group is a connection, which can't be copied


def _marks(values: Tensor) -> Tensor:
    """Numbers by which different `values` [b n] are told apart: log of their size, and four
    projections relative to it.

    Sums would not do: gradients of a softmax sum to zero whatever the labels are.
    """
    values = values.double()
    size = torch.linalg.vector_norm(values)
    # cos(k²) looks random, and is the same on every rank.
    left, right = (
        torch.arange(1, 4 * n + 1, device=values.device).double().square_().cos_().view(4, n)
        for n in values.shape
    )
    projections = ((left @ values) * right).sum(1) / torch.where(size > 0, size, 1)
    return torch.cat([size.log().clamp_min(-1e3)[None], projections])


@torch.no_grad()
def shard_rows(
    model: nn.Module, group: Any = None, optimizer: Optimizer | None = None
) -> nn.Module:
    """Keep only this rank's share of the rows of every π-layer in `model`, from now on; returns the
    model.

    Call it on every rank of `group` (default: all processes), on the same network. Then train as in
    one process, with the same batch on every rank. `len(layer)` is then the number of rows here,
    `layer.shard.total` that of all ranks. What needs all rows (state_dict, sample, compress,
    moments) asks for `gather_rows` first; checkpoints are written by `save_rows`.

    A rank that ends makes the others raise. One that hangs does so after the timeout given to
    `init_process_group`.

    Args:
        optimizer: whose momentum per row is to be shared out too, if it has any yet.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "shard_rows needs a process group: call torch.distributed.init_process_group(...) on "
            "every rank first"
        )
    layers = {name: layer for name, layer in row_layers(model) if layer.shardable}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer that keeps rows (InfPiLinearReLU), so there is "
            "nothing to shard"
        )
    for name, layer in layers.items():
        if layer.shard is not None:
            raise RuntimeError(f"the rows of '{name}' are sharded already")
        if layer.limits is not None:
            raise ValueError(
                f"'{name}' has a row_budget or merge, which fold and sum rows that may lie on "
                "other ranks; "
                "shard layers without them"
            )
        if layer.pending.parts:
            raise RuntimeError(f"'{name}' has pending rows; step or zero_grad() first")
    _check_same_network(model, Shard(group, 0))
    for layer in layers.values():
        shard = Shard(group, len(layer))
        first = min(shard.rank, len(layer))  # a layer may have fewer rows than there are ranks
        change = layer.axis.keep(torch.arange(first, len(layer), shard.size, device=layer.device))
        if optimizer is not None:
            follow(optimizer, change)
        layer.shard = shard
    return model


@torch.no_grad()
def gather_rows(model: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
    """The opposite of `shard_rows`: every rank holds all rows again, in their order. Call it on
    every rank."""
    for _, layer in row_layers(model):
        shard = layer.shard
        if shard is None:
            continue
        for name in (*ROWS, "origin"):
            blocks = layer.row_storage(name)
            state = {"": blocks.dense()} if name in ("Amult", "origin") else blocks.state()
            blocks.load_state({suffix: _whole(value, shard) for suffix, value in state.items()})
        velocity = {} if optimizer is None else optimizer.state.get(layer.Amult, {})
        if isinstance(velocity.get(MOMENTUM), Tensor):
            velocity[MOMENTUM] = _whole(velocity[MOMENTUM], shard)
        layer.shard = None
    return model


@torch.no_grad()
def sharded_snapshot(
    model: nn.Module, optimizer: Optimizer | None = None, **extras: Any
) -> dict[str, Any]:
    """`core.snapshot` of a network whose rows are sharded, as one process would take it, on the
    first rank; on the others it lacks the rows. Call it on every rank, which goes on holding its
    share.

    A network that is not sharded restores it (`core.restore`), and may then be sharded over any
    number of ranks. The first rank needs memory for all rows; `save_rows` needs it for none.
    """
    with without_rows():
        state = snapshot(model, optimizer, **extras)
    for name, layer in row_layers(model):
        shard, prefix = layer.shard, f"{name}." if name else ""
        if shard is None:
            raise RuntimeError(f"the rows of '{name}' are not sharded; use core.snapshot")
        momentum = state.get("optimizer", {"state": {}})["state"].get(prefix + "Amult", {})
        if isinstance(momentum.get(MOMENTUM), Tensor):
            momentum[MOMENTUM] = _whole(momentum[MOMENTUM], shard, collected)
        state["structure"][name] = {"rows": shard.total}
        for role in (*ROWS, "origin"):
            blocks = layer.row_storage(role)
            # what blocks know beside their rows belongs to those of this rank
            held = {"": blocks.dense()} if role in ("Amult", "origin") else blocks.state()
            for suffix, value in held.items():
                state["model"][prefix + role + suffix] = _whole(value, shard, collected)
    return state


def rows_elsewhere(model: nn.Module) -> int:
    """How many rows of `model` the other ranks hold."""
    sharded = [layer for _, layer in row_layers(model) if layer.shard is not None]
    return sum(layer.shard.total - len(layer) for layer in sharded)


def _whole(
    value: Tensor,
    shard: Shard,
    how: Callable[[Tensor, Any], list[Tensor] | None] = gathered,
) -> Tensor | None:
    """The tensor [total, …] whose every k-th slice, beginning with that of its rank, each rank
    holds. As bytes: of any dtype."""
    longest = -(-shard.total // shard.size)
    padded = value.new_zeros((longest, *value.shape[1:]))
    padded[: len(value)] = value
    found = how(padded.reshape(-1).view(torch.uint8), shard.group)
    if found is None:
        return None
    every = torch.stack([part.view(value.dtype).reshape(padded.shape) for part in found], dim=1)
    return every.reshape(-1, *value.shape[1:])[: shard.total].clone()


def _check_same_network(model: nn.Module, shard: Shard) -> None:
    """Ranks that start from different networks would never agree."""
    sums = [parameter.detach().double().sum() for parameter in model.parameters()]
    mine = torch.stack([total.to(sums[0].device) for total in sums])
    mine = torch.cat([mine, mine.new_tensor([sum(p.numel() for p in model.parameters())])])
    for rank, other in enumerate(gathered(mine, shard.group)):
        if not torch.allclose(other, mine, rtol=1e-9, atol=0, equal_nan=True):
            raise ValueError(
                f"ranks {shard.rank} and {rank} hold different networks; build them from one seed "
                "or checkpoint"
            )
