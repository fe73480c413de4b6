"""Train an infinite-width π-network, or a finite π- or μ-network, on images.

    python -m experiments.cifar10.cifar10mlp                                             # digits, no download, under a minute
    python -m experiments.cifar10.cifar10mlp --dataset cifar10 --data DIR --r 100        # CIFAR-10, in DIR or downloaded there
    python -m experiments.cifar10.cifar10mlp --width 1024                                # the finite π-network sampled from it
    python -m experiments.cifar10.cifar10mlp --width 1024 --gaussian-init                # the μ-network
    python -m experiments.cifar10.cifar10mlp --memory moments --degree 2                 # all rows as one matrix of fixed size
    python -m experiments.cifar10.cifar10mlp --memory moments --row-budget 2000          # the newest 2,000 rows exact

Writes settings.json, metrics.jsonl, curves.png and a checkpoint into --save-dir after every epoch.
Ctrl-C stops after the current step; --resume goes on from there, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from experiments.cifar10.settings import REMOVED, Settings, parser
from experiments.training.images import FLIPS, SHIFT, Batches, ImageSet, load_images
from experiments.training.process import (
    RunFolder,
    human_bytes,
    interruptible,
    milestones,
    parse,
    pick_device,
    seed_everything,
)
from pilimit_lib.core import batch, load, restore, rng_state, save, set_rng_state, snapshot
from pilimit_lib.inf import InfMLP, PiSGD, clip_grad_norm_, param_groups


def build(settings: Settings, data: ImageSet, device: torch.device) -> nn.Module:
    """The network that the settings describe, freshly initialised from the seed."""
    seed_everything(settings.seed)
    # On a GPU rows are kept in half precision, as the original does, unless --float is given; sums
    # are float32 always. Moments are a sum that goes on growing, in which float16 loses small steps
    # and Adam's overflow.
    half = device.type == "cuda" and not settings.float and settings.memory == "rows"
    row_dtype = torch.float16 if half else torch.float32
    net: nn.Module = InfMLP(
        data.features,
        data.classes,
        settings.r,
        settings.depth,
        settings.first_layer_alpha,
        settings.last_layer_alpha,
        settings.bias_alpha,
        settings.last_bias_alpha,
        settings.layernorm,
        row_dtype=row_dtype,
        memory=settings.memory,
        degree=settings.degree,
        fit=settings.fit,
        activation=settings.activation,
        row_budget=settings.row_budget,
        merge=settings.merge,
        fused=(
            settings.memory == "moments"
            and settings.row_budget is None
            and settings.optimizer == "sgd"
            and not settings.momentum
        ),
    )
    if settings.width:
        net = net.sample(settings.width)
        if settings.gaussian_init:
            net.gaussian_init_()
    return net.to(device)


def loss_of(
    settings: Settings, output: Tensor, y: Tensor, teacher_output: Tensor | None = None
) -> Tensor:
    """Cross entropy, or mean squared error to centred one-hot labels; mixed with the teacher's soft
    labels where there is one."""
    if settings.loss == "xent":
        loss = F.cross_entropy(output, y)
    else:
        classes = output.shape[1]
        loss = F.mse_loss(output, F.one_hot(y, classes).to(output) - 1 / classes)
    if teacher_output is not None:
        t = settings.teacher_temp
        logs = (F.log_softmax(logits / t, 1) for logits in (output, teacher_output))
        soft = F.kl_div(*logs, reduction="batchmean", log_target=True)
        loss = (1 - settings.teacher_alpha) * loss + settings.teacher_alpha * t * t * soft
    return loss


@torch.no_grad()
def evaluate(net: nn.Module, x: Tensor, y: Tensor, settings: Settings) -> tuple[float, float]:
    """(mean loss, accuracy as a fraction) over all images."""
    loss, correct = 0.0, 0
    for part, labels in zip(x.split(settings.test_batch_size), y.split(settings.test_batch_size)):
        output = net(part.flatten(1))
        loss += loss_of(settings, output, labels).item() * len(labels)
        correct += (output.argmax(1) == labels).sum().item()
    return loss / len(x), correct / len(x)


class Trainer:
    """The state of a run between two steps; everything that a checkpoint holds."""

    def __init__(self, settings: Settings, data: ImageSet, device: torch.device) -> None:
        self.settings, self.data = settings, data
        self.net = build(settings, data, device)
        self.optimizer = self._optimizer()
        shift = SHIFT[data.name] if settings.augment_shift is None else settings.augment_shift
        self.batches = Batches(
            data.train_x,
            data.train_y,
            settings.batch_size,
            settings.seed,
            *((shift, FLIPS[data.name]) if settings.data_augment else ()),
        )
        self.scheduler = self._scheduler()
        self.teacher = None
        if settings.teacher_path:
            self.teacher = InfMLP.from_state_dict(load(settings.teacher_path), device=device)
        self.epoch, self.records = 0, []
        self.sums = {"loss": 0.0, "correct": 0, "seen": 0, "seconds": 0.0}

    def _optimizer(self) -> torch.optim.Optimizer:
        s = self.settings
        groups = param_groups(
            self.net,
            s.lr,
            s.wd,
            s.first_layer_lr_mult,
            s.last_layer_lr_mult,
            s.bias_lr_mult,
            not s.no_apply_lr_mult_to_wd,
        )
        if s.optimizer == "sgd":
            return PiSGD(groups, lr=s.lr, momentum=s.momentum)
        return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[s.optimizer](groups, lr=s.lr)

    def _scheduler(self) -> torch.optim.lr_scheduler.LRScheduler | None:
        s, schedulers = self.settings, torch.optim.lr_scheduler
        if s.scheduler == "multistep":
            return schedulers.MultiStepLR(
                self.optimizer, milestones(s.lr_drop_milestones), s.lr_drop_ratio
            )
        if s.scheduler == "cosine":
            return schedulers.CosineAnnealingLR(self.optimizer, s.epochs)
        return None

    @property
    def clip(self) -> float:
        """The bound on gradient norms in this epoch; 0 where there is none."""
        drops = sum(self.epoch >= m for m in milestones(self.settings.gclip_drop_milestones))
        return self.settings.gclip * self.settings.gclip_drop_ratio**drops

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
        if position % s.accum_steps == 0 or position == total:
            if self.clip:
                clip_grad_norm_(self.net, self.clip, s.gclip_per_param)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.sums["loss"] += loss.item() * len(y)
        self.sums["correct"] += (output.argmax(1) == y).sum().item()
        self.sums["seen"] += len(y)

    def run_epoch(self, stop: list[int], quiet: bool) -> bool:
        """Train what is left of the epoch; True unless interrupted between two optimiser steps."""
        started, before = time.perf_counter(), self.sums["seconds"]
        bar = tqdm(
            total=len(self.batches),
            initial=self.batches.position if self.batches.order is not None else 0,
            desc=f"epoch {self.epoch + 1}/{self.settings.epochs}",
            leave=False,
            disable=quiet,
            mininterval=0.5,
        )
        with bar:
            for ids, x, y in self.batches:
                self.step(ids, x, y)
                self.sums["seconds"] = before + time.perf_counter() - started
                bar.update()
                if not quiet and self.batches.position % 20 == 0:
                    bar.set_postfix_str(self.progress())
                at_step = (
                    self.batches.position % self.settings.accum_steps == 0
                    or self.batches.position == len(self.batches)
                )
                if stop and at_step and self.batches.position < len(self.batches):
                    return False
        self._finish_epoch()
        return True

    def progress(self) -> str:
        seen = max(self.sums["seen"], 1)
        rows = (
            f", {sum(self.net.rows)} rows, {human_bytes(self.net.row_bytes)}"
            if isinstance(self.net, InfMLP)
            else ""
        )
        return f"loss {self.sums['loss'] / seen:.4f}, acc {100 * self.sums['correct'] / seen:.1f} %{rows}"

    def _finish_epoch(self) -> None:
        test_loss, test_acc = evaluate(self.net, self.data.test_x, self.data.test_y, self.settings)
        infinite = isinstance(self.net, InfMLP)
        self.epoch += 1
        self.records.append(
            {
                "epoch": self.epoch,
                "train_loss": self.sums["loss"] / self.sums["seen"],
                "train_acc": self.sums["correct"] / self.sums["seen"],
                "test_loss": test_loss,
                "test_acc": test_acc,
                "lr": self.optimizer.param_groups[0]["lr"]
                / (self.settings.first_layer_lr_mult or 1),
                "rows": sum(self.net.rows) if infinite else 0,
                "bytes": self.net.row_bytes
                if infinite
                else sum(p.numel() * p.element_size() for p in self.net.parameters()),
                "seconds": round(self.sums["seconds"], 3),
            }
        )
        self.sums = {"loss": 0.0, "correct": 0, "seen": 0, "seconds": 0.0}
        if self.scheduler is not None:
            self.scheduler.step()

    def state(self) -> dict[str, Any]:
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        return snapshot(
            self.net,
            self.optimizer,
            epoch=self.epoch,
            records=self.records,
            sums=self.sums,
            batches=self.batches.state(),
            scheduler=scheduler,
            rng=rng_state(),
        )

    def load_state(self, state: dict[str, Any]) -> None:
        extras = restore(self.net, state, self.optimizer)
        self.epoch, self.records, self.sums = extras["epoch"], extras["records"], extras["sums"]
        self.batches.load_state(extras["batches"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(extras["scheduler"])
        set_rng_state(extras["rng"])


def table_row(record: dict[str, Any], human: bool) -> str:
    rows = f"{record['rows'] / 1000:.1f}k" if human else record["rows"]
    memory = human_bytes(record["bytes"]) if human else record["bytes"]
    return (
        f"{record['epoch']:>5} {record['train_loss']:>10.4f} {100 * record['train_acc']:>9.2f} "
        f"{record['test_loss']:>10.4f} "
        f"{100 * record['test_acc']:>8.2f} {rows:>9} {memory:>12} {record['seconds']:>8.1f}"
    )


HEADER = (
    f"{'epoch':>5} {'train loss':>10} {'train %':>9} {'test loss':>10} {'test %':>8} {'rows':>9} "
    f"{'memory':>12} "
    f"{'seconds':>8}"
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

    `data` takes the place of the data set that the settings name. `at_epoch` is called with the
    trainer and the output folder before the first epoch, after each, and again when a run is
    resumed.
    """
    settings.check()
    device = pick_device(settings.cuda)
    if data is None:
        data = load_images(
            settings.dataset, settings.data, settings.train_subset_size, settings.test_subset_size
        )
    data = data.to(device)
    trainer = Trainer(settings, data, device)
    if model_path:
        trainer.net.load_state_dict(load(model_path))
    folder = RunFolder(
        save_dir, asdict(settings), resume, overwrite, may_differ=settings.may_differ
    )
    if resume:
        state = folder.load()
        folder.check_schedule(*(each["extras"]["scheduler"] for each in (state, trainer.state())))
        trainer.load_state(state)
    if verbose:
        print(trainer.net)
    if not quiet:
        print(HEADER)
        for record in trainer.records:
            print(table_row(record, human))
    with interruptible() as stop:
        if at_epoch is not None:
            at_epoch(trainer, folder.path)
        while trainer.epoch < settings.epochs and not stop:
            done = trainer.run_epoch(stop, quiet)
            folder.save(trainer.state())
            if done:
                folder.rewrite_metrics(trainer.records)
                folder.draw_curves(trainer.records, f"{settings.dataset}, {describe(settings)}")
                if at_epoch is not None:
                    at_epoch(trainer, folder.path)
                if not quiet:
                    print(table_row(trainer.records[-1], human), flush=True)
    if trainer.epoch < settings.epochs:
        print(f"stopped in epoch {trainer.epoch + 1}; go on with --resume --save-dir {folder.path}")
    elif save_model:
        save(trainer.net.state_dict(), folder.path / "model.th")
    return trainer.records


def describe(settings: Settings) -> str:
    finite = f"{'μ' if settings.gaussian_init else 'π'}-network, width {settings.width}"
    kind = finite if settings.width else "infinite π-network"
    return f"{kind}, r={settings.r}, depth {settings.depth}, seed {settings.seed}"


def test(settings: Settings, model_path: str) -> tuple[float, float]:
    """(loss, accuracy) of a saved network on the test images."""
    device = pick_device(settings.cuda)
    data = load_images(
        settings.dataset, settings.data, settings.train_subset_size, settings.test_subset_size
    ).to(device)
    net = build(settings, data, device)
    net.load_state_dict(load(model_path))
    return evaluate(net, data.test_x, data.test_y, settings)


def main(argv: list[str] | None = None) -> list[dict[str, Any]] | tuple[float, float]:
    arguments = parser(__doc__)
    args = parse(arguments, argv, REMOVED)
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    if args.resume and not args.save_dir:
        arguments.error("--resume needs the --save-dir of the run to continue")
    if args.test and not args.model_path:
        arguments.error("--test needs a --model-path")
    if args.resume and (args.overwrite or args.model_path):
        arguments.error(
            "--resume contradicts --overwrite and --model-path: the checkpoint says where to go on"
        )
    try:
        settings.check()
        if args.test:
            loss, accuracy = test(settings, args.model_path)
            print(f"test loss {loss:.4f}, accuracy {100 * accuracy:.2f} %")
            return loss, accuracy
        save_dir = args.save_dir or Path("output") / "cifar10mlp" / time.strftime(
            "%Y-%m-%d_%H-%M-%S"
        )
        records = train(
            settings,
            save_dir,
            resume=args.resume,
            overwrite=args.overwrite,
            model_path=args.model_path,
            save_model=args.save_model,
            quiet=args.quiet,
            human=args.human,
            verbose=args.verbose,
        )
        if not args.quiet:
            print(f"results in {save_dir}")
        return records
    except (
        ValueError,
        FileNotFoundError,
        FileExistsError,
        ImportError,
        RuntimeError,
        MemoryError,
        FloatingPointError,
    ) as error:
        arguments.error(str(error))


if __name__ == "__main__":
    main()
