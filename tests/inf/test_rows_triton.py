"""The Triton kernels for rows under Triton's interpreter, which needs no GPU: a process of its own,
as Triton reads it once."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.inf.interpreter import needs_interpreter

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import torch
from torch.nn import functional as F
from pilimit_lib.core import Blocks
from pilimit_lib.inf import InfMLP, InfPiLinearReLU, PiSGD
from pilimit_lib.inf.rows.sums.choice import row_twin
from tests.inf.test_rows_twins import dense, filled, run

torch.manual_seed(0)
for m, r, o, b, dtype in (
    (1, 1, 1, 1, torch.float32),
    (300, 7, 3, 2, torch.float32),
    (129, 33, 5, 19, torch.float16),
    (128, 20, 40, 5, torch.bfloat16),
    (300, 17, 9, 33, torch.int8),
    (60, 512, 400, 3, torch.float32),
):
    layer = filled(m, r, o, dtype, decay=.5, block_rows=128)
    g, weights = torch.randn(b, r), torch.randn(b, o)
    with row_twin("triton", debug=True) as said:
        got = run(layer, g, weights)
        assert r != 17 or all(torch.equal(*pair) for pair in zip(got, run(layer, g, weights)))
    assert said == ["triton runs"], said
    for found, expected in zip(got, dense(layer, g, weights)):
        error = float((found - expected).norm() / expected.norm())
        bound = 1e-5 if r < 8 else 1e-6
        if dtype in (torch.float16, torch.int8):
            bound = 1e-3  # products in float16
        assert error < bound, (m, r, o, b, dtype, error)

# Multipliers and gradients of ordinary training are too small for float16 as they are.
for dtype in (torch.float32, torch.float16, torch.int8):
    for lr, size in ((1., 1.), (.1, 1 / 128), (.01, 1e-3), (1e-3, 1e-3), (1., 1e-7), (100., 1e3)):
        layer = filled(300, 32, 10, dtype)
        layer.set_rows(torch.randn(300, 10) * size, torch.full((300,), -lr), layer.B.detach())
        g, scales = torch.randn(8, 32), torch.tensor([1e-4, 1.] * 4)[:, None]
        weights = torch.randn(8, 10) * size * scales
        with row_twin("triton"):
            for found, expected in zip(run(layer, g, weights), dense(layer, g, weights)):
                error = ((found - expected).norm(dim=1) / expected.norm(dim=1)).max()
                bound = 1e-5 if dtype == torch.float32 else 2e-3
                assert error < bound, (dtype, lr, size, float(error))

# What is not a number stays none, in its own sample only.
for layernorm in (False, True):
    for bad in (float("nan"), float("inf")):
        for dtype in (torch.float32, torch.float16, torch.int8):
            layer = InfPiLinearReLU(8, 5, layernorm=layernorm, row_dtype=dtype)
            for where in ("g", "weights"):
                given = {"g": torch.randn(3, 8), "weights": torch.randn(3, 5)}
                given[where][1, 2] = bad
                found = {}
                for twin in ("plain", "triton"):
                    with row_twin(twin):
                        parts = run(layer, **given)
                    found[twin] = [part.isfinite().all(1).tolist() for part in parts]
                assert found["plain"] == found["triton"], (layernorm, bad, dtype, where, found)
                assert not found["plain"][where == "weights"][1], found

layer = filled(70, 8, 4)
for parameter in (layer.A, layer.B):
    parameter.blocks._blocks[0][70:] = float("nan")  # memory beyond the last row may hold anything
with row_twin("triton"):
    assert all(part.isfinite().all() for part in run(layer, torch.randn(3, 8), torch.randn(3, 4)))

for layer, unit, why in ((filled(3, 513, 2), torch.randn(2, 513), "512"),
                         (filled(3, 4, 2, torch.float64), torch.randn(2, 4), "float64")):
    with row_twin("triton", debug=True) as said:
        layer(unit.to(layer.A.dtype))
    assert why in said[0] and said[1] == "chunked runs", said


def train(twin):
    torch.manual_seed(0)
    net = InfMLP(6, 3, 5, 1)
    optimizer = PiSGD(net.parameters(), lr=.3, weight_decay=.1)
    x = torch.randn(12, 6)
    with row_twin(twin):
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(net(x), x[:, :3].argmax(1)).backward()
            optimizer.step()
    return net(x).detach()


torch.testing.assert_close(train("triton"), train("plain"), rtol=1e-5, atol=1e-6)
print("compared")
"""


def test_kernels_agree_with_float64_under_the_interpreter():
    needs_interpreter()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "compared"


@pytest.mark.parametrize(
    "name, function, bound",
    [
        ("U", lambda x: (np.sqrt(1 - x * x) - x * np.arccos(x)) / (1 - x) ** 1.5, 1e-9),
        ("P", lambda x: np.arccos(x) / np.sqrt(1 - x), 1e-8),
        ("S", lambda x: np.sqrt(1 + x), 1e-8),
    ],
)
def test_polynomials_are_the_interpolation_at_chebyshev_points(name, function, bound):
    needs_interpreter()
    from pilimit_lib.inf.rows.sums import triton_kernels as triton_rows

    series = getattr(triton_rows, name)
    x = np.linspace(0, 0.98, 1001)
    assert np.abs(np.polyval(series[::-1], x) - function(x)).max() < bound
    points = (1 + np.cos(np.pi * (2 * np.arange(9) + 1) / 18)) / 2
    fitted = np.linalg.solve(np.vander(points, increasing=True), function(points))
    assert np.abs(fitted - series).max() < 1e-6
