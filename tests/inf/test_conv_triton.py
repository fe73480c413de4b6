"""The Triton kernels of convolutions under Triton's interpreter: a process of its own, since the
switch is read at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pilimit_lib.inf import InfPiConv2d
from pilimit_lib.inf.conv.geometry import Geometry
from pilimit_lib.inf.implementation import triton_kernels
from tests.inf.interpreter import needs_interpreter

SCRIPT = """
import functools
import torch
from pilimit_lib.inf.conv import sums as conv_operator
from pilimit_lib.inf.conv import triton_kernels as kernels
from pilimit_lib.inf.conv.geometry import Geometry
from pilimit_lib.inf.implementation import triton_kernels
from pilimit_lib.inf.dual.features import PolynomialFeatures

close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
torch.manual_seed(0)
cases = [(3, [.16, .25, .08], 2, Geometry((3, 3), padding=(1, 1)), (4, 5)),
         (5, [.1, 0, .2], 3, Geometry((3, 2), (2, 1), (1, 0), (1, 2)), (6, 5)),
         (2, [0, .3], 17, Geometry((1, 1), (2, 2)), (5, 5)),
         (9, [.16, .25, .08], 1, Geometry((1, 2), padding=(0, 1)), (3, 3)),
         (3, [.16, .25, .08], 2, Geometry((2, 3), (1, 2), (1, 1), pool=(2, 3)), (5, 9))]
for r, kappa, o, geometry, size in cases:
    features = PolynomialFeatures(r, kappa)
    g, V = torch.randn(r, 2, *size), torch.randn(features.P, *geometry.kernel, o)
    g[:, 0, 0, 0] = 0
    grad = torch.randn(o, 2, *geometry.output(size))
    for layernorm in (False, True) if r == 3 else (False,):
        assert kernels.usable(features, g, V, geometry)
        plain = conv_operator.forward(features, g, V, geometry, layernorm)
        close(kernels.forward(features, g, V, geometry, layernorm, block_p=16), plain)
        dg, dV = conv_operator.backward(features, g, V, geometry, grad, True, True, layernorm)
        close(kernels.gradient(features, g, V, geometry, grad, layernorm), dV)
        calls, real = [], kernels.gradient
        kernels.gradient = lambda *args: (calls.append(1), real(*args))[1]
        with triton_kernels():
            close(conv_operator.forward(features, g, V, geometry, layernorm), plain)
            found = conv_operator.backward(features, g, V, geometry, grad, True, True, layernorm)
        kernels.gradient = real
        assert calls == [1]
        torch.testing.assert_close(found[0], dg)
        close(found[1], dV)
reflect = Geometry((1, 1), padding_mode="reflect")
assert not kernels.usable(features, g, V, reflect)
assert not kernels.usable(features, g.double(), V, geometry)
assert not kernels.usable(PolynomialFeatures(4, [.1, .2, .1, .1]), g, V, geometry)
print("compared")
"""


def test_without_gpu_and_interpreter_the_kernels_refuse_and_plain_torch_runs():
    needs_interpreter()
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter is switched on for this whole process")
    from pilimit_lib.inf.conv import triton_kernels as conv_triton

    layer, g = InfPiConv2d(5, 3, padding=1), torch.randn(2, 5, 4, 4)
    assert not conv_triton.usable(layer.features, g, layer.V, Geometry((3, 3)))
    expected = layer(g)
    with triton_kernels():
        torch.testing.assert_close(layer(g), expected)


def test_they_agree_with_the_plain_operator_under_the_interpreter():
    needs_interpreter()
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        timeout=300,
    )
    assert result.returncode == 0 and "compared" in result.stdout, result.stderr
