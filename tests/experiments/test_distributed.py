"""Training commands in several processes (Gloo), as torchrun starts them, against one process."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from experiments.cifar10 import cifar10conv, cifar10mlp
from experiments.imagenet import transfer_imagenet
from experiments.meta import train as meta_train
from experiments.training import distributed
from pilimit_lib.core import load
from tests.experiments.test_endings import ROOT, SMALL
from tests.experiments.test_meta import SINUSOID
from tests.experiments.test_transfer_imagenet import cifar, imagenet, small_cifar

__all__ = ["cifar", "imagenet", "small_cifar"]  # fixtures

COMMANDS = {
    "mlp": cifar10mlp.main,
    "conv": cifar10conv.main,
    "meta": meta_train.main,
    "transfer": transfer_imagenet.main,
}
IMPORTED_LATE = ("torch.distributed", "torch._dynamo", "sklearn.datasets", "seaborn")
OF_RUN = {"seconds", "cpu_seconds", "bytes", "processes", "exchanged"}
# 40 images in batches of 13, 13, 13 and 1: uneven shares, and fewer samples than processes
MLP = [*SMALL, "--lr", "0.3", "--quiet", "--batch-size", "13"]
CONV = ["--dataset", "digits", "--ranks", "4,5", "--pools", "2", "--train-subset-size", "40"]
CONV += ["--test-subset-size", "20", "--batch-size", "13", "--test-batch-size", "9", "--quiet"]


def rank_of(rank: int, size: int, port: int, command: str, flags: list[str], before) -> None:
    """One of the processes that torchrun would start."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w") if before is not None else sys.stderr
    if before is not None:
        before(rank)
    COMMANDS[command](flags)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def started(
    size: int, command: str, flags: list[str], before=None, grace: float = 60
) -> list[int | None]:
    """Exit codes of the processes, None of one that is still there when another has been gone for
    `grace` seconds. `before(rank)` is called in each."""
    context = multiprocessing.get_context("forkserver")  # which imports once for all
    context.set_forkserver_preload([__name__, *IMPORTED_LATE])
    port = free_port()
    arguments = [(rank, size, port, command, flags, before) for rank in range(size)]
    processes = [context.Process(target=rank_of, args=args) for args in arguments]
    for process in processes:
        process.start()
    end = time.monotonic() + 300
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        gone = [process for process in processes if not process.is_alive()]
        if gone:
            end = min(end, time.monotonic() + grace)
        time.sleep(0.02)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def records(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in OF_RUN}
        for line in lines
    ]


def close(one: dict, two: dict, where: str = "") -> None:
    """Equal to rounding."""
    assert one.keys() - OF_RUN == two.keys() - OF_RUN, where
    for name in one.keys() - OF_RUN:
        a, b = one[name], two[name]
        if isinstance(a, dict):
            close(a, b, f"{where}.{name}")
        elif isinstance(a, torch.Tensor) and a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=f"{where}.{name}")
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b), f"{where}.{name}"
        elif isinstance(a, float):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-6), f"{where}.{name}"
        else:
            assert a == b, f"{where}.{name}"


def same_runs(one: Path, two: Path) -> None:
    found = [load(folder / "checkpoint.pt") for folder in (one, two)]
    models = [
        {
            name: value
            for name, value in state["model"].items()
            if not name.endswith(("_raw", "_factors"))
        }
        for state in found
    ]
    close(*models, "model")
    assert found[0]["extras"]["epoch"] == found[1]["extras"]["epoch"]
    sums = [dict(state["extras"]["sums"]) for state in found]
    close(*sums, "sums")
    if (one / "metrics.jsonl").exists():
        for pair in zip(records(one), records(two), strict=True):
            close(*pair, "records")


# which rows are merged hangs on roundings, which in C++ differ with the size of a share
BUDGET = ["--row-budget", "30", "--gclip-per-param", "--implementation", "plain"]
RUNS = {
    "rows, sharded": ("mlp", [*MLP, "--momentum", "0.5"]),
    "rows within a budget": ("mlp", [*MLP, *BUDGET]),
    "moments, in factors": ("mlp", [*MLP, "--memory", "moments", "--accum-steps", "2"]),
    "convolutions": ("conv", [*CONV, "--ema", "0.5", "--scheduler", "none"]),
}


@pytest.mark.parametrize("run", RUNS)
def test_numbers_of_processes_take_turns_in_one_run(tmp_path, run):
    command, flags = RUNS[run]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    COMMANDS[command]([*flags, "--save-dir", str(whole), "--epochs", "3"])
    flags = [*flags, "--save-dir", str(parts)]
    assert started(2, command, [*flags, "--epochs", "1"]) == [0, 0]
    COMMANDS[command]([*flags, "--epochs", "2", "--resume"])
    assert started(3, command, [*flags, "--epochs", "3", "--resume"]) == [0, 0, 0]
    same_runs(whole, parts)


def test_meta_learning_shares_tasks_out(tmp_path):
    flags = [*SINUSOID, "--quiet", "--output-folder"]
    meta_train.main([*flags, str(tmp_path / "one")])
    assert started(2, "meta", [*flags, str(tmp_path / "two")]) == [0, 0]
    for table in ("train", "val"):
        lines = [(tmp_path / run / f"{table}.jsonl").read_text() for run in ("one", "two")]
        for pair in zip(*(map(json.loads, text.splitlines()) for text in lines), strict=True):
            close(*pair, table)


def unchecked(rank: int) -> None:
    """Files of CIFAR-10 that are not the published ones."""
    from torchvision import datasets

    datasets.CIFAR10._check_integrity = lambda self: True
    datasets.CIFAR10.meta = {**datasets.CIFAR10.meta, "md5": None}


def test_features_of_sharded_rows_are_transferred_by_one_process(tmp_path, imagenet, small_cifar):
    flags = ["--imagenet-data", str(imagenet), "--cifar-data", str(small_cifar), "--transfer"]
    flags += ["--transfer-milestones", "0,1", "--r", "6", "--epochs", "1", "--batch-size", "50"]
    flags += ["--save-epochs", "all", "--quiet", "--save-dir"]
    transfer_imagenet.main([*flags, str(tmp_path / "one")])
    assert started(2, "transfer", [*flags, str(tmp_path / "two")], unchecked) == [0, 0]
    same_runs(tmp_path / "one", tmp_path / "two")
    lines = [(tmp_path / run / "transfers.jsonl").read_text() for run in ("one", "two")]
    found = [[json.loads(line) for line in text.splitlines()] for text in lines]
    assert len(found[0]) == 3  # before and after the epoch, and the control
    for pair in zip(*found, strict=True):
        assert pair[0]["what"] == pair[1]["what"] and pair[0]["test_acc"] == pair[1]["test_acc"]
    saved = [load(tmp_path / run / "model_epoch_1.th") for run in ("one", "two")]
    torch.testing.assert_close(saved[0]["layers.1.B"], saved[1]["layers.1.B"])


class At:
    """At its n-th step one process does something to itself."""

    def __init__(self, step: int, rank: int, number: int, patience: int = 300) -> None:
        self.step, self.rank, self.number, self.patience = step, rank, number, patience

    def __call__(self, rank: int) -> None:
        distributed.TIMEOUT = timedelta(seconds=self.patience)
        original, count = cifar10mlp.Trainer.step, [0]

        def step(trainer, *batch):
            original(trainer, *batch)
            count[0] += 1
            if count[0] == self.step and rank == self.rank:
                os.kill(os.getpid(), self.number)

        cifar10mlp.Trainer.step = step


@pytest.mark.parametrize("memory", ["rows", "moments"])
def test_all_processes_stop_at_the_step_at_which_one_was_asked_to(tmp_path, memory):
    flags = [*MLP, "--memory", memory, "--epochs", "2", "--save-dir"]
    cifar10mlp.main([*flags, str(tmp_path / "whole")])
    parts = str(tmp_path / "parts")
    assert started(2, "mlp", [*flags, parts], At(6, 1, signal.SIGTERM)) == [143, 143]
    extras = load(tmp_path / "parts" / "checkpoint.pt")["extras"]
    assert (extras["epoch"], extras["batches"]["position"]) == (1, 2)
    cifar10mlp.main(["--resume", "--quiet", "--save-dir", parts])
    same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    "number, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGSTOP, None)]
)
def test_a_process_that_dies_or_hangs_ends_the_others_and_the_run_goes_on(tmp_path, number, code):
    flags = [*MLP, "--epochs", "2", "--save-dir"]
    parts = str(tmp_path / "parts")
    grace = 2 if number == signal.SIGSTOP else 60
    codes = started(2, "mlp", [*flags, parts], At(6, 1, number, 10), grace)
    assert codes == [1, code]
    cifar10mlp.main([*flags, str(tmp_path / "whole")])
    assert started(2, "mlp", ["--resume", "--quiet", "--save-dir", parts]) == [0, 0]
    same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "experiments.cifar10.cifar10mlp", *SMALL]
    command += ["--lr", "0.3", "--epochs", "1", "--save-dir", str(tmp_path / "two")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("train loss") == 1 and "2 processes; each received" in found.stdout
    flags = [*SMALL, "--lr", "0.3", "--epochs", "1", "--quiet"]
    cifar10mlp.main([*flags, "--save-dir", str(tmp_path / "one")])
    same_runs(tmp_path / "one", tmp_path / "two")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode != 0 and "already holds a run" in again.stderr
