"""Digits, Fashion-MNIST and CIFAR-10 as tensors in memory."""
from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NAMES = ("digits", "fashion_mnist", "cifar10")


class Images(NamedTuple):
    """Images [n channels height width], each channel standardised by the training set, and labels [n]."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.train_x.shape[1:])


def load(name: str, folder: str | None = None, train: int | None = None, test: int | None = None) -> Images:
    """The data set `name`; the larger ones from `folder` in torchvision's layout; `train` and `test` keep that many, at random.

    The choice does not depend on the run's seed, so that runs differ in nothing but their seed.
    """
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}; there are {NAMES}")
    parts = _digits() if name == "digits" else _torchvision(name, folder)
    (train_x, train_y), (test_x, test_y) = (_some(x, y, n) for (x, y), n in zip(parts, (train, test)))
    mean, std = train_x.mean((0, 2, 3), keepdim=True), train_x.std((0, 2, 3), keepdim=True)
    return Images((train_x - mean) / std, train_y, (test_x - mean) / std, test_y)


def _digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images.reshape(-1, 1, 8, 8), labels, test_size=360, stratify=labels, random_state=0)
    train_x, test_x, train_y, test_y = (torch.from_numpy(np.ascontiguousarray(part)) for part in split)
    return (train_x.float(), train_y.long()), (test_x.float(), test_y.long())


def _torchvision(name: str, folder: str | None):
    if folder is None or not Path(folder).is_dir():
        raise FileNotFoundError(f"{name} needs --data FOLDER, where its files lie as torchvision lays them out, got {folder}")
    try:
        from torchvision.datasets import CIFAR10, FashionMNIST
    except ImportError as error:
        raise ImportError(f"{name} is read by torchvision: pip install 'pilimit[images]'") from error
    parts = []
    for is_train in (True, False):
        data = (CIFAR10 if name == "cifar10" else FashionMNIST)(folder, train=is_train, download=False)
        pixels = torch.as_tensor(np.asarray(data.data))
        pixels = pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels[:, None]
        parts.append((pixels.contiguous(), torch.as_tensor(data.targets).long()))
    return parts


def _some(x: Tensor, y: Tensor, n: int | None) -> tuple[Tensor, Tensor]:
    if n is not None:
        if not 0 < n <= len(x):
            raise ValueError(f"asked for {n} of {len(x)} images")
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:n]
        x, y = x[chosen], y[chosen]
    return x.float(), y


def batches(x: Tensor, y: Tensor, size: int, seed: int):
    """Shuffled batches of equal size; the short rest is left out, so that every loss finds its k partners."""
    if len(x) < size:
        raise ValueError(f"{len(x)} images do not fill a batch of {size}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    for i in range(math.floor(len(x) / size)):
        chosen = order[i * size:(i + 1) * size]
        yield x[chosen], y[chosen]
