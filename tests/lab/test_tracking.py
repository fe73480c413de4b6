"""Trigger counts against a direct count, for plain layers and for the documented ones."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from pilimit_lib.lab import Conv2dWithNeuronOps, LinearWithNeuronOps, TrackingMode, watch
from pilimit_lib.lab.neurons.counters import count_triggers

from .conftest import MNISTModel, PlainNet, digits
from .test_checkpoints import everything, same


def direct(model, layer, batches):
    """Outputs of the layer above zero, counted with a loop."""
    outputs = []
    hook = layer.register_forward_hook(lambda m, a, output: outputs.append(output))
    for x in batches:
        model(x)
    hook.remove()
    channel = 1 if isinstance(layer, nn.Conv2d) else -1
    return [
        sum(int((output.select(channel, n) > 0).sum()) for output in outputs)
        for n in range(layer.weight.shape[0])
    ]


@pytest.mark.parametrize("layer", ["stem", "inner", "narrow", "hidden", "out"])
def test_counts_equal_a_direct_count(layer):
    torch.manual_seed(0)
    model = PlainNet().train()
    batches = [torch.randn(size, 1, 8, 8) for size in (5, 1, 7)]
    reference = copy.deepcopy(model)
    lab = watch(model, example=batches[0])
    for x in batches:
        model(x)
    model.eval()
    model(batches[0])
    neurons = lab.neurons[model.get_submodule(layer)]
    assert neurons.train_triggers.tolist() == direct(
        reference, reference.get_submodule(layer), batches
    )
    assert neurons.train_seen.tolist() == [13] * len(
        neurons.rate
    ) and neurons.eval_seen.tolist() == [5] * len(neurons.rate)
    assert neurons.train_triggers.dtype == torch.long


def test_zero_is_no_trigger():
    layer = LinearWithNeuronOps(1, 3)
    layer.tracking_mode = TrackingMode.TRAIN
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([0.0, 1e-30, -1.0]))
    layer(torch.randn(4, 1))
    assert layer.neurons.train_triggers.tolist() == [0, 4, 0]
    assert layer.neurons.rates(TrackingMode.TRAIN).tolist() == [0, 1, 0]
    assert layer.neurons.rates(TrackingMode.EVAL).isnan().all()


@pytest.mark.parametrize(
    "shape, spatial",
    [((4, 3, 5, 6), 2), ((4, 3, 7), 1), ((4, 3), 0), ((4, 5, 3), 0), ((3, 5, 6), 2), ((3,), 0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_shape_and_type(shape, spatial, dtype):
    torch.manual_seed(0)
    output = torch.randn(shape).to(dtype)
    output[output.abs() < 0.1] = 0
    channel = len(shape) - spatial - 1
    expected = [int((output.select(channel, n) > 0).sum()) for n in range(3)]
    assert count_triggers(output, spatial).tolist() == expected
    assert (
        count_triggers(
            output.movedim(channel, -1).contiguous().movedim(-1, channel), spatial
        ).tolist()
        == expected
    )


def test_modes_of_the_documented_network():
    torch.manual_seed(0)
    model, x = MNISTModel(), torch.randn(3, 1, 28, 28)
    model(x)
    assert model.age == 0 and model.layer0.neurons.train_seen.tolist() == [0, 0]
    model.tracking_mode = TrackingMode.TRAIN
    model(x)
    model.tracking_mode = TrackingMode.EVAL
    model(x)
    assert model.age == 3
    assert (
        model.layer0.neurons.train_seen.tolist()
        == model.layer0.neurons.eval_seen.tolist()
        == [3, 3]
    )
    assert model.out.neurons.train_seen.sum() == 0, "skip_register"
    with pytest.raises(ValueError):
        model.tracking_mode = "sometimes"


def test_alone_it_can_be_operated_on_and_the_change_is_handed_out():
    from pilimit_lib.core import follow

    torch.manual_seed(0)
    model, x = MNISTModel(), torch.randn(3, 1, 28, 28)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).mean().backward()
    optimizer.step()
    follow(optimizer, model.prune(layer_index=0, neuron_indices={1}))
    assert model.layer0.out_channels == 1 and model(x).shape == (3, 10)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {
        id(p) for p in model.parameters()
    }


def test_the_documented_layers_hold_what_torch_layers_hold():
    layer, plain = Conv2dWithNeuronOps(2, 3, 3), nn.Conv2d(2, 3, 3)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, 2, 5, 5)
    assert torch.equal(layer(x), plain(x))


def test_copies_and_pickles_of_a_watched_model_are_not_watched():
    torch.manual_seed(0)
    for model, shape in ((PlainNet(), (2, 1, 8, 8)), (MNISTModel(), (2, 1, 28, 28))):
        lab = watch(model, torch.optim.SGD(model.parameters(), lr=0.1), example=torch.randn(shape))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            twin.train()
            twin(torch.randn(shape))
            assert all(neurons.train_seen.sum() == 0 for neurons in lab.neurons.values())


def test_close_takes_every_hook_off():
    model = PlainNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lab = watch(model, optimizer, example=torch.randn(2, 1, 8, 8))
    lab.close()
    model(torch.randn(2, 1, 8, 8)).mean().backward()
    lab.neurons[model.stem].set_rate({0}, 0.0)
    before = model.stem.weight.detach().clone()
    optimizer.step()
    assert (model.stem.weight[0] != before[0]).any() and lab.neurons[
        model.stem
    ].train_seen.sum() == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def counts(lab):
    return [
        {name: value.clone() for name, value in neurons.state_dict().items()}
        for neurons in lab.neurons.values()
    ]


@pytest.mark.parametrize("kind, size", [(PlainNet, 8), (MNISTModel, 28)])
def test_looking_changes_nothing(make, kind, size):
    exp = make(kind(), train_dataset=digits(64, size), eval_dataset=digits(32, size, 900))
    exp.train_n_steps(2)
    exp.eval_full()
    before, seen, images = everything(exp), counts(exp.lab), digits(5, size).tensors[0]
    age = getattr(exp.model, "age", None)
    for training in (True, False, True):
        exp.module.train(training)
        with torch.no_grad():
            exp.module.eval()
            exp.model(images)
            exp.module.get_submodule(exp.lab.layer_paths()[0])(images)
            exp.module.train(training)
    for images, _ in exp.train_loader:
        exp.module.eval()
        exp.model(images)
    exp.module.train()
    assert all(
        torch.equal(value, now[name])
        for one, now in zip(seen, counts(exp.lab))
        for name, value in one.items()
    )
    assert getattr(exp.model, "age", None) == age and exp.lab.tracking_mode is TrackingMode.DISABLED
    after = everything(exp)
    same(
        {k: v for k, v in before.items() if "loaders" not in k},
        {k: v for k, v in after.items() if "loaders" not in k},
    )


@pytest.mark.parametrize("kind, size", [(PlainNet, 8), (MNISTModel, 28)])
@pytest.mark.parametrize("through", ["lab", "model"])
def test_a_mode_set_by_hand_wins(make, kind, size, through):
    if kind is PlainNet and through == "model":
        pytest.skip("a plain module has no mode of its own")
    exp = make(kind(), train_dataset=digits(64, size), eval_dataset=digits(32, size, 900))
    target = exp.lab if through == "lab" else exp.model
    target.tracking_mode = TrackingMode.DISABLED
    exp.train_n_steps(2)
    exp.eval_full()
    assert exp.lab.tracking_mode is TrackingMode.DISABLED and exp.age == 64
    assert exp.neuron_stats()[["train_seen", "eval_seen"]].to_numpy().sum() == 0
    target.tracking_mode = TrackingMode.EVAL
    exp.train_n_steps(1)
    first = exp.neuron_stats().iloc[0]
    assert (first["train_seen"], first["eval_seen"]) == (0, 32)
    exp.model(digits(3, size).tensors[0])
    assert exp.neuron_stats().iloc[0]["eval_seen"] == 35, "it was asked for"
    target.tracking_mode = None
    exp.train_n_steps(1)
    exp.model(digits(3, size).tensors[0])
    first = exp.neuron_stats().iloc[0]
    assert (first["train_seen"], first["eval_seen"]) == (32, 35)


@pytest.mark.parametrize("kind, size", [(PlainNet, 8), (MNISTModel, 28)])
def test_under_watch_a_step_is_a_batch_until_it_is_recorded(kind, size):
    torch.manual_seed(0)
    model = kind()
    data = DataLoader(digits(48, size), 16)
    lab = watch(model, torch.optim.SGD(model.parameters(), lr=0.1), data)
    look = digits(3, size).tensors[0]
    model(look)
    for x, y in lab.loader:
        out = model(x)
        model(x[:4])  # a second pass of the step (a closure, say) counts as well
        lab.record(nn.functional.cross_entropy(out, y, reduction="none"), out, y)
        model(look)
        with lab.tracking_paused():
            model(look)
    model(look)
    for _ in lab.loader:
        break
    model(look)
    assert set(lab.neuron_stats().query("layer_index == 0")["train_seen"]) == {60}
    assert getattr(model, "age", 60) == 60


def test_numpys_generator_is_not_spent_by_pictures_and_plans(make):
    import numpy as np

    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            return torch.tensor(np.random.rand(1, 8, 8), dtype=torch.float32), index % 10

    exp = make(train_dataset=Noisy())
    exp.train_n_steps(1)
    state = np.random.get_state()[1].copy(), np.random.get_state()[2]
    exp.dump()
    assert (np.random.get_state()[1] == state[0]).all() and np.random.get_state()[2] == state[1]
