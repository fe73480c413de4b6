"""What several processes save: steps of the training commands by torchrun, against one process at
the same global batch.

    python -m experiments.bench.processes --out output/processes
    python -m experiments.bench.processes --out output/processes --sizes 2 4 --only moments

Processes run one thread each, on random images of CIFAR-10's shape. Reported are medians of the
processor time of a step, of the slowest rank, and how many times that of one process it is; on a
quiet machine with a core for each process this is the speed-up, and on a busy one wall time would
be about the other jobs. What is not in it is waiting for others. Bytes are those that a rank
receives per step. Kept per case in results.jsonl; the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pilimit_lib.core import write_text
from pilimit_lib.core.collectives import counted
from pilimit_lib.inf.rows.layer import row_layers

from ..cifar10 import cifar10conv, cifar10mlp
from ..cifar10.conv_settings import Settings as ConvSettings
from ..cifar10.settings import Settings
from ..training.distributed import Ranks, processes
from ..training.flags import add_out, plain_command_line
from ..training.images import ImageSet
from ..training.loop import Trainer
from ..training.process import human_bytes

CASES: dict[str, dict[str, Any]] = {
    **{
        f"rows {rows:,}, r={r}, b={b}": {"rows": rows, "r": r, "batch_size": b}
        for rows in (20_000, 200_000)
        for r, b in ((100, 8), (100, 128))
    },
    **{
        f"moments, r={r}, b={b}": {"memory": "moments", "r": r, "batch_size": b}
        for r in (100, 200, 400)
        for b in (8, 128)
    },
    "ConvNet, default ranks, b=64": {"batch_size": 64},
}


def images(count: int) -> ImageSet:
    torch.manual_seed(0)
    x, y = torch.randn(count, 3, 32, 32), torch.randint(10, (count,))
    return ImageSet("cifar10", x, y, x[:8], y[:8], 10)


def trainer_of(case: dict[str, Any], steps: int) -> Trainer:
    """A command's trainer with an epoch of so many steps."""
    case = dict(case)
    rows, data = case.pop("rows", 0), images(case["batch_size"] * steps)
    if "r" not in case:
        return cifar10conv.Trainer(ConvSettings(**case, epochs=1), data, torch.device("cpu"))
    trainer = cifar10mlp.Trainer(Settings(**case, lr=0.01), data, torch.device("cpu"))
    for _, layer in row_layers(trainer.net):
        B = F.normalize(torch.randn(rows, layer.r))
        layer.set_rows(torch.randn(rows, layer.r_out), torch.full((rows,), 1 / rows), B)
    return trainer


def measure(case: dict[str, Any], ranks: Ranks, steps: int, warm: int = 3) -> dict[str, Any]:
    """Medians over steps of this process's time, and the bytes of a step."""
    trainer = trainer_of(case, steps + warm)
    trainer.spread(ranks)
    cpu, wall = [], []
    batches = iter(trainer.batches)
    for batch in islice(batches, warm):
        trainer.step(*batch)
    with counted() as traffic:
        for batch in batches:
            started = time.process_time(), time.perf_counter()
            trainer.step(*batch)
            cpu.append(time.process_time() - started[0])
            wall.append(time.perf_counter() - started[1])
    return {
        "cpu_ms": 1e3 * statistics.median(cpu),
        "wall_ms": 1e3 * statistics.median(wall),
        "bytes": round(traffic.bytes / steps),
        "collectives": traffic.calls / steps,
    }


def as_a_rank(name: str, steps: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with processes() as ranks:
        found = measure(CASES[name], ranks, steps)
        write_text(folder / f"rank-{ranks.rank}.json", json.dumps(found))


def run(name: str, size: int, steps: int, folder: Path) -> dict[str, Any]:
    """One case in `size` processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    command += ["--standalone", "-m", f"{__package__.split('.')[0]}.bench.processes"]
    command += ["--out", str(folder), "--steps", str(steps), "--as-a-rank", name]
    how = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env={**os.environ, **how})
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(size)]
    slowest = {key: max(each[key] for each in found) for key in found[0]}
    return {"case": name, "processes": size, **slowest}


def table(results: list[dict[str, Any]]) -> str:
    alone = {line["case"]: line for line in results if line["processes"] == 1}
    text = "| step | processes | processor ms of a rank | times faster | received per step | "
    text += "collectives |\n|---|---|---|---|---|---|\n"
    for line in results:
        faster = alone[line["case"]]["cpu_ms"] / line["cpu_ms"]
        text += (
            f"| {line['case']} | {line['processes']} | {line['cpu_ms']:.1f} | {faster:.2f} | "
            f"{human_bytes(line['bytes'])} | {line['collectives']:g} |\n"
        )
    return text


def main(argv: list[str] | None = None) -> None:
    parser = plain_command_line("bench.processes", __doc__)
    add_out(parser, None, "folder of results.jsonl and table.md")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[2], help="numbers of processes (default 2)"
    )
    parser.add_argument("--steps", type=int, default=15, help="steps of each case (default 15)")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--as-a-rank", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.as_a_rank:
        return as_a_rank(args.as_a_rank, args.steps, args.out)
    path = args.out / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    known = {(line["case"], line["processes"]) for line in results}
    for name in CASES:
        for size in (1, *args.sizes):
            if name.startswith(args.only) and (name, size) not in known:
                results.append(run(name, size, args.steps, args.out))
                write_text(path, "".join(json.dumps(line) + "\n" for line in results))
    write_text(args.out / "table.md", table(results))
    print(table(results))


if __name__ == "__main__":
    main()
