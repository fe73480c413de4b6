"""The command of a GPU day, without a GPU: what it says, its budgets, and all stages at tiny sizes.

Under Triton's interpreter the kernels run too, in a process of its own, as Triton reads the switch
once.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.bench import gpu
from experiments.bench.gpu_stages import TINY, Case

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_gpu_it_says_what_it_would_do(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert gpu.main([]) == []
    said = capsys.readouterr().out
    assert "nothing is run" in said and not list(tmp_path.iterdir())
    for stage in gpu.STAGES:
        assert stage.name in said and stage.aim in said
    assert sum(stage.seconds for stage in gpu.STAGES) < gpu.LIMIT / 1.2


def test_every_stage_on_the_cpu(tmp_path, capsys):
    results = tmp_path / "RESULTS.md"
    results.write_text("# Dated\n\nhead\n\n## 2020: old\n\ntext\n")
    found = gpu.main(["--rehearse", "--out", str(tmp_path / "out"), "--append", str(results)])
    by_stage = {stage.name: [r for r in found if r["stage"] == stage.name] for stage in gpu.STAGES}
    assert all(by_stage.values()) and not any("failed" in record for record in found), found
    assert {record["form"] for record in by_stage["rows kernels"]} == {"plain", "chunked", "triton"}
    for record in by_stage["moments kernels"] + by_stage["rows kernels"]:
        bound = 2e-3 if record.get("rows") == "torch.float16" else 1e-5
        assert all(float(each) < bound for each in record["errors"].split(", ")), record
    assert all(record["error"] < 1e-5 for record in by_stage["convolution kernels"])
    steps = {record["step"].split()[0] for record in by_stage["steps"]}
    assert steps == {"moments", "rows", "ConvNet"}
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found
    text = results.read_text()
    assert text.index("a GPU day on") < text.index("## 2020: old") and text.startswith("# Dated")
    assert "**steps**" in text and text.endswith("text\n")


def test_a_stage_ends_with_its_seconds_and_what_fails_is_noted(tmp_path):
    now = [0.0]
    day = gpu.Day(tmp_path, 100, clock=lambda: now[0])

    def endless(sizes, device):
        while True:
            now[0] += 4
            yield Case({"at": now[0]}, dict)

    def fail():
        raise RuntimeError("no such kernel")

    def broken(sizes, device):
        yield Case({"tile": 1}, fail)
        yield Case({"tile": 2}, lambda: {"ms": 3})

    day.run(gpu.Stage("endless", "", 10, endless), TINY, "cpu")
    assert [record.get("at") for record in day.records] == [4, 8, 12, None]
    day.run(gpu.Stage("broken", "", 10, broken), TINY, "cpu")
    assert day.records[-2]["failed"] == "RuntimeError: no such kernel"
    assert day.records[-1] == {"stage": "broken", "tile": 2, "ms": 3}
    now[0] = 75  # what is left is kept for the report
    day.run(gpu.Stage("late", "", 10, endless), TINY, "cpu")
    assert "stopped" in day.records[-1] and day.records[-2]["stage"] == "broken"
    assert "no such kernel" in (tmp_path / "report.md").read_text()


def test_the_limit_holds_within_a_case():
    with pytest.raises(gpu.TimeIsUp), gpu.limited(0.05):
        time.sleep(60)
    time.sleep(0.06)  # and is gone afterwards


def test_the_papers_command_is_stopped_when_the_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "CLOSING", 120.0)  # room for a busy machine
    code = "import time\ntry:\n    time.sleep(600)\n"
    code += "except KeyboardInterrupt:\n    raise SystemExit(130)"
    day = gpu.Day(tmp_path, 122.0)
    gpu.paper(day, "nowhere", [sys.executable, "-c", code])
    assert day.records[0]["status"] == 130 and day.records[0]["epochs"] == 0
    assert day.left > 0


def test_the_papers_flags_are_those_of_the_page_of_commands():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if "--r 400" in line and "cifar10mlp" in line]
    pairs = set(" ".join(line.split()[3:]).replace("--save-dir ./output/", "").split(" --"))
    assert {each.strip("- ") for each in pairs} - {""} == {
        each.strip("- ") for each in " ".join(gpu.PAPER).split(" --")
    }


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_every_stage_with_the_kernels_interpreted(tmp_path):
    command = [sys.executable, "-m", "experiments.bench.gpu", "--rehearse", "--out", str(tmp_path)]
    how = {"env": {**os.environ, "TRITON_INTERPRET": "1"}, "cwd": ROOT, "check": True}
    subprocess.run(command, capture_output=True, **how)
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert not any("failed" in record for record in found), found
    for stage in ("moments kernels", "convolution kernels"):
        forms = {record["form"] for record in found if record["stage"] == stage}
        assert forms == {"plain", "triton"}
    ran = [record["ran"] for record in found if record.get("form") == "triton" and "ran" in record]
    assert ran and all(line == "triton runs" for line in ran)
