"""The quick start of the documented system, step by step, once through a manager and once without:
the same network.

Numbers of channels, the flattening and the optimiser line, which the original text gets wrong or
leaves out, are mended.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from pilimit_lib import sigprop
from pilimit_lib.sigprop.utils import shape_numel

NUM_CLASSES, INPUT_DIM, HIDDEN_CH = 4, 8, 6


def build_optimizer(module, lr=0.0004, weight_decay=0.0):
    p = list(module.parameters())
    if len(p) == 0:
        return None
    optimizer = optim.Adam(p, lr=lr, weight_decay=weight_decay)
    return optimizer


def parts():
    torch.manual_seed(0)
    hidden_dim, hidden_ch, input_dim, num_classes = INPUT_DIM, HIDDEN_CH, INPUT_DIM, NUM_CLASSES
    input_shape = (num_classes,)
    output_shape = (hidden_ch, hidden_dim, hidden_dim)
    signal_target_module = nn.Sequential(
        nn.Linear(int(shape_numel(input_shape)), int(shape_numel(output_shape)), bias=False),
        nn.LayerNorm(shape_numel(output_shape)),
        nn.ReLU(),
    )
    signal_input_module = nn.Sequential(
        nn.Conv2d(3, output_shape[0], 3, 1, 1, bias=False),
        nn.BatchNorm2d(output_shape[0]),
        nn.ReLU(),
    )
    sp_signal = sigprop.signals.ProjectionContextInput(
        signal_target_module, signal_input_module, input_shape, output_shape
    )
    sp_signal = nn.Sequential(sigprop.signals.LabelNumberToOnehot(num_classes), sp_signal)
    layer_1 = nn.Sequential(
        nn.Conv2d(hidden_ch, hidden_ch * 2, 3, 2, 1, bias=False),
        nn.BatchNorm2d(hidden_ch * 2),
        nn.ReLU(),
    )
    layer_2 = nn.Sequential(
        nn.Conv2d(hidden_ch * 2, hidden_ch * 4, 3, 2, 1, bias=False),
        nn.BatchNorm2d(hidden_ch * 4),
        nn.ReLU(),
    )
    layer_output = nn.Sequential(
        nn.Flatten(), nn.Linear(hidden_ch * 4 * (input_dim // 4) ** 2, num_classes, bias=True)
    )
    return sp_signal, layer_1, layer_2, layer_output


def by_manager(signal_cls=sigprop.propagators.signals.Loss):
    sp_signal, layer_1, layer_2, layer_output = parts()
    sp_manager = sigprop.managers.Preset(
        sigprop.models.Forward, sigprop.propagators.Loss, signal_cls, build_optimizer
    )
    sp_manager.config_propagator(loss=sigprop.loss.v9_input_target_max_all)
    sp_signal = sp_manager.set_signal(sp_signal, loss=sigprop.loss.v9_input_target_max_all)
    layer_1 = sp_manager.add_propagator(layer_1)
    layer_2 = sp_manager.add_propagator(layer_2)
    layer_output = sp_manager.add_propagator(layer_output, sigprop.propagators.Identity)
    network = nn.Sequential(
        layer_1,
        layer_2,
        layer_output,
    )
    return sp_manager.set_model(network)


def by_hand():
    sp_signal, layer_1, layer_2, layer_output = parts()
    sp_signal = sigprop.propagators.signals.Loss(
        sp_signal, optimizer=build_optimizer(sp_signal), loss=sigprop.loss.v9_input_target_max_all
    )
    from pilimit_lib.sigprop import propagators

    layer_1 = propagators.Loss(
        layer_1, optimizer=build_optimizer(layer_1), loss=sigprop.loss.v9_input_target_max_all
    )
    layer_2 = propagators.Loss(
        layer_2, optimizer=build_optimizer(layer_2), loss=sigprop.loss.v9_input_target_max_all
    )
    layer_output = propagators.Identity(
        layer_output,
        optimizer=build_optimizer(layer_output),
        loss=sigprop.loss.v9_input_target_max_all,
    )
    network = nn.Sequential(
        layer_1,
        layer_2,
        layer_output,
    )
    return sigprop.models.Forward(network, sp_signal)


@pytest.fixture
def loaders():
    g = torch.Generator().manual_seed(1)
    centres = torch.randn(NUM_CLASSES, 3, INPUT_DIM, INPUT_DIM, generator=g)

    def draw(n):
        y = torch.randint(NUM_CLASSES, (n,), generator=g)
        return torch.utils.data.TensorDataset(
            centres[y] + 1.5 * torch.randn(n, 3, INPUT_DIM, INPUT_DIM, generator=g), y
        )

    return [torch.utils.data.DataLoader(draw(n), batch_size=16, generator=g) for n in (96, 64)]


def train(model, train_loader, epochs=1):
    optimizer = build_optimizer(model, lr=0.01)
    model.train()
    for _ in range(epochs):
        for _batch, (data, target) in enumerate(train_loader):
            output = model(data, target)

            loss = F.cross_entropy(output, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def test(model, test_loader):
    model.eval()
    acc_sum = 0.0
    count = 0.0
    for _batch, (data, target) in enumerate(test_loader):
        output = model(data, None)

        pred = output.argmax(1)
        acc_mask = pred.eq(target)
        acc_sum += acc_mask.sum()
        count += acc_mask.size(0)
    return acc_sum / count


test.__test__ = False


def test_both_options_give_the_same_network(loaders):
    models = [by_manager(), by_hand()]
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    assert (
        list(models[0].local_optimizers())
        == list(models[1].local_optimizers())
        == ["signal", "model.0", "model.1"]
    )
    before = [m.state_dict()["model.0.module.0.weight"].clone() for m in models]
    for m in models:
        train(m, loaders[0])
    assert not torch.equal(before[0], models[0].state_dict()["model.0.module.0.weight"])
    for key, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[key]), key


def test_it_learns(loaders):
    model = by_hand()
    data, target = loaders[1].dataset.tensors
    by_itself = lambda: (model.exits(data)["model.1"].argmax(1) == target).float().mean()  # noqa: E731
    assert test(model, loaders[1]) < 0.5 and by_itself() < 0.5
    train(model, loaders[0], epochs=10)
    assert test(model, loaders[1]) > 0.9
    # Hidden layers tell classes apart by themselves: they did learn, not only the output layer.
    assert by_itself() > 0.7


def test_loss_replaced_by_fixed_makes_the_signal_a_fixed_projection(loaders):
    model = by_manager(sigprop.propagators.signals.Fixed)
    before = {k: v.clone() for k, v in model.signal.named_parameters()}
    train(model, loaders[0])
    assert all(torch.equal(v, before[k]) for k, v in model.signal.named_parameters())
    assert list(model.local_optimizers()) == ["model.0", "model.1"]
    assert "signal" not in model.learners() and model.eval()(
        loaders[0].dataset.tensors[0]
    ).shape == (96, NUM_CLASSES)
