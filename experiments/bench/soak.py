"""Long runs and sudden deaths: memory and descriptors over many steps and saves, and whether a run
that is killed again and again ends as one that was left alone, bit for bit.

    # everything: 20,000 steps, 200 saves, 50 kills of each command
    python -m experiments.bench.soak --out output/soak
    # a short version, and only some of it
    python -m experiments.bench.soak --steps 2000 --saves 20 --kills 5 --out output/soak
    python -m experiments.bench.soak --steps 0 --saves 0 --only "cifar10mlp, rows" --out output/soak
    # transfer_imagenet too, which needs CIFAR-10
    python -m experiments.bench.soak --cifar-data DIR --out output/soak

Kills are `kill -9` at random moments between the beginning of a process and the time that the whole
run takes, with all imports done before it begins, so that they fall on steps, saves and figures.
Then the command is given again, with --resume where there is a checkpoint. Writes table.md and
soak.json. Exit status 1 where a resumed run differs or something grows.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pilimit_lib.core import load, restore, save, snapshot, write_json, write_text

from ..cifar10 import cifar10conv, cifar10mlp, cifar10test
from ..imagenet import transfer_imagenet
from ..meta import train as meta_train
from ..training.errors import errors_of
from ..training.flags import add_out, plain_command_line
from ..training.images import load_images
from ..training.plots import curves

MEGABYTE = 2**20
GROWTH = 8 * MEGABYTE  # what an allocator may keep without a leak; a leaking step would show as GBs
TIMES = ("seconds", "cpu_seconds", "kernel_seconds")
DIGITS = "--train-subset-size 160 --test-subset-size 40 --batch-size 8 --epochs 4 --quiet".split()
MLP = ["--r", "12", "--momentum", "0.5", "--lr", "0.1", *DIGITS]


@dataclass(frozen=True)
class Command:
    """A command that saves: its flags, the flag of its folder, and how it is told to go on."""

    main: Callable[[list[str]], Any]
    flags: list[str]
    folder: str = "--save-dir"
    resumes: bool = True


def commands(cifar_data: str | None) -> dict[str, Command]:
    """Every command here that saves, on data that need no download; small."""
    conv = "--dataset digits --ranks 4,5 --pools 2 --ema 0.9 --cutout 3 --beside mup:4".split()
    meta = "--dataset sinusoid --hidden-size -1 --memory moments --infnet-r 10 --quiet".split()
    meta += "--num-epochs 4 --num-batches 20 --num-test-batches 3 --batch-size 4".split()
    kernel = "--gp --dataset digits --train-subset-size 600 --save-kernel --quiet".split()
    found = {
        "cifar10mlp, rows": Command(cifar10mlp.main, [*MLP, "--data-augment", "--save-model"]),
        "cifar10mlp, moments": Command(cifar10mlp.main, [*MLP, "--memory", "moments"]),
        "cifar10mlp, width 64": Command(cifar10mlp.main, [*MLP, "--width", "64"]),
        "cifar10conv, two networks": Command(cifar10conv.main, [*conv, *DIGITS]),
        "meta.train": Command(meta_train.main, meta, "--output-folder"),
        "cifar10test --save-kernel": Command(cifar10test.main, kernel, resumes=False),
    }
    if cifar_data is not None:
        transfer = ["--dataset", "cifar10-half", "--cifar-data", cifar_data, "--r", "12"]
        transfer += "--transfer --transfer-milestones 0,1,4 --save-epochs all".split()
        transfer += "--transfer-train-size 200 --transfer-test-size 100".split()
        found["transfer_imagenet"] = Command(transfer_imagenet.main, [*transfer, *DIGITS])
    return found


def size_of_process() -> tuple[int, int]:
    """(bytes of memory in use, open descriptors) of this process, of what Linux says about it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))


def growth(work: Iterator[None], count: int) -> dict[str, Any]:
    """How much a process grows over `count` pieces of work, after the first quarter of them."""
    started, settled = time.perf_counter(), (0, 0)
    largest = (0, 0)
    for number in range(count):
        next(work)
        if number == count // 4:
            settled = size_of_process()
        elif number > count // 4:
            largest = tuple(map(max, largest, size_of_process()))
    end = size_of_process()
    return {
        "count": count,
        "memory": end[0],
        "memory_growth": max(largest[0], end[0]) - settled[0],
        "descriptors": end[1],
        "descriptor_growth": end[1] - settled[1],
        "seconds": round(time.perf_counter() - started, 1),
    }


def training(settings: cifar10mlp.Settings) -> Iterator[None]:
    """Steps without end, from epoch to epoch."""
    data = load_images("digits")
    trainer = cifar10mlp.Trainer(settings, data, torch.device("cpu"))
    while True:
        for ids, x, y in trainer.batches:
            trainer.step(ids, x, y)
            yield


def saving(settings: cifar10mlp.Settings, path: Path) -> Iterator[None]:
    """A checkpoint written, read and restored, again and again."""
    trainer = cifar10mlp.Trainer(settings, load_images("digits"), torch.device("cpu"))
    ids, x, y = next(iter(trainer.batches))
    trainer.step(ids, x, y)
    while True:
        save(snapshot(trainer.net, trainer.optimizer), path)
        restore(trainer.net, load(path), trainer.optimizer)
        yield


def attempt(command: Command, folder: Path, patience: float | None) -> tuple[bool, float]:
    """Give the command; (whether it was killed, for which it had `patience` seconds, seconds)."""
    resume = command.resumes and (folder / "checkpoint.pt").is_file()
    argv = [*command.flags, command.folder, str(folder), *(["--resume"] if resume else [])]
    process = multiprocessing.get_context("fork").Process(target=_silently, args=(command, argv))
    started = time.perf_counter()
    process.start()
    process.join(patience)
    killed = process.is_alive()
    if killed:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    elif process.exitcode:
        raise RuntimeError(f"exit status {process.exitcode} of {' '.join(argv)}")
    return killed, time.perf_counter() - started


def _silently(command: Command, argv: list[str]) -> None:
    """In a process of its own: the tables of many small runs are of no interest."""
    with open(os.devnull, "w") as nowhere:
        sys.stdout = nowhere
        command.main(argv)


def kills(command: Command, place: Path, count: int, seed: int) -> dict[str, Any]:
    """Kill a command `count` times, and compare every run that it came to the end of with one that
    was left alone."""
    whole, chance = place / "whole", random.Random(seed)
    _, seconds = attempt(command, whole, None)
    suffered, runs, differing = 0, 0, []
    while suffered < count:
        parts = place / "parts"
        shutil.rmtree(parts, ignore_errors=True)
        while suffered < count:
            killed, _ = attempt(command, parts, chance.uniform(0, seconds))
            if not killed:
                break
            suffered += 1
        else:
            attempt(command, parts, None)
        runs += 1
        differing += [f"run {runs}: {what}" for what in differences(whole, parts)]
    return {"kills": suffered, "runs": runs, "differing": differing, "seconds": round(seconds, 2)}


def differences(one: Path, two: Path) -> list[str]:
    """What two folders of runs differ in, times apart: names of files, and of entries in them."""
    names = [{p.relative_to(run) for p in run.rglob("*") if p.is_file()} for run in (one, two)]
    found = [f"{name} is in one only" for name in sorted(map(str, names[0] ^ names[1]))]
    for name in sorted(names[0] & names[1]):
        read = READERS.get(name.suffix)
        if read is not None:
            found += _differences(read(one / name), read(two / name), str(name))
    return found


READERS: dict[str, Callable[[Path], Any]] = {
    ".pt": load,
    ".th": load,
    ".npy": lambda path: path.read_bytes(),
    ".json": lambda path: json.loads(path.read_text()),
    ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
}


def _differences(one: Any, two: Any, where: str) -> list[str]:
    if type(one) is not type(two):
        return [where]
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == two.dtype and torch.equal(one, two) else [where]
    if isinstance(one, dict):
        keys = (one.keys() | two.keys()) - set(TIMES)
        pairs = [(f"{where}.{key}", one.get(key), two.get(key)) for key in keys]
    elif isinstance(one, list | tuple):
        if len(one) != len(two):
            return [where]
        pairs = [(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(one, two))]
    else:
        return [] if one == two else [where]
    return [name for place, a, b in pairs for name in _differences(a, b, place)]


def table(found: dict[str, Any]) -> str:
    """What was found, as Markdown."""
    lines = ["| work | times | memory at the end | growth | descriptors | growth |"]
    lines.append("|---|---|---|---|---|---|")
    for what, of in found["growth"].items():
        memory, more = of["memory"] / MEGABYTE, of["memory_growth"] / MEGABYTE
        lines.append(
            f"| {what} | {of['count']:,} | {memory:.0f} MB | {more:.1f} MB | {of['descriptors']} | "
            f"{of['descriptor_growth']} |"
        )
    lines += [
        "",
        "| command | kills | runs that came to their end | differing |",
        "|---|---|---|---|",
    ]
    for what, of in found["kills"].items():
        lines.append(f"| {what} | {of['kills']} | {of['runs']} | {len(of['differing'])} |")
    return "\n".join(lines) + "\n"


def passed(found: dict[str, Any]) -> bool:
    flat = all(
        of["memory_growth"] <= GROWTH and of["descriptor_growth"] <= 0
        for of in found["growth"].values()
    )
    return flat and not any(of["differing"] for of in found["kills"].values())


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = plain_command_line("bench.soak", __doc__)
    for name, count, what in (
        ("steps", 20_000, "training steps over which memory must not grow; 0 none"),
        ("saves", 200, "checkpoints over which it must not; 0 none"),
        ("kills", 50, "of each command; 0 none"),
        ("seed", 1, "of the moments of the kills"),
    ):
        arguments.add_argument(
            f"--{name}", type=int, default=count, help=f"{what} (default {count})"
        )
    arguments.add_argument("--only", default="", help="the one command to kill")
    arguments.add_argument("--cifar-data", help="folder of CIFAR-10, for transfer_imagenet")
    add_out(arguments, None, "folder of soak.json, table.md and the runs")
    args = arguments.parse_args(argv)
    with errors_of(arguments):
        chosen = commands(args.cifar_data)
        if args.only:
            if args.only not in chosen:
                raise ValueError(f"--only is one of {'; '.join(chosen)}; got {args.only!r}")
            chosen = {args.only: chosen[args.only]}
        torch.set_num_threads(1)  # a process with threads can't be forked safely
        args.out.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = {"arguments": {**vars(args), "out": str(args.out)}}
        found |= {"growth": {}, "kills": {}}
        # Kills first, since processes are forked from this one; and what draws is imported by now.
        curves(pd.DataFrame({"epoch": [1], "one": [0.0]}), {"loss": ("one",)}, "")
        for name, command in chosen.items() if args.kills else ():
            place = args.out / name.replace(", ", "-").replace(" ", "-")
            shutil.rmtree(place, ignore_errors=True)
            found["kills"][name] = kills(command, place, args.kills, args.seed)
            print(f"{name}: {found['kills'][name]}", flush=True)
        settings = cifar10mlp.Settings(memory="moments", r=16, lr=0.05)
        works = {
            "step of moments": (training(settings), args.steps),
            "save and load": (saving(settings, args.out / "soak.pt"), args.saves),
        }
        for name, (work, count) in works.items():
            if count:
                found["growth"][name] = growth(work, count)
        write_json(args.out / "soak.json", found | {"settings": asdict(settings)})
        write_text(args.out / "table.md", table(found))
        print(table(found), end="")
        if not passed(found):
            arguments.exit(1, "a resumed run differs, or memory or descriptors grow\n")
    return found


if __name__ == "__main__":
    main()
