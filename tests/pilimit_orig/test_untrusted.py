"""Damaged, foreign and malicious files: a clear error, nothing executed, nothing written."""

import io
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilimit_orig import checkpoint, convert_net
from tests.pilimit_orig import originals, small


class Evil:
    """Creates a file when it is unpickled by an ordinary unpickler."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def plain_pickle(value, path, protocol=2):
    path.write_bytes(pickle.dumps(value, protocol))


WRITERS = {
    "zip": torch.save,
    "old torch format": lambda v, p: torch.save(v, p, _use_new_zipfile_serialization=False),
    **{f"pickle {n}": lambda v, p, n=n: plain_pickle(v, p, n) for n in (2, 4, 5)},
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("where", ["alone", "in a network"])
def test_nothing_is_executed(writer, where, tmp_path, capsys):
    mark, path = tmp_path / "executed", tmp_path / "net.th"
    evil = Evil(mark)
    if where == "alone":
        WRITERS[writer](evil, path)
    else:
        WRITERS[writer](small.network().state() | {"leftover": [evil]}, path)
    with pytest.raises(checkpoint.CheckpointError, match="asks for posix.system"):
        checkpoint.read(path)
    assert convert_net.main([str(path), str(tmp_path / "out.th")]) == 1
    assert "posix.system" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.th"]
    # That the file is dangerous at all: the ordinary unpickler executes it.
    if writer.startswith("pickle") and where == "alone":
        pickle.loads(path.read_bytes())
        assert mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        b"builtins\neval",
        b"builtins\ngetattr",
        b"builtins\nexec",
        b"importlib\nimport_module",
        b"pilimit_orig.convert_net\nmain",
        b"torch\nload",
        b"torch._utils\n_import_dotted_name",
        b"inf.pimlp\nInfPiMLP.__init__",
    ],
)
def test_other_names_are_refused_whatever_they_are(name, tmp_path):
    path = tmp_path / "net.th"
    path.write_bytes(b"\x80\x02c" + name + b"\nX\x03\x00\x00\x001+1\x85R.")
    with pytest.raises(
        checkpoint.CheckpointError, match="asks for " + name.replace(b"\n", b".").decode()
    ):
        checkpoint.read(path)


def saved(tmp_path, zipped):
    path = tmp_path / "net.th"
    originals.save_object(small.network(), path, zipped=zipped)
    return path, path.read_bytes()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old torch format"])
def test_a_file_cut_short_anywhere_is_refused(zipped, tmp_path):
    path, whole = saved(tmp_path, zipped)
    for length in [0, 1, 3, 10, 100, *range(500, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(
            checkpoint.CheckpointError, match="net.th: .*(damaged|cut short|missing|does not begin)"
        ):
            checkpoint.read(path)


def test_a_flipped_bit_in_an_array_is_noticed(tmp_path):
    path, whole = saved(tmp_path, True)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        used = archive.read("net/data/1")
    at = whole.index(used) + 5
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        checkpoint.read(path)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_bytes_end_in_a_checkpoint_or_a_clear_error(tmp_path, data):
    """Random damage to the pickle of the old format, where no checksum protects it."""
    path, whole = saved(tmp_path, False)
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(damaged))
    try:
        read = checkpoint.read(path)
    except checkpoint.CheckpointError:
        return
    assert read["As"][1].dim() == 2


def test_a_memo_bomb_costs_no_memory(tmp_path):
    path = tmp_path / "net.th"
    path.write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")
    with pytest.raises(checkpoint.CheckpointError, match="missing"):
        checkpoint.read(path)


def test_files_of_other_programs_are_described(tmp_path):
    path = tmp_path / "net.th"
    torch.save(torch.nn.Linear(3, 2).state_dict(), path)
    with pytest.raises(
        checkpoint.CheckpointError,
        match="not a checkpoint of the original code.*found weight, bias",
    ):
        checkpoint.read(path)
    torch.save(torch.nn.Linear(3, 2), path)
    with pytest.raises(checkpoint.CheckpointError, match="asks for torch.nn.modules.linear.Linear"):
        checkpoint.read(path)
    torch.save(torch.ones(3), path)
    with pytest.raises(checkpoint.CheckpointError, match="found a StoredTensor"):
        checkpoint.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(checkpoint.CheckpointError, match="hello.txt"):
        checkpoint.read(path)
    path.write_text("just text")
    with pytest.raises(checkpoint.CheckpointError, match="does not begin like a checkpoint"):
        checkpoint.read(path)
    with pytest.raises(FileNotFoundError):
        checkpoint.read(tmp_path / "absent.th")


def test_a_growing_array_that_claims_more_rows_than_it_has(tmp_path):
    net, path = small.network(), tmp_path / "net.th"
    with originals.original_modules() as (cls, arr):
        fields = net.state() | {"As": net.As | {2: arr(arr=net.As[2], size=10**9)}}
        torch.save(cls(**fields), path)
    with pytest.raises(
        checkpoint.CheckpointError,
        match=r"As\[2\] is a growing array that says it has 1000000000 rows",
    ):
        checkpoint.read(path)
