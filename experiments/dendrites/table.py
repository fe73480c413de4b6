"""Results of several seeds and arms as a table (CSV, Markdown) and a picture."""

from pathlib import Path

import pandas as pd

COLUMNS = [
    "val",
    "test",
    "test first cycle",
    "parameters",
    "parameters trained",
    "epochs",
    "seconds",
]


def write_table(rows: list[dict], out: Path) -> pd.DataFrame:
    """Write results.csv, table.md (mean ± standard deviation over seeds, and paired differences)
    and test.png."""
    frame = pd.DataFrame(rows)
    frame.to_csv(out / "results.csv", index=False)
    groups = frame.groupby(["set", "base width", "arm"], sort=False)
    mean, std = groups[COLUMNS].mean(), groups[COLUMNS].std().fillna(0)
    lines = [
        "| set | base width | arm | seeds | " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * (len(COLUMNS) + 4),
    ]
    for key in mean.index:
        cells = [
            f"{mean.loc[key, c]:.2f} ± {std.loc[key, c]:.2f}"
            if c in COLUMNS[:3]
            else f"{mean.loc[key, c]:.0f}"
            for c in COLUMNS
        ]
        lines.append(
            f"| {key[0]} | {key[1]} | {key[2]} | {len(groups.get_group(key))} | "
            + " | ".join(cells)
            + " |"
        )
    lines += ["", "Test accuracy of dendrites minus a control, by seed:", ""]
    wide = frame.pivot_table(index=["set", "base width", "seed"], columns="arm", values="test")
    for control in ("restarts", "wider"):
        if "dendrites" in wide and control in wide:
            for (name, width), part in (
                (wide["dendrites"] - wide[control]).dropna().groupby(level=[0, 1])
            ):
                lines.append(
                    f"* {name}, base width {width}, minus {control}: "
                    + ", ".join(f"{v:+.2f}" for v in part)
                    + f" (mean {part.mean():+.2f})"
                )
    (out / "table.md").write_text("\n".join(lines) + "\n")
    _draw(frame, out / "test.png")
    return frame


def _draw(frame: pd.DataFrame, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn as sns

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    sns.stripplot(frame, x="base width", y="test", hue="arm", dodge=True, ax=axes)
    axes.set_ylabel("test accuracy at the best validation epoch, %")
    figure.savefig(path, dpi=100)
    plt.close(figure)
