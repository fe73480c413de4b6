"""Infinitely wide networks beside finite ones, kernels and boosting on tabular data: same folds,
same tuning budget.

    python -m experiments.tabular.benchmark --out output/tabular            # resumes
    python -m experiments.tabular.benchmark --out output/tabular --report   # table and figure only

Three folds. In each, every learner chooses among four settings by its score on a quarter of the
training part, is trained anew on all of it, and is scored on the fold: accuracy, or R². One line of
results.jsonl per learner and fold.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold, train_test_split
from tqdm import tqdm

from ..training.flags import add_out, plain_command_line
from . import data
from .learners import learners
from .report import report

FOLDS = 3


def score(table: data.Table, name: str, fold: int) -> dict[str, object]:
    """One learner on one fold of one table: a line of results."""
    split = StratifiedKFold if table.classes else KFold
    folds = split(FOLDS, shuffle=True, random_state=0).split(table.X, table.y)
    train, test = list(folds)[fold]
    inner, held = train_test_split(
        train,
        test_size=0.25,
        random_state=fold,
        stratify=table.y[train] if table.classes else None,
    )
    began, candidates = time.process_time(), learners()[name]
    trials = [
        candidate.fit(table.X[inner], table.y[inner]).score(table.X[held], table.y[held])
        for candidate in candidates(table.classes, table.X.shape[1], fold)
    ]
    best = int(np.argmax(trials))
    final = candidates(table.classes, table.X.shape[1], fold)[best]
    value = final.fit(table.X[train], table.y[train]).score(table.X[test], table.y[test])
    return {
        "data": table.name,
        "source": table.source,
        "n": len(table.y),
        "d": table.X.shape[1],
        "kind": "accuracy" if table.classes else "R2",
        "learner": name,
        "fold": fold,
        "setting": best,
        "score": round(float(value), 5),
        "seconds": round(time.process_time() - began, 2),
    }


def run(out: Path, names: list[str]) -> None:
    """Everything that results.jsonl lacks."""
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    lines = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )
    done = {(line["data"], line["learner"], line["fold"]) for line in lines}
    tables = []
    for name in names:
        try:
            tables.append(data.load(name))
        except ModuleNotFoundError as error:
            print(f"{name} left out: {error}")
    todo = [
        (table, learner, fold)
        for table in tables
        for fold in range(FOLDS)
        for learner in learners()
        if (table.name, learner, fold) not in done
    ]
    with results.open("a", encoding="utf-8") as file:
        for table, learner, fold in tqdm(todo, disable=None):
            file.write(json.dumps(score(table, learner, fold), ensure_ascii=False) + "\n")
            file.flush()


def main() -> None:
    parser = plain_command_line("tabular.benchmark", __doc__)
    add_out(parser, "output/tabular", "folder of results.jsonl, from which a command goes on")
    parser.add_argument(
        "--data",
        nargs="+",
        choices=data.names(),
        default=data.names(),
        help="data sets (default all)",
    )
    parser.add_argument("--report", action="store_true", help="read results.jsonl only")
    options = parser.parse_args()
    if not options.report:
        run(options.out, options.data)
    report(options.out)


if __name__ == "__main__":
    main()
