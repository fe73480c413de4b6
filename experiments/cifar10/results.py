"""The output folder of a test, and its figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from pilimit_lib.core import write_text

from ..training.flags import read_settings


def prepare(
    folder: Path, settings: dict[str, Any], overwrite: bool, defaults: dict[str, Any]
) -> None:
    """Write the settings of a test; a folder that holds one with other settings is refused.
    `defaults` are what a test had whose file is older than a setting."""
    known = folder / "settings.json"
    if known.exists() and not overwrite and defaults | read_settings(known) != settings:
        raise FileExistsError(
            f"{folder} holds a test with other settings; choose another --save-dir, or --overwrite"
        )
    write_text(known, json.dumps(settings, indent=2) + "\n")


def draw(records: list[dict[str, Any]], folder: Path) -> None:
    """Accuracy against the ridge, where there are several."""
    frame = pd.DataFrame(records)
    if len(frame) < 2 or "test_acc" not in frame:
        return
    import seaborn as sns
    from matplotlib.figure import Figure

    with sns.axes_style("whitegrid"):
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        axis = figure.subplots()
        sns.lineplot(
            frame.assign(accuracy=100 * frame.test_acc), x="reg", y="accuracy", marker="o", ax=axis
        )
        axis.set(
            xscale="log",
            xlabel="ridge / mean diagonal",
            ylabel="test accuracy, %",
            title=records[0]["what"],
        )
    figure.savefig(folder / "regs.png", dpi=110)
