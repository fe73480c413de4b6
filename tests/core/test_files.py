"""Files are whole or not there, whatever goes wrong while they are written."""

import json
import os
import stat

import pytest
import torch

from pilimit_lib.core import free_memory, replacing, write_bytes, write_json, write_text


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


def test_free_memory_is_what_an_allocation_may_take():
    free = free_memory("cpu")
    assert free is None or 2**20 < free < 2**50
    assert free_memory("meta") is None
    with torch.device("meta"):
        assert free_memory() is None
