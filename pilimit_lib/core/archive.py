"""Files of `torch.save`, read without trusting them: whole, with their checksums, and never run.

`weights_only=True` alone does not do that. Torch compares no checksums, so that flipped bits load;
and before 2.6 it executes what files of its oldest format contain, which are tar archives
(CVE-2025-32434), and hands TorchScript archives to their own loader. So only two formats reach it:

    zip        written since torch 1.6; every record has a CRC-32
    a stream   of pickles and numbers, written before; it has no checksums, but is checked for its
               end, and read without a file descriptor, without which torch does not try tar
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

ZIP = b"PK\x03\x04"
STREAM = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


def read_archive(
    path: str | os.PathLike, map_location: str | torch.device = "cpu", mmap: bool = False
) -> Any:
    """What `torch.save` wrote to `path`, of plain tensors and builtins. `mmap`: leave the tensors
    of a zip file there until they are used.

    Raises FileNotFoundError, and ValueError with the file's name where it is cut, damaged, of
    another kind, or holds more than that.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    with path.open("rb") as file:
        head = file.read(len(STREAM))
    if not head.startswith(ZIP) and head != STREAM:
        raise ValueError(
            f"{path} is not loaded: it is not a file of torch.save (it begins with {head[:8]!r})"
        )
    try:
        if head == STREAM:
            return _read_stream(path, map_location)
        _check_zip(path)
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0] or error
        raise ValueError(
            f"{path} is not loaded, because it holds more than plain tensors and builtins, or is "
            f"damaged: {reason}"
        ) from error
    except Exception as error:  # damaged bytes make the reader stumble in many ways
        # Seeking to a place that can't exist is one of them; a disk that fails is not.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise ValueError(
            f"{path} is not loaded: it is damaged, cut short or of another kind: {error}"
        ) from error


class _Stream(io.BufferedReader):
    """A file that says it has no descriptor."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("this file is read as a stream")


def _read_stream(path: Path, map_location: str | torch.device) -> Any:
    with _Stream(io.FileIO(path)) as file:
        found = torch.load(file, map_location=map_location, weights_only=True)
        if file.read(1):
            raise ValueError("something follows where it should end")
    return found


def _check_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"the record {record.filename} is compressed; torch.save never is")
            if record.filename.endswith("/constants.pkl"):
                raise ValueError("it is a TorchScript archive, which is a program")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(
            f"the record {damaged} does not have its checksum: bits were flipped, or it was "
            "written under torch.serialization.set_crc32_options(False)"
        )
