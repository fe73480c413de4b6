"""What a run leaves in its folder, and what later processes make of it."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from pilimit_lib.dendrites import (
    GPA,
    UPA,
    DendriteConfig,
    EveryEpoch,
    Growth,
    Never,
    Patience,
    dendritic,
    dendritic_layers,
)
from tests.dendrites.helpers import mlp
from tests.dendrites.worker import Run


def adam(parameters):
    return torch.optim.Adam(parameters, 1e-2)


def big(seed=0):
    """A network in whose files nothing else counts: 2 MB with Adam's moments 6 MB."""
    return mlp(seed, sizes=(5, 60_000, 3))


def learn(growth):
    growth.optimizer.zero_grad()
    growth.model(torch.ones(2, 5)).square().sum().backward()
    growth.optimizer.step()


def test_an_epoch_writes_one_copy_of_the_network(tmp_path):
    folder = tmp_path / "r"
    config = DendriteConfig(
        switch=Patience(patience=3), wait_for_lower_lr=False, save_dir=str(folder), graphs="never"
    )
    schedule = lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)  # noqa: E731
    growth = Growth(dendritic(big(), config), optimizer=adam, scheduler=schedule)
    sizes, actions = [], []
    for score in (1.0, 2.0, 2.0, 2.0, 2.0, 3.0, 2.5, 2.0, 2.0, 2.0):
        learn(growth)
        written = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.pt")}
        actions.append(growth.step(score).action)
        copy = 3 * 4 * growth.parameter_count()
        new = [p for p in folder.glob("*.pt") if written.get(p.name) != p.stat().st_mtime_ns]
        sizes.append(sum(p.stat().st_size for p in new) / copy)
    assert {"grow", "lower_rate"} <= set(actions)
    ordinary = [
        (action, size)
        for action, size, score in zip(actions, sizes, (1, 2, 2, 2, 2, 3, 2.5, 2, 2, 2))
        if action == "continue"
    ]
    assert min(size for _, size in ordinary) < 1.1
    assert all(size < 1.1 for size in sizes[2:4])  # neither a new best nor a switch
    assert sizes[1] < 2.1  # a new best: latest.pt and best_model.pt


@pytest.mark.parametrize(
    "stop", [5, 9, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (3, 6, 11))]
)
def test_the_folder_s_latest_file_continues_as_if_nothing_had_happened(tmp_path, stop):
    whole = Run(save_dir=str(tmp_path / "whole"))
    for _ in range(14):
        whole.epoch()
    first = Run(save_dir=str(tmp_path / "parts"))
    for _ in range(stop):
        first.epoch()
    shutil.copytree(tmp_path / "parts", tmp_path / "copy")
    for place in ("parts", "copy"):
        again = Run(save_dir=str(tmp_path / "parts"))
        torch.manual_seed(99)
        again.growth.load(tmp_path / place / "latest.pt")
        for _ in range(stop, 14):
            again.epoch()
        assert again.actions == whole.actions[stop:]
        expected, got = whole.outcome(), again.outcome()
        for part in ("out", "model"):
            torch.testing.assert_close(got[part], expected[part], atol=0, rtol=0)
        shutil.rmtree(tmp_path / "parts")


def test_a_folder_torn_apart_is_named(tmp_path):
    config = DendriteConfig(switch=Never(), save_dir=str(tmp_path / "r"), graphs="never")
    growth = Growth(dendritic(mlp(), config), optimizer=adam)
    for score in (2.0, 1.0):
        growth.step(score)
    growth.save(tmp_path / "alone.pt")
    best = tmp_path / "r" / "best_model.pt"
    held = best.read_bytes()
    growth.step(3.0)
    other = best.read_bytes()
    growth.step(1.0)
    best.write_bytes(held)
    fresh = Growth(dendritic(mlp(), config), optimizer=adam)
    with pytest.raises(ValueError, match="best_model.pt that has been overwritten"):
        fresh.load(tmp_path / "r" / "latest.pt")
    best.unlink()
    with pytest.raises(FileNotFoundError, match="keep a run's folder together"):
        fresh.load(tmp_path / "r" / "latest.pt")
    assert fresh.plateau.state.epoch == 0
    fresh.load(tmp_path / "alone.pt")
    best.write_bytes(other)
    fresh.load(tmp_path / "r" / "latest.pt")
    assert fresh.plateau.state.epoch == 4


def test_the_final_clean_network_loads_in_a_fresh_process(facade):
    GPA.pc.set_pai_saves(True)
    model = UPA.initialize_pai(mlp(), save_name="clean")
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    GPA.pai_tracker.set_optimizer_instance(optimizer)
    done, score = False, 0.0
    while not done:
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
        score += 1.0
        model, _, done = GPA.pai_tracker.add_validation_score(score, model)
    assert [len(layer.dendrites) for _, layer in dendritic_layers(model)] == [3, 3]
    torch.save(model(torch.ones(2, 5)).detach(), "expected.pt")
    code = (
        "import torch\n"
        "from pilimit_lib.dendrites import UPA, finalize\n"
        "from tests.dendrites.helpers import mlp\n"
        "net = UPA.load_net(UPA.convert_network(mlp(7)), 'clean', 'final_clean_pai')\n"
        "expected = torch.load('expected.pt')\n"
        "torch.testing.assert_close(net(torch.ones(2, 5)), expected)\n"
        "torch.testing.assert_close(finalize(net)(torch.ones(2, 5)), expected)\n"
    )
    path = f"import sys; sys.path.insert(0, {sys.path[0]!r})\n"
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_that_never_switches_draws_its_picture(tmp_path):
    config = DendriteConfig(switch=Never(), save_dir=str(tmp_path / "r"))
    Growth(dendritic(mlp(), config), optimizer=adam).step(1.0)
    assert (tmp_path / "r" / "r.png").is_file()


def test_after_a_passed_capacity_test_the_message_says_how_to_switch_it_off():
    config = DendriteConfig(testing_capacity=True)
    growth = Growth(dendritic(mlp(), config), optimizer=adam)
    for score in (1.0, 2.0, 3.0, 4.0):
        result = growth.step(score)
    assert result.complete and "set_testing_dendrite_capacity(False)" in result.reason


class Fragile(nn.Linear):
    """A layer that can be copied a few times only."""

    copies = 0

    def __deepcopy__(self, memo):
        Fragile.copies += 1
        if Fragile.copies > 1:
            raise MemoryError("no more copies")
        return nn.Linear(self.in_features, self.out_features)


@pytest.mark.parametrize("call", [lambda g: g.step(1.0), lambda g: g.grow_now()])
def test_growth_that_fails_in_the_middle_leaves_network_and_count_as_they_were(call):
    Fragile.copies = 0
    net = nn.Sequential(Fragile(5, 4), nn.ReLU(), Fragile(4, 3))
    config = DendriteConfig(switch=EveryEpoch(), convert=["Fragile"], dims=[-1, 0])
    growth = Growth(dendritic(net, config), optimizer=adam)
    growth.model(torch.ones(1, 5))
    before = growth.plateau.state_dict()
    with pytest.raises(MemoryError):
        call(growth)
    assert [len(layer.dendrites) for _, layer in dendritic_layers(net)] == [0, 0]
    assert growth.plateau.state_dict() == before
    assert len(growth.optimizer.param_groups[0]["params"]) == 4


def test_a_dendrite_that_failed_in_all_tries_is_not_counted():
    config = DendriteConfig(switch=Patience(patience=1), max_tries=2)
    growth = Growth(dendritic(mlp(), config), optimizer=adam)
    for score in (1.0, 2.0, 2.0, 3.0, 3.0, 1.0, 1.0):
        result = growth.step(score)
    assert result.complete and growth.plateau.state.dendrites == 1
    assert [len(layer.dendrites) for _, layer in dendritic_layers(growth.network)] == [1, 1]


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_a_moving_average_begins_anew_when_the_network_changes(decay):
    config = DendriteConfig(switch=Patience(patience=1), max_tries=1)
    net = dendritic(mlp(), config)
    function = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=function)
    growth = Growth(net, optimizer=adam, average=average)
    x, shapes = torch.randn(4, 5), []
    for score in (1.0, 1.0, 2.0, 1.0, 1.0):
        for _ in range(3):
            learn(growth)
            average.update_parameters(growth.model)
        close = torch.allclose(average(x), growth.model(x), atol=1e-6)
        assert close == (decay == 0.0)
        result = growth.step(score)
        if result.restructured:
            assert torch.equal(average(x), growth.model(x)) and average.n_averaged == 0
        shapes.append([p.shape for p in average.module.parameters()])
        assert shapes[-1] == [p.shape for p in net.parameters()]
    assert result.complete and len({len(s) for s in shapes}) > 1
    with pytest.raises(TypeError, match="AveragedModel"):
        growth.follow_average(mlp())
