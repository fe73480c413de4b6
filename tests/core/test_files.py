"""Files are whole or not there, whatever goes wrong while they are written."""

import json
import os
import stat
import subprocess
import sys
import textwrap

import pytest

from pilimit_lib.core import free_memory, replacing, save, write_bytes, write_json, write_text


def test_what_is_written_is_read(tmp_path):
    write_text(tmp_path / "deep" / "a.txt", "Größe\n")
    write_bytes(tmp_path / "b.bin", b"\0\1")
    write_json(tmp_path / "c.json", {"x": [1, None]})
    assert (tmp_path / "deep" / "a.txt").read_text(encoding="utf-8") == "Größe\n"
    assert (tmp_path / "b.bin").read_bytes() == b"\0\1"
    assert json.loads((tmp_path / "c.json").read_text()) == {"x": [1, None]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.bin", "c.json", "deep"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_beside_it(error, tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(type(error)), replacing(tmp_path / "a.txt") as beside:
        beside.write_text("half")
        raise error
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_old_file_can_be_read_until_the_new_one_is_whole(tmp_path):
    write_text(tmp_path / "a.npz", "old")
    with replacing(tmp_path / "a.npz") as beside:
        beside.write_text("new")
        assert beside.suffix == ".npz" and beside.parent == tmp_path
        assert (tmp_path / "a.npz").read_text() == "old"
    assert (tmp_path / "a.npz").read_text() == "new"


def test_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


posix = pytest.mark.skipif(os.name != "posix", reason="processes and limits of POSIX")


def run(code, *arguments, check=True):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        check=check,
        capture_output=True,
        text=True,
        timeout=300,
    )


FULL = """
    import resource, signal, sys, torch
    from pilimit_lib.core import save, write_bytes
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    write = {"tensor": lambda p: save({"a": torch.zeros(2**16), "b": torch.ones(3)}, p),
             "bytes": lambda p: write_bytes(p, bytes(2**17))}[sys.argv[2]]
    try:
        write(sys.argv[1])
    except OSError as error:
        print(error)
"""


@posix
@pytest.mark.parametrize("what", ["tensor", "bytes"])
def test_a_full_disk_is_called_so_and_the_old_file_stays(what, tmp_path):
    """A limit on the size of files stands for the end of the disk; the error takes the same way."""
    path = tmp_path / "c.pt"
    said = run(FULL, path, what).stdout
    assert "the disk is full" in said and "nothing is left of it" in said and "c.pt" in said
    assert os.listdir(tmp_path) == []
    save({"a": 1}, path)
    before = path.read_bytes()
    assert "the one that is there stays as it was" in run(FULL, path, what).stdout
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.pt"]


KILLED = """
    import os, signal, sys
    from pilimit_lib.core import replacing
    with replacing(sys.argv[1]) as beside:
        beside.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
"""


@posix
def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path):
    path, other = tmp_path / "a.b.txt", tmp_path / "a.txt"
    for target in (path, other):
        run(KILLED, target, check=False)
    assert len(os.listdir(tmp_path)) == 2
    write_text(path, "whole")
    left = [name for name in os.listdir(tmp_path) if name != "a.b.txt"]
    assert path.read_text() == "whole" and len(left) == 1 and left[0].startswith(".a.")
    write_text(other, "whole")
    assert sorted(os.listdir(tmp_path)) == ["a.b.txt", "a.txt"]


@posix
def test_what_a_running_process_writes_is_left_alone(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path) as beside:
        beside.write_text("first")
        run(
            "import sys; from pilimit_lib.core import write_text; "
            "write_text(sys.argv[1], 'second')",
            path,
        )
        assert path.read_text() == "second"
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["a.txt"]


def test_free_memory_is_what_an_allocation_may_take():
    free = free_memory("cpu")
    assert free is None or 2**20 < free < 2**50
    assert free_memory("meta") is None
