"""Checkpoints of the original code in InfMLP: same function, every setting kept, nothing changed by a file that does not fit."""

import subprocess
import sys

import pytest
import torch

from pilimit_lib.inf import InfMLP
from pilimit_lib.inf.convert import to_pilimit_orig
from pilimit_orig.inf import InfPiMLP
from tests.pilimit_orig import originals, small
from tests.pilimit_orig.fixtures import FOLDER, arrays, found
from tests.pilimit_orig.test_checkpoint import FORMS, NETS, readout_of_one_zero_row


def originals_net(case):
    return small.network(**NETS[case]) if case in NETS else readout_of_one_zero_row()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [*NETS, "one zero row"])
def test_every_form_gives_the_same_function(form, case, tmp_path):
    net = originals_net(case)
    FORMS[form](net, tmp_path / "net.th")
    X, _ = small.data(net)
    ours = InfMLP.from_pilimit_orig(tmp_path / "net.th")
    assert ours.L == net.L - 1 and ours.layernorm == net.layernorm and ours.last_bias_alpha == net.last_bias_alpha
    assert ours.layers[1].A.dtype == torch.float64
    assert torch.allclose(ours(X), net.predict(X), atol=1e-12)
    assert torch.allclose(ours.embedding(X), net.embedding(X), atol=1e-12)


@pytest.mark.parametrize("file", found("orig_*_pickled_object.th") + found("orig_*_converted.th"))
def test_recorded_checkpoints_give_the_recorded_outputs(file):
    expected = arrays(FOLDER / f"{file.stem.removesuffix('_pickled_object').removesuffix('_converted')}.npz")
    net = InfMLP.from_pilimit_orig(file)
    assert (net(expected["x"]) - expected["y_pred"]).abs().max() < 1e-5
    by_dictionary = InfMLP(16, 3, 8, 1, last_bias_alpha=0.9, layernorm=not net.layernorm)
    by_dictionary.load_pilimit_orig_net(InfPiMLP.load(file).state())
    assert (by_dictionary(expected["x"]) - expected["y_pred"]).abs().max() < 1e-5


def test_a_network_built_with_other_settings_takes_those_of_the_checkpoint():
    net = small.network(layernorm=True, last_bias_alpha=0.25)
    ours = InfMLP(5, 3, 4, 1, dtype=torch.float64, layernorm=False)
    ours.load_pilimit_orig_net(net.state())
    X, Y = small.data(net)
    assert torch.allclose(ours(X), net.predict(X), atol=1e-12)
    assert ours.architecture()["last_bias_alpha"] == 0.25 and ours.sample(8).layernorm


def test_loaded_networks_go_on_training(tmp_path):
    net = small.network()
    originals.save_object(net, tmp_path / "net.th")
    ours = InfMLP.from_pilimit_orig(tmp_path / "net.th")
    X, Y = small.data(net)
    before = (tmp_path / "net.th").read_bytes()
    torch.nn.functional.cross_entropy(ours(X), Y).backward()
    from pilimit_lib.inf import PiSGD
    PiSGD(ours.parameters(), lr=0.1).step()
    assert ours.rows == [15, 15] and (tmp_path / "net.th").read_bytes() == before


def test_half_precision_rows_stay_half():
    net = small.network().to(dtype=torch.float32).half()
    ours = InfMLP.from_pilimit_orig(net.state())
    assert ours.layers[1].A.dtype == torch.float16 and ours.layers[1].Amult.dtype == torch.float32
    assert ours.layers[0].A.dtype == torch.float32
    assert InfMLP.from_pilimit_orig(net.state(), row_dtype=torch.float32).layers[1].A.dtype == torch.float32
    X = small.data(net)[0].float()
    assert torch.allclose(ours(X), net.predict(X), atol=1e-5)


@pytest.mark.parametrize("case", [*NETS, "one zero row"])
def test_there_and_back_is_the_same_network(case, tmp_path):
    net = originals_net(case)
    again = InfPiMLP.load(to_pilimit_orig(InfMLP.from_pilimit_orig(net.state())), torch.float64)
    for name in ("As", "Bs", "Amult", "biases"):
        held = getattr(net, name)
        assert getattr(again, name).keys() == held.keys()
        assert all(torch.equal(getattr(again, name)[l], held[l]) for l in held)
    again.save(tmp_path / "back.th")
    assert torch.load(tmp_path / "back.th", weights_only=True)["layernorm"] == net.layernorm


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    net = small.network()
    ours = InfMLP(5, 4, 4, 3)
    before = {name: value.clone() for name, value in ours.state_dict().items() if isinstance(value, torch.Tensor)}
    with pytest.raises(ValueError, match=r"(?s)from_pilimit_orig builds.*d_out: 4 here, 3 in the checkpoint.*L: 3 here, 1"):
        ours.load_pilimit_orig_net(net.state())
    with pytest.raises(ValueError, match="layers.0 has no bias here, its multiplier in the checkpoint is 0.7"):
        InfMLP(5, 3, 4, 1, bias_alpha=0, last_bias_alpha=1).load_pilimit_orig_net(net.state())
    (tmp_path / "bad.th").write_bytes(b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R.")
    with pytest.raises(ValueError, match="asks for posix.system"):
        ours.load_pilimit_orig_net(tmp_path / "bad.th")
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items() if name in before)


def test_the_oracle_loads_nothing_of_the_library():
    code = ("import pilimit_orig.inf, pilimit_orig.inf.meta, pilimit_orig.inf.kernel, pilimit_orig.convert_net, sys;"
            "bad = [m for m in sys.modules if m.split('.')[0] in ('pilimit_lib', 'experiments', 'inf')];"
            "assert not bad, bad; import pilimit_lib; assert 'pilimit_lib' in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)
