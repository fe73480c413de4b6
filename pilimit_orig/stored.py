"""Tensors of a checkpoint file: where their bytes lie, mapped into memory only when they are
opened."""

import io
import math
import zipfile
from dataclasses import dataclass

import numpy as np
import torch

DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}


class CheckpointError(ValueError):
    """A file that is damaged, foreign, or asks for something that no checkpoint of the original
    code contains."""


def numpy_dtype(dtype):
    """The numpy type of the same bytes; bfloat16, which numpy lacks, as int16."""
    return (
        np.dtype(np.int16) if dtype == torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype
    )


@dataclass(frozen=True)
class Storage:
    """`count` numbers that begin at byte `offset` of a file (its path) or of bytes in memory."""

    source: object
    offset: int
    count: int
    dtype: torch.dtype

    def map(self, start, count):
        """`count` numbers from position `start`, one-dimensional; a file is mapped copy-on-write
        and stays as it is."""
        kind = numpy_dtype(self.dtype)
        at = self.offset + start * kind.itemsize
        if count == 0:
            return torch.empty(0, dtype=self.dtype)
        if isinstance(self.source, bytes):
            array = np.frombuffer(bytearray(self.source[at : at + count * kind.itemsize]), kind)
        elif at % kind.itemsize:
            array = np.fromfile(self.source, kind, count, offset=at)
        else:
            array = np.memmap(self.source, kind, "c", at, (count,))
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if self.dtype == torch.bfloat16 else tensor


@dataclass(frozen=True)
class StoredTensor:
    """A strided view of a storage. `open()` gives a tensor; the first rows alone can be opened of a
    longer buffer."""

    storage: Storage
    offset: int
    size: tuple
    stride: tuple

    def __post_init__(self):
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or not all(
            isinstance(n, int) and n >= 0 for n in numbers
        ):
            raise CheckpointError(
                f"a tensor with offset {self.offset!r}, size {self.size!r} and stride "
                f"{self.stride!r}"
            )
        if self.offset + self._span(self.size) > self.storage.count:
            raise CheckpointError(
                f"a tensor of size {self.size} at position {self.offset} of a storage "
                f"that holds only {self.storage.count} numbers"
            )

    def _span(self, size):
        return (
            1 + sum((n - 1) * step for n, step in zip(size, self.stride)) if math.prod(size) else 0
        )

    @property
    def shape(self):
        return self.size

    def open(self, rows=None):
        """The tensor (its first `rows` rows); its memory is the file's until it is written to."""
        size = self.size if rows is None else (rows, *self.size[1:])
        flat = self.storage.map(self.offset, self._span(size))
        tensor = flat.as_strided(size, self.stride) if flat.numel() else flat.reshape(size)
        return tensor if tensor.is_contiguous() else tensor.contiguous()


class ZipStorages:
    """Storages of torch's zip format, each checked against its checksum when it is first asked
    for."""

    def __init__(self, path, archive):
        self.path, self.archive = path, archive
        names = [
            name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"
        ]
        if len(names) != 1:
            raise CheckpointError(
                f"a zip file with {archive.namelist()[:4]}, not one that torch.save wrote"
            )
        self.prefix = names[0][: -len("data.pkl")]
        if (
            self.prefix + "byteorder" in archive.namelist()
            and archive.read(self.prefix + "byteorder") != b"little"
        ):
            raise CheckpointError("numbers stored in big-endian order")

    def pickle(self):
        return archive_read(self.archive, self.prefix + "data.pkl")

    def storage(self, key, dtype, count):
        name = f"{self.prefix}data/{key}"
        try:
            info = self.archive.getinfo(name)
        except KeyError:
            raise CheckpointError(f"the storage {name} is missing") from None
        if (
            info.file_size != count * numpy_dtype(dtype).itemsize
            or info.compress_type != zipfile.ZIP_STORED
        ):
            raise CheckpointError(
                f"the storage {name} has {info.file_size} bytes, {count} numbers of type {dtype} "
                "were expected"
            )
        if isinstance(self.path, bytes):
            return Storage(archive_read(self.archive, name), 0, count, dtype)
        # reads to the end in pieces, which checks the checksum
        with self.archive.open(info) as record:
            while record.read(1 << 24):
                pass
        with open(self.path, "rb") as file:
            file.seek(info.header_offset + 26)
            name_length, extra_length = np.frombuffer(file.read(4), "<u2")
        return Storage(
            self.path, info.header_offset + 30 + int(name_length) + int(extra_length), count, dtype
        )


def archive_read(archive, name):
    """One record as bytes, refused where its declared size is beyond the file's."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"the record {name} is compressed, which torch.save never does")
    return archive.read(name)


class Key(str):
    """The name of a storage that has not been located yet."""


class LegacyStorages:
    """Storages of torch's format before the zip one: after the pickles, one after the other."""

    def __init__(self, path):
        self.path, self.wanted = path, {}

    def storage(self, key, dtype, count):
        """A storage whose place is not known until the whole pickle has been read."""
        if self.wanted.setdefault(key, (dtype, count)) != (dtype, count):
            raise CheckpointError(f"the storage {key} is described in two ways")
        return Key(key)

    def places(self, file, keys):
        """{key: Storage} from the list of keys and the open file, which stands at the first of
        them."""
        if not isinstance(keys, list) or set(keys) != set(self.wanted):
            raise CheckpointError("the list of storages does not fit the tensors")
        file_size, found = _size_of(file), {}
        for key in keys:
            dtype, count = self.wanted[key]
            head = file.read(8)
            stored = int(np.frombuffer(head, "<i8")[0]) if len(head) == 8 else -1
            offset, length = file.tell(), count * numpy_dtype(dtype).itemsize
            if stored != count or offset + length > file_size:
                raise CheckpointError(
                    f"the storage {key} of {count} numbers is cut short or damaged"
                )
            in_memory = isinstance(self.path, bytes)
            found[key] = (
                Storage(file.read(length), 0, count, dtype)
                if in_memory
                else Storage(self.path, offset, count, dtype)
            )
            file.seek(offset + length)
        return found


def _size_of(file):
    at = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(at)
    return end
