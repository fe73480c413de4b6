"""Lazy or rich along a run: how far feature kernels and tangent kernel move from where they began,
and how near they come to the labels.

    # train as cifar10mlp does (all its flags), keep the network of every epoch, and draw
    python -m experiments.understanding.lazy_or_rich --save-dir output/rich
    # draw what a run kept: model_epoch_*.th and settings.json, also of ConvNets and transfers
    python -m experiments.understanding.lazy_or_rich --draw-only --save-dir output/rich

Writes lazy_or_rich.csv and lazy_or_rich.png beside the run's own files. Ctrl-C stops after the
current step; --resume goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from pilimit_lib.core import load, save, write_text
from pilimit_lib.inf import FinPiConvNetSample, InfPiConvNet
from pilimit_lib.inf.instruments import feature_learning

from ..cifar10 import cifar10mlp
from ..cifar10.saved_networks import load_network
from ..cifar10.settings import OUTPUT, REMOVED, Settings, parser
from ..training.errors import errors_of
from ..training.flags import parse, picked, read_settings, settings_to_run
from ..training.images import load_images

COMMAND = "understanding.lazy_or_rich"
PANELS = {
    "change": "|K' - K| / |K|",
    "cka": "CKA with the kernel at the start",
    "task_now": "CKA with the kernel of the labels",
}


def keep(trainer: cifar10mlp.Trainer, folder: Path) -> None:
    """The network after each epoch, and before the first, as a file of its own."""
    save(trainer.net.state_dict(), folder / f"model_epoch_{trainer.epoch}.th")


def kept(folder: Path) -> dict[int, Path]:
    """The networks that a run kept, by epoch."""
    found = {int(path.stem.rpartition("_")[2]): path for path in folder.glob("model_epoch_*.th")}
    if len(found) < 2:
        raise FileNotFoundError(
            f"{folder} holds {len(found)} networks model_epoch_*.th; two or more are compared. "
            f"Train with this command (without --draw-only), or with --save-epochs all"
        )
    return dict(sorted(found.items()))


def network_in(path: Path) -> nn.Module:
    """The network of a file, of any kind that the training commands save."""
    state = load(path)
    if "layers.1.V" in state and state["layers.1.V"].ndim == 4:
        return InfPiConvNet.from_state_dict(state)
    if "layers.0.weight" in state and state["layers.0.weight"].ndim == 4:
        return FinPiConvNetSample.from_state_dict(state)
    return load_network(str(path), {})


def measure(folder: Path, x: Tensor, y: Tensor, ntk: int) -> pd.DataFrame:
    """One row per epoch and kernel; the earliest network is the start."""
    networks = kept(folder)
    start = network_in(next(iter(networks.values())))
    rows: list[dict[str, Any]] = []
    for epoch, path in networks.items():
        net = network_in(path)
        data = x.flatten(1) if hasattr(net, "d_in") else x
        found = feature_learning(net, data, y, since=start, ntk=ntk)
        rows += [{"epoch": epoch, **record} for record in found.records()]
    return pd.DataFrame(rows)


def draw(frame: pd.DataFrame, path: Path, title: str) -> None:
    import seaborn as sns
    from matplotlib.figure import Figure  # not pyplot: nothing global, no window
    from matplotlib.ticker import MaxNLocator

    with sns.axes_style("whitegrid"):
        figure = Figure(figsize=(4.0 * len(PANELS), 3.4), layout="constrained")
        for axis, (column, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
            sns.lineplot(frame, x="epoch", y=column, hue="kernel", marker="o", ax=axis)
            axis.set(ylabel=label, ylim=(0, None if column == "change" else 1.02))
            if column == "change":  # linear up to 1: a readout that began at zero makes an NTK grow
                axis.set_yscale("symlog", linthresh=1)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.get_legend().set_title(None)
            if column != "change":
                axis.get_legend().remove()
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def report(folder: Path, data: str | None, samples: int, ntk: int) -> pd.DataFrame:
    """Table and figure of the run in `folder`."""
    known = read_settings(folder / "settings.json")
    dataset = known.get("dataset", "cifar10")
    images = load_images(dataset, data or known.get("data", "./dataset"))
    frame = measure(folder, images.test_x[:samples], images.test_y[:samples], ntk)
    write_text(folder / "lazy_or_rich.csv", frame.to_csv(index=False, float_format="%.6g"))
    draw(
        frame,
        folder / "lazy_or_rich.png",
        f"{dataset}: kernels of what each layer receives, on {samples} test images (NTK: {ntk})",
    )
    return frame


def main(argv: list[str] | None = None) -> pd.DataFrame:
    arguments = parser(__doc__, Settings, COMMAND)
    group: argparse._ArgumentGroup = arguments.add_argument_group("kernels")
    group.add_argument("--draw-only", action="store_true", help="train nothing; read the run")
    group.add_argument("--samples", type=int, default=256, help="test images; default 256")
    group.add_argument("--ntk-samples", type=int, default=32, help="of these for the NTK (0: none)")
    args = parse(arguments, argv, REMOVED)
    if not args.save_dir:
        arguments.error("give the --save-dir of the run")
    folder = Path(args.save_dir)
    with errors_of(arguments):
        data = args.data if args.draw_only and args.data != Settings.data else None
        if not args.draw_only:
            settings = settings_to_run(arguments, argv, args, Settings, folder / "settings.json")
            cifar10mlp.train(settings, folder, **picked(args, OUTPUT), at_epoch=keep)
        frame = report(folder, data, args.samples, args.ntk_samples)
    last = frame[frame["epoch"] == frame["epoch"].max()].drop(columns="epoch")
    print(last.set_index("kernel").round(4).to_string())
    return frame


if __name__ == "__main__":
    main()
