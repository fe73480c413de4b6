"""Checkpoints of the original code in InfMLP: same function, every setting kept, nothing changed by
a file that does not fit."""

import inspect
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch

from pilimit_lib.inf import InfMLP, PiSGD
from pilimit_lib.inf.checkpoints.original import read_pilimit_orig, to_pilimit_orig
from pilimit_orig.checkpoint import read
from pilimit_orig.inf import InfPiMLP
from tests.pilimit_orig import originals, small
from tests.pilimit_orig.fixtures import FOLDER, arrays, found
from tests.pilimit_orig.test_checkpoint import FORMS, NETS, readout_of_one_zero_row
from tests.pilimit_orig.test_untrusted import Evil

TORCH_FORMS = [form for form in FORMS if "plain pickle" not in form]


def originals_net(case):
    return small.network(**NETS[case]) if case in NETS else readout_of_one_zero_row()


@pytest.mark.parametrize("form", TORCH_FORMS)
@pytest.mark.parametrize("case", [*NETS, "one zero row"])
def test_every_form_gives_the_same_function(form, case, tmp_path):
    net = originals_net(case)
    FORMS[form](net, tmp_path / "net.th")
    same_function(InfMLP.from_pilimit_orig(tmp_path / "net.th"), net)


def same_function(ours, net):
    X, _ = small.data(net)
    assert (
        ours.L == net.L - 1
        and ours.layernorm == net.layernorm
        and ours.last_bias_alpha == net.last_bias_alpha
    )
    assert ours.layers[1].A.dtype == torch.float64
    assert torch.allclose(ours(X), net.predict(X), atol=1e-12)
    assert torch.allclose(ours.embedding(X), net.embedding(X), atol=1e-12)


@pytest.mark.parametrize("file", found("orig_*_pickled_object.th") + found("orig_*_converted.th"))
def test_recorded_checkpoints_give_the_recorded_outputs(file):
    expected = arrays(
        FOLDER / f"{file.stem.removesuffix('_pickled_object').removesuffix('_converted')}.npz"
    )
    net = InfMLP.from_pilimit_orig(file)
    assert (net(expected["x"]) - expected["y_pred"]).abs().max() < 1e-5
    by_dictionary = InfMLP(16, 3, 8, 1, last_bias_alpha=0.9, layernorm=not net.layernorm)
    by_dictionary.load_pilimit_orig_net(InfPiMLP.load(file).state())
    assert (by_dictionary(expected["x"]) - expected["y_pred"]).abs().max() < 1e-5


@pytest.mark.parametrize("form", TORCH_FORMS)
def test_both_readers_read_the_same(form, tmp_path):
    FORMS[form](small.network(), tmp_path / "net.th")
    one, other = read_pilimit_orig(tmp_path / "net.th"), read(tmp_path / "net.th")
    assert one.keys() == other.keys()
    for name in ("As", "Bs", "Amult", "biases"):
        assert all(
            torch.equal(one[name][layer], other[name][layer]) for layer in one[name] | other[name]
        )


def test_a_network_built_with_other_settings_takes_those_of_the_checkpoint():
    net = small.network(layernorm=True, last_bias_alpha=0.25)
    ours = InfMLP(5, 3, 4, 1, dtype=torch.float64, layernorm=False)
    ours.load_pilimit_orig_net(net.state())
    X, _ = small.data(net)
    assert torch.allclose(ours(X), net.predict(X), atol=1e-12)
    assert ours.architecture()["last_bias_alpha"] == 0.25 and ours.sample(8).layernorm


def test_loaded_networks_go_on_training_and_leave_the_file_alone(tmp_path):
    net = small.network()
    originals.save_object(net, tmp_path / "net.th")
    ours = InfMLP.from_pilimit_orig(tmp_path / "net.th")
    X, Y = small.data(net)
    before = (tmp_path / "net.th").read_bytes()
    torch.nn.functional.cross_entropy(ours(X), Y).backward()
    PiSGD(ours.parameters(), lr=0.1).step()
    assert ours.rows == [15, 15] and (tmp_path / "net.th").read_bytes() == before


def test_half_precision_rows_stay_half():
    net = small.network().to(dtype=torch.float32).half()
    ours = InfMLP.from_pilimit_orig(net.state())
    assert ours.layers[1].A.dtype == torch.float16 and ours.layers[1].Amult.dtype == torch.float32
    assert ours.layers[0].A.dtype == torch.float32
    assert (
        InfMLP.from_pilimit_orig(net.state(), row_dtype=torch.float32).layers[1].A.dtype
        == torch.float32
    )
    X = small.data(net)[0].float()
    assert torch.allclose(ours(X), net.predict(X), atol=1e-5)


@pytest.mark.skipif(
    "memory" not in inspect.signature(InfMLP).parameters, reason="this version has rows only"
)
def test_straight_to_moments(tmp_path):
    net = small.network(L=2).to(dtype=torch.float32).half()
    originals.save_object(net, tmp_path / "net.th")
    ours = InfMLP.from_pilimit_orig(tmp_path / "net.th", memory="moments", degree=4)
    X = small.data(net)[0].float()
    rows = InfMLP.from_pilimit_orig(tmp_path / "net.th")
    assert next(ours.layers[1].parameters()).dtype == torch.float32
    assert torch.allclose(ours(X), rows.to_moments(4)(X), atol=1e-5)
    assert (ours(X) - rows(X)).abs().max() < 0.05 * rows(X).abs().max()
    with pytest.raises(ValueError, match="keeps moments"):
        to_pilimit_orig(ours)


@pytest.mark.parametrize("case", [*NETS, "one zero row"])
def test_there_and_back_is_the_same_network(case, tmp_path):
    net = originals_net(case)
    again = InfPiMLP.load(to_pilimit_orig(InfMLP.from_pilimit_orig(net.state())), torch.float64)
    for name in ("As", "Bs", "Amult", "biases"):
        held = getattr(net, name)
        assert getattr(again, name).keys() == held.keys()
        assert all(torch.equal(getattr(again, name)[layer], held[layer]) for layer in held)
    again.save(tmp_path / "back.th")
    assert torch.load(tmp_path / "back.th", weights_only=True)["layernorm"] == net.layernorm


def test_a_checkpoint_that_does_not_fit_changes_nothing():
    net = small.network()
    ours = InfMLP(5, 4, 4, 3)
    before = {
        name: value.clone()
        for name, value in ours.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    with pytest.raises(
        ValueError,
        match=r"(?s)from_pilimit_orig builds.*d_out is 4 here, 3 in the checkpoint.*L is 3 here, 1",
    ):
        ours.load_pilimit_orig_net(net.state())
    with pytest.raises(
        ValueError, match="layers.0 has no bias here, its multiplier in the checkpoint is 0.7"
    ):
        InfMLP(5, 3, 4, 1, bias_alpha=0, last_bias_alpha=1).load_pilimit_orig_net(net.state())
    ours = InfMLP(5, 3, 4, 1)
    before = {
        name: value.clone()
        for name, value in ours.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    for name, layer in (("Bs", 2), ("As", 1), ("As", 2), ("Amult", 3), ("biases", 3)):
        wrong = net.state() | {name: getattr(net, name) | {layer: getattr(net, name)[layer][:-1]}}
        with pytest.raises(ValueError, match="fit"):
            ours.load_pilimit_orig_net(wrong)
    with pytest.raises(ValueError, match="layernorm, As, Bs, Amult, biases missing"):
        ours.load_pilimit_orig_net(
            {
                name: 1.0
                for name in (
                    "first_layer_alpha",
                    "last_layer_alpha",
                    "bias_alpha",
                    "last_bias_alpha",
                )
            }
        )
    with pytest.raises(ValueError, match="first_layer_alpha is nan"):
        ours.load_pilimit_orig_net(net.state() | {"first_layer_alpha": float("nan")})
    assert all(
        torch.equal(value, before[name])
        for name, value in ours.state_dict().items()
        if name in before
    )


@pytest.mark.parametrize(
    "writer",
    [
        torch.save,
        lambda v, p: torch.save(v, p, _use_new_zipfile_serialization=False),
        lambda v, p: p.write_bytes(pickle.dumps(v)),
    ],
    ids=["zip", "old format", "pickle"],
)
def test_nothing_is_executed(writer, tmp_path):
    path, before = tmp_path / "net.th", set(torch.serialization.get_safe_globals())
    for value in (
        Evil(tmp_path / "executed"),
        small.network().state() | {"leftover": Evil(tmp_path / "executed")},
    ):
        writer(value, path)
        with pytest.raises(ValueError, match="posix.system|not a file of torch.save"):
            InfMLP.from_pilimit_orig(path)
    assert sorted(os.listdir(tmp_path)) == ["net.th"]
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_damaged_and_foreign_files_are_refused(zipped, tmp_path):
    path = tmp_path / "net.th"
    originals.save_object(small.network(), path, zipped=zipped)
    whole = path.read_bytes()
    for length in [0, 1, 10, 100, *range(500, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged|not a file of torch.save"):
            InfMLP.from_pilimit_orig(path)
    torch.save(torch.nn.Linear(3, 2).state_dict(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match="not a network of the original code: .*found weight, bias"
    ):
        InfMLP.from_pilimit_orig(path)
    with pytest.raises(FileNotFoundError):
        InfMLP.from_pilimit_orig(tmp_path / "absent.th")


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "net.th"
    originals.save_object(small.network(), path)
    with zipfile.ZipFile(path) as archive:
        used = archive.read("net/data/1")
    whole = path.read_bytes()
    at = whole.index(used) + 5
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match="checksum"):
        InfMLP.from_pilimit_orig(path)


def test_neither_loads_the_other():
    code = (
        "import pilimit_orig.inf.meta, pilimit_orig.inf.kernel, pilimit_orig.convert_net, sys;"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('pilimit_lib', 'experiments', "
        "'inf')];"
        "[sys.modules.pop(m) for m in list(sys.modules) if m.startswith('pilimit_orig')];"
        "import pilimit_lib.inf.checkpoints.original; assert not [m for m in sys.modules if "
        "m.startswith('pilimit_orig')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_network_saved_on_a_gpu_opens_without_one(tmp_path):
    """Published networks were: their storages say cuda:0 where these say cpu."""
    net = small.network()
    originals.save_object(net, tmp_path / "cpu.th", device="cuda:0")
    with (
        zipfile.ZipFile(tmp_path / "cpu.th") as source,
        zipfile.ZipFile(tmp_path / "gpu.th", "w") as target,
    ):
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in content
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            target.writestr(name, content)
    same_function(InfMLP.from_pilimit_orig(tmp_path / "gpu.th"), net)
    X, _ = small.data(net)
    assert torch.equal(InfPiMLP.load(tmp_path / "gpu.th", torch.float64).predict(X), net.predict(X))
