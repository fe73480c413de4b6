"""What happened in a run, in order: losses, edits, denials, checkpoints. One JSON object a line,
only ever appended.

Training that goes on from a checkpoint is a new *branch*; each event carries its branch, and each
branch the checkpoint that it grew out of, so that the curves of a whole tree can be drawn.
"""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from typing import Any

from .disk import LOCK_EX, flock, reason


class Journal:
    """Events in memory and, where there is a folder, in its `journal.jsonl`. Two experiments that
    share a folder are on different branches."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.events = read_journal(path) if path is not None else []
        self.branch = _last_branch(self.events)
        self._begun = False
        self._after: int | None = None

    def fork(self, after: int | None) -> None:
        """What follows grows out of checkpoint `after` (None: a fresh start)."""
        self._begun, self._after = False, after

    def begin(self) -> int:
        """The number of the present branch, which begins now if nothing was written on it yet."""
        if not self._begun:
            event = {"kind": "branch", "branch": 0, "after": self._after, "time": time.time()}
            self._append(event, begins=True)
            self._begun, self.branch = True, event["branch"]
        return self.branch

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event."""
        self._append({"kind": kind, "branch": self.begin(), "time": time.time(), **fields})

    def _append(self, event: dict[str, Any], begins: bool = False) -> None:
        if self.path is None:
            event["branch"] = self.branch + 1 if begins else event["branch"]
            self.events.append(event)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+", buffering=0) as file:
            flock(file, LOCK_EX)  # until it is closed: nobody else writes
            if begins:
                self.events = read_journal(self.path)
                event["branch"] = _last_branch(self.events) + 1
            line, size = json.dumps(event).encode() + b"\n", file.seek(0, 2)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # a kill cut the last line off; the next starts clean
                    file.seek(0)
                    size = file.truncate(file.read().rfind(b"\n") + 1)
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, "only part of a line fitted")
            except OSError as error:
                file.truncate(size)
                raise OSError(
                    f"the journal {self.path} could not be written: {reason(error)}"
                ) from error
        self.events.append(event)


def _last_branch(events: list[dict[str, Any]]) -> int:
    return max((event["branch"] for event in events), default=-1)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All events of a file, but for a last line that has no end: it is being written, or was cut
    off."""
    if not path.is_file():
        return []
    whole = path.read_bytes()
    try:
        lines = whole[: whole.rfind(b"\n") + 1].decode().split("\n")[:-1]
        events = [json.loads(line) for line in lines]
        for number, event in enumerate(events, start=1):
            if not isinstance(event["kind"], str) or type(event["branch"]) is not int:
                raise ValueError(f"line {number} is not an event")
        return events
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is not a journal of the lab, or is damaged: {error!r}") from error
