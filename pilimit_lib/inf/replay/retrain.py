"""A run trained again from its record, without some of its samples: what unlearning has to equal.

Deleting the rows that a sample made (`Provenance.remove`) is something else: every later step saw
what the sample had taught, and its rows stay as they are.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ...core import batch, load, restore, save, snapshot
from ..clip import clip_grad_norm_
from ..optim.sgd import PiSGD
from .record import RunRecord

Loss = Callable[[Tensor, Tensor], Tensor]
AVERAGES = ("kept", "batch")


def cross_entropy_each(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each sample [b]."""
    return F.cross_entropy(outputs, targets, reduction="none")


def replay(
    record: RunRecord,
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    without: Iterable[int] | Tensor = (),
    loss: Loss = cross_entropy_each,
    average: str = "kept",
    checkpoint: str | os.PathLike | None = None,
    every: int = 500,
    progress: bool | None = None,
) -> nn.Module:
    """The network that the run of `record` would have become without the samples `without`: trained
    again from its start, on the same batches in the same order, minus these.

    Args:
        net: the network of the run, or one of the same architecture; a copy of it is trained.
        x [n ...], y [n ...]: the data, by sample id: x[ids] was the batch.
        loss: (outputs [b o], targets [b ...]) to the loss of each sample [b].
        average: a batch's loss is the mean over those "kept" of it, or their sum divided by the
            size that the whole "batch" had. A batch of which nothing is left makes no step.
        checkpoint: a file to which the replay is saved after `every` steps, and from which it goes
            on where it exists; removed at the end.
        progress: True for a bar, None for one on terminals only.

    Random numbers (dropout, augmentation) are drawn anew. A run that recorded no clipping is
    replayed without any.
    """
    gone = excluded(record, without)
    trained = copy.deepcopy(net)
    optimizer = started(record, trained)
    first = 0
    if checkpoint is not None and Path(checkpoint).exists():
        first = _resumed(checkpoint, trained, optimizer, gone)
    weights = torch.ones(int(record.samples().max()) + 1 if len(record) else 0)
    weights[gone] = 0
    bar = tqdm(
        total=len(record), initial=first, desc="replay", disable=hidden(progress), leave=False
    )
    with bar:
        for step in range(first, len(record)):
            retrain_step(record, step, trained, optimizer, x, y, weights, loss, average)
            bar.update()
            if checkpoint is not None and (step + 1) % every == 0 and step + 1 < len(record):
                save(snapshot(trained, optimizer, step=step + 1, without=gone), checkpoint)
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    return trained


def excluded(record: RunRecord, without: Iterable[int] | Tensor) -> Tensor:
    """These samples as ids, after checking that the run learned from each."""
    gone = torch.as_tensor(list(without) if not isinstance(without, Tensor) else without)
    gone = gone.reshape(-1).long().unique()
    strange = gone[~torch.isin(gone, record.samples())]
    if len(strange):
        raise ValueError(
            f"the run did not learn from samples {strange[:10].tolist()}; it learned from "
            f"{len(record.samples())} others"
        )
    return gone


def started(record: RunRecord, net: nn.Module) -> PiSGD:
    """Bring `net` to the start of the run; the optimiser that it began with."""
    names = dict(net.named_parameters())
    groups = [
        {"params": [names[name] for name in group["params"]]}
        for group in record.start["optimizer"]["groups"]
    ]
    optimizer = PiSGD(groups, lr=1.0)
    restore(net, record.start, optimizer)
    return optimizer


def retrain_step(
    record: RunRecord,
    step: int,
    net: nn.Module,
    optimizer: PiSGD,
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    loss: Loss,
    average: str,
) -> bool:
    """Step `step` of the run with a weight for each sample; whether there was one."""
    ids = record.ids[step]
    kept = ids[weights[ids] != 0]
    if not len(kept):
        return False
    for group, rates in zip(optimizer.param_groups, record.rates_at(step)):
        group.update(rates)
    optimizer.zero_grad()
    with torch.enable_grad(), batch(kept):
        each = loss(net(x[kept]), y[kept])
        total = batch_loss(each, weights[kept].to(each), len(ids), average)
    total.backward()
    if record.clip is not None:
        clip_grad_norm_(net, record.clip, record.per_param)
    optimizer.step()
    return True


def batch_loss(each: Tensor, weights: Tensor, size: int, average: str) -> Tensor:
    """The loss of a batch from those of its samples [b] and their weights [b]; `size`: of the whole
    batch."""
    if average not in AVERAGES:
        raise ValueError(f"average is {average!r}; 'kept' or 'batch' was expected")
    total = (weights * each).sum()
    return total / (weights.sum() if average == "kept" else size)


def states(
    record: RunRecord,
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    average: str,
    progress: bool | None = None,
) -> Iterator[tuple[nn.Module, PiSGD]]:
    """The network and its optimiser before each step of the run, and after the last; `net` itself
    is trained."""
    optimizer = started(record, net)
    weights = torch.ones(int(record.samples().max()) + 1)
    steps = tqdm(range(len(record)), desc="replay", disable=hidden(progress), leave=False)
    for step in steps:
        yield net, optimizer
        retrain_step(record, step, net, optimizer, x, y, weights, loss, average)
    yield net, optimizer


def hidden(progress: bool | None) -> bool | None:
    """What tqdm calls `disable`; its None means: unless on a terminal."""
    return None if progress is None else not progress


def _resumed(path: str | os.PathLike, net: nn.Module, optimizer: PiSGD, gone: Tensor) -> int:
    """The step to go on with from a checkpoint."""
    state: dict[str, Any] = load(path)
    extras = state.get("extras", {})
    if not torch.equal(extras.get("without", torch.tensor(-1)), gone):
        raise ValueError(
            f"{path} is a checkpoint of a replay without other samples; remove it, or name another "
            "file"
        )
    restore(net, state, optimizer)
    return extras["step"]
