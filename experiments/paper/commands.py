"""The ordinary commands that named runs go through: how each is told where its data and its folder
are, and where it leaves what it has measured."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cifar10 import cifar10mlp, cifar10test
from ..cifar10.settings import parser as mlp_parser
from ..imagenet import transfer_imagenet
from ..meta import test as meta_test
from ..meta import train as meta_train
from ..meta.settings import Settings as MetaSettings
from ..meta.settings import parser as meta_parser
from ..training.flags import parse, settings_of
from . import ensemble
from .runs import Run

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Command:
    """One of the ordinary commands.

    `settings(argv)` are what a command line means; `call(argv, folder)` runs it; `records(folder)`
    are what it left there, a row per epoch or ridge; `data`: flags that name folders of data;
    `folder`: the flag of the output folder; `resumes`: whether it takes --resume.
    """

    settings: Callable[[list[str]], Any]
    call: Callable[[list[str], Path], Any]
    records: Callable[[Path], Records]
    data: tuple[str, ...] = ("--data",)
    folder: str = "--save-dir"
    resumes: bool = True
    seeded: bool = True

    def argv(self, run: Run, seed: int, data: str, folder: Path) -> list[str]:
        """The whole command line."""
        found = shlex.split(run.flags) + [self.folder, str(folder)]
        for flag in self.data:
            found += [flag, data] if flag else [data]
        if self.seeded:
            found += ["--seed", str(seed)]
        if self.resumes and (folder / "checkpoint.pt").is_file():
            found.append("--resume")
        return found


def settings_of_run(run: Run) -> Any:
    """The settings that a run's flags mean, checked."""
    settings = COMMANDS[run.command].settings(shlex.split(run.flags))
    settings.check()
    return settings


def planned_epochs(run: Run) -> int:
    """How many epochs a run is to have; 0 where nothing is trained."""
    settings = settings_of_run(run)
    return getattr(settings, "epochs", None) or getattr(settings, "num_epochs", 0)


def _lines(path: Path) -> Records:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _mlp_settings(argv: list[str]) -> cifar10mlp.Settings:
    parser = mlp_parser()
    return settings_of(parse(parser, argv, {}), cifar10mlp.Settings)


def _kernel_settings(argv: list[str]) -> cifar10test.Settings:
    return settings_of(cifar10test.parser().parse_args(argv), cifar10test.Settings)


def _transfer_settings(argv: list[str]) -> transfer_imagenet.Settings:
    parser = transfer_imagenet.command_parser()
    return settings_of(parse(parser, argv, {}), transfer_imagenet.Settings)


def _meta_settings(argv: list[str]) -> MetaSettings:
    return settings_of(parse(meta_parser(), argv, {}), MetaSettings)


def _meta(argv: list[str], folder: Path) -> None:
    """Train, and test what was learned."""
    meta_train.main(argv)
    if not (folder / "test.jsonl").is_file():
        meta_test.main(["--config", str(folder / "config.json")])


def _meta_records(folder: Path) -> Records:
    """Training and validation of each epoch, and in the last row the test."""
    trained = {record["epoch"]: record for record in _lines(folder / "train.jsonl")}
    records = [
        {
            "epoch": val["epoch"],
            "train_loss": trained[val["epoch"]]["loss"],
            "train_acc": trained[val["epoch"]]["acc"],
            "held_out_loss": val["loss"],
            "held_out_acc": val["acc"],
            "bytes": trained[val["epoch"]]["bytes"],
            "seconds": trained[val["epoch"]]["seconds"],
        }
        for val in _lines(folder / "val.jsonl")
        if val["epoch"] in trained
    ]
    tests = _lines(folder / "test.jsonl")
    if records and tests:
        names = ("tasks", "unrotated", "acc_ci95")
        records[-1] |= {"test_acc": tests[0]["acc"]} | {name: tests[0][name] for name in names}
    return records


def _transfer_records(folder: Path) -> Records:
    """Regression on the features after an epoch; the control has none."""
    seconds = {record["epoch"]: record["seconds"] for record in _lines(folder / "metrics.jsonl")}
    return [
        {**record, "seconds": seconds.get(record["epoch"], 0)}
        for record in _lines(folder / "transfers.jsonl")
        if record["what"] == "features"
    ]


COMMANDS = {
    "cifar10.cifar10mlp": Command(
        _mlp_settings,
        lambda argv, folder: cifar10mlp.main(argv),
        lambda folder: _lines(folder / "metrics.jsonl"),
    ),
    "cifar10.cifar10test": Command(
        _kernel_settings,
        lambda argv, folder: cifar10test.main([*argv, "--save-kernel"]),
        lambda folder: _lines(folder / "results.jsonl"),
        resumes=False,
        seeded=False,
    ),
    "paper.ensemble": Command(
        lambda argv: settings_of(ensemble.parser().parse_args(argv), ensemble.Settings),
        lambda argv, folder: ensemble.main([*argv, "--runs", str(folder.parent)]),
        lambda folder: _lines(folder / "results.jsonl"),
        resumes=False,
        seeded=False,
    ),
    "meta.train": Command(
        _meta_settings, _meta, _meta_records, data=("",), folder="--output-folder"
    ),
    "imagenet.transfer_imagenet": Command(
        _transfer_settings,
        lambda argv, folder: transfer_imagenet.main(argv),
        _transfer_records,
        data=("--imagenet-data", "--cifar-data"),
    ),
}
