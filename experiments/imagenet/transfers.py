"""Regression on a network's features, at milestones of its training."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pilimit_lib.core import save, write_text
from pilimit_lib.inf.gp import (
    ReLUKernel,
    embed,
    features_of,
    kernel_regression,
    memory_needed,
    require_memory,
)

from ..cifar10.cifar10mlp import Trainer
from ..cifar10.cifar10test import scores
from ..training.images import ImageSet
from ..training.plots import curves
from ..training.process import shows_bars
from .images import transfer_data
from .settings import Settings


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
                kernel, x, targets, x_test, [reg], dtype=dtype, progress=shows_bars(quiet)
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
        sizes = {"train": len(self.data.train_y), "test": len(self.data.test_y)}
        started = time.perf_counter()
        x, x_test = (
            embed(net, part, progress=shows_bars(self.quiet))
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
            x, x_test = self.data.train_x.flatten(1), self.data.test_x.flatten(1)
            found += [
                {"what": "NNGP", **record}
                for record in regress(kernel, x, x_test, self.data, self.settings, self.quiet)
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
