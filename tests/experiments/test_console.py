"""`pilimit <command>`: help without torch, the mains of the modules, what the doctor says, logs."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

import pilimit_lib
from experiments import console, doctor
from experiments.training import logs
from experiments.training.called import COMMANDS, called
from experiments.training.flag_texts import COMMON

ROOT = Path(__file__).resolve().parents[2]
FEW = ["--train-subset-size", "16", "--test-subset-size", "16", "--r", "4", "--dataset", "digits"]


def test_help_and_version_load_no_torch():
    code = (
        "import sys; from experiments import console; "
        "console.main(['--help']); console.main(['--version']); "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"pilimit {pilimit_lib.__version__}" in done.stdout
    assert all(f"\n  {name} " in done.stdout for name in console.MEANINGS)


def test_every_command_has_a_module_and_a_meaning():
    assert set(console.MEANINGS) == set(COMMANDS) | set(console.ELSEWHERE)
    for module in (*COMMANDS.values(), *(f"bench.{name}" for name in console.benchmarks())):
        path = ROOT / "experiments" / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or path.is_dir(), module
    assert "rows" in console.benchmarks()


@pytest.mark.parametrize("typed, said", [(["frob"], "'frob'"), (["bench", "frob"], "rows, soak")])
def test_what_is_not_there_is_said_with_what_is(capsys, typed, said):
    assert console.main(typed) == 2
    assert said in capsys.readouterr().err


def test_a_command_trains_and_prints_how_it_is_resumed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pilimit"])
    assert console.main(["train", *FEW, "--epochs", "1", "--save-dir", str(tmp_path)]) == 0
    assert (tmp_path / "metrics.jsonl").is_file()
    assert called("cifar10.cifar10mlp") == "pilimit train"
    assert called("bench.rows") == "pilimit bench rows"
    with pytest.raises(SystemExit):
        console.main(["train", "--depth", "deep"])
    assert "pilimit train: error:" in capsys.readouterr().err


def test_a_command_shows_its_own_help():
    code = "import sys; from experiments import console; sys.exit(console.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "OUT" in done.stdout and "a checkpoint of the original code" in done.stdout


def test_a_command_has_its_modules_name_otherwise():
    assert called("meta.train") == "python -m experiments.meta.train"


def test_the_doctor_speaks_of_versions_processor_gpu_and_extras(monkeypatch):
    said = "\n".join(doctor.lines())
    for what in (pilimit_lib.__version__, "Python 3", "torch", "processor:", "GPU:", "sums in C++"):
        assert what in said
    listed = ["torch>=2.4", 'nothing-of-that-name>=1; extra == "hub"', "numpy; extra == 'hub'"]
    assert doctor.extras(listed) == {"hub": ["nothing-of-that-name", "numpy"]}
    monkeypatch.setattr(doctor, "requires", lambda name: listed)
    assert "extra hub: lacks nothing-of-that-name: pip install 'pilimit[hub]'" in doctor.lines()


def test_one_flag_has_one_group():
    names = [name for meanings in COMMON.values() for name in meanings]
    assert len(names) == len(set(names))


def test_tensorboard_shows_every_epoch_once_though_a_run_was_resumed(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from experiments.cifar10.cifar10mlp import main

    where = ["--save-dir", str(tmp_path), "--log", "tensorboard", "--quiet"]
    main([*FEW, "--epochs", "2", *where])
    main(["--resume", "--epochs", "3", *where])
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    shown = found.Scalars("test_acc")
    assert [event.step for event in shown] == [1, 2, 3]
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [event.value for event in shown] == pytest.approx([r["test_acc"] for r in kept])


class Recorder:
    """What is asked of Weights & Biases."""

    def __init__(self):
        self.begun, self.logged = [], []

    def init(self, **how):
        self.begun.append(how)
        return types.SimpleNamespace(log=lambda found, step: self.logged.append((step, found)))


def test_weights_and_biases_resume_the_run_that_they_know(tmp_path, monkeypatch):
    recorder = types.ModuleType("wandb")
    asked = Recorder()
    recorder.init, recorder.__spec__ = asked.init, types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    from experiments.cifar10.cifar10mlp import main

    where = ["--save-dir", str(tmp_path), "--log", "wandb", "--quiet"]
    main([*FEW, "--epochs", "1", *where])
    main(["--resume", "--epochs", "2", *where])
    main([*FEW, "--epochs", "1", "--overwrite", *where])
    first, again, anew = (how["id"] for how in asked.begun)
    assert first == again != anew
    assert asked.begun[0]["config"]["r"] == 4 and asked.begun[0]["resume"] == "allow"
    assert [step for step, _ in asked.logged] == [1, 1, 2, 1]
    assert 0 <= asked.logged[0][1]["test_acc"] <= 1


def test_a_log_whose_package_is_absent_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    from experiments.cifar10.cifar10mlp import main

    with pytest.raises(SystemExit):
        main([*FEW, "--log", "wandb", "--save-dir", str(tmp_path)])
    assert "pip install 'pilimit[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "metrics.jsonl").exists()
