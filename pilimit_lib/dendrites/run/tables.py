"""What a run writes: CSV files always, pictures only when asked, one row per epoch appended rather
than rewritten."""

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ...core import write_bytes


@dataclass
class RunRows:
    """One row per epoch in memory; the same on disk when there is a folder."""

    epochs: list[dict] = field(default_factory=list)
    extras: list[dict] = field(default_factory=list)
    switches: list[dict] = field(default_factory=list)
    best: dict[str, dict] = field(default_factory=dict)  # by parameter count


COLUMNS = {
    "Scores": ["epoch", "validation", "running", "best", "phase"],
    # the latter: of the step before, this one is still being written
    "Times": ["epoch", "train_seconds", "bookkeeping_seconds"],
    "learning_rate": ["epoch", "learning_rate"],
    "param_counts": ["epoch", "parameters", "dendrites"],
    "BestPBScores": ["epoch", "phase", "correlation"],
}
SWITCH_COLUMNS = ["epoch", "action", "dendrites", "reason"]
BEST_COLUMNS = ["Param Counts", "Max Valid Scores", "Max Test Scores"]
# documented under both names; the second is brought up to date at switches
BEST_NAMES = ("bestTestScores", "best_test_scores")


class RunTables:
    """Collects a run's numbers and keeps ``<folder>/<name>*.csv`` up to date; without a folder it
    only collects."""

    def __init__(self, folder: str | os.PathLike | None):
        self.folder = None if folder is None else Path(folder)
        self.rows = RunRows()
        self._started = False
        self._lines: dict[str, list[str]] = {"epochs": [], "extras": [], "switches": []}

    def file(self, kind: str) -> Path:
        return self.folder / f"{self.folder.name}{kind}.csv"

    def epoch(
        self, row: dict, extras: dict[str, dict[str, float]], better: Callable[[float, float], bool]
    ) -> None:
        """Take in an epoch: ``extras`` maps kinds of score ("extra", "test", "loss", …) to names to
        values.

        The best-score table has a row for each architecture, which its parameter count tells: the
        best validation score while neurons learned, and the test score of that same epoch.
        """
        self.rows.epochs.append(row)
        added = [
            {"epoch": row["epoch"], "kind": kind, "name": name, "value": value}
            for kind, values in extras.items()
            for name, value in values.items()
        ]
        self.rows.extras += added
        key, score = str(row["parameters"]), row["validation"]
        old = self.rows.best.get(key)
        record = (
            row["phase"] == "n"
            and score == score
            and (old is None or better(score, old["Max Valid Scores"]))
        )
        if record:
            test = next(iter(extras.get("test", {}).values()), float("nan"))
            self.rows.best[key] = dict(zip(BEST_COLUMNS, (row["parameters"], score, test)))
        if self.folder is None:
            return
        if not self._started:
            self.rewrite()
            return
        for kind, columns in COLUMNS.items():
            self._append(self.file(kind), columns, [row])
        if added:
            self._append(self.file("ExtraScores"), list(added[0]), added)
        if record:
            self._write_best()

    def switch(self, row: dict) -> None:
        self.rows.switches.append(row)
        if self.folder is not None and self._started:
            self._append(self.file("switch_epochs"), SWITCH_COLUMNS, [row])
            self._write_best(BEST_NAMES)

    def rewrite(self) -> None:
        """Write every file anew from memory: at the start, and after a run was loaded."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for kind, columns in COLUMNS.items():
            self._write(self.file(kind), columns, self.rows.epochs)
        self._write(self.file("ExtraScores"), ["epoch", "kind", "name", "value"], self.rows.extras)
        self._write(self.file("switch_epochs"), SWITCH_COLUMNS, self.rows.switches)
        self._write_best(BEST_NAMES)
        self._started = True

    def state_dict(self) -> dict:
        """The rows as JSON lines: they grow with the run, so each is turned into text once."""
        for kind in ("epochs", "extras", "switches"):
            lines, rows = self._lines[kind], getattr(self.rows, kind)
            lines += [json.dumps(row) for row in rows[len(lines) :]]
        return {
            **{kind: "\n".join(lines) for kind, lines in self._lines.items()},
            "best": dict(self.rows.best),
        }

    def load_state_dict(self, state: dict) -> None:
        self._lines = {kind: state[kind].splitlines() for kind in ("epochs", "extras", "switches")}
        self.rows = RunRows(
            **{kind: [json.loads(line) for line in lines] for kind, lines in self._lines.items()},
            best=dict(state["best"]),
        )
        if self.folder is not None:
            self.rewrite()

    def _write_best(self, names=BEST_NAMES[:1]) -> None:
        for name in names:
            self._write(self.file(name), BEST_COLUMNS, list(self.rows.best.values()))

    @staticmethod
    def _write(path: Path, columns: list[str], rows: list[dict]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_bytes(path, text.getvalue().encode())

    @staticmethod
    def _append(path: Path, columns: list[str], rows: list[dict]) -> None:
        with open(path, "a", newline="") as file:
            csv.DictWriter(file, columns, extrasaction="ignore").writerows(rows)
