"""Train an infinite-width ConvNet, and finite ones of the same shape beside it, on images.

    # CIFAR-10, in DIR or downloaded there
    python -m experiments.cifar10.cifar10conv --data DIR
    python -m experiments.cifar10.cifar10conv --data DIR --ranks 8,16,16,24,24 --pools 2,1,2,1
    # the limit of projected SGD
    python -m experiments.cifar10.cifar10conv --data DIR --optimizer sgd --lr 0.2
    python -m experiments.cifar10.cifar10conv --data DIR --beside batchnorm:16,batchnorm:64,mup:64
    # a whitened start; settings chosen by images held out, and a peer at three rates
    python -m experiments.cifar10.cifar10conv --data DIR --whiten --lr .02 --held-out 5000 \\
        --beside plain:64:.003,plain:64:.01,plain:64:.03 --channels-last
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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..training.flags import answer_help
from .conv_settings import Settings, beside, parser

if __name__ == "__main__":
    answer_help(parser(__doc__))

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pilimit_lib.core import batch, save

from ..training import loop
from ..training.distributed import ALONE, Ranks, processes
from ..training.errors import errors_of
from ..training.flags import (
    dated_folder,
    read_settings,
    settings_to_run,
    typed,
)
from ..training.images import Batches, ImageSet, load_images
from ..training.logs import logs
from ..training.process import Interrupted, pick_device, seed_everything
from ..training.run_folder import Names, RunFolder
from .conv_networks import (
    build,
    cutout,
    evaluate,
    megaflops,
    optimizer_of,
    scheduler_of,
)
from .conv_results import collect, draw

NAMES = Names("cifar10.cifar10conv")


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
        self.mflop = round(megaflops(net, data.test_x), 3)
        self.ema = None
        if s.ema:
            average = get_ema_multi_avg_fn(s.ema)
            self.ema = AveragedModel(net, multi_avg_fn=average, use_buffers=True)

    @property
    def whole_batches(self) -> bool:
        """Batch norm takes its statistics from all images of a batch."""
        return self.settings.network == "batchnorm"

    @property
    def result(self) -> nn.Module:
        """The network that is tested and saved."""
        return self.net if self.ema is None else self.ema.module

    def step(self, ids: Tensor, x: Tensor, y: Tensor) -> None:
        s = self.settings
        x = cutout(x, s.cutout, self.batches.generator) if s.cutout else x
        here, count = self.ranks.share(len(y)), len(y)
        self.optimizer.zero_grad()
        if len(y[here]):
            self.learn(ids[here], x[here], y[here], len(y[here]) / count)
        self.ranks.sum_gradients(self.net)
        if s.gclip:
            nn.utils.clip_grad_norm_(self.net.parameters(), s.gclip)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.net)

    def learn(self, ids: Tensor, x: Tensor, y: Tensor, share: float) -> None:
        """Gradients of images x [b c h w], which are this share of a batch."""
        with batch(ids):
            output = self.net(x)
        loss = F.cross_entropy(output, y, label_smoothing=self.settings.label_smoothing)
        (loss * share).backward()
        self.sums["loss"] += loss.item() * len(y)
        self.sums["correct"] += (output.argmax(1) == y).sum().item()
        self.sums["seen"] += len(y)

    def about(self) -> str:
        return f"{super().about()}; {self.data.describe()}"

    def record(self) -> dict[str, Any]:
        test_loss, test_acc = evaluate(
            self.result,
            self.data.test_x,
            self.data.test_y,
            self.settings.test_batch_size,
            self.ranks,
        )
        return {
            "network": self.settings.name,
            "seed": self.settings.seed,
            "epoch": self.epoch,
            "train_loss": self.sums["loss"] / self.sums["seen"],
            "train_acc": self.sums["correct"] / self.sums["seen"],
            "test_loss": test_loss,
            "test_acc": test_acc,
            **self.held_out(),
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "mflop": self.mflop,
            "seconds": round(self.sums["seconds"], 2),
            "cpu_seconds": round(self.sums["cpu_seconds"], 2),
        }

    def held_out(self) -> dict[str, float]:
        """Loss and accuracy of the images that were held out, where some were."""
        data = self.data
        if data.held_out_x is None:
            return {}
        size = self.settings.test_batch_size
        loss, accuracy = evaluate(self.result, data.held_out_x, data.held_out_y, size)
        return {"held_out_loss": loss, "held_out_acc": accuracy}

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
    log: Sequence[str] = (),
    given: Path | None = None,
    stop: list[int] | None = None,
    ranks: Ranks = ALONE,
) -> list[dict[str, Any]]:
    """Run the training that `settings` describe; returns one record per epoch (accuracies are
    fractions, times seconds). `given` as in RunFolder, `stop` as in `loop.fit`, `ranks` as in
    `cifar10mlp.train`."""
    settings.check()
    device = pick_device(settings.cuda)
    data = (images_of(settings) if data is None else data).hold_out(settings.held_out)
    trainer = Trainer(settings, data.to(device), device)
    if verbose and ranks.first:
        print(trainer.net)
    folder = RunFolder(save_dir, asdict(settings), resume, overwrite, NAMES, given)
    with ranks.taken(folder):
        if resume:
            loop.resume_from(trainer, folder)
        trainer.spread(ranks)
        told = logs(log, asdict(settings))
        loop.fit(trainer, folder, quiet=quiet, at_epoch=told, stop=stop)
        if save_model and ranks.first:
            save(trainer.result.state_dict(), folder.path / "model.th")
    return trainer.records


def images_of(settings: Settings) -> ImageSet:
    s = settings
    return load_images(s.dataset, s.data, s.train_subset_size, s.test_subset_size)


def runs_in(folder: Path, settings: Settings, others: list[Settings]) -> dict[Path, Settings]:
    """Where each network of a command is trained: the first in the folder, those beside it within
    it."""
    kinds = [(s.network, s.width) for s in others]
    rates = [f"-lr{s.lr:g}" * (kinds.count(kind) > 1) for s, kind in zip(others, kinds)]
    places = [folder / f"{s.network}{s.width}{rate}" for s, rate in zip(others, rates)]
    return {folder: settings} | dict(zip(places, others))


def others_in(folder: Path, changed: dict[str, Any]) -> list[Settings]:
    """Settings of the networks that a command which is resumed had beside the first."""
    found = [read_settings(path) for path in sorted(folder.glob(f"*/{NAMES.settings}"))]
    return [Settings(**(known | changed)) for known in found]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    arguments = parser(__doc__)
    args = arguments.parse_args(argv)
    if args.resume and (not args.save_dir or args.overwrite):
        arguments.error(
            "--resume needs the --save-dir of the run to continue, and contradicts --overwrite"
        )
    with errors_of(arguments), processes() as ranks:
        folder = Path(args.save_dir or dated_folder("cifar10conv"))
        settings = settings_to_run(arguments, argv, args, Settings, folder / NAMES.settings)
        others = beside(args.beside, settings, args.beside_lr, args.beside_epochs)
        if args.resume and not args.beside:
            epochs = args.beside_epochs or typed(arguments, argv, Settings).get("epochs")
            others = others_in(folder, {"epochs": epochs} if epochs else {})
        runs = runs_in(folder, settings, others)
        for run in runs.values():
            run.check()
        with ranks.one_by_one():
            data = images_of(settings)
        # Of several networks some may not have got to their first checkpoint when the command was
        # stopped: they begin. Their settings are written now, for --resume to know them all.
        begun = {place: args.resume and (place / "checkpoint.pt").is_file() for place in runs}
        begun[folder] = args.resume
        anew = args.overwrite or args.resume
        for place, run in runs.items():
            if not begun[place] and ranks.first:
                RunFolder(place, asdict(run), False, anew, NAMES).prepare()
        ranks.wait()  # rank 0 has looked for checkpoints as well before any is written
        records: list[dict[str, Any]] = []
        stop: list[int] = []
        for place, run in runs.items():
            records += train(
                run,
                place,
                data=data,
                resume=begun[place],
                overwrite=anew and not begun[place],
                save_model=args.save_model,
                quiet=args.quiet,
                verbose=args.verbose,
                log=args.log,
                given=folder,
                stop=stop,
                ranks=ranks,
            )
            if stop and place != list(runs)[-1]:
                raise Interrupted(stop[0])
        if len(runs) > 1 and ranks.first:
            draw(collect([folder]), folder / "compare.png")
        if ranks.first and not args.quiet:
            print(f"results in {folder}")
    return records


if __name__ == "__main__":
    main()
