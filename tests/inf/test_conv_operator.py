"""The chunked convolution of features against its definition in plain torch, for odd shapes on
purpose."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pilimit_lib.inf.conv.autograd import feature_conv2d
from pilimit_lib.inf.conv.chunks import chunks
from pilimit_lib.inf.conv.geometry import Geometry, pair, same_padding
from pilimit_lib.inf.conv.positions import Positions, weights
from pilimit_lib.inf.conv.sums import (
    LARGEST,
    backward,
    forward,
    plain,
    positions_at_once,
)
from pilimit_lib.inf.dual.features import PolynomialFeatures
from pilimit_lib.inf.dual.hermite import hermite_series

GEOMETRIES = {
    "same": Geometry((3, 3), padding=(1, 1)),
    "wide": Geometry((5, 5), padding=(2, 2)),
    "even": Geometry((2, 4), padding=(1, 2)),
    "strided": Geometry((3, 2), (2, 3), (1, 0), (2, 1)),
    "skipping": Geometry((1, 1), (2, 2)),
    "dilated": Geometry((3, 3), padding=(2, 2), dilation=(2, 2)),
    "far padding": Geometry((5, 5), padding=(4, 4)),
    "pooled": Geometry((3, 3), padding=(1, 1), pool=(2, 2)),
    "pooled and strided": Geometry((2, 2), (2, 2), (1, 1), pool=(2, 3)),
    "beyond the map": Geometry((3, 3), padding=(12, 12), dilation=(12, 12)),
}


def features_of(r: int, degree: int = 2, activation: str = "relu") -> PolynomialFeatures:
    return PolynomialFeatures(r, hermite_series(activation, degree, "minimax").kappa)


def example(features: PolynomialFeatures, geometry: Geometry, size=(9, 10), b: int = 3, o: int = 2):
    torch.manual_seed(0)
    g = torch.randn(b, features.r, *size, dtype=torch.float64, requires_grad=True)
    V = torch.randn(features.P, *geometry.kernel, o, dtype=torch.float64, requires_grad=True)
    return g, V


def agree(
    features: PolynomialFeatures,
    g,
    V,
    geometry: Geometry,
    layernorm: bool,
    chunk_elements: int | None,
) -> None:
    expected = plain(features, g, V, geometry, layernorm)
    found = feature_conv2d(features, g, V, geometry, layernorm, chunk_elements)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    for name, a, b in zip(
        "gV", *(torch.autograd.grad((out * weight).sum(), (g, V)) for out in (found, expected))
    ):
        torch.testing.assert_close(
            a, b, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"∂{name}: {text}"
        )


@pytest.mark.parametrize("layernorm", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_chunks_make_the_convolution_of_the_definition(name, layernorm):
    features = features_of(4)
    g, V = example(features, GEOMETRIES[name])
    for positions in (None, 3, 11, 100):
        agree(features, g, V, GEOMETRIES[name], layernorm, positions and positions * features.P)


@pytest.mark.parametrize(
    "r, degree, activation",
    [(1, 2, "relu"), (5, 4, "relu"), (3, 3, "tanh"), (6, 1, "erf"), (2, 5, "gelu")],
)
def test_any_rank_degree_and_activation(r, degree, activation):
    features = features_of(r, degree, activation)
    for name in ("same", "pooled"):
        agree(
            features,
            *example(features, GEOMETRIES[name], (5, 6)),
            GEOMETRIES[name],
            False,
            7 * features.P,
        )


@given(st.data())
def test_any_geometry(data):
    def draw(least, most):
        return data.draw(st.integers(least, most)), data.draw(st.integers(least, most))

    geometry, size = (
        Geometry(draw(1, 4), draw(1, 3), draw(0, 3), draw(1, 3), draw(1, 2)),
        draw(1, 9),
    )
    features = features_of(2)
    if min(geometry.output(size)) < 1 or min(geometry.pooled(size)) < 1:
        return
    agree(
        features,
        *example(features, geometry, size, b=2),
        geometry,
        False,
        data.draw(st.integers(1, 200)),
    )


def test_a_matrix_of_weights_and_raw_monomials_is_the_feature_map():
    for r, degree in ((4, 2), (3, 4), (5, 3)):
        features = features_of(r, degree, "gelu")
        g = torch.randn(r, 6, dtype=torch.float64)
        phi = g.new_empty(features.P, 6)
        Positions(features, g, layernorm=True).write(phi)
        torch.testing.assert_close(
            (phi * weights(features, g)[:, None]).T, features.matrix((g / g.norm(dim=0)).T)
        )


def test_where_g_is_zero_nothing_comes_out_and_no_gradient():
    features = features_of(3)
    g, V = example(features, GEOMETRIES["skipping"])
    with torch.no_grad():
        g[1] = 0
    for layernorm in (False, True):
        out = feature_conv2d(features, g, V, Geometry((1, 1)), layernorm)
        assert not out[1].any() and out[0].any()
        (grad,) = torch.autograd.grad(out.sum(), g)
        assert not grad[1].any() and bool(grad.isfinite().all())


def test_every_position_is_in_exactly_one_chunk():
    geometry = Geometry((3, 3), (2, 3), (1, 1))
    counts = torch.zeros(1, 5, 9, 10)
    for phase in geometry.phases():
        for chunk in chunks(geometry, phase, 5, (9, 10), positions=8):
            for window in chunk.windows(counts):
                window += 1
    assert bool((counts == 1).all())


def test_phases_without_offsets_are_left_out():
    assert [phase.start for phase in Geometry((1, 1), (2, 2)).phases()] == [(0, 0)]
    assert sum(len(phase.taps) for phase in Geometry((3, 3), (2, 2), (1, 1)).phases()) == 9


def test_memory_of_phi_is_bounded():
    assert positions_at_once(153, 153 * 50) == 50
    for P in (1, 45, 153, 2145, 80_601, 10**8):
        assert positions_at_once(P) * P <= max(LARGEST, P)
    geometry = GEOMETRIES["same"]
    sizes = [
        chunk.positions
        for phase in geometry.phases()
        for chunk in chunks(geometry, phase, 3, (40, 40), 100)
    ]
    assert max(sizes) <= 100 and sizes[0] == max(sizes) and sum(sizes) == 3 * 40 * 40


def test_only_what_is_needed_is_computed_and_second_derivatives_are_those_of_the_definition():
    features, geometry = features_of(2), GEOMETRIES["same"]
    g, V = example(features, geometry, (2, 3), b=1)
    flat = g.detach().transpose(0, 1)
    grad = torch.randn_like(forward(features, flat, V, geometry))
    assert backward(features, flat, V, geometry, grad, False, True)[0] is None
    assert backward(features, flat, V, geometry, grad, True, False)[1] is None
    assert torch.autograd.gradgradcheck(
        lambda g, V: feature_conv2d(features, g, V, geometry), (g, V), atol=1e-6
    )


def test_layouts_and_precisions():
    features, geometry = features_of(3), GEOMETRIES["same"]
    g, V = (tensor.detach().float() for tensor in example(features, geometry))
    expected = feature_conv2d(features, g, V, geometry)
    torch.testing.assert_close(
        feature_conv2d(features, g.to(memory_format=torch.channels_last), V, geometry), expected
    )
    torch.testing.assert_close(
        feature_conv2d(features, g.transpose(0, 1).contiguous().transpose(0, 1), V, geometry),
        expected,
    )
    half = feature_conv2d(features, g.bfloat16(), V.bfloat16(), geometry)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(feature_conv2d(features, g, V, geometry), expected)


def test_arguments_in_the_manner_of_conv2d():
    assert pair(3, "kernel_size", 1) == (3, 3) and pair((3, 1), "kernel_size", 1) == (3, 1)
    for value in (0, (1, 0), (1, 2, 3), 1.5, True):
        with pytest.raises((ValueError, TypeError)):
            pair(value, "kernel_size", 1)
    assert same_padding((3, 5), (1, 1), (2, 1)) == (2, 2)
    with pytest.raises(ValueError, match="padding='same' needs stride 1 and an odd kernel"):
        same_padding((2, 3), (1, 1), (1, 1))
