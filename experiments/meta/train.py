"""Meta-learn: MAML with infinite π-networks, finite π- and μ-networks, and NNGP and NTK learners.

    python -m experiments.meta.train DIR --dataset omniglot --num-ways 5 --num-shots 1
    --num-shots-test 1 --hidden-size -1 ... python -m experiments.meta.train --dataset sinusoid
    --num-shots 10 --hidden-size -1 --memory moments ...
    python -m experiments.meta.train ... --hidden-size 1024              # the finite π-network; --mu-init the μ-network
    python -m experiments.meta.train ... --gp                            # NNGP; --ntk

README.md beside this file has whole command lines. Writes config.json, one .jsonl per table,
curves.png, checkpoint.pt and model.th into --output-folder after every epoch. Ctrl-C stops after
the current batch; --resume goes on from there, bit for bit. `experiments.meta.test --config
.../config.json` tests the result.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from experiments.meta.episodes import Batch
from experiments.meta.learner import (
    build,
    evaluate,
    hold_fixed,
    meta_step,
    optimizer_of,
    placed,
    require_finite,
    scheduler_of,
    size_of,
    tasks,
)
from experiments.meta.settings import DTYPES, REMOVED, Settings, parser
from experiments.meta.stores import TABLES, require_cox, write_tables
from experiments.training.process import (
    RunFolder,
    curves,
    human_bytes,
    interruptible,
    parse,
    pick_device,
)
from pilimit_lib.core import load, restore, rng_state, save, set_rng_state, snapshot

VALIDATION_SEED = 1_000_003  # validation tasks are the same in every epoch and every run


class Trainer:
    """The state of a run between two batches; everything that a checkpoint holds."""

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        quiet: bool = False,
        loader: Iterable[Batch] | None = None,
    ) -> None:
        self.settings, self.device = settings, device
        if loader is not None and settings.no_train_shuffle:
            raise ValueError(
                "--no-train-shuffle restarts our own sampler; a loader of yours decides its order "
                "itself"
            )
        self.net = build(settings, device)
        hold_fixed(settings, self.net)
        if settings.load_model_path:
            self.net.load_state_dict(load(settings.load_model_path))
        self.optimizer = optimizer_of(settings, self.net)
        self.scheduler = scheduler_of(settings, self.optimizer)
        self.train_tasks = (
            tasks(settings, "train", settings.seed, quiet) if loader is None else loader
        )
        self.val_tasks = tasks(settings, settings.test_dataset_split, VALIDATION_SEED, quiet)
        self.epoch, self.done, self.train_records, self.val_records = 0, 0, [], []
        self.sums = {"loss": 0.0, "acc": 0.0, "seconds": 0.0}

    def run_epoch(self, stop: list[int], quiet: bool) -> bool:
        """Train what is left of the epoch, then validate; True unless interrupted between two
        batches."""
        s, started, before = self.settings, time.perf_counter(), self.sums["seconds"]
        if s.no_train_shuffle and not self.done:
            self.train_tasks.restart()
        bar = tqdm(
            total=s.num_batches,
            initial=self.done,
            desc=f"epoch {self.epoch + 1}/{s.num_epochs}",
            leave=False,
            disable=quiet,
            mininterval=0.5,
        )
        with bar:
            for batch in self.train_tasks:
                found = meta_step(
                    s, self.net, self.optimizer, placed(batch, self.device, DTYPES[s.dtype])
                )
                if self.scheduler is not None:
                    self.scheduler.step()
                self.done += 1
                for name, value in found.items():
                    self.sums[name] += value
                self.sums["seconds"] = before + time.perf_counter() - started
                bar.update()
                if not quiet and self.done % 20 == 0:
                    bar.set_postfix_str(
                        f"loss {self.sums['loss'] / self.done:.4f}, "
                        f"acc {100 * self.sums['acc'] / self.done:.1f} %, "
                        f"{human_bytes(size_of(self.net)['bytes'])}"
                    )
                if self.done >= s.num_batches:
                    break
                if stop:
                    return False
        if self.done < s.num_batches:
            raise ValueError(
                f"the loader ended after {self.done} batches, --num-batches is {s.num_batches}"
            )
        self._finish_epoch(quiet)
        return True

    def _finish_epoch(self, quiet: bool) -> None:
        s = self.settings
        self.epoch += 1
        self.train_records.append(
            {
                "epoch": self.epoch,
                **{k: v / self.done for k, v in self.sums.items() if k != "seconds"},
                "lr": self.optimizer.param_groups[0]["lr"],
                **size_of(self.net),
                "seconds": round(self.sums["seconds"], 3),
            }
        )
        self.validate(quiet)
        self.sums, self.done = {"loss": 0.0, "acc": 0.0, "seconds": 0.0}, 0
        if s.dataset == "sinusoid":
            self.train_records[-1].pop("acc")

    def validate(self, quiet: bool) -> dict[str, Any]:
        """The accuracy on the tasks that are the same in every epoch, recorded."""
        s = self.settings
        self.val_tasks.restart()
        found = evaluate(s, self.net, self.val_tasks, s.num_test_batches, self.device, quiet)
        require_finite(found["loss"], "the validation loss")
        self.val_records.append({"epoch": self.epoch, "split": s.test_dataset_split, **found})
        return self.val_records[-1]

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        return {
            "metadata": [self.settings.as_dict()],
            "train": self.train_records,
            "val": self.val_records,
        }

    def state(self) -> dict[str, Any]:
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        return snapshot(
            self.net,
            self.optimizer,
            epoch=self.epoch,
            done=self.done,
            sums=self.sums,
            train=self.train_records,
            val=self.val_records,
            tasks=self._position(),
            scheduler=scheduler,
            rng=rng_state(),
        )

    def _position(self) -> dict[str, Any] | None:
        """Where the stream of training tasks stands; that of a foreign loader is not known."""
        return self.train_tasks.state() if hasattr(self.train_tasks, "state") else None

    def load_state(self, state: dict[str, Any]) -> None:
        extras = restore(self.net, state, self.optimizer)
        self.epoch, self.done, self.sums = extras["epoch"], extras["done"], extras["sums"]
        self.train_records, self.val_records = extras["train"], extras["val"]
        if extras["tasks"] is not None:
            self.train_tasks.load_state(extras["tasks"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(extras["scheduler"])
        set_rng_state(extras["rng"])


def table_row(train: dict[str, Any] | None, val: dict[str, Any]) -> str:
    def percent(record: dict[str, Any] | None, name: str) -> str:
        return f"{100 * record[name]:.2f}" if record and record.get(name) is not None else "-"

    rows, used, seconds = (
        (train["rows"], human_bytes(train["bytes"]), train["seconds"]) if train else ("-", "-", 0)
    )
    loss = f"{train['loss']:.4f}" if train else "-"
    return (
        f"{val['epoch']:>5} {loss:>10} {percent(train, 'acc'):>8} {val['loss']:>10.4f} "
        f"{percent(val, 'acc'):>7} "
        f"±{percent(val, 'acc_ci95'):>5} {rows:>9} {used:>10} {seconds:>8.1f}"
    )


HEADER = (
    f"{'epoch':>5} {'train loss':>10} {'train %':>8} {'val loss':>10} {'val %':>7} {'95 %':>6} "
    f"{'rows':>9} {'memory':>10} "
    f"{'seconds':>8}"
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
) -> list[dict[str, Any]]:
    """Run what the settings describe; returns the records of validation (accuracies are
    fractions)."""
    settings.check()
    if store == "cox":
        require_cox()
    device = pick_device(settings.use_cuda, "--use-cuda")
    if settings.dtype == "float16" and device.type == "cpu" and not quiet:
        print("on the CPU everything is float32")
    trainer = Trainer(settings, device, quiet)
    folder = RunFolder(
        output_folder,
        settings.as_dict(),
        resume,
        overwrite,
        "config.json",
        "--output-folder",
        "--overwrite-existing",
        ("num_epochs",),
    )
    if resume:
        state = folder.load()
        folder.check_schedule(
            *(each["extras"]["scheduler"] for each in (state, trainer.state())), flag="--num-epochs"
        )
        trainer.load_state(state)
    else:
        for stale in ("model.th", *(f"{name}.jsonl" for name in TABLES)):
            (folder.path / stale).unlink(missing_ok=True)
        shutil.rmtree(folder.path / "cox", ignore_errors=True)
    if verbose:
        print(trainer.net)
    if not quiet:
        print(settings.describe() + "\n" + HEADER, flush=True)
        for pair in zip(trainer.train_records, trainer.val_records):
            print(table_row(*pair))
    if validate_only:
        record = trainer.validate(quiet)
        write_tables(folder.path, trainer.tables(), store == "cox")
        if not quiet:
            print(table_row(None, record))
        return [record]
    with interruptible() as stop:
        while trainer.epoch < settings.num_epochs and not stop:
            finished = trainer.run_epoch(stop, quiet)
            folder.save(trainer.state())
            if finished:
                save(trainer.net.state_dict(), folder.path / "model.th")
                write_tables(folder.path, trainer.tables(), store == "cox")
                draw(folder.path, trainer, settings)
                if not quiet:
                    print(table_row(trainer.train_records[-1], trainer.val_records[-1]), flush=True)
    if trainer.epoch < settings.num_epochs:
        print(
            f"stopped in epoch {trainer.epoch + 1}; go on with --resume --output-folder "
            f"{folder.path}"
        )
    return trainer.val_records


def draw(folder: Path, trainer: Trainer, settings: Settings) -> None:
    """curves.png: loss and accuracy of training and validation against the epoch."""
    train_frame = pd.DataFrame(trainer.train_records).rename(
        columns={"loss": "train_loss", "acc": "train_acc"}
    )
    val_frame = pd.DataFrame(trainer.val_records).rename(
        columns={"loss": "val_loss", "acc": "val_acc"}
    )
    frame = train_frame.merge(val_frame, on="epoch", how="right")
    panels = {"loss": ("train_loss", "val_loss")} | (
        {"accuracy": ("train_acc", "val_acc")} if "val_acc" in frame else {}
    )
    curves(frame, panels, settings.describe()).savefig(folder / "curves.png", dpi=110)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    arguments = parser(__doc__)
    args = parse(arguments, argv, REMOVED)
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    if args.resume and (
        not args.output_folder or args.overwrite_existing or settings.load_model_path
    ):
        arguments.error(
            "--resume needs the --output-folder of the run to continue, and contradicts "
            "--overwrite-existing and "
            "--load-model-path: the checkpoint says where to go on"
        )
    folder = args.output_folder or Path("output") / "meta" / time.strftime("%Y-%m-%d_%H-%M-%S")
    try:
        records = train(
            settings,
            folder,
            resume=args.resume,
            overwrite=args.overwrite_existing,
            store=args.store,
            validate_only=args.validate_only,
            quiet=args.quiet,
            verbose=args.verbose,
        )
    except (
        ValueError,
        OSError,
        ImportError,
        RuntimeError,
        MemoryError,
        FloatingPointError,
    ) as error:
        arguments.error(str(error))
    if not args.quiet:
        print(f"results in {folder}")
    return records


if __name__ == "__main__":
    main()
