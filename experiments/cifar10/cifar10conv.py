"""Train an infinite-width ConvNet, and finite ones of the same shape beside it, on images.

    python -m experiments.cifar10.cifar10conv --data DIR                                  # CIFAR-10, in DIR or downloaded there
    python -m experiments.cifar10.cifar10conv --data DIR --ranks 8,16,16,24,24 --pools 2,1,2,1
    python -m experiments.cifar10.cifar10conv --data DIR --optimizer sgd --lr 0.2         # the limit of projected SGD
    python -m experiments.cifar10.cifar10conv --data DIR --beside batchnorm:16,batchnorm:64,mup:64
    python -m experiments.cifar10.cifar10conv --dataset digits --ranks 6,8,8 --pools 2,1  # no
    download, seconds

SGD on moments (with momentum and weight decay) is the infinite-width limit of projected SGD. Adam
on moments trains the same functions, but is not the limit of Adam. Writes settings.json,
metrics.jsonl, curves.png and a checkpoint into --save-dir after every epoch; networks of --beside
get folders within it. Ctrl-C stops after the current step; --resume goes on from there, bit for
bit.
"""

from __future__ import annotations

import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from experiments.cifar10.conv_networks import build, groups
from experiments.cifar10.conv_results import collect, draw
from experiments.cifar10.conv_settings import NETWORKS, Settings, parser
from experiments.training.images import Batches, ImageSet, load_images
from experiments.training.process import RunFolder, interruptible, pick_device, seed_everything
from pilimit_lib.core import batch, restore, rng_state, save, set_rng_state, snapshot


@torch.no_grad()
def evaluate(net: nn.Module, x: Tensor, y: Tensor, size: int) -> tuple[float, float]:
    """(mean cross entropy, accuracy as a fraction) over all images."""
    training = net.training
    net.eval()
    output = torch.cat([net(part) for part in x.split(size)])
    net.train(training)
    return F.cross_entropy(output, y).item(), (output.argmax(1) == y).float().mean().item()


def cutout(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Each image [b c h w] with a square of `size` pixels around a random place set to 0, the
    mean."""
    b, _, h, w = x.shape
    row, column = (torch.randint(0, n, (b, 1), generator=generator).to(x.device) for n in (h, w))
    rows = (torch.arange(h, device=x.device) - row + size // 2).div(
        size, rounding_mode="floor"
    ) == 0
    columns = (torch.arange(w, device=x.device) - column + size // 2).div(
        size, rounding_mode="floor"
    ) == 0
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


class Trainer:
    """The state of a run between two steps; everything that a checkpoint holds."""

    def __init__(self, settings: Settings, data: ImageSet, device: torch.device) -> None:
        self.settings, self.data = settings, data
        seed_everything(settings.seed)
        self.net = build(settings, data).to(device)
        kinds = {
            "sgd": lambda g: torch.optim.SGD(g, settings.lr, momentum=settings.momentum),
            "adam": lambda g: torch.optim.Adam(g, settings.lr),
            "adamw": lambda g: torch.optim.AdamW(g, settings.lr),
        }
        self.optimizer = kinds[settings.optimizer](groups(self.net, settings))
        self.batches = Batches(
            data.train_x,
            data.train_y,
            settings.batch_size,
            settings.seed,
            settings.shift,
            settings.flips,
        )
        self.scheduler = self._scheduler(len(self.batches) * settings.epochs)
        self.ema = None
        if settings.ema:
            self.ema = AveragedModel(
                self.net, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True
            )
        self.epoch, self.records = 0, []
        self.sums = {"loss": 0.0, "correct": 0, "seen": 0, "seconds": 0.0, "cpu_seconds": 0.0}

    def _scheduler(self, steps: int) -> torch.optim.lr_scheduler.LRScheduler | None:
        schedulers = torch.optim.lr_scheduler
        if self.settings.scheduler == "onecycle":
            rates = [group["lr"] for group in self.optimizer.param_groups]
            # Momentum stays as it is: cycling it would make a different SGD of every step.
            return schedulers.OneCycleLR(
                self.optimizer, rates, total_steps=steps, cycle_momentum=False
            )
        return (
            schedulers.CosineAnnealingLR(self.optimizer, steps)
            if self.settings.scheduler == "cosine"
            else None
        )

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

    def run_epoch(self, stop: list[int], quiet: bool) -> bool:
        """Train what is left of the epoch; True unless interrupted between two steps."""
        clocks = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
        started, before = {name: clock() for name, clock in clocks.items()}, dict(self.sums)
        with tqdm(
            total=len(self.batches),
            initial=self.batches.position if self.batches.order is not None else 0,
            leave=False,
            desc=f"epoch {self.epoch + 1}/{self.settings.epochs}",
            disable=quiet,
            mininterval=0.5,
        ) as bar:
            for ids, x, y in self.batches:
                self.step(ids, x, y)
                for name, clock in clocks.items():
                    self.sums[name] = before[name] + clock() - started[name]
                bar.update()
                if self.batches.position % 20 == 0:
                    bar.set_postfix_str(
                        f"loss {self.sums['loss'] / self.sums['seen']:.4f}, "
                        f"acc {100 * self.sums['correct'] / self.sums['seen']:.1f} %"
                    )
                if stop and self.batches.position < len(self.batches):
                    return False
        self._finish_epoch()
        return True

    def _finish_epoch(self) -> None:
        net = self.net if self.ema is None else self.ema.module
        test_loss, test_acc = evaluate(
            net, self.data.test_x, self.data.test_y, self.settings.test_batch_size
        )
        seen = self.sums["seen"]
        self.epoch += 1
        self.records.append(
            {
                "network": self.settings.name,
                "seed": self.settings.seed,
                "epoch": self.epoch,
                "train_loss": self.sums["loss"] / seen,
                "train_acc": self.sums["correct"] / seen,
                "test_loss": test_loss,
                "test_acc": test_acc,
                "parameters": sum(p.numel() for p in self.net.parameters()),
                "seconds": round(self.sums["seconds"], 2),
                "cpu_seconds": round(self.sums["cpu_seconds"], 2),
            }
        )
        self.sums = dict.fromkeys(self.sums, 0) | {"loss": 0.0, "seconds": 0.0, "cpu_seconds": 0.0}

    def state(self) -> dict[str, Any]:
        return snapshot(
            self.net,
            self.optimizer,
            epoch=self.epoch,
            records=self.records,
            sums=self.sums,
            batches=self.batches.state(),
            rng=rng_state(),
            ema=None if self.ema is None else self.ema.state_dict(),
            scheduler=None if self.scheduler is None else self.scheduler.state_dict(),
        )

    def load_state(self, state: dict[str, Any]) -> None:
        extras = restore(self.net, state, self.optimizer)
        self.epoch, self.records, self.sums = extras["epoch"], extras["records"], extras["sums"]
        self.batches.load_state(extras["batches"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(extras["scheduler"])
        if self.ema is not None:
            self.ema.load_state_dict(extras["ema"])
        set_rng_state(extras["rng"])


HEADER = (
    f"{'epoch':>5} {'train loss':>10} {'train %':>8} {'test loss':>10} {'test %':>7} "
    f"{'seconds':>8} {'CPU s':>8}   "
    "network"
)


def table_row(record: dict[str, Any]) -> str:
    return (
        f"{record['epoch']:>5} {record['train_loss']:>10.4f} {100 * record['train_acc']:>8.2f} "
        f"{record['test_loss']:>10.4f} "
        f"{100 * record['test_acc']:>7.2f} {record['seconds']:>8.1f} {record['cpu_seconds']:>8.1f} "
        f"  {record['network']}, "
        f"{record['parameters']:,} parameters, seed {record['seed']}"
    )


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
    stop: list[int] | None = None,
) -> list[dict[str, Any]]:
    """Run the training that `settings` describe; returns one record per epoch (accuracies are
    fractions, times seconds)."""
    settings.check()
    device = pick_device(settings.cuda)
    if data is None:
        data = load_images(
            settings.dataset, settings.data, settings.train_subset_size, settings.test_subset_size
        )
    trainer = Trainer(settings, data.to(device), device)
    folder = RunFolder(save_dir, asdict(settings), resume, overwrite)
    if resume:
        state = folder.load()
        folder.check_schedule(*(each["extras"]["scheduler"] for each in (state, trainer.state())))
        trainer.load_state(state)
    if verbose:
        print(trainer.net)
    with interruptible() as requests:
        stop = requests if stop is None else stop
        while trainer.epoch < settings.epochs and not stop and not requests:
            done = trainer.run_epoch(requests, quiet)
            folder.save(trainer.state())
            if done:
                folder.rewrite_metrics(trainer.records)
                folder.draw_curves(
                    trainer.records, f"{settings.dataset}, {settings.name}, seed {settings.seed}"
                )
                if not quiet:
                    print(table_row(trainer.records[-1]), flush=True)
        stop += requests
    if trainer.epoch < settings.epochs:
        print(f"stopped in epoch {trainer.epoch + 1}; go on with --resume --save-dir {folder.path}")
    elif save_model:
        save(
            (trainer.net if trainer.ema is None else trainer.ema.module).state_dict(),
            folder.path / "model.th",
        )
    return trainer.records


def beside(text: str, settings: Settings, lr: float | None, epochs: int | None) -> list[Settings]:
    """Settings of the finite networks that `text`, such as batchnorm:16,mup:64, asks for."""
    result = []
    for part in filter(None, text.split(",")):
        network, _, width = part.partition(":")
        if network not in NETWORKS[1:] or not width.isdigit():
            raise ValueError(
                f"--beside {text!r}: {part!r} is not one of {', '.join(NETWORKS[1:])} with a "
                "width, such as "
                "batchnorm:64"
            )
        result.append(
            replace(
                settings,
                network=network,
                width=int(width),
                lr=settings.lr if lr is None else lr,
                epochs=epochs or settings.epochs,
            )
        )
    return result


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    arguments = parser(__doc__)
    args = arguments.parse_args(argv)
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    if args.resume and (not args.save_dir or args.overwrite):
        arguments.error(
            "--resume needs the --save-dir of the run to continue, and contradicts --overwrite"
        )
    try:
        settings.check()
        runs = [settings, *beside(args.beside, settings, args.beside_lr, args.beside_epochs)]
        for run in runs:
            run.check()
        folder = Path(
            args.save_dir or Path("output") / "cifar10conv" / time.strftime("%Y-%m-%d_%H-%M-%S")
        )
        data = load_images(
            settings.dataset, settings.data, settings.train_subset_size, settings.test_subset_size
        )
        if not args.quiet:
            print(HEADER)
        records, stop = [], []
        for run in runs:
            place = folder if run is settings else folder / f"{run.network}{run.width}"
            # Of several networks some may not have got to their first checkpoint when the command
            # was stopped.
            resume = args.resume and (run is settings or (place / "checkpoint.pt").is_file())
            records += train(
                run,
                place,
                data=data,
                resume=resume,
                overwrite=args.overwrite or args.resume and not resume,
                save_model=args.save_model,
                quiet=args.quiet,
                verbose=args.verbose,
                stop=stop,
            )
            if stop:
                break
        if len(runs) > 1 and records:
            draw(collect([folder]), folder / "compare.png")
        if not args.quiet:
            print(f"results in {folder}")
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
