"""Image sets in memory as normalised vectors, and batches whose order can be resumed in the middle
of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .choices import DATASETS

HELD_OUT_SEED = 20_211  # which training images are held out; the same in all runs


@dataclass(frozen=True)
class ImageSet:
    """Images [n c h w], normalised per channel by the training images' mean and deviation, and
    labels [n] below `classes`. Held-out images are no part of the training images: settings and
    epochs can be chosen by them."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    held_out_x: Tensor | None = None
    held_out_y: Tensor | None = None

    @property
    def features(self) -> int:
        return self.train_x[0].numel()

    def describe(self) -> str:
        """How many images there are: 60,000 training and 10,000 test images of 1 x 28 x 28."""
        shape = " x ".join(map(str, self.train_x.shape[1:]))
        return f"{len(self.train_y):,} training and {len(self.test_y):,} test images of {shape}"

    def to(self, device: torch.device | str) -> ImageSet:
        sides = [field.name for field in fields(self) if field.name not in ("name", "classes")]
        present = [name for name in sides if getattr(self, name) is not None]
        return replace(self, **{name: getattr(self, name).to(device) for name in present})

    def hold_out(self, count: int) -> ImageSet:
        """Without `count` of the training images, which are held out: as many of each class as
        of the others, or in proportion where the classes differ in size.

        Which ones depends on the labels and the count only, on no seed of a run: what is chosen
        by them for one seed has not been seen by another, nor by an ensemble of both.
        """
        if not count:
            return self
        if not 0 < count < len(self.train_y):
            raise ValueError(
                f"{count} images were to be held out of {len(self.train_y)} training images of "
                f"{self.name}; some must be left to train on"
            )
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        order = torch.randperm(len(self.train_y), generator=generator)
        labels = self.train_y.cpu()[order]
        # The place of each image among those of its class, from 0 to 1: the first ones of all
        # classes are in proportion to the classes' sizes.
        place = torch.empty(len(labels), dtype=torch.float64)
        for label in labels.unique():
            of_class = (labels == label).nonzero().squeeze(1)
            place[of_class] = (torch.arange(len(of_class)) + 0.5).double() / len(of_class)
        held = order[place.argsort(stable=True)[:count]].sort().values
        kept = torch.ones(len(labels), dtype=torch.bool)
        kept[held] = False
        kept, held = (ids.to(self.train_y.device) for ids in (kept.nonzero().squeeze(1), held))
        return replace(
            self,
            train_x=self.train_x.index_select(0, kept),
            train_y=self.train_y.index_select(0, kept),
            held_out_x=self.train_x.index_select(0, held),
            held_out_y=self.train_y.index_select(0, held),
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
