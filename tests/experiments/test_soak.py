"""The soak itself: that it sees what grows and what differs, and that kills are survived."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments.bench import soak
from pilimit_lib.core import save, write_text

linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")


@linux
def test_what_grows_is_seen(tmp_path):
    kept = []

    def descriptors():
        while True:
            kept.append(open(tmp_path / "file", "a"))
            yield

    def memory():
        """Eight megabytes a step, of which the process may have some to spare from earlier work."""
        while True:
            kept.append(torch.ones(2 * soak.MEGABYTE))
            yield

    def nothing():
        while True:
            yield

    try:
        files = {"growth": {"files": soak.growth(descriptors(), 20)}, "kills": {}}
    finally:
        for file in kept:
            file.close()
    assert files["growth"]["files"]["descriptor_growth"] >= 14 and not soak.passed(files)
    found = {"growth": {"tensors": soak.growth(memory(), 40)}, "kills": {}}
    assert found["growth"]["tensors"]["memory_growth"] > 25 * soak.MEGABYTE
    assert not soak.passed(found)
    flat = {"growth": {"nothing": soak.growth(nothing(), 40)}, "kills": {}}
    assert soak.passed(flat) and "| nothing | 40 |" in soak.table(flat)


def test_what_differs_is_named(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for run, value in ((one, 1.0), (two, 2.0)):
        run.mkdir()
        save({"seconds": value, "weight": torch.tensor([value]), "same": [3]}, run / "a.pt")
        (run / "b.jsonl").write_text(json.dumps({"loss": value, "seconds": value}) + "\n")
        (run / "c.json").write_text(json.dumps({"lr": [1, value]}))
    (one / "d.txt").write_text("")
    assert soak.differences(one, two) == [
        "d.txt is in one only",
        "a.pt.weight",
        "b.jsonl[0].loss",
        "c.json.lr[1]",
    ]
    assert soak.differences(one, one) == []


@linux
def test_a_killed_command_is_given_again_until_it_is_whole(tmp_path):
    """A command that writes one file per call and stays for a while; then one that never gives the
    same twice."""
    code = tmp_path / "calls"

    def stays(argv):
        folder = Path(argv[-1])
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(4):
            path = folder / f"{number}.json"
            if not path.exists():
                write_text(path, "1")  # whole or not at all, as commands write
                time.sleep(0.05)

    def differs(argv):
        stays(argv)
        calls = int(code.read_text()) + 1 if code.exists() else 0
        code.write_text(str(calls))
        (Path(argv[-1]) / "calls.json").write_text(str(calls))

    good = soak.kills(soak.Command(stays, [], resumes=False), tmp_path / "good", 4, seed=1)
    assert good["kills"] == 4 and good["runs"] >= 1 and good["differing"] == []
    bad = soak.kills(soak.Command(differs, [], resumes=False), tmp_path / "bad", 2, seed=1)
    assert any("calls.json" in what for what in bad["differing"])


@linux
def test_a_command_that_fails_ends_the_soak(tmp_path):
    def fails(argv):
        sys.stderr.close()
        raise SystemExit(3)

    with pytest.raises(RuntimeError, match="exit status 3"):
        soak.attempt(soak.Command(fails, ["--flag"]), tmp_path, None)


@linux
@pytest.mark.slow
def test_a_short_soak_of_every_command_passes(tmp_path):
    flags = ["--steps", "200", "--saves", "4", "--kills", "2", "--out", str(tmp_path)]
    found = soak.main(flags)
    assert len(found["kills"]) == 6 and soak.passed(found)
    with pytest.raises(SystemExit):
        soak.main([*flags, "--only", "nothing"])
