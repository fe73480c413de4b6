"""What benchmarks say of the machine that they ran on."""

from datetime import date

import pytest
import torch

from experiments.bench import machine, moments_step


def test_a_machine_is_named_with_its_instructions_torch_and_the_date():
    said = machine.describe(3)
    for part in (torch.__version__, str(date.today()), "3 thread(s)"):
        assert part in said
    assert torch.backends.cpu.get_cpu_capability() in said and machine.processor() in said


def test_the_floor_is_the_larger_of_products_and_bytes():
    limits = machine.Limits()
    limits.rate, limits.bandwidth = 10.0, 5.0
    assert limits.floor(100, 10) == 10 and limits.floor(10, 100) == 20


def test_whole_steps_are_timed_on_both_sums(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "SIZE", 32)
    monkeypatch.setattr(machine, "COPIED", 1 << 12)
    few = ["--ranks", "5", "--batches", "2", "--rounds", "2", "--seconds", "0", "--d", "7"]
    threads = torch.get_num_threads()
    table = moments_step.main([*few, "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    assert (tmp_path / "table.md").read_text() == table and machine.describe(1)[:20] in table
    r, b, plain, native, _, floor, *_ = [
        cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")
    ]
    assert (r, b) == ("5", "2") and min(map(float, (plain, native))) > 0 <= float(floor)


def test_what_a_step_costs_at_least():
    from pilimit_lib.inf import InfMLP

    net = InfMLP(7, 10, 5, 1, memory="moments")
    moments, first = 21 * 5 + 21 * 10, 7 * 5
    flops, moved = moments_step.cost_of(net, 3)
    assert flops == 6 * 3 * moments + 4 * 3 * first
    assert moved == pytest.approx(4 * (4 * moments + 3 * first))
