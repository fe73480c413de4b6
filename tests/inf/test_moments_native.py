"""The native sums of moments against the plain ones in float64, on every width of vector that this
processor has."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pilimit_lib.inf.dual.features import PolynomialFeatures
from pilimit_lib.inf.implementation import implementation
from pilimit_lib.inf.moments import native, sums
from pilimit_lib.inf.moments.autograd import composed, moments_output

INFO = Path("/proc/cpuinfo")
FLAGS = INFO.read_text() if INFO.is_file() else ""
SIZES = [  # odd on purpose: ranks, columns and samples that fill no vector, degrees that are absent
    (1, 1, 1, [0.16, 0.25, 0.08]),
    (2, 3, 1, [0.16, 0.25, 0.08]),
    (5, 17, 2, [0, 0.3]),
    (6, 10, 9, [0.16, 0, 0.2]),
    (7, 33, 8, [0, 0, 0.2]),
    (13, 49, 17, [0.3]),
    (20, 64, 40, [0.1, 0.2, 0.3]),
    (41, 5, 33, [0.1, 0.2, 0.3]),
]
U = 2.0**-24


@pytest.fixture(params=["x86-64-v4", "x86-64-v3", "x86-64"], ids=["AVX-512", "AVX2", "before AVX"])
def built(request, monkeypatch, tmp_path):
    needed = {"x86-64-v4": "avx512vl", "x86-64-v3": "avx2"}.get(request.param, "sse2")
    if needed not in FLAGS:
        pytest.skip(f"this processor has no {needed}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, f"-march={request.param}", "-Wno-psabi"))
    native._library.cache_clear()
    if isinstance(native._library(), str):
        pytest.skip(native._library())
    yield
    native._library.cache_clear()


def bound(terms: int, magnitude: torch.Tensor) -> torch.Tensor:
    """What float32 may be off: each term has some roundings of its own and takes part in a sum of
    `terms`, whose roundings have random signs; `magnitude` is the sum of the terms' sizes."""
    return (8 + terms**0.5) * U * magnitude + 1e-30


@pytest.mark.parametrize("threads", [1, 3])
def test_all_three_agree_with_the_plain_sums(built, threads, monkeypatch):
    monkeypatch.setattr(native, "A_THREAD", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for r, o, b, kappa in SIZES:
        features = PolynomialFeatures(r, kappa)
        u, V, delta = F.normalize(torch.randn(b, r)), torch.randn(features.P, o), torch.randn(b, o)
        assert native.refuses(features, u, V) is None
        phi, exact_V, exact_delta = features.matrix(u.double()), V.double(), delta.double()

        error = (native.forward(features, u, V) - phi @ exact_V).abs()
        assert (error <= bound(features.P, phi.abs() @ exact_V.abs())).all(), (r, o, b)

        du, dV = native.backward(features, u, V, delta, True, True)
        expected = sums.backward(features, u.double(), exact_V, exact_delta, True, True)
        error = (dV - expected[1]).abs()
        assert (error <= bound(b, phi.abs().T @ exact_delta.abs())).all(), (r, o, b)
        # ∂φ/∂u_i has at most r + 1 terms of size <= 2√κ, each times Σ_o |V δ|
        size = 2 * (r + 1) * max(kappa) ** 0.5 * (exact_delta.abs() @ exact_V.abs().T).amax()
        assert ((du - expected[0]).abs() <= bound(o * (r + 1), size)).all(), (r, o, b)

        updated = V.clone()
        native.update_(features, updated, u, delta, -0.3, 0.9)
        expected = 0.9 * exact_V - 0.3 * phi.T @ exact_delta
        magnitude = 0.9 * exact_V.abs() + 0.3 * phi.abs().T @ exact_delta.abs()
        assert ((updated - expected).abs() <= bound(b, magnitude)).all(), (r, o, b)


def test_without_decay_what_stood_there_does_not_matter(built):
    features = PolynomialFeatures(5, [0.1, 0.2, 0.3])
    u, delta = F.normalize(torch.randn(3, 5)), torch.randn(3, 7)
    V = torch.full((features.P, 7), torch.nan)
    native.update_(features, V, u, delta, 1.0, 0.0)
    assert V.isfinite().all()


def test_what_is_not_a_number_stays_in_its_sample(built):
    features = PolynomialFeatures(6, [0.1, 0.2, 0.3])
    u, V = F.normalize(torch.randn(9, 6)), torch.randn(features.P, 20)
    u[4, 2] = torch.nan
    finite = native.forward(features, u, V).isfinite().all(1)
    assert finite.tolist() == [sample != 4 for sample in range(9)]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dtype": torch.float64}, "it sums float32"),
        ({"kappa": [0.1, 0.1, 0.1, 0.1]}, "degree 3"),
        ({"device": "meta"}, "runs on the CPU"),
        ({"b": 0}, "nothing to sum"),
    ],
)
def test_it_refuses_with_a_reason(change, reason):
    kind = {"dtype": torch.float32, "kappa": [0.1, 0.2, 0.3], "device": "cpu", "b": 2} | change
    features = PolynomialFeatures(4, kind["kappa"])
    u = torch.ones(kind["b"], 4, dtype=kind["dtype"], device=kind["device"])
    V = torch.ones(features.P, 3, dtype=kind["dtype"], device=kind["device"])
    assert reason in native.refuses(features, u, V)


def test_it_refuses_under_transforms():
    features, V = PolynomialFeatures(4, [0.1, 0.2, 0.3]), torch.ones(15, 3)
    said = []

    def one(u):
        said.append(native.refuses(features, u[None], V))
        return u.sum()

    torch.func.vmap(one)(torch.ones(2, 4))
    assert "torch.func" in said[0]


def test_a_network_trains_as_with_the_plain_sums(built):
    """Fused and not, with an input gradient: the same steps to what float32 lets drift."""
    from pilimit_lib.inf import InfMLP, PiSGD, clip_grad_norm_, implementation, param_groups

    def trained(name: str, fused: bool) -> torch.Tensor:
        torch.manual_seed(0)
        net = InfMLP(12, 3, 9, 2, bias_alpha=0.5, memory="moments", fused=fused)
        optimizer = PiSGD(param_groups(net, 0.3, 1e-3), lr=0.3)
        x, y = torch.randn(40, 12), torch.randint(3, (40,))
        with implementation(moments=name, debug=True) as said:
            for step in range(10):
                part = slice(4 * step, 4 * step + 4)
                optimizer.zero_grad()
                F.cross_entropy(net(x[part]), y[part]).backward()
                clip_grad_norm_(net, 0.4, per_param=True)
                optimizer.step()
        assert said == (["native runs"] if name == "native" else [])
        return net(x).detach()

    for fused in (False, True):
        plain, found = trained("plain", fused), trained("native", fused)
        assert (plain - found).norm() / plain.norm() < 1e-5


@pytest.fixture
def here():
    """As this machine builds it, kept from run to run."""
    native._library.cache_clear()
    if native.unavailable() is not None:
        pytest.skip(native.unavailable())


def drawn(layernorm: bool, bias: bool, b: int = 5):
    """(how, g, V, bias) of a layer with an input that is zero and one that is tiny."""
    features = PolynomialFeatures(7, [0.1, 0.2, 0.3])
    g, V = torch.randn(b, 7), torch.randn(features.P, 11)
    g[1], g[2] = 0, g[2] * 1e-6
    how = native.Layer(features, layernorm, 0.5)
    given = [g, V, torch.randn(11) if bias else None]
    return how, [x if x is None else x.requires_grad_() for x in given]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layernorm", [False, True])
def test_a_whole_layer_agrees_with_its_definition(here, layernorm, bias, threads, monkeypatch):
    monkeypatch.setattr(native, "A_THREAD", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    how, given = drawn(layernorm, bias)
    exact = [x if x is None else x.detach().double().requires_grad_() for x in given]
    weights = torch.randn(5, 11)
    with implementation(moments="native", debug=True) as said:
        found = moments_output(how.features, *given[:2], layernorm, given[2], how.alpha)
        found.backward(weights)
    assert said == ["native runs"] and type(found.grad_fn).__name__ == "NativeLayerBackward"
    expected = composed(how, *exact)
    expected.backward(weights.double())
    pairs = [(found, expected)] + [(x.grad, y.grad) for x, y in zip(given, exact) if x is not None]
    for one, other in pairs:
        one, other = one.detach().double(), other.detach()
        scale = other.abs().amax(-1, keepdim=True) + 1e-30  # of each sample, or monomial
        assert ((one - other).abs() <= 1e-5 * scale).all()


def test_a_whole_layer_has_its_second_derivatives(here):
    """Those of plain operations, in the same precision."""
    how, given = drawn(False, True)

    def penalty(output):
        grads = torch.autograd.grad(output.square().sum(), given, create_graph=True)
        total = sum(grad.square().sum() for grad in grads)
        return torch.autograd.grad(total, given)

    with implementation(moments="native"):
        found = penalty(moments_output(how.features, *given[:2], False, given[2], how.alpha))
    for one, other in zip(found, penalty(composed(how, *given))):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_the_norm_of_factors_is_that_of_their_product(here):
    features, u = PolynomialFeatures(7, [0.1, 0.2, 0.3]), F.normalize(torch.randn(9, 7))
    delta = torch.randn(9, 5)
    found = native.factored_norm(features, u, delta)
    expected = (features.matrix(u.double()).T @ delta.double()).norm()
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert native.factored_norm(features, torch.randn(40, 7), torch.randn(40, 5)) is None


def test_a_step_in_place_is_seen_by_the_tape(here):
    features = PolynomialFeatures(4, [0.1, 0.2, 0.3])
    V = torch.randn(features.P, 3)
    before = V._version
    native.update_(features, V, torch.randn(2, 4), torch.randn(2, 3), 0.1)
    assert V._version > before
