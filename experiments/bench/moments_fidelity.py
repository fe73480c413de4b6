"""How near moments come to exact ReLU rows: accuracy per epoch side by side, over seeds, degrees
and fits.

    python -m experiments.bench.moments_fidelity --plan digits --out output/fidelity
    python -m experiments.bench.moments_fidelity --plan cifar64 --data DIR --out output/fidelity
    python -m experiments.bench.moments_fidelity --table --out output/fidelity    # table and figure

Plans: digits, cifar64, cifar100 (rank 64 or 100, degree 2), cifar64-degree4, cifar100-degree4.
Every run is one of `cifar10mlp`
in a folder of its own: what is finished is passed over, what was interrupted goes on, so the same
command resumes the plan.

Moments of degree 4 at rank 100 are 4.4 million features, 3.7 GB in all and seconds per step on a
CPU; 40,000 rows are less. So the plans of degree 4 grow rows with the polynomial kernel, which are
the same function as moments (tests/inf/test_moments.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from pilimit_lib.core import write_text
from pilimit_lib.inf.dual.hermite import Series, hermite_series
from pilimit_lib.inf.implementation import implementation
from pilimit_lib.inf.rows import pending
from pilimit_lib.inf.rows.sums import plain

from ..cifar10.cifar10mlp import Settings, train
from ..training.flags import add_out, plain_command_line
from .machine import describe

KINDS = {
    "rows": {},
    "degree 2, hermite": {"memory": "moments"},
    "degree 2, minimax": {"memory": "moments", "fit": "minimax"},
    "degree 4, hermite": {"memory": "moments", "degree": 4},
    "degree 4, minimax": {"memory": "moments", "degree": 4, "fit": "minimax"},
}
DEGREE_2 = list(KINDS)[:3]
DIGITS = {"dataset": "digits", "r": 32, "batch_size": 32, "epochs": 12}
CIFAR = {
    "dataset": "cifar10",
    "train_subset_size": 10_000,
    "batch_size": 32,
    "epochs": 4,
    "lr": 0.7,
    "gclip_per_param": True,
}
PLANS = {
    "digits": (DIGITS, list(KINDS), 5),
    "cifar64": (CIFAR | {"r": 64}, DEGREE_2, 3),
    "cifar100": (CIFAR | {"r": 100}, DEGREE_2, 3),
    "cifar64-degree4": (CIFAR | {"r": 64}, list(KINDS)[3:], 3),
    "cifar100-degree4": (CIFAR | {"r": 100}, list(KINDS)[3:], 3),
}
AS_ROWS = ("cifar64-degree4", "cifar100-degree4")


@contextmanager
def rows_with_kernel(series: Series) -> Iterator[None]:
    """Inside the `with`, rows have this polynomial kernel in place of ReLU's: forward, backward and
    norm."""

    def relu_k(c: Tensor) -> Tensor:
        return series.kernel(c.clamp(-1, 1))

    def relu_k_parts(c: Tensor) -> tuple[Tensor, Tensor]:
        prime = c.new_zeros(c.shape)
        for j in range(series.degree, 0, -1):
            prime.mul_(c).add_(j * series.kappa[j])
        return prime * (2 * math.pi), (series.kernel(c) - c * prime) * (2 * math.pi)

    exact = pending.relu_k, plain.relu_k_parts
    pending.relu_k, plain.relu_k_parts = relu_k, relu_k_parts
    try:
        with implementation(rows="plain"):  # the faster ones have ReLU's kernel built in
            yield
    finally:
        pending.relu_k, plain.relu_k_parts = exact


def run_plan(plan: str, out: Path, data: str, seeds: int | None) -> None:
    """Run what is missing of a plan, seed by seed, so that an interrupted plan holds whole
    comparisons."""
    common, kinds, count = PLANS[plan]
    for seed in range(1, (seeds or count) + 1):
        for kind in kinds:
            how, kernel = KINDS[kind], nullcontext()
            if plan in AS_ROWS:
                how, kernel = (
                    {},
                    rows_with_kernel(
                        hermite_series("relu", how["degree"], how.get("fit", "hermite"))
                    ),
                )
            settings = Settings(**common, **how, seed=seed, data=data)
            folder = out / plan / f"{kind.replace(', ', '-').replace(' ', '')}-{seed}"
            done = _epochs(folder)
            if done < settings.epochs:
                with kernel:
                    train(
                        settings,
                        folder,
                        resume=(folder / "checkpoint.pt").is_file(),
                        overwrite=True,
                        quiet=True,
                    )
                if _epochs(folder) < settings.epochs:
                    return  # interrupted
                print(
                    plan,
                    kind,
                    "seed",
                    seed,
                    [round(100 * r["test_acc"], 2) for r in _records(folder)],
                    flush=True,
                )


def _records(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _epochs(folder: Path) -> int:
    return len(_records(folder))


def collect(out: Path) -> pd.DataFrame:
    """One line per run and epoch of everything that `out` holds."""
    lines = []
    # degree 4 of a rank belongs into the table of its rows
    for plan, (_, kinds, _) in PLANS.items():
        for kind in kinds:
            for folder in sorted(
                (out / plan).glob(f"{kind.replace(', ', '-').replace(' ', '')}-*")
            ):
                for record in _records(folder):
                    seed = int(folder.name.rsplit("-", 1)[1])
                    lines.append(
                        {
                            "plan": plan.removesuffix("-degree4"),
                            "kind": kind,
                            "seed": seed,
                            "epoch": record["epoch"],
                            "test %": 100 * record["test_acc"],
                            "train %": 100 * record["train_acc"],
                            "test loss": record["test_loss"],
                            "seconds": record["seconds"],
                            "MB": record["bytes"] / 1e6,
                        }
                    )
    return pd.DataFrame(lines)


def markdown(frame: pd.DataFrame) -> str:
    """Mean ± standard deviation over seeds of the test accuracy in every epoch, and of the last
    one's distance to rows."""
    parts = []
    for plan, group in frame.groupby("plan", sort=False):
        epochs = sorted(group["epoch"].unique())
        parts.append(
            f"**{plan}**, test accuracy in %, mean ± standard deviation over seeds\n\n"
            f"| | seeds | {' | '.join(f'epoch {e}' for e in epochs)} | minus rows | train %, last "
            "| MB at the end "
            f"| s per epoch |\n|---|---|{'---|' * (len(epochs) + 4)}"
        )
        ends = group[group["epoch"] == epochs[-1]].set_index(["kind", "seed"])["test %"]
        for kind, runs in group.groupby("kind", sort=False):
            cells = []
            for epoch in epochs:
                values = runs.loc[runs["epoch"] == epoch, "test %"]
                cells.append(_mean(values))
            paired = kind != "rows" and kind in ends.index and "rows" in ends.index
            cells.append(_mean((ends[kind] - ends["rows"]).dropna(), "+") if paired else "")
            last = runs[runs["epoch"] == runs["epoch"].max()]
            parts[-1] += (
                f"\n| {kind} | {runs['seed'].nunique()} | {' | '.join(cells)} | "
                f"{last['train %'].mean():.2f} | "
                f"{last['MB'].mean():.1f} | {runs['seconds'].mean():.1f} |"
            )
    return "\n\n".join(parts) + "\n"


def _mean(values: pd.Series, sign: str = "") -> str:
    spread = f" ± {values.std():.2f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.2f}{spread}" if len(values) else ""


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Accuracy per epoch, one panel per plan, bands over seeds."""
    import seaborn as sns

    plans = list(frame["plan"].unique())
    with sns.axes_style("whitegrid"):
        figure = Figure(figsize=(4.6 * len(plans), 3.6), layout="constrained")
        for axis, plan in zip(figure.subplots(1, len(plans), squeeze=False)[0], plans):
            sns.lineplot(
                frame[frame["plan"] == plan],
                x="epoch",
                y="test %",
                hue="kind",
                style="kind",
                markers=True,
                dashes=False,
                errorbar="sd",
                ax=axis,
            )
            axis.set_title(plan)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = plain_command_line("bench.moments_fidelity", __doc__)
    parser.add_argument(
        "--plan",
        action="append",
        default=[],
        choices=list(PLANS),
        help="which comparison to run; may be given several times",
    )
    add_out(parser, None, "folder of all runs")
    parser.add_argument("--data", default="./dataset", help="folder of CIFAR-10")
    parser.add_argument("--seeds", type=int, help="fewer or more seeds than the plan has")
    parser.add_argument(
        "--table",
        action="store_true",
        help="write table.md, runs.csv and curves.png from the finished runs",
    )
    args = parser.parse_args(argv)
    if not args.plan and not args.table:
        parser.error("give a --plan to run, or --table")
    for plan in args.plan:
        run_plan(plan, args.out, args.data, args.seeds)
    frame = collect(args.out)
    if args.table:
        if frame.empty:
            parser.error(f"no finished epoch under {args.out}")
        found = f"Table made on {describe()}\n\n{markdown(frame)}"
        write_text(args.out / "table.md", found)
        frame.to_csv(args.out / "runs.csv", index=False)
        draw(frame, args.out / "curves.png")
        print(found)


if __name__ == "__main__":
    main()
