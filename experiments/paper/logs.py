"""The logs of named runs: what a run's folder says, as one small CSV file per run and seed.

# python -m experiments.cifar10.cifar10mlp ... --seed 0
# epoch 23 of 50, unfinished
epoch,train_loss,train_acc,held_out_loss,held_out_acc,test_loss,test_acc,lr,rows,bytes,seconds
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pilimit_lib.core import write_text

from .commands import COMMANDS, planned_epochs
from .runs import RUNS, Run

LOGS = Path(__file__).with_name("logs")
NAME = re.compile(r"(?P<name>.+)-(?P<seed>\d+)")
DIGITS = 6  # of what is not a whole number


@dataclass(frozen=True)
class Log:
    """What one run with one seed has logged: a table with a row per epoch (kernels: per ridge), and
    how many epochs it was to have (0: none)."""

    run: Run
    seed: int
    command: str
    frame: pd.DataFrame

    @property
    def epochs(self) -> int:
        return planned_epochs(self.run)

    @property
    def last_epoch(self) -> int:
        return int(self.frame.epoch.max()) if "epoch" in self.frame else 0

    @property
    def finished(self) -> bool:
        """All epochs are there, and what was learned has been tested."""
        return self.last_epoch >= self.epochs and "test_acc" in self.frame

    @property
    def state(self) -> str:
        """As the page and the head of the file say it."""
        if not self.epochs:
            return "finished"
        ending = "finished" if self.finished else "unfinished"
        return f"epoch {self.last_epoch} of {self.epochs}, {ending}"


def folder_of(output: Path, run: Run, seed: int) -> Path:
    """Where a run with a seed writes."""
    return output / f"{run.name}-{seed}"


def command_line_of(run: Run, seed: int) -> str:
    """What makes the run; --data, folders and the like are left out."""
    seeded = f" --seed {seed}" if COMMANDS[run.command].seeded else ""
    return f"python -m experiments.{run.command} {run.flags}{seeded}"


def log_of_folder(output: Path, run: Run, seed: int) -> Log | None:
    """What the run in its folder has logged so far; None where it has nothing."""
    records = COMMANDS[run.command].records(folder_of(output, run, seed))
    if not records:
        return None
    return Log(run, seed, command_line_of(run, seed), pd.DataFrame(records))


def write_log(log: Log, logs: Path = LOGS) -> Path:
    """The log as a file; the one that was there before is replaced."""
    path = logs / f"{log.run.name}-{log.seed}.csv"
    table = log.frame.to_csv(index=False, float_format=f"%.{DIGITS}g", lineterminator="\n")
    logs.mkdir(parents=True, exist_ok=True)
    write_text(path, f"# {log.command}\n# {log.state}\n{table}")
    return path


def read_logs(logs: Path = LOGS, runs: Mapping[str, Run] = RUNS) -> list[Log]:
    """All logs in a folder. Raises ValueError where one is of no named run, or of other settings
    than the run has now."""
    return [_read(path, runs) for path in sorted(logs.glob("*.csv"))]


def _read(path: Path, runs: Mapping[str, Run]) -> Log:
    match = NAME.fullmatch(path.stem)
    if match is None or match["name"] not in runs:
        raise ValueError(f"{path} is the log of no named run; `list` names them")
    head, rest = _split(path.read_text(encoding="utf-8"))
    run, seed = runs[match["name"]], int(match["seed"])
    expected = command_line_of(run, seed)
    if head[:1] != [expected]:
        raise ValueError(
            f"{path} is the log of other settings than {run.name} has now: {head[:1]}, expected "
            f"{expected!r}; run it again, or give that run a name of its own"
        )
    return Log(run, seed, expected, pd.read_csv(io.StringIO(rest)))


def _split(text: str) -> tuple[list[str], str]:
    """The lines of the head without their #, and the table."""
    lines = text.splitlines(keepends=True)
    head = [line[1:].strip() for line in lines if line.startswith("#")]
    return head, "".join(line for line in lines if not line.startswith("#"))


def collect(output: Path, logs: Path = LOGS, runs: Mapping[str, Run] = RUNS) -> list[Path]:
    """Write the logs of all named runs that have one under `output`; the files."""
    written = []
    for folder in sorted(path for path in output.glob("*-*") if path.is_dir()):
        match = NAME.fullmatch(folder.name)
        if match is not None and match["name"] in runs:
            log = log_of_folder(output, runs[match["name"]], int(match["seed"]))
            if log is not None:
                written.append(write_log(log, logs))
    return written
