"""NNGP, NTK and feature kernels against independent oracles, and regression on them against a plain
solve."""

import json

import pytest
import torch

from experiments.training.images import load_images
from pilimit_lib.inf import InfMLP, PiSGD, param_groups
from pilimit_lib.inf.gp import (
    FiniteFeatures,
    InfiniteFeatures,
    InFloat32,
    ReLUKernel,
    embed,
    features_of,
    kernel_matrix,
    kernel_product,
    kernel_regression,
    kernel_ridge,
    memory_needed,
    require_memory,
    solve,
)
from pilimit_lib.inf.gp.panels import Panels
from pilimit_orig.inf.kernel import relu_gp_fn, relu_ntk_fn
from tests.pilimit_orig.test_kernel import finite, pair


def test_the_value_worked_out_by_hand():
    """pilimit-math, section 6: varw 2, varb 0, |x|² = |y|² = d, cosine .3, all multipliers 1."""
    x, y = pair(0.3)
    assert ReLUKernel(1, varw=2.0)(x, y).item() == pytest.approx(0.4827, abs=1e-4)
    assert ReLUKernel(1, ntk=True, varw=2.0)(x, y).item() == pytest.approx(0.6619, abs=1e-4)
    assert ReLUKernel(1, ntk=True, varw=2.0, as_published=True)(x, y).item() == pytest.approx(
        0.8790, abs=1e-4
    )


SETTINGS = [
    dict(depth=1),
    dict(depth=3, varw=2.0, varb=0.1),
    dict(depth=2, varw=1.5, varb=0.3, lrw=(0.1, 1.0, 4.0), lrb=0.5),
    dict(depth=2, varw=(1.0, 2.0, 3.0), varb=(0.0, 0.2, 0.0), lrw=2.0),
    dict(depth=2, lrb=1.0),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["nngp", "ntk", "as published"])
def test_kernels_are_those_of_the_plain_implementation(setting, kind):
    kernel = ReLUKernel(ntk=kind != "nngp", as_published=kind == "as published", **setting)
    depth = setting["depth"]
    varw, varb, lrw, lrb = (kernel._per_layer(name) for name in ("varw", "varb", "lrw", "lrb"))
    plain = (
        relu_gp_fn(varw[:depth], varb[:depth])
        if kind == "nngp"
        else relu_ntk_fn(
            varw[:depth],
            varb[:depth],
            lrw,
            lrb,
            varw_readout=varw[depth],
            as_published=kind == "as published",
        )
    )
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    assert torch.allclose(kernel(x, y), plain(x, y), atol=1e-12)


def test_kernels_are_limits_of_finite_networks():
    varws, varbs, lrws, lrbs = [1.5, 2.0], [0.3, 0.1], [0.5, 1, 3], [1, 0.5, 2]
    x = torch.randn(5, 6)
    gp, ntk = finite(varws, varbs, lrws, lrbs, x, width=512, draws=40)
    setting = dict(depth=2, varw=(*varws, 1.3), varb=(*varbs, 0.0), lrw=lrws, lrb=lrbs)
    for ours, estimate in (
        (ReLUKernel(**setting)(x, x), gp),
        (ReLUKernel(ntk=True, **setting)(x, x), ntk),
    ):
        assert (ours - estimate).abs().max() < 0.04 * ours.abs().max()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_kernels_are_those_of_neural_tangents(setting):
    """The reference library; its NTK multiplies each layer by varw and varb, which lrw and lrb do
    here."""
    pytest.importorskip(
        "neural_tangents",
        reason="pip install 'pilimit[kernels]' to compare with neural-tangents",
        exc_type=ImportError,
    )
    import jax
    import numpy as np
    from neural_tangents import stax

    jax.config.update("jax_enable_x64", True)
    depth = setting["depth"]
    both = {name: value for name, value in setting.items() if name in ("varw", "varb")}
    kernel = ReLUKernel(depth, **both)
    varw, varb = kernel._per_layer("varw"), kernel._per_layer("varb")
    layers = []
    for l in range(depth + 1):
        layers.append(
            stax.Dense(1, W_std=varw[l] ** 0.5, b_std=varb[l] ** 0.5, parameterization="ntk")
        )
        layers += [stax.Relu()] if l < depth else []
    x = torch.randn(6, 5, dtype=torch.float64)
    reference = stax.serial(*layers)[2](x.numpy(), None, ("nngp", "ntk"))
    # The readout's variances are part of its NNGP and not of ours.
    nngp = varw[depth] * kernel(x, x) + varb[depth]
    ntk = ReLUKernel(depth, ntk=True, lrw=varw, lrb=varb, **both)(x, x)
    assert np.allclose(reference.nngp, nngp, atol=1e-7) and np.allclose(
        reference.ntk, ntk, atol=1e-7
    )


def trained_network(r=20):
    """A small infinite network after some steps on the digits."""
    torch.manual_seed(0)
    data = load_images("digits", train_size=400, test_size=200)
    net = InfMLP(64, 10, r, 1, last_layer_alpha=0.5, bias_alpha=0.5)
    optimizer = PiSGD(param_groups(net, 0.5, first_layer_lr_mult=0.1, last_layer_lr_mult=4.0), 0.5)
    for start in range(0, 400, 20):
        optimizer.zero_grad()
        batch = slice(start, start + 20)
        torch.nn.functional.cross_entropy(
            net(data.train_x[batch].flatten(1)), data.train_y[batch]
        ).backward()
        optimizer.step()
    return net, data


def test_features_of_a_sampled_network_tend_to_those_of_the_infinite_one():
    net, data = trained_network()
    x = data.test_x[:40]
    infinite = features_of(net)(*[embed(net, x, progress=False)] * 2)
    gaps = []
    for n in (64, 1024):
        gaps.append(0.0)
        for _ in range(6):
            sample = net.sample(n)
            f = embed(sample, x, progress=False)
            assert f.shape == (40, n) and isinstance(features_of(sample), FiniteFeatures)
            gaps[-1] += float((features_of(sample)(f, f) - infinite).abs().mean()) / 6
    # A factor of 16 in width is one of 4 in distance, give or take what six draws leave open.
    assert gaps[1] < 0.5 * gaps[0] and gaps[1] < 0.05


def test_feature_kernel_is_that_of_the_embedding_not_of_the_outputs():
    net, data = trained_network()
    f = embed(net, data.test_x, batch_size=64, progress=False)
    assert f.shape == (200, 20) and torch.allclose(f.norm(dim=1), torch.ones(200), atol=1e-5)
    K = InfiniteFeatures()(f, f)
    assert torch.allclose(K.diagonal(), torch.full((200,), 0.5, dtype=torch.float64), atol=1e-5)
    assert torch.linalg.eigvalsh(K).min() > -1e-9
    assert InfiniteFeatures()(torch.zeros(1, 20), f).abs().max() == 0


@pytest.mark.parametrize("count", [1, 7, 64, 100])
def test_a_matrix_in_blocks_is_the_whole_one(count):
    x, kernel = torch.randn(count, 5), ReLUKernel(2, ntk=True)
    K = kernel_matrix(kernel, x, block=32, progress=False)
    assert torch.allclose(K, kernel(x, x), atol=1e-12) and torch.equal(K, K.T)
    assert (
        kernel_matrix(kernel, x, dtype=torch.float32, block=32, progress=False).dtype
        == torch.float32
    )


def test_a_product_in_blocks_is_the_whole_one():
    x, y, kernel = torch.randn(50, 5), torch.randn(70, 5), ReLUKernel(1)
    c = torch.randn(3, 70, 2, dtype=torch.float64)
    assert torch.allclose(
        kernel_product(kernel, x, y, c, block=32, progress=False), kernel(x, y) @ c, atol=1e-12
    )


class Interrupted(ReLUKernel):
    """Stops after a number of blocks, and counts them."""

    calls, limit = 0, 4

    def __call__(self, x, y):
        type(self).calls += 1
        if self.calls > self.limit:
            raise KeyboardInterrupt
        return super().__call__(x, y)


def test_an_interrupted_matrix_goes_on_where_it_stopped(tmp_path):
    x, path = torch.randn(100, 5), tmp_path / "kernel.npy"
    with pytest.raises(KeyboardInterrupt):
        kernel_matrix(Interrupted(2), x, block=32, cache=path, progress=False)
    assert len(json.loads((tmp_path / "kernel.json").read_text())["done"]) == 4
    Interrupted.calls, Interrupted.limit = 0, 100
    K = kernel_matrix(Interrupted(2), x, block=32, cache=path, progress=False)
    assert Interrupted.calls == 10 - 4
    assert torch.equal(K, kernel_matrix(ReLUKernel(2), x, block=32, progress=False))
    kernel_matrix(Interrupted(2), x, block=32, cache=path, progress=False)
    assert Interrupted.calls == 6


def test_regression_leaves_the_file_alone_and_another_kernel_is_refused(tmp_path):
    x, path = torch.randn(700, 5), tmp_path / "kernel.npy"
    K = kernel_matrix(ReLUKernel(2), x, cache=path, progress=False)
    before = path.read_bytes()
    kernel_ridge(K, torch.randn(700, 2), [1e-3], progress=False)
    assert path.read_bytes() == before
    # What an interrupted factorisation leaves in the matrix must not reach the file either.
    K.zero_()
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="another kernel matrix .other kernel"):
        kernel_matrix(ReLUKernel(3), x, cache=path, progress=False)
    with pytest.raises(ValueError, match="other data"):
        kernel_matrix(ReLUKernel(2), x + 1, cache=path, progress=False)
    (tmp_path / "kernel.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        kernel_matrix(ReLUKernel(2), x, cache=path, progress=False)
    (tmp_path / "kernel.json").unlink()
    with pytest.raises(ValueError, match="exists without"):
        kernel_matrix(ReLUKernel(2), x, cache=path, progress=False)


@pytest.mark.parametrize("method", ["cholesky", "eigen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("count", [3, 512, 513, 1100])
def test_regression_is_a_plain_solve(count, dtype, method):
    torch.manual_seed(1)
    x, targets = torch.randn(count, 6), torch.randn(count, 3)
    K = kernel_matrix(ReLUKernel(2, ntk=True), x, dtype=dtype, progress=False)
    before = K.clone()
    ridges = [1e-3, 1e-1, 3.0]
    C = kernel_ridge(K, targets, ridges, method=method, progress=False)
    assert torch.equal(K, before)
    exact = K.double()
    for ridge, got in zip(ridges, C):
        expected = torch.linalg.solve(
            exact + ridge * exact.diagonal().mean() * torch.eye(count), targets.double()
        )
        assert (got - expected).norm() < 1e-7 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_an_interrupted_factorisation_goes_on_bit_for_bit(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(solve, "CHOLESKY_PANEL", 50)
    x, targets = torch.randn(220, 6), torch.randn(220, 3)
    K = kernel_matrix(ReLUKernel(2), x, dtype=dtype, progress=False)
    whole = kernel_ridge(K, targets, [1e-3, 1e-1], progress=False)
    made, keep = [], tmp_path / "factor"
    panel = solve._Cholesky._panel

    def interrupted(self, begin, end, shift):
        made.append(begin)
        if len(made) == 3:
            raise KeyboardInterrupt
        return panel(self, begin, end, shift)

    monkeypatch.setattr(solve._Cholesky, "_panel", interrupted)
    before = K.clone()
    with pytest.raises(KeyboardInterrupt):
        kernel_ridge(K, targets, [1e-3, 1e-1], progress=False, keep=keep)
    assert torch.equal(K, before) and len(list(keep.glob("panel_*"))) == 2
    damaged = keep / "panel_000000050.pt"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    again = kernel_ridge(K, targets, [1e-3, 1e-1], progress=False, keep=keep)
    assert torch.equal(again, whole) and torch.equal(K, before)
    # the first was there, the second was damaged; then the other ridge, from the beginning
    assert made == [0, 50, 100, *(50, 100, 150, 200), *(0, 50, 100, 150, 200)]
    assert not keep.exists()


def test_panels_of_another_matrix_are_not_used(tmp_path):
    K = torch.eye(7, dtype=torch.float64) * 4
    panels = Panels(tmp_path / "factor", K, 0.5, 3)
    panels.put(0, torch.eye(3), torch.zeros(4, 3))
    assert Panels(tmp_path / "factor", K, 0.5, 3).get(0) is not None
    for other in ((K + 1e-9, 0.5, 3), (K, 0.25, 3), (K, 0.5, 2)):
        panels = Panels(tmp_path / "factor", K, 0.5, 3)
        panels.put(0, torch.eye(3), torch.zeros(4, 3))
        assert Panels(tmp_path / "factor", *other).get(0) is None


def test_a_ridge_below_the_precision_is_an_error_that_leaves_the_matrix(tmp_path):
    x = torch.randn(600, 3).repeat(2, 1)
    for method in ("cholesky", "eigen"):
        K = kernel_matrix(ReLUKernel(2), x, dtype=torch.float32, progress=False)
        before = K.clone()
        with pytest.raises(ValueError, match="ridge 0 .*too small.*float64"):
            kernel_ridge(K, torch.randn(1200, 2), [0.0], method=method, progress=False)
        assert torch.equal(K, before)


def test_regression_on_the_digits():
    data = load_images("digits")
    targets = torch.nn.functional.one_hot(data.train_y, 10).double() - 0.1
    for kernel in (ReLUKernel(2), ReLUKernel(2, ntk=True)):
        out = kernel_regression(
            kernel, data.train_x, targets, data.test_x, [1e-6, 1e-3], progress=False
        )
        accuracy = (out.argmax(-1) == data.test_y).double().mean(1)
        assert out.shape == (2, len(data.test_y), 10) and (accuracy > 0.97).all()


def test_memory_is_named_before_anything_is_computed():
    assert memory_needed(50_000, torch.float32) == pytest.approx(10e9, rel=0.1)
    assert memory_needed(10_000, method="eigen") == 5 * 10_000**2 * 8
    with pytest.raises(MemoryError, match=r"needs 8000\d{4}\.\d GB.*Use fewer samples"):
        require_memory(memory_needed(100_000_000))


def test_bad_settings_are_named():
    for setting, message in (
        (dict(depth=0), "depth counts hidden layers"),
        (dict(depth=2, varw=-1.0), "varw is -1.0"),
        (dict(depth=2, lrw=(1.0, 1.0)), "of the 3 layers"),
        (dict(depth=1, varw=0.0), "no kernel"),
        (dict(depth=1, as_published=True), "only one NNGP"),
    ):
        with pytest.raises(ValueError, match=message):
            ReLUKernel(**setting)
    with pytest.raises(ValueError, match="5 and 6 numbers"):
        ReLUKernel(1)(torch.zeros(2, 5), torch.zeros(2, 6))
    K = torch.eye(4)
    for arguments, message in (
        ((K[:2], torch.zeros(2, 1), [1.0]), "square"),
        ((K, torch.zeros(3, 1), [1.0]), r"expected \[4"),
        ((K, torch.zeros(4, 1), []), "at least one"),
        ((K, torch.zeros(4, 1), [-1.0]), "none negative"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel_ridge(*arguments)
    with pytest.raises(ValueError, match="method is 'lu'"):
        kernel_ridge(K, torch.zeros(4, 1), [1.0], method="lu")


@pytest.mark.parametrize("ntk", [False, True])
def test_a_kernel_in_float32_knows_how_far_it_is_from_float64(ntk):
    """To rounding, but for k' at correlations of 1, where float32 loses half its digits."""
    x, exact = torch.randn(40, 30), ReLUKernel(3, ntk)
    fast = InFloat32(exact)
    found, expected = fast(x, x), exact(x, x)
    assert found.dtype == torch.float32 and expected.dtype == torch.float64
    away = ~torch.eye(40, dtype=torch.bool)
    torch.testing.assert_close(found.double()[away], expected[away], rtol=1e-5, atol=1e-6)
    difference = (found.double() - expected).abs().max() / expected.diagonal().mean()
    assert fast.error(x) == pytest.approx(float(difference), rel=1e-6)
    assert fast.error(x) < (1e-3 if ntk else 1e-6)
