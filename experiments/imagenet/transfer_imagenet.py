"""Pretrain a network on ImageNet32 (or on half of CIFAR-10's classes) and see how its features
transfer to CIFAR-10.

    python -m experiments.imagenet.transfer_imagenet --imagenet-data DIR --cifar-data DIR --memory
    moments --r 200 ...
    python -m experiments.imagenet.transfer_imagenet --transfer --transfer-milestones 0,5,10 ...   # features after these epochs
    python -m experiments.imagenet.transfer_imagenet --dataset cifar10-half --transfer ...         # no ImageNet needed
    python -m experiments.imagenet.transfer_imagenet --width 1024 ...                              # finite; --gaussian-init: μ
    python -m experiments.imagenet.transfer_imagenet --test --model-path FILE --transfer ...       # a saved network, no training

At each milestone the feature kernel of the network is regressed on CIFAR-10's labels (cifar10-half:
on those of the other half), and once that of the NNGP, which learns no features. Writes what
`cifar10mlp` writes, transfers.jsonl and transfer.png. README.md beside this file has the paper's
command and says what it costs; the command says so too before it starts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.cifar10 import cifar10mlp
from experiments.cifar10.cifar10mlp import Trainer
from experiments.cifar10.cifar10test import REGS, scores
from experiments.cifar10.saved_networks import load_network
from experiments.cifar10.settings import REMOVED, parser
from experiments.cifar10.settings import Settings as TrainSettings
from experiments.imagenet.cost import cost, describe_cost
from experiments.imagenet.imagenet32 import load_imagenet32
from experiments.training.images import ImageSet, load_images
from experiments.training.process import curves, milestones, parse, pick_device
from pilimit_lib.core import save, write_text
from pilimit_lib.inf.gp import (
    ReLUKernel,
    embed,
    features_of,
    kernel_regression,
    memory_needed,
    require_memory,
)

SOURCES = ("imagenet32", "cifar10-half")
# classes 0-4 of CIFAR-10 (two vehicles, three animals) are pretrained on, 5-9 (three animals, two
# vehicles) are the aim
HALF = 5


@dataclass(frozen=True)
class Settings(TrainSettings):
    """Pretraining as in `cifar10mlp`, with the original's defaults, and what to transfer when."""

    # the sizes don't influence training
    may_differ = ("epochs", "transfer_train_size", "transfer_test_size")
    dataset: str = "imagenet32"
    imagenet_data: str = "experiments/imagenet/data"
    cifar_data: str = "./dataset"
    r: int = 400
    lr: float = 2.0
    wd: float = 1e-4
    gclip: float = 0.2
    last_layer_alpha: float = 1.0
    bias_alpha: float = 1.0
    last_layer_lr_mult: float = 1.0
    batch_size: int = 64
    test_batch_size: int = 64
    epochs: int = 24
    transfer: bool = False
    transfer_milestones: str = ""
    transfer_train_size: int | None = None
    transfer_test_size: int | None = None
    solve_kernel: bool = False
    kernel_reg: float = 1e-2
    save_epochs: str = "none"

    def check(self) -> None:
        super().check()
        problems = []
        if not self.transfer and (self.transfer_milestones or self.solve_kernel):
            problems.append(
                "--transfer-milestones and --solve-kernel say when and how to transfer: they need "
                "--transfer"
            )
        early = [m for m in milestones(self.transfer_milestones) if m < 0]
        if early:
            problems.append(f"--transfer-milestones are epochs from 0 (untrained) on, got {early}")
        if self.kernel_reg < 0:
            problems.append(f"--kernel-reg must not be negative, got {self.kernel_reg}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def when(self) -> list[int]:
        """Epochs after which to transfer; where none are named, after the last."""
        return (milestones(self.transfer_milestones) or [self.epochs]) if self.transfer else []

    @property
    def late(self) -> list[int]:
        """Milestones that the run never reaches."""
        return [m for m in self.when if m > self.epochs]

    @property
    def regs(self) -> list[float]:
        """Ridges of the regression, relative to the kernel's mean diagonal."""
        return sorted({*REGS, self.kernel_reg}) if self.solve_kernel else [self.kernel_reg]


def pretraining_data(settings: Settings, quiet: bool = False) -> ImageSet:
    """What to pretrain on."""
    s = settings
    if s.dataset == "imagenet32":
        return load_imagenet32(s.imagenet_data, s.train_subset_size, s.test_subset_size, quiet)
    return _classes(_cifar(s), range(HALF), s.train_subset_size, s.test_subset_size)


def transfer_data(settings: Settings) -> ImageSet:
    """What to transfer to: CIFAR-10, or the half of its classes that was not pretrained on.
    Normalised by its own statistics."""
    s, sizes = settings, (settings.transfer_train_size, settings.transfer_test_size)
    if s.dataset == "imagenet32":
        return _cifar(s, *sizes)
    return _classes(_cifar(s), range(HALF, 10), *sizes)


def _cifar(settings: Settings, *sizes: int | None) -> ImageSet:
    return load_images("cifar10", settings.cifar_data, *sizes, flag="--cifar-data")


def _classes(
    data: ImageSet, kept: range, train_size: int | None, test_size: int | None
) -> ImageSet:
    """The images of some classes, the first so many of each side, with labels from 0."""

    def side(x: Tensor, y: Tensor, size: int | None) -> tuple[Tensor, Tensor]:
        which = ((y >= kept.start) & (y < kept.stop)).nonzero().squeeze(1)
        if size is not None and not 0 < size <= len(which):
            raise ValueError(
                f"these classes of {data.name} have {len(which)} images; a subset of {size} was "
                "asked for"
            )
        return x[which[:size]], y[which[:size]] - kept.start

    return ImageSet(
        data.name,
        *side(data.train_x, data.train_y, train_size),
        *side(data.test_x, data.test_y, test_size),
        len(kept),
    )


def require_regression(settings: Settings, samples: int) -> None:
    """Raise MemoryError where the regression on so many samples does not fit into memory."""
    dtype = torch.float32 if settings.float else torch.float64
    require_memory(
        memory_needed(samples, dtype, "auto", len(settings.regs)),
        "--transfer-train-size, --transfer-test-size",
    )


def regress(
    kernel: Callable, x: Tensor, x_test: Tensor, data: ImageSet, settings: Settings, quiet: bool
) -> list[dict[str, Any]]:
    """Accuracy of ridge regression with a kernel, for each ridge; one that fails is recorded so."""
    dtype = torch.float32 if settings.float else torch.float64
    targets = F.one_hot(data.train_y, data.classes).double() - 1 / data.classes
    require_regression(settings, len(x))
    records = []
    for reg in settings.regs:
        try:
            (outputs,) = kernel_regression(
                kernel, x, targets, x_test, [reg], dtype=dtype, progress=not quiet
            )
            records.append({"reg": reg, **scores(outputs, data.test_y)})
        except ValueError as error:
            records.append({"reg": reg, "failed": str(error)})
    return records


class Transfers:
    """Transfers at the milestones of a run; called by the training loop between epochs. A resumed
    run repeats none."""

    def __init__(self, settings: Settings, quiet: bool) -> None:
        self.settings, self.quiet = settings, quiet
        self.data = transfer_data(settings) if settings.transfer else None
        if self.data is not None:  # now, not after epochs of training
            require_regression(settings, len(self.data.train_y))

    def __call__(self, trainer: Trainer, folder: Path) -> None:
        self._save_epoch(trainer, folder)
        path = folder / "transfers.jsonl"
        if trainer.epoch == 0 and not trainer.batches.position:
            path.unlink(missing_ok=True)  # of a test in this folder
        known = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        )
        if trainer.epoch in self.settings.when and all(
            record.get("epoch") != trainer.epoch for record in known
        ):
            self.measure(trainer.net, trainer.epoch, known, folder)

    def measure(
        self, net: nn.Module, epoch: int, known: list[dict[str, Any]], folder: Path
    ) -> list[dict[str, Any]]:
        """Regress on the features of `net`, and the first time on the control; all records, written
        with those `known`."""
        path = folder / "transfers.jsonl"
        if net.d_in != self.data.features:
            raise ValueError(
                f"the network takes {net.d_in} numbers, images of {self.data.name} have "
                f"{self.data.features}"
            )
        sizes, started = (
            {"train": len(self.data.train_y), "test": len(self.data.test_y)},
            time.perf_counter(),
        )
        x, x_test = (
            embed(net, part, progress=not self.quiet)
            for part in (self.data.train_x, self.data.test_x)
        )
        found = [
            {"what": "features", "epoch": epoch, **record}
            for record in regress(features_of(net), x, x_test, self.data, self.settings, self.quiet)
        ]
        if not any(
            record["what"] == "NNGP" and sizes.items() <= record.items() for record in known
        ):
            kernel = ReLUKernel(net.L + 1, varw=2.0, varb=0.0)
            found += [
                {"what": "NNGP", **record}
                for record in regress(
                    kernel,
                    self.data.train_x.flatten(1),
                    self.data.test_x.flatten(1),
                    self.data,
                    self.settings,
                    self.quiet,
                )
            ]
        seconds = round(time.perf_counter() - started, 1)
        records = known + [record | sizes | {"seconds": seconds} for record in found]
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))
        comparable = [record for record in records if sizes.items() <= record.items()]
        draw(comparable, folder, f"{self.settings.dataset} to {self.data.name}")
        if not self.quiet:
            for record in found:
                result = record.get("failed") or f"{100 * record['test_acc']:.2f} %"
                where = f"after epoch {record['epoch']}" if "epoch" in record else "(control)"
                print(
                    f"transfer: {record['what']} {where}, ridge {record['reg']:g}: {result} of "
                    f"{sizes['test']} test images",
                    flush=True,
                )
        return records

    def _save_epoch(self, trainer: Trainer, folder: Path) -> None:
        """Keep the network after every epoch, or the best so far."""
        if self.settings.save_epochs == "all" and trainer.epoch:
            save(trainer.net.state_dict(), folder / f"model_epoch_{trainer.epoch}.th")
        elif self.settings.save_epochs == "best" and trainer.records:
            if trainer.records[-1]["test_acc"] >= max(
                record["test_acc"] for record in trainer.records
            ):
                save(trainer.net.state_dict(), folder / "model_best.th")


def draw(records: list[dict[str, Any]], folder: Path, title: str) -> None:
    """transfer.png: the best accuracy over the ridges against the epoch of pretraining, and that of
    the control."""
    frame = pd.DataFrame([record for record in records if "test_acc" in record])
    if frame.empty:
        return
    best = frame[frame.what == "features"].groupby("epoch", as_index=False).test_acc.max()
    best = best.rename(columns={"test_acc": "features"})
    best["NNGP"] = frame[frame.what == "NNGP"].test_acc.max()
    curves(best, {"transfer accuracy": ("features", "NNGP")}, title).savefig(
        folder / "transfer.png", dpi=110
    )


def test(
    settings: Settings,
    model_path: str,
    save_dir: Path,
    quiet: bool = False,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Transfer the features of a saved network, whose architecture its file knows, without
    training; returns the records."""
    if (save_dir / "settings.json").exists():
        raise FileExistsError(
            f"{save_dir} holds a training run, with transfers of its own; choose another --save-dir"
        )
    if (save_dir / "transfers.jsonl").exists() and not overwrite:
        raise FileExistsError(
            f"{save_dir} already holds a transfer; replace it with --overwrite, or choose another "
            "--save-dir"
        )
    net = load_network(model_path, {}, device=pick_device(settings.cuda))
    transfers = Transfers(settings, quiet)
    save_dir.mkdir(parents=True, exist_ok=True)
    return transfers.measure(net, 0, [], save_dir)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    choices = {"dataset": SOURCES, "save_epochs": ("none", "best", "all")}
    arguments = parser(__doc__, Settings, "imagenet.transfer_imagenet", choices)
    args = parse(arguments, argv, REMOVED)
    if args.test and not (args.model_path and args.transfer):
        arguments.error("--test needs the --model-path of a saved network, and --transfer")
    if args.resume and (args.overwrite or args.model_path or not args.save_dir):
        arguments.error(
            "--resume needs the --save-dir of the run to continue, and contradicts --overwrite and "
            "--model-path: the "
            "checkpoint says where to go on"
        )
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    save_dir = args.save_dir or Path("output") / "transfer_imagenet" / time.strftime(
        "%Y-%m-%d_%H-%M-%S"
    )
    try:
        settings.check()
        if args.test:
            return test(settings, args.model_path, Path(save_dir), args.quiet, args.overwrite)
        transfers, data = Transfers(settings, args.quiet), pretraining_data(settings, args.quiet)
        if settings.late:
            print(
                f"the run ends after epoch {settings.epochs}; of --transfer-milestones it never "
                f"reaches {settings.late}"
            )
        print(
            describe_cost(cost(settings, len(data.train_y), data.features, data.classes)),
            flush=True,
        )
        records = cifar10mlp.train(
            settings,
            save_dir,
            resume=args.resume,
            overwrite=args.overwrite,
            model_path=args.model_path,
            save_model=args.save_model,
            quiet=args.quiet,
            human=args.human,
            verbose=args.verbose,
            data=data,
            at_epoch=transfers,
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
        print(f"results in {save_dir}")
    return records


if __name__ == "__main__":
    main()
