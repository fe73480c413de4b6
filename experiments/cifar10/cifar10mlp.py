"""Train an infinite-width π-network, or a finite π- or μ-network, on images.

    # digits, no download, under a minute
    python -m experiments.cifar10.cifar10mlp
    # CIFAR-10, in DIR or downloaded there
    python -m experiments.cifar10.cifar10mlp --dataset cifar10 --data DIR --r 100
    # the finite π-network sampled from it, and the μ-network
    python -m experiments.cifar10.cifar10mlp --width 1024
    python -m experiments.cifar10.cifar10mlp --width 1024 --gaussian-init
    # all rows as one matrix of fixed size, and with the newest 2,000 rows exact
    python -m experiments.cifar10.cifar10mlp --memory moments --degree 2
    python -m experiments.cifar10.cifar10mlp --memory moments --row-budget 2000

Writes settings.json, metrics.jsonl, curves.png and a checkpoint into --save-dir after every epoch.
Ctrl-C stops after the current step; --resume goes on from there, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments.cifar10.settings import OUTPUT, REMOVED, Settings, parser
from experiments.training.flags import answer_help

if __name__ == "__main__":
    answer_help(parser(__doc__))

import torch
from torch import Tensor

from experiments.cifar10.mlp_networks import build, evaluate, loss_of, optimizer_of, scheduler_of
from experiments.training import loop
from experiments.training.choices import FLIPS, SHIFT
from experiments.training.errors import errors_of
from experiments.training.flags import (
    dated_folder,
    milestones,
    parse,
    picked,
    settings_to_run,
)
from experiments.training.images import Batches, ImageSet, load_images
from experiments.training.implementation import begun_with, decided, sums
from experiments.training.process import human_bytes, pick_device
from experiments.training.run_folder import RunFolder
from pilimit_lib.core import batch, load, save
from pilimit_lib.inf import InfMLP, clip_grad_norm_


class Trainer(loop.Trainer):
    """A network learns from batches of images."""

    header = (
        f"{'epoch':>5} {'train loss':>10} {'train %':>9} {'test loss':>10} {'test %':>8} "
        f"{'rows':>9} {'memory':>12} {'seconds':>8}"
    )

    human = False  # counts and bytes with units

    def __init__(self, settings: Settings, data: ImageSet, device: torch.device) -> None:
        self.settings, self.data = settings, data
        net = build(settings, data, device)
        optimizer = optimizer_of(settings, net)
        shift = SHIFT[data.name] if settings.augment_shift is None else settings.augment_shift
        augmented = (shift, FLIPS[data.name]) if settings.data_augment else ()
        batches = Batches(
            data.train_x, data.train_y, settings.batch_size, settings.seed, *augmented
        )
        scheduler = scheduler_of(settings, optimizer)
        title = f"{settings.dataset}, {settings.describe()}"
        super().__init__(net, optimizer, scheduler, batches, settings.epochs, title)
        self.teacher = None
        if settings.teacher_path:
            self.teacher = InfMLP.from_state_dict(load(settings.teacher_path), device=device)

    @property
    def clip(self) -> float:
        """The bound on gradient norms in this epoch; 0 where there is none."""
        drops = sum(self.epoch >= m for m in milestones(self.settings.gclip_drop_milestones))
        return self.settings.gclip * self.settings.gclip_drop_ratio**drops

    @property
    def may_stop(self) -> bool:
        """Between two steps of the optimiser."""
        return self.batches.position % self.settings.accum_steps == 0

    def step(self, ids: Tensor, x: Tensor, y: Tensor) -> None:
        """One batch; the optimiser steps after every `accum_steps` batches and at the end of an
        epoch."""
        s, x = self.settings, x.flatten(1)
        position, total = self.batches.position, len(self.batches)
        group_start = (position - 1) // s.accum_steps * s.accum_steps
        with batch(ids):
            output = self.net(x)
        teacher_output = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_output = self.teacher(x)
        loss = loss_of(s, output, y, teacher_output)
        (loss / min(s.accum_steps, total - group_start)).backward()
        if self.may_stop or position == total:
            if self.clip:
                clip_grad_norm_(self.net, self.clip, s.gclip_per_param)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.sums["loss"] += loss.item() * len(y)
        self.sums["correct"] += (output.argmax(1) == y).sum().item()
        self.sums["seen"] += len(y)

    def progress(self) -> str:
        if not isinstance(self.net, InfMLP):
            return super().progress()
        rows, used = sum(self.net.rows), human_bytes(self.net.row_bytes)
        return f"{super().progress()}, {rows} rows, {used}"

    def end_epoch(self) -> None:
        super().end_epoch()
        if self.scheduler is not None:
            self.scheduler.step()

    def record(self) -> dict[str, Any]:
        s, net = self.settings, self.net
        test_loss, test_acc = evaluate(net, self.data.test_x, self.data.test_y, s)
        infinite = isinstance(net, InfMLP)
        finite_bytes = sum(p.numel() * p.element_size() for p in net.parameters())
        return {
            "epoch": self.epoch,
            "train_loss": self.sums["loss"] / self.sums["seen"],
            "train_acc": self.sums["correct"] / self.sums["seen"],
            "test_loss": test_loss,
            "test_acc": test_acc,
            "lr": self.optimizer.param_groups[0]["lr"] / (s.first_layer_lr_mult or 1),
            "rows": sum(net.rows) if infinite else 0,
            "bytes": net.row_bytes if infinite else finite_bytes,
            "seconds": round(self.sums["seconds"], 3),
        }

    def row(self, record: dict[str, Any]) -> str:
        rows = f"{record['rows'] / 1000:.1f}k" if self.human else record["rows"]
        memory = human_bytes(record["bytes"]) if self.human else record["bytes"]
        return (
            f"{record['epoch']:>5} {record['train_loss']:>10.4f} {100 * record['train_acc']:>9.2f} "
            f"{record['test_loss']:>10.4f} {100 * record['test_acc']:>8.2f} {rows:>9} "
            f"{memory:>12} {record['seconds']:>8.1f}"
        )


def train(
    settings: Settings,
    save_dir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    model_path: str = "",
    save_model: bool = False,
    quiet: bool = False,
    human: bool = False,
    verbose: bool = False,
    data: ImageSet | None = None,
    at_epoch: Callable[[Trainer, Path], None] | None = None,
) -> list[dict[str, Any]]:
    """Run the training that `settings` describe; returns one record per epoch (accuracies are
    fractions, times seconds).

    `data` takes the place of the data set that the settings name; `at_epoch` as in `loop.fit`.
    """
    settings.check()
    device = pick_device(settings.cuda)
    data = images_of(settings) if data is None else data
    before = begun_with(Path(save_dir) / settings.names.settings) if resume else None
    asked, kinds = settings.implementation, settings.sums
    found = decided(asked, kinds, settings.not_native, before, quiet)
    settings = replace(settings, implementation=found)
    trainer = Trainer(settings, data.to(device), device)
    trainer.human = human
    if model_path:
        trainer.net.load_state_dict(load(model_path))
    if verbose:
        print(trainer.net)
    with RunFolder(save_dir, asdict(settings), resume, overwrite, settings.names) as folder:
        if resume:
            loop.resume_from(trainer, folder)
        with sums(found, kinds):
            loop.fit(trainer, folder, quiet=quiet, at_epoch=at_epoch)
        if save_model:
            save(trainer.net.state_dict(), folder.path / "model.th")
    return trainer.records


def images_of(settings: Settings) -> ImageSet:
    s = settings
    return load_images(s.dataset, s.data, s.train_subset_size, s.test_subset_size)


def test(settings: Settings, model_path: str) -> tuple[float, float]:
    """(loss, accuracy) of a saved network on the test images."""
    device = pick_device(settings.cuda)
    data = images_of(settings).to(device)
    net = build(settings, data, device)
    net.load_state_dict(load(model_path))
    return evaluate(net, data.test_x, data.test_y, settings)


def main(argv: list[str] | None = None) -> list[dict[str, Any]] | tuple[float, float]:
    arguments = parser(__doc__)
    args = parse(arguments, argv, REMOVED)
    if args.resume and not args.save_dir:
        arguments.error("--resume needs the --save-dir of the run to continue")
    if args.test and not args.model_path:
        arguments.error("--test needs a --model-path")
    if args.resume and (args.overwrite or args.model_path):
        arguments.error(
            "--resume contradicts --overwrite and --model-path: the checkpoint says where to go on"
        )
    with errors_of(arguments):
        known = Path(args.save_dir) / Settings.names.settings
        settings = settings_to_run(arguments, argv, args, Settings, known)
        settings.check()
        if args.test:
            loss, accuracy = test(settings, args.model_path)
            print(f"test loss {loss:.4f}, accuracy {100 * accuracy:.2f} %")
            return loss, accuracy
        save_dir = args.save_dir or dated_folder("cifar10mlp")
        records = train(settings, save_dir, **picked(args, OUTPUT))
        if not args.quiet:
            print(f"results in {save_dir}")
    return records


if __name__ == "__main__":
    main()
