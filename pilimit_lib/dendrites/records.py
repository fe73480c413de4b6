"""What a run writes: CSV files always, pictures only when asked, one row per epoch appended rather than rewritten."""

import csv
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Rows:
    """One row per epoch in memory; the same on disk when there is a folder."""

    epochs: list[dict] = field(default_factory=list)
    extras: list[dict] = field(default_factory=list)
    switches: list[dict] = field(default_factory=list)
    best: dict[str, dict] = field(default_factory=dict)  # by parameter count


COLUMNS = {
    "Scores": ["epoch", "validation", "running", "best", "phase"],
    "Times": ["epoch", "train_seconds", "bookkeeping_seconds"],  # the latter: of the step before, this one is still being written
    "learning_rate": ["epoch", "learning_rate"],
    "param_counts": ["epoch", "parameters", "dendrites"],
    "BestPBScores": ["epoch", "phase", "correlation"],
}
SWITCH_COLUMNS = ["epoch", "action", "dendrites", "reason"]
BEST_COLUMNS = ["Param Counts", "Max Valid Scores", "Max Test Scores"]
BEST_NAMES = ("bestTestScores", "best_test_scores")  # documented under both names


class Records:
    """Collects a run's numbers and keeps ``<folder>/<name>*.csv`` up to date; without a folder it only collects."""

    def __init__(self, folder: str | os.PathLike | None):
        self.folder = None if folder is None else Path(folder)
        self.rows = Rows()
        self._started = False

    def file(self, kind: str) -> Path:
        return self.folder / f"{self.folder.name}{kind}.csv"

    def epoch(self, row: dict, extras: dict[str, dict[str, float]], better: Callable[[float, float], bool]) -> None:
        """Take in an epoch: ``extras`` maps kinds of score ("extra", "test", "loss", …) to names to values.

        The best-score table has a row for each architecture, which its parameter count tells: the best validation score while
        neurons learned, and the test score of that same epoch.
        """
        self.rows.epochs.append(row)
        added = [{"epoch": row["epoch"], "kind": kind, "name": name, "value": value}
                 for kind, values in extras.items() for name, value in values.items()]
        self.rows.extras += added
        key, score = str(row["parameters"]), row["validation"]
        old = self.rows.best.get(key)
        record = row["phase"] == "n" and score == score and (old is None or better(score, old["Max Valid Scores"]))
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

    def rewrite(self) -> None:
        """Write every file anew from memory: at the start, and after a run was loaded."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for kind, columns in COLUMNS.items():
            self._write(self.file(kind), columns, self.rows.epochs)
        self._write(self.file("ExtraScores"), ["epoch", "kind", "name", "value"], self.rows.extras)
        self._write(self.file("switch_epochs"), SWITCH_COLUMNS, self.rows.switches)
        self._write_best()
        self._started = True

    def state_dict(self) -> dict:
        rows = self.rows
        return {"epochs": list(rows.epochs), "extras": list(rows.extras), "switches": list(rows.switches), "best": dict(rows.best)}

    def load_state_dict(self, state: dict) -> None:
        self.rows = Rows(**{key: (list(v) if isinstance(v, list) else dict(v)) for key, v in state.items()})
        if self.folder is not None:
            self.rewrite()

    def _write_best(self) -> None:
        for name in BEST_NAMES:
            self._write(self.file(name), BEST_COLUMNS, list(self.rows.best.values()))

    @staticmethod
    def _write(path: Path, columns: list[str], rows: list[dict]) -> None:
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(beside, path)

    @staticmethod
    def _append(path: Path, columns: list[str], rows: list[dict]) -> None:
        with open(path, "a", newline="") as file:
            csv.DictWriter(file, columns, extrasaction="ignore").writerows(rows)
