"""Figures like the paper's from the files that runs wrote: accuracy against epoch, width or rank, and its spread over seeds.

    python -m experiments.plots output/run1 output/run2 --against epoch --out epochs.png
    python -m experiments.plots output/* --against width --out width.png     # mean and deviation over seeds; infinite: a line
    python -m experiments.plots output/* --against r
    python -m experiments.plots output/* --by run                            # a line for each run, named after its folder
    python -m experiments.plots output/* --against seed                      # distribution over seeds, one per kind of network

A run is a folder of `cifar10mlp`, `transfer_imagenet` or `experiments.meta.train`; folders without results are named and refused.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd

# What a run wrote: (settings, table of a record per epoch, column of accuracies); the first that is there counts.
SOURCES = (("config.json", "test.jsonl", "acc"), ("config.json", "val.jsonl", "acc"),
           ("settings.json", "metrics.jsonl", "test_acc"))
AGAINST = ("epoch", "width", "r", "seed")


def read_run(folder: Path, per_epoch: bool) -> list[dict[str, Any]]:
    """Records of one run: network, width, r, seed, epoch, accuracy in %. Without `per_epoch` the last; tests count first."""
    for settings_name, table, column in SOURCES:
        if per_epoch and table == "test.jsonl":
            continue
        if (folder / settings_name).is_file() and (folder / table).is_file():
            settings = json.loads((folder / settings_name).read_text())
            lines = [json.loads(line) for line in (folder / table).read_text().splitlines()]
            lines = [line for line in lines if column in line]
            if lines:
                about = {**_about(settings), "run": folder.name}
                return [{**about, "epoch": line.get("epoch"), "accuracy": 100 * line[column]}
                        for line in (lines if per_epoch else lines[-1:])]
    raise ValueError(f"{folder} holds no results of a run: config.json or settings.json with a table of accuracies was expected")


def _about(settings: dict[str, Any]) -> dict[str, Any]:
    """What a figure distinguishes runs by."""
    meta = "infnet_r" in settings
    width = settings["hidden_size"] if meta else settings["width"]
    infinite = width in (-1, 0)
    mu = settings.get("mu_init") or settings.get("gaussian_init")
    kind = "infinite π" if infinite else "finite μ" if mu else "finite π"
    if meta:
        kernels = {"gp": "NNGP", "gp1lp": "NNGP", "ntk": "NTK", "ntk1lp": "NTK"}
        kind = next((name for flag, name in kernels.items() if settings[flag]), kind)
    elif settings.get("memory") == "moments" and infinite:
        kind = "infinite π, moments"
    return {"network": kind, "width": float("inf") if infinite else width, "r": settings["infnet_r" if meta else "r"],
            "seed": settings["seed"]}


def figure_of(frame: pd.DataFrame, against: str, by: str = "network"):
    """A figure of accuracy against `against`; lines are means over seeds, bands and bars their standard deviation.

    `by`: the column that tells the lines against epoch or r apart.
    """
    import seaborn as sns
    from matplotlib.figure import Figure
    with sns.axes_style("whitegrid"):
        figure = Figure(figsize=(5.4, 3.6), layout="constrained")
        axis = figure.subplots()
        if against == "seed":
            sns.stripplot(frame, x="network", y="accuracy", color="0.4", size=5, ax=axis)
            sns.pointplot(frame, x="network", y="accuracy", errorbar="sd", linestyle="none", marker="D", capsize=.15, ax=axis)
            axis.set(xlabel=None)
        elif against == "width":
            finite, infinite = frame[frame.width != float("inf")], frame[frame.width == float("inf")]
            if not finite.empty:
                sns.lineplot(finite, x="width", y="accuracy", hue="network", marker="o", errorbar="sd", err_style="bars", ax=axis)
                axis.set(xscale="log")
            for number, (kind, group) in enumerate(infinite.groupby("network")):
                axis.axhline(group.accuracy.mean(), ls="--", color=f"C{3 + number}", label=kind)
            axis.legend()
        else:
            sns.lineplot(frame, x=against, y="accuracy", hue=by, marker="o", errorbar="sd", ax=axis)
            axis.xaxis.get_major_locator().set_params(integer=True)
            if by == "run":  # folder names may be long, and lines many
                figure.set_size_inches(8, 3.6)
                sns.move_legend(axis, "center left", bbox_to_anchor=(1, .5), title=None)
        axis.set(ylabel="accuracy, %")
    return figure


def plot(runs: list[Path], against: str, out: Path, by: str = "network") -> pd.DataFrame:
    """Draw the figure into `out`; returns the numbers behind it."""
    if against not in AGAINST:
        raise ValueError(f"there is no figure against '{against}'; choose one of {', '.join(AGAINST)}")
    frame = pd.DataFrame([record for run in runs for record in read_run(run, against == "epoch")])
    out.parent.mkdir(parents=True, exist_ok=True)
    figure_of(frame, against, by).savefig(out, dpi=120)
    return frame


def main(argv: list[str] | None = None) -> pd.DataFrame:
    arguments = argparse.ArgumentParser(prog="python -m experiments.plots", description=__doc__, allow_abbrev=False,
                                        formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("runs", nargs="+", type=Path, help="output folders of runs")
    arguments.add_argument("--against", choices=AGAINST, default="epoch")
    arguments.add_argument("--by", choices=("network", "run"), default="network", help="what has a line of its own (epoch, r)")
    arguments.add_argument("--out", type=Path, default=Path("figure.png"))
    args = arguments.parse_args(argv)
    try:
        frame = plot(args.runs, args.against, args.out, args.by)
    except (ValueError, OSError) as error:
        arguments.error(str(error))
    last = frame.groupby(["network", "run"], as_index=False).last()
    for kind, group in last.groupby("network"):
        spread = f" ± {group.accuracy.std():.2f} (s.d.)" if len(group) > 1 else ""
        print(f"{kind}: {group.accuracy.mean():.2f}{spread} % over {len(group)} run(s)")
    print(f"drawn into {args.out}")
    return frame


if __name__ == "__main__":
    main()
