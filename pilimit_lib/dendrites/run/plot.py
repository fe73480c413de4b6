"""One picture of a run: scores, times, learning rate and dendrite scores over epochs; a blue line
where dendrites were added."""

import math
from pathlib import Path

from ...core import replacing
from .tables import RunRows


def draw(rows: RunRows, path: Path) -> None:
    """Write the four panels to ``path`` (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    (scores, times), (rates, dendrites) = figure.subplots(2, 2)
    neurons = [r for r in rows.epochs if r["phase"] == "n"]
    scores.plot(
        [r["epoch"] for r in neurons], [r["validation"] for r in neurons], label="validation"
    )
    scores.plot(
        [r["epoch"] for r in neurons],
        [r["running"] for r in neurons],
        label="running mean",
        alpha=0.6,
    )
    for kind, name in dict.fromkeys(
        (r["kind"], r["name"]) for r in rows.extras if r["kind"] in ("extra", "test")
    ):
        points = [
            (r["epoch"], r["value"]) for r in rows.extras if (r["kind"], r["name"]) == (kind, name)
        ]
        scores.plot(*zip(*points), label=name, alpha=0.6)
    scores.legend()
    epochs = [r["epoch"] for r in rows.epochs]
    times.plot(epochs, [r["train_seconds"] for r in rows.epochs], label="training")
    times.plot(epochs, [r["bookkeeping_seconds"] for r in rows.epochs], label="bookkeeping")
    times.legend()
    known = [
        (r["epoch"], r["learning_rate"]) for r in rows.epochs if r["learning_rate"] is not None
    ]
    if known:
        rates.semilogy(*zip(*known))
    candidates = [
        (r["epoch"], r["correlation"]) for r in rows.epochs if r.get("correlation") is not None
    ]
    points = [(e, c) for e, c in candidates if math.isfinite(c)]
    if points:
        dendrites.plot(*zip(*points), ".-")
    for axes, title in zip(
        (scores, times, rates, dendrites),
        ("scores", "seconds per epoch", "learning rate", "correlation of candidate dendrites"),
    ):
        axes.set_title(title)
        axes.set_xlabel("epoch")
        for row in rows.switches:
            if row["action"] in ("grow", "retry"):
                axes.axvline(row["epoch"], color="tab:blue", linewidth=1)
    with replacing(path) as beside:
        figure.savefig(beside)
