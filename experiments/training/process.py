"""What every experiment does around its loop: an output folder, an interruptible run, curves,
device and precision."""

from __future__ import annotations

import argparse
import json
import random
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pilimit_lib.core import load, save, write_text


class RunFolder:
    """The output folder of one run: settings.json, metrics.jsonl (one line per epoch),
    checkpoint.pt, curves.png.

    A folder that already holds a run is only written to again when the run is resumed, or
    overwritten on request. A command whose flags and files have other names says so; `may_differ`
    are the settings that a resumed run may have otherwise.
    """

    written = (
        "checkpoint.pt",
        "metrics.jsonl",
        "curves.png",
        "model.th",
        "model_best.th",
        "model_epoch_*.th",
        "transfer.png",
        "transfers.jsonl",
    )  # what an overwritten run may have left

    def __init__(
        self,
        path: str | Path,
        settings: dict[str, Any],
        resume: bool = False,
        overwrite: bool = False,
        named: str = "settings.json",
        folder_flag: str = "--save-dir",
        overwrite_flag: str = "--overwrite",
        may_differ: Sequence[str] = ("epochs",),
    ) -> None:
        self.path, self.settings, self.may_differ = Path(path), settings, may_differ
        self.checkpoint = self.path / "checkpoint.pt"
        self.metrics = self.path / "metrics.jsonl"
        known = self.path / named
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(
                f"{self.path} is a file; a run needs a folder: choose another {folder_flag}"
            )
        if resume:
            if not self.checkpoint.is_file() or not known.is_file():
                raise FileNotFoundError(
                    f"there is no run to resume in {self.path}: no checkpoint.pt with its {named}"
                )
            self._check_same(json.loads(known.read_text()))
        elif known.exists() and not overwrite:
            raise FileExistsError(
                f"{self.path} already holds a run; continue it with --resume, replace it with "
                f"{overwrite_flag}, or choose another {folder_flag}"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        if not resume:
            for stale in (
                [path for pattern in self.written for path in self.path.glob(pattern)]
                if known.exists()
                else []
            ):
                stale.unlink()
            write_text(known, json.dumps(settings, indent=2) + "\n")

    def _check_same(self, known: dict[str, Any]) -> None:
        differing = {
            key: (known.get(key), value)
            for key, value in self.settings.items()
            if known.get(key) != value and key not in self.may_differ
        }
        if differing:
            described = ", ".join(
                f"{key}: {old!r} then, {new!r} now" for key, (old, new) in differing.items()
            )
            raise ValueError(
                f"the run in {self.path} had other settings ({described}); repeat its command line "
                "with --resume"
            )

    def check_schedule(
        self, saved: dict[str, Any] | None, now: dict[str, Any] | None, flag: str = "--epochs"
    ) -> None:
        """Raise where the schedule of a checkpoint ends elsewhere than that of this run: beyond its
        end it would turn back."""
        ends = [
            next(
                (state[name] for name in ("total_steps", "T_max", "total_iters") if name in state),
                None,
            )
            for state in (saved or {}, now or {})
        ]
        if ends[0] != ends[1]:
            raise ValueError(
                f"the run in {self.path} has a schedule of {ends[0]} steps, which can't be "
                "continued for more "
                f"{flag}; give the number it was started with"
            )

    def rewrite_metrics(self, records: list[dict[str, Any]]) -> None:
        """The metrics so far; written whole, so that a resumed run never repeats or tears a
        line."""
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in records))

    def save(self, state: dict[str, Any]) -> None:
        save(state, self.checkpoint)

    def load(self) -> dict[str, Any]:
        return load(self.checkpoint)

    def draw_curves(self, records: list[dict[str, Any]], title: str) -> Path | None:
        """Loss and accuracy per epoch, drawn with seaborn."""
        if not records:
            return None
        frame = pd.DataFrame(records)
        figure = curves(
            frame,
            {"loss": ("train_loss", "test_loss"), "accuracy": ("train_acc", "test_acc")},
            title,
        )
        figure.savefig(self.path / "curves.png", dpi=110)
        return self.path / "curves.png"


def curves(frame: pd.DataFrame, panels: dict[str, tuple[str, ...]], title: str):
    """A figure with one panel per entry of `panels` (label: columns of `frame`), against the column
    `epoch`."""
    import seaborn as sns
    from matplotlib.figure import Figure  # not pyplot: nothing global, no window

    with sns.axes_style("whitegrid"):
        figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
        for axis, (label, columns) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items()
        ):
            long = frame.melt(
                "epoch", [c for c in columns if c in frame], var_name="curve", value_name=label
            )
            sns.lineplot(long, x="epoch", y=label, hue="curve", marker="o", ax=axis)
            axis.get_legend().set_title(None)
        figure.suptitle(title, fontsize=10)
    return figure


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Turn Ctrl-C and SIGTERM into a request, `if stop:`, that the loop grants between two steps. A
    second one stops at once."""
    stop: list[int] = []

    def request(number: int, frame: Any) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    previous = {
        number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def seed_everything(seed: int) -> None:
    """Start the generators that `rng_state` keeps from `seed`."""
    torch.manual_seed(seed)
    random.seed(seed)


def pick_device(cuda: bool, flag: str = "--cuda") -> torch.device:
    """The GPU where one was asked for; an error, not the CPU, where there is none."""
    if cuda and not torch.cuda.is_available():
        raise RuntimeError(
            f"{flag} was given, but torch finds no CUDA device; leave it out to run on the CPU"
        )
    return torch.device("cuda" if cuda else "cpu")


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, removed: Mapping[str, str]
) -> argparse.Namespace:
    """The arguments; flags that the original had and we don't are refused with the reason given in
    `removed`."""
    args, unknown = parser.parse_known_args(argv)
    for flag in unknown:
        name = flag.split("=")[0]
        if name in removed:
            parser.error(f"{name} is gone: {removed[name]}; leave it out")
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return args


def milestones(text: str) -> list[int]:
    """Epochs from a comma-separated list such as '40,45'."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(
            f"milestones are epochs separated by commas, such as 40,45; got {text!r}"
        ) from None


def human_bytes(count: float) -> str:
    """A number of bytes with its unit: 1536 -> '1.5 kB' in powers of 1024."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TB"
