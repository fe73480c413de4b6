"""Networks of one named run with several seeds, tested together: their outputs are averaged.

    python -m experiments.paper.ensemble cifar10-pi-r200 --seeds 0,1,2 --runs DIR --data DIR

DIR of --runs holds the folders of the runs. The network of each is that of its last checkpoint, and
its epoch is said.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pilimit_lib.core import load, write_text

from ..cifar10 import cifar10mlp
from ..cifar10.saved_networks import load_network
from ..training.errors import errors_of
from ..training.flags import (
    command_line,
    read_settings,
    require_none,
    settings_of,
)


@dataclass(frozen=True)
class Settings:
    """Which networks are averaged."""

    run: str = ""
    seeds: str = "0,1,2"

    @property
    def seed_list(self) -> list[int]:
        return [int(part) for part in self.seeds.split(",")]

    def check(self) -> None:
        """Raise on settings that can't be meant."""
        problems = []
        if not self.run:
            problems.append("name the run whose seeds are averaged")
        parts = self.seeds.split(",")
        if not all(part.strip().isdigit() for part in parts) or len(set(parts)) < 2:
            problems.append(f"--seeds {self.seeds!r}: two or more different seeds, such as 0,1,2")
        require_none(problems)


@torch.no_grad()
def outputs_of(net: nn.Module, x: Tensor, size: int = 512) -> Tensor:
    """Outputs [n classes] of all images, `size` at a time."""
    return torch.cat([net(part.flatten(1)) for part in x.split(size)])


def average(settings: Settings, runs: Path, data: str) -> list[dict[str, Any]]:
    """One record for each network and one for their mean (accuracies are fractions)."""
    folders = [runs / f"{settings.run}-{seed}" for seed in settings.seed_list]
    missing = [str(folder) for folder in folders if not (folder / "checkpoint.pt").is_file()]
    if missing:
        raise FileNotFoundError(
            f"there is no checkpoint.pt in {', '.join(missing)}; train these seeds first: "
            f"python -m experiments.paper {settings.run} --seed SEED"
        )
    known = read_settings(folders[0] / "settings.json")
    trained = cifar10mlp.Settings(**(known | {"data": data}))
    images = cifar10mlp.images_of(trained).hold_out(trained.held_out)
    sides = {"test": (images.test_x, images.test_y)}
    if images.held_out_x is not None:
        sides["held_out"] = (images.held_out_x, images.held_out_y)
    records: list[dict[str, Any]] = []
    sums = {side: 0.0 for side in sides}
    for seed, folder in zip(settings.seed_list, folders):
        path = str(folder / "checkpoint.pt")
        net, epoch = load_network(path, {}), load(path)["extras"]["epoch"]
        record = {"networks": 1, "seed": seed, "of_epoch": epoch}
        for side, (x, y) in sides.items():
            outputs = outputs_of(net, x)
            sums[side] = sums[side] + outputs
            record[f"{side}_acc"] = _accuracy(outputs, y)
        records.append(record)
    together = {f"{side}_acc": _accuracy(sums[side], y) for side, (_, y) in sides.items()}
    oldest = min(record["of_epoch"] for record in records)
    return [*records, {"networks": len(folders), "of_epoch": oldest, **together}]


def _accuracy(outputs: Tensor, labels: Tensor) -> float:
    return float((outputs.argmax(1) == labels).double().mean())


def parser() -> argparse.ArgumentParser:
    texts = {"data": {"run": "name of the run", "seeds": "of the networks, separated by commas"}}
    result = command_line("paper.ensemble", Settings, __doc__, texts=texts, positional="run")
    result.add_argument(
        "--data", default="./dataset", help="folder of CIFAR-10 (default ./dataset)"
    )
    result.add_argument(
        "--runs", default="output/paper", help="folder of the runs' folders (default output/paper)"
    )
    result.add_argument("--save-dir", default="", help="where results.jsonl goes (default nowhere)")
    return result


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    arguments = parser()
    args = arguments.parse_args(argv)
    with errors_of(arguments):
        settings = settings_of(args, Settings)
        settings.check()
        records = average(settings, Path(args.runs), args.data)
        if args.save_dir:
            folder = Path(args.save_dir)
            folder.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(record) + "\n" for record in records)
            write_text(folder / "results.jsonl", lines)
        for record in records:
            who = f"seed {record['seed']}" if "seed" in record else "their mean"
            held_out = ""
            if "held_out_acc" in record:
                held_out = f", held out {100 * record['held_out_acc']:.2f} %"
            test = f"test {100 * record['test_acc']:.2f} %"
            print(f"{who}: {test}{held_out} (epoch {record['of_epoch']})")
    return records


if __name__ == "__main__":
    main()
