"""The table and the figure of `does_it_help`: every arm against restarts, seed by seed.

    python -m experiments.dendrites.help_figure \\
        experiments/dendrites/logs/does_it_help.csv experiments/dendrites/logs/help_*.csv --out DIR

The name of a file is the name of its set. Written: `help.md` and `help.png`.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..training.flags import add_out, plain_command_line
from .does_it_help import ARMS

CONTROL = "restarts"
OTHERS = [arm for arm in ARMS if arm != CONTROL]


def read(paths: list[Path]) -> pd.DataFrame:
    """Rows of all files, with the name of the set; seeds of which not every arm of the set has
    finished are left out, so that everything stays paired."""
    frames = [pd.read_csv(path).assign(set=name_of(path)) for path in paths]
    frame = pd.concat(frames, ignore_index=True)
    arms = frame.groupby(["set", "hidden", "seed"])["arm"].transform("nunique")
    whole = frame.groupby(["set", "hidden"])["arm"].transform("nunique")
    return frame[arms == whole]


def name_of(path: Path) -> str:
    return "digits" if path.stem == "does_it_help" else path.stem.removeprefix("help_")


def differences(frame: pd.DataFrame, control: str = CONTROL) -> pd.DataFrame:
    """Test accuracy minus the control's of the same seed: a row per set, h and seed, a column per
    arm."""
    wide = frame.pivot(index=["set", "hidden", "seed"], columns="arm", values="test")
    return wide.sub(wide[control], axis=0).drop(columns=control)


def markdown(frame: pd.DataFrame) -> str:
    """Per set, h and arm: accuracy, and paired differences with their standard errors and how many
    seeds were better."""
    lines = [
        "| set, h | arm | test % | − restarts | better | − width | better | parameters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, hidden), part in frame.groupby(["set", "hidden"], sort=False):
        seeds = part["seed"].nunique()
        for arm in ARMS:
            rows = part[part["arm"] == arm]
            if rows.empty:
                continue
            cells = [f"{rows['test'].mean():.1f} ± {rows['test'].std():.1f}"]
            for control in (CONTROL, "width"):
                if arm == control or control not in set(part["arm"]):
                    cells += ["", ""]
                    continue
                values = differences(part, control)[arm]
                error = values.std() / seeds**0.5
                cells += [f"{values.mean():+.1f} ± {error:.1f}", f"{(values > 0).sum()}/{seeds}"]
            cells.append(f"{rows['parameters'].mean():.0f}")
            lines.append(f"| {name}, {hidden} | {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(frame: pd.DataFrame, path: Path) -> None:
    """A panel per set and h: a dot per seed, a bar at the mean with its standard error."""
    import seaborn as sns
    from matplotlib.figure import Figure  # not pyplot: nothing global, no window

    long = differences(frame).melt(ignore_index=False, value_name="difference").reset_index()
    panels = list(long.groupby(["set", "hidden"], sort=False))
    figure = Figure(figsize=(3.1 * len(panels), 3.2), layout="constrained")
    for axes, ((name, hidden), part) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels
    ):
        axes.axvline(0, color="0.6", linewidth=1)
        options = {"data": part, "x": "difference", "y": "arm", "order": OTHERS, "ax": axes}
        sns.stripplot(**options, hue="arm", hue_order=OTHERS, size=4, alpha=0.6, legend=False)
        sns.pointplot(**options, errorbar="se", linestyle="none", color="0.15", marker="|")
        seeds = part["seed"].nunique()
        axes.set(title=f"{name}, h = {hidden}, {seeds} seeds", ylabel="", xlabel="")
    figure.supxlabel("test accuracy minus that of restarts, points, same seed", fontsize=10)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> pd.DataFrame:
    flags = plain_command_line("dendrites.help_figure", __doc__)
    flags.add_argument("files", nargs="+", type=Path, help="results.csv of does_it_help")
    add_out(flags, "results/dendrites/help", "folder of help.md and the figure")
    args = flags.parse_args(argv)
    frame = read(args.files)
    args.out.mkdir(parents=True, exist_ok=True)
    text = markdown(frame)
    (args.out / "help.md").write_text(text)
    print(text)
    draw(frame, args.out / "help.png")
    return frame


if __name__ == "__main__":
    main()
