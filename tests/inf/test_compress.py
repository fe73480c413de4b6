"""Rows in bounded memory: what is folded, merged and compressed stays within the bound that the
operation reports."""

import copy

import pytest
import torch
from torch import nn

from pilimit_lib.core import batch, restore, snapshot
from pilimit_lib.inf import InfMLP, InfPiLinearReLU, PiSGD, clip_grad_norm_, param_groups
from pilimit_lib.inf.dual.relu import relu_k
from pilimit_lib.inf.rows.merge import displacement


def layer_with_rows(m=60, r=6, o=3, samples=15, layernorm=False, **options):
    """Rows of `samples` samples, several of each, near each other."""
    layer = InfPiLinearReLU(r, o, bias_alpha=0, layernorm=layernorm, dtype=torch.float64, **options)
    centre = torch.randn(samples, r, dtype=torch.float64)
    origin = torch.arange(m) % samples
    B = centre[origin] + 0.25 * torch.randn(m, r, dtype=torch.float64)
    layer.set_rows(
        torch.randn(m, o, dtype=torch.float64),
        0.3 * torch.randn(m, dtype=torch.float64),
        B / torch.linalg.vector_norm(B, dim=1, keepdim=True),
        origin,
    )
    return layer.requires_grad_(False)


def outputs_and_jacobians(layer, g):
    with torch.no_grad():
        out = layer(g)
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(lambda h: layer(h[None])[0], x) for x in g]
    )
    return out, jacobian


def assert_within(report, before, after, g, layernorm=False):
    """Outputs and Jacobians at `g` moved by no more than was reported, and by enough for the bound
    to mean something."""
    scale = 1 if layernorm else torch.linalg.vector_norm(g, dim=1)
    moved = (torch.linalg.vector_norm(after[0] - before[0], dim=1) / scale).max()
    slope = torch.linalg.matrix_norm(after[1] - before[1], 2).max()
    if layernorm:
        slope = (
            torch.linalg.matrix_norm(after[1] - before[1], 2) * torch.linalg.vector_norm(g, dim=1)
        ).max()
    assert moved <= report.output_bound + 1e-9
    assert slope <= report.gradient_bound + 1e-9
    return float(moved)


def directions(n=40, r=6):
    return 2 * torch.randn(n, r, dtype=torch.float64)


@pytest.mark.parametrize("layernorm", [False, True])
@pytest.mark.parametrize("cosine", [0.6, 0.9, 0.97])
def test_merge_sums_rows_of_one_sample_within_its_bound(cosine, layernorm):
    layer, g = layer_with_rows(layernorm=layernorm), directions()
    before, A, origin = (
        outputs_and_jacobians(layer, g),
        layer.A * layer.Amult[:, None],
        layer.origin,
    )
    report = layer.merge(cosine)
    moved = assert_within(report, before, outputs_and_jacobians(layer, g), g, layernorm)
    assert report.rows_before == 60 and 15 <= report.rows_after == len(layer) < 60 and moved > 0
    for sample in range(15):
        torch.testing.assert_close(
            (layer.A * layer.Amult[:, None])[layer.origin == sample].sum(0),
            A[origin == sample].sum(0),
        )
    lengths = torch.linalg.vector_norm(layer.B.blocks.dense(), dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_merging_rows_that_pull_alike_errs_in_second_order_of_the_angle():
    """Half the angle between the directions: a quarter of the error."""
    g, errors = directions(), []
    for angle in (0.1, 0.05):
        layer = InfPiLinearReLU(6, 3, bias_alpha=0, dtype=torch.float64).requires_grad_(False)
        B = torch.eye(6, dtype=torch.float64)[:2].clone()
        B[1] = torch.cos(torch.tensor(angle)) * B[0] + torch.sin(torch.tensor(angle)) * B[1]
        B /= torch.linalg.vector_norm(B, dim=1, keepdim=True)
        a = torch.tensor([[1.0, 2, -1]], dtype=torch.float64)
        layer.set_rows(
            torch.cat([a, 3 * a]),
            torch.ones(2, dtype=torch.float64),
            B,
            torch.zeros(2, dtype=torch.long),
        )
        before = layer(g)
        assert layer.merge(0.9).rows_after == 1
        errors.append(float((layer(g) - before).norm()))
    assert 3 < errors[0] / errors[1] < 5


def test_rows_of_the_same_direction_merge_without_error():
    layer = layer_with_rows()
    A, Amult, B = (getattr(layer, name).blocks.dense() for name in ("A", "Amult", "B"))
    layer.set_rows(
        torch.cat([A, 2 * A]),
        torch.cat([Amult, Amult]),
        torch.cat([B, B]),
        torch.arange(60).repeat(2),
    )
    g = directions()
    before = outputs_and_jacobians(layer, g)
    report = layer.merge(0.999)
    assert len(layer) == 60 and report.output_bound < 1e-6
    torch.testing.assert_close(outputs_and_jacobians(layer, g), before, rtol=1e-10, atol=1e-10)


def test_merge_leaves_unknown_samples_and_other_rows_alone():
    layer = layer_with_rows()
    rows = [getattr(layer, name).blocks.dense() for name in ("A", "Amult", "B")]
    layer.set_rows(*rows, torch.full((60,), -1))
    assert layer.merge(-1).rows_after == 60
    layer.set_rows(*rows, torch.arange(60))
    report = layer.merge(-1)
    assert report.rows_after == 60 and report.output_bound == 0
    assert all(
        torch.equal(a, getattr(layer, name).blocks.dense())
        for a, name in zip(rows, ("A", "Amult", "B"))
    )


def test_displacement_is_the_distance_of_two_functions():
    x, y = torch.nn.functional.normalize(torch.randn(2, 1, 5, dtype=torch.float64), dim=2)
    c = (x * y).sum(1)
    squared = relu_k(torch.ones(1).double()) * 2 - 2 * relu_k(c)
    torch.testing.assert_close(displacement(c), squared.sqrt())


@pytest.mark.parametrize("degree, fit", [(2, "hermite"), (2, "minimax"), (4, "hermite")])
def test_fold_keeps_the_newest_rows_and_its_bound(degree, fit):
    from pilimit_lib.inf.rows.limits import fold

    layer, g = layer_with_rows(row_budget=60, degree=degree, fit=fit), directions()
    before, B, whole = (
        outputs_and_jacobians(layer, g),
        layer.B.blocks.dense(),
        layer.to_moments(degree, fit),
    )
    report = fold(layer, 20)
    moved = assert_within(report, before, outputs_and_jacobians(layer, g), g)
    assert len(layer) == 20 and torch.equal(layer.B.blocks.dense(), B[40:]) and moved > 1e-6
    assert int(layer.folded.rows) == 40 and float(layer.folded.error) == pytest.approx(
        report.output_bound
    )
    # Folding first or last, all rows end up as the same moments.
    torch.testing.assert_close(layer.to_moments()(g), whole(g), rtol=1e-12, atol=1e-12)


def test_folding_everything_is_to_moments():
    from pilimit_lib.inf.rows.limits import fold

    layer, g = layer_with_rows(row_budget=0, degree=4), directions()
    expected = InfPiLinearReLU(6, 3, bias_alpha=0, dtype=torch.float64)
    expected.set_rows(*(getattr(layer, name).blocks.dense() for name in ("A", "Amult", "B")))
    fold(layer, 0)
    torch.testing.assert_close(layer(g), expected.to_moments(4)(g), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="folded already"):
        layer.to_moments(2)


@pytest.mark.parametrize("layernorm", [False, True])
@pytest.mark.parametrize("tol", [0.3, 0.05, 1e-3])
def test_compress_reaches_its_tolerance_and_reports_true_errors(tol, layernorm):
    layer, g = layer_with_rows(layernorm=layernorm), directions()
    before = outputs_and_jacobians(layer, g)
    f, old = layer.A * layer.Amult[:, None], layer.B.blocks.dense()
    report = layer.compress(tol)
    assert_within(report, before, outputs_and_jacobians(layer, g), g, layernorm)
    # The reported distance, from scratch: the function's norm in the kernel's space, of the
    # difference of both layers.
    a = torch.cat([layer.A * layer.Amult[:, None], -f])
    B = torch.cat([layer.B.blocks.dense(), old])
    exact = ((a @ a.T) * relu_k(B @ B.T)).sum().clamp_min(0).sqrt()
    assert float(exact) == pytest.approx(report.rkhs_error, rel=1e-4, abs=1e-7)
    assert report.rkhs_error <= tol * report.rkhs_norm
    assert float(((f @ f.T) * relu_k(old @ old.T)).sum().sqrt()) == pytest.approx(report.rkhs_norm)
    assert report.rows_after == len(layer) < 60 if tol > 0.01 else len(layer) <= 60
    assert 0 < report.output_change < 2 * tol


def test_compress_to_less_tolerance_keeps_more_rows():
    counts = []
    for tol in (0.5, 0.2, 0.05, 0.01):
        torch.manual_seed(0)
        counts.append(layer_with_rows().compress(tol).rows_after)
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_compress_without_tolerance_changes_nothing_but_drops_what_adds_nothing():
    layer, g = layer_with_rows(), directions()
    A, Amult, B = (getattr(layer, name).blocks.dense() for name in ("A", "Amult", "B"))
    layer.set_rows(
        torch.cat([A, A, 0 * A]), torch.cat([Amult, Amult, Amult]), torch.cat([B, B, -B])
    )
    before = outputs_and_jacobians(layer, g)
    report = layer.compress(0)
    assert report.rows_after == 60 and report.rows_before == 180
    torch.testing.assert_close(outputs_and_jacobians(layer, g), before, rtol=1e-7, atol=1e-7)


def test_fresh_readout_compresses_to_nothing():
    layer = InfPiLinearReLU(5, 3, output_layer=True)
    report = layer.compress(0.1)
    assert len(layer) == 0 and report.rows_before == 5 and report.output_bound == 0
    assert not layer(torch.randn(2, 5)).any()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda n: n.merge(2), "from -1 to 1"),
        (lambda n: n.compress(1), "tol is 1"),
        (lambda n: n.compress(-0.1), "tol is -0.1"),
    ],
)
def test_settings_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call(InfMLP(4, 2, 3, 1))


def test_moments_have_nothing_to_compress():
    net = InfMLP(4, 2, 3, 1, memory="moments")
    with pytest.raises(ValueError, match="compress works on rows"):
        net.compress(0.1)
    with pytest.raises(ValueError, match="merge works on rows"):
        net.merge()


def task():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    return x, x[:, :3].argmax(1)


def train(net, steps=30, ids=True, **options):
    x, y = task()
    optimizer = PiSGD(param_groups(net, 0.5, 1e-3), **options)
    losses = []
    for step in range(steps):
        part = torch.arange(10 * step, 10 * step + 10) % 40
        optimizer.zero_grad()
        if ids:
            with batch(part):
                output = net(x[part])
        else:
            output = net(x[part])
        loss = nn.functional.cross_entropy(output, y[part])
        loss.backward()
        clip_grad_norm_(net, 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses


def network(**options):
    torch.manual_seed(0)
    return InfMLP(8, 3, 7, 1, bias_alpha=0.5, **options)


def test_row_budget_is_kept_at_every_step_and_training_stays_close():
    exact, bounded = network(), network(row_budget=50, degree=4, fit="minimax")
    losses = train(exact), train(bounded)
    assert exact.rows == [307, 307] and bounded.rows == [50, 50]
    assert [int(layer.folded.rows) for layer in bounded.layers[1:]] == [257, 257]
    assert max(abs(a - b) for a, b in zip(*losses)) < 0.01
    assert losses[0][-1] < 0.9 * losses[0][0]
    x, _ = task()
    # The last rows are bit for bit those that this network appended, and the sampled twin has the
    # same limit.
    twin = torch.stack([bounded.sample(2048)(x).detach() for _ in range(6)]).mean(0)
    assert float((twin - bounded(x).detach()).square().mean().sqrt()) < 0.05 * float(
        bounded(x).detach().square().mean().sqrt()
    )


def test_a_budget_means_the_same_for_either_memory():
    nets = network(row_budget=50), network(row_budget=50, memory="moments")
    assert train(nets[0]) == train(nets[1])
    assert InfMLP.from_state_dict(nets[1].state_dict()).rows == [50, 50]


def test_a_budget_beyond_the_run_changes_nothing():
    exact, bounded = network(), network(row_budget=1000)
    assert train(exact) == train(bounded)


def test_merging_while_training_bounds_rows_per_sample():
    exact, merged = network(), network(merge=0.8)
    losses = train(exact, 60), train(merged, 60)
    assert max(merged.rows) < 7 + 3 * 40 < min(exact.rows)
    assert abs(losses[0][-1] - losses[1][-1]) < 0.1 * losses[0][-1]
    for layer, plain in zip(merged.layers[1:], exact.layers[1:]):
        assert int(layer.limits.merged) + len(layer) == len(plain)
        assert 0 < float(layer.limits.error)


def test_merge_of_identical_batches_with_frozen_features_is_exact():
    """The readout sees the same directions again: one row per sample, and the very same
    function."""
    nets = network(), network(merge=0.9999)
    for net in nets:
        for layer in net.layers[:-1]:
            layer.requires_grad_(False)
        train(net, 20)
    x, _ = task()
    assert nets[1].rows[1] == 7 + 40 and nets[0].rows[1] == 7 + 200
    torch.testing.assert_close(nets[0](x), nets[1](x), rtol=1e-5, atol=1e-6)


def test_merge_and_budget_together():
    net = network(merge=0.8, row_budget=30)
    train(net, 40)
    assert max(net.rows) <= 30
    for layer in net.layers[1:]:
        assert int(layer.limits.merged) + int(layer.folded.rows) + len(layer) == 7 + 400


def test_unnamed_samples_can_not_be_merged_and_nothing_is_stepped():
    net = network(merge=0.9)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="batch"):
        train(net, 1, ids=False)
    assert all(
        torch.equal(value, before[name])
        for name, value in net.state_dict().items()
        if isinstance(value, torch.Tensor)
    )


def test_momentum_on_bounded_rows_is_refused():
    with pytest.raises(ValueError, match="memory='moments'"):
        train(network(row_budget=20), 1, momentum=0.9)


def test_bounded_rows_resume_bit_for_bit():
    for options in ({"row_budget": 30}, {"merge": 0.8}):
        net = network(**options)
        train(net, 10)
        saved = snapshot(net)
        expected = train(net, 10)
        fresh = network(**options)
        train(fresh, 3)
        restore(fresh, saved)
        assert train(fresh, 10) == expected
        assert torch.equal(net.layers[1].limits.error, fresh.layers[1].limits.error)


def test_bounded_rows_survive_conversion_and_copying():
    net = network(row_budget=30, merge=0.8)
    train(net, 10)
    x, _ = task()
    expected = net(x)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), expected)
    train(twin, 5)
    assert torch.equal(net(x), expected)
    error = net.layers[1].folded.error.clone()
    net.half()
    assert net.layers[1].folded.V.dtype == torch.float32 and torch.equal(
        net.layers[1].folded.error, error
    )
    net.float()
    torch.testing.assert_close(net(x), expected, rtol=2e-2, atol=2e-2)
    assert net.layers[1].row_bytes == 4 * (30 * 14 + 36 * 7)


def test_whole_network_is_compressed():
    net = network()
    train(net)
    x, _ = task()
    expected = net(x).detach()
    reports = net.compress(0.02)
    assert [r.rows_after for r in reports] == net.rows and max(net.rows) < 307
    gap = (net(x).detach() - expected).norm() / expected.norm()
    assert 0 < float(gap) < 0.05
    assert [r.action for r in net.merge(0.9)] == ["merge", "merge"]


@pytest.mark.parametrize(
    "row_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8]
)
@pytest.mark.parametrize("spread", [0.0, 1e-4, 1e-2, 1.0])
def test_bounds_hold_for_rows_as_they_are_stored(row_dtype, spread):
    """Near copies of a few directions, whose lengths are not 1 after rounding: what epochs of the
    same samples leave."""
    torch.manual_seed(0)
    B = torch.randn(10, 4).repeat(20, 1) + spread * torch.randn(200, 4)
    g = torch.randn(300, 4, dtype=torch.float64 if row_dtype == torch.float64 else torch.float32)
    for tol in (0, 1e-3, 1e-1):
        layer = InfPiLinearReLU(4, 3, bias_alpha=0, row_dtype=row_dtype).requires_grad_(False)
        layer.set_rows(
            torch.randn(200, 3),
            torch.rand(200) - 0.5,
            B / torch.linalg.vector_norm(B, dim=1, keepdim=True),
        )
        before = layer(g)
        report = layer.compress(tol)
        moved = (
            torch.linalg.vector_norm(layer(g) - before, dim=1) / torch.linalg.vector_norm(g, dim=1)
        ).max()
        assert moved <= report.output_bound and report.rows_after < 200 + (spread == 1)
        # no coefficients that cancel each other
        assert float(layer.A.blocks.dense().abs().max()) < 1e3


@pytest.mark.parametrize("row_dtype", [torch.bfloat16, torch.int8])
def test_a_trained_network_of_few_bits_survives_compression(row_dtype):
    net = network(row_dtype=row_dtype)
    train(net)
    x, _ = task()
    expected = net(x).detach()
    net.compress(0.01)
    assert float((net(x).detach() - expected).norm() / expected.norm()) < 0.1
