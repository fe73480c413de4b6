"""What "forgetting" samples does, three ways: deleting their rows, doing nothing, and what would be
right, training again without them.

    # about a minute
    python -m experiments.understanding.forgetting --save-dir output/forgetting

Trains π-networks of rows on 200 digits, forgets 10, and compares outputs on test images: root mean
squares over images and outputs. Writes forgetting.csv and the runs' files.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from pilimit_lib.core import write_text
from pilimit_lib.inf.replay import replay
from pilimit_lib.lab.provenance import Provenance

from ..training.flags import add_out, plain_command_line
from ..training.images import load_images
from ..training.process import shows_bars
from .digits_run import Run, trained


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def measure(run: Run, seed: int, count: int, folder: Path) -> dict[str, float]:
    """How far outputs move, and how far each way ends from retraining."""
    found = trained(run, seed, folder)
    images = load_images("digits")
    x, y = images.test_x.flatten(1), images.test_y
    generator = torch.Generator().manual_seed(seed + 1000)
    gone = torch.randperm(run.samples, generator=generator)[:count]
    removed = copy.deepcopy(found.net)
    Provenance(removed).remove(gone)
    retrained = replay(found.record, found.net, found.x, found.y, without=gone)
    with torch.no_grad():
        full, without_rows, true = (net(x) for net in (found.net, removed, retrained))
    return {
        "seed": seed,
        "moved by removing rows": rms(without_rows - full),
        "moved by retraining": rms(true - full),
        "removed, from retrained": rms(without_rows - true),
        "untouched, from retrained": rms(full - true),
        "accuracy, full": float((full.argmax(1) == y).float().mean()),
        "accuracy, removed": float((without_rows.argmax(1) == y).float().mean()),
        "accuracy, retrained": float((true.argmax(1) == y).float().mean()),
    }


def main(argv: list[str] | None = None) -> pd.DataFrame:
    parser = plain_command_line("understanding.forgetting", __doc__)
    add_out(parser, "output/forgetting", "folder of tables and figures")
    parser.add_argument("--forget", type=int, default=10, help="of 200 samples")
    parser.add_argument("--seeds", type=int, default=5, help="how many runs (default 5)")
    args = parser.parse_args(argv)
    seeds = tqdm(range(args.seeds), desc="seeds", disable=not shows_bars())
    rows = [measure(Run(), s, args.forget, args.out / f"seed_{s}") for s in seeds]
    frame = pd.DataFrame(rows).set_index("seed")
    write_text(args.out / "forgetting.csv", frame.to_csv(float_format="%.5g"))
    print(pd.DataFrame({"mean": frame.mean(), "s.d.": frame.std()}).round(3).to_string())
    return frame


if __name__ == "__main__":
    main()
