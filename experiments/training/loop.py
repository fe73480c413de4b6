"""The loop of every training run: epochs of steps, their sums, the bar, checkpoints and tables,
interruption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pilimit_lib.core import restore, rng_state, set_rng_state
from pilimit_lib.core.collectives import counted

from .distributed import ALONE, Ranks
from .process import (
    Interrupted,
    human_bytes,
    interruptible,
    place_of,
    shows_bars,
)
from .run_folder import Records, RunFolder

BAR_TEXT_EVERY = 20  # steps between two texts beside the bar
DRAW_EVERY = (
    60.0  # seconds between two drawings of the curves: on small data they are what takes time
)


class Trainer:
    """The state of a run between two steps: everything that a checkpoint holds.

    A command's own trainer says what a `step` does, and what is recorded of an epoch. `batches` is
    what an epoch goes through: it has a length, knows how many it has `done` in the epoch begun,
    and, asked again after an interruption, gives what is left.
    """

    clocks: dict[str, Callable[[], float]] = {"seconds": time.perf_counter}
    counts: dict[str, float] = {"loss": 0.0, "correct": 0, "seen": 0}
    header = ""
    note = ""  # what else to say about a run before its table
    ranks: Ranks = ALONE  # the processes that train together
    whole_batches = False  # whether a layer has to see all samples of a batch
    plain_steps = True  # whether a step is a pass forward and one backward through the network
    remedy = "lower --lr, or bound the gradients with --gclip"  # of a run that diverges

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        batches: Iterable,
        epochs: int,
        title: str,
    ) -> None:
        self.net, self.optimizer, self.scheduler = net, optimizer, scheduler
        self.batches, self.epochs, self.title = batches, epochs, title
        self.epoch = 0
        self.exchanged = 0.0  # bytes that a process received per step of this epoch
        self.records: Records = []
        self.sums = self.zeros()

    # What a command's trainer says

    def step(self, *batch: Any) -> None:
        """Learn from one of `batches`, and add to `sums`."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """What there is to say about the epoch that has just ended; JSON's types."""
        raise NotImplementedError

    def row(self, record: dict[str, Any]) -> str:
        """A record as a line of the table under `header`."""
        raise NotImplementedError

    @property
    def may_stop(self) -> bool:
        """Whether a run can be interrupted after this step."""
        return True

    def progress(self) -> str:
        """The text beside the bar."""
        seen = max(self.sums["seen"], 1)
        loss, accuracy = self.sums["loss"] / seen, 100 * self.sums["correct"] / seen
        return f"loss {loss:.4f}, acc {accuracy:.1f} %"

    def write(self, folder: RunFolder) -> None:
        """The tables so far."""
        folder.write_metrics(self.records)

    def draw(self, folder: RunFolder) -> None:
        """The curves so far."""
        folder.draw_curves(pd.DataFrame(self.records), self.title)

    def extras(self) -> dict[str, Any]:
        """What a checkpoint holds beside network, optimiser, schedule, epoch, sums and random
        state."""
        return {"records": self.records, "batches": self.batches.state()}

    def load_extras(self, extras: dict[str, Any]) -> None:
        self.records = extras["records"]
        self.batches.load_state(extras["batches"])

    def scalars(self) -> dict[str, float]:
        """What of the newest record a log outside of this library can show: its numbers."""
        return {
            name: value
            for name, value in self.records[-1].items()
            if isinstance(value, int | float) and name not in ("epoch", "seed")
        }

    def about(self) -> str:
        """What is trained, in a line before the table."""
        parameters = sum(p.numel() for p in self.net.parameters())
        note = f"; {self.note}" if self.note else ""
        return (
            f"{self.title}: {parameters:,} parameters at the start, on {place_of(self.net)}{note}"
        )

    # What all have in common

    def zeros(self) -> dict[str, float]:
        """The sums at the beginning of an epoch."""
        return self.counts | dict.fromkeys(self.clocks, 0.0)

    def run_epoch(self, stop: list[int], quiet: bool = True) -> bool:
        """Train what is left of the epoch; True unless interrupted between two steps."""
        total, before = len(self.batches), dict(self.sums)
        started = {name: clock() for name, clock in self.clocks.items()}
        bar = tqdm(
            total=total,
            initial=self.batches.done,
            desc=f"epoch {self.epoch + 1}/{self.epochs}",
            leave=False,
            disable=not shows_bars(quiet),
            mininterval=0.5,
        )
        with bar, counted() as traffic:
            for steps, batch in enumerate(self.batches, 1):
                counts = {name: self.sums[name] for name in self.counts}
                self.step(*batch)
                asked = self.ranks.after_step(self.sums, counts, stop)
                self.require_finite(self.sums["loss"], f"loss of step {self.batches.done}")
                for name, clock in self.clocks.items():
                    self.sums[name] = before[name] + clock() - started[name]
                self.exchanged = traffic.bytes / steps
                bar.update()
                if not bar.disable and self.batches.done % BAR_TEXT_EVERY == 0:
                    bar.set_postfix_str(self.progress())
                if asked and self.may_stop and self.batches.done < total:
                    return False
        self.end_epoch()
        return True

    def end_epoch(self) -> None:
        self.epoch += 1
        record = self.record() | self.ranks.record(self.exchanged)
        for name, value in record.items():
            self.require_finite(value, name)
        self.records.append(record)
        self.sums = self.zeros()

    def require_finite(self, value: Any, what: str) -> None:
        """Raise FloatingPointError where the run has diverged: what would follow is NaN. Looks into
        tensors, dicts and lists."""
        if isinstance(value, dict):
            for name, entry in value.items():
                self.require_finite(entry, name)
        elif isinstance(value, list | tuple):
            for entry in value:
                self.require_finite(entry, what)
        elif isinstance(value, Tensor) and value.is_floating_point():
            if not bool(value.isfinite().all()):
                raise FloatingPointError(f"{what} holds NaN or infinity")
        elif isinstance(value, float) and not math.isfinite(value):
            raise FloatingPointError(f"the {what} became {value}")

    def spread(self, ranks: Ranks) -> None:
        """Go on as one of the processes of `ranks`."""
        self.ranks = ranks.spread(self.net, self.optimizer, self.whole_batches, self.plain_steps)

    def state(self) -> dict[str, Any]:
        return self.ranks.snapshot(
            self.net,
            self.optimizer,
            epoch=self.epoch,
            sums=self.sums,
            scheduler=None if self.scheduler is None else self.scheduler.state_dict(),
            rng=rng_state(),
            **self.extras(),
        )

    def load_state(self, state: dict[str, Any]) -> None:
        extras = restore(self.net, state, self.optimizer)
        # a checkpoint may be older than one of the sums
        self.epoch, self.sums = extras["epoch"], self.zeros() | extras["sums"]
        self.load_extras(extras)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(extras["scheduler"])
        set_rng_state(extras["rng"])


def resume_from(trainer: Trainer, folder: RunFolder) -> None:
    """Bring the trainer to where the run in the folder stands."""
    state = folder.load()
    saved, here = (each["extras"]["scheduler"] for each in (state, trainer.state()))
    folder.check_schedule(saved, here)
    trainer.load_state(state)


def fit(
    trainer: Trainer,
    folder: RunFolder,
    *,
    quiet: bool = False,
    at_epoch: Callable[[Trainer, Path], None] | None = None,
    stop: list[int] | None = None,
) -> None:
    """Train to the last epoch, with a checkpoint, tables and a line after each.

    `at_epoch` is called with the trainer and the output folder before the first epoch, after each,
    and again where a run is resumed between two. Signals that asked for an end are added to `stop`.
    Raises Interrupted where the run is not whole, FloatingPointError where it diverges: the
    checkpoint before stays.
    """
    ranks = trainer.ranks
    quiet = quiet or not ranks.first
    if not quiet:
        # In one piece, so that a reader of the first line only, such as head, has gone by the next.
        lines = (trainer.about(), trainer.header, *map(trainer.row, trainer.records), "")
        print("\n".join(lines), end="", flush=True)
    with interruptible() as requests:
        _epochs(trainer, folder, requests, quiet, at_epoch)
        requests = ranks.agreed(requests)
    if stop is not None:
        stop += requests
    if ranks.size > 1 and not quiet:
        used = human_bytes(trainer.exchanged)
        print(f"{ranks.size} processes; each received {used} per step")
    if trainer.epoch < trainer.epochs:
        if ranks.first:
            print(f"stopped in epoch {trainer.epoch + 1}; go on with: {folder.resume_command}")
        raise Interrupted(requests[0])


def _epochs(
    trainer: Trainer,
    folder: RunFolder,
    stop: list[int],
    quiet: bool,
    at_epoch: Callable[[Trainer, Path], None] | None,
) -> None:
    """The epochs that are left, until a signal asks for an end."""
    ranks = trainer.ranks

    def called_at_epoch() -> None:
        at_epoch(trainer, folder.path)

    if trainer.records and ranks.first:
        trainer.write(folder)  # a run killed after its checkpoint may not have got to its tables
    if at_epoch is not None and not trainer.batches.done:
        ranks.alone(trainer.net, trainer.optimizer, called_at_epoch)
    drawn = time.monotonic()
    while trainer.epoch < trainer.epochs and not ranks.agreed(stop):
        number = trainer.epoch + 1
        try:
            finished = trainer.run_epoch(stop, quiet)
            state = trainer.state()
            ranks.all_do(partial(trainer.require_finite, state["model"], "network"))
        except FloatingPointError as error:
            kept = folder.checkpoint if folder.checkpoint.exists() else "nothing"
            raise FloatingPointError(
                f"{error}; {trainer.remedy}. It happened in epoch {number}; saved before it: {kept}"
            ) from error
        if ranks.first:
            folder.save(state)
        if finished:
            if ranks.first:
                trainer.write(folder)
            if at_epoch is not None:
                ranks.alone(trainer.net, trainer.optimizer, called_at_epoch)
            if not quiet:
                print(trainer.row(trainer.records[-1]), flush=True)
            if ranks.first and time.monotonic() - drawn > DRAW_EVERY:
                trainer.draw(folder)
                drawn = time.monotonic()
    if trainer.records and ranks.first:
        trainer.draw(folder)
