"""What is pretrained on, and what is transferred to."""

from __future__ import annotations

from torch import Tensor

from ..training.images import ImageSet, load_images
from .classes import CLASSES
from .imagenet32 import load_imagenet32
from .settings import Settings

# classes 0-4 of CIFAR-10 (two vehicles, three animals) are pretrained on, 5-9 (three animals, two
# vehicles) are the aim
HALF = 5


def pretraining_data(settings: Settings, quiet: bool = False) -> ImageSet:
    """What to pretrain on."""
    s = settings
    if s.dataset == "imagenet32":
        sizes = s.train_subset_size, s.test_subset_size
        return load_imagenet32(s.imagenet_data, *sizes, quiet, CLASSES[s.imagenet_classes])
    return _classes(_cifar(s), range(HALF), s.train_subset_size, s.test_subset_size)


def transfer_data(settings: Settings) -> ImageSet:
    """What to transfer to: CIFAR-10, or the half of its classes that was not pretrained on.
    Normalised by its own statistics."""
    s, sizes = settings, (settings.transfer_train_size, settings.transfer_test_size)
    if s.dataset == "imagenet32":
        return _cifar(s, *sizes)
    return _classes(_cifar(s), range(HALF, 10), *sizes)


def _cifar(settings: Settings, *sizes: int | None) -> ImageSet:
    return load_images("cifar10", settings.cifar_data, *sizes, flag="--cifar-data")


def _classes(
    data: ImageSet, kept: range, train_size: int | None, test_size: int | None
) -> ImageSet:
    """The images of some classes, the first so many of each side, with labels from 0."""

    def side(x: Tensor, y: Tensor, size: int | None) -> tuple[Tensor, Tensor]:
        which = ((y >= kept.start) & (y < kept.stop)).nonzero().squeeze(1)
        if size is not None and not 0 < size <= len(which):
            raise ValueError(
                f"these classes of {data.name} have {len(which)} images; a subset of {size} was "
                "asked for"
            )
        return x[which[:size]], y[which[:size]] - kept.start

    return ImageSet(
        data.name,
        *side(data.train_x, data.train_y, train_size),
        *side(data.test_x, data.test_y, test_size),
        len(kept),
    )
