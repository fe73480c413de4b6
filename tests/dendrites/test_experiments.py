"""The examples run, and an interrupted one goes on as if it had not been."""

import json

import pytest
import torch

from experiments.dendrites import does_it_help, images, sequences
from experiments.dendrites.data import digits, fashion
from pilimit_lib.dendrites import GPA


def test_an_interrupted_arm_ends_like_an_uninterrupted_one(tmp_path):
    settings = images.Settings(patience=1, scheduler_patience=0)
    sets = {name: (x[:200], y[:200]) for name, (x, y) in digits().items()}
    whole = images.fit("dendrites", 0.125, 3, sets, settings, tmp_path / "whole", 6)
    images.fit("dendrites", 0.125, 3, sets, settings, tmp_path / "cut", 4)
    rest = images.fit("dendrites", 0.125, 3, sets, settings, tmp_path / "cut", 6)
    same = [key for key in whole if key not in ("seconds", "bookkeeping", "wall")]
    assert {key: whole[key] for key in same} == {key: rest[key] for key in same} and whole[
        "parameters trained"
    ] > whole["parameters at start"]


@pytest.mark.slow
def test_the_command_writes_its_table_and_does_not_repeat_what_is_done(tmp_path):
    args = [
        "--max-epochs",
        "3",
        "--patience",
        "1",
        "--scheduler-patience",
        "0",
        "--seeds",
        "0",
        "--out",
        str(tmp_path),
    ]
    images.main(args)
    rows = (tmp_path / "results.jsonl").read_text()
    assert [json.loads(line)["arm"] for line in rows.splitlines()] == [
        "dendrites",
        "restarts",
        "wider",
    ]
    assert (
        "minus restarts" in (tmp_path / "table.md").read_text()
        and (tmp_path / "test.png").stat().st_size > 0
    )
    images.main(args)
    assert (tmp_path / "results.jsonl").read_text() == rows


@pytest.mark.slow
def test_the_gru_example_runs(tmp_path):
    GPA.pc.reset()
    sequences.main(["--epochs", "2", "--out", str(tmp_path / "gru")])
    assert (tmp_path / "gru" / "grubestTestScores.csv").is_file()
    GPA.pc.reset()


def test_the_parameter_matched_width_is_the_nearest():
    for width in (0.25, 0.5, 1.0):
        count = images.parameters(images.ConvNet(width, 8))
        assert images.parameters(images.ConvNet(images.width_for(count, 8), 8)) == count


def test_a_missing_data_folder_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="train-images-idx3-ubyte .or .gz. is not there; give --data"
    ):
        fashion(str(tmp_path), 10, 10)


def test_width_grows_without_changing_the_function_and_by_as_much_as_dendrites():
    net = does_it_help.network(4)
    x = torch.randn(9, 1, 8, 8)
    wider = does_it_help.widened(net, does_it_help.size_of_a_generation(4))
    torch.testing.assert_close(wider(x), net(x))
    grown = does_it_help.parameters(net) * 2 + 4 + 10  # w of both layers
    assert abs(does_it_help.parameters(wider) - grown) <= 75 / 2


def test_the_comparison_of_all_arms_is_resumed_and_repeats_nothing(tmp_path):
    arguments = ["--hidden", "2", "--max-epochs", "4", "--patience", "1", "--out", str(tmp_path)]
    does_it_help.main([*arguments, "--seeds", "0", "--arms", "dendrites", "width"])
    begun = (tmp_path / "results.csv").read_text()
    does_it_help.main([*arguments, "--seeds", "0"])
    rows = (tmp_path / "results.csv").read_text()
    assert rows.startswith(begun) and rows.count("\n") == 1 + len(does_it_help.ARMS)
    does_it_help.main([*arguments, "--seeds", "0"])
    assert (tmp_path / "results.csv").read_text() == rows
