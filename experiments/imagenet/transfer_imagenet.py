"""Pretrain a network on ImageNet32 (or on half of CIFAR-10's classes) and see how its features
transfer to CIFAR-10.

    python -m experiments.imagenet.transfer_imagenet --imagenet-data DIR --cifar-data DIR \\
        --memory moments --r 200 ...
    # features after these epochs
    python -m experiments.imagenet.transfer_imagenet --transfer --transfer-milestones 0,5,10 ...
    # no ImageNet needed
    python -m experiments.imagenet.transfer_imagenet --dataset cifar10-half --transfer ...
    # finite; --gaussian-init: μ
    python -m experiments.imagenet.transfer_imagenet --width 1024 ...
    # a saved network, no training
    python -m experiments.imagenet.transfer_imagenet --test --model-path FILE --transfer ...

At each milestone the feature kernel of the network is regressed on CIFAR-10's labels (cifar10-half:
on those of the other half), and once that of the NNGP, which learns no features. Writes what
`cifar10mlp` writes, transfers.jsonl and transfer.png. README.md beside this file has the paper's
command and says what it costs; the command says so too before it starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..cifar10.settings import OUTPUT, REMOVED
from ..training.flags import answer_help
from .settings import Settings, command_parser

if __name__ == "__main__":
    answer_help(command_parser(__doc__))

from ..cifar10 import cifar10mlp
from ..cifar10.saved_networks import load_network
from ..training.distributed import processes, require_alone
from ..training.errors import errors_of
from ..training.flags import dated_folder, parse, picked, settings_to_run
from ..training.lock import only_process
from ..training.process import pick_device
from .cost import cost, describe_cost
from .images import pretraining_data
from .transfers import Transfers


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
    with only_process(save_dir):
        return transfers.measure(net, 0, [], save_dir)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    arguments = command_parser(__doc__)
    args = parse(arguments, argv, REMOVED)
    if args.test and not (args.model_path and args.transfer):
        arguments.error("--test needs the --model-path of a saved network, and --transfer")
    if args.resume and (args.overwrite or args.model_path or not args.save_dir):
        arguments.error(
            "--resume needs the --save-dir of the run to continue, and contradicts --overwrite and "
            "--model-path: the checkpoint says where to go on"
        )
    save_dir = Path(args.save_dir or dated_folder("transfer_imagenet"))
    with errors_of(arguments), processes() as ranks:
        known = save_dir / Settings.names.settings
        settings = settings_to_run(arguments, argv, args, Settings, known)
        settings.check()
        if args.test:
            require_alone("--test")
            return test(settings, args.model_path, save_dir, args.quiet, args.overwrite)
        with ranks.one_by_one():
            quiet = args.quiet or not ranks.first
            transfers, data = Transfers(settings, quiet), pretraining_data(settings, quiet)
        if settings.late and ranks.first:
            print(
                f"the run ends after epoch {settings.epochs}; of --transfer-milestones it never "
                f"reaches {settings.late}"
            )
        expected = cost(settings, len(data.train_y), data.features, data.classes)
        if ranks.first and settings.dataset == "imagenet32":
            print(
                f"{len(data.train_y):,} images of {data.classes} classes; the paper's 250 are "
                "--imagenet-classes paper, all 1,000 --imagenet-classes all"
            )
        if ranks.first:
            print(describe_cost(expected), flush=True)
        how = picked(args, OUTPUT)
        records = cifar10mlp.train(
            settings, save_dir, **how, data=data, at_epoch=transfers, ranks=ranks
        )
        if ranks.first and not args.quiet:
            print(f"results in {save_dir}")
    return records


if __name__ == "__main__":
    main()
