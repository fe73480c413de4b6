"""Image sets in memory as normalised vectors, and batches whose order can be resumed in the middle
of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.training.choices import DATASETS


@dataclass(frozen=True)
class ImageSet:
    """Images [n c h w], normalised per channel by the training images' mean and deviation, and
    labels [n] below `classes`."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    @property
    def features(self) -> int:
        return self.train_x[0].numel()

    def to(self, device: torch.device | str) -> ImageSet:
        return ImageSet(
            self.name,
            *(t.to(device) for t in (self.train_x, self.train_y, self.test_x, self.test_y)),
            self.classes,
        )


def load_images(
    name: str,
    root: str | Path = "./dataset",
    train_size: int | None = None,
    test_size: int | None = None,
    flag: str = "--data",
) -> ImageSet:
    """Load an image set. `digits` ships inside scikit-learn; the others lie under `root` or are
    downloaded there.

    `train_size` and `test_size` keep that many images, the first ones of the published order (of a
    fixed shuffle for digits). `flag` names `root` in errors.
    """
    if name not in DATASETS:
        raise ValueError(f"there is no data set '{name}'; choose one of {', '.join(DATASETS)}")
    images = _digits() if name == "digits" else _torchvision(name, Path(root), flag)
    (train_x, train_y), (test_x, test_y) = images[:2], images[2:]
    for kind, size, have in (("train", train_size, len(train_x)), ("test", test_size, len(test_x))):
        if size is not None and not 0 < size <= have:
            raise ValueError(f"{name} has {have} {kind} images; a subset of {size} was asked for")
    # of the whole set: a few images may lack some
    classes = int(torch.cat([train_y, test_y]).max()) + 1
    train_x, train_y = train_x[:train_size], train_y[:train_size]
    test_x, test_y = test_x[:test_size], test_y[:test_size]
    mean = train_x.mean((0, 2, 3), keepdim=True)
    deviation = train_x.std((0, 2, 3), keepdim=True)
    return ImageSet(
        name, (train_x - mean) / deviation, train_y, (test_x - mean) / deviation, test_y, classes
    )


def _digits() -> tuple[Tensor, ...]:
    """1,797 8x8 images, of which a fixed fifth is for testing."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(x) // 5], order[len(x) // 5 :]
    return x[train], y[train], x[test], y[test]


def _torchvision(name: str, root: Path, flag: str) -> tuple[Tensor, ...]:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(
            f"the data set {name} needs torchvision: pip install 'pilimit[images]'"
        ) from error
    kind = {"cifar10": datasets.CIFAR10, "fashion_mnist": datasets.FashionMNIST}[name]
    parts = []
    for train in (True, False):
        try:
            data = kind(root, train=train, download=False)
        except RuntimeError:
            try:
                data = kind(root, train=train, download=True)
            except Exception as error:
                raise FileNotFoundError(
                    f"{name} is not under {root.resolve()} and could not be downloaded ({error}); "
                    f"pass the folder that holds it with {flag}"
                ) from error
        images = torch.tensor(np.asarray(data.data), dtype=torch.float32)
        images = images.permute(0, 3, 1, 2) if images.ndim == 4 else images.unsqueeze(1)
        parts += [images.contiguous(), torch.tensor(np.asarray(data.targets))]
    return tuple(parts)


class Batches:
    """Batches (ids [b], images [b c h w], labels [b]) in a new order each epoch; `state` resumes
    anywhere in an epoch."""

    def __init__(
        self, x: Tensor, y: Tensor, size: int, seed: int, shift: int = 0, flips: bool = False
    ) -> None:
        if size < 1:
            raise ValueError(f"the batch size must be positive, got {size}")
        self.x, self.y, self.size = x, y, size
        self.shift, self.flips = shift, flips
        self.generator = torch.Generator().manual_seed(seed)
        self.order: Tensor | None = None
        self.position = 0

    def __len__(self) -> int:
        return -(-len(self.x) // self.size)

    @property
    def done(self) -> int:
        """How many batches of the epoch begun were given; 0 between two epochs."""
        return 0 if self.order is None else self.position

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What is left of the epoch begun, else a whole new one."""
        if self.order is None:
            self.order, self.position = torch.randperm(len(self.x), generator=self.generator), 0
        while self.position < len(self):
            ids = self.order[self.position * self.size : (self.position + 1) * self.size]
            self.position += 1
            yield ids, self._augmented(self.x[ids.to(self.x.device)]), self.y[ids.to(self.y.device)]
        self.order = None

    def state(self) -> dict[str, Any]:
        return {
            "generator": self.generator.get_state(),
            "order": self.order,
            "position": self.position,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.order, self.position = state["order"], state["position"]

    def _augmented(self, x: Tensor) -> Tensor:
        """Each image flipped with probability ½ and moved by up to `shift` pixels, the border
        filled with the mean (0)."""
        if self.flips:
            flip = torch.rand(len(x), generator=self.generator).to(x.device) < 0.5
            x = torch.where(flip[:, None, None, None], x.flip(3), x)
        if self.shift:
            x = self._moved(x)
        return x

    def _moved(self, x: Tensor) -> Tensor:
        """Each image cut out of a padded one at a place of its own."""
        b, c, h, w = x.shape
        padded = torch.nn.functional.pad(x, [self.shift] * 4)
        corners = torch.randint(0, 2 * self.shift + 1, (2, b), generator=self.generator)
        top, left = corners.to(x.device)[:, :, None]
        rows = top + torch.arange(h, device=x.device)  # [b h]
        columns = left + torch.arange(w, device=x.device)  # [b w]
        # The four indices broadcast to [b c h w]: image, channel, and its own rows and columns.
        sample = torch.arange(b, device=x.device)[:, None, None, None]
        channel = torch.arange(c, device=x.device)[:, None, None]
        return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
