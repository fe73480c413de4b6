"""The flags that the examples share."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace

from ..training.choices import DATASETS
from ..training.errors import errors_of
from ..training.flags import CommandLine, add_out, add_switches, plain_command_line
from ..training.images import load_images
from ..training.process import pick_device
from . import networks
from .methods import METHODS, Settings
from .report import summarise, write_settings
from .training import run

MEANINGS = {
    "data": {
        "dataset": "images to learn",
        "classes": "of the data set",
        "batch": "images of a step",
        "augment": "move images by whole pixels, and mirror them where that is the same class",
        "train": "learn from so many images, the first of the published order; no: all",
        "test": "test on so many images; no: all",
        "probe": "training images that measure batch norms anew and train a ridge probe; no: none",
    },
    "network": {
        "network": "shape of the network",
        "width": "units or channels of its first layer",
        "depth": "layers of the mlp",
        "norm": "normalisation of hidden layers",
    },
    "loss": {
        "loss": "which targets an input is compared with: all, one of the closest, the k closest",
        "k": "so many targets, for v15",
        "partners": "how closeness is measured",
        "per_class": "one row of targets per class, not per sample",
        "cosine": "similarities are cosines, not products",
        "temperature": "that divides similarities",
    },
    "optimiser": {
        "lr": "learning rate of hidden layers; of all with backprop",
        "output_lr": "learning rate of the output layer",
    },
    "schedule": {
        "epochs": "passes over the training data",
        "decay": "every learning rate falls to zero along a cosine",
    },
}


def parser(
    command: str, description: str, defaults: Settings, out: str, seeds: tuple[int, ...] = (0,)
) -> CommandLine:
    """One flag per setting, beside seeds, methods and folders."""
    flags = plain_command_line(f"sigprop.{command}", description)
    choices = {
        "dataset": DATASETS,
        "network": networks.NAMES,
        "loss": ("v9", "v14", "v15"),
        "partners": ("product", "cosine", "label"),
        "norm": networks.NORMS,
    }
    for field in fields(Settings):
        default, name = getattr(defaults, field.name), "--" + field.name.replace("_", "-")
        (title,) = (title for title, meanings in MEANINGS.items() if field.name in meanings)
        meaning = MEANINGS[title][field.name]
        how = {"default": default, "help": f"{meaning} (default {default or 'no'})"}
        if isinstance(default, bool):
            how["action"] = argparse.BooleanOptionalAction
        else:
            kind = int if default is None else type(default)
            how |= {"type": kind, "choices": choices.get(field.name)}
        flags.group(title).add_argument(name, **how)
    flags.group("optimiser").add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        choices=METHODS,
        help="ways to learn that are compared (default all)",
    )
    data = flags.group("data")
    data.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=list(seeds),
        help=f"one run of each method for each (default {' '.join(map(str, seeds))})",
    )
    data.add_argument(
        "--data",
        default="./dataset",
        help="folder of the data set as torchvision lays it out; digits need none (default "
        "./dataset)",
    )
    add_out(flags, out, "folder of settings, metrics, checkpoints and the figure")
    switches = {
        "overwrite": "begin anew in --save-dir instead of going on where the command was stopped",
        "cuda": "run on the GPU; an error where there is none",
    }
    add_switches(flags, switches)
    return flags


def main(
    command: str,
    description: str,
    defaults: Settings,
    out: str,
    argv: list[str] | None = None,
    watch: bool = False,
    seeds: tuple[int, ...] = (0,),
) -> None:
    """Every method with every seed, then the table."""
    arguments = parser(command, description, defaults, out, seeds)
    flags = arguments.parse_args(argv)
    with errors_of(arguments):
        _run(flags, defaults, watch)


def _run(flags: argparse.Namespace, defaults: Settings, watch: bool) -> None:
    settings = replace(
        defaults, **{field.name: getattr(flags, field.name) for field in fields(Settings)}
    )
    device = pick_device(flags.cuda)
    images = load_images(settings.dataset, flags.data, settings.train, settings.test).to(device)
    if flags.overwrite:
        for stale in flags.out.glob("*.pt"):
            stale.unlink()
    write_settings(flags.out, settings, methods=flags.methods, seeds=flags.seeds)
    records = [
        record
        for seed in flags.seeds
        for method in flags.methods
        for record in run(settings, method, seed, images, flags.out, watch)
    ]
    print(summarise(records, flags.out).to_string())
