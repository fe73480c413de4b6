"""A table and a picture of several runs of `cifar10conv`: accuracy against the time they trained.

    python -m experiments.cifar10.conv_results output/cifar10conv/a output/cifar10conv/b \\
        --out output/conv_results
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from pilimit_lib.core import write_text

from ..training.errors import errors_of
from ..training.flags import add_out, plain_command_line

RUN = ["run", "network", "seed"]


def collect(folders: list[Path]) -> list[dict[str, Any]]:
    """The records of every epoch of the runs in these folders and in those within them."""
    records = []
    for folder in folders:
        found = sorted(
            {
                path.parent
                for path in [folder / "metrics.jsonl", *folder.glob("*/metrics.jsonl")]
                if path.is_file()
            }
        )
        if not found:
            raise FileNotFoundError(
                f"there is no run with a finished epoch in {folder}: metrics.jsonl is missing"
            )
        for place in found:
            settings = json.loads((place / "settings.json").read_text())
            for line in (place / "metrics.jsonl").read_text().splitlines():
                record = json.loads(line)
                records.append(
                    record
                    | {
                        "run": place.name,
                        "optimizer": settings["optimizer"],
                        "epochs": settings["epochs"],
                        "lr": settings["lr"],
                        "mflop": record.get("mflop", float("nan")),  # runs of old have none
                        "network": f"{record['network']}, {settings['optimizer']}",
                    }
                )
    return records


def table(records: list[dict[str, Any]]) -> str:
    """One line per run: its last epoch so far, and the time up to there."""
    lines = [
        "| network | parameters | seed | epoch | train % | test % | test loss | CPU minutes | CPU "
        "s per epoch | MFLOP | lr |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for _, group in pd.DataFrame(records).groupby(RUN, sort=False):
        last, seconds = group.iloc[-1], group["cpu_seconds"]
        lines.append(
            f"| {last['network']} | {last['parameters']:,} | {last['seed']} | {last['epoch']} of "
            f"{last['epochs']} | "
            f"{100 * last['train_acc']:.2f} | {100 * last['test_acc']:.2f} | "
            f"{last['test_loss']:.4f} | "
            f"{seconds.sum() / 60:.1f} | {seconds.min():.0f} – {seconds.max():.0f} | "
            f"{last['mflop']:.1f} | {last['lr']:g} |"
        )
    return "\n".join(lines) + "\n"


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Test accuracy against the CPU time spent on training."""
    import seaborn as sns
    from matplotlib.figure import Figure

    frame = pd.DataFrame(records)
    frame["CPU minutes of training"] = frame.groupby(RUN)["cpu_seconds"].cumsum() / 60
    frame["test accuracy, %"] = 100 * frame["test_acc"]
    frame["seed"] = frame["run"] + frame["seed"].astype(str)
    with sns.axes_style("whitegrid"):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axis = figure.subplots()
        sns.lineplot(
            frame,
            x="CPU minutes of training",
            y="test accuracy, %",
            hue="network",
            units="seed",
            estimator=None,
            marker="o",
            ax=axis,
        )
        axis.get_legend().set_title(None)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = plain_command_line("cifar10.conv_results", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of cifar10conv")
    add_out(parser, None, "folder of table.md and compare.png")
    args = parser.parse_args(argv)
    with errors_of(parser):
        records = collect(args.runs)
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(args.out / "table.md", table(records))
        draw(records, args.out / "compare.png")
        print(table(records))


if __name__ == "__main__":
    main()
