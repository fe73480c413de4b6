"""What several runs together say: a table and a figure."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from pilimit_lib.core import write_text

from .methods import Settings


def write_settings(folder: Path, settings: Settings, **more) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "settings.json", json.dumps({**asdict(settings), **more}, indent=1))


def summarise(records: list[dict], folder: Path) -> pd.DataFrame:
    """Accuracy after the last epoch by method: every seed, their mean, seconds of training; CSV and
    figure into `folder`."""
    frame = pd.DataFrame(records)
    frame.to_csv(folder / "metrics.csv", index=False)
    last = frame[frame.epoch == frame.epoch.max()]
    by = last.groupby("method")
    table = pd.DataFrame(
        {
            "mean": by.accuracy.mean(),
            "std": by.accuracy.std(),
            "seeds": by.accuracy.apply(lambda a: " ".join(f"{v:.4f}" for v in a)),
            "seconds": frame.groupby(["method", "seed"]).seconds.sum().groupby("method").mean(),
        }
    )
    for column in ("recalibrated", "probe"):
        if column in last:
            table[column] = by[column].mean()
    table.to_csv(folder / "summary.csv")
    plot(frame, folder / "accuracy.png")
    return table


def plot(frame: pd.DataFrame, path: Path) -> None:
    """Test accuracy against epochs, one line per method, a band over the seeds."""
    import seaborn as sns
    from matplotlib.figure import Figure  # not pyplot: nothing global, no window

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    sns.lineplot(
        frame, x="epoch", y="accuracy", hue="method", errorbar=("pi", 100), marker="o", ax=axes
    )
    axes.set(xlabel="epoch", ylabel="test accuracy")
    figure.savefig(path, dpi=150)
