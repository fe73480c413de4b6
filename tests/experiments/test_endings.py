"""How training commands end and go on, in real processes: signals, kills, divergence, other runs in
the same folder, full disks, closed pipes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from experiments.cifar10 import cifar10conv, cifar10mlp
from experiments.meta import train as meta_train
from experiments.training import loop
from experiments.training.lock import only_process
from experiments.training.process import shows_bars
from experiments.training.run_folder import RunFolder
from pilimit_lib.core import load
from tests import warm
from tests.experiments.test_meta import SINUSOID

ROOT = Path(__file__).resolve().parents[2]
MLP = [sys.executable, "-m", "experiments.cifar10.cifar10mlp"]
SMALL = [
    "--dataset",
    "digits",
    "--train-subset-size",
    "40",
    "--test-subset-size",
    "20",
    "--r",
    "6",
    "--batch-size",
    "4",
]
TIMES = ("seconds", "cpu_seconds")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def start(command: list[str], **how) -> subprocess.Popen:
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment()} | how
    return subprocess.Popen(command, cwd=ROOT, text=True, **how)


def finish(command: list[str], **how) -> tuple[int, str, str]:
    """(exit status, output, errors) of a command."""
    process = start(command, **how)
    output, errors = process.communicate(timeout=600)
    return process.returncode, output, errors


def child(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def same(one, two, where="checkpoint"):
    """Equal in every bit, times apart."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one.keys() - TIMES:
            same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for i, pair in enumerate(zip(one, two)):
            same(*pair, f"{where}[{i}]")
    else:
        assert one == two, where


def same_runs(one: Path, two: Path) -> None:
    same(load(one / "checkpoint.pt"), load(two / "checkpoint.pt"))
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (one, two)]
    same([json.loads(line) for line in lines[0]], [json.loads(line) for line in lines[1]], "lines")


# A process that sends itself a signal at its n-th step.
AT_STEP = """
import os, sys
from experiments.cifar10 import cifar10mlp
original, count = cifar10mlp.Trainer.step, [0]
def step(self, *batch):
    original(self, *batch)
    count[0] += 1
    if count[0] == {step}:
        os.kill(os.getpid(), {number})
cifar10mlp.Trainer.step = step
cifar10mlp.main({flags!r})
"""


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_so_by_its_status_and_the_printed_command_goes_on(
    tmp_path, number, status
):
    whole, parts = tmp_path / "whole", tmp_path / "the parts"
    flags = [*SMALL, "--lr", "0.3", "--epochs", "2", "--quiet"]
    cifar10mlp.main([*flags, "--save-dir", str(whole)])
    code = AT_STEP.format(step=14, number=int(number), flags=[*flags, "--save-dir", str(parts)])
    returned, output, errors = warm.finish(code)
    assert returned == status, errors
    state = load(parts / "checkpoint.pt")["extras"]
    assert state["epoch"] == 1 and state["batches"]["position"] == 4
    typed = shlex.split(re.search(r"go on with: (python -m .*)", output).group(1))
    assert typed[2:] == ["experiments.cifar10.cifar10mlp", "--resume", "--save-dir", str(parts)]
    if number == signal.SIGINT:
        assert finish([sys.executable, *typed[1:]])[0] == 0
    else:
        cifar10mlp.main(typed[3:])
    same_runs(whole, parts)


def test_a_resumed_run_may_go_on_for_longer_and_is_resumed_so(tmp_path, capsys):
    flags = ["--resume", "--save-dir", str(tmp_path)]
    cifar10mlp.main([*SMALL, "--lr", "0.3", "--epochs", "1", "--save-dir", str(tmp_path)])
    assert len(cifar10mlp.main([*flags, "--epochs", "2"])) == 2
    assert json.loads((tmp_path / "settings.json").read_text())["epochs"] == 2
    assert len(cifar10mlp.main(flags)) == 2
    for contradiction in (["--lr", "1.0"], ["--data-augment"], ["--r", "50"]):  # defaults as well
        with pytest.raises(SystemExit):
            cifar10mlp.main([*flags, *contradiction])
        assert "other settings" in capsys.readouterr().err


def test_networks_beside_are_resumed_without_being_named(tmp_path):
    flags = ["--dataset", "digits", "--ranks", "4,5", "--pools", "2", "--train-subset-size", "64"]
    flags += ["--test-subset-size", "32", "--epochs", "1", "--beside", "mup:4,batchnorm:3"]
    whole = cifar10conv.main([*flags, "--save-dir", str(tmp_path / "whole"), "--quiet"])
    code = f"""
import os
from experiments.cifar10 import cifar10conv
original = cifar10conv.Trainer.record
def record(self):
    os.kill(os.getpid(), {int(signal.SIGINT)})  # in the last step of the first network
    return original(self)
cifar10conv.Trainer.record = record
cifar10conv.main({[*flags, "--save-dir", str(tmp_path / "parts"), "--quiet"]!r})
"""
    assert warm.finish(code)[0] == 130
    assert not (tmp_path / "parts" / "mup4" / "checkpoint.pt").exists()
    parts = cifar10conv.main(["--resume", "--save-dir", str(tmp_path / "parts"), "--quiet"])
    by_name = [sorted(records, key=lambda record: record["network"]) for records in (whole, parts)]
    same(*by_name, "records")


def test_bars_are_drawn_on_a_terminal_only_and_tables_everywhere(tmp_path, capsys):
    flags = [*SMALL, "--epochs", "1", "--batch-size", "1", "--save-dir", str(tmp_path / "run")]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = start([*MLP, *flags], stderr=theirs)
    bar = b""
    # Our own end stays open: with the last one, what was not read yet would be gone.
    while select.select([ours], [], [], 0.2)[0] or process.poll() is None:
        if select.select([ours], [], [], 0)[0]:
            bar += os.read(ours, 4096)
    output = process.communicate(timeout=600)[0]
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0
    assert "epoch train loss" in output and "epoch 1/1" in bar.decode()
    cifar10mlp.main([*flags, "--overwrite"])
    output, errors = capsys.readouterr()
    assert errors == "" and "epoch train loss" in output
    cifar10mlp.main([*flags, "--overwrite", "--quiet"])
    assert capsys.readouterr() == ("", "")


def test_where_bars_are_shown(monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    assert not shows_bars()
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert shows_bars() and not shows_bars(quiet=True)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert not shows_bars()


# The rate is multiplied by 1e30 after the first epoch, which is good.
WILD = [*SMALL, "--lr", "0.01", "--epochs", "3", "--scheduler", "multistep"]
WILD += ["--lr-drop-milestones", "1", "--lr-drop-ratio", "1e30", "--gclip", "0", "--wd", "0"]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--memory", "moments"],
        ["--memory", "moments", "--row-budget", "20"],
        ["--memory", "moments", "--optimizer", "adam", "--gclip", "0.4"],
        ["--memory", "moments", "--optimizer", "adamw"],
        ["--loss", "mse"],
        ["--width", "16"],
        ["--width", "16", "--gaussian-init", "--optimizer", "adam", "--loss", "mse"],
    ],
)
def test_divergence_is_said_and_the_last_good_checkpoint_kept(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        cifar10mlp.main([*WILD, *flags, "--save-dir", str(tmp_path)])
    said = capsys.readouterr().err
    assert stopped.value.code == 1
    assert "It happened in epoch 2" in said and "usage" not in said
    assert str(tmp_path / "checkpoint.pt") in said
    kept = load(tmp_path / "checkpoint.pt")
    assert kept["extras"]["epoch"] == 1
    for value in kept["model"].values():
        assert not isinstance(value, torch.Tensor) or bool(value.isfinite().all())
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_parameters_that_overflow_are_not_saved_though_the_loss_is_finite(
    tmp_path, capsys, monkeypatch
):
    original = cifar10mlp.Trainer.record

    def record(self):
        found = original(self)
        with torch.no_grad():
            self.net.layers[1].weight[0, 0] = float("inf")
        return found

    monkeypatch.setattr(cifar10mlp.Trainer, "record", record)
    with pytest.raises(SystemExit) as stopped:
        cifar10mlp.main([*SMALL, "--epochs", "1", "--width", "8", "--save-dir", str(tmp_path)])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and "layers.1.weight holds NaN or infinity" in said
    assert (
        "in epoch 1; saved before it: nothing" in said and not (tmp_path / "checkpoint.pt").exists()
    )


def test_other_commands_have_the_same_guard(tmp_path, capsys):
    flags = ["--dataset", "digits", "--ranks", "4,5", "--pools", "2", "--train-subset-size", "64"]
    flags += ["--test-subset-size", "32", "--epochs", "1", "--lr", "1e30", "--gclip", "0"]
    flags += ["--batch-size", "8"]
    with pytest.raises(SystemExit) as stopped:
        cifar10conv.main([*flags, "--save-dir", str(tmp_path / "conv")])
    assert stopped.value.code == 1 and "lower --lr" in capsys.readouterr().err
    flags = [*SINUSOID, "--meta-lr", "1e30", "--grad-clip", "-1", "--optimizer", "adam"]
    with pytest.raises(SystemExit) as stopped:
        meta_train.main([*flags, "--output-folder", str(tmp_path / "meta")])
    assert stopped.value.code == 1 and "lower --meta-lr" in capsys.readouterr().err
    assert not (tmp_path / "meta" / "checkpoint.pt").exists()


# A process that is killed with -9 at a certain place.
KILLED = """
import os
from experiments.cifar10 import cifar10mlp
from experiments.training import run_folder
{place} = lambda *args: os.kill(os.getpid(), 9)
cifar10mlp.main({flags!r})
"""


def test_a_kill_between_checkpoint_and_tables_loses_no_line(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*SMALL, "--epochs", "1", "--quiet", "--save-dir"]
    cifar10mlp.main([*flags, str(whole)])
    code = KILLED.format(place="cifar10mlp.Trainer.write", flags=[*flags, str(parts)])
    assert warm.finish(code)[0] == -signal.SIGKILL
    assert (parts / "checkpoint.pt").exists() and not (parts / "metrics.jsonl").exists()
    cifar10mlp.main(["--resume", "--quiet", "--save-dir", str(parts)])
    same_runs(whole, parts)


def test_after_a_kill_before_the_first_checkpoint_the_same_command_begins_anew(tmp_path, capsys):
    flags = [*SMALL, "--epochs", "1", "--quiet", "--save-dir", str(tmp_path)]
    code = KILLED.format(place="run_folder.RunFolder.save", flags=flags)
    assert warm.finish(code)[0] == -signal.SIGKILL
    torn = [tmp_path / f".checkpoint.{'0a' * 16}.part.pt", tmp_path / f".notes.{'0a' * 16}.part"]
    for path in torn:
        path.write_text("half")
    (tmp_path / ".mine.part").write_text("kept")
    assert {path.name for path in tmp_path.iterdir()} >= {"settings.json", ".lock"}
    with pytest.raises(SystemExit):
        cifar10mlp.main(["--resume", *flags])
    assert "Leave --resume out" in capsys.readouterr().err
    assert len(cifar10mlp.main(flags)) == 1
    assert not any(path.exists() for path in [*torn, tmp_path / ".lock"])
    assert (tmp_path / ".mine.part").read_text() == "kept"


def test_transfers_before_the_first_checkpoint_do_not_make_a_run(tmp_path):
    with RunFolder(tmp_path, {}):  # killed after a transfer of the untrained network
        (tmp_path / "transfers.jsonl").write_text("{}\n")
    with RunFolder(tmp_path, {}):
        assert not (tmp_path / "transfers.jsonl").exists()
        (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(FileExistsError, match="already holds a run"):
        with RunFolder(tmp_path, {}):
            pass


def test_two_runs_in_one_folder_are_refused_and_a_dead_one_holds_nothing(tmp_path, capsys):
    flags = [*SMALL, "--epochs", "1", "--quiet", "--overwrite", "--save-dir", str(tmp_path)]
    code = f"""
import time
from pathlib import Path
from experiments.training import loop
from experiments.training.lock import only_process
with only_process(Path({str(tmp_path)!r})):
    print("inside", flush=True)
    time.sleep(600)
"""
    process = start(child(code))
    assert process.stdout.readline() == "inside\n"
    with pytest.raises(SystemExit):
        cifar10mlp.main(flags)
    assert f"another process ({process.pid}) is writing" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    process.kill()
    process.communicate()
    assert (tmp_path / ".lock").exists()
    assert len(cifar10mlp.main(flags)) == 1 and not (tmp_path / ".lock").exists()


def come_and_go(folder: str, counts: str) -> None:
    end, count = time.monotonic() + 2, 0
    while time.monotonic() < end:
        try:
            with only_process(Path(folder)):
                inside = os.open(f"{folder}/inside", os.O_CREAT | os.O_EXCL)
                os.close(inside)
                os.unlink(f"{folder}/inside")
                count += 1
        except FileExistsError as error:
            assert "is writing to" in str(error), error
    Path(counts, str(os.getpid())).write_text(str(count))


def test_only_one_of_many_gets_in_at_a_time(tmp_path):
    """Processes that come and go, each removing the lock file that the next one may just have
    opened."""
    counts = tmp_path / "counts"
    counts.mkdir()
    folder = tmp_path / "folder"
    folder.mkdir()
    processes = [warm.process(come_and_go, str(folder), str(counts)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sum(int(path.read_text()) for path in counts.iterdir()) > 0
    with only_process(folder):
        pass
    assert not list(folder.iterdir())


def test_a_full_disk_is_called_full(tmp_path):
    """On a file system of 300 kB of its own, where the system lets us have one."""
    run = tmp_path / "disk" / "run"
    run.parent.mkdir()
    inside = ["unshare", "-rm", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=300k none {shlex.quote(str(run.parent))}"
    try:
        possible = subprocess.run([*inside, mount], capture_output=True).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("no mount of one's own here")
    command = [*MLP, *SMALL, "--r", "100", "--epochs", "1", "--save-dir", str(run)]
    listing = f"ls -A {shlex.quote(str(run))}"
    script = f"{mount} && {{ {shlex.join(command)}; echo status $?; {listing}; }}"
    _, output, errors = finish([*inside, script])
    assert "status 1" in output and "the disk is full" in errors and "usage" not in errors
    assert output.split("status 1")[1].split() == ["settings.json"]  # nothing torn is left


def test_a_reader_that_has_gone_ends_a_command_without_a_traceback(tmp_path):
    named = ["--dataset", "digits", "--epochs", "3", "--save-dir", str(tmp_path / "run")]
    command = shlex.join([*MLP, *SMALL, *named])
    script = f"{command} | head -1; echo status ${{PIPESTATUS[0]}}"
    _, output, errors = finish(["bash", "-c", script])
    assert errors == "" and output.splitlines()[-1] == "status 141"
    assert "parameters at the start" in output and (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "home",
    [None, pytest.param("file/x", marks=pytest.mark.slow)],
    ids=["none", "one that can not be"],
)
def test_no_home_is_needed(tmp_path, home):
    (tmp_path / "file").write_text("")
    bare = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    if home is not None:
        bare["HOME"] = str(tmp_path / home)
    command = [*MLP, *SMALL, "--epochs", "1", "--quiet", "--save-dir", str(tmp_path / "run")]
    code, output, errors = finish(command, env=bare)
    assert code == 0, errors
    assert (tmp_path / "run" / "curves.png").exists()


def test_a_damaged_settings_file_is_named(tmp_path, capsys):
    cifar10mlp.main([*SMALL, "--epochs", "1", "--quiet", "--save-dir", str(tmp_path)])
    for content in ("{", "[]", "\0"):
        (tmp_path / "settings.json").write_text(content)
        with pytest.raises(SystemExit):
            cifar10mlp.main(["--resume", "--save-dir", str(tmp_path)])
        assert str(tmp_path / "settings.json") in capsys.readouterr().err


def test_a_folder_is_let_go_when_a_run_fails(tmp_path):
    with pytest.raises(RuntimeError, match="ours"):
        with RunFolder(tmp_path, {}):
            raise RuntimeError("ours")
    with RunFolder(tmp_path, {}):
        pass


def test_an_interruption_before_training_has_its_status_too(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar10mlp, "load_images", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cifar10mlp.main(["--save-dir", str(tmp_path / "run")])
    assert stopped.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seconds, drawings", [(60.0, 1), (-1.0, 4)])
def test_curves_are_drawn_at_the_end_and_when_time_has_passed(
    tmp_path, monkeypatch, seconds, drawings
):
    drawn = []
    monkeypatch.setattr(loop, "DRAW_EVERY", seconds)
    monkeypatch.setattr(
        RunFolder, "draw_curves", lambda self, frame, *how: drawn.append(len(frame))
    )
    cifar10mlp.main([*SMALL, "--epochs", "3", "--quiet", "--save-dir", str(tmp_path)])
    assert len(drawn) == drawings and drawn[-1] == 3
