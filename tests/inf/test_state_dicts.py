"""State dicts of every kind of network and layer: tensors alone, from which the network is built
again, and which load whole or not at all."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pilimit_lib.core import batch, load
from pilimit_lib.inf import (
    FinPiConv2d,
    FinPiConvNetSample,
    FinPiMLPSample,
    InfMLP,
    InfPiConv2d,
    InfPiConvNet,
    InfPiInputConv2d,
    InfPiInputLinearReLU,
    InfPiLinear,
    InfPiLinearReLU,
    PiSGD,
)
from pilimit_lib.inf.gp import KernelMLP, ReLUKernel
from pilimit_lib.inf.rows.storage import LIMITS

OLD = Path(__file__).parent / "old_checkpoints.pt"


def trained(net: nn.Module, decay: float = 0.0) -> nn.Module:
    x = inputs(net)
    optimizer = PiSGD(net.parameters(), lr=0.1, weight_decay=decay)
    for t in range(2):
        optimizer.zero_grad()
        with batch(torch.arange(len(x)) + 10 * t):
            net(x).square().sum().backward()
        optimizer.step()
    return net


def inputs(net: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (3, 3, 6, 6) if "Conv" in type(net).__name__ else (4, 5)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(next(p for p in net.parameters() if p.dtype != torch.int8).dtype)


def conv(**settings) -> InfPiConvNet:
    plan = {"pools": (1, 2, 1), "shortcuts": ((0, 1), (2, 3)), "bias_alpha": 0.5}
    return trained(InfPiConvNet(3, 4, (4, 4, 5, 5), **plan, **settings))


def mlp(**settings) -> InfMLP:
    return trained(InfMLP(5, 3, 6, 1, **settings))


NETWORKS = {
    "rows": lambda: mlp(bias_alpha=0.5, last_bias_alpha=0.25, layernorm=True),
    "rows in eight bits": lambda: mlp(row_dtype=torch.int8),
    "rows in halves": lambda: mlp(row_dtype=torch.float16),
    "rows that decay": lambda: trained(InfMLP(5, 3, 6, 1), 0.1),
    "folded rows": lambda: mlp(row_budget=4),
    "merged rows": lambda: mlp(merge=0.9),
    "moments": lambda: mlp(memory="moments", degree=3, dtype=torch.float64),
    "fused moments": lambda: mlp(memory="moments", fused=True),
    "moments of gelu": lambda: mlp(memory="moments", activation="gelu", first_layer_alpha=2),
    "no bias": lambda: mlp(bias_alpha=0),
    "finite": lambda: mlp(layernorm=True, last_layer_alpha=0.5).sample(7),
    "finite from moments": lambda: mlp(memory="moments", degree=3).sample(7),
    "finite without bias": lambda: mlp(bias_alpha=0).sample(7),
    "finite, gaussian": lambda: mlp().sample(7).gaussian_init_(),
    "conv": conv,
    "conv of tanh": lambda: conv(activation="tanh", degree=3, layernorm=True),
    "finite conv": lambda: conv().sample(7),
}
every = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


def values(module: nn.Module) -> dict[str, object]:
    """Everything that a refused checkpoint must leave as it is."""
    return {name: copy.deepcopy(value) for name, value in module.state_dict().items()}


def assert_same(before: dict[str, object], module: nn.Module) -> None:
    after = module.state_dict()
    assert list(before) == list(after)
    for name, value in before.items():
        assert torch.equal(value, after[name]) and value.dtype == after[name].dtype, name


# What a state dict holds


@every
def test_a_state_dict_is_made_of_tensors_that_share_nothing(make):
    state = make().state_dict()
    assert all(isinstance(value, Tensor) and value.is_contiguous() for value in state.values())
    places = [value.data_ptr() for value in state.values() if value.numel()]
    assert len(set(places)) == len(places)


@every
def test_a_network_is_built_from_its_state_dict(make):
    net = make()
    x, state = inputs(net), net.state_dict()
    again = type(net).from_state_dict(state)
    assert torch.equal(again(x), net(x)) and repr(again) == repr(net)
    assert again.architecture() == net.architecture()
    assert [p.dtype for p in again.parameters()] == [p.dtype for p in net.parameters()]
    assert_same(values(net), again)


@every
def test_a_network_goes_through_a_file_of_safetensors(make, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    net = make()
    safetensors.save_file(net.state_dict(), tmp_path / "net.safetensors")
    again = type(net).from_state_dict(safetensors.load_file(tmp_path / "net.safetensors"))
    assert torch.equal(again(inputs(net)), net(inputs(net)))
    safetensors.save_model(net, tmp_path / "model.safetensors")
    safetensors.load_model(again, tmp_path / "model.safetensors")
    assert_same(values(net), again)


def test_a_kernel_learner_goes_through_a_file_of_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    net, again = trained(KernelMLP(5, 3, ReLUKernel(1))), KernelMLP(5, 3, ReLUKernel(1))
    safetensors.save_file(net.state_dict(), tmp_path / "net.safetensors")
    again.load_state_dict(safetensors.load_file(tmp_path / "net.safetensors"))
    assert net.rows == [8] and torch.equal(again(inputs(net)), net(inputs(net)))


def test_a_network_of_the_hub_comes_back_from_its_folder(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("safetensors")

    class OnTheHub(InfMLP, hub.PyTorchModelHubMixin):
        """An InfMLP as its user writes it."""

    for settings in ({"layernorm": True}, {"memory": "moments", "degree": 3}, {"row_budget": 4}):
        net = trained(OnTheHub(5, 3, 6, 1, **settings))
        net.save_pretrained(tmp_path / "net")
        again = OnTheHub.from_pretrained(tmp_path / "net")
        assert torch.equal(again(inputs(net)), net(inputs(net))) and again.rows == net.rows


@pytest.mark.parametrize("name", ["rows", "folded rows", "moments", "finite", "conv"])
def test_a_run_of_accelerate_goes_on_from_its_folder(name, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    net = accelerator.prepare_model(NETWORKS[name]())
    accelerator.save_state(str(tmp_path))
    before = values(net)
    trained(net)
    accelerator.load_state(str(tmp_path))
    assert_same(before, net)


@pytest.mark.parametrize("name", ["rows", "moments", "finite", "conv", "finite conv"])
def test_a_network_inside_another_module_and_one_that_was_converted(name):
    net = NETWORKS[name]()
    whole, fresh = nn.Sequential(nn.Identity(), net), nn.Sequential(nn.Identity(), NETWORKS[name]())
    fresh.load_state_dict(whole.state_dict())
    assert torch.equal(fresh(inputs(net)), net(inputs(net)))
    # As averages of checkpoints make them: every tensor a float.
    state = {
        key: value if "rows" in key or "origin" in key else value.double()
        for key, value in net.state_dict().items()
    }
    assert type(net).from_state_dict(state).architecture() == net.architecture()


# Checkpoints of earlier versions


@every
def test_a_checkpoint_with_a_dictionary_loads(make):
    net = make()
    state = {**net.state_dict(), "_extra_state": net.architecture()}
    if isinstance(net, FinPiMLPSample | FinPiConvNetSample):
        del state["_extra_state"]  # they had none
        again = make()
        again.load_state_dict(state)
    else:
        again = type(net).from_state_dict(state)
    assert torch.equal(again(inputs(net)), net(inputs(net)))


def old_checkpoints():
    return load(OLD).items() if OLD.is_file() else []


@pytest.mark.parametrize(
    ("name", "entry"), old_checkpoints(), ids=lambda v: v if type(v) is str else ""
)
def test_checkpoints_that_an_earlier_version_wrote_make_the_same_outputs(name, entry):
    """Made by the version before this one; `y` are its outputs on `x`."""
    kind = {"InfMLP": InfMLP, "InfPiConvNet": InfPiConvNet}.get(entry["kind"])
    if kind is not None:
        net = kind.from_state_dict(entry["state"])
    elif entry["kind"] == "FinPiMLPSample":
        net = InfMLP(5, 3, 6, 2, bias_alpha=0.5, last_bias_alpha=0.25, layernorm=True).sample(8)
    else:
        plan = {"pools": (1, 2), "shortcuts": ((0, 1),), "bias_alpha": 0.5}
        net = InfPiConvNet(3, 4, (3, 3, 4), **plan).sample(4)
    net.load_state_dict(entry["state"])
    torch.testing.assert_close(net(entry["x"]), entry["y"], rtol=1e-5, atol=1e-6)


# What does not load


def bad_values(value: Tensor) -> dict[str, object]:
    """By name, what can't be taken for `value`, of the same shape where it has one."""
    found = {
        "meta": torch.empty_like(value, device="meta"),
        "complex": value.to(torch.complex64),
        "bool": value.to(torch.bool),
        "list": value.tolist(),
        "string": "x",
        "None": None,
        "numpy": np.asarray(value.float()),
        "another shape": value.new_zeros(*value.shape, 2),
    }
    if value.ndim:
        found["sparse"] = value.to_sparse()
    if value.is_floating_point():
        if value.ndim:
            found["whole numbers"] = value.to(torch.int64)
    elif value.dtype != torch.uint8:
        found["fractions"] = value.to(torch.float64)
    return found


def wrong_entries(state: dict[str, Tensor]):
    """(name, value) of one entry of each kind in turn, in every way in which it can be wrong."""
    one_of_a_kind = {name.replace("layers.2", "layers.1"): name for name in state}
    for name in one_of_a_kind.values():
        if name.endswith(("_raw", "_factors")):
            continue  # hints, which are passed over where they do not fit
        for kind, value in bad_values(state[name]).items():
            number = kind == "list" and name.endswith("alpha")  # as the original library's have it
            if not number:
                yield name, value


def assert_refused(module: nn.Module, state: dict, name: str) -> None:
    for strict in (True, False):
        before = values(module)
        with pytest.raises(RuntimeError, match=name.removesuffix("_scale").removesuffix("_shift")):
            module.load_state_dict(state, strict=strict)
        assert_same(before, module)


@every
def test_a_network_refuses_what_is_no_tensor_of_its_kind_and_stays_as_before(make):
    net, state = make(), make().state_dict()
    for name, value in wrong_entries(state):
        assert_refused(net, {**state, name: value}, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "x", None, [1.0], True, 1j])
@pytest.mark.parametrize("name", ["rows", "moments", "finite", "conv"])
def test_multipliers_that_are_no_finite_numbers_are_refused(name, value):
    net = NETWORKS[name]()
    for setting in net.taken:
        if setting == "layernorm" and value is True:
            continue
        known = {**net.architecture(), setting: value}
        assert_refused(net, {**net.state_dict(), "_extra_state": known}, setting)
        if isinstance(value, str | bool | list | None):
            text = torch.tensor(list(json.dumps(known).encode()), dtype=torch.uint8)
            assert_refused(net, {**net.state_dict(), "_extra_state": text}, setting)
    if name == "rows":
        for key in ("first_layer_alpha", "layers.1.bias_alpha"):
            assert_refused(net, {**net.state_dict(), key: value}, key)
            if isinstance(value, float):
                assert_refused(net, {**net.state_dict(), key: torch.tensor(value)}, key)


@pytest.mark.parametrize(
    "record",
    [
        b"{",
        b"[1]",
        b"\xff\xfe",
        b'{"first_layer_alpha": NaN}',
        b"",
        b"[" * 10**5,
        b"7",
    ],
)
def test_an_architecture_that_is_none_is_refused(record):
    net = NETWORKS["rows"]()
    state = {**net.state_dict(), "_extra_state": torch.tensor(list(record), dtype=torch.uint8)}
    assert_refused(net, state, "_extra_state")
    with pytest.raises(ValueError, match="_extra_state"):
        InfMLP.from_state_dict(state)


@pytest.mark.parametrize(
    "change",
    [
        {"L": 10**9},
        {"L": "x"},
        {"L": None},
        {"degree": "x"},
        {"memory": 3},
        {"other": 1},
        {"r": 1.5},
    ],
    ids=str,
)
def test_no_network_is_built_from_settings_that_are_none(change):
    state = NETWORKS["moments"]().state_dict()
    known = {**InfMLP.from_state_dict(state).architecture(), **change}
    with pytest.raises(ValueError, match="architecture|L=|memory|degree"):
        InfMLP.from_state_dict({**state, "_extra_state": known})


@pytest.mark.parametrize("state", [{1: torch.ones(2)}, {None: 1}], ids=str)
def test_names_that_are_no_strings_are_refused(state):
    net = NETWORKS["rows"]()
    before = values(net)
    with pytest.raises(RuntimeError, match="not the name of an entry"):
        net.load_state_dict(state)
    with pytest.raises(TypeError, match="dict"):
        net.load_state_dict([state])
    assert_same(before, net)


LAYERS = {
    "input": lambda: InfPiInputLinearReLU(5, 6),
    "rows": lambda: InfPiLinearReLU(6, 4),
    "rows in eight bits": lambda: InfPiLinearReLU(6, 4, row_dtype=torch.int8),
    "folded rows": lambda: InfPiLinearReLU(6, 4, row_budget=3),
    "moments": lambda: InfPiLinear(6, 4),
    "input conv": lambda: InfPiInputConv2d(3, 4, bias_alpha=1),
    "conv": lambda: InfPiConv2d(4, 5, bias_alpha=1),
    "finite input": lambda: InfPiInputLinearReLU(5, 6).sample(5, 7),
    "finite": lambda: InfPiLinear(6, 4).sample(7, 8, torch.randn(7, 6)),
    "finite conv": lambda: FinPiConv2d(InfPiConv2d(4, 5), 7, 8, torch.randn(7, 4)),
}


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside another module"])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_layer_refuses_what_is_no_tensor_of_its_kind_and_stays_as_before(make, inside):
    layer, state = make(), make().state_dict()
    module, prefix = (nn.Sequential(layer), "0.") if inside else (layer, "")
    for name, value in wrong_entries(state):
        wrong = {prefix + key: held for key, held in {**state, name: value}.items()}
        assert_refused(module, wrong, name)


OPTIONAL = ("bias_alpha", "kappa", "origin", "_raw", "_factors", *LIMITS)  # others lack them


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_layer_with_a_missing_or_unknown_entry_stays_as_before(make):
    layer, state = make(), make().state_dict()
    needed = [name for name in state if not name.endswith(OPTIONAL)]
    changed = {
        key: value + 1 if value.is_floating_point() and "kappa" not in key else value
        for key, value in state.items()
    }
    for name in needed:
        before = values(layer)
        with pytest.raises(RuntimeError, match=name.removesuffix("_scale").removesuffix("_shift")):
            layer.load_state_dict({key: value for key, value in changed.items() if key != name})
        assert_same(before, layer)
    before = values(layer)
    with pytest.raises(RuntimeError, match="strange"):
        layer.load_state_dict({**changed, "strange": torch.ones(2)})
    assert_same(before, layer)


def test_what_a_refused_network_contains_is_not_loaded_either():
    """The reasons are those of the network, not that the entries of its layers are gone."""
    net = nn.Sequential(NETWORKS["folded rows"]())
    state = {f"0.{key}": value for key, value in NETWORKS["folded rows"]().state_dict().items()}
    state["0.layers.1.B"] = state["0.layers.1.B"].to_sparse()
    before = values(net)
    with pytest.raises(RuntimeError, match=r"0\.layers\.1\.B is a sparse") as error:
        net.load_state_dict(state)
    assert "Missing" not in str(error.value)
    assert_same(before, net)


def test_a_finite_network_takes_over_what_is_not_in_its_tensors():
    """Multipliers and projection: without them the same weights would be another network."""
    source = mlp(first_layer_alpha=2, last_layer_alpha=0.5, layernorm=True).sample(7)
    source.gaussian_init_()
    net = mlp().sample(7)
    net.load_state_dict(source.state_dict())
    x = inputs(net)
    assert torch.equal(net(x), source(x))
    assert [layer.project for layer in net.layers] == [False] * 3
    other = mlp(memory="moments").sample(7)
    assert_refused(other, source.state_dict(), "activation is another one")
    wrong = {**source.architecture(), "project": [True] * 3}
    assert_refused(net, {**source.state_dict(), "_extra_state": wrong}, "project")
