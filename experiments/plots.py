"""Figures like the paper's from the files that runs wrote: accuracy against epoch, width or rank,
and its spread over seeds.

    python -m experiments.plots output/run1 output/run2 --against epoch --out epochs.png
    # mean and deviation over seeds; infinite: a line
    python -m experiments.plots output/* --against width --out width.png
    python -m experiments.plots output/* --against r
    # a line for each run, named after its folder
    python -m experiments.plots output/* --by run
    # distribution over seeds, one per kind of network
    python -m experiments.plots output/* --against seed

A run is a folder of `cifar10mlp`, `transfer_imagenet` or `experiments.meta.train`; folders without
results are named and refused. A figure shows one kind of accuracy, the first of these that all runs
have: of transfer to CIFAR-10 (kernel regression, the best ridge), on test data (without --nilmax
and with the inner steps of training), on validation tasks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from .training.errors import errors_of
from .training.flags import plain_command_line

# What runs write: (kind of accuracy, settings, table, column, whether a record is of an epoch).
SOURCES = (
    ("transfer", "settings.json", "transfers.jsonl", "test_acc", True),
    ("test", "config.json", "test.jsonl", "acc", False),
    ("test", "settings.json", "metrics.jsonl", "test_acc", True),
    ("validation", "config.json", "val.jsonl", "acc", True),
)
FIXED = {"width": float("inf"), "r": float("nan")}  # of kernels, which have neither
AGAINST = ("epoch", "width", "r", "seed")


def read_run(folder: Path, per_epoch: bool) -> dict[str, list[dict[str, Any]]]:
    """Records of one run by kind of accuracy, the preferred kind first: network, width, r, seed,
    run, epoch, accuracy in %.

    Without `per_epoch` the last of each network only.
    """
    found = {}
    for kind, settings_name, table, column, of_epochs in SOURCES:
        if (
            (of_epochs or not per_epoch)
            and (folder / settings_name).is_file()
            and (folder / table).is_file()
        ):
            settings = json.loads((folder / settings_name).read_text())
            lines = [json.loads(line) for line in (folder / table).read_text().splitlines()]
            lines = [
                line
                for line in lines
                if column in line and (kind != "test" or _counts(line, settings))
            ]
            records = [
                {
                    **_about(settings),
                    "run": folder.name,
                    "epoch": line.get("epoch"),
                    "accuracy": 100 * line[column],
                }
                for line in (lines if per_epoch else lines[-1:])
            ]
            if kind == "transfer":
                records = _transfers(lines, {**_about(settings), "run": folder.name}, per_epoch)
            if records:
                found[kind] = records
    if not found:
        what = "a table of accuracies per epoch" if per_epoch else "a table of accuracies"
        raise ValueError(
            f"{folder} holds no results of a run: config.json or settings.json with {what} was "
            "expected"
        )
    return found


def _counts(line: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a record is of the run as it was trained: tests can be of other tasks, of other inner
    steps, or of none."""
    return (
        line.get("split", "test") == "test"
        and not line.get("nilmax")
        and line.get("num_steps") in (None, settings.get("num_steps"))
    )


def _transfers(
    lines: list[dict[str, Any]], about: dict[str, Any], per_epoch: bool
) -> list[dict[str, Any]]:
    """The best accuracy over the ridges at each epoch, and that of the control, which learns
    nothing and is the same at all."""
    features, control = {}, [line["test_acc"] for line in lines if line["what"] == "NNGP"]
    for line in lines:
        if line["what"] == "features":
            features[line["epoch"]] = max(line["test_acc"], features.get(line["epoch"], 0))
    records = []
    for epoch in sorted(features) if per_epoch else sorted(features)[-1:]:
        records.append({**about, "epoch": epoch, "accuracy": 100 * features[epoch]})
        if control:
            records.append(
                {
                    **about,
                    **FIXED,
                    "network": "NNGP",
                    "epoch": epoch,
                    "accuracy": 100 * max(control),
                }
            )
    return records


def read_runs(runs: list[Path], per_epoch: bool) -> tuple[str, pd.DataFrame]:
    """(kind of accuracy, records of all runs): the first kind that all have. Raises ValueError
    where there is none."""
    found = [read_run(run, per_epoch) for run in runs]
    kind = next((kind for kind in found[0] if all(kind in records for records in found)), None)
    if kind is None:
        held = "; ".join(f"{run}: {', '.join(records)}" for run, records in zip(runs, found))
        raise ValueError(
            f"these runs have no kind of accuracy in common ({held}), and different ones don't "
            "belong into one "
            "figure; draw them apart"
        )
    return kind, pd.DataFrame([record for records in found for record in records[kind]])


def _about(settings: dict[str, Any]) -> dict[str, Any]:
    """What a figure distinguishes runs by."""
    meta = "infnet_r" in settings
    width = settings["hidden_size"] if meta else settings["width"]
    infinite = width in (-1, 0)
    mu = settings.get("mu_init") or settings.get("gaussian_init")
    kind = "infinite π" if infinite else "finite π"
    if infinite and settings.get("memory") == "moments":
        kind = "infinite π, moments"
    elif mu and not infinite:
        kind = "finite μ"
    about = {
        "network": kind,
        "width": float("inf") if infinite else width,
        "r": settings["infnet_r" if meta else "r"],
        "seed": settings["seed"],
    }
    kernels = {"gp": "NNGP", "gp1lp": "NNGP", "ntk": "NTK", "ntk1lp": "NTK"}
    kernel = next((name for flag, name in kernels.items() if settings.get(flag)), None)
    return about if kernel is None else {**about, **FIXED, "network": kernel}


def figure_of(frame: pd.DataFrame, against: str, by: str = "network", kind: str = ""):
    """A figure of accuracy against `against`; lines are means over seeds, bands and bars their
    standard deviation.

    `by`: the column that tells the lines against epoch or r apart; `kind`: of accuracy, for the
    label.
    """
    import seaborn as sns
    from matplotlib.figure import Figure

    with sns.axes_style("whitegrid"):
        figure = Figure(figsize=(5.4, 3.6), layout="constrained")
        axis = figure.subplots()
        if against == "seed":
            sns.stripplot(frame, x="network", y="accuracy", color="0.4", size=5, ax=axis)
            sns.pointplot(
                frame,
                x="network",
                y="accuracy",
                errorbar="sd",
                linestyle="none",
                marker="D",
                capsize=0.15,
                ax=axis,
            )
            axis.set(xlabel=None)
        elif against == "width":
            finite, infinite = (
                frame[frame.width != float("inf")],
                frame[frame.width == float("inf")],
            )
            if not finite.empty:
                sns.lineplot(
                    finite,
                    x="width",
                    y="accuracy",
                    hue="network",
                    marker="o",
                    errorbar="sd",
                    err_style="bars",
                    ax=axis,
                )
                axis.set(xscale="log")
            for number, (kind, group) in enumerate(infinite.groupby("network")):
                axis.axhline(group.accuracy.mean(), ls="--", color=f"C{3 + number}", label=kind)
            axis.legend()
        else:
            sns.lineplot(frame, x=against, y="accuracy", hue=by, marker="o", errorbar="sd", ax=axis)
            axis.xaxis.get_major_locator().set_params(integer=True)
            if by == "run":  # folder names may be long, and lines many
                figure.set_size_inches(8, 3.6)
                sns.move_legend(axis, "center left", bbox_to_anchor=(1, 0.5), title=None)
        axis.set(ylabel=f"{kind} accuracy, %".strip())
    return figure


def plot(runs: list[Path], against: str, out: Path, by: str = "network") -> pd.DataFrame:
    """Draw the figure into `out`; returns the numbers behind it."""
    if against not in AGAINST:
        raise ValueError(
            f"there is no figure against '{against}'; choose one of {', '.join(AGAINST)}"
        )
    kind, frame = read_runs(runs, against == "epoch")
    if against == "r" and frame.r.isna().all():
        raise ValueError("kernels have no rank, so there is nothing to draw against r")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure_of(frame, against, by, kind).savefig(out, dpi=120)
    return frame


def main(argv: list[str] | None = None) -> pd.DataFrame:
    arguments = plain_command_line("plots", __doc__)
    arguments.add_argument("runs", nargs="+", type=Path, help="output folders of runs")
    arguments.add_argument(
        "--against", choices=AGAINST, default="epoch", help="the horizontal axis (default epoch)"
    )
    arguments.add_argument(
        "--by",
        choices=("network", "run"),
        default="network",
        help="what has a line of its own, against epoch or r (default network)",
    )
    arguments.add_argument(
        "--out", type=Path, default=Path("figure.png"), help="the figure (default figure.png)"
    )
    args = arguments.parse_args(argv)
    with errors_of(arguments):
        frame = plot(args.runs, args.against, args.out, args.by)
        last = frame.groupby(["network", "run"], as_index=False).last()
        for kind, group in last.groupby("network"):
            spread = f" ± {group.accuracy.std():.2f} (s.d.)" if len(group) > 1 else ""
            print(f"{kind}: {group.accuracy.mean():.2f}{spread} % over {len(group)} run(s)")
        print(f"drawn into {args.out}")
    return frame


if __name__ == "__main__":
    main()
