"""Training in several processes: what a command does otherwise under `torchrun`.

    torchrun --nproc-per-node 2 -m experiments.cifar10.cifar10mlp --save-dir DIR

Every process runs the command. Batches are those of one process; of each, a process learns from its
share, and gradients are summed over all before clipping and the step. Where rows are sharded, or a
layer looks at a whole batch, every process goes through all of it instead. Rank 0 writes and
prints. In one process nothing here does anything.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from pilimit_lib.core import snapshot
from pilimit_lib.core.collectives import RankLost, explained, gathered, sum_
from pilimit_lib.inf import InputFactors, gather_rows, shard_rows, sum_gradients_
from pilimit_lib.inf.rows.layer import row_layers
from pilimit_lib.inf.rows.shard import sharded_snapshot

from .run_folder import RunFolder

TIMEOUT = timedelta(minutes=10)  # after which a process that hangs is given up
PATIENCE = timedelta(days=7)  # for what rank 0 does alone, such as regressions between epochs
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Ranks:
    """The processes that train one network, and how they do; by default there is one."""

    rank: int = 0
    size: int = 1
    patient: Any = None  # the group that waits for rank 0
    whole: bool = False  # whether each process goes through whole batches
    sharded: bool = False  # whether each holds a part of the rows
    inputs: InputFactors | None = None  # of the network that they train

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def shares(self) -> bool:
        """Whether this process sees a part of each batch only."""
        return self.size > 1 and not self.whole

    # A batch, and what is learnt from it

    def share(self, count: int) -> slice:
        """Which of `count` samples in a row this process goes through; none where they are too
        few."""
        if not self.shares:
            return slice(0, count)
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum_gradients(self, net: nn.Module) -> None:
        """Gradients of all processes as one, before they are clipped."""
        if self.shares:
            sum_gradients_(net, inputs=self.inputs)

    def total(self, values: list[float]) -> list[float]:
        """The sums over the shares of all processes, the same on each."""
        return _sums(values) if self.shares else values

    def joined(self, part: Tensor) -> Tensor:
        """What all processes computed of their shares [k …], in order."""
        if not self.shares:
            return part
        lengths = torch.cat(gathered(torch.tensor([len(part)]))).tolist()
        padded = part.new_zeros((max(lengths), *part.shape[1:]))
        padded[: len(part)] = part
        return torch.cat([found[:length] for found, length in zip(gathered(padded), lengths)])

    def mapped(self, function: Callable[[Any], Tensor], parts: list[Any]) -> Tensor:
        """The results [b …] of `function` for all parts as one tensor, each computed by one
        process."""
        if len(parts) < self.size:
            return torch.cat([function(part) for part in parts])
        mine = parts[self.share(len(parts))]
        return self.joined(torch.cat([function(part) for part in mine]))

    # The loop

    def after_step(
        self, sums: dict[str, float], before: dict[str, float], requests: list[int]
    ) -> list[int]:
        """Make `sums`, which a step has increased from what they were `before`, those of all
        processes; returns the signals that any was asked to stop by, which is the same on each."""
        if self.size == 1:
            return requests
        counted = self.shares or self.first
        added = [(sums[name] - before[name]) * counted for name in before]
        totals = _sums(added + _marks(requests))
        sums.update({name: before[name] + value for name, value in zip(before, totals)})
        return _marked(totals[len(before) :])

    def agreed(self, requests: list[int]) -> list[int]:
        """The signals that any process was asked to stop by."""
        return requests if self.size == 1 else _marked(_sums(_marks(requests)))

    def all_do(self, check: Callable[[], None]) -> None:
        """Raise FloatingPointError everywhere where `check` does in any process."""
        found = None
        try:
            check()
        except FloatingPointError as error:
            found = error
        failed = self.size > 1 and any(_sums([float(found is not None)]))
        if failed or found is not None:
            raise found or FloatingPointError("another process found NaN or infinity")

    def wait(self) -> None:
        """Until all processes are here, however long that takes."""
        if self.size > 1:
            with explained():
                dist.barrier(self.patient)

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """Rank 0 goes through the `with` before the others do, such as to fetch what all read."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    @contextmanager
    def taken(self, folder: RunFolder) -> Iterator[RunFolder]:
        """The folder of the run, which rank 0 takes before the others look into it."""
        if not self.first:
            self.wait()
            yield folder
            return
        with folder:
            self.wait()
            yield folder

    # The network

    def spread(self, net: nn.Module, optimizer: Optimizer, whole: bool, plain: bool) -> Ranks:
        """These processes with the network in them, where a run begins or goes on. `whole`: whether
        a layer has to see the whole of a batch; `plain`: whether a step is a pass forward and one
        backward, which alone goes through rows that are shared out."""
        if self.size == 1:
            return self
        layers = [layer for _, layer in row_layers(net)]
        able = bool(layers) and all(layer.shardable and layer.limits is None for layer in layers)
        sharded = plain and able and not whole
        if sharded:
            shard_rows(net, optimizer=optimizer)
        whole = whole or sharded
        inputs = None if whole or not plain else InputFactors(net)
        return Ranks(self.rank, self.size, self.patient, whole, sharded, inputs)

    def snapshot(self, net: nn.Module, optimizer: Optimizer, **extras: Any) -> dict[str, Any]:
        """`core.snapshot`, as one process would take it; whole on rank 0."""
        return (sharded_snapshot if self.sharded else snapshot)(net, optimizer, **extras)

    def state_dict(self, net: nn.Module) -> dict[str, Any]:
        """Of one process; whole on rank 0."""
        return sharded_snapshot(net)["model"] if self.sharded else net.state_dict()

    def record(self, exchanged: float) -> dict[str, float]:
        """What several processes add to the record of an epoch."""
        return {} if self.size == 1 else {"processes": self.size, "exchanged": round(exchanged)}

    def held(self, count: int) -> int:
        """Bytes of rows in all processes together."""
        return int(_sums([float(count)])[0]) if self.sharded else count

    def alone(self, net: nn.Module, optimizer: Optimizer, work: Callable[[], None]) -> None:
        """Rank 0 does something with the whole network, and the others wait."""
        if self.sharded:
            gather_rows(net, optimizer)
        if self.first:
            work()
        self.wait()
        if self.sharded:
            shard_rows(net, optimizer=optimizer)


ALONE = Ranks()


@contextmanager
def processes() -> Iterator[Ranks]:
    """Inside the `with`, this process belongs to those that torchrun started, on Gloo, and NCCL for
    what lies on GPUs. A process that is lost ends the others with exit status 1."""
    if started() == 1:
        yield ALONE
        return
    backend = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(dist.get_rank(), dist.get_world_size(), patient)
    except RankLost as error:
        print(f"{error}\ngo on with --resume", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # an orderly end would wait for the process that is lost
    finally:
        dist.destroy_process_group()


def started() -> int:
    """How many processes torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_alone(what: str) -> None:
    """Raise where several processes would do the same."""
    if started() > 1:
        raise ValueError(
            f"{what} is done by one process, and torchrun has started {started()}; type python -m "
            "in place of torchrun"
        )


def _sums(values: list[float]) -> list[float]:
    return sum_(torch.tensor(values, dtype=torch.float64)).tolist()


def _marks(requests: list[int]) -> list[float]:
    return [float(number in requests) for number in SIGNALS]


def _marked(counts: list[float]) -> list[int]:
    return [int(number) for number, count in zip(SIGNALS, counts) if count]
