"""Table and figure of what `benchmark` wrote."""

from __future__ import annotations

from pathlib import Path

import pandas as pd


def report(out: Path) -> None:
    """Write table.md and tabular.png beside results.jsonl, from data sets on which every learner
    has been scored; and print the table."""
    results = pd.read_json(out / "results.jsonl", lines=True)
    results = results.drop_duplicates(["data", "learner", "fold"])
    text = table(results)
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    figure(complete(results), out / "tabular.png")


def complete(results: pd.DataFrame) -> pd.DataFrame:
    """Folds of data sets in which no learner is missing."""
    learners = results["learner"].nunique()
    count = results.groupby(["data", "fold"])["learner"].transform("nunique")
    return results[count == learners]


def table(results: pd.DataFrame) -> str:
    """Mean ± s.d. over folds in percent, the best in bold; mean rank, wins and seconds below."""
    results = complete(results)
    order = list(dict.fromkeys(results["learner"]))
    grouped = results.groupby(["data", "learner"])["score"]
    mean, spread = (part.unstack()[order] for part in (grouped.mean(), grouped.std(ddof=1)))
    lines = ["| data (n × d, source) | score | " + " | ".join(order) + " |"]
    lines.append("|---" * (len(order) + 2) + "|")
    for name in dict.fromkeys(results["data"]):
        about = results[results["data"] == name].iloc[0]
        cells = []
        for learner in order:
            cell = f"{100 * mean.loc[name, learner]:.1f} ± {100 * spread.loc[name, learner]:.1f}"
            cells.append(f"**{cell}**" if learner == mean.loc[name].idxmax() else cell)
        label = f"{name} ({about['n']} × {about['d']}, {about['source']})"
        kind = {"R2": "R²"}.get(about["kind"], about["kind"])
        lines.append(f"| {label} | {kind} | " + " | ".join(cells) + " |")
    ranks = mean.rank(axis=1, ascending=False).mean()
    wins = mean.idxmax(axis=1).value_counts()
    seconds = results.groupby("learner")["seconds"].sum()
    for label, values in (
        ("mean rank", [f"{ranks[learner]:.2f}" for learner in order]),
        ("best on", [f"{wins.get(learner, 0)} of {len(mean)}" for learner in order]),
        ("seconds, tuning included", [f"{seconds[learner]:.0f}" for learner in order]),
    ):
        lines.append(f"| {label} | | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def figure(results: pd.DataFrame, path: Path) -> None:
    """Each learner's score less the best of its fold, one point per fold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn as sns

    best = results.groupby(["data", "fold"])["score"].transform("max")
    points = results.assign(behind=100 * (best - results["score"]))
    axes = plt.figure(figsize=(10, 4.5)).subplots()
    sns.pointplot(
        points,
        x="data",
        y="behind",
        hue="learner",
        errorbar="sd",
        dodge=0.5,
        linestyle="none",
        ax=axes,
    )
    axes.set(xlabel="", ylabel="behind the best of its fold (% points)")
    axes.set_yscale("symlog", linthresh=1)
    axes.tick_params(axis="x", rotation=30)
    axes.figure.tight_layout()
    axes.figure.savefig(path, dpi=110)
    plt.close(axes.figure)
