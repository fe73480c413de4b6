"""Checkpoints of the original code: every form is read, nothing in them is executed, and what is
wrong is said."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pilimit_orig import checkpoint, convert_net
from pilimit_orig.inf import InfPiMLP
from tests.pilimit_orig import originals, small
from tests.pilimit_orig.fixtures import FOLDER, arrays, found

FORMS = {
    "object": originals.save_object,
    "object, old torch format": lambda net, path: originals.save_object(net, path, zipped=False),
    "dictionary": originals.save_legacy,
    "dictionary, plain pickle": lambda net, path: originals.save_legacy(
        net, path, with_pickle=True
    ),
    "own": lambda net, path: net.save(path),
}
NETS = {
    "plain": dict(),
    "layernorm": dict(layernorm=True),
    "last bias": dict(last_bias_alpha=0.25),
    "L1": dict(L=1),
    "no bias": dict(bias_alpha=0.0, last_bias_alpha=None),
    "only a last bias": dict(bias_alpha=0.0, last_bias_alpha=0.5),
}


def readout_of_one_zero_row():
    """As left by readout_zero_init and one step: the first row has A = 0 and Amult = 0."""
    net = small.network(readout_zero_init=True)
    net.As[3], net.Bs[3], net.Amult[3] = torch.zeros(1, 3), torch.zeros(1, 4), torch.zeros(1)
    net.to(dtype=torch.float64)
    X, Y = small.data(net)
    net(X)
    net.backward(torch.randn(6, 3, dtype=torch.float64))
    net.step(0.1)
    return net


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [*NETS, "one zero row"])
def test_every_form_gives_the_same_function(form, case, tmp_path):
    net = small.network(**NETS[case]) if case in NETS else readout_of_one_zero_row()
    FORMS[form](net, tmp_path / "net.th")
    X, _ = small.data(net)
    loaded = InfPiMLP.load(tmp_path / "net.th", dtype=torch.float64)
    assert torch.equal(loaded.predict(X), net.predict(X))
    for name in ("As", "Bs", "Amult", "biases"):
        assert getattr(loaded, name).keys() == getattr(net, name).keys()


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_kept(form, tmp_path):
    net = small.network().to(dtype=torch.float32).half()
    FORMS[form](net, tmp_path / "net.th")
    read = checkpoint.read(tmp_path / "net.th")
    assert (
        read["As"][2].dtype == read["Bs"][3].dtype == torch.float16
        and read["Amult"][2].dtype == torch.float32
    )
    assert torch.equal(read["As"][2], net.As[2])


@pytest.mark.parametrize("file", found("orig_*_pickled_object.th") + found("orig_*_converted.th"))
def test_recorded_checkpoints_give_the_recorded_outputs(file):
    name = file.stem.removesuffix("_pickled_object").removesuffix("_converted")
    expected = arrays(FOLDER / f"{name}.npz")
    assert (InfPiMLP.load(file).predict(expected["x"]) - expected["y_pred"]).abs().max() < 1e-5


def test_numpy_numbers_and_a_missing_last_alpha(tmp_path):
    net = small.network(last_bias_alpha=None)
    originals.save_object(
        net,
        tmp_path / "net.th",
        first_layer_alpha=np.float64(1.5),
        last_layer_alpha=np.float32(0.5),
        last_bias_alpha=None,
    )
    read = checkpoint.read(tmp_path / "net.th")
    assert (read["first_layer_alpha"], read["last_layer_alpha"], read["last_bias_alpha"]) == (
        1.5,
        0.5,
        net.bias_alpha,
    )


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old torch format"])
def test_arrays_stay_in_the_file_until_used_and_the_file_stays_as_it_is(zipped, tmp_path):
    path, net = tmp_path / "net.th", small.network(rows=60_000, r=40)
    originals.save_object(net, path, zipped=zipped)
    before, resident = path.stat().st_mtime_ns, resident_bytes()
    read = checkpoint.read(path)
    # The old format puts arrays at odd places, from where they have to be read.
    if resident is not None and zipped:
        assert path.stat().st_size > 100 << 20 and resident_bytes() - resident < 20 << 20
    assert torch.equal(read["As"][2], net.As[2])
    read["As"][2][0] = 0
    assert path.stat().st_mtime_ns == before and checkpoint.read(path)["As"][2][0].any()


def resident_bytes():
    """Memory of this process, where the system tells."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def test_command_converts_to_plain_tensors(tmp_path, capsys):
    net = small.network(layernorm=True, last_bias_alpha=0.25)
    originals.save_object(net, tmp_path / "net.th")
    assert convert_net.main([str(tmp_path / "net.th")]) == 0
    assert "the library's L=1" in capsys.readouterr().out
    plain = torch.load(tmp_path / "net_converted.th", weights_only=True)
    assert plain["layernorm"] is True and plain["last_bias_alpha"] == 0.25
    assert plain["As"][2].untyped_storage().nbytes() == plain["As"][2].numel() * 8
    assert torch.equal(
        InfPiMLP.load(plain, torch.float64).predict(small.data(net)[0]),
        net.predict(small.data(net)[0]),
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.th", "net_converted.th"]
    with pytest.raises(SystemExit):
        convert_net.main([str(tmp_path / "net.th"), str(tmp_path / "net.th")])


def test_shapes_that_disagree_are_named():
    good = small.network().state()
    cases = {
        "Bs": r"Bs\[2\] has shape \(8, 4\), expected \(9, 4\)",
        "As": r"Bs\[2\]",
        "Amult": r"Amult\[2\]",
        "biases": r"biases\[2\]",
    }
    for name, message in cases.items():
        bad = good | {name: good[name] | {2: good[name][2][:-1]}}
        with pytest.raises(checkpoint.CheckpointError, match=message):
            checkpoint.checked(bad)
    with pytest.raises(checkpoint.CheckpointError, match="without gaps"):
        checkpoint.checked(good | {"As": {1: good["As"][1], 3: good["As"][3]}})
    with pytest.raises(checkpoint.CheckpointError, match="layers .2. have no bias"):
        checkpoint.checked(good | {"biases": {1: good["biases"][1], 3: good["biases"][3]}})
    with pytest.raises(checkpoint.CheckpointError, match="first_layer_alpha is nan"):
        checkpoint.checked(good | {"first_layer_alpha": float("nan")})
    with pytest.raises(checkpoint.CheckpointError, match="not floating-point"):
        checkpoint.checked(good | {"Amult": good["Amult"] | {2: torch.ones(9, dtype=torch.int64)}})
    with pytest.raises(
        checkpoint.CheckpointError, match="layernorm missing; found first_layer_alpha"
    ):
        checkpoint.checked({name: value for name, value in good.items() if name != "layernorm"})
