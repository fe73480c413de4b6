"""ImageNet32, the downsampled set of Chrabaszcz, Loshchilov & Hutter 2017, from its pickle files
without executing them.

    DIR/train_data_batch_1 ... 10, DIR/val_data
        dict: data uint8 [n 3072] (red, green, blue planes of 32 x 32), labels 1..1000 (a list),
        mean float [3072] in training batches

How to get the files: data/README.md. Images stay bytes; a batch is normalised when it is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pilimit_orig.cifar10.data import Array, ArrayReader
from pilimit_orig.unpickle import NumpyType

from ..training.images import ImageSet
from ..training.process import shows_bars

BATCHES = 10
FEATURES = 3 * 32 * 32
CLASSES = 1000
GET = "get the 32 x 32 files at https://image-net.org/download-images.php and unpack them there"


def _from_buffer(data: bytes, kind: NumpyType, shape: Sequence[int], order: str) -> Array:
    """How newer pickles hold an array."""
    array = Array()
    array.__setstate__((1, shape, kind, order != "C", bytes(data)))
    return array


class _Reader(ArrayReader):
    """Knows numpy's arrays of numbers as inert bytes with a shape: numpy's own reconstruction would
    trust what the file says of them, and can be made to crash."""

    kind = "file of ImageNet32"
    known = ArrayReader.known | {
        (f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")
    }


class ByteImages:
    """Images uint8 [n 3 32 32] that are normalised per channel as they are taken: images[ids],
    images.split(size)."""

    def __init__(self, bytes_: Tensor, mean: Tensor, deviation: Tensor) -> None:
        self.bytes, self.mean, self.deviation = bytes_, mean, deviation

    @property
    def device(self) -> torch.device:
        return self.bytes.device

    @property
    def shape(self) -> torch.Size:
        return self.bytes.shape

    def __len__(self) -> int:
        return len(self.bytes)

    def __getitem__(self, which: Any) -> Tensor:
        return (self.bytes[which].float() - self.mean) / self.deviation

    def index_select(self, dim: int, ids: Tensor) -> ByteImages:
        """These images only, as bytes still."""
        return ByteImages(self.bytes.index_select(dim, ids), self.mean, self.deviation)

    def split(self, size: int):
        for begin in range(0, len(self), size):
            yield self[begin : begin + size]

    def to(self, device: torch.device | str) -> ByteImages:
        return ByteImages(self.bytes.to(device), self.mean.to(device), self.deviation.to(device))


def load_imagenet32(
    root: str | Path,
    train_size: int | None = None,
    test_size: int | None = None,
    quiet: bool = False,
    classes: Sequence[int] | None = None,
) -> ImageSet:
    """All training batches under `root` and the validation images as test images; labels from 0.

    `classes`: keep only images with these labels, which become 0, 1, ... in this order.
    `train_size`, `test_size`: keep that many, the first of the published order. Every file is
    looked for before one is read. Raises FileNotFoundError where files are missing, ValueError
    where one does not hold what it should.
    """
    root = Path(root)
    train_files = [root / f"train_data_batch_{k}" for k in range(1, BATCHES + 1)]
    files = [*train_files, root / "val_data"]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"ImageNet32 in {root.resolve()} lacks {', '.join(missing)}: {GET}")
    parts, count = [], 0
    hidden = not shows_bars(quiet)
    for path in tqdm(train_files, desc="reading ImageNet32", disable=hidden, leave=False):
        if train_size is None or count < train_size:
            parts.append(_of_classes(*read_file(path), classes))
            count += len(parts[-1][1])
    train_x, train_y = (torch.cat(side)[:train_size] for side in zip(*parts))
    test_x, test_y = _of_classes(*read_file(files[-1]), classes)
    if classes is not None:
        _require_images(root, classes, train_y, test_y)
    # of the validation images too: the first training images may lack some
    count_classes = int(torch.cat([train_y, test_y]).max()) + 1 if classes is None else len(classes)
    test_x, test_y = test_x[:test_size], test_y[:test_size]
    for kind, size, have in (("train", train_size, len(train_y)), ("test", test_size, len(test_y))):
        if size is not None and not 0 < size <= have:
            raise ValueError(
                f"ImageNet32 has {have} {kind} images there; a subset of {size} was asked for"
            )
    mean, deviation = _channel_statistics(train_x)
    return ImageSet(
        "imagenet32",
        ByteImages(train_x, mean, deviation),
        train_y,
        ByteImages(test_x, mean, deviation),
        test_y,
        count_classes,
    )


def _of_classes(
    images: Tensor, labels: Tensor, classes: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """The images whose labels are among `classes`, with their places there as labels."""
    if classes is None:
        return images, labels
    place = torch.full((CLASSES,), -1)
    place[torch.tensor(classes)] = torch.arange(len(classes))
    found = place[labels]
    return images[found >= 0], found[found >= 0]


def _require_images(root: Path, classes: Sequence[int], train_y: Tensor, test_y: Tensor) -> None:
    for side, labels in (("training", train_y), ("validation", test_y)):
        if not len(labels):
            raise ValueError(
                f"the {side} images in {root.resolve()} are of none of the {len(classes)} classes "
                "that were asked for; --imagenet-classes all takes those that are there"
            )


def read_file(path: Path) -> tuple[Tensor, Tensor]:
    """(images uint8 [n 3 32 32], labels from 0 [n]) of one published file."""
    found = _held(path)
    if not {"data", "labels"} <= set(found):
        raise ValueError(
            f"{path} holds {sorted(map(str, found))}; a dict with data and labels was expected"
        )
    data, labels = found["data"], np.asarray(found["labels"])
    if (
        not isinstance(data, np.ndarray)
        or data.dtype != np.uint8
        or data.ndim != 2
        or data.shape[1] != FEATURES
    ):
        is_array = isinstance(data, np.ndarray)
        kind = f"{data.dtype} {list(data.shape)}" if is_array else type(data).__name__
        raise ValueError(
            f"data in {path} are {kind}; uint8 [n, {FEATURES}] were expected (the 32 x 32 version)"
        )
    if labels.shape != (len(data),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path} holds {len(data)} images and labels of shape {list(labels.shape)}, "
            f"{labels.dtype}; one whole number per image was expected"
        )
    if len(labels) and not 1 <= labels.min() <= labels.max() <= CLASSES:
        raise ValueError(
            f"labels in {path} go from {labels.min()} to {labels.max()}; 1 to {CLASSES} were "
            "expected"
        )
    mean = found.get("mean")
    if mean is not None and np.asarray(mean).shape != (FEATURES,):
        raise ValueError(
            f"mean in {path} has shape {list(np.asarray(mean).shape)}; [{FEATURES}] was expected"
        )
    return torch.from_numpy(data.copy()).view(-1, 3, 32, 32), torch.from_numpy(
        labels.astype(np.int64)
    ) - 1


def _held(path: Path) -> dict[str, Any]:
    """The dict in a published file, with arrays for the stand-ins."""
    try:
        with open(path, "rb") as file:
            found = _Reader(file, encoding="bytes").load()
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not a dict")
        texts = {key.decode() if isinstance(key, bytes) else key: found[key] for key in found}
        return {
            key: value.values if isinstance(value, Array) else value for key, value in texts.items()
        }
    except OSError:
        raise
    except Exception as error:
        # A damaged pickle can fail in any of Python's ways; none of them is the caller's business.
        raise ValueError(f"{path} is damaged or no file of ImageNet32 ({error}); {GET}") from error


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel [1 3 1 1], in pieces: the bytes of all images are
    gigabytes already."""
    total, squares = torch.zeros(2, 3, dtype=torch.float64)
    count = 0
    for part in images.split(20_000):
        values = part.double().flatten(2)
        total, squares = total + values.sum((0, 2)), squares + values.square().sum((0, 2))
        count += values.shape[0] * values.shape[2]
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
    return mean.float().view(1, 3, 1, 1), deviation.float().view(1, 3, 1, 1)
