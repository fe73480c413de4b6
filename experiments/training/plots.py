"""Curves of a run, drawn with seaborn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS_AND_ACCURACY = {
    "loss": ("train_loss", "held_out_loss", "test_loss"),
    "accuracy": ("train_acc", "held_out_acc", "test_acc"),
}


def curves(frame: pd.DataFrame, panels: dict[str, tuple[str, ...]], title: str) -> Figure:
    """A figure with one panel per entry of `panels` (label: columns of `frame`), against the column
    `epoch`."""
    import seaborn as sns
    from matplotlib.figure import Figure  # not pyplot: nothing global, no window

    with sns.axes_style("whitegrid"):
        figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (label, columns) in zip(axes, panels.items()):
            present = [column for column in columns if column in frame]
            long = frame.melt("epoch", present, var_name="curve", value_name=label)
            sns.lineplot(long, x="epoch", y=label, hue="curve", marker="o", ax=axis)
            axis.get_legend().set_title(None)
        figure.suptitle(title, fontsize=10)
    return figure
