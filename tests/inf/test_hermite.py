"""Hermite series: closed forms, Gauss-Hermite quadrature, Monte Carlo, and the errors that a series
reports of itself."""

import math

import numpy as np
import pytest
import torch

from pilimit_lib.inf.dual.hermite import ACTIVATIONS, hermite_coefficients, hermite_series
from pilimit_lib.inf.dual.relu import relu_k

GRID = torch.linspace(-1, 1, 4001, dtype=torch.float64)


def test_relu_has_its_closed_form_coefficients():
    kappa = hermite_series("relu", 6).kappa
    expected = [
        1 / (2 * math.pi),
        1 / 4,
        1 / (4 * math.pi),
        0,
        1 / (48 * math.pi),
        0,
        1 / (160 * math.pi),
    ]
    assert kappa == pytest.approx(expected, abs=1e-12)


def test_reference_truncation_errors_of_relu():
    assert hermite_series("relu", 2).error == pytest.approx(0.0113, abs=5e-5)
    assert hermite_series("relu", 4).error == pytest.approx(0.0046, abs=5e-5)


@pytest.mark.parametrize("name", ["gelu", "erf", "tanh", "silu"])
def test_smooth_activations_agree_with_gauss_hermite_quadrature(name):
    node, weight = np.polynomial.hermite_e.hermegauss(120)
    value = ACTIVATIONS[name](torch.from_numpy(node)).numpy()
    found, k1 = hermite_coefficients(ACTIVATIONS[name], 7)
    for j in range(7):
        h = np.polynomial.hermite_e.hermeval(node, [0] * j + [1]) / math.sqrt(math.factorial(j))
        assert found[j] == pytest.approx(
            (weight * value * h).sum() / math.sqrt(2 * math.pi), abs=1e-7
        )
    assert k1 == pytest.approx((weight * value**2).sum() / math.sqrt(2 * math.pi), abs=1e-7)


@pytest.mark.parametrize("fit", ["hermite", "minimax"])
@pytest.mark.parametrize("degree", [1, 2, 4, 7])
def test_reported_error_bounds_the_kernel_of_relu_tightly(fit, degree):
    series = hermite_series("relu", degree, fit)
    worst = float((series.kernel(GRID) - relu_k(GRID)).abs().max())
    assert worst <= series.error + 1e-7
    assert worst >= series.error - 1e-5


def test_minimax_beats_hermite_and_touches_its_error_often():
    for degree, touches in ((2, 3), (4, 4)):
        best, cut = hermite_series("relu", degree, "minimax"), hermite_series("relu", degree)
        assert best.error < 0.2 * cut.error
        # Equioscillation in c² (ReLU's kernel is c/4 plus an even part): as many extremes as
        # coefficients, plus one.
        gap = (best.kernel(GRID) - relu_k(GRID))[2000:]
        at_extreme = gap.abs() > 0.99 * best.error
        signs = torch.unique_consecutive(gap[at_extreme].sign())
        assert len(signs) == touches
        assert min(best.kappa) >= 0


def test_series_is_the_dual_kernel_of_its_activation():
    """Monte Carlo of E[p(u) p(v)] for correlated normal u, v."""
    series = hermite_series("gelu", 3, "minimax")
    generator = torch.Generator().manual_seed(0)
    u, w = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    c = 0.6
    v = c * u + math.sqrt(1 - c * c) * w

    def p(z):
        basis = [torch.ones_like(z), z, (z**2 - 1) / math.sqrt(2), (z**3 - 3 * z) / math.sqrt(6)]
        return sum(a * h for a, h in zip(series.coefficients, basis))

    product = p(u) * p(v)
    assert float(product.mean()) == pytest.approx(
        float(series.kernel(torch.tensor(c, dtype=torch.float64))),
        abs=4 * float(product.std()) / 400_000**0.5,
    )


def test_a_callable_is_taken_and_kinks_at_half_integers_are_exact():
    series = hermite_series(lambda z: z.clamp(-1.5, 1.5), 3)
    expected = math.erf(1.5 / math.sqrt(2))  # E[φ(z) z] = P(|z| < 1.5)
    assert series.coefficients[1] == pytest.approx(expected, abs=1e-12)
    assert series.kappa[0] == series.kappa[2] == 0 and series.activation == "custom"


@pytest.mark.parametrize("fit", ["hermite", "minimax"])
def test_an_activation_that_works_in_place_is_the_same(fit):
    inplace = hermite_series(torch.nn.SiLU(inplace=True), 3, fit)
    assert (
        inplace.kappa == hermite_series("silu", 3, fit).kappa
        and inplace.error == hermite_series("silu", 3, fit).error
    )


@pytest.mark.parametrize("kink", [0.3, 1 / 3, 0.777])
def test_kinks_and_jumps_anywhere_are_nearly_exact(kink):
    """E[relu(z - t)] = φ(t) - t (1 - Φ(t)) and P(z > t) = 1 - Φ(t)."""
    density, above = (
        math.exp(-(kink**2) / 2) / math.sqrt(2 * math.pi),
        math.erfc(kink / math.sqrt(2)) / 2,
    )
    assert hermite_series(lambda z: torch.relu(z - kink), 2).natural[0] == pytest.approx(
        density - kink * above, abs=1e-5
    )
    assert hermite_series(lambda z: (z > kink).double(), 2).natural[0] == pytest.approx(
        above, abs=1e-3
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"activation": "reluu"}, "activation is 'reluu'; a name out of relu"),
        ({"degree": -1}, "degree is -1"),
        ({"degree": 2.5}, "degree is 2.5"),
        ({"fit": "taylor"}, "fit is 'taylor'; one of hermite, minimax"),
        ({"activation": lambda z: torch.exp(z * z)}, "no Hermite series"),
        ({"activation": lambda z: 0 * z}, "no Hermite series"),
        ({"activation": "tanh", "degree": 0}, "no part of degree 0"),
    ],
)
def test_what_can_not_be_a_series_is_said_to_be_so(arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        hermite_series(**arguments)


def test_a_module_of_float32_is_told_to_become_double():
    with pytest.raises(TypeError, match=r"float64 tensor .*\.double\(\)"):
        hermite_series(torch.nn.PReLU(), 2)
    assert hermite_series(torch.nn.PReLU().double(), 2).kappa[1] == pytest.approx((1.25 / 2) ** 2)


def test_a_function_that_changes_shape_is_refused():
    with pytest.raises(TypeError, match="same shape"):
        hermite_series(lambda z: z.sum(), 2)
