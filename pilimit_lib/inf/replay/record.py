"""What a run must keep, so that it can be trained again without some of its samples.

Rows keep nearly all of it: which sample made each row, in the order of training, and their initial
rows, which no step changes. What they do not keep is what the ordinary parameters were at the
start, where batches began and ended, and the rates of each step. A `RunRecord` keeps these:

    at the start     a snapshot of the network and its optimiser (rows: the initial ones only)
    at each step     8 bytes for each sample of the batch; rates where they change

The states in between need not be kept: rows hold their own, and the others follow from a replay.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...core import current_ids, load, save, snapshot
from ..rows.parameter import InfPiParameter

FORMAT = 1
RATES = ("lr", "weight_decay", "momentum", "dampening", "nesterov")


@dataclass
class RunRecord:
    """How a run of SGD began, and what each of its steps learned from.

    `start` is a snapshot, `ids` the samples of each step in the order of the batch, `rates` those
    of each parameter group (by the step from which they hold), `clip` and `per_param` what
    `clip_grad_norm_` was called with before each step (None: it was not).
    """

    start: dict[str, Any]
    clip: float | None = None
    per_param: bool = False
    ids: list[Tensor] = field(default_factory=list)
    rates: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.ids)

    def samples(self) -> Tensor:
        """The samples that the run learned from, ascending."""
        return torch.cat(self.ids).unique() if self.ids else torch.empty(0, dtype=torch.long)

    def rates_at(self, step: int) -> list[dict[str, Any]]:
        """The rates of each group in a step."""
        return self.rates[max(since for since in self.rates if since <= step)]

    def nbytes(self) -> int:
        """Memory of all tensors."""
        return sum(tensor.nbytes for tensor in _tensors(self.state()))

    def state(self) -> dict[str, Any]:
        """Plain tensors and builtins, for `core.save`."""
        return {
            "record": FORMAT,
            "start": self.start,
            "clip": self.clip,
            "per_param": self.per_param,
            "ids": torch.cat(self.ids) if self.ids else torch.empty(0, dtype=torch.long),
            "sizes": [len(ids) for ids in self.ids],
            "rates": self.rates,
        }

    def save(self, path: str | os.PathLike) -> None:
        """Write the record to `path`, whole or not at all."""
        save(self.state(), path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> RunRecord:
        """Read what `save` wrote; nothing in the file is executed."""
        state = load(path)
        if not isinstance(state, Mapping) or state.get("record") != FORMAT:
            raise ValueError(f"{path} holds no record of a run (RunRecord.save) of this format")
        return cls(
            state["start"],
            state["clip"],
            state["per_param"],
            list(state["ids"].split(state["sizes"])),
            state["rates"],
        )


class Recorder:
    """Keeps the record of a run, from now on: `recorder.record` is complete after every step.

    Forward passes that train must run inside `with batch(ids)`. Works with any network, and SGD
    (`PiSGD` or torch's). Costs nothing but what the record keeps; `close()`, or the end of a
    `with`, ends it.

    Args:
        clip, per_param: what `clip_grad_norm_(net, clip, per_param)` is called with before each
            step, if it is.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Optimizer,
        clip: float | None = None,
        per_param: bool = False,
    ) -> None:
        if not isinstance(optimizer, torch.optim.SGD):
            raise TypeError(
                f"the steps of {type(optimizer).__name__} are not recorded: PiSGD or "
                "torch.optim.SGD was expected"
            )
        self.net, self.optimizer = net, optimizer
        self.record = RunRecord(snapshot(net, optimizer), clip, per_param)
        self._batch: list[Tensor] = []
        self._handles = [
            net.register_forward_pre_hook(self._see),
            optimizer.register_step_pre_hook(self._keep),
        ]

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Record no more steps."""
        for handle in self._handles:
            handle.remove()

    def _see(self, net: nn.Module, args: tuple[Any, ...]) -> None:
        ids = current_ids()
        if torch.is_grad_enabled() and ids is not None:
            self._batch.append(ids.cpu().clone())

    def _keep(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if len(self._batch) != 1:
            raise RuntimeError(
                f"a step after {len(self._batch)} forward passes inside `with batch(ids)`; one was "
                "expected, with all samples of the step (name the samples of every training pass, "
                "and run others under torch.no_grad())"
            )
        rates = [{name: group[name] for name in RATES} for group in optimizer.param_groups]
        record = self.record
        if not record.rates or record.rates_at(len(record)) != rates:
            record.rates[len(record)] = rates
        record.ids.append(self._batch.pop())


def ordinary_parameters(net: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that are no rows, by name."""
    return {
        name: parameter.detach().clone()
        for name, parameter in net.named_parameters()
        if not isinstance(parameter, InfPiParameter)
    }


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)
