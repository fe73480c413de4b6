"""The output folder of one run."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd

from pilimit_lib.core import load, save, write_text

from .called import called
from .flags import read_settings
from .lock import only_process
from .names import Names
from .plots import LOSS_AND_ACCURACY, curves

Records = list[dict[str, Any]]
ENDS = ("total_steps", "T_max", "total_iters")  # how torch's schedulers name their last step


class RunFolder:
    """settings.json, metrics.jsonl (one line per epoch), checkpoint.pt and curves.png of one run,
    written in a `with` by one process at a time.

    A folder that already holds a run is only written to again when the run is resumed, or
    overwritten on request. One that a run was stopped in before it had saved anything holds none.
    `given`: the folder that the command was given, where this one lies in it. `defaults` are what a
    run had whose settings.json is older than a setting.
    """

    def __init__(
        self,
        path: str | Path,
        settings: dict[str, Any],
        resume: bool = False,
        overwrite: bool = False,
        names: Names | None = None,
        given: Path | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.settings, self.names = Path(path), settings, names or Names()
        self.defaults = dict(defaults or {})
        self.resume, self.overwrite = resume, overwrite
        self.given = given or self.path
        self.checkpoint = self.path / "checkpoint.pt"
        self.metrics = self.path / "metrics.jsonl"
        self._inside = ExitStack()

    def __enter__(self) -> RunFolder:
        """Take the folder. Raises FileExistsError, FileNotFoundError or ValueError where it is not
        as expected, and leaves it as it is."""
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(
                f"{self.path} is a file; a run needs a folder: choose another {self.names.folder}"
            )
        if self.resume:
            self._require_run()
        self.path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as inside:
            inside.enter_context(only_process(self.path, self.names.folder))
            if self.resume:
                self._require_run()
                self._check_same(read_settings(self.path / self.names.settings))
            else:
                self._require_room()
                self._clear()
            write_text(self.path / self.names.settings, json.dumps(self.settings, indent=2) + "\n")
            self._inside = inside.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._inside.close()

    def prepare(self) -> None:
        """Take the folder for a run that begins later: others then know its settings."""
        with self:
            pass

    @property
    def resume_command(self) -> str:
        """What to type to go on."""
        where = shlex.quote(str(self.given))
        return f"{called(self.names.command)} --resume {self.names.folder} {where}"

    def _require_run(self) -> None:
        if not self.checkpoint.is_file() or not (self.path / self.names.settings).is_file():
            raise FileNotFoundError(
                f"there is no run to resume in {self.path}: no checkpoint.pt with its "
                f"{self.names.settings}. Leave --resume out to begin one"
            )

    def _require_room(self) -> None:
        if self._written(self.names.written) and not self.overwrite:
            raise FileExistsError(
                f"{self.path} already holds a run; continue it with --resume, replace it with "
                f"{self.names.overwrite}, or choose another {self.names.folder}"
            )

    def _written(self, patterns: tuple[str, ...]) -> list[Path]:
        """What the run that was here wrote of this, if there was one."""
        if not (self.path / self.names.settings).exists():
            return []
        return [path for pattern in patterns for path in self.path.glob(pattern)]

    def _clear(self) -> None:
        """Remove what the run that was here wrote, and nothing else."""
        for stale in self._written(self.names.written + self.names.early):
            if stale.is_dir():
                shutil.rmtree(stale)
            else:
                stale.unlink()

    def _check_same(self, found: dict[str, Any]) -> None:
        known = self.defaults | found
        differing = [
            f"{key}: {known.get(key)!r} then, {value!r} now"
            for key, value in self.settings.items()
            if known.get(key) != value and key not in self.names.may_differ
        ]
        if differing:
            raise ValueError(
                f"the run in {self.path} had other settings ({', '.join(differing)}); leave these "
                "flags out"
            )

    def check_schedule(self, saved: dict[str, Any] | None, now: dict[str, Any] | None) -> None:
        """Raise where the schedule of a checkpoint ends elsewhere than that of this run: beyond its
        end it would turn back."""
        then, here = (
            next((state[name] for name in ENDS if name in state), None)
            for state in (saved or {}, now or {})
        )
        if then != here:
            raise ValueError(
                f"the run in {self.path} has a schedule of {then} steps, which can't be continued "
                f"for more {self.names.epochs}; give the number it was started with"
            )

    def write_metrics(self, records: Records) -> None:
        """The metrics so far; written whole, so that a resumed run never repeats or tears a
        line."""
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in records))

    def save(self, state: dict[str, Any]) -> None:
        save(state, self.checkpoint)

    def load(self) -> dict[str, Any]:
        return load(self.checkpoint)

    def draw_curves(
        self,
        frame: pd.DataFrame,
        title: str,
        panels: dict[str, tuple[str, ...]] = LOSS_AND_ACCURACY,
    ) -> None:
        """curves.png: the `panels` against the column `epoch` of `frame`."""
        curves(frame, panels, title).savefig(self.path / "curves.png", dpi=110)
