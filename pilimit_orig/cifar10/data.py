"""CIFAR-10 from its published files, read without executing what a pickle could ask for."""

import os

import numpy as np
import torch

from pilimit_orig.unpickle import NumpyType, Reader, latin1

TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
TEST = ["test_batch"]


class Array:
    """numpy.ndarray as it lies in a pickle: shape, type, bytes."""

    def __setstate__(self, state):
        _, shape, kind, fortran, data = state
        if not isinstance(kind, NumpyType) or fortran or not isinstance(data, bytes):
            raise ValueError("an array of an unknown layout")
        self.values = np.frombuffer(data, kind.dtype).reshape(shape)


class ArrayReader(Reader):
    """Knows numpy's arrays of numbers, and nothing else."""

    kind = "batch of CIFAR-10"
    known = {
        ("_codecs", "encode"): latin1,
        ("numpy", "ndarray"): Array,
        ("numpy", "dtype"): NumpyType,
        **{
            (f"numpy.{core}.multiarray", "_reconstruct"): lambda kind, shape, code: kind.__new__(
                kind
            )
            for core in ("core", "_core")
        },
    }


def batch_of(path):
    """(images [n 3072] uint8, labels [n]) of one published file."""
    try:
        with open(path, "rb") as file:
            found = ArrayReader(file, encoding="bytes").load()
        images, labels = found[b"data"].values, np.asarray(found[b"labels"])
        if images.dtype != np.uint8 or images.shape != (len(labels), 3072):
            raise ValueError(f"images of shape {images.shape}, {len(labels)} labels")
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a batch of CIFAR-10 or is damaged: {error}") from error
    return images, labels


def load(root, train_size=None, test_size=None):
    """(train x, y, test x, y): images [n 3072] normalised per channel by the training images that
    are used, labels [n]."""
    folder = root
    if os.path.isdir(os.path.join(root, "cifar-10-batches-py")):
        folder = os.path.join(root, "cifar-10-batches-py")
    parts = []
    for names, size in ((TRAIN, train_size), (TEST, test_size)):
        absent = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
        if absent:
            raise FileNotFoundError(
                f"no {', '.join(absent)} in {folder}: --data takes the folder that holds "
                "cifar-10-batches-py "
                "(https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz)"
            )
        batches = [batch_of(os.path.join(folder, name)) for name in names]
        images = torch.from_numpy(np.concatenate([b[0] for b in batches])).float()
        labels = torch.from_numpy(np.concatenate([b[1] for b in batches])).long()
        if size is not None and not 0 < size <= len(images):
            raise ValueError(f"a subset of {size} images was asked for, there are {len(images)}")
        parts += [images[:size], labels[:size]]
    channels = parts[0].reshape(len(parts[0]), 3, 1024)
    mean, deviation = (f((0, 2)).repeat_interleave(1024) for f in (channels.mean, channels.std))
    return (parts[0] - mean) / deviation, parts[1], (parts[2] - mean) / deviation, parts[3]
