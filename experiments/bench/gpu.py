"""What a lent GPU is for, in one command that stops by itself after 25 minutes.

    python -m experiments.bench.gpu --data DIR
    # what it would do, anywhere
    python -m experiments.bench.gpu --plan
    # every stage at tiny sizes on the CPU, in seconds
    python -m experiments.bench.gpu --rehearse --out output/gpu

Stages: the machine's measured bandwidth and rates; Triton kernels of moments, rows and convolutions
against the plain operators (errors, times, sizes of tiles); training steps against their floor,
max(bytes / bandwidth, FLOPs / rate), both measured in the same run; then the paper's command for
the time that is left, which a second call with the same --out resumes. Each stage has a budget and
each case is written as it ends: results.jsonl and report.md in --out; --append adds the report to a
file of results. Without a GPU it says what it would do.
"""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pilimit_lib.core import write_text

from ..training.flags import dated_folder, plain_command_line
from .gpu_kernels import conv_kernels, moments_kernels, rows_kernels
from .gpu_stages import FULL, TINY, Case, Sizes, machine
from .gpu_steps import steps

LIMIT = 25 * 60.0
CLOSING = 30.0  # seconds kept for the report and the last checkpoint


@dataclass(frozen=True)
class Stage:
    """A part of the day: what it is for, the seconds that it may take, and its cases."""

    name: str
    aim: str
    seconds: float
    cases: Callable[[Sizes, str], Iterator[Case]]


STAGES = (
    Stage("machine", "bandwidth and rates that floors are made of", 60, machine),
    Stage(
        "moments kernels",
        "Triton against plain: errors, times, block sizes",
        300,
        moments_kernels,
    ),
    Stage("rows kernels", "every implementation: errors and times", 300, rows_kernels),
    Stage(
        "convolution kernels",
        "Triton against plain: errors, times, block sizes",
        180,
        conv_kernels,
    ),
    Stage("steps", "training steps against their floors", 240, steps),
)
PAPER = (
    "--dataset cifar10 --lr 1.0 --gclip-per-param --gclip 0.4 --lr-drop-ratio 0.15 "
    "--lr-drop-milestones 40 --scheduler multistep --wd 0.00001 --r 400 --batch-size 8 "
    "--epochs 50 --width 0 --seed 0 --depth 2 --bias-alpha 0.5 --first-layer-lr-mult 0.1 "
    "--last-layer-lr-mult 4.0 --first-layer-alpha 1.0 --last-layer-alpha 0.5 "
    "--no-apply-lr-mult-to-wd --cuda"
).split()


class TimeIsUp(Exception):
    """The limit of the whole call has passed inside of a case."""


class Day:
    """The records of one call, written as they come, and the time that is left."""

    def __init__(self, folder: Path, limit: float, clock: Callable[[], float] = time.monotonic):
        self.folder, self.clock = folder, clock
        self.end = clock() + limit
        self.records: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        return self.end - self.clock()

    def note(self, stage: str, **record: Any) -> None:
        self.records.append({"stage": stage} | record)
        lines = "".join(json.dumps(each) + "\n" for each in self.records)
        write_text(self.folder / "results.jsonl", lines)
        write_text(self.folder / "report.md", report(self.records))

    def run(self, stage: Stage, sizes: Sizes, device: str) -> None:
        """The cases of a stage, until they or its seconds are used up. One that fails is noted."""
        end = min(self.clock() + stage.seconds, self.end - CLOSING)
        cases = stage.cases(sizes, device)
        while self.clock() < end:
            case = next(cases, None)
            if case is None:
                return
            try:
                found = case.measure()
            except TimeIsUp:
                raise
            except Exception as error:  # a kernel that is not compiled is no reason to end the day
                found = {"failed": f"{type(error).__name__}: {error}"}
            self.note(stage.name, **case.label, **found)
        self.note(stage.name, stopped=f"after its {stage.seconds:.0f} s; what is above is whole")


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeIsUp after so many seconds, wherever the process is."""

    def stop(number: int, frame: Any) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def paper(day: Day, data: str, command: list[str] | None = None) -> None:
    """The paper's command, until what is left of the time is used up; it then stops after a step,
    with a checkpoint."""
    run = day.folder / "paper"
    resumed = (run / "checkpoint.pt").is_file()
    flags = ["--resume", "--data", data] if resumed else [*PAPER, "--data", data, "--overwrite"]
    if command is None:
        command = [sys.executable, "-m", f"{__package__.split('.')[0]}.cifar10.cifar10mlp", *flags]
        command += ["--save-dir", str(run)]
    started = day.clock()
    with (day.folder / "paper.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = process.wait(max(0.0, day.left - CLOSING))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                status = process.wait(CLOSING / 2)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
    metrics = run / "metrics.jsonl"
    epochs = (
        [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    )
    day.note(
        "paper",
        status=status,
        minutes=round((day.clock() - started) / 60, 1),
        epochs=len(epochs),
        **({"test_acc": epochs[-1]["test_acc"]} if epochs else {}),
    )


def plan(sizes: Sizes) -> str:
    """What a call would do: stages, sizes, minutes."""
    lines = [f"{stage.name:<20} {stage.seconds / 60:>4.1f} min   {stage.aim}" for stage in STAGES]
    used = sum(stage.seconds for stage in STAGES) + CLOSING
    left = (LIMIT - used) / 60
    lines.append(
        f"{'paper':<20} {left:>4.1f} min   the paper's command, or more if others need less"
    )
    return "\n".join([*lines, "", "sizes:", *sizes.described()])


def report(records: list[dict[str, Any]]) -> str:
    """All records as tables, one per stage and set of columns."""
    tables: dict[tuple, list[dict[str, Any]]] = {}
    for record in records:
        columns = tuple(name for name in record if name != "stage")
        tables.setdefault((record["stage"], columns), []).append(record)
    text = ""
    for (stage, columns), lines in tables.items():
        text += f"\n**{stage}**\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
        for line in lines:
            text += f"| {' | '.join(shown(line[column]) for column in columns)} |\n"
    return text


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def append(path: Path, text: str, device: str) -> None:
    """Add a section to a file of results, under the newest first."""
    section = f"## {time.strftime('%Y-%m-%d')}: a GPU day on {device}\n{text}\n"
    before = path.read_text(encoding="utf-8")
    head, mark, rest = before.partition("\n## ")
    write_text(path, f"{head}\n{section}{mark[1:]}{rest}")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = plain_command_line("bench.gpu", __doc__)
    parser.group("output").add_argument(
        "--out", "--save-dir", type=Path, help="folder (default output/gpu/<date and time>)"
    )
    parser.add_argument(
        "--data", default="./dataset", help="folder that holds CIFAR-10 (default ./dataset)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=LIMIT / 60,
        help=f"for everything (default {LIMIT / 60:g})",
    )
    parser.add_argument("--append", type=Path, help="file of results that gets the report")
    parser.add_argument("--plan", action="store_true", help="say what would be done, and end")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    args = parser.parse_args(argv)
    sizes, device = (TINY, "cpu") if args.rehearse else (FULL, "cuda")
    if args.plan or not (args.rehearse or torch.cuda.is_available()):
        why = "" if args.plan else "torch finds no CUDA device, so nothing is run. "
        print(f"{why}On a GPU this does:\n\n{plan(sizes)}")
        return []
    name = platform.processor() if args.rehearse else torch.cuda.get_device_name()
    day = Day(args.out or dated_folder("gpu"), 60 * args.minutes)
    try:
        with limited(day.left):
            for stage in STAGES:
                print(f"{stage.name}: {stage.aim}", flush=True)
                day.run(stage, sizes, device)
            if not args.rehearse:
                print("paper: until the time is up", flush=True)
                paper(day, args.data)
    except TimeIsUp:
        day.note("all", stopped=f"after {args.minutes:g} minutes, within a case")
    print(report(day.records))
    if args.append:
        append(args.append, report(day.records), name)
    print(f"results in {day.folder}")
    return day.records


if __name__ == "__main__":
    main()
