"""Image sets as tensors, split into train, validation and test: dendrites decide by the validation
score, so a test set must stay apart."""

import gzip
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

Split = tuple[Tensor, Tensor]


def digits(seed: int = 0) -> dict[str, Split]:
    """8x8 digits of scikit-learn: 1000 / 400 / 397 images [n 1 8 8] in 0..1. One split for all
    seeds of a comparison."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = order.split([1000, 400, len(x) - 1400])
    return {name: (x[part], y[part]) for name, part in zip(("train", "val", "test"), parts)}


def idx(path: Path) -> Tensor:
    """An array in the idx format, plain or gzipped."""
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            raw = (
                gzip.decompress(candidate.read_bytes())
                if candidate.suffix == ".gz"
                else candidate.read_bytes()
            )
            shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
            return torch.from_numpy(
                np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()
            )
    raise FileNotFoundError(
        f"{path} (or .gz) is not there; give --data the folder that holds the Fashion-MNIST idx "
        "files"
    )


def fashion(
    folder: str, train: int, val: int, test: int = 10000, seed: int = 0
) -> dict[str, Split]:
    """Fashion-MNIST in 0..1, [n 1 28 28]: a random subset of the training images for train and
    validation, and the first ``test`` of the 10,000 test images."""
    root = Path(folder)
    root = root / "FashionMNIST" / "raw" if (root / "FashionMNIST").is_dir() else root
    x, y = idx(root / "train-images-idx3-ubyte"), idx(root / "train-labels-idx1-ubyte").long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = {"train": order[:train], "val": order[train : train + val]}
    sets = {name: (x[part][:, None].float() / 255, y[part]) for name, part in parts.items()}
    test_x, test_y = (
        idx(root / "t10k-images-idx3-ubyte"),
        idx(root / "t10k-labels-idx1-ubyte").long(),
    )
    return {**sets, "test": (test_x[:test, None].float() / 255, test_y[:test])}
