"""Kernel matrices in files: what is not as it was written, or of another kernel, is an error."""

import contextlib
import copy
import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from pilimit_lib.inf.gp import ReLUKernel, kernel_matrix

from .test_gp import Interrupted


class Gram(nn.Module):
    """A kernel with weights, which its repr does not show."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(5, 7)

    def forward(self, x, y):
        return self.map(x).detach() @ self.map(y).detach().T


def cached(kernel, x, path):
    return kernel_matrix(kernel, x, block=32, cache=path, progress=False)


def test_other_weights_of_a_kernel_are_another_kernel(tmp_path):
    x, gram = torch.randn(70, 5), Gram()
    K = cached(gram, x, tmp_path / "module.npy")
    assert torch.equal(cached(copy.deepcopy(gram), x, tmp_path / "module.npy"), K)
    scale = torch.ones(())
    held = {
        "method": gram.forward,
        "function": lambda a, b: scale * gram(a, b),
        "partial": functools.partial(lambda a, b, net: net(a, b), net=gram),
    }
    for name, kernel in held.items():
        assert torch.equal(cached(kernel, x, tmp_path / f"{name}.npy"), K)
    with torch.no_grad():
        gram.map.bias[0] += 1e-6
    for name, kernel in {"module": gram, **held}.items():
        with pytest.raises(ValueError, match=f"{name}.npy holds another kernel .*other weights"):
            cached(kernel, x, tmp_path / f"{name}.npy")


def damage(path, how):
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "cut": content[: middle - 3],
            "empty": b"",
            "flipped": content[:-5] + bytes([content[-5] ^ 4]) + content[-4:],
            "zeros": content[:middle] + bytes(len(content) - middle),
            "other kind": b"PK\x03\x04" + content,
        }[how]
    )


@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "zeros", "other kind"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_damaged_cache_is_an_error_and_stays_as_it_is(how, finished, tmp_path, monkeypatch):
    x, path = torch.randn(100, 5), tmp_path / "kernel.npy"
    monkeypatch.setattr(Interrupted, "calls", 0)
    monkeypatch.setattr(Interrupted, "limit", 100 if finished else 9)
    with contextlib.suppress(KeyboardInterrupt):
        cached(Interrupted(2), x, path)
    damage(path, how)
    before = path.read_bytes()
    if finished or how != "flipped":  # the last block is not yet there, so nothing is flipped
        with pytest.raises(ValueError, match="kernel.npy is damaged"):
            cached(Interrupted(2), x, path)
        assert path.read_bytes() == before


def test_a_run_killed_while_it_made_the_cache_is_begun_anew(tmp_path):
    x, path = torch.randn(40, 5), tmp_path / "kernel.npy"
    K = cached(ReLUKernel(2), x, path)
    note = json.loads((tmp_path / "kernel.json").read_text())
    (tmp_path / "kernel.json").write_text(json.dumps(note | {"done": []}))
    for left in (lambda: damage(path, "cut"), path.unlink):
        left()
        (tmp_path / "kernel.json").write_text(json.dumps(note | {"done": []}))
        assert torch.equal(cached(ReLUKernel(2), x, path), K)


def test_a_cache_of_an_earlier_version_is_refused(tmp_path):
    x, path = torch.randn(40, 5), tmp_path / "kernel.npy"
    cached(ReLUKernel(2), x, path)
    note = json.loads((tmp_path / "kernel.json").read_text())
    del note["format"], note["weights"]
    note["done"] = [pair[:2] for pair in note["done"]]
    (tmp_path / "kernel.json").write_text(json.dumps(note))
    with pytest.raises(ValueError, match="other format, weights"):
        cached(ReLUKernel(2), x, path)


FULL = """
import resource, signal, sys, torch
from pilimit_lib.inf.gp import ReLUKernel, kernel_matrix
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
try:
    kernel_matrix(ReLUKernel(1), torch.randn(200, 3), cache=sys.argv[1], progress=False)
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="asks the system for room")
def test_a_matrix_that_the_disk_can_not_hold_is_refused_before_it_is_computed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "kernel.npy")],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "the disk is full" in done.stdout and "kernel.npy" in done.stdout
    assert os.listdir(tmp_path) == []
