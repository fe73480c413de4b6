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

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..training.flags import answer_help
from .settings import OUTPUT, REMOVED, Settings, parser

if __name__ == "__main__":
    answer_help(parser(__doc__))

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pilimit_lib.core import batch, load, save
from pilimit_lib.inf import InfMLP, clip_grad_norm_
from pilimit_lib.inf.rows.shard import rows_elsewhere

from ..training import loop
from ..training.choices import FLIPS, SHIFT
from ..training.distributed import ALONE, Ranks, processes, require_alone
from ..training.errors import errors_of
from ..training.flags import (
    dated_folder,
    milestones,
    parse,
    picked,
    settings_to_run,
    typed,
)
from ..training.images import Batches, ImageSet, load_images
from ..training.implementation import begun_with, decided, sums
from ..training.logs import logs
from ..training.process import human_bytes, pick_device
from ..training.run_folder import RunFolder
from .mlp_networks import build, evaluate, loss_of, optimizer_of, scheduler_of


class Trainer(loop.Trainer):
    """A network learns from batches of images."""

    clocks = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
    header = (
        f"{'epoch':>5} {'train loss':>10} {'train %':>9} {'test loss':>10} {'test %':>8} "
        f"{'rows':>9} {'memory':>12} {'seconds':>8}"
    )

    human = False  # count rows in thousands

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
        self.average = None if settings.average_from is None else AveragedModel(net)

    @property
    def clip(self) -> float:
        """The bound on gradient norms in this epoch; 0 where there is none."""
        drops = sum(self.epoch >= m for m in milestones(self.settings.gclip_drop_milestones))
        return self.settings.gclip * self.settings.gclip_drop_ratio**drops

    @property
    def may_stop(self) -> bool:
        """Between two steps of the optimiser."""
        return self.batches.position % self.settings.accum_steps == 0

    @property
    def whole_batches(self) -> bool:
        """The newest rows are those of the last batches, whichever process saw them."""
        return self.settings.accum_steps > 1 and self.settings.row_budget is not None

    def step(self, ids: Tensor, x: Tensor, y: Tensor) -> None:
        """One batch; the optimiser steps after every `accum_steps` batches and at the end of an
        epoch."""
        s = self.settings
        position, total = self.batches.position, len(self.batches)
        group_start = (position - 1) // s.accum_steps * s.accum_steps
        here = self.ranks.share(len(y))
        if len(y[here]):
            share = len(y[here]) / len(y)
            parts = min(s.accum_steps, total - group_start)
            self.learn(ids[here], x[here].flatten(1), y[here], share, parts)
        if self.may_stop or position == total:
            self.ranks.sum_gradients(self.net)
            if self.clip:
                clip_grad_norm_(self.net, self.clip, s.gclip_per_param)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def learn(self, ids: Tensor, x: Tensor, y: Tensor, share: float, parts: int) -> None:
        """Gradients of samples x [b d], which are this share of one of the `parts` of a batch."""
        with batch(ids):
            output = self.net(x)
        teacher_output = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_output = self.teacher(x)
        smoothing = self.settings.label_smoothing
        loss = loss_of(self.settings, output, y, teacher_output, smoothing)
        (loss * share / parts).backward()
        self.sums["loss"] += loss.item() * len(y)
        self.sums["correct"] += (output.argmax(1) == y).sum().item()
        self.sums["seen"] += len(y)

    @property
    def rows(self) -> int:
        """Of the infinite network, in all processes."""
        return sum(self.net.rows) + rows_elsewhere(self.net)

    def progress(self) -> str:
        if not isinstance(self.net, InfMLP):
            return super().progress()
        rows, used = self.rows, human_bytes(self.net.row_bytes)
        return f"{super().progress()}, {rows} rows, {used}"

    def end_epoch(self) -> None:
        super().end_epoch()
        if self.scheduler is not None:
            self.scheduler.step()

    def about(self) -> str:
        return f"{super().about()}; {self.data.describe()}"

    def extras(self) -> dict[str, Any]:
        average = None if self.average is None else self.average.state_dict()
        return super().extras() | {"average": average}

    def load_extras(self, extras: dict[str, Any]) -> None:
        super().load_extras(extras)
        if self.average is not None:
            self.average.load_state_dict(extras["average"])

    def record(self) -> dict[str, Any]:
        s, net = self.settings, self.net
        test_loss, test_acc = evaluate(net, self.data.test_x, self.data.test_y, s, self.ranks)
        infinite = isinstance(net, InfMLP)
        finite_bytes = sum(p.numel() * p.element_size() for p in net.parameters())
        return {
            "epoch": self.epoch,
            "train_loss": self.sums["loss"] / self.sums["seen"],
            "train_acc": self.sums["correct"] / self.sums["seen"],
            **self.held_out(net),
            "test_loss": test_loss,
            "test_acc": test_acc,
            **self.averaged(),
            "lr": self.optimizer.param_groups[0]["lr"] / (s.first_layer_lr_mult or 1),
            "rows": self.rows if infinite else 0,
            "bytes": self.ranks.held(net.row_bytes) if infinite else finite_bytes,
            **{name: round(self.sums[name], 3) for name in self.clocks},
        }

    def held_out(self, net: nn.Module) -> dict[str, float]:
        """Loss and accuracy on the images that are held out, where there are any."""
        data = self.data
        if data.held_out_x is None:
            return {}
        loss, accuracy = evaluate(net, data.held_out_x, data.held_out_y, self.settings, self.ranks)
        return {"held_out_loss": loss, "held_out_acc": accuracy}

    def averaged(self) -> dict[str, float]:
        """Accuracy of the mean of the networks at the ends of the epochs from `average_from` on."""
        s, data = self.settings, self.data
        if self.average is None or self.epoch < s.average_from:
            return {}
        self.average.update_parameters(self.net)
        found = {
            "average_test_acc": evaluate(
                self.average.module, data.test_x, data.test_y, s, self.ranks
            )[1]
        }
        if data.held_out_x is not None:
            held_out = self.held_out(self.average.module)
            found["average_held_out_acc"] = held_out["held_out_acc"]
        return found

    def row(self, record: dict[str, Any]) -> str:
        rows = f"{record['rows'] / 1000:.1f}k" if self.human else record["rows"]
        memory = human_bytes(record["bytes"])
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
    log: Sequence[str] = (),
    data: ImageSet | None = None,
    at_epoch: Callable[[Trainer, Path], None] | None = None,
    ranks: Ranks = ALONE,
) -> list[dict[str, Any]]:
    """Run the training that `settings` describe; returns one record per epoch (accuracies are
    fractions, times seconds).

    `log`: where else to log, see `logs`. `data` takes the place of the data set that the settings
    name; `at_epoch` as in `loop.fit`. `ranks`: the processes that train together, see
    `training.distributed`.
    """
    settings.check()
    device = pick_device(settings.cuda)
    with ranks.one_by_one():
        data = (images_of(settings) if data is None else data).hold_out(settings.held_out)
        begun = begun_with(Path(save_dir) / settings.names.settings) if resume else None
        asked, kinds = settings.implementation, settings.sums
        found, note = decided(asked, kinds, settings.not_native, begun)
    settings = replace(settings, implementation=found)
    trainer = Trainer(settings, data.to(device), device)
    trainer.human, trainer.note = human, note
    if model_path:
        trainer.net.load_state_dict(load(model_path))
    if verbose and ranks.first:
        print(trainer.net)
    if settings.note_on_depth() and ranks.first and not quiet:
        print(settings.note_on_depth(), flush=True)
    before, names = settings.before(), settings.names
    folder = RunFolder(save_dir, asdict(settings), resume, overwrite, names, defaults=before)
    with ranks.taken(folder):
        if resume:
            loop.resume_from(trainer, folder)
        trainer.spread(ranks)
        told = logs(log, asdict(settings), at_epoch)
        with sums(found, kinds):
            loop.fit(trainer, folder, quiet=quiet, at_epoch=told)
        if save_model:
            state = trainer.ranks.state_dict(trainer.net)
            if ranks.first:
                save(state, folder.path / "model.th")
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
            require_alone("--test")
            loss, accuracy = test(settings, args.model_path)
            print(f"test loss {loss:.4f}, accuracy {100 * accuracy:.2f} %")
            return loss, accuracy
        if not (args.resume or args.quiet or "dataset" in typed(arguments, argv, Settings)):
            print(
                f"No --dataset was given: THIS TRAINS ON {settings.dataset.upper()}. For the "
                "paper's images add --dataset cifar10.",
                file=sys.stderr,
            )
        save_dir = args.save_dir or dated_folder("cifar10mlp")
        with processes() as ranks:
            records = train(settings, save_dir, **picked(args, OUTPUT), ranks=ranks)
        if ranks.first and not args.quiet:
            print(f"results in {save_dir}")
    return records


if __name__ == "__main__":
    main()
