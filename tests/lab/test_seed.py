"""Every call and snippet that the documented system shows, in the order of its page."""

import math

import pandas as pd
import pytest
import torch


def test_train_and_evaluate(seed_experiment):
    exp = seed_experiment
    exp.train_n_steps_with_eval_full(len(exp.train_loader))
    assert exp.age == 256 and exp.model.age == 256
    exp.train_n_steps(25)
    assert exp.lab.steps == 8 + 25
    loss, accuracy = exp.eval_n_steps(2)
    assert math.isfinite(loss) and 0 <= accuracy <= 1
    full = exp.eval_full()
    assert full == pytest.approx(exp.eval_n_steps(len(exp.eval_loader)))


def test_display_stats_prints_the_documented_lines(seed_experiment, capsys):
    exp = seed_experiment
    exp.train_n_steps(8)
    exp.eval_full()
    exp.display_stats()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "trigger_rate (triggers_count / number_of_seen_samples)"
    neurons = exp.model.layers[0].neurons
    first = next(line for line in lines if line.startswith("Neuron 00000"))
    rate = int(neurons.train_triggers[0]) / 256
    assert (
        first
        == f"Neuron 00000:  train: {rate:8.4f} ({int(neurons.train_triggers[0]):10d} / {256:10d})"
    )
    seen = int(neurons.eval_triggers[0])
    assert f"            :  eval : {seen / 96:8.4f} ({seen:10d} / {96:10d})" in lines


def test_dataframe(seed_experiment):
    exp = seed_experiment
    exp.train_n_steps(3)
    frame = exp.train_loader.dataset.get_dataframe()
    assert isinstance(frame, pd.DataFrame)
    assert list(frame.columns[:4]) == [
        "prediction_age",
        "prediction_loss",
        "exposure_amount",
        "deny_listed",
    ]
    assert len(frame) == 96 and set(frame["prediction_age"]) == {0.0, 32.0, 64.0}
    assert (frame["exposure_amount"] == 1).all() and not frame["deny_listed"].any()


def test_architecture_operations(seed_experiment):
    exp = seed_experiment
    exp.train_n_steps(2)
    exp.model.add_neurons(layer_index=0, neuron_count=4)
    assert exp.model.layer0.out_channels == 6 and exp.model.layer1.in_channels == 6
    exp.train_n_steps(2)
    exp.model.prune(layer_index=0, neuron_indices={0, 2, 4})
    assert exp.model.layer0.out_channels == 3 and exp.model.layer1.weight.shape[1] == 3
    exp.train_n_steps(2)
    exp.model.add_neurons(layer_index=0, neuron_count=4)
    exp.model.reinit_neurons(layer_index=0, neuron_indices={5, 6})
    exp.model.reinit_neurons(layer_index=0, neuron_indices={5, 6}, perturbation_ratio=0.2)
    exp.model.layers[0].set_per_neuron_learning_rate(set(range(0, 2)), lr=0.0)
    exp.model.layers[1].set_per_incoming_neuron_learning_rate(set(range(0, 2)), lr=0.0)
    frozen = exp.model.layer0.weight[:2].clone(), exp.model.layer1.weight[:, :2].clone()
    exp.train_n_steps(3)
    assert torch.equal(frozen[0], exp.model.layer0.weight[:2]) and torch.equal(
        frozen[1], exp.model.layer1.weight[:, :2]
    )


def test_freezing(seed_experiment):
    exp = seed_experiment
    exp.train_n_steps(2)
    exp.model.freeze_layers_up_to_idx(1)
    before = {name: p.clone() for name, p in exp.model.named_parameters()}
    exp.train_n_steps(2)
    moved = {
        name.split(".")[0]
        for name, p in exp.model.named_parameters()
        if not torch.equal(before[name], p)
    }
    assert moved == {"layer2", "out"}
    exp.model.unfreeze_layers_from_idx(1)
    exp.train_n_steps(2)
    moved = {
        name.split(".")[0]
        for name, p in exp.model.named_parameters()
        if not torch.equal(before[name], p)
    }
    assert moved == {"layer1", "layer2", "out"}


def test_sample_operations(seed_experiment):
    exp = seed_experiment
    exp.train_n_steps(6)
    data = exp.train_loader.dataset
    median = data.get_dataframe()["prediction_loss"].median()
    denylist_fn = lambda id, age, loss, times, denied, pred, label: loss <= median  # noqa: E731
    data.deny_samples_with_predicate(denylist_fn)
    assert (
        data.get_dataframe()["deny_listed"].sum()
        == (data.get_dataframe()["prediction_loss"] <= median).sum()
        > 0
    )
    data.deny_samples_and_sample_allowed_with_predicate(denylist_fn, allow_to_denied_factor=3)
    assert data.allowed == 3 * (len(data) - data.allowed)
    denied = data.get_dataframe(all_samples=True).query("deny_listed").index[:2]
    data.allowlist_samples({1, 2, *denied})
    assert not data.get_dataframe(all_samples=True)["deny_listed"][denied].any()
    data.allowlist_samples(None)
    assert data.allowed == len(data)
    exp.eval_full()
    exp.eval_loader.dataset.deny_samples_with_predicate(
        lambda id, age, loss, times, denied, pred, label: id >= 32
    )
    assert len(exp.eval_loader) == 1


def test_checkpoints(seed_experiment, capsys):
    exp = seed_experiment
    exp.train_n_steps(2)
    assert exp.dump() == 0
    stored = {name: value.clone() for name, value in exp.model.state_dict().items()}
    exp.model.add_neurons(layer_index=0, neuron_count=4)
    exp.train_n_steps(2)
    assert exp.dump() == 1
    print(exp.chkpt_manager)
    assert "2 checkpoints" in capsys.readouterr().out
    exp.load(checkpoint_id=0)
    assert exp.age == 64 and exp.model.layer0.out_channels == 2
    assert all(torch.equal(value, stored[name]) for name, value in exp.model.state_dict().items())
    exp.train_n_steps(1)
