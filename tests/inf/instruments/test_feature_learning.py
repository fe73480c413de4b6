"""Lazy or rich: kernels that move, kernels that do not, and the measures between them."""

import copy
import math

import pandas as pd
import pytest
import torch
from torch import nn

from pilimit_lib.core import save, snapshot
from pilimit_lib.inf import InfMLP, PiSGD
from pilimit_lib.inf.gp import FiniteFeatures, InfiniteFeatures
from pilimit_lib.inf.instruments import (
    alignment,
    cka,
    feature_kernels,
    feature_learning,
    relative_change,
    target_kernel,
)

from .nets import F64, data, small, train

KINDS = ("rows", "moments", "convnet", "finite rows", "finite moments", "finite convnet")


@pytest.mark.parametrize("layernorm", [False, True])
@pytest.mark.parametrize("kind", ["rows", "moments", "convnet"])
def test_kernels_of_finite_networks_tend_to_those_of_the_infinite_one(kind, layernorm):
    net, (x, _) = small(kind, layernorm), data(kind)
    limit = feature_kernels(net, x)
    assert list(limit) == ["layers.1", "layers.2"]

    def error(n):
        found = [feature_kernels(net.sample(n), x) for _ in range(4)]
        return max(
            sum(float((one[name] - limit[name]).norm()) for one in found) / 4 / limit[name].norm()
            for name in limit
        )

    few, many = (8, 128) if kind == "convnet" else (16, 512)
    assert error(many) < 0.3 and error(many) < error(few) / 2  # of order n^-½


def test_the_readouts_kernel_is_that_of_the_embeddings():
    net, (x, _) = small("rows", layernorm=True), data("rows")
    e = net.embedding(x).detach()
    torch.testing.assert_close(feature_kernels(net, x)["layers.2"], InfiniteFeatures()(e, e))
    finite = net.sample(16)
    e = finite.embedding(x).detach()
    torch.testing.assert_close(feature_kernels(finite, x)["layers.2"], FiniteFeatures()(e, e))
    by_parts = feature_kernels(net, x, batch_size=2)
    torch.testing.assert_close(by_parts["layers.1"], feature_kernels(net, x)["layers.1"])


def test_ordinary_modules_are_measured_by_what_they_receive():
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)
    ).double()
    x, _ = data("convnet")
    found = feature_kernels(net, x)
    assert list(found) == ["2", "5"]
    h = net[:2](x).flatten(1).detach()
    torch.testing.assert_close(found["2"], h @ h.T / 4)  # a mean over 2 x 2 positions
    h = net[:5](x).detach()
    torch.testing.assert_close(found["5"], h @ h.T)
    with pytest.raises(ValueError, match="no layer that receives features"):
        feature_kernels(nn.Linear(5, 2).double(), data("rows")[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_stood_still_has_moved_by_nothing(kind):
    net, (x, y) = small(kind), data(kind)
    found = feature_learning(net, x, y, since=net.state_dict())
    assert [k.kernel for k in found] == ["layers.1", "layers.2", "NTK"] and found.lazy(0.0)
    for kernel in found:
        assert kernel.change == 0 and kernel.cka == pytest.approx(1, abs=1e-12)
        assert kernel.task_before == kernel.task_now


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_the_kernels_towards_the_task(kind):
    net, (x, y) = small(kind), data(kind, 8)
    start = copy.deepcopy(net)
    train(net, x, y, steps=60, lr=0.5)
    found = feature_learning(net, x, y, since=start)
    assert not found.lazy()
    last, ntk = found["layers.2"], found["NTK"]
    assert last.change > 0.1 and last.cka < 0.99 and last.task_now > last.task_before
    assert ntk.change > 0.05
    assert isinstance(pd.DataFrame(found.records()).set_index("kernel").loc["NTK", "cka"], float)


@pytest.mark.parametrize("kind", ["rows", "moments", "finite rows"])
def test_frozen_features_stay_lazy_and_so_do_tiny_steps(kind):
    net, (x, y) = small(kind), data(kind)
    start = copy.deepcopy(net)
    for layer in net.layers[:-1]:
        layer.requires_grad_(False)
    train(net, x, y, steps=20)
    found = feature_learning(net, x, y, since=start, ntk=0)
    assert [k.change for k in found] == [0, 0]  # the readout moved, features did not
    net = copy.deepcopy(start)
    train(net, x, y, steps=5, lr=1e-6)
    found = feature_learning(net, x, y, since=start)
    assert found.lazy(1e-4) and all(0 < k.change for k in found)


def test_a_network_and_twice_its_features():
    net, (x, y) = small("moments"), data("moments")
    doubled = copy.deepcopy(net)
    doubled.first_layer_alpha *= 2
    doubled.layers[0].bias_alpha *= 2
    doubled.layers[0].bias.data.zero_()
    net.layers[0].bias.data.zero_()
    found = feature_learning(doubled, x, y, since=net)["layers.1"]
    assert found.change == pytest.approx(3) and found.cka == pytest.approx(1)
    assert found.task_now == pytest.approx(found.task_before)


def test_since_is_a_state_dict_a_snapshot_a_path_or_a_network(tmp_path):
    net, (x, y) = small("rows"), data("rows")
    state, whole = copy.deepcopy(net.state_dict()), snapshot(net)
    start = copy.deepcopy(net)
    save(state, tmp_path / "state.pt")
    save(whole, tmp_path / "whole.pt")
    train(net, x, y, steps=4)
    rows = list(net.rows)
    expected = feature_learning(net, x, y, since=start)
    for since in (state, whole, tmp_path / "state.pt", str(tmp_path / "whole.pt")):
        assert feature_learning(net, x, y, since=since) == expected
    assert net.rows == rows, "the network itself stays"
    text = str(expected)
    assert text.splitlines()[0].split() == [
        *("kernel", "change", "alignment", "cka", "task_before", "task_now")
    ]
    assert "NTK" in text and "6 samples" in text
    assert math.isnan(feature_learning(net, x, since=start)["NTK"].task_now)


def test_refusals():
    net, (x, y) = small("rows"), data("rows")
    with pytest.raises(ValueError, match="6 samples and 2 labels"):
        feature_learning(net, x, y[:2], since=net)
    with pytest.raises(ValueError, match="1 samples"):
        feature_learning(net, x[:1], since=net)
    with pytest.raises(TypeError, match="since is a int"):
        feature_learning(net, x, since=3)
    with pytest.raises(ValueError, match="the same layers"):
        feature_learning(net, x, since=InfMLP(5, 3, r=4, L=0, dtype=F64))
    with pytest.raises(KeyError, match="no kernel 'layers.9'"):
        feature_learning(net, x, since=net, ntk=0)["layers.9"]


def test_measures_by_hand():
    K = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=F64)
    L = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=F64)
    assert relative_change(L, K) == pytest.approx(math.sqrt(5) / 2)
    assert relative_change(K, 0 * K) == math.inf and relative_change(0 * K, 0 * K) == 0
    assert alignment(K, 3 * K) == pytest.approx(1) and alignment(K, L) == 0
    assert cka(K, L) == pytest.approx(1), "two points are only near or far"
    features = torch.randn(5, 3, dtype=F64)
    shifted = features + 7
    assert cka(features @ features.T, shifted @ shifted.T) == pytest.approx(1)
    assert math.isnan(alignment(K, 0 * K))
    assert target_kernel(torch.tensor([0, 1, 0])).tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert target_kernel(torch.tensor([1.0, -2.0])).tolist() == [[1, -2], [-2, 4]]
    with pytest.raises(ValueError, match="of the same samples"):
        cka(K, features)


def test_optimisers_are_not_asked_for():
    """A network under training, with gradients waiting, is measured without touching them."""
    net, (x, y) = small("rows"), data("rows")
    net(x).square().sum().backward()
    before = len(net.layers[1].pending.rows())
    feature_learning(net, x, y, since=copy.deepcopy(net.state_dict()))
    assert len(net.layers[1].pending.rows()) == before
    PiSGD(net.parameters(), lr=0.1).step()
