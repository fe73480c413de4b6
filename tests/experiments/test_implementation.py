"""Which sums training commands run with: what is chosen, what is said, and that a resumed run goes
on as it began."""

from __future__ import annotations

import json

import pytest
import torch

from experiments.cifar10 import cifar10mlp
from experiments.cifar10.settings import Settings
from experiments.meta import train as meta_train
from experiments.meta.settings import Settings as MetaSettings
from experiments.training import implementation, loop
from experiments.training.implementation import UNAVAILABLE, decided
from pilimit_lib.core import load
from pilimit_lib.inf.implementation import chosen
from pilimit_lib.inf.implementation import implementation as with_implementation
from tests.experiments.test_endings import SMALL, same_runs
from tests.experiments.test_meta import SINUSOID

KINDS = {
    "rows": [],
    "moments": ["--memory", "moments"],
    "both": ["--memory", "moments", "--row-budget", "20"],
}


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(loop.Trainer, "draw", lambda self, folder: None)
    monkeypatch.setattr(meta_train.Trainer, "draw", lambda self, folder: None)


@pytest.fixture
def buildable():
    for unavailable in UNAVAILABLE.values():
        if unavailable() is not None:
            pytest.skip(unavailable())


@pytest.fixture
def no_compiler(monkeypatch):
    missing = dict.fromkeys(UNAVAILABLE, lambda: "there is no C++ compiler")
    monkeypatch.setattr(implementation, "UNAVAILABLE", missing)


def train(folder, *flags: str):
    return cifar10mlp.main([*SMALL, *flags, "--save-dir", str(folder)])


def recorded(folder) -> str:
    return json.loads((folder / "settings.json").read_text())["implementation"]


@pytest.mark.parametrize("kind", KINDS)
def test_native_runs_are_plain_ones_up_to_rounding(buildable, tmp_path, kind):
    runs = {}
    for name in ("auto", "plain"):
        train(tmp_path / name, "--implementation", name, "--epochs", "2", "--quiet", *KINDS[kind])
        runs[name] = load(tmp_path / name / "checkpoint.pt")["model"]
    assert recorded(tmp_path / "auto") == "native" and recorded(tmp_path / "plain") == "plain"
    differing = []
    for name, value in runs["plain"].items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(runs["auto"][name], value, rtol=1e-3, atol=2e-5)
            differing.append(not torch.equal(runs["auto"][name], value))
    assert any(differing)  # else the same sums ran twice


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(buildable, tmp_path, kind):
    flags = [*KINDS[kind], "--quiet"]
    train(tmp_path / "whole", "--epochs", "2", *flags)
    train(tmp_path / "parts", "--epochs", "1", *flags)
    cifar10mlp.main(["--resume", "--epochs", "2", "--quiet", "--save-dir", str(tmp_path / "parts")])
    same_runs(tmp_path / "whole", tmp_path / "parts")
    assert recorded(tmp_path / "parts") == "native"


def test_without_a_compiler_it_is_torch_and_said_in_a_line(no_compiler, tmp_path, capsys):
    train(tmp_path, "--epochs", "1")
    assert "sums in torch, not in C++: there is no C++ compiler" in capsys.readouterr().out
    assert recorded(tmp_path) == "plain"
    with pytest.raises(SystemExit):
        train(tmp_path / "other", "--implementation", "native")
    assert "there is no C++ compiler; plain sums in torch" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_run_that_goes_on_with_other_sums_says_so(buildable, tmp_path, capsys):
    train(tmp_path, "--epochs", "1", "--implementation", "plain")
    assert "sums" not in capsys.readouterr().out
    resume = ["--resume", "--epochs", "2", "--save-dir", str(tmp_path)]
    cifar10mlp.main([*resume, "--implementation", "native"])
    assert "begun with --implementation plain and goes on with native" in capsys.readouterr().out
    assert recorded(tmp_path) == "native"


def test_a_run_of_before_there_was_a_choice_goes_on_in_torch(buildable, tmp_path):
    train(tmp_path, "--epochs", "1", "--implementation", "plain", "--quiet")
    settings = json.loads((tmp_path / "settings.json").read_text())
    del settings["implementation"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    cifar10mlp.main(["--resume", "--epochs", "2", "--quiet", "--save-dir", str(tmp_path)])
    assert recorded(tmp_path) == "plain"


def test_what_no_machine_can_is_known_before_anything_is_built():
    for settings, reason in (
        (Settings(memory="moments", degree=3), "degrees up to 2"),
        (Settings(cuda=True), "runs on the CPU"),
        (MetaSettings(hidden_size=-1), "it sums float32, and --dtype is float64"),
    ):
        found, note = decided("auto", settings.sums, settings.not_native)
        assert found == "plain" and reason in note
    for finite in (Settings(width=8), MetaSettings(), MetaSettings(hidden_size=-1, gp=True)):
        assert decided("auto", finite.sums, finite.not_native) == ("plain", "")


def test_auto_leaves_a_choice_that_was_made_around_the_run(capsys):
    with with_implementation(rows="plain"):
        assert decided("auto", ("rows",), None) == ("plain", "")


def test_meta_learning_sums_in_cpp_too(buildable, tmp_path, monkeypatch):
    found, step = [], meta_train.meta_step
    monkeypatch.setattr(
        meta_train, "meta_step", lambda *given: (found.append(chosen()), step(*given))[1]
    )
    flags = [*SINUSOID, "--dtype", "float32", "--quiet", "--output-folder", str(tmp_path)]
    meta_train.main([*flags, "--memory", "moments", "--hidden-size", "-1"])
    assert {choice.moments for choice in found} == {"native"}
    assert json.loads((tmp_path / "config.json").read_text())["implementation"] == "native"
