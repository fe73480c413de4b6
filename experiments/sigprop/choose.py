"""Settings of the CIFAR-10 protocol, chosen on training images that were held out: the test images
take no part.

    python -m experiments.sigprop.choose --data FOLDER
    python -m experiments.sigprop.choose --data FOLDER --train 10000 --held-out 2000 --epochs 4

Signal propagation is trained with every norm and learning rate on the other training images, and
the pair of the highest mean accuracy on the held-out ones is printed last. Each epoch of each run
is a line of OUT/NORM-RATE/sigprop-SEED.csv; an interrupted command goes on when it is given again.
"""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from ..training.flags import add_out, plain_command_line
from ..training.images import ImageSet, load_images
from .cifar10 import PROTOCOL
from .networks import NORMS
from .training import run


def held_out(images: ImageSet, count: int) -> ImageSet:
    """The last `count` training images in place of the test images, and the others to train on."""
    if not 0 < count < len(images.train_x):
        raise ValueError(
            f"{count} of {len(images.train_x)} training images were to be held out; leave some of "
            "both"
        )
    x, y = images.train_x, images.train_y
    return replace(
        images, train_x=x[:-count], train_y=y[:-count], test_x=x[-count:], test_y=y[-count:]
    )


def main(argv: list[str] | None = None) -> tuple[str, float]:
    flags = plain_command_line("sigprop.choose", __doc__)
    flags.add_argument("--data", default="./dataset", help="folder as torchvision lays it out")
    flags.add_argument(
        "--norms", nargs="+", choices=NORMS, default=list(NORMS), help="norms (default all)"
    )
    flags.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=[PROTOCOL.lr],
        help="learning rates (default that of the protocol)",
    )
    flags.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="of networks (default 0 1 2)"
    )
    flags.add_argument(
        "--epochs",
        type=int,
        default=PROTOCOL.epochs,
        help=f"of training (default {PROTOCOL.epochs})",
    )
    flags.add_argument(
        "--width",
        type=int,
        default=PROTOCOL.width,
        help=f"channels of the first layer (default {PROTOCOL.width})",
    )
    flags.add_argument("--train", type=int, default=None, help="training images, held-out included")
    flags.add_argument(
        "--held-out",
        type=int,
        default=5000,
        help="training images that decide (default 5000)",
    )
    add_out(flags, "results/sigprop/choose", "folder of the table")
    args = flags.parse_args(argv)
    images = held_out(load_images("cifar10", args.data, args.train), args.held_out)
    rows = []
    for norm in args.norms:
        for rate in args.rates:
            settings = replace(
                PROTOCOL,
                norm=norm,
                lr=rate,
                output_lr=rate,
                epochs=args.epochs,
                width=args.width,
                train=args.train,
            )
            folder = args.out / f"{norm}-{rate:g}"
            folder.mkdir(parents=True, exist_ok=True)
            for seed in args.seeds:
                last = run(settings, "sigprop", seed, images, folder)[-1]
                rows.append({"norm": norm, "rate": rate, **last})
    table = pd.DataFrame(rows).groupby(["norm", "rate"]).accuracy.agg(["mean", list])
    table.to_csv(args.out / "choice.csv")
    print(table.to_string())
    norm, rate = table["mean"].idxmax()
    print(f"chosen on {args.held_out} held-out training images: {norm} norm, rate {rate:g}")
    return norm, rate


if __name__ == "__main__":
    main()
