"""Many replays at once: a run trained again without each of many sets of samples, as one batch of
networks.

What small networks spend their time on is calls, not numbers, and all replays make the same calls;
so thirty of them take little longer than one. Index legend: k subsets, n samples, q queries.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import vmap
from tqdm import tqdm

from .record import RunRecord
from .retrain import Loss, cross_entropy_each, hidden, states
from .tape import Tape, require_appending, state_of


@torch.no_grad()
def replay_subsets(
    record: RunRecord,
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    left_out: Tensor,
    queries: Tensor,
    *,
    loss: Loss = cross_entropy_each,
    average: str = "kept",
    progress: bool | None = None,
) -> Tensor:
    """Outputs [k q o] for `queries` [q ...] of the networks that `replay` gives without the samples
    of each mask in `left_out` [k n], where n counts all samples of `x`.

    All k networks are in memory together, and of the run itself the parameters before each step.
    Raises ValueError where a batch of which nothing is left meets momentum or weight decay, as the
    steps of its network would then fall out of time with those of the others; use `replay` there.
    """
    if left_out.dtype != torch.bool or left_out.ndim != 2 or left_out.shape[1] != len(x):
        raise ValueError(
            f"left_out is {left_out.dtype} {list(left_out.shape)}; masks [k, {len(x)}] were "
            "expected, one entry for each sample"
        )
    work = copy.deepcopy(net)
    require_appending(work)
    path = [
        state_of(trained, optimizer)
        for trained, optimizer in states(record, work, x, y, loss, average, progress)
    ]
    tape = Tape(work, record, loss, average)
    k, weights = len(left_out), (~left_out).to(x)

    def copies(value: Tensor) -> Tensor:
        return value.expand(k, *value.shape).clone()

    start = path[0]
    ordinary = {name: copies(value) for name, value in start.ordinary.items()}
    velocity = {name: copies(value) for name, value in start.velocity.items()}
    A = {name: copies(value) for name, value in tape.A.items()}
    B = {name: copies(value) for name, value in tape.B.items()}
    for step in tqdm(range(len(record)), desc="replays", disable=hidden(progress), leave=False):
        ids, rows = record.ids[step], {n: len(v) for n, v in path[step].Amult.items()}
        mine = weights[:, ids]
        alive = mine.any(1)
        if not alive.all():
            _require_plain(record, step)
        each = vmap(partial(tape.step, path[step], step, x[ids], y[ids]))
        mine = torch.where(alive[:, None], mine, 1)  # what comes of it is not used
        moved, velocity, new_A, new_B = each(
            ordinary,
            velocity,
            {name: A[name][:, : rows[name]] for name in A},
            {name: B[name][:, : rows[name]] for name in B},
            mine,
        )
        ordinary = {
            name: torch.where(_like(alive, value), value, ordinary[name])
            for name, value in moved.items()
        }
        for name, value in new_A.items():
            place = slice(rows[name], rows[name] + len(ids))
            A[name][:, place] = torch.where(_like(alive, value), value, 0)  # a row of no effect
            B[name][:, place] = new_B[name]
    return vmap(partial(tape.outputs, path[-1]), in_dims=(0, 0, 0, None))(ordinary, A, B, queries)


def _like(alive: Tensor, value: Tensor) -> Tensor:
    """[k] as [k 1 ... 1], to go with a value [k ...]."""
    return alive.reshape(-1, *[1] * (value.ndim - 1))


def _require_plain(record: RunRecord, step: int) -> None:
    if any(group["momentum"] or group["weight_decay"] for group in record.rates_at(step)):
        raise ValueError(
            f"nothing is left of the batch of step {step} in one of the subsets, and there is "
            "momentum or weight decay; use replay for each subset"
        )
