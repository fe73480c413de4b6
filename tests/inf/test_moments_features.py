"""The feature map: its inner products are the kernel, its tiles are a partition, its hand-written
backward is autograd's."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pilimit_lib.inf.dual.features import (
    Adjoint,
    Basis,
    PolynomialFeatures,
    column_indices,
    diagonal_sums,
)
from pilimit_lib.inf.moments import sums as fl
from pilimit_lib.inf.moments.autograd import feature_linear

KAPPAS = [
    [0.3, 0.2, 0.1],
    [0.2, 0.3, 0.1, 0.4],
    [0.1, 0, 0.2, 0, 0.3],
    [0, 0.2, 0, 0.3],
    [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
    [0, 0.4],
    [0.2],
    [0, 0, 0.7],
]


def unit(b, r, seed=0):
    u = torch.randn(b, r, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return u / torch.linalg.vector_norm(u, dim=1, keepdim=True)


@given(st.integers(1, 9), st.sampled_from(KAPPAS), st.integers(1, 400), st.integers(0, 99))
def test_inner_products_of_features_are_the_kernel(r, kappa, tile_elements, seed):
    features = PolynomialFeatures(r, kappa, tile_elements)
    u = unit(5, r, seed)
    phi = features.matrix(u)
    assert phi.shape == (5, features.P)
    torch.testing.assert_close(phi @ phi.T, features.kernel(u @ u.T), rtol=1e-12, atol=1e-12)


@given(st.integers(1, 9), st.sampled_from(KAPPAS), st.integers(1, 400), st.integers(1, 40))
def test_tiles_are_a_partition_of_bounded_size(r, kappa, tile_elements, batch):
    features, end = PolynomialFeatures(r, kappa, tile_elements), 0
    for tile in features.tiles(batch):
        assert tile.start == end and tile.stop > tile.start
        assert len(tile) == sum(len(segment) for segment in tile.segments) and len(
            tile
        ) <= features.columns(batch)
        # never less than one row of the rectangle
        assert len(tile) * batch <= max(tile_elements, r * batch)
        end = tile.stop
    assert end == features.P


def test_all_degrees_present_make_the_binomial_count():
    assert PolynomialFeatures(100, [1, 1, 1]).P == math.comb(102, 2)
    assert PolynomialFeatures(11, [1, 1, 1, 1, 1]).P == math.comb(15, 4)
    assert PolynomialFeatures(11, [1, 1, 1, 0, 1]).P == math.comb(15, 4) - math.comb(13, 3)


@given(st.integers(1, 8), st.sampled_from(KAPPAS), st.integers(1, 300))
def test_adjoint_is_the_gradient_of_the_tiles(r, kappa, tile_elements):
    features, u = PolynomialFeatures(r, kappa, tile_elements), unit(4, r).requires_grad_()
    phi = features.matrix(u)
    grad = torch.randn(phi.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = (
        torch.autograd.grad((phi * grad).sum(), u)[0] if phi.requires_grad else torch.zeros_like(u)
    )
    with torch.no_grad():
        adjoint = Adjoint(features, Basis(features, u))
        for tile in features.tiles(4):
            adjoint.add(tile, grad[:, tile.start : tile.stop].T.contiguous())
        torch.testing.assert_close(adjoint.total(), expected, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 5), st.integers(1, 6))
def test_diagonal_sums(n, w):
    values, factor = torch.arange(2.0 * n * w).reshape(n, w, 2), torch.arange(2.0 * w).reshape(w, 2)
    expected = torch.zeros(n + w - 1, 2)
    for d in range(n):
        expected[d : d + w] += values[d] * factor
    assert torch.equal(diagonal_sums(values, factor), expected)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_columns_are_the_monomials_that_they_are_said_to_be(kappa):
    features, u = PolynomialFeatures(5, kappa), unit(3, 5)
    phi = features.matrix(u)
    for degree in features.degrees:
        index = column_indices(features, degree)
        assert (
            len({tuple(row) for row in index.tolist()})
            == len(index)
            == math.comb(5 + degree - 1, degree)
        )
        for column, row in enumerate(index.tolist()):
            weight = math.factorial(degree) / math.prod(
                math.factorial(row.count(i)) for i in set(row)
            )
            expected = math.sqrt(kappa[degree] * weight) * torch.stack(
                [u[:, i] for i in row] or [torch.ones(3).double()]
            ).prod(0)
            torch.testing.assert_close(
                phi[:, features.starts[degree] + column], expected, rtol=1e-12, atol=1e-14
            )


@pytest.mark.parametrize("kappa", [[0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.1, 0, 0.2, 0, 0.3]])
@pytest.mark.parametrize("r", [5, 6])
@pytest.mark.parametrize("batch_chunk", [3, 1024])
def test_forward_backward_and_update_without_features(kappa, r, batch_chunk, monkeypatch):
    monkeypatch.setattr(fl, "BATCH_CHUNK", batch_chunk)
    monkeypatch.setattr(fl, "BLOCK_ELEMENTS", 11)
    features = PolynomialFeatures(r, kappa, 60)
    u, V = (
        unit(7, r).requires_grad_(),
        torch.randn(features.P, 4, dtype=torch.float64, requires_grad=True),
    )
    grad = torch.randn(7, 4, dtype=torch.float64)
    out = features.matrix(u) @ V
    expected = torch.autograd.grad(out, (u, V), grad)
    torch.testing.assert_close(fl.forward(features, u, V), out.detach(), rtol=1e-12, atol=1e-12)
    du, dV = fl.backward(features, u, V, grad, True, True)
    torch.testing.assert_close((du, dV), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        fl.factored_norm(features, u.detach(), grad), torch.linalg.vector_norm(dV)
    )
    updated = V.detach().clone()
    fl.update_(features, updated, u.detach(), grad, -0.3, 0.9)
    torch.testing.assert_close(updated, 0.9 * V.detach() - 0.3 * dV, rtol=1e-12, atol=1e-12)


def test_lower_monomials_stay_small_beside_the_moments():
    for r, degree, o in ((100, 2, 100), (64, 4, 8), (100, 4, 100), (10, 3, 10)):
        features = PolynomialFeatures(r, [0.1] * (degree + 1))
        lower = sum(math.comb(r + d - 1, d) for d in range(2, degree))
        size = fl.samples_at_once(features, o)
        assert 1 <= size <= 1024 and size * lower <= max(1 << 22, features.P * o / 8)
        assert size == 1024 or (size + 1) * lower > 1 << 22


def test_a_batch_in_pieces_is_rounded_once(monkeypatch):
    features, u, delta = (
        PolynomialFeatures(5, [0.3, 0.2, 0.1]),
        unit(9, 5).float(),
        torch.randn(9, 4),
    )
    V = torch.randn(features.P, 4).bfloat16()
    whole, pieces = V.clone(), V.clone()
    fl.update_(features, whole, u, delta, -0.1)
    monkeypatch.setattr(fl, "BATCH_CHUNK", 2)
    fl.update_(features, pieces, u, delta, -0.1)
    torch.testing.assert_close(pieces, whole, rtol=2**-7, atol=0)


def test_gradients_to_second_order():
    features = PolynomialFeatures(3, [0.2, 0.3, 0.1, 0.2])
    u, V = (
        unit(2, 3).requires_grad_(),
        torch.randn(features.P, 2, dtype=torch.float64, requires_grad=True),
    )

    def function(u, V):
        return feature_linear(features, u, V)

    assert torch.autograd.gradcheck(function, (u, V))
    assert torch.autograd.gradgradcheck(function, (u, V))


def test_half_precision_moments_are_summed_in_float32():
    features = PolynomialFeatures(40, [0.16, 0.25, 0.08])
    u = unit(6, 40).float()
    V = torch.randn(features.P, 3).bfloat16()
    exact = features.matrix(u.double()) @ V.double()
    assert torch.equal(fl.forward(features, u, V), fl.forward(features, u, V.float()))
    torch.testing.assert_close(fl.forward(features, u, V).double(), exact, rtol=1e-5, atol=1e-5)
    du, dV = fl.backward(features, u, V, torch.ones(6, 3), True, True)
    assert du.dtype == torch.float32 and dV.dtype == torch.bfloat16
