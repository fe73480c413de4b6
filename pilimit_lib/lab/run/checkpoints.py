"""Checkpoints as a tree: one file each, an index beside them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...core import load, save
from ...core.files import write_json
from ..errors import NotFound

HASHES = ("structure", "data", "settings")


class CheckpointManager:
    """The checkpoints of one run: `folder/00000.pt`, ... and `folder/index.json`. `print` shows the
    tree.

    Each entry names its parent, the moment (`age` in samples, `steps`), and hashes of structure,
    data state and settings: equal hashes mean that two checkpoints differ in the learned values
    only.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.current: int | None = None
        self.entries: dict[int, dict[str, Any]] = {}
        if self.index.is_file():
            try:
                self.entries = {entry["id"]: entry for entry in json.loads(self.index.read_text())}
            except (json.JSONDecodeError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{self.index} is damaged and not read as an index of checkpoints: {error}"
                ) from error

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
            known = f"there are {sorted(self.entries)}" if self.entries else "there are none yet"
            raise NotFound(f"no checkpoint {checkpoint_id!r} in {self.folder}; {known}")
        return self.entries[checkpoint_id]

    def path(self, checkpoint_id: int) -> Path:
        """The checkpoint's file."""
        return self.folder / f"{checkpoint_id:05d}.pt"

    def dump(self, state: dict[str, Any], **description: Any) -> int:
        """Write a checkpoint as child of the current one and make it current; returns its id."""
        new = max(self.entries, default=-1) + 1
        entry = {"id": new, "parent": self.current, "time": time.time(), **description}
        try:
            save(state, self.path(new))
            try:
                write_json(self.index, [*self.entries.values(), entry])
            except BaseException:
                self.path(new).unlink(missing_ok=True)
                raise
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"checkpoint {new} could not be written to {self.folder} ({error}); "
                "no file was left and the experiment is as before"
            ) from error
        self.entries[new] = entry
        self.current = new
        return new

    def read(self, checkpoint_id: int) -> dict[str, Any]:
        """The stored state. Nothing in the file is executed."""
        self.entry(checkpoint_id)
        return load(self.path(checkpoint_id))

    def ancestors(self, checkpoint_id: int) -> list[int]:
        """The checkpoint and what it descends from, youngest first."""
        line = [checkpoint_id]
        while (parent := self.entry(line[-1])["parent"]) is not None:
            line.append(parent)
        return line

    def lines(self) -> list[tuple[int, dict[str, Any]]]:
        """Depth and entry of every checkpoint, in the order in which a tree is read."""

        def below(parent: int | None, depth: int) -> Iterator[tuple[int, dict[str, Any]]]:
            for entry in self.entries.values():
                if entry["parent"] == parent:
                    yield depth, entry
                    yield from below(entry["id"], depth + 1)

        return list(below(None, 0))

    def __str__(self) -> str:
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
