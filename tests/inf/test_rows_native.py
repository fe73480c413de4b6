"""The native sums on every width of vector that this processor has, and the cache of what was
compiled."""

import ctypes
import os
import re
from pathlib import Path

import pytest
import torch

from pilimit_lib.inf import extension
from pilimit_lib.inf.rows.sums import native

from .test_rows_twins import EPS, dense, filled, row_twin, run

INFO = Path("/proc/cpuinfo")
FLAGS = INFO.read_text() if INFO.is_file() else ""


@pytest.fixture
def built(monkeypatch, tmp_path):
    """A function that makes the native sums run as compiled for another processor."""

    def build(*more: str) -> None:
        monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, *more))
        native._library.cache_clear()
        reason = native._library()
        if isinstance(reason, str):
            pytest.skip(reason)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield build
    native._library.cache_clear()


@pytest.mark.parametrize(
    "processor", ["x86-64-v4", "x86-64-v3", "x86-64"], ids=["AVX-512", "AVX2", "before AVX"]
)
def test_every_width_of_vectors_agrees_with_the_formulas(processor, built):
    """Odd sizes on purpose: rows, ranks and samples that fill no vector."""
    needed = {"x86-64-v4": "avx512vl", "x86-64-v3": "avx2"}.get(processor, "sse2")
    if needed not in FLAGS:
        pytest.skip(f"this processor has no {needed}")
    built(f"-march={processor}", "-Wno-psabi")
    for b in (1, 8, 9, 17, 33):
        for m, r, o in ((1, 5, 1), (530, 7, 19), (1030, 33, 8)):
            for row_dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
                layer = filled(m, r, o, row_dtype, decay=0.3)
                layer.set_rows(layer.A.detach(), torch.rand(m), layer.B.detach())
                g, weights = torch.randn(b, r), torch.randn(b, o)
                with row_twin("native", debug=True) as said:
                    got = run(layer, g, weights)
                assert said == ["native runs"]
                for found, expected in zip(got, dense(layer, g, weights)):
                    error = (found - expected).norm() / expected.norm()
                    assert error < 20 * EPS[row_dtype], (m, r, o, b, error)


def library(folder, monkeypatch, source='extern "C" int seven() { return 7; }'):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    path = folder / "seven.cpp"
    path.write_text(source)
    return extension.library(path, ("-shared", "-fPIC"))


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    found = library(tmp_path, monkeypatch)
    if isinstance(found, str):
        pytest.skip(found)
    return next((tmp_path / "pilimit").glob("*.so"))


def test_what_was_compiled_is_kept_and_loaded(compiled, tmp_path, monkeypatch):
    before = compiled.stat().st_mtime_ns
    found = library(tmp_path, monkeypatch)
    assert isinstance(found, ctypes.CDLL) and found.seven() == 7
    assert compiled.stat().st_mtime_ns == before
    assert not (compiled.parent.stat().st_mode & 0o077)


@pytest.mark.parametrize("damage", ["cut", "flipped", "no digest"])
def test_a_damaged_file_is_compiled_anew(damage, compiled, tmp_path, monkeypatch):
    whole = compiled.read_bytes()
    if damage == "no digest":
        compiled.with_suffix(".sha256").unlink()
    else:
        # beside and renamed: the file that this process has loaded must stay as it is
        beside = compiled.with_suffix(".new")
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        beside.write_bytes(whole[:middle] if damage == "cut" else flipped)
        os.replace(beside, compiled)
    assert isinstance(library(tmp_path, monkeypatch), ctypes.CDLL)
    assert compiled.read_bytes() == whole and compiled.with_suffix(".sha256").is_file()


def test_a_cache_that_others_may_write_to_is_refused(compiled, tmp_path, monkeypatch):
    compiled.parent.chmod(0o777)
    assert re.search("others may write to .*chmod go-w", library(tmp_path, monkeypatch))


def test_a_cache_of_another_user_is_refused(compiled, tmp_path, monkeypatch):
    owner = compiled.parent.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert re.search("belongs to another user; set XDG_CACHE_HOME", library(tmp_path, monkeypatch))


def test_what_does_not_compile_is_said(tmp_path, monkeypatch):
    found = library(tmp_path, monkeypatch, "this is no C++")
    assert isinstance(found, str) and "failed" in found or "no C++ compiler" in found
    assert not list((tmp_path / "pilimit").glob("*.so"))


def test_without_a_home_folder_it_refuses(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert isinstance(extension.library(Path("x.cpp"), ()), str)
