"""Checkpoints as a tree: one file each, an index beside them. Several processes may write to one
folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...core import load, save, write_json
from ..errors import NotFound
from .disk import locked, reason

HASHES = ("structure", "data", "settings")


class CheckpointManager:
    """The checkpoints of one run: `folder/00000.pt`, ... and `folder/index.json`. `print` shows the
    tree.

    Each entry names its parent, the moment (`age` in samples, `steps`), and hashes of structure,
    data state and settings: equal hashes mean that two checkpoints differ in the learned values
    only. Whoever else writes to the folder gets other ids, and is listed too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.current: int | None = None
        self.entries = read_index(self.index)

    @property
    def index(self) -> Path:
        """The file that lists the checkpoints."""
        return self.folder / "index.json"

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[int]:
        return iter(self.entries)

    def __contains__(self, checkpoint_id: int) -> bool:
        return checkpoint_id in self.entries

    def entry(self, checkpoint_id: int) -> dict[str, Any]:
        """What the index says about a checkpoint."""
        if checkpoint_id not in self.entries:
            self.entries = read_index(self.index)  # another process may have written it
        if checkpoint_id not in self.entries:
            known = f"there are {sorted(self.entries)}" if self.entries else "there are none yet"
            raise NotFound(f"no checkpoint {checkpoint_id!r} in {self.folder}; {known}")
        return self.entries[checkpoint_id]

    def path(self, checkpoint_id: int) -> Path:
        """The checkpoint's file."""
        return self.folder / f"{checkpoint_id:05d}.pt"

    def dump(self, state: dict[str, Any], **description: Any) -> int:
        """Write a checkpoint as child of the current one and make it current; returns its id."""
        new = None
        try:
            new = self._claim()
            entry = {"id": new, "parent": self.current, "time": time.time(), **description}
            save(state, self.path(new))
            with locked(self.folder):
                entries = read_index(self.index)
                write_json(self.index, [*entries.values(), entry])
        except BaseException as error:
            if new is not None:
                self.path(new).unlink(missing_ok=True)
            if not isinstance(error, OSError | RuntimeError):
                raise
            raise OSError(
                f"checkpoint {'' if new is None else new} could not be written to {self.folder} "
                f"({reason(error)}); no file was left and the experiment is as before"
            ) from error
        self.entries = {**entries, new: entry}
        self.current = new
        return new

    def _claim(self) -> int:
        """An id that nobody else has: its file is created here, empty, and must not exist yet. The
        files count too, since a process may have been killed between file and index."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files = (int(path.stem) for path in self.folder.glob("*.pt") if path.stem.isdecimal())
        new = 1 + max([*read_index(self.index), *files], default=-1)
        while True:
            try:
                os.close(os.open(self.path(new), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                return new
            except FileExistsError:
                new += 1

    def read(self, checkpoint_id: int) -> dict[str, Any]:
        """The stored state. Nothing in the file is executed."""
        self.entry(checkpoint_id)
        path = self.path(checkpoint_id)
        try:
            return load(path)
        except FileNotFoundError:
            raise
        except OSError as error:  # torch's reader of archives says so of many torn files
            raise ValueError(f"{path} is damaged or cannot be read: {error}") from error

    def ancestors(self, checkpoint_id: int) -> list[int]:
        """The checkpoint and what it descends from, youngest first."""
        line, parent = [], self.entry(checkpoint_id)["id"]
        while parent in self.entries:
            line.append(parent)
            parent = self.entries[parent]["parent"]
        return line

    def lines(self) -> list[tuple[int, dict[str, Any]]]:
        """Depth and entry of every checkpoint, in the order in which a tree is read."""
        children: dict[int | None, list[int]] = {}
        for number, entry in sorted(self.entries.items(), reverse=True):
            parent = entry["parent"] if entry["parent"] in self.entries else None
            children.setdefault(parent, []).append(number)
        found, open_ends = [], [(0, number) for number in children.get(None, [])]
        while open_ends:
            depth, number = open_ends.pop()
            found.append((depth, self.entries[number]))
            open_ends.extend((depth + 1, child) for child in children.get(number, []))
        return found

    def __str__(self) -> str:
        self.entries = read_index(self.index)
        if not self.entries:
            return f"no checkpoints yet in {self.folder}"
        rows = [f"{len(self)} checkpoints in {self.folder}"]
        for depth, entry in self.lines():
            mark = "*" if entry["id"] == self.current else " "
            hashes = [f"{key} {entry[key]}" for key in HASHES if key in entry]
            name = f"{mark} {'  ' * depth}{entry['id']}"
            row = [name, f"age {entry.get('age', '?')}", *hashes, entry.get("note", "")]
            rows.append("  ".join(row).rstrip())
        return "\n".join(rows)

    __repr__ = __str__


def read_index(path: Path) -> dict[int, dict[str, Any]]:
    """The entries of an index by id. One that could not have been written here is named and not
    read: a parent is older than its child, so following parents comes to an end."""
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, list):
            raise TypeError(f"a list was expected, got {type(entries).__name__}")
        found: dict[int, dict[str, Any]] = {}
        for entry in entries:
            number, parent = entry["id"], entry["parent"]
            if type(number) is not int or number < 0 or number in found:
                raise ValueError(f"the id {number!r} is not a new number from 0 on")
            if parent is not None and (type(parent) is not int or not 0 <= parent < number):
                raise ValueError(f"checkpoint {number} cannot descend from {parent!r}")
            for key, kind in (("note", str), ("branch", int), ("age", int), ("steps", int)):
                if not isinstance(entry.get(key, kind()), kind):
                    raise TypeError(f"'{key}' of checkpoint {number} is {entry[key]!r}")
            found[number] = entry
        return found
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged and not read as an index of checkpoints: {error}; move it away to "
            "begin a new one (the checkpoints beside it keep their numbers)"
        ) from error
