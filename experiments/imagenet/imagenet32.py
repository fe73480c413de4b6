"""ImageNet32, the downsampled set of Chrabaszcz, Loshchilov & Hutter 2017, from its pickle files
without executing them.

    DIR/train_data_batch_1 ... 10, DIR/val_data
        dict: data uint8 [n 3072] (red, green, blue planes of 32 x 32), labels 1..1000 (a list),
        mean float [3072] in training batches

How to get the files: data/README.md. Images stay bytes; a batch is normalised when it is taken.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from experiments.training.images import ImageSet

BATCHES = 10
FEATURES = 3 * 32 * 32
CLASSES = 1000
GET = "get the 32 x 32 files at https://image-net.org/download-images.php and unpack them there"

# Pickles of numpy arrays, old and new, need these names and no others.
_SAFE = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


class _Unpickler(pickle.Unpickler):
    """Knows numpy arrays and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no image file needs")
        return super().find_class(module, name)


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
) -> ImageSet:
    """All training batches under `root` and the validation images as test images; labels from 0.

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
    for path in tqdm(train_files, desc="reading ImageNet32", disable=quiet, leave=False):
        if train_size is None or count < train_size:
            parts.append(read_file(path))
            count += len(parts[-1][1])
    train_x, train_y = (torch.cat(side)[:train_size] for side in zip(*parts))
    test_x, test_y = read_file(files[-1])
    # of the validation images too: the first training images may lack some
    classes = int(torch.cat([train_y, test_y]).max()) + 1
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
        classes,
    )


def read_file(path: Path) -> tuple[Tensor, Tensor]:
    """(images uint8 [n 3 32 32], labels from 0 [n]) of one published file."""
    try:
        with open(path, "rb") as file:
            found = _Unpickler(file, encoding="latin1").load()
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        ImportError,
        # damaged lengths ask for any memory, damaged names for any encoding
        MemoryError,
    ) as error:
        raise ValueError(f"{path} is damaged or no file of ImageNet32 ({error}); {GET}") from error
    if not isinstance(found, dict) or not {"data", "labels"} <= set(found):
        held = sorted(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path} holds {held}; a dict with data and labels was expected")
    data, labels = found["data"], np.asarray(found["labels"])
    if (
        not isinstance(data, np.ndarray)
        or data.dtype != np.uint8
        or data.ndim != 2
        or data.shape[1] != FEATURES
    ):
        kind = (
            f"{data.dtype} {list(data.shape)}"
            if isinstance(data, np.ndarray)
            else type(data).__name__
        )
        raise ValueError(
            f"data in {path} are {kind}; uint8 [n, {FEATURES}] were expected (the 32 x 32 version)"
        )
    if labels.shape != (len(data),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path} holds {len(data)} images and labels of shape {list(labels.shape)}, "
            f"{labels.dtype}; one whole "
            "number per image was expected"
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


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel [1 3 1 1], in pieces: the bytes of all images are
    gigabytes already."""
    total, squares, count = (
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
        0,
    )
    for part in images.split(20_000):
        values = part.double().flatten(2)
        total, squares = total + values.sum((0, 2)), squares + values.square().sum((0, 2))
        count += values.shape[0] * values.shape[2]
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
    return mean.float().view(1, 3, 1, 1), deviation.float().view(1, 3, 1, 1)
