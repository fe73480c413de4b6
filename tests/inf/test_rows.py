"""Rows in low precision, shapes at the edge, and growing things of this room under the common
contract."""

from functools import partial

import pytest
import torch
from torch import nn

from pilimit_lib.core import follow, snapshot
from pilimit_lib.inf import InfMLP, InfPiInputLinearReLU, InfPiLinearReLU, PiSGD, clip_grad_norm_
from pilimit_lib.inf.rows.parameter import InfPiParameter
from pilimit_lib.inf.utils import pi_init, stage_grad, unstage_grad
from tests.contracts import GrowableContract

from .nets import assert_unchanged, cross_entropy, data, network, tensors

EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23}


def paired(dtype, rows=400, L=2):
    """The same network in float64 and with rows in `dtype`."""
    exact = network(L=L, d=8, r=8)
    for layer in exact.layers[1:]:
        A = torch.randn(rows, layer.r_out, dtype=torch.float64)
        B = nn.functional.normalize(torch.randn(rows, 8, dtype=torch.float64))
        layer.set_rows(A, torch.randn(rows).double() / rows**0.5, B)
    low = InfMLP(8, 3, 8, L, dtype=torch.float32, row_dtype=dtype)
    low.load_state_dict(exact.state_dict())
    return exact, low


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_forward_error_of_low_precision_rows(dtype):
    """Rounding of m independent rows adds up like √m of one: relative to the output that is a few
    eps, not m eps."""
    exact, low = paired(dtype)
    x = torch.randn(16, 8, dtype=torch.float64)
    error = (low(x.float()).double() - exact(x)).norm() / exact(x).norm()
    assert error < 8 * EPS[dtype] and (dtype == torch.float32 or error > EPS[dtype] / 100)
    assert low(x.float()).dtype == torch.float32 and low.layers[1].A.dtype == dtype


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_gradient_error_of_low_precision_rows(dtype):
    exact, low = paired(dtype)
    x = torch.randn(16, 8, dtype=torch.float64)
    grads = []
    for net, inputs in ((exact, x), (low, x.float())):
        inputs = inputs.clone().requires_grad_()
        net(inputs).square().sum().backward()
        rows = net.layers[1].A.grad.as_subclass(torch.Tensor)
        grads.append([inputs.grad.double(), net.layers[0].A.grad.double(), rows.double()])
    for expected, got in zip(*grads):
        assert (got - expected).norm() / expected.norm() < 16 * EPS[dtype]


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_training_error_of_low_precision_rows(dtype):
    exact, low = paired(dtype, rows=50)
    optimizers = [
        PiSGD(net.parameters(), lr=0.1, momentum=0.5, weight_decay=0.01) for net in (exact, low)
    ]
    for _ in range(5):
        x, y = data(8, 8)
        for net, optimizer, inputs in ((exact, optimizers[0], x), (low, optimizers[1], x.float())):
            optimizer.zero_grad()
            cross_entropy(y)(net(inputs)).backward()
            clip_grad_norm_(net, 1.0)
            optimizer.step()
    x, _ = data(16, 8)
    assert (low(x.float()).double() - exact(x)).norm() / exact(x).norm() < 32 * EPS[dtype]
    assert low.layers[1].A.dtype == dtype and low.layers[1].Amult.dtype == torch.float32
    assert low.row_bytes == sum(
        2 ** (dtype == torch.float32) * 2 * 90 * (layer.r_out + 8) for layer in low.layers[1:]
    )


def test_small_multipliers_do_not_vanish_in_half_precision():
    """A learning rate of 1e-9 is below the smallest float16."""
    net = InfMLP(4, 2, 4, 1, row_dtype=torch.float16)
    x = torch.randn(4, 4)
    optimizer = PiSGD(net.parameters(), lr=1e-9)
    net(x).sum().backward()
    optimizer.step()
    assert net.layers[1].Amult[-4:].tolist() == pytest.approx([-1e-9] * 4)


def test_summation_is_in_float32():
    """4096 rows of 1e-4 beside a large one: a float16 sum would lose them all."""
    layer = InfPiLinearReLU(1, 1, bias_alpha=0, row_dtype=torch.float16)
    m = 4096
    A = torch.full((m + 1, 1), 1e-4)
    A[0] = 2.0
    layer.set_rows(A, torch.ones(m + 1), torch.ones(m + 1, 1))
    expected = 0.5 * float(A.half().double().sum())
    assert float(layer(torch.ones(1, 1)).detach()) == pytest.approx(expected, rel=1e-3)


def test_half_then_float_then_training():
    net = network().float().half().float()
    x, y = data(dtype=torch.float32)
    optimizer = PiSGD(net.parameters(), lr=0.1)
    cross_entropy(y)(net(x)).backward()
    optimizer.step()
    assert net.rows == [10, 10] and net.layers[1].A.dtype == torch.float32


@pytest.mark.parametrize(
    "convert, rows, others",
    [
        (lambda n: n.half(), torch.float16, torch.float16),
        (lambda n: n.bfloat16(), torch.bfloat16, torch.bfloat16),
        (lambda n: n.to(torch.float64), torch.float64, torch.float64),
        (lambda n: n.to("cpu"), torch.float32, torch.float32),
        (lambda n: n.float(), torch.float32, torch.float32),
    ],
)
def test_conversions_keep_objects_order_and_optimiser(convert, rows, others):
    net = InfMLP(4, 2, 4, 1)
    optimizer = PiSGD(net.parameters(), lr=0.1)
    names, held = (
        [n for n, _ in net.named_parameters()],
        [id(p) for p in net.layers[1:].parameters() if p.ndim],
    )
    convert(net)
    assert [n for n, _ in net.named_parameters()] == names and held == [
        id(p) for p in net.layers[1:].parameters() if p.ndim
    ]
    assert {net.layers[1].A.dtype, net.layers[1].B.dtype} == {rows} and net.layers[
        0
    ].A.dtype == others
    assert net.layers[1].Amult.dtype == (torch.float64 if rows == torch.float64 else torch.float32)
    x = torch.randn(3, 4).to(others)
    out = net(x)
    out.sum().backward()
    optimizer.step()
    assert out.dtype == others and net.rows == [7, 7] and net.layers[1].A.dtype == rows


def test_under_autocast_rows_are_summed_in_float32():
    net = InfMLP(4, 2, 4, 1)
    with torch.no_grad():
        net.layers[-1].set_rows(torch.randn(4, 2), torch.ones(4), net.layers[-1].B.detach().clone())
    x = torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x)
    out.float().sum().backward()
    assert torch.isfinite(out).all() and len(net.layers[1].A.grad) == 3
    torch.testing.assert_close(out.float(), net(x), rtol=0.05, atol=0.05)


# Shapes


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (1, 2, 3)])
def test_leading_dimensions(shape):
    net = network()
    x = torch.randn(*shape, 5, dtype=torch.float64)
    out = net(x)
    assert out.shape == (*shape, 3)
    torch.testing.assert_close(out.reshape(-1, 3), net(x.reshape(-1, 5)), rtol=0, atol=0)
    out.sum().backward()
    PiSGD(net.parameters(), lr=0.1).step()
    count = x[..., 0].numel()
    assert net.rows == [6 + count] * 2


def test_an_empty_batch():
    net = network(bias_alpha=1)
    x = torch.zeros(0, 5, dtype=torch.float64, requires_grad=True)
    before = tensors(net)
    optimizer = PiSGD(net.parameters(), lr=0.1)
    assert net(x).shape == (0, 3)
    net(x).sum().backward()
    assert x.grad.shape == (0, 5) and float(clip_grad_norm_(net, 1.0)) == 0
    optimizer.step()
    assert_unchanged(before, net)


def test_a_layer_without_rows_is_its_bias():
    layer = InfPiLinearReLU(3, 2)
    layer.set_rows(torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, 3))
    g = torch.randn(4, 3, requires_grad=True)
    assert torch.equal(layer(g), torch.zeros(4, 2)) and len(layer) == 0 and layer
    layer(g).sum().backward()
    assert torch.equal(g.grad, torch.zeros(4, 3))


@pytest.mark.parametrize("m", [1, 4095, 4096, 4097, 8193])
@pytest.mark.parametrize("b", [1, 1024, 1025])
def test_any_number_of_rows_and_samples_is_one_sum(m, b):
    """Blocks of rows and chunks of the batch, on both sides of their borders."""
    layer = InfPiLinearReLU(3, 2, dtype=torch.float64, bias_alpha=0)
    A, Amult = torch.randn(m, 2).double(), torch.randn(m).double()
    B = nn.functional.normalize(torch.randn(m, 3).double())
    layer.set_rows(A, Amult, B)
    g = torch.randn(b, 3, dtype=torch.float64, requires_grad=True)
    pick = torch.tensor([0, b // 2, b - 1])
    out = layer(g)
    weights = torch.randn(b, 2, dtype=torch.float64)
    (out * weights).sum().backward()
    few = g.detach()[pick].requires_grad_()
    s = few.norm(dim=1, keepdim=True)
    c = (few / s) @ B.T
    dense = s * ((((1 - c * c).sqrt() + c * torch.acos(-c)) / (2 * torch.pi) * Amult) @ A)
    torch.testing.assert_close(out[pick], dense, rtol=1e-10, atol=1e-10)
    (expected,) = torch.autograd.grad((dense * weights[pick]).sum(), few)
    torch.testing.assert_close(g.grad[pick], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "layer", [InfPiInputLinearReLU(4, 3), InfPiLinearReLU(4, 3)], ids=["input", "hidden"]
)
def test_a_wrong_last_dimension_is_named(layer):
    with pytest.raises(ValueError, match=r"4\].*\[2, 5\]"):
        layer(torch.randn(2, 5))


@pytest.mark.parametrize(
    "build",
    [
        lambda: InfPiLinearReLU(0),
        lambda: InfPiInputLinearReLU(3, 0),
        lambda: InfMLP(3, 2, 4, -1),
        lambda: InfMLP(3, 2, 4, 1).sample(0),
    ],
)
def test_impossible_sizes(build):
    with pytest.raises(ValueError):
        build()


# Rows as parameters


def test_rows_read_and_write_like_tensors():
    layer = InfPiLinearReLU(4, 3)
    assert (
        isinstance(layer.A, InfPiParameter)
        and layer.A.shape == (4, 3)
        and layer.A.numel() == 12
        and len(layer.A) == 4
    )
    assert torch.equal(layer.A * 2, layer.A.detach() * 2) and torch.equal(
        layer.A[1:3], layer.A.detach()[1:3]
    )
    with torch.no_grad():
        layer.A[0] = 7.0
        layer.Amult.mul_(2)
        nn.init.zeros_(layer.B)
    assert (
        layer.A[0].tolist() == [7.0] * 3 and layer.Amult.tolist() == [2.0] * 4 and not layer.B.any()
    )
    assert sum(p.numel() for p in layer.parameters()) == 12 + 4 + 16 + 3
    copied = layer.A.detach()
    copied.zero_()
    assert layer.A[0].tolist() == [7.0] * 3, "reading gives a copy"


def test_changing_rows_while_autograd_records_is_refused():
    layer = InfPiLinearReLU(4, 3)
    with pytest.raises(RuntimeError, match="no_grad"):
        layer.A.mul_(2)


def test_changing_rows_between_forward_and_backward_is_refused():
    for change in (
        lambda net: net.layers[1].axis.keep(torch.arange(3)),
        lambda net: net.load_state_dict(network().state_dict()),
        lambda net: net.half(),
        lambda net: pi_init(net),
    ):
        net = network()
        x, y = data()
        loss = cross_entropy(y)(net(x))
        change(net)
        with pytest.raises(RuntimeError, match="forward"):
            loss.backward()


def test_rows_appended_between_forward_and_backward_do_not_count():
    """The gradient is that of the function which ran."""
    net, x = network(), torch.randn(4, 5, dtype=torch.float64)
    expected = torch.autograd.grad(net(x.requires_grad_()).sum(), x)[0]
    net.zero_grad()
    out = net(x).sum()
    net.layers[1].axis.append(
        {
            "A": torch.randn(3, 6),
            "Amult": torch.ones(3),
            "B": nn.functional.normalize(torch.randn(3, 6)),
            "origin": torch.zeros(3, dtype=torch.long),
        }
    )
    assert torch.equal(torch.autograd.grad(out, x)[0], expected)


def test_staged_gradients_survive_zero_grad():
    net = network()
    x, y = data()
    optimizer = PiSGD(net.parameters(), lr=0.1)
    cross_entropy(y)(net(x)).backward()
    first = net.layers[1].A.grad.clone()
    stage_grad(net)
    optimizer.zero_grad()
    assert net.layers[1].A.grad is None
    cross_entropy(y)(net(x * 2)).backward()
    unstage_grad(net)
    assert torch.equal(net.layers[1].A.grad[:4], first) and len(net.layers[1].A.grad) == 8
    optimizer.step()
    assert net.rows == [14, 14]


def test_pi_init_starts_anew():
    net = network()
    x, y = data()
    cross_entropy(y)(net(x)).backward()
    PiSGD(net.parameters(), lr=0.1).step()
    pi_init(net)
    assert net.rows == [6, 6] and not net(x).any()
    for layer in net.layers[1:]:
        torch.testing.assert_close(layer.B.norm(dim=1), torch.ones(6, dtype=torch.float64))
        assert (
            torch.equal(layer.Amult.detach(), torch.ones(6, dtype=torch.float64))
            and not layer.bias.any()
        )


def test_initial_statistics():
    layer = InfPiLinearReLU(400, 100)
    assert layer.A.var().item() == pytest.approx(1 / 100, rel=0.05)
    torch.testing.assert_close(layer.B.norm(dim=1), torch.ones(400))
    assert (
        layer.B.mean().item() == pytest.approx(0, abs=1e-3)
        and (layer.B @ layer.B.T).fill_diagonal_(0).abs().max() < 0.4
    )
    torch.testing.assert_close(InfPiInputLinearReLU(30, 20).A.norm(dim=0), torch.ones(20))
    assert not InfPiLinearReLU(5, 3, output_layer=True).A.any()


# The contract of growable things


class TestInfMLP(GrowableContract):
    optimizers = (
        partial(PiSGD, lr=0.1),
        partial(PiSGD, lr=0.1, momentum=0.9, weight_decay=0.01),
        partial(PiSGD, lr=0.1, momentum=0.9, nesterov=True),
    )

    def build(self):
        generator = torch.Generator().manual_seed(1)
        net = InfMLP(3, 2, 4, 2)
        net.layers[-1].set_rows(torch.randn(4, 2), torch.ones(4), net.layers[-1].B.detach().clone())
        return net, torch.randn(5, 3, generator=generator)

    def grow(self, model):
        layer = model.layers[1]
        return layer.axis.append(
            {
                "A": torch.randn(3, 4),
                "Amult": torch.full((3,), 0.1),
                "B": nn.functional.normalize(torch.randn(3, 4)),
                "origin": torch.arange(3),
            }
        )


class TestRowsRemoved(TestInfMLP):
    def grow(self, model):
        axis = model.layers[2].axis
        return axis.keep(torch.arange(axis.size - 1).flip(0))


class TestHalfPrecisionRowsInSomeNetwork(TestInfMLP):
    """Beside ordinary layers, in a network of the user's."""

    def build(self):
        net = nn.Sequential(
            nn.Linear(3, 4), InfPiLinearReLU(4, row_dtype=torch.bfloat16), InfPiLinearReLU(4, 2)
        )
        return net, torch.randn(5, 3, generator=torch.Generator().manual_seed(1))

    def grow(self, model):
        return model[1].axis.append(
            {
                "A": torch.randn(3, 4),
                "Amult": torch.full((3,), 0.1),
                "B": nn.functional.normalize(torch.randn(3, 4)),
                "origin": torch.arange(3),
            }
        )

    def test_state_dict_survives_conversion_there_and_back(self):
        model, x = self.build()
        model.double()
        assert model(x.double()).dtype == torch.float64 and model[1].A.dtype == torch.float64


def test_rows_that_the_optimiser_followed_are_in_the_snapshot():
    net = network()
    optimizer = PiSGD(net.parameters(), lr=0.1, momentum=0.9)
    x, y = data()
    cross_entropy(y)(net(x)).backward()
    optimizer.step()
    follow(optimizer, net.layers[1].axis.keep(torch.arange(7)))
    state = snapshot(net, optimizer)
    assert state["structure"] == {"layers.1": {"rows": 7}, "layers.2": {"rows": 10}}
    assert state["optimizer"]["state"]["layers.1.Amult"]["momentum_buffer"].shape == (7,)
