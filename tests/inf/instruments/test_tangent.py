"""The empirical tangent kernel, compared with Jacobians of autograd in float64, with what one tiny
step does, and with finite networks at growing width."""

import copy

import pytest
import torch
from torch import nn

from pilimit_lib.inf import InfMLP, PiSGD
from pilimit_lib.inf.gp import KernelMLP, ReLUKernel
from pilimit_lib.inf.instruments import empirical_ntk

from .nets import F64, data, small

KINDS = ("rows", "moments", "convnet", "finite rows", "finite moments", "finite convnet")


def by_autograd(net, x1, x2):
    """Θ [a b o o] from rows of Jacobians, one backward pass each."""
    parameters = [p for p in net.parameters() if p.requires_grad]

    def jacobian(x):
        return torch.stack(
            [
                torch.stack(
                    [
                        torch.cat(
                            [
                                g.flatten()
                                for g in torch.autograd.grad(out, parameters, retain_graph=True)
                            ]
                        )
                        for out in net(sample[None])[0]
                    ]
                )
                for sample in x
            ]
        )

    return torch.einsum("aop,bqp->aboq", jacobian(x1), jacobian(x2))


@pytest.mark.parametrize("layernorm", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rows"])
def test_it_is_the_product_of_jacobians(kind, layernorm):
    net, (x, _) = small(kind, layernorm), data(kind)
    expected = by_autograd(net, x[:4], x[3:])
    full = empirical_ntk(net, x[:4], x[3:], outputs="full")
    torch.testing.assert_close(full, expected, rtol=1e-9, atol=1e-12)
    mean = empirical_ntk(net, x[:4], x[3:], chunk=2)
    torch.testing.assert_close(mean, full.diagonal(dim1=2, dim2=3).mean(-1))


@pytest.mark.parametrize("layernorm", [False, True])
@pytest.mark.parametrize("kind", ["rows", "moments", "finite rows"])
def test_a_tiny_step_on_one_output_moves_all_outputs_by_it(kind, layernorm):
    net, (x, _) = small(kind, layernorm), data(kind)
    theta = empirical_ntk(net, x, outputs="full")
    torch.testing.assert_close(theta, theta.permute(1, 0, 3, 2))
    lr = 1e-6
    for sample, output in ((0, 1), (4, 2)):
        moved = copy.deepcopy(net)
        moved(x[sample : sample + 1])[0, output].backward()
        PiSGD(moved.parameters(), lr=lr).step()
        with torch.no_grad():
            change = (moved(x) - net(x)) / -lr
        torch.testing.assert_close(change, theta[:, sample, :, output], rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_called_twice_counts_with_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = InfMLP(5, 5, r=4, L=1, bias_alpha=0.5, dtype=F64)
            train_once(self.net)

        def forward(self, x):
            return self.net(torch.tanh(self.net(x)))

    net, (x, _) = Twice(), data("rows")
    theta = empirical_ntk(net, x, outputs="full")
    moved = copy.deepcopy(net)
    moved(x[:1])[0, 1].backward()
    PiSGD(moved.parameters(), lr=1e-6).step()
    with torch.no_grad():
        change = (moved(x) - net(x)) / -1e-6
    torch.testing.assert_close(change, theta[:, 0, :, 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(empirical_ntk(net, x), theta.diagonal(dim1=2, dim2=3).mean(-1))


def train_once(net):
    x, _ = data("rows")
    net(x).square().sum().backward()
    net(x).sum().backward()
    PiSGD(net.parameters(), lr=0.3).step()


def test_finite_networks_tend_to_it():
    net, (x, _) = small("rows"), data("rows")
    theta = empirical_ntk(net, x)

    def error(n):
        return float(
            torch.stack([(empirical_ntk(net.sample(n), x) - theta).norm() for _ in range(4)]).mean()
            / theta.norm()
        )

    assert error(256) < 0.3 and error(256) < error(16) / 2  # of order n^-½


def test_parts_by_layer_add_up_and_what_is_frozen_does_not_count():
    net, (x, _) = small("rows"), data("rows")
    parts = empirical_ntk(net, x, by_layer=True)
    assert set(parts) == {
        *("layers.0.A", "layers.0.bias", "layers.1", "layers.1.bias", "layers.2", "layers.2.bias")
    }
    whole = empirical_ntk(net, x)
    torch.testing.assert_close(sum(parts.values()), whole)
    net.layers[1].A.requires_grad_(False)
    torch.testing.assert_close(empirical_ntk(net, x), whole - parts["layers.1"])
    torch.testing.assert_close(empirical_ntk(net, x, x[:2]), empirical_ntk(net, x)[:, :2])


def test_a_learner_in_the_space_of_a_kernel_has_that_kernel():
    kernel = ReLUKernel(depth=2, ntk=True)
    x, _ = data("rows")
    torch.testing.assert_close(empirical_ntk(KernelMLP(5, 3, kernel, dtype=F64), x), kernel(x, x))


def test_modules_that_are_none_of_ours_and_refusals():
    net = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Tanh(), nn.Linear(7, 2)).double()
    x, _ = data("rows")
    found = empirical_ntk(net, x, outputs="full", chunk=4)
    assert net.training
    torch.testing.assert_close(found, by_autograd(net.eval(), x, x), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="'mean' or 'full'"):
        empirical_ntk(net, x, outputs="trace")
    with pytest.raises(ValueError, match="no parameter that trains"):
        empirical_ntk(net.requires_grad_(False), x)
