"""Growth while learning: rollback, retries, optimiser state, checkpoints in fresh processes,
several ranks."""

import csv
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from pilimit_lib.core import load
from pilimit_lib.dendrites import (
    DendriteConfig,
    DimensionError,
    EveryEpoch,
    Growth,
    Never,
    Patience,
    dendritic,
    dendritic_layers,
)
from pilimit_lib.dendrites.run.packing import load_state, pack, save_state, unpack
from tests.dendrites.helpers import mlp
from tests.dendrites.worker import Run


def adam(ps):
    return torch.optim.Adam(ps, 1e-2)


def learn(growth, steps=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, 5, generator=generator)
        growth.optimizer.zero_grad()
        (growth.model(x) - x[:, :3]).square().mean().backward()
        growth.optimizer.step()


def counts(growth):
    return [len(layer.dendrites) for _, layer in dendritic_layers(growth.network)]


def test_at_growth_the_best_network_comes_back_and_its_function_is_unchanged():
    config = DendriteConfig(switch=Patience(patience=2), seed=1)
    growth = Growth(dendritic(mlp(), config), optimizer=adam)
    x = torch.randn(4, 5)
    outputs = {}
    for score in (1.0, 3.0, 2.0, 2.0):
        learn(growth)
        outputs[score] = growth.model(x).detach()
        result = growth.step(score)
    assert (
        result.action == "grow"
        and result.restructured
        and result.added == ("0", "2")
        and counts(growth) == [1, 1]
    )
    torch.testing.assert_close(growth.model(x), outputs[3.0], atol=1e-6, rtol=0)
    assert (outputs[3.0] - outputs[2.0]).abs().max() > 1e-3


def test_moments_of_what_did_not_change_survive_growth_or_are_reset_by_choice():
    for how in ("keep", "reset"):
        config = DendriteConfig(switch=EveryEpoch(), optimizer_state=how)
        growth = Growth(dendritic(mlp(), config), optimizer=adam)
        learn(growth)
        weight = growth.network[0].neuron.weight
        moment = growth.optimizer.state[weight]["exp_avg"].clone()
        growth.step(1.0)
        weight = growth.network[0].neuron.weight
        held = {id(p) for group in growth.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in growth.network.parameters()}
        if how == "keep":
            assert (
                torch.equal(growth.optimizer.state[weight]["exp_avg"], moment)
                and growth.optimizer.state[weight]["step"] == 2
            )
        else:
            assert not growth.optimizer.state
        learn(growth, 3)
        assert growth.network[0].dendrites[0].body.weight.grad.abs().max() > 0


def test_retry_draws_other_weights_and_giving_up_restores_the_best():
    config = DendriteConfig(switch=Patience(patience=1), max_tries=2, seed=5)
    growth = Growth(dendritic(mlp(), config), optimizer=adam)
    drawn, x = [], torch.randn(3, 5)
    for epoch, score in enumerate([5.0, 4.0, 3.0, 2.0]):
        learn(growth)
        if epoch == 0:
            best = growth.model(x).detach()
        result = growth.step(score)
        if result.restructured and not result.complete:
            drawn.append(growth.network[0].dendrites[0].body.weight.detach().clone())
    assert (
        result.complete and counts(growth) == [0, 0] and len(drawn) == 2 and not torch.equal(*drawn)
    )
    torch.testing.assert_close(growth.model(x), best, atol=0, rtol=0)
    assert growth.step(9.0).complete
    assert {id(p) for g in growth.optimizer.param_groups for p in g["params"]} == {
        id(p) for p in growth.network.parameters()
    }


def test_learning_rate_restarts_per_group_and_the_search_starts_lower():
    config = DendriteConfig(switch=Patience(patience=1), seed=0)
    net = dendritic(mlp(), config)

    def groups(ps):
        return torch.optim.SGD(
            [
                {"params": net[0].parameters(), "lr": 0.1},
                {"params": net[2].parameters(), "lr": 0.01},
            ]
        )

    growth = Growth(
        net,
        optimizer=groups,
        scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, "max", patience=0),
    )
    rates = lambda: [g["lr"] for g in growth.optimizer.param_groups]  # noqa: E731
    assert growth.step(1.0).action == "continue" and rates() == [0.1, 0.01]
    assert growth.step(1.0).action == "grow" and rates() == [0.1, 0.01]
    # W, b; and of the dendrite W, b, w
    assert [len(g["params"]) for g in growth.optimizer.param_groups] == [2 + 3, 2 + 3]
    growth.step(2.0)
    start = growth.model(torch.ones(1, 5)).detach()
    with torch.no_grad():
        growth.network[0].neuron.weight.add_(1.0)
    assert growth.step(1.0).action == "lower_rate"
    assert rates() == pytest.approx([0.01, 0.001]) and torch.equal(
        growth.model(torch.ones(1, 5)), start
    )
    assert growth.scheduler.optimizer is growth.optimizer
    # worse than the first trial, whose end comes back
    assert growth.step(0.5).action == "commit_rate"
    assert rates() == pytest.approx([0.01, 0.001]) and not torch.equal(
        growth.model(torch.ones(1, 5)), start
    )


def test_an_optimiser_instance_follows_growth_without_a_restart():
    config = DendriteConfig(switch=EveryEpoch())
    net = dendritic(mlp(), config)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    growth = Growth(net, optimizer=optimizer)
    learn(growth)
    optimizer.param_groups[0]["lr"] = 0.05
    growth.step(1.0)
    assert growth.optimizer is optimizer and optimizer.param_groups[0]["lr"] == 0.05
    assert len(optimizer.param_groups[0]["params"]) == 4 + 2 * 3 and len(optimizer.state) == 4


def test_frozen_neurons_have_dendrites_that_the_optimiser_holds():
    config = DendriteConfig(switch=EveryEpoch())
    net = mlp()
    net[0].requires_grad_(False)
    growth = Growth(dendritic(net, config), optimizer=adam)
    growth.step(1.0)
    held = {id(p) for group in growth.optimizer.param_groups for p in group["params"]}
    assert all(id(p) in held for p in growth.network[0].dendrites.parameters())
    assert id(growth.network[0].neuron.weight) not in held


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "cut, mode",
    [(7, "joint"), (6, "correlation")]
    + [
        pytest.param(cut, mode, marks=SLOW)
        for cut in (1, 4, 10)
        for mode in ("joint", "correlation")
    ],
)
def test_saved_anywhere_and_loaded_in_a_fresh_process_it_goes_on_identically(tmp_path, mode, cut):
    total, path = 14, str(tmp_path / "run.pt")
    run = Run(mode)
    for epoch in range(total):
        if epoch == cut:
            run.growth.save(path)
        run.epoch()
    assert {"grow", "continue"} <= set(run.actions) and len(set(run.actions)) >= 3
    subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.dendrites.worker",
            "train",
            path,
            str(total - cut),
            mode,
            "resume",
        ],
        check=True,
    )
    expected, got = run.outcome(), load(path + ".continued")
    assert got["actions"] == expected["actions"][cut:]
    assert got["plateau"] == expected["plateau"]
    for part in ("out", "model"):
        torch.testing.assert_close(got[part], expected[part], atol=0, rtol=0)
    torch.testing.assert_close(
        got["optimizer"]["state"], expected["optimizer"]["state"], atol=0, rtol=0
    )


def test_two_ranks_grow_together(tmp_path):
    out = str(tmp_path / "out")
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.dendrites.worker",
                "ddp",
                str(tmp_path / "init"),
                str(rank),
                out,
            ]
        )
        for rank in range(2)
    ]
    try:
        assert [w.wait(timeout=120) for w in workers] == [0, 0]
    finally:
        for worker in workers:  # a rank that failed leaves the other waiting for it
            worker.kill()
    first, second = load(f"{out}.0"), load(f"{out}.1")
    assert first["seen"] == second["seen"] and torch.equal(first["flat"], second["flat"])
    assert [action for action, _ in first["seen"]] == [
        "continue",
        "grow",
        "continue",
        "grow",
        "retry",
        "continue",
        "grow",
    ]
    assert {kind for _, kind in first["seen"]} == {"DistributedDataParallel"}
    assert load_state(f"{out}.run")["plateau"]["dendrites"] == first["dendrites"]


def test_files_are_few_and_the_best_scores_table_has_its_three_columns(tmp_path):
    folder = tmp_path / "run"
    config = DendriteConfig(
        switch=Patience(patience=1), save_dir=str(folder), max_tries=1, graphs="switch"
    )
    growth = Growth(dendritic(mlp(), config), optimizer=adam)
    tests = iter(range(10, 99))
    for score in (1.0, 2.0, 2.0, 3.0, 4.0, 4.0, 1.0):
        learn(growth)
        result = growth.step(
            score,
            extra={"train": score + 1},
            test={"test": next(tests)},
            also={"loss": {"loss": 0.5}},
        )
    assert result.complete
    with open(folder / "runbestTestScores.csv") as file:
        rows = list(csv.DictReader(file))
    plain = 5 * 7 + 7 + 7 * 3 + 3
    assert [list(r.values()) for r in rows] == [
        [str(plain), "2.0", "11.0"],
        [str(2 * plain + 10), "4.0", "14.0"],
        [str(3 * plain + 20 + 10), "1.0", "16.0"],
    ]
    assert list(rows[0]) == ["Param Counts", "Max Valid Scores", "Max Test Scores"]
    assert (folder / "runbest_test_scores.csv").read_text() == (
        folder / "runbestTestScores.csv"
    ).read_text()
    with open(folder / "runScores.csv") as file:
        assert [float(r["validation"]) for r in csv.DictReader(file)] == [1, 2, 2, 3, 4, 4, 1]
    with open(folder / "runExtraScores.csv") as file:
        assert len(list(csv.DictReader(file))) == 7 * 3
    names = sorted(p.name for p in folder.iterdir())
    assert (
        "run.png" in names
        and "best_model.pt" in names
        and not [n for n in names if " " in n or n.startswith(".")]
    )
    # picture; best, latest; two switches of two files; CSV files
    assert len(names) == 1 + 2 + 4 + 9, names


def test_pictures_can_be_left_out_without_losing_the_numbers(tmp_path):
    config = DendriteConfig(
        switch=EveryEpoch(), save_dir=str(tmp_path / "r"), graphs="never", checkpoints="never"
    )
    Growth(dendritic(mlp(), config), optimizer=adam).step(1.0)
    names = {p.suffix for p in (tmp_path / "r").iterdir()}
    assert names == {".csv"}


def test_loading_a_run_rewrites_its_files_from_the_state(tmp_path):
    config = DendriteConfig(switch=Never(), save_dir=str(tmp_path / "r"))
    growth = Growth(dendritic(mlp(), config), optimizer=adam)
    for score in (1.0, 2.0):
        growth.step(score)
    growth.save(tmp_path / "at2.pt")
    growth.step(3.0)
    again = Growth(dendritic(mlp(), config), optimizer=adam)
    again.load(tmp_path / "at2.pt")
    again.step(7.0)
    with open(tmp_path / "r" / "rScores.csv") as file:
        assert [float(r["validation"]) for r in csv.DictReader(file)] == [1, 2, 7]


def test_bad_scores_and_arguments_are_named_before_anything_changes():
    config = DendriteConfig(switch=EveryEpoch())
    growth = Growth(dendritic(mlp(), config), optimizer=adam)
    for bad, text in [
        ("0.9", "the score is '0.9'"),
        (None, "NoneType"),
        (torch.ones(2), "shape \\[2\\]"),
        (True, "bool"),
    ]:
        with pytest.raises(TypeError, match=text):
            growth.step(bad)
    with pytest.raises(ValueError, match="finite"):
        growth.step(float("inf"))
    assert growth.plateau.state.epoch == 0 and counts(growth) == [0, 0]
    assert growth.step(torch.tensor([0.5])).action == "grow"
    with pytest.raises(ValueError, match="call dendritic"):
        Growth(mlp())
    with pytest.raises(TypeError, match="give a factory: lambda optimizer: StepLR"):
        o = adam(growth.network.parameters())
        Growth(growth.network, optimizer=adam, scheduler=torch.optim.lr_scheduler.StepLR(o, 1))
    with pytest.raises(TypeError, match="needs an optimiser factory"):
        Growth(growth.network, optimizer=o, scheduler=lambda o: None)
    with pytest.raises(ValueError, match="already"):
        dendritic(growth.network)
    with pytest.raises(ValueError, match="not the state of a Growth"):
        growth.load_state_dict({"model": 1})


def test_a_layer_that_never_ran_stops_growth_whole():
    config = DendriteConfig(switch=EveryEpoch(), convert=[nn.Linear, "Sequential"], dims=[-1, 0])
    model = nn.ModuleDict({"used": nn.Linear(5, 3), "idle": nn.Sequential(nn.Linear(5, 3))})
    growth = Growth(dendritic(model, config), optimizer=adam)
    with pytest.raises(RuntimeError, match=r"\['idle'\] took no part"):
        growth.step(1.0)
    assert counts(growth) == [0, 0] and growth.plateau.state.epoch == 0


def test_debug_dims_lists_all_wrong_layers_at_once():
    config = DendriteConfig(dims=[-1, 0, -1, -1], debug_dims=True)
    growth = Growth(dendritic(mlp(), config), optimizer=adam)
    with pytest.raises(
        DimensionError, match=r"2 layers have wrong dimensions:(.|\n)*model\[0\](.|\n)*model\[2\]"
    ):
        growth.model(torch.randn(2, 3, 5))
    for _, layer in dendritic_layers(growth.network):
        layer.set_this_input_dimensions([-1, -1, 0])
    growth.model(torch.randn(2, 3, 5))
    growth.step(1.0)


def test_select_grows_only_what_it_names():
    config = DendriteConfig(switch=EveryEpoch())
    growth = Growth(dendritic(mlp(), config), optimizer=adam, select=lambda net: ["2"])
    assert growth.step(1.0).added == ("2",) and counts(growth) == [0, 1]
    growth.select = lambda net: ["02"]
    with pytest.raises(ValueError, match="no dendritic layer"):
        growth.step(2.0)


def test_packed_states_come_back_exactly_and_are_written_whole(tmp_path):
    shared = torch.randn(3, 2)
    state = {
        "a": [shared, (1, 2.5, None)],
        7: {"b": torch.tensor(True), "same": shared},
        "nan": float("nan"),
        "inf": [float("inf")],
        "h": torch.randn(2).to(torch.bfloat16),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3, dtype=torch.long),
        "t": "\u00e9\n",
    }
    assert pack(state)["data"].numel() == 3 * 2 * 4 + 1 + 2 * 2 + 8
    save_state(state, tmp_path / "s.pt")
    back = load_state(tmp_path / "s.pt")
    assert (
        list(back) == list(state)
        and back["a"][1] == (1, 2.5, None)
        and isinstance(back["a"][1], tuple)
    )
    assert (
        torch.equal(back["a"][0], shared)
        and back[7]["b"].dtype == torch.bool
        and back["h"].dtype == torch.bfloat16
    )
    assert (
        back["empty"].shape == (0, 4)
        and back["scalar"].shape == ()
        and back["nan"] != back["nan"]
        and back["t"] == state["t"]
    )
    assert torch.equal(unpack(pack(state))["h"], state["h"])
    with pytest.raises(TypeError):
        save_state({"bad": object()}, tmp_path / "s.pt")
    assert load_state(tmp_path / "s.pt")["inf"] == [float("inf")] and [
        p.name for p in tmp_path.iterdir()
    ] == ["s.pt"]


@pytest.mark.slow
def test_a_compiled_model_grows():
    config = DendriteConfig(switch=EveryEpoch())
    net = dendritic(mlp(), config)
    growth = Growth(torch.compile(net, backend="eager"), optimizer=adam)
    x = torch.randn(3, 5)
    growth.model(x)
    for k in range(1, 3):
        result = growth.step(float(k))
        learn(growth, 3)
        assert result.model is growth.model and result.model is not net and counts(growth) == [k, k]
        torch.testing.assert_close(growth.model(x), net(x))
    assert net[0].dendrites[0].w.abs().max() > 0


def test_files_have_the_mode_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        config = DendriteConfig(switch=EveryEpoch(), save_dir=str(tmp_path / "r"))
        growth = Growth(dendritic(mlp(), config), optimizer=adam)
        growth.step(1.0)
        growth.save(tmp_path / "r" / "own.pt")
    finally:
        os.umask(old)
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in (tmp_path / "r").iterdir()}
    assert set(modes.values()) == {"0o640"} and len(modes) > 10, modes
