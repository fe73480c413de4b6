"""What happened in a run, in order: losses, edits, denials, checkpoints. One JSON object a line,
only ever appended.

Training that goes on from a checkpoint is a new *branch*; each event carries its branch, and each
branch the checkpoint that it grew out of, so that the curves of a whole tree can be drawn.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Journal:
    """Events in memory and, where there is a folder, in its `journal.jsonl`."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.events = read_journal(path) if path is not None else []
        self.branch = max((event["branch"] for event in self.events), default=-1)
        self._begun = False
        self._after: int | None = None

    def fork(self, after: int | None) -> None:
        """What follows grows out of checkpoint `after` (None: a fresh start)."""
        self._begun, self._after = False, after

    def begin(self) -> int:
        """The number of the present branch, which begins now if nothing was written on it yet."""
        if not self._begun:
            self._append(
                {
                    "kind": "branch",
                    "branch": self.branch + 1,
                    "after": self._after,
                    "time": time.time(),
                }
            )
            self._begun, self.branch = True, self.branch + 1
        return self.branch

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event."""
        self.begin()
        self._append({"kind": kind, "branch": self.branch, "time": time.time(), **fields})

    def _append(self, event: dict[str, Any]) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                size, line = file.tell(), json.dumps(event).encode() + b"\n"
                try:
                    if file.write(line) != len(line):
                        raise OSError("only part of a line fitted")
                except OSError as error:
                    file.truncate(size)
                    raise OSError(
                        f"the journal {self.path} could not be written: {error}"
                    ) from error
        self.events.append(event)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All events of a file. A last line without an end was cut off by a kill; it is removed, so
    that the next starts clean."""
    if not path.is_file():
        return []
    whole = path.read_bytes()
    complete = whole[: whole.rfind(b"\n") + 1]
    if complete != whole:
        with path.open("rb+") as file:
            file.truncate(len(complete))
    try:
        return [json.loads(line) for line in complete.decode().splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a journal of the lab: {error}") from error
