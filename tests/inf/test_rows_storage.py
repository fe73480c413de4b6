"""Rows in eight bits and lazily scaled multipliers, against float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pilimit_lib.core import Blocks, batch, restore, snapshot
from pilimit_lib.inf import InfMLP, InfPiLinearReLU, PiSGD, param_groups
from pilimit_lib.inf.rows.quantized import QuantizedBlocks, quantize

from . import test_rows
from .nets import assert_unchanged, cross_entropy, data, network, tensors


def small(row_dtype=torch.int8, **settings):
    net = InfMLP(5, 3, 6, 1, row_dtype=row_dtype, **settings)
    net.load_state_dict(network(dtype=torch.float32, **settings).state_dict())
    return net


def steps(net, count, momentum=0.0, optimizer=None):
    optimizer = optimizer or PiSGD(net.parameters(), lr=0.2, momentum=momentum, weight_decay=0.1)
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        x, y = torch.randn(4, 5, generator=generator), torch.randint(3, (4,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(x.to(net.layers[0].A)), y).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("n", [1, 2, 10, 400])
def test_error_of_a_row_and_of_its_sum(n):
    rows = torch.randn(50, n) * torch.logspace(-8, 8, 50)[:, None] + torch.randn(50, 1)
    codes = quantize(rows)
    read = codes.scale[:, None].double() * codes.codes.double() + codes.shift[:, None].double()
    spread = rows.amax(1) - rows.amin(1)
    error = (read - rows.double()).abs().amax(1)
    assert (error <= spread.double() / 254 * 1.001 + 1e-6 * rows.abs().amax(1)).all()
    assert ((read.sum(1) - rows.double().sum(1)).abs() <= 3e-7 * n * rows.abs().amax(1)).all()
    # others are equal up to their own rounding
    used = codes.codes.abs().amax(1)[spread > 1e-3 * rows.abs().amax(1)]
    assert codes.codes.abs().max() <= 127 and (used >= 126).all() and (n == 1 or len(used) > 25)


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(3, 4), torch.ones(3, 4) * 7, torch.tensor([[1e30, -1e30]]), torch.zeros(0, 4)],
)
def test_rows_at_the_edge(rows):
    blocks = QuantizedBlocks((rows.shape[1],), block_rows=2)
    blocks.append(rows)
    torch.testing.assert_close(blocks.dense(), rows, rtol=1e-2, atol=0)


def test_a_row_that_is_not_finite_stays_so():
    blocks = QuantizedBlocks((3,))
    blocks.append(
        torch.tensor([[1.0, float("nan"), 2.0], [1.0, float("inf"), 2.0], [1.0, 2.0, 3.0]])
    )
    assert (~blocks.dense()[:2].isfinite()).any(1).all() and blocks.dense()[2].isfinite().all()


def test_gradients_of_a_softmax_leave_no_shift_common_to_all_outputs():
    """Their rows sum to zero; rounded ones would not, and what that adds up to is what an MSE or an
    embedding sees."""
    A = torch.randn(2000, 10).softmax(1) - F.one_hot(torch.randint(10, (2000,)), 10)
    blocks = QuantizedBlocks((10,))
    blocks.append(A)
    scale = (A.amax(1) - A.amin(1))[:, None] / 254
    rounded = scale * (A / scale).round()
    common = [
        (kept - A).double().mean(1).pow(2).mean().sqrt() for kept in (blocks.dense(), rounded)
    ]
    assert common[0] < 1e-3 * common[1]


@pytest.mark.parametrize(
    "dtype, bound", [(torch.int8, 2e-2), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)]
)
def test_outputs_and_gradients_of_rounded_rows(dtype, bound):
    """Relative to float64, at sizes where rounding of many rows has averaged."""
    m, r = 3000, 24
    A, B, amult = (
        torch.randn(m, r).double(),
        F.normalize(torch.randn(m, r).double()),
        torch.randn(m).double(),
    )
    directions, found = torch.randn(16, r), []
    for row_dtype in (torch.float64, dtype):
        layer = InfPiLinearReLU(r, bias_alpha=0, row_dtype=row_dtype)
        layer.set_rows(A, amult, B)
        g = directions.to(
            torch.float64 if row_dtype == torch.float64 else torch.float32
        ).requires_grad_()
        out = layer(g)
        out.square().sum().backward()
        found.append((out.detach().double(), g.grad.double()))
    for expected, got in zip(*found):
        assert 1e-5 < (got - expected).norm() / expected.norm() < bound


def test_rows_in_eight_bits_train_like_rows_in_float32():
    exact = network(dtype=torch.float32, bias_alpha=1)
    low = InfMLP(5, 3, 6, 1, row_dtype=torch.int8)
    low.load_state_dict(exact.state_dict())
    for net in (exact, low):
        steps(net, 10, momentum=0.5)
    x, _ = data(20, dtype=torch.float32)
    assert (low(x) - exact(x)).norm() / exact(x).norm() < 2e-2
    assert low.rows == exact.rows and low.layers[1].row_bytes == low.rows[0] * (6 + 6 + 16)
    assert low.layers[1].A.dtype == torch.float32 and "int8" in repr(low.layers[1])


def test_a_row_is_rounded_once():
    layer = InfPiLinearReLU(4, 3, row_dtype=torch.int8)
    before = [part.values.clone() for part in layer.A.blocks.parts()]
    layer.axis.append(
        {
            "A": torch.randn(2, 3),
            "Amult": torch.ones(2),
            "B": F.normalize(torch.randn(2, 4)),
            "origin": torch.zeros(2, dtype=torch.long),
        }
    )
    after = next(layer.A.blocks.parts()).values
    assert torch.equal(after[:4], before[0]) and len(after) == 6


@pytest.mark.parametrize("row_dtype", [torch.float32, torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_resumes_bit_for_bit_wherever_it_was_interrupted(row_dtype, momentum):
    """Weight decay is applied lazily, so what it has not yet done is part of a snapshot; taking one
    changes nothing."""
    net = small(row_dtype)
    optimizer = steps(net, 3, momentum)
    saved = snapshot(net, optimizer)
    twin = small(row_dtype)
    other = PiSGD(twin.parameters(), lr=0.2)
    restore(twin, saved, other)
    net.state_dict(), net.layers[1].Amult + 1, list(net.layers[1].row_blocks())
    for each, its in ((net, optimizer), (twin, other)):
        steps(each, 3, optimizer=its)
    for name, value in net.state_dict().items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, twin.state_dict()[name]), (
            name
        )


def test_weight_decay_leaves_stored_multipliers_alone():
    net = network()
    layer = net.layers[1]
    stored = (
        next(layer.Amult.blocks.parts()).values.data_ptr(),
        next(layer.Amult.blocks.parts()).values.clone(),
    )
    before = layer.Amult.detach()
    layer.Amult.blocks.scale_(0.5)
    part = next(layer.Amult.blocks.parts())
    assert (
        part.values.data_ptr() == stored[0]
        and torch.equal(part.values, stored[1])
        and part.scale == 0.5
    )
    assert torch.equal(layer.Amult.detach(), before / 2)


@pytest.mark.parametrize(
    "source, target",
    [(torch.int8, torch.float32), (torch.float32, torch.int8), (torch.int8, torch.bfloat16)],
)
def test_state_dicts_load_across_storages(source, target):
    net = small(source)
    steps(net, 2)
    other = InfMLP(5, 3, 6, 1, row_dtype=target)
    other.load_state_dict(net.state_dict())
    x, _ = data(20, dtype=torch.float32)
    torch.testing.assert_close(other(x), net(x), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    "dtype, row_dtype, settings",
    [
        *[
            (torch.float32, kind, {})
            for kind in (torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64)
        ],
        (torch.float64, None, {}),
        (torch.float64, torch.int8, {}),
        (torch.float32, torch.bfloat16, {"memory": "moments"}),
        (torch.float64, None, {"memory": "moments"}),
        (torch.float32, torch.int8, {"row_budget": 5}),
    ],
    ids=str,
)
def test_a_network_built_from_a_state_dict_has_its_dtypes(dtype, row_dtype, settings):
    net = InfMLP(5, 3, 6, 1, dtype=dtype, row_dtype=row_dtype, **settings)
    steps(net, 2)
    twin = InfMLP.from_state_dict(net.state_dict())
    x = torch.randn(4, 5, dtype=dtype)
    assert torch.equal(twin(x), net(x)) and twin(x).dtype == dtype
    assert [p.dtype for p in twin.parameters()] == [p.dtype for p in net.parameters()]
    if "memory" not in settings:
        assert [layer.A.blocks.storage for layer in twin.layers[1:]] == [row_dtype or dtype] * 2
    for name, value in net.state_dict().items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, twin.state_dict()[name]), (
            name
        )


def test_codes_become_moments():
    net = small()
    moments = InfMLP(5, 3, 6, 1, memory="moments", degree=4)
    moments.load_state_dict(net.state_dict())
    expected = copy.deepcopy(net).to_moments(degree=4)
    x, _ = data(8, dtype=torch.float32)
    torch.testing.assert_close(moments(x), expected(x), rtol=1e-4, atol=1e-5)


def test_codes_without_their_scales_are_refused_and_nothing_changes():
    net = small()
    state = net.state_dict()
    del state["layers.1.A_scale"]
    before = net.layers[1].A.detach()
    with pytest.raises(RuntimeError, match="scales"):
        nn.Module.load_state_dict(net, state)
    assert torch.equal(net.layers[1].A.detach(), before)


def test_storages_that_there_are():
    with pytest.raises(ValueError, match="int8"):
        InfPiLinearReLU(3, row_dtype=torch.int32)
    with pytest.raises(ValueError, match="float64"):
        QuantizedBlocks((3,), dtype=torch.float16)


def test_rows_too_large_for_float16_are_refused_before_anything_changes():
    net = small(torch.float16)
    optimizer = PiSGD(net.parameters(), lr=0.1)
    x, y = data(dtype=torch.float32)
    (cross_entropy(y)(net(x)) * 1e8).backward()
    with pytest.raises(FloatingPointError, match="float16"):
        optimizer.step()
    assert net.rows == [6, 6]
    skipping = PiSGD(net.parameters(), lr=0.1, on_nonfinite="skip")
    skipping.step()
    assert skipping.nonfinite_skipped and min(net.rows) == 6


def test_setting_and_loading_rows_too_large_for_float16_changes_nothing():
    net = small(torch.float16)
    layer, before = net.layers[2], tensors(net)
    with pytest.raises(ValueError, match="A has numbers up to 1e.06.*65504"):
        layer.set_rows(torch.full((2, 3), 1e6), torch.ones(2), torch.eye(6)[:2])
    for source in (small(torch.float32), small(torch.int8)):
        source.layers[2].set_rows(
            torch.randn(6, 3) * 1e7, torch.ones(6), source.layers[2].B.detach()
        )
        with pytest.raises(RuntimeError, match="layers.2.A has numbers"):
            net.load_state_dict(source.state_dict())
    assert_unchanged(before, net)
    with pytest.raises(RuntimeError, match="A has numbers"):
        layer.load_state_dict(source.layers[2].state_dict())
    assert torch.equal(layer.A.detach(), before["layers.2.A"])
    layer.set_rows(torch.full((2, 3), float("inf")), torch.ones(2), torch.eye(6)[:2])
    assert layer.A.isinf().all(), "what was Inf before is not refused"


@pytest.mark.parametrize("row_dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("lr, decay", [(1.0, 0.05), (1e-4, 0.0)])
def test_merged_rows_keep_numbers_of_ordinary_size(row_dtype, lr, decay):
    """A row that goes on absorbing others is given a new multiplier: its own decays, or is as small
    as the learning rate."""
    net = InfMLP(5, 3, 6, 1, row_dtype=row_dtype, merge=0.9)
    optimizer = PiSGD(param_groups(net, lr, decay))
    x, y = data(8, dtype=torch.float32)
    for _ in range(250 if decay else 20):
        optimizer.zero_grad()
        with batch(torch.arange(8)):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    assert loss.isfinite() and all(
        value.isfinite().all() and value.abs().max() < 10
        for value in tensors(net).values()
        if value.is_floating_point()
    )
    assert all(layer.limits.merged > 100 for layer in net.layers[1:])
    report = net.merge(0.5)
    assert (
        sum(r.rows_after for r in report) <= sum(r.rows_before for r in report)
        and net(x).isfinite().all()
    )


class TestInEightBits(test_rows.TestInfMLP):
    """The contract of growable things."""

    def build(self):
        generator = torch.Generator().manual_seed(1)
        net = InfMLP(3, 2, 4, 2, row_dtype=torch.int8)
        net.layers[-1].set_rows(torch.randn(4, 2), torch.ones(4), net.layers[-1].B.detach().clone())
        return net, torch.randn(5, 3, generator=generator)


def test_moving_blocks_is_not_an_edit():
    blocks = Blocks.of(torch.randn(7, 2), block_rows=3)
    before, edits, taken = blocks.dense(), blocks.edits, []

    def allocate(shape, dtype, device):
        taken.append(shape)
        return torch.empty(shape, dtype=dtype, device=device)

    blocks.move(allocate)
    blocks.append(torch.ones(3, 2))
    assert torch.equal(blocks.dense()[:7], before) and blocks.edits == edits and len(taken) == 4
