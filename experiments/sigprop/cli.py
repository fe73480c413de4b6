"""The flags that the examples share."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

from experiments.training.choices import DATASETS
from experiments.training.images import load_images

from . import networks
from .methods import METHODS, Settings
from .report import summarise, write_settings
from .training import run


def parser(
    description: str, defaults: Settings, out: str, seeds: tuple[int, ...] = (0,)
) -> argparse.ArgumentParser:
    """One flag per setting, beside seeds, methods and folders."""
    flags = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    choices = {
        "dataset": DATASETS,
        "network": networks.NAMES,
        "loss": ("v9", "v14", "v15"),
        "partners": ("product", "cosine", "label"),
        "norm": networks.NORMS,
    }
    for field in fields(Settings):
        default, name = getattr(defaults, field.name), "--" + field.name.replace("_", "-")
        if isinstance(default, bool):
            flags.add_argument(name, action=argparse.BooleanOptionalAction, default=default)
        else:
            kind = int if default is None else type(default)
            flags.add_argument(name, type=kind, default=default, choices=choices.get(field.name))
    flags.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    flags.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    flags.add_argument(
        "--data",
        default="./dataset",
        help="folder of the data set as torchvision lays it out; digits need none",
    )
    flags.add_argument(
        "--out",
        type=Path,
        default=Path(out),
        help="folder for settings, metrics, checkpoints and the figure",
    )
    return flags


def main(
    description: str,
    defaults: Settings,
    out: str,
    argv: list[str] | None = None,
    watch: bool = False,
    seeds: tuple[int, ...] = (0,),
) -> None:
    """Every method with every seed, then the table."""
    flags = parser(description, defaults, out, seeds).parse_args(argv)
    settings = replace(
        defaults, **{field.name: getattr(flags, field.name) for field in fields(Settings)}
    )
    images = load_images(settings.dataset, flags.data, settings.train, settings.test)
    write_settings(flags.out, settings, methods=flags.methods, seeds=flags.seeds)
    records = [
        record
        for seed in flags.seeds
        for method in flags.methods
        for record in run(settings, method, seed, images, flags.out, watch)
    ]
    print(summarise(records, flags.out).to_string())
