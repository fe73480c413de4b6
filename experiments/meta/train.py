"""Meta-learn: MAML with infinite π-networks, finite π- and μ-networks, and NNGP and NTK learners.

    python -m experiments.meta.train DIR --dataset omniglot --num-ways 5 --num-shots 1 \\
        --num-shots-test 1 --hidden-size -1 ...
    python -m experiments.meta.train --dataset sinusoid --num-shots 10 --hidden-size -1 \\
        --memory moments ...
    # the finite π-network; --mu-init the μ-network
    python -m experiments.meta.train ... --hidden-size 1024
    # NNGP; --ntk
    python -m experiments.meta.train ... --gp

README.md beside this file has whole command lines. Writes config.json, one .jsonl per table,
curves.png, checkpoint.pt and model.th into --output-folder after every epoch. Ctrl-C stops after
the current batch; --resume goes on from there, bit for bit. `experiments.meta.test --config
.../config.json` tests the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..training.flags import answer_help
from .settings import REMOVED, Settings, parser

if __name__ == "__main__":
    answer_help(parser(__doc__))

import pandas as pd
import torch

from pilimit_lib.core import load, save

from ..training import loop
from ..training.distributed import ALONE, Ranks, processes
from ..training.errors import errors_of
from ..training.flags import dated_folder, parse, picked, settings_to_run
from ..training.implementation import begun_with, decided, sums
from ..training.logs import logs
from ..training.process import human_bytes, pick_device
from ..training.run_folder import Names, RunFolder
from .episodes import Batch, Epochs
from .learner import (
    build,
    dtype_of,
    evaluate,
    hold_fixed,
    meta_step,
    optimizer_of,
    placed,
    scheduler_of,
    size_of,
    tasks,
)
from .stores import TABLES, require_cox, write_tables

VALIDATION_SEED = 1_000_003  # validation tasks are the same in every epoch and every run
NAMES = Names(
    command="meta.train",
    settings="config.json",
    folder="--output-folder",
    overwrite="--overwrite-existing",
    epochs="--num-epochs",
    may_differ=("num_epochs", "implementation"),
    written=(
        "checkpoint.pt",
        "curves.png",
        "model.th",
        *(f"{table}.jsonl" for table in TABLES),
        "cox",
    ),
)


class Trainer(loop.Trainer):
    """A learner learns to learn from batches of tasks, and is validated after every epoch.

    `loader` takes the place of our own tasks: any loader in the form of torchmeta's.
    """

    counts = {"loss": 0.0, "acc": 0.0}
    remedy = "lower --meta-lr or --step-size, or bound the meta-gradient with --grad-clip"
    plain_steps = False  # inner steps differentiate too
    cox = False  # write the tables as a cox store too

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        quiet: bool = False,
        loader: Iterable[Batch] | None = None,
    ) -> None:
        self.settings, self.device, self.quiet = settings, device, quiet
        if loader is not None and settings.no_train_shuffle:
            raise ValueError(
                "--no-train-shuffle restarts our own sampler; a loader of yours decides its order "
                "itself"
            )
        net = build(settings, device)
        hold_fixed(settings, net)
        optimizer = optimizer_of(settings, net)
        scheduler = scheduler_of(settings, optimizer)
        stream = tasks(settings, "train", settings.seed, quiet) if loader is None else loader
        batches = Epochs(stream, settings.num_batches, settings.no_train_shuffle)
        title = settings.describe()
        super().__init__(net, optimizer, scheduler, batches, settings.num_epochs, title)
        self.val_tasks = tasks(settings, settings.test_dataset_split, VALIDATION_SEED, quiet)
        self.val_records: list[dict[str, Any]] = []
        self.header = (
            f"{'epoch':>5} {'train loss':>10} {'train %':>8} {'val loss':>10} "
            f"{'val %':>7} {'95 %':>6} {'rows':>9} {'memory':>10} {'seconds':>8}"
        )

    def step(self, batch: Batch) -> None:
        batch = placed(batch, self.device, dtype_of(self.settings))
        found = meta_step(self.settings, self.net, self.optimizer, batch, self.ranks)
        if self.scheduler is not None:
            self.scheduler.step()
        for name, value in found.items():
            self.sums[name] += value

    def progress(self) -> str:
        done, used = self.batches.done, human_bytes(size_of(self.net)["bytes"])
        loss, accuracy = self.sums["loss"] / done, 100 * self.sums["acc"] / done
        return f"loss {loss:.4f}, acc {accuracy:.1f} %, {used}"

    def record(self) -> dict[str, Any]:
        means = {name: self.sums[name] / len(self.batches) for name in self.counts}
        if self.settings.dataset == "sinusoid":
            del means["acc"]
        rate = self.optimizer.param_groups[0]["lr"]
        record = {"epoch": self.epoch, **means, "lr": rate, **size_of(self.net)}
        self.validate()
        return record | {"seconds": round(self.sums["seconds"], 3)}

    def validate(self) -> dict[str, Any]:
        """The accuracy on the tasks that are the same in every epoch, recorded."""
        s = self.settings
        self.val_tasks.restart()
        how = self.device, self.quiet or not self.ranks.first
        found = evaluate(s, self.net, self.val_tasks, s.num_test_batches, *how, ranks=self.ranks)
        self.require_finite(found["loss"], "validation loss")
        self.val_records.append({"epoch": self.epoch, "split": s.test_dataset_split, **found})
        return self.val_records[-1]

    def row(self, record: dict[str, Any]) -> str:
        of_epoch = {val["epoch"]: val for val in self.val_records}
        return table_row(record, of_epoch[record["epoch"]])

    def write(self, folder: RunFolder) -> None:
        """The tables, and the network after the last epoch."""
        if not self.batches.done:
            save(self.net.state_dict(), folder.path / "model.th")
        self.write_tables(folder)

    def write_tables(self, folder: RunFolder) -> None:
        tables = {
            "metadata": [self.settings.as_dict()],
            "train": self.records,
            "val": self.val_records,
        }
        write_tables(folder.path, tables, self.cox)

    def scalars(self) -> dict[str, float]:
        validated = {f"val_{name}": self.val_records[-1].get(name) for name in ("loss", "acc")}
        found = {name: value for name, value in validated.items() if value is not None}
        return super().scalars() | found

    def draw(self, folder: RunFolder) -> None:
        """Loss and accuracy of training and validation against the epoch."""
        names = {"loss": "train_loss", "acc": "train_acc"}
        trained = pd.DataFrame(self.records).rename(columns=names)
        names = {"loss": "val_loss", "acc": "val_acc"}
        validated = pd.DataFrame(self.val_records).rename(columns=names)
        frame = trained.merge(validated, on="epoch", how="right")
        panels = {"loss": ("train_loss", "val_loss")}
        if "val_acc" in frame:
            panels["accuracy"] = ("train_acc", "val_acc")
        folder.draw_curves(frame, self.title, panels)

    def extras(self) -> dict[str, Any]:
        return {
            "done": self.batches.done,
            "train": self.records,
            "val": self.val_records,
            "tasks": self.batches.state(),
        }

    def load_extras(self, extras: dict[str, Any]) -> None:
        self.records, self.val_records = extras["train"], extras["val"]
        self.batches.load_state(extras["tasks"], extras["done"])


def table_row(train: dict[str, Any] | None, val: dict[str, Any]) -> str:
    """A line of the table; without training its columns hold a dash."""

    def percent(record: dict[str, Any] | None, name: str) -> str:
        return f"{100 * record[name]:.2f}" if record and record.get(name) is not None else "-"

    loss = f"{train['loss']:.4f}" if train else "-"
    rows = train["rows"] if train else "-"
    used = human_bytes(train["bytes"]) if train else "-"
    seconds = train["seconds"] if train else 0
    return (
        f"{val['epoch']:>5} {loss:>10} {percent(train, 'acc'):>8} {val['loss']:>10.4f} "
        f"{percent(val, 'acc'):>7} ±{percent(val, 'acc_ci95'):>5} {rows:>9} {used:>10} "
        f"{seconds:>8.1f}"
    )


def train(
    settings: Settings,
    output_folder: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    store: str = "jsonl",
    validate_only: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    log: Sequence[str] = (),
    ranks: Ranks = ALONE,
) -> list[dict[str, Any]]:
    """Run what the settings describe; returns the records of validation (accuracies are
    fractions). `ranks`: the processes that train together, see `training.distributed`."""
    settings.check()
    if store == "cox":
        require_cox()
    device = pick_device(settings.use_cuda, "--use-cuda")
    if settings.dtype == "float16" and device.type == "cpu" and ranks.first and not quiet:
        print("on the CPU everything is float32")
    with ranks.one_by_one():
        before = begun_with(Path(output_folder) / NAMES.settings) if resume else None
        asked, kinds = settings.implementation, settings.sums
        found, note = decided(asked, kinds, settings.not_native, before)
        settings = replace(settings, implementation=found)
        trainer = Trainer(settings, device, quiet or not ranks.first)
    trainer.cox, trainer.note = store == "cox", note
    if settings.load_model_path and not resume:
        trainer.net.load_state_dict(load(settings.load_model_path))
    if verbose and ranks.first:
        print(trainer.net)
    if settings.note_on_depth() and ranks.first and not quiet:
        print(settings.note_on_depth(), flush=True)
    folder = RunFolder(
        output_folder, settings.as_dict(), resume, overwrite, NAMES, defaults=Settings().as_dict()
    )
    with ranks.taken(folder), sums(found, kinds):
        if resume:
            loop.resume_from(trainer, folder)
        trainer.spread(ranks)
        if validate_only:
            record = trainer.validate()
            if ranks.first:
                trainer.write_tables(folder)
            if ranks.first and not quiet:
                print(trainer.about(), trainer.header, table_row(None, record), sep="\n")
            return [record]
        loop.fit(
            trainer,
            folder,
            quiet=quiet,
            at_epoch=logs(log, settings.as_dict()),
        )
    return trainer.val_records


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    arguments = parser(__doc__)
    args = parse(arguments, argv, REMOVED)
    if args.resume and (not args.output_folder or args.overwrite_existing or args.load_model_path):
        arguments.error(
            "--resume needs the --output-folder of the run to continue, and contradicts "
            "--overwrite-existing and --load-model-path: the checkpoint says where to go on"
        )
    folder = args.output_folder or dated_folder("meta")
    with errors_of(arguments), processes() as ranks:
        known = Path(folder) / NAMES.settings
        settings = settings_to_run(arguments, argv, args, Settings, known)
        how = picked(args, ("resume", "store", "validate_only", "quiet", "verbose", "log"))
        records = train(settings, folder, overwrite=args.overwrite_existing, **how, ranks=ranks)
        if ranks.first and not args.quiet:
            print(f"results in {folder}")
    return records


if __name__ == "__main__":
    main()
