"""The Triton kernels under Triton's interpreter, which needs no GPU: a process of its own, since
the switch is read at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pilimit_lib.inf import InfPiLinear
from pilimit_lib.inf.implementation import triton_kernels
from tests.inf.interpreter import needs_interpreter

SCRIPT = """
import torch
from pilimit_lib.inf.moments import sums as feature_linear
from pilimit_lib.inf.moments import triton_kernels as kernels
from pilimit_lib.inf.dual.features import PolynomialFeatures

torch.manual_seed(0)
for r, b, o, kappa in ((7, 5, 3, [.16, .25, .08]),
                       (8, 17, 20, [.16, .25, .08]), (5, 3, 2, [0, .3]), (6, 1, 4, [0, 0, .2]),
                       (1, 2, 1, [.1, .2, .3]), (33, 20, 70, [.16, 0, .08])):
    features = PolynomialFeatures(r, kappa)
    u = torch.nn.functional.normalize(torch.randn(b, r), dim=1)
    for dtype in (torch.float32, torch.bfloat16):
        V, delta = torch.randn(features.P, o).to(dtype), torch.randn(b, o)
        assert kernels.usable(features, u, V)
        plain = feature_linear.forward(features, u, V)
        torch.testing.assert_close(kernels.forward(features, u, V), plain, rtol=1e-5, atol=1e-5)
        mine, theirs = V.clone(), V.clone()
        kernels.update_(features, mine, u, delta, -.3, .9, block_p=32)
        feature_linear.update_(features, theirs, u, delta, -.3, .9)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
        assert not torch.equal(mine, V)
cubic = PolynomialFeatures(4, [.1, .2, .1, .1])
assert not kernels.usable(cubic, torch.randn(2, 4), torch.randn(cubic.P, 2))
assert not kernels.usable(features, u.double(), V)

from pilimit_lib.inf.implementation import triton_kernels
from pilimit_lib.inf import InfMLP, PiSGD, clip_grad_norm_, param_groups


def train(enabled):
    torch.manual_seed(0)
    net = InfMLP(6, 3, 5, 1, memory="moments", fused=True)
    optimizer = PiSGD(param_groups(net, .3, 1e-2))
    x = torch.randn(12, 6)
    with triton_kernels(enabled):
        for _ in range(3):
            torch.nn.functional.cross_entropy(net(x), x[:, :3].argmax(1)).backward()
            clip_grad_norm_(net, .5)
            optimizer.step()
            optimizer.zero_grad()
    return net.layers[1].V.detach(), net(x).detach()


calls, real = [], kernels.update_
kernels.update_ = lambda *args: (calls.append(1), real(*args))[1]
torch.testing.assert_close(train(True), train(False), rtol=1e-5, atol=1e-5)
assert len(calls) == 6
print("compared")
"""


def test_without_gpu_and_interpreter_the_kernels_refuse_and_plain_torch_runs():
    needs_interpreter()
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton's interpreter is on")
    layer = InfPiLinear(4, dtype=torch.float32)
    g = torch.randn(3, 4)
    expected = layer(g)
    with triton_kernels():
        assert torch.equal(layer(g), expected)


def test_kernels_agree_with_plain_torch_under_the_interpreter():
    needs_interpreter()
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "compared"
