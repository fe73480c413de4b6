"""Train an infinite-width ConvNet, and finite ones of the same shape beside it, on images.

    # CIFAR-10, in DIR or downloaded there
    python -m experiments.cifar10.cifar10conv --data DIR
    python -m experiments.cifar10.cifar10conv --data DIR --ranks 8,16,16,24,24 --pools 2,1,2,1
    # the limit of projected SGD
    python -m experiments.cifar10.cifar10conv --data DIR --optimizer sgd --lr 0.2
    python -m experiments.cifar10.cifar10conv --data DIR --beside batchnorm:16,batchnorm:64,mup:64
    # no download, seconds
    python -m experiments.cifar10.cifar10conv --dataset digits --ranks 6,8,8 --pools 2,1

SGD on moments (with momentum and weight decay) is the infinite-width limit of projected SGD. Adam
on moments trains the same functions, but is not the limit of Adam. Writes settings.json,
metrics.jsonl, curves.png and a checkpoint into --save-dir after every epoch; networks of --beside
get folders within it. Ctrl-C stops after the current step; --resume goes on from there, bit for
bit.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from experiments.cifar10.conv_networks import build, cutout, evaluate, optimizer_of, scheduler_of
from experiments.cifar10.conv_results import collect, draw
from experiments.cifar10.conv_settings import Settings, beside, parser
from experiments.training import loop
from experiments.training.flags import dated_folder, errors_of, settings_of
from experiments.training.images import Batches, ImageSet, load_images
from experiments.training.process import pick_device, seed_everything
from experiments.training.run_folder import RunFolder
from pilimit_lib.core import batch, save


class Trainer(loop.Trainer):
    """A ConvNet learns from batches of images; its running average is tested where one is kept."""

    clocks = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
    header = (
        f"{'epoch':>5} {'train loss':>10} {'train %':>8} {'test loss':>10} {'test %':>7} "
        f"{'seconds':>8} {'CPU s':>8}   network"
    )

    def __init__(self, settings: Settings, data: ImageSet, device: torch.device) -> None:
        self.settings, self.data, s = settings, data, settings
        seed_everything(s.seed)
        net = build(s, data).to(device)
        optimizer = optimizer_of(s, net)
        batches = Batches(data.train_x, data.train_y, s.batch_size, s.seed, s.shift, s.flips)
        scheduler = scheduler_of(s, optimizer, len(batches) * s.epochs)
        title = f"{s.dataset}, {s.name}, seed {s.seed}"
        super().__init__(net, optimizer, scheduler, batches, s.epochs, title)
        self.ema = None
        if s.ema:
            average = get_ema_multi_avg_fn(s.ema)
            self.ema = AveragedModel(net, multi_avg_fn=average, use_buffers=True)

    @property
    def result(self) -> nn.Module:
        """The network that is tested and saved."""
        return self.net if self.ema is None else self.ema.module

    def step(self, ids: Tensor, x: Tensor, y: Tensor) -> None:
        s = self.settings
        x = cutout(x, s.cutout, self.batches.generator) if s.cutout else x
        with batch(ids):
            output = self.net(x)
        loss = F.cross_entropy(output, y, label_smoothing=s.label_smoothing)
        if not bool(loss.isfinite()):
            raise FloatingPointError(
                f"the loss became {loss.item()} in epoch {self.epoch + 1}; lower --lr or --gclip"
            )
        self.optimizer.zero_grad()
        loss.backward()
        if s.gclip:
            nn.utils.clip_grad_norm_(self.net.parameters(), s.gclip)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.net)
        self.sums["loss"] += loss.item() * len(y)
        self.sums["correct"] += (output.argmax(1) == y).sum().item()
        self.sums["seen"] += len(y)

    def record(self) -> dict[str, Any]:
        test_loss, test_acc = evaluate(
            self.result, self.data.test_x, self.data.test_y, self.settings.test_batch_size
        )
        return {
            "network": self.settings.name,
            "seed": self.settings.seed,
            "epoch": self.epoch,
            "train_loss": self.sums["loss"] / self.sums["seen"],
            "train_acc": self.sums["correct"] / self.sums["seen"],
            "test_loss": test_loss,
            "test_acc": test_acc,
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "seconds": round(self.sums["seconds"], 2),
            "cpu_seconds": round(self.sums["cpu_seconds"], 2),
        }

    def row(self, record: dict[str, Any]) -> str:
        return (
            f"{record['epoch']:>5} {record['train_loss']:>10.4f} {100 * record['train_acc']:>8.2f} "
            f"{record['test_loss']:>10.4f} {100 * record['test_acc']:>7.2f} "
            f"{record['seconds']:>8.1f} {record['cpu_seconds']:>8.1f}   {record['network']}, "
            f"{record['parameters']:,} parameters, seed {record['seed']}"
        )

    def extras(self) -> dict[str, Any]:
        return super().extras() | {"ema": None if self.ema is None else self.ema.state_dict()}

    def load_extras(self, extras: dict[str, Any]) -> None:
        super().load_extras(extras)
        if self.ema is not None:
            self.ema.load_state_dict(extras["ema"])


def train(
    settings: Settings,
    save_dir: str | Path,
    *,
    data: ImageSet | None = None,
    resume: bool = False,
    overwrite: bool = False,
    save_model: bool = False,
    quiet: bool = False,
    verbose: bool = False,
) -> list[dict[str, Any]]:
    """Run the training that `settings` describe; returns one record per epoch (accuracies are
    fractions, times seconds)."""
    settings.check()
    device = pick_device(settings.cuda)
    data = images_of(settings) if data is None else data
    trainer = Trainer(settings, data.to(device), device)
    folder = RunFolder(save_dir, asdict(settings), resume, overwrite)
    if resume:
        loop.resume_from(trainer, folder)
    if verbose:
        print(trainer.net)
    if loop.fit(trainer, folder, quiet=quiet) and save_model:
        save(trainer.result.state_dict(), folder.path / "model.th")
    return trainer.records


def images_of(settings: Settings) -> ImageSet:
    s = settings
    return load_images(s.dataset, s.data, s.train_subset_size, s.test_subset_size)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    arguments = parser(__doc__)
    args = arguments.parse_args(argv)
    settings = settings_of(args, Settings)
    if args.resume and (not args.save_dir or args.overwrite):
        arguments.error(
            "--resume needs the --save-dir of the run to continue, and contradicts --overwrite"
        )
    with errors_of(arguments):
        settings.check()
        runs = [settings, *beside(args.beside, settings, args.beside_lr, args.beside_epochs)]
        for run in runs:
            run.check()
        folder = Path(args.save_dir or dated_folder("cifar10conv"))
        data = images_of(settings)
        records = []
        for run in runs:
            place = folder if run is settings else folder / f"{run.network}{run.width}"
            # Of several networks some may not have got to their first checkpoint when the command
            # was stopped.
            resume = args.resume and (run is settings or (place / "checkpoint.pt").is_file())
            found = train(
                run,
                place,
                data=data,
                resume=resume,
                overwrite=args.overwrite or args.resume and not resume,
                save_model=args.save_model,
                quiet=args.quiet,
                verbose=args.verbose,
            )
            records += found
            if len(found) < run.epochs:
                break  # it was interrupted
        if len(runs) > 1 and records:
            draw(collect([folder]), folder / "compare.png")
        if not args.quiet:
            print(f"results in {folder}")
    return records


if __name__ == "__main__":
    main()
