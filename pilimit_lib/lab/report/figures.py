"""The figures of the page, each as an SVG data URI."""

from __future__ import annotations

import base64
import io

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .data import RunView

INK, MUTED, RED, COOL = "#22303c", "#8a97a3", "#c8553d", "#2f6f8f"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 9.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "lab",
    "legend.frameon": False,
}
MOST_POINTS = 20_000
MOST_LOCATED = 4_000
MAP_SIZE = (11, 4.6)


def _drawn(
    width: float, height: float, columns: int = 1, rows: int = 1, **options: object
) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(rows, columns, **options)).reshape(-1)


def _uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=160)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _plain_ages(axes: Axes) -> None:
    axes.set_xlabel("age: samples learned from")
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))


def curves(view: RunView) -> str | None:
    """Loss and accuracy over age, one colour a branch; edits as ticks, checkpoints as dots on the
    axis."""
    train, evaluation = view.curve("train"), view.curve("eval")
    if train.empty and evaluation.empty:
        return None
    branches = sorted({*train["branch"], *evaluation["branch"]})
    colours = dict(
        zip(
            branches,
            sns.color_palette("husl", len(branches))
            if len(branches) > 3
            else [COOL, RED, "#6a8f3c"],
        )
    )
    with matplotlib.rc_context(STYLE):
        figure, (loss, accuracy) = _drawn(11, 3.7, 2)
        for axes, column in ((loss, "loss"), (accuracy, "accuracy")):
            for branch in branches:
                for points, look in (
                    (train, {"alpha": 0.45, "linewidth": 1}),
                    (evaluation, {"linewidth": 1.8, "marker": "o", "markersize": 3.5}),
                ):
                    line = _with_root(view, points, branch, column)
                    axes.plot(line["age"], line[column], color=colours[branch], **look)
            _mark_events(axes, view)
            _plain_ages(axes)
        loss.set(title="loss", ylabel="loss")
        seen = [*train["loss"].dropna(), *evaluation["loss"].dropna()]
        if seen and min(seen) > 0 and max(seen) > 10 * min(seen):
            loss.set_yscale("log")
        accuracy.set(title="accuracy", ylabel="fraction correct")
        handles = [
            matplotlib.lines.Line2D([], [], color=colours[b], label=_branch_name(view, b))
            for b in branches[:8]
        ]
        handles += [
            matplotlib.lines.Line2D([], [], color=INK, alpha=0.45, linewidth=1, label="training"),
            matplotlib.lines.Line2D(
                [], [], color=INK, marker="o", markersize=3.5, label="evaluation"
            ),
        ]
        accuracy.legend(handles=handles, loc="lower right", fontsize=8)
        return _uri(figure)


def _with_root(view: RunView, points: pd.DataFrame, branch: int, column: str) -> pd.DataFrame:
    """The branch's points, led by the last one of the branch that it grew out of."""
    own, root = points[points["branch"] == branch], view.root_of(branch)
    if root is not None and len(own):
        before = points[(points["branch"] == root[0]) & (points["age"] <= root[1])]
        own = own if before.empty else pd.concat([before.tail(1), own])
    return own.dropna(subset=[column])


def _branch_name(view: RunView, branch: int) -> str:
    after = view.branches().get(branch)
    return f"branch {branch}" + ("" if after is None else f" (from checkpoint {after})")


def _mark_events(axes: Axes, view: RunView) -> None:
    for event in view.timeline():
        if event["kind"] in ("edit", "undo", "deny", "freeze", "unfreeze"):
            axes.axvline(event["age"], color=MUTED, linewidth=0.8, linestyle=":", zorder=0)


def tree(view: RunView) -> str | None:
    """Checkpoints over age, children linked to parents, a lane for each branch."""
    if view.checkpoints is None or not len(view.checkpoints):
        return None
    entries = [entry for _, entry in view.checkpoints.lines()]
    lanes = {
        branch: lane
        for lane, branch in enumerate(sorted({entry.get("branch", 0) for entry in entries}))
    }
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _drawn(11, 1.1 + 0.45 * len(lanes))
        place = {
            entry["id"]: (entry.get("age", 0), lanes[entry.get("branch", 0)]) for entry in entries
        }
        for entry in entries:
            if entry["parent"] is not None:
                (x0, y0), (x1, y1) = place[entry["parent"]], place[entry["id"]]
                axes.plot([x0, x1], [y0, y1], color=MUTED, linewidth=1.2, zorder=1)
        for number, (x, y) in place.items():
            current = number == view.checkpoints.current
            axes.scatter(x, y, s=260, color=RED if current else COOL, zorder=2)
            axes.text(
                x, y, str(number), color="white", ha="center", va="center", fontsize=8, zorder=3
            )
        axes.set(
            yticks=list(lanes.values()),
            yticklabels=[f"branch {b}" for b in lanes],
            ylim=(len(lanes) - 0.4, -0.6),
        )
        axes.margins(x=0.05)
        axes.spines["left"].set_visible(False)
        axes.tick_params(left=False)
        _plain_ages(axes)
        return _uri(figure)


def neurons(view: RunView) -> str | None:
    """Trigger rates of each layer: bars for training, dots for evaluation, silent neurons
    marked."""
    counted = (
        view.neurons
        if view.neurons.empty
        else view.neurons.query("train_seen > 0 or eval_seen > 0")
    )
    if counted.empty:
        return None
    layers = list(counted.groupby(["layer_index", "layer"], sort=False))
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    with matplotlib.rc_context(STYLE):
        figure, cells = _drawn(11, 0.4 + 2.1 * rows, columns, rows)
        for cell, ((index, path), layer) in zip(cells, layers):
            silent = (layer["train_rate"] == 0).to_numpy()
            cell.bar(layer["neuron"], layer["train_rate"].fillna(0), color=COOL, width=0.85)
            cell.plot(
                layer["neuron"],
                layer["eval_rate"],
                "o",
                color=INK,
                markersize=2.5 if len(layer) <= 64 else 1.2,
            )
            slow = (layer["learning_rate"] < 1).to_numpy()
            for chosen, look in (
                (silent, {"marker": "x", "color": RED, "markersize": 7, "markeredgewidth": 2}),
                (slow, {"marker": "^", "color": "#8a6bb1", "markersize": 5}),
            ):
                if chosen.any():  # an empty, unclipped line would have no extent to lay out
                    cell.plot(
                        layer["neuron"][chosen],
                        np.zeros(chosen.sum()),
                        linestyle="",
                        clip_on=False,
                        zorder=5,
                        **look,
                    )
            remarks = [
                f"{len(layer)} neurons",
                *([f"{silent.sum()} silent"] if silent.any() else []),
                *(["frozen"] if layer["frozen"].iloc[0] else []),
            ]
            cell.set_title(f"{index}: {path} ({', '.join(remarks)})", fontsize=9.5)
            cell.set_xlabel("neuron")
            cell.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        for cell in cells[len(layers) :]:
            cell.set_visible(False)
        cells[0].set_ylabel("triggers a sample")
        return _uri(figure)


def data_map(view: RunView) -> tuple[str | None, str, pd.DataFrame]:
    """Confidence against variability, coloured by correctness; a sentence on what is shown; and
    where the dots are: `x`, `y` in fractions of the picture from its upper left corner, by sample.
    Of many dots those of the lowest confidence are located."""
    if view.samples is None:
        return None, "", pd.DataFrame()
    known = view.samples.dropna(subset=["confidence", "variability", "correctness"])
    if known.empty:
        return None, "", known
    shown = known if len(known) <= MOST_POINTS else known.sample(MOST_POINTS, random_state=0)
    with matplotlib.rc_context(STYLE):
        figure, (axes, histogram) = _drawn(*MAP_SIZE, 2, width_ratios=[3, 1.3])
        points = axes.scatter(
            shown["variability"],
            shown["confidence"],
            c=shown["correctness"],
            cmap="RdYlBu",
            vmin=0,
            vmax=1,
            s=9 if len(shown) > 2000 else 16,
            linewidths=0.15,
            edgecolors="#55606b",
            rasterized=True,
        )
        denied = shown[shown["deny_listed"]]
        axes.scatter(
            denied["variability"],
            denied["confidence"],
            marker="x",
            color=INK,
            s=18,
            linewidths=0.8,
            rasterized=True,
            label="denied",
        )
        axes.set(
            xlabel="variability (standard deviation of the confidence)",
            ylabel="confidence (mean probability of the true class)",
            ylim=(-0.02, 1.02),
            title="data map: easy at the top, hard at the bottom, ambiguous at the right",
        )
        figure.colorbar(points, ax=axes, label="correctness (fraction of times right)", shrink=0.8)
        if len(denied):
            axes.legend(loc="upper right")
        sns.histplot(known["forgotten"], discrete=True, ax=histogram, color=COOL)
        histogram.set(title="forgetting events", xlabel="times forgotten", ylabel="samples")
        histogram.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        text = f"{len(known):,} samples seen" + (
            "" if len(shown) == len(known) else f", {len(shown):,} of them drawn at random"
        )
        drawn = _uri(figure)  # lays the figure out, so that the dots have places
        dots = shown.nsmallest(MOST_LOCATED, "confidence")
        places = axes.transData.transform(dots[["variability", "confidence"]].to_numpy())
        places = places / [figure.bbox.width, figure.bbox.height]
        return drawn, text, dots.assign(x=places[:, 0], y=1 - places[:, 1])


def picture(image: Tensor) -> str:
    """A thumbnail as a PNG data URI."""
    buffer = io.BytesIO()
    matplotlib.image.imsave(
        buffer,
        image.numpy(),
        cmap="gray" if image.ndim == 2 else None,
        format="png",
        vmin=0 if image.ndim == 2 else None,
        vmax=255 if image.ndim == 2 else None,
    )
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
