"""An unpickler that knows the few types in checkpoints of the original code and executes nothing.

Every name in a file is looked up in a table of inert stand-ins; any other name ends the reading
with an error that says it.
"""

import io
import pickle
import zipfile
from collections import OrderedDict

import numpy as np

from pilimit_orig.stored import (
    DTYPES,
    CheckpointError,
    Key,
    LegacyStorages,
    StoredTensor,
    ZipStorages,
)

# torch's formats before the zip one begin with this number, pickled
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


class Record:
    """Stands in for an object of the original code: its attributes, as found."""

    def __setstate__(self, state):
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise CheckpointError(
                f"the state of a {type(self).__name__} is a {type(state).__name__}, not its "
                "attributes"
            )
        self.fields = state

    fields = {}


class InfPiMLPRecord(Record):
    """inf.pimlp.InfPiMLP: a whole network, pickled."""


class DynArrRecord(Record):
    """inf.dynamicarray.DynArr: a buffer `arr` whose first `size` rows count."""


class StorageType:
    """torch.FloatStorage and the like."""

    def __init__(self, dtype):
        self.dtype = dtype


class Inert:
    """A value that checkpoints may carry and that no network needs: torch.device, torch.Size, a
    dtype."""

    def __init__(self, *args):
        self.args = args


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    return Deferred(storage, offset, tuple(size), tuple(stride))


class Deferred:
    """A tensor whose storage may not have been located yet; `settle` makes a StoredTensor of it."""

    def __init__(self, storage, offset, size, stride):
        self.storage, self.rest = storage, (offset, size, stride)

    def settle(self, places):
        storage = places.get(self.storage) if isinstance(self.storage, Key) else self.storage
        return StoredTensor(storage, *self.rest)


def _scalar(kind, data):
    """A numpy number: (dtype, bytes)."""
    if (
        not isinstance(kind, NumpyType)
        or not isinstance(data, bytes)
        or len(data) != kind.dtype.itemsize
    ):
        raise CheckpointError("a numpy scalar of an unknown kind")
    return np.frombuffer(data, kind.dtype)[0].item()


class NumpyType:
    """numpy.dtype, of numbers and truth values only."""

    def __init__(self, name, *flags):
        name = name.decode("latin1") if isinstance(name, bytes) else name
        if not isinstance(name, str) or name.lstrip("<|=")[:1] not in tuple("fiub"):
            raise CheckpointError(f"a numpy array of type {name!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state):
        if not isinstance(state, tuple) or state[1] not in ("<", "|", "=", b"<", b"|", b"="):
            raise CheckpointError("a numpy type in big-endian order")


def latin1(text, encoding="latin1"):
    """How Python 2 bytes are written in newer pickles."""
    if not isinstance(text, str) or encoding != "latin1":
        raise CheckpointError("bytes in an unknown encoding")
    return text.encode("latin1")


def _nested(data):
    """torch.storage._load_from_bytes: a storage that a plain pickle carries as a whole file of its
    own."""
    loaded = read_object(data) if isinstance(data, bytes) else None
    if loaded is None or isinstance(loaded, dict | Record):
        raise CheckpointError("a storage that is none")
    return loaded


KNOWN = {
    ("inf.pimlp", "InfPiMLP"): InfPiMLPRecord,
    ("pimlp", "InfPiMLP"): InfPiMLPRecord,
    ("inf.dynamicarray", "DynArr"): DynArrRecord,
    ("dynamicarray", "DynArr"): DynArrRecord,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch.storage", "_load_from_bytes"): _nested,
    ("torch", "device"): Inert,
    ("torch", "Size"): Inert,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy", "dtype"): NumpyType,
    ("_codecs", "encode"): latin1,
    **{("torch", f"{name}Storage"): StorageType(dtype) for name, dtype in DTYPES.items()},
    **{("torch", str(dtype).split(".")[1]): dtype for dtype in DTYPES.values()},
}


class Reader(pickle._Unpickler):
    """Names resolve through a table of stand-ins, storages through `storages`.

    The Python one of the standard library's two unpicklers: a few damaged bytes can make the other
    allocate all memory.
    """

    known, kind = KNOWN, "checkpoint of the original code"

    def __init__(self, file, storages=None, **kw):
        super().__init__(file, **kw)
        self.storages = storages

    def find_class(self, module, name):
        if (module, name) not in self.known:
            raise CheckpointError(
                f"the file asks for {module}.{name}, which no {self.kind} contains"
            )
        return self.known[module, name]

    def persistent_load(self, pid):
        if (
            self.storages is None
            or not isinstance(pid, tuple)
            or len(pid) < 5
            or pid[0] != "storage"
            or not isinstance(pid[1], StorageType)
            or not isinstance(pid[2], str)
            or not isinstance(pid[4], int)
            or pid[4] < 0
            or (len(pid) > 5 and pid[5] is not None)
        ):
            raise CheckpointError(f"a reference of an unknown kind: {str(pid)[:80]}")
        return self.storages.storage(pid[2], pid[1].dtype, pid[4])


def read_object(source):
    """What a checkpoint (path, or its bytes) holds, with Records for objects and StoredTensors for
    tensors.

    Raises CheckpointError for anything damaged or unknown, whatever the bytes are.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            head = file.read(4)
            file.seek(0)
            if head == b"PK\x03\x04":
                return _read_zip(source, file)
            if head[:1] != b"\x80":
                raise CheckpointError("the file does not begin like a checkpoint (zip or pickle)")
            return _read_pickles(source, file)
    except (CheckpointError, OSError):
        raise
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"the zip file is cut short or damaged ({error})") from error
    except Exception as error:
        # A damaged pickle can fail in any of Python's ways; none of them is the caller's business.
        raise CheckpointError(
            f"the pickle is cut short or damaged ({type(error).__name__}: {str(error)[:120]})"
        ) from error


def _read_zip(source, file):
    with zipfile.ZipFile(file) as archive:
        storages = ZipStorages(source, archive)
        return _settled(Reader(io.BytesIO(storages.pickle()), storages).load(), {})


def _read_pickles(source, file):
    legacy = LegacyStorages(source)
    first = Reader(file, legacy).load()
    if first != MAGIC:
        return _settled(first, {})
    if Reader(file).load() != PROTOCOL:
        raise CheckpointError("an unknown version of torch's old format")
    if not Reader(file).load().get("little_endian", True):
        raise CheckpointError("numbers stored in big-endian order")
    loaded = Reader(file, legacy).load()
    return _settled(loaded, legacy.places(file, Reader(file).load()))


def _settled(value, places):
    """The same with every tensor located."""
    if isinstance(value, Deferred):
        return value.settle(places)
    if isinstance(value, Key):
        return places[value]
    if isinstance(value, Record):
        value.fields = _settled(value.fields, places)
        return value
    if isinstance(value, dict):
        return {key: _settled(entry, places) for key, entry in value.items()}
    return (
        [_settled(entry, places) for entry in value] if isinstance(value, list | tuple) else value
    )
