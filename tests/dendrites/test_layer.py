"""The mathematics of a dendritic layer against a dense float64 computation, and what happens when
it grows."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from pilimit_lib.dendrites import (
    DendriteConfig,
    DendriticLayer,
    DimensionError,
    dendritic,
    dendritic_layers,
    finalize,
)
from tests.dendrites.helpers import ConvNet, grow_all, mlp


def dense_linear(layer, x):
    """y = f(x) + Σ w_k σ(z_k), z_k = d_k(x) + Σ_{j<k} v_kj a_j, in numpy."""
    get = lambda t: t.detach().numpy()  # noqa: E731
    y = x @ get(layer.neuron.weight).T + get(layer.neuron.bias)
    acts = []
    for d in layer.dendrites:
        z = x @ get(d.body.weight).T + get(d.body.bias)
        for j, a in enumerate(acts):
            z = z + get(d.v)[j] * a
        acts.append(1 / (1 + np.exp(-z)))
        y = y + get(d.w) * acts[-1]
    return y


@pytest.mark.parametrize("dendrites", [0, 1, 2, 4])
def test_linear_layer_is_the_formula(dendrites):
    layer = DendriticLayer(nn.Linear(5, 3), DendriteConfig(), "fc").double()
    grow_all(layer, times=dendrites)
    x = torch.randn(6, 5, dtype=torch.float64)
    np.testing.assert_allclose(
        layer(x).detach().numpy(), dense_linear(layer, x.numpy()), atol=1e-12
    )


def test_conv_layer_is_the_formula_at_every_position():
    layer = DendriticLayer(nn.Conv2d(2, 3, 3), DendriteConfig(activation="tanh"), "conv").double()
    grow_all(layer, times=2)
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    columns = nn.functional.unfold(x, 3).transpose(1, 2)  # [b positions 18]
    run = lambda conv: columns @ conv.weight.reshape(3, -1).T + conv.bias  # noqa: E731
    first, second = layer.dendrites
    a1 = torch.tanh(run(first.body))
    a2 = torch.tanh(run(second.body) + second.v[0] * a1)
    y = run(layer.neuron) + first.w * a1 + second.w * a2
    torch.testing.assert_close(layer(x), y.transpose(1, 2).reshape(2, 3, 3, 4), atol=1e-12, rtol=0)


def test_gradients_against_finite_differences():
    layer = DendriticLayer(nn.Linear(3, 2), DendriteConfig(), "fc").double()
    grow_all(layer, times=2)
    params = dict(layer.named_parameters())
    x = torch.randn(4, 3, dtype=torch.float64)
    run = lambda *values: torch.func.functional_call(layer, dict(zip(params, values)), (x,))  # noqa: E731
    assert torch.autograd.gradcheck(
        run, tuple(p.detach().clone().requires_grad_() for p in params.values())
    )


@pytest.mark.parametrize("block", [nn.Sequential, "pai"])
def test_output_is_unchanged_at_growth_and_then_w_learns_first(block):
    from pilimit_lib.dendrites import PAISequential

    torch.manual_seed(0)
    model = dendritic(ConvNet(PAISequential if block == "pai" else nn.Sequential))
    x = torch.randn(8, 1, 6, 6)
    model.eval()
    before = model(x)
    grow_all(model, times=3, loud=False)
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=0)
    model.train()
    model(x).square().sum().backward()
    for name, layer in dendritic_layers(model):
        newest = layer.dendrites[-1]
        assert newest.w.grad.abs().max() > 0, name
        assert all(p.grad is not None and not p.grad.any() for p in newest.body.parameters()), name


def test_parameter_count_is_exact_before_and_after():
    model = dendritic(mlp())
    plain = 5 * 7 + 7 + 7 * 3 + 3
    count = lambda: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert count() == plain
    for k in range(1, 4):
        grow_all(model)
        assert count() == (k + 1) * plain + k * 10 + k * (k - 1) // 2 * 10
    # (W, b) of f and d_k; w_k; v_k from the second on
    assert len(list(model.state_dict())) == 4 * 4 + 3 * 2 + 2 * 2


def test_fresh_weights_scale_norms_and_buffers():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(200, 100), nn.LayerNorm(100))
    layer = DendriticLayer(block, DendriteConfig(dims=[-1, 0], init_scale=0.01), "block")
    layer(torch.randn(3, 200))
    d = layer.grow(torch.Generator().manual_seed(1))
    assert (
        d.body[0].weight.std().item() == pytest.approx(0.01, rel=0.05) and d.body[0].bias.std() > 0
    )
    # a gain of 0.01 would silence the block
    assert torch.equal(d.body[1].weight, torch.ones(100)) and not d.body[1].bias.any()
    by_main = DendriticLayer(nn.Linear(200, 100), DendriteConfig(init_by_main=True), "fc")
    expected = 0.01 * torch.cat([p.flatten() for p in by_main.neuron.parameters()]).abs().mean()
    assert by_main.grow(torch.Generator().manual_seed(1)).body.weight.std().item() == pytest.approx(
        expected.item(), rel=0.05
    )
    norm = DendriticLayer(
        nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)),
        DendriteConfig(dims=[-1, 0, -1, -1]),
        "bn",
    )
    norm(torch.randn(4, 1, 3, 3) + 5)
    body = norm.grow(torch.Generator().manual_seed(1)).body
    assert (
        not body[1].running_mean.any()
        and body[1].num_batches_tracked == 0
        and norm.neuron[1].running_mean.any()
    )


def test_same_generator_same_weights_and_frozen_neurons_get_dendrites_that_learn():
    a, b = (
        DendriticLayer(nn.Linear(3, 2).requires_grad_(False), DendriteConfig(), "fc")
        for _ in range(2)
    )
    da, db = (layer.grow(torch.Generator().manual_seed(7)) for layer in (a, b))
    assert torch.equal(da.body.weight, db.body.weight) and all(
        p.requires_grad for p in da.parameters()
    )


def test_dtype_and_device_follow_the_neurons():
    layer = DendriticLayer(nn.Linear(3, 2).to(torch.bfloat16), DendriteConfig(), "fc")
    grow_all(layer, times=2)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(torch.randn(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    mixed = dendritic(mlp())
    grow_all(mixed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mixed(torch.randn(2, 5)).dtype == torch.bfloat16


def test_attributes_and_items_of_the_neurons_are_reachable():
    model = dendritic(ConvNet())
    model.fc.weight.data.zero_()
    assert model.fc.out_features == 3 and model.fc.weight is model.fc.neuron.weight
    with pytest.raises(
        AttributeError, match="neither the dendritic layer nor its neurons \\(Linear\\)"
    ):
        model.fc.wieght  # noqa: B018
    block = DendriticLayer(nn.Sequential(nn.Linear(2, 2)), DendriteConfig(), "b")
    assert isinstance(block[0], nn.Linear) and bool(block)


def test_linear_and_conv_are_known_at_any_rank_unless_dimensions_are_configured():
    layer = DendriticLayer(nn.Linear(3, 2), DendriteConfig(), "fc")
    layer(torch.zeros(4, 5, 3))
    assert layer.dims == (-1, -1, 0)
    for conv, shape, dims in [
        (nn.Conv1d(1, 2, 1), (4, 1, 5), (-1, 0, -1)),
        (nn.Conv3d(1, 2, 1), (4, 1, 2, 2, 2), (-1, 0, -1, -1, -1)),
    ]:
        layer = DendriticLayer(conv, DendriteConfig(), "c")
        layer(torch.zeros(shape))
        assert layer.dims == dims
    strict = dendritic(nn.Sequential(nn.Linear(3, 2)), DendriteConfig(dims=[-1, 0, -1, -1]))
    with pytest.raises(
        DimensionError,
        match=r"layer '0' \(Linear\) returned a tensor of shape \[4, 5, 2\].*\[-1, 0\].*"
        r"model\[0\]\.set_this_input_dimensions\(\[-1, -1, 0\]\)",
    ):
        strict(torch.zeros(4, 5, 3))
    strict[0].set_this_input_dimensions([-1, -1, 0])
    strict(torch.zeros(4, 5, 3))


def test_wrong_dimensions_name_the_module_and_the_call():
    class Swap(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 7)

        def forward(self, x):
            return self.lin(x).transpose(1, 2)

    model = dendritic(nn.ModuleDict({"swap": Swap()}), DendriteConfig(convert=["Swap"]))
    with pytest.raises(
        DimensionError,
        match=r"nothing says.*model\.swap\.set_this_input_dimensions\(\[-1, 0, -1\]\)",
    ):
        model["swap"](torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match="a single 0"):
        model["swap"].set_this_input_dimensions([-1, -1, -1])
    # wrong, but consistent while the length is
    model["swap"].set_this_input_dimensions([-1, -1, 0])
    model["swap"](torch.zeros(2, 5, 3))
    with pytest.raises(DimensionError, match="5 neurons were expected in dimension 2"):
        model["swap"](torch.zeros(2, 6, 3))
    model["swap"].set_this_input_dimensions([-1, 0, -1])
    model["swap"](torch.zeros(2, 6, 3))
    grow_all(model)
    with pytest.raises(RuntimeError, match="before the first growth"):
        model["swap"].set_this_input_dimensions([-1, -1, 0])


def test_a_block_that_never_ran_says_so_when_it_should_grow():
    layer = DendriticLayer(nn.Sequential(nn.Linear(2, 2)), DendriteConfig(dims=[-1, 0]), "block")
    with pytest.raises(RuntimeError, match="'block' does not know how many neurons"):
        layer.grow(torch.Generator())
    empty = DendriticLayer(nn.ReLU(), DendriteConfig(dims=[-1, 0]), "act")
    empty(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="'act' \\(ReLU\\) has no parameters"):
        empty.grow(torch.Generator())
    assert not len(empty.dendrites)


def test_copies_and_pickles():
    model = grow_all(dendritic(mlp()), times=2)
    x = torch.randn(3, 5)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x)) and twin[0].neuron.weight is not model[0].neuron.weight
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_plain_state_dict_of_a_grown_network_loads_strictly_into_a_fresh_one():
    model = grow_all(dendritic(ConvNet()), times=2)
    x = torch.randn(2, 1, 5, 5)
    model(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = dendritic(ConvNet())
    result = fresh.load_state_dict(torch.load(file, weights_only=True))
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_torch_fast_path_does_not_pass_dendrites_by():
    torch.manual_seed(0)
    model = dendritic(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))
    x = torch.randn(2, 5, 8)
    model(x)
    grow_all(model).eval()
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, model(x), atol=1e-6, rtol=0)
    # out_proj is not called as a layer
    assert [name for name, _ in dendritic_layers(model)] == ["linear1", "linear2"]


def test_finalize_gives_a_plain_module_with_the_same_function():
    model = grow_all(dendritic(ConvNet()), times=3).eval()
    x = torch.randn(2, 1, 5, 5)
    expected = model(x)
    plain = finalize(model)
    torch.testing.assert_close(plain(x), expected, atol=1e-6, rtol=0)
    assert not any(isinstance(m, DendriticLayer) for m in plain.modules())
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.parameters())
    bare = finalize(dendritic(mlp()))
    assert [type(m) for m in bare] == [nn.Linear, nn.ReLU, nn.Linear]
    root, row = grow_all(dendritic(nn.Linear(2, 2))), torch.ones(1, 2)
    with pytest.raises(RuntimeError, match="run one batch"):
        finalize(root)
    assert torch.equal(root(row), finalize(root)(row))
    grown = grow_all(dendritic(mlp()), times=2)
    x = torch.randn(2, 5)
    expected = grown(x)
    torch.testing.assert_close(torch.export.export(finalize(grown), (x,)).module()(x), expected)


def test_forward_registers_no_hooks():
    model = grow_all(dendritic(mlp()))
    for _ in range(3):
        model(torch.randn(2, 5)).sum().backward()
    assert not any(
        m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules()
    )


@pytest.mark.slow
def test_compiled_it_computes_the_same_without_graph_breaks():
    model = grow_all(dendritic(mlp()), times=2)
    x = torch.randn(3, 5)
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x)
    )
