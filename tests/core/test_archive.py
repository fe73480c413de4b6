"""Files of torch.save: a cut, a flip or a foreign one is one clear error with its name, and nothing
in them is run."""

import io
import tarfile
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pilimit_lib.core import load, read_archive, save
from pilimit_lib.core.archive import STREAM

STATE = {"weight": torch.arange(300.0), "step": 7, "name": ("π", None)}


def written(folder, zipped=True):
    path = folder / "c.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    return path, path.read_bytes()


def same(found):
    return torch.equal(found["weight"], STATE["weight"]) and found["name"] == STATE["name"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_a_cut_anywhere_is_one_error_with_the_name_of_the_file(zipped, tmp_path):
    path, whole = written(tmp_path, zipped)
    assert same(load(path))
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"c\.pt"):
            load(path)


def test_no_flipped_bit_of_a_zip_file_changes_what_is_loaded(tmp_path):
    """It is noticed, or it lies where nothing is read from, such as a date or the padding."""
    path, whole = written(tmp_path)
    noticed = 0
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            assert same(load(path)), at
        except ValueError as error:
            noticed += "c.pt" in str(error)
    assert noticed > 0.6 * len(whole) / 3


def test_every_flipped_bit_of_the_numbers_is_noticed(tmp_path):
    path, whole = written(tmp_path)
    start = whole.index(STATE["weight"].numpy().tobytes())
    for at in range(start, start + 1200, 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"c\.pt.*checksum"):
            load(path)


@given(at=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_changed_byte_of_the_old_format_is_a_value_error_or_another_number(
    at, value, tmp_path_factory
):
    path, whole = written(tmp_path_factory.mktemp("byte"), zipped=False)
    at = int(at * len(whole))
    path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
    try:
        load(path)
    except ValueError as error:
        assert "c.pt" in str(error)


def test_what_follows_the_end_of_the_old_format_is_noticed(tmp_path):
    path, whole = written(tmp_path, zipped=False)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="something follows"):
        load(path)


def test_zeros_and_other_kinds_of_file(tmp_path):
    path, whole = written(tmp_path)
    with zipfile.ZipFile(tmp_path / "c.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("c/data.pkl", b"\0" * 10**6)
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("c/data.pkl", b"")
        archive.writestr("c/constants.pkl", b"")
    cases = {
        bytes(len(whole)): "not a file of torch.save",
        b"": "not a file of torch.save",
        b'{"a": 1}': "not a file of torch.save",
        (tmp_path / "c.zip").read_bytes(): "compressed",
        (tmp_path / "script.pt").read_bytes(): "TorchScript archive, which is a program",
    }
    for content, message in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"c\.pt.*{message}"):
            load(path)


def test_a_tar_archive_that_begins_as_the_old_format_does_is_not_taken_for_one(
    tmp_path, monkeypatch
):
    """Torch before 2.6 would unpickle such an archive freely, in spite of weights_only."""
    member = tarfile.TarInfo(STREAM.decode("latin-1"))
    content = io.BytesIO()
    with tarfile.open(
        fileobj=content, mode="w", format=tarfile.USTAR_FORMAT, encoding="latin-1"
    ) as archive:
        archive.addfile(member)
    path = tmp_path / "c.pt"
    path.write_bytes(content.getvalue())
    assert tarfile.is_tarfile(path) and content.getvalue().startswith(STREAM)
    opened = []
    monkeypatch.setattr(tarfile, "open", lambda *args, **how: opened.append(how))
    with pytest.raises(ValueError, match=r"c\.pt"):
        load(path)
    assert not opened


def test_a_disk_that_fails_is_not_called_damage(tmp_path, monkeypatch):
    path, _ = written(tmp_path)

    def fails(*args, **how):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(OSError, match=r"Input/output error: .*c\.pt"):
        load(path)


def test_tensors_can_stay_in_the_file(tmp_path):
    save(STATE, tmp_path / "c.pt")
    assert same(read_archive(tmp_path / "c.pt", mmap=True))
    (tmp_path / "c.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"c\.pt"):
        read_archive(tmp_path / "c.pt")
