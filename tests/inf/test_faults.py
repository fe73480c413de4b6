"""Faults of the original implementation, one test each: ours must not have them. The letters are
those of the list of faults."""

import copy
import inspect
import io

import pytest
import torch
from torch import nn

from pilimit_lib.core import batch
from pilimit_lib.inf import (
    FinPiLinearReLU,
    FinPiMLPSample,
    InfMLP,
    InfPiLinearReLU,
    PiSGD,
    clip_grad_norm_,
    param_groups,
)
from pilimit_lib.inf.utils import store_pi_grad_norm_

from .nets import assert_unchanged, cross_entropy, data, network, tensors


def trained(steps=4, lr=0.3, **settings):
    net = network(**settings)
    optimizer = PiSGD(net.parameters(), lr=lr)
    for _ in range(steps):
        x, y = data(8, net.d_in, net.d_out)
        optimizer.zero_grad()
        cross_entropy(y)(net(x)).backward()
        optimizer.step()
    return net


def step(net, optimizer, x, y):
    optimizer.zero_grad()
    cross_entropy(y)(net(x)).backward()
    optimizer.step()


# A. Wrong results


def test_a1_a_finite_network_sampled_from_a_trained_one_approaches_it():
    """The readout's scale is n_in^-½ and its bias is copied; the original's error grew with n."""
    net = trained(last_bias_alpha=0.5)
    x, _ = data(16)
    errors = [
        torch.stack([(net.sample(n)(x) - net(x)).square().mean() for _ in range(4)])
        .mean()
        .sqrt()
        .item()
        for n in (64, 2048)
    ]
    assert errors[1] < errors[0] / 3
    assert errors[1] < 0.25 * net(x).std().item()
    assert torch.equal(net.sample(64).layers[-1].bias, net.layers[-1].bias)


def test_a2_last_bias_alpha_and_layernorm_come_from_the_checkpoint():
    source = trained(bias_alpha=0.5, last_bias_alpha=0.25, layernorm=True, first_layer_alpha=1.5)
    x, _ = data()
    for net in (
        InfMLP.from_state_dict(source.state_dict()).double(),
        network(bias_alpha=1.0, layernorm=False),
    ):
        net.load_state_dict(source.state_dict())
        assert torch.equal(net(x), source(x))
        assert net.layernorm and all(layer.layernorm for layer in net.layers)
        assert (net.bias_alpha, net.last_bias_alpha, net.first_layer_alpha) == (0.5, 0.25, 1.5)
        assert [layer.bias_alpha for layer in net.layers] == [0.5, 0.5, 0.25]


@pytest.mark.parametrize("alpha", [0, 0.0, None])
def test_a3_bias_alpha_zero_means_no_bias(alpha):
    net = InfMLP(5, 3, 6, 1, bias_alpha=alpha)
    assert not any("bias" in name for name, _ in net.named_parameters())
    assert all(layer.bias is None for layer in net.layers) and all(
        layer.bias is None for layer in net.sample(8).layers
    )
    net.double()
    optimizer = PiSGD(net.parameters(), lr=0.3)
    x, y = data()
    norms = []
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(y)(net(x)).backward()
        norms.append(float(clip_grad_norm_(net, 1e9)))
        again = float(clip_grad_norm_(net, 1e9))
        assert again == norms[-1], "a gradient that nobody clears would accumulate"
        optimizer.step()


def test_a3_only_the_readout_without_bias():
    net = InfMLP(5, 3, 6, 1, last_bias_alpha=0)
    assert [layer.bias is None for layer in net.layers] == [False, False, True]


def test_a6_the_feature_kernel_is_made_of_unit_embeddings():
    for net, width in ((trained(), 6), (trained().sample(32), 32)):
        x, _ = data()
        out = net(x, save_kernel_output=True)
        assert net.kernel_output.shape == (4, width) and out.shape == (4, 3)
        torch.testing.assert_close(
            net.kernel_output.norm(dim=1), torch.ones(4, dtype=torch.float64)
        )
        assert torch.equal(net.kernel_output, net.embedding(x))


def test_a6_the_readout_is_linear_in_the_embedding():
    net = trained(bias_alpha=0)
    x, _ = data()
    unit = net.embedding(x)
    y = net(x)
    s = torch.linalg.lstsq(net.layers[-1](unit).reshape(-1, 1), y.reshape(-1, 1)).solution
    assert s > 0 and torch.allclose(
        nn.functional.cosine_similarity(net.layers[-1](unit), y), torch.ones(4, dtype=torch.float64)
    )


def test_a7_momentum_reaches_rows():
    plain, heavy = network(), None
    heavy = copy.deepcopy(plain)
    x, y = data()
    for net, momentum in ((plain, 0), (heavy, 0.9)):
        optimizer = PiSGD(net.parameters(), lr=0.1, momentum=momentum)
        for _ in range(3):
            step(net, optimizer, x, y)
    assert plain.layers[1].Amult[6:].tolist() == [-0.1] * 12
    expected = torch.tensor(
        [-0.1 * (1 + 0.9 + 0.81)] * 4 + [-0.1 * 1.9] * 4 + [-0.1] * 4, dtype=torch.float64
    )
    torch.testing.assert_close(heavy.layers[1].Amult[6:], expected)


def test_a8_accumulated_batches_reach_every_parameter():
    whole = network()
    parts = copy.deepcopy(whole)
    x, y = data(8)
    for net, size in ((whole, 8), (parts, 4)):
        optimizer = PiSGD(net.parameters(), lr=0.3)
        optimizer.zero_grad()
        for a, b in zip(x.split(size), y.split(size)):
            (cross_entropy(b)(net(a)) * size / 8).backward()
        optimizer.step()
    assert whole.rows == parts.rows == [14, 14]
    for name, value in tensors(whole).items():
        torch.testing.assert_close(value, tensors(parts)[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layernorm", [False, True])
@pytest.mark.parametrize("bias_alpha", [0, 1])
@pytest.mark.parametrize("every", [False, True])
def test_a9_a_zero_input_gives_zero_and_trains_finitely(layernorm, bias_alpha, every):
    net = InfMLP(5, 3, 6, 2, layernorm=layernorm, bias_alpha=bias_alpha, dtype=torch.float64)
    optimizer = PiSGD(net.parameters(), lr=0.3, momentum=0.9)
    x, y = data(4)
    x[0] = 0
    if every:
        x.zero_()
    assert torch.equal(net(x)[0], torch.zeros(3, dtype=torch.float64))
    for _ in range(3):
        x.requires_grad_()
        x.grad = None
        step(net, optimizer, x, y)
        assert torch.isfinite(x.grad).all()
        assert all(torch.isfinite(value).all() for value in tensors(net).values())
    assert torch.isfinite(net(x)).all()


def test_a9_a_zero_input_to_a_finite_network():
    for layernorm in (False, True):
        net = InfMLP(5, 3, 6, 1, layernorm=layernorm, dtype=torch.float64).sample(16)
        x, y = data(4)
        x[0] = 0
        step(net, PiSGD(net.parameters(), lr=0.3), x, y)
        assert all(torch.isfinite(value).all() for value in tensors(net).values())


def test_a10_half_keeps_amult_in_float32():
    net = trained().float()
    expected = net.layers[1].Amult.detach().clone()
    net.half()
    layer = net.layers[1]
    assert (layer.A.dtype, layer.B.dtype, layer.Amult.dtype) == (
        torch.float16,
        torch.float16,
        torch.float32,
    )
    assert torch.equal(layer.Amult, expected) and layer.origin.dtype == torch.long
    assert layer.state_dict()["Amult"].dtype == torch.float32


# B. Crashes and dead arguments


def test_b1_the_gaussian_network():
    net = trained(L=2).sample(64).gaussian_init_()
    x, y = data()
    assert torch.isfinite(net(x)).all()
    weight = net.layers[1].weight
    cross_entropy(y)(net(x)).backward()
    assert torch.linalg.matrix_rank(weight.grad) == 4, (
        "not projected: one direction for each sample"
    )
    step(net, PiSGD(param_groups(net, 0.1), momentum=0.9), x, y)


def test_b1_a_network_has_sample():
    assert isinstance(network().sample(8), FinPiMLPSample)


def test_b3_no_argument_without_meaning():
    names = set(inspect.signature(InfMLP).parameters) | set(
        inspect.signature(InfPiLinearReLU).parameters
    )
    assert not names & {"cuda_batch_size", "optim_mode", "return_hidden"}


def test_b3_every_argument_has_an_effect():
    x, _ = data()
    base = dict(d_in=5, d_out=3, r=6, L=1, dtype=torch.float64)
    changes = [
        {"first_layer_alpha": 2},
        {"last_layer_alpha": 2},
        {"bias_alpha": 2},
        {"last_bias_alpha": 2},
        {"layernorm": True},
    ]
    torch.manual_seed(1)
    state = network().state_dict()
    state.pop("_extra_state")
    outputs = []
    for change in [{}, *changes]:
        net = InfMLP(**base, **change)
        given = {key: value for key, value in state.items() if not key.endswith("bias_alpha")}
        net.load_state_dict(given, strict=False)
        outputs.append(net(x))
    for other in outputs[1:]:
        assert not torch.allclose(outputs[0], other, atol=1e-3)


@pytest.mark.parametrize("strict", [True, False])
def test_b4_a_grown_state_loads_into_a_fresh_network(strict):
    net = trained()
    fresh = network()
    assert list(fresh.load_state_dict(net.state_dict(), strict=strict)) == [[], []]
    assert fresh.rows == net.rows == [38, 38]
    assert_unchanged(tensors(net), fresh)


def test_b4_nothing_is_printed(capsys):
    network().load_state_dict(trained().state_dict())
    assert capsys.readouterr() == ("", "")


def test_b4_any_network_with_such_layers_loads():
    """The original asked for its own base class."""

    def build():
        return nn.Sequential(
            nn.Linear(5, 6), InfPiLinearReLU(6), InfPiLinearReLU(6, 2, output_layer=True)
        )

    net, fresh = build(), build()
    optimizer = PiSGD(net.parameters(), lr=0.1)
    net(torch.randn(3, 5)).square().sum().backward()
    optimizer.step()
    fresh.load_state_dict(net.state_dict())
    x = torch.randn(4, 5)
    assert len(fresh[1]) == 9 and torch.equal(net(x), fresh(x))


def test_b4_the_file_knows_the_architecture(tmp_path):
    net = trained(L=2, r=4, layernorm=True, last_bias_alpha=0, last_layer_alpha=0.5)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    twin = InfMLP.from_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert twin.architecture() == net.architecture()
    x, _ = data()
    torch.testing.assert_close(twin.double()(x), net(x), rtol=0, atol=1e-5)


MISFITS = {
    "another rank": (lambda: network(r=7), "layers.0.A"),
    "more layers": (lambda: network(L=2), "4 layers"),
    "fewer layers": (lambda: network(L=0), "2 layers"),
    "other outputs": (lambda: network(o=4), "layers.2.A"),
    "other data": (lambda: network(d=6), "layers.0.A"),
    "no bias there": (lambda: network(bias_alpha=0), "layers.0.bias"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_b4_what_does_not_fit_is_refused_and_changes_nothing(name):
    source, message = MISFITS[name]
    net = network()
    before = tensors(net)
    with pytest.raises(RuntimeError, match=message):
        net.load_state_dict(source().state_dict())
    assert_unchanged(before, net)


def broken(change):
    state = network().state_dict()
    change(state)
    return state


BROKEN = {
    "an unknown key": (lambda s: s.update(other=torch.zeros(1)), "other"),
    "a missing key": (lambda s: s.pop("layers.1.B"), "layers.1.B"),
    "rows of different number": (
        lambda s: s.update({"layers.1.B": s["layers.1.B"][:3]}),
        "different number",
    ),
    "origin of another length": (
        lambda s: s.update({"layers.1.origin": s["layers.1.origin"][:3]}),
        "origin",
    ),
    "rows of another shape": (
        lambda s: s.update({"layers.1.Amult": torch.ones(6, 2)}),
        "layers.1.Amult",
    ),
}


EIGHT_BITS = {
    "no scales": lambda s: s.pop("layers.2.B_scale"),
    "no shifts": lambda s: s.pop("layers.2.A_shift"),
    "short scales": lambda s: s.update({"layers.2.A_scale": s["layers.2.A_scale"][:-1]}),
    "scales in columns": lambda s: s.update({"layers.2.B_scale": s["layers.2.B_scale"][:, None]}),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("memory", ["rows", "moments"])
@pytest.mark.parametrize("name", EIGHT_BITS)
def test_b4_rows_in_eight_bits_that_can_not_be_read_change_nothing(name, memory, strict):
    net, source = InfMLP(5, 3, 6, 1, memory=memory), InfMLP(5, 3, 6, 1, row_dtype=torch.int8)
    before, state = tensors(net), source.state_dict()
    EIGHT_BITS[name](state)
    with pytest.raises(RuntimeError, match="layers.2.*eight bits"):
        net.load_state_dict(state, strict=strict)
    assert_unchanged(before, net)


@pytest.mark.parametrize("name", BROKEN)
def test_b4_a_broken_state_is_refused_and_changes_nothing(name):
    change, message = BROKEN[name]
    net = network(last_layer_alpha=0.5)
    before, settings = tensors(net), net.architecture()
    with pytest.raises(RuntimeError, match=message):
        net.load_state_dict(broken(change))
    assert_unchanged(before, net)
    assert net.architecture() == settings


def test_b4_a_bias_that_the_network_lacks_is_refused_and_changes_nothing():
    net = network(bias_alpha=0)
    before = tensors(net)
    with pytest.raises(RuntimeError, match="bias_alpha"):
        net.load_state_dict(network().state_dict())
    assert_unchanged(before, net)
    assert net.bias_alpha == 0


def test_b4_not_strict_means_what_it_means_in_torch():
    net, source = network(), trained()
    state = source.state_dict()
    state["other"] = torch.zeros(1)
    state.pop("layers.0.bias")
    before = net.layers[0].bias.detach().clone()
    result = net.load_state_dict(state, strict=False)
    assert result.missing_keys == ["layers.0.bias"] and result.unexpected_keys == ["other"]
    assert net.rows == source.rows and torch.equal(net.layers[0].bias, before)


# C. Traps


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_c1_optimisers_of_torch_say_what_to_use(make):
    net = network()
    optimizer = make(net.parameters(), lr=0.1)
    x, y = data()
    with pytest.raises(RuntimeError, match="PiSGD"):
        step(net, optimizer, x, y)
    assert net.rows == [6, 6]


@pytest.mark.parametrize("b", [0, 1, 3, 4, 50])
@pytest.mark.parametrize("grad", [False, True])
def test_c2_evaluation_between_backward_and_step(b, grad):
    left = network()
    right = copy.deepcopy(left)
    x, y = data()
    for net, evaluates in ((left, True), (right, False)):
        optimizer = PiSGD(net.parameters(), lr=0.3)
        cross_entropy(y)(net(x)).backward()
        if evaluates:
            net.eval()
            with torch.set_grad_enabled(grad):
                net(torch.randn(b, 5, dtype=torch.float64))
            net.train()
        optimizer.step()
    assert left.rows == [10, 10]
    assert_unchanged(tensors(right), left)


def test_c3_clipping_needs_no_preparation():
    net = network()
    x, y = data()
    cross_entropy(y)(net(x)).backward()
    total = float(clip_grad_norm_(net, 0.01))
    assert total > 0.01
    assert float(clip_grad_norm_(net, 1e9)) == pytest.approx(0.01, rel=1e-3)


def test_c3_the_preparation_stays_callable():
    net = network()
    store_pi_grad_norm_(net.modules())
    with pytest.raises(ValueError, match="clip_grad_norm_"):
        store_pi_grad_norm_(net.modules(), exclude_last_layer=True)


def test_c4_gradients_of_finite_networks_are_projected_before_they_are_clipped():
    net = trained().sample(32)
    x, y = data()
    cross_entropy(y)(net(x)).backward()
    for layer in net.layers[:-1]:
        projection = layer.omega @ torch.linalg.pinv(layer.omega)
        torch.testing.assert_close(
            projection @ layer.weight.grad, layer.weight.grad, rtol=0, atol=1e-12
        )
        torch.testing.assert_close(
            projection @ layer.bias.grad, layer.bias.grad, rtol=0, atol=1e-12
        )
    norm = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
    torch.testing.assert_close(clip_grad_norm_(net, 1e9), norm)


def test_c4_the_projection_is_that_of_the_formula():
    """G ← Ω (ΩᵀΩ)^-1 Ωᵀ G, with the unprojected gradient computed by hand."""
    layer = FinPiLinearReLU(4, 12, 10).double()
    h, delta = torch.randn(3, 12, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
    (layer(h) * delta).sum().backward()
    omega = layer.omega
    expected = omega @ torch.linalg.inv(omega.T @ omega) @ omega.T @ (delta.T @ torch.relu(h))
    # ω was orthogonalised in float32
    torch.testing.assert_close(layer.weight.grad, expected, rtol=0, atol=1e-6)


def test_c5_parameters_keep_their_identity_and_old_rows_their_place():
    net = network()
    held = [id(p) for p in net.parameters()]
    places = [block.data_ptr() for block in net.layers[1].A.blocks.views()]
    x, y = data()
    optimizer = PiSGD(net.parameters(), lr=0.3)
    step(net, optimizer, x, y)
    assert held == [id(p) for p in net.parameters()]
    assert places == [block.data_ptr() for block in net.layers[1].A.blocks.views()]


def test_c5_cosines_beyond_one_stay_finite():
    layer = InfPiLinearReLU(4)
    g = layer.B.detach().clone() * (1 + 1e-6)
    layer.set_rows(layer.A.detach(), torch.ones(4), layer.B.detach() * (1 + 1e-5))
    g.requires_grad_()
    layer(g).sum().backward()
    assert torch.isfinite(g.grad).all() and torch.isfinite(layer(g)).all()


def test_c6_copies_are_independent():
    net = trained()
    twin = copy.deepcopy(net)
    before = tensors(net)
    x, y = data()
    step(twin, PiSGD(twin.parameters(), lr=0.3), x, y)
    assert_unchanged(before, net)
    assert twin.rows == [42, 42]


def test_c6_copies_have_no_gradients_on_any_layer():
    """As with torch: a copy that took pending rows along, but not the other gradients, would step
    some of its layers only."""
    net = network()
    x, y = data()
    cross_entropy(y)(net(x)).backward()
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        assert all(p.grad is None for p in twin.parameters())
        PiSGD(twin.parameters(), lr=0.3).step()
        assert_unchanged(tensors(net), twin)
        cross_entropy(y)(twin(x)).backward()
        assert len(twin.layers[1].A.grad) == 4
    assert len(net.layers[1].A.grad) == 4


def test_c8_readout_rate_zero_still_decays():
    net = network()
    before = net.layers[-1].Amult.detach().clone()
    x, y = data()
    optimizer = PiSGD(param_groups(net, 0.1, 0.5, last_layer_lr_mult=0))
    step(net, optimizer, x, y)
    assert net.rows == [10, 6] and torch.equal(net.layers[-1].Amult.detach(), before), (
        "rate 0 times any decay is nothing"
    )


# Rows know their sample


def test_rows_carry_the_ids_of_their_samples():
    net = network()
    optimizer = PiSGD(net.parameters(), lr=0.3)
    x, y = data()
    for ids in ([7, 3, 9, 2], None, [1, 1, 0, 5]):
        optimizer.zero_grad()
        if ids is None:
            cross_entropy(y)(net(x)).backward()
        else:
            with batch(ids):
                loss = cross_entropy(y)(net(x))
            loss.backward()
        optimizer.step()
    expected = [-1] * 6 + [7, 3, 9, 2] + [-1] * 4 + [1, 1, 0, 5]
    assert net.layers[1].origin.tolist() == net.layers[2].origin.tolist() == expected
    assert InfMLP.from_state_dict(net.state_dict()).layers[1].origin.tolist() == expected
