"""Subclasses written as the documentation prints them: losses, signals, formatters, propagators,
models."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pilimit_lib import sigprop
from pilimit_lib.sigprop import models, propagators, signals

V9 = sigprop.loss.v9_input_target_max_all


def new_loss(sp_learn, h1, t1, h0, t0, y_onehot):
    l = (h1 - t1).square().mean()

    return l


class NewLoss(sigprop.loss.Loss):
    def __init__(self):
        super().__init__()

    def forward(self, sp_learn, h1, t1, h0, t0, y_onehot):
        l = (h1 - t1).square().mean()

        return l


class MySignalGenerator(signals.Generator):
    def __init__(self, module, input_shape, output_shape):
        super().__init__()
        self.input_shape = input_shape
        self.output_shape = output_shape
        self.module = module

    def forward(self, input):
        h0, t0 = input
        t1 = self.module(t0.flatten(1)).view(t0.shape[0:1] + self.output_shape)
        h1 = h0
        return h1, t1, h0, t0


class MySignalFormatter(signals.Formatter):
    def forward(self, input):
        h0, t0 = input
        if t0 is not None:
            t0 = F.one_hot(torch.arange(t0.shape[1], device=t0.device), t0.shape[1]).float()
        return h0, t0


class MyLearnPropagator(propagators.Learn):
    def loss_(self, h1, t1, h0, t0, y_onehot):
        loss = V9(self, h1, t1, h0, t0, y_onehot)
        return loss

    def train_(self, h1, t1, h0, t0, y_onehot):
        loss = self.loss_(h1, t1, h0, t0, y_onehot)
        if self.optimizer is not None:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return loss.item(), None, None

    def eval_(self, h1, t1, h0, t0, y_onehot):
        loss = self.loss_(h1, t1, h0, t0, y_onehot)
        return loss.item(), None, None


class MyLearnPropagatorForSignals(propagators.signals.Learn):
    def loss_(self, h1, t1, h0, t0, y_onehot):
        loss = V9(self, h1, t1, h0, t0, y_onehot)
        return loss

    def train_(self, h1, t1, h0, t0, y_onehot):
        loss = self.loss_(h1, t1, h0, t0, y_onehot)
        if self.optimizer is not None:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return loss.item(), None, None

    def eval_(self, h1, t1, h0, t0, y_onehot):
        loss = self.loss_(h1, t1, h0, t0, y_onehot)
        return loss.item(), None, None


class MyPropagator(propagators.Propagator):
    def __init__(self, module):
        super().__init__()

        self.module = module

    def forward(self, input):
        h0, t0, y_onehot = input

        h1 = self.module(h0)
        t1 = t0

        return (h1, t1, y_onehot)


class MyModel(models.Model):
    def __init__(self, model, signal):
        super().__init__(model, signal)

    def forward(self, input):
        x, y_onehot = input
        h0, t0 = self.signal((x, y_onehot, y_onehot))
        h1, t1, y_onehot = self.model((h0, t0, y_onehot))
        return h1


def sgd(module):
    return torch.optim.SGD(module.parameters(), 0.1)


def modules():
    torch.manual_seed(0)
    return nn.Linear(3, 6), nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Linear(5, 3)


def printed():
    """A network of nothing but such subclasses."""
    project, hidden, out = modules()
    signal = nn.Sequential(signals.LabelNumberToOnehot(3), MySignalGenerator(project, (3,), (6,)))
    return MyModel(
        nn.Sequential(MyLearnPropagator(hidden, optimizer=sgd(hidden)), MyPropagator(out)),
        MyLearnPropagatorForSignals(signal, optimizer=sgd(signal)),
    )


def built_in():
    project, hidden, out = modules()
    signal = nn.Sequential(
        signals.LabelNumberToOnehot(3), signals.ProjectionContext(project, (3,), (6,))
    )
    return models.Forward(
        nn.Sequential(propagators.Loss(hidden, sgd(hidden), V9), propagators.Identity(out)),
        propagators.signals.Loss(signal, sgd(signal), V9),
    )


def test_subclasses_as_printed_train_like_the_built_in_classes():
    x, y = torch.randn(9, 6), torch.arange(9) % 3
    nets = printed(), built_in()
    for net in nets:
        outer = sgd(net)
        for _ in range(3):
            loss = F.cross_entropy(net(x, y), y)
            outer.zero_grad()
            loss.backward()
            outer.step()
    for (_, p), (_, q) in zip(*(net.named_parameters() for net in nets)):
        assert torch.equal(p, q)
    assert isinstance(nets[0].learners()["model.0"].last_loss, float)
    assert {id(p) for p in nets[0].parameters()} == {id(p) for p in nets[0].model[1].parameters()}
    # Inference, and evaluation with labels, in every call form.
    out = nets[0].eval()(x)
    for call in (lambda n: n(x, None), lambda n: n((x, y)), lambda n: n(x, y)):
        assert torch.equal(call(nets[0]), out)
    assert torch.equal(out, nets[1].eval()(x))
    assert nets[0].exits(x)["model.0"].shape == (9, 3)


@pytest.mark.parametrize("loss", [new_loss, NewLoss()])
def test_losses_as_printed(loss):
    layer, twin = nn.Linear(4, 4), nn.Linear(4, 4)
    twin.load_state_dict(layer.state_dict())
    h, t = torch.randn(5, 4), torch.randn(5, 4)
    (twin(h) - twin(t)).square().mean().backward()
    propagators.Loss(layer, sgd(layer), loss)((h, t, torch.zeros(5)))
    assert torch.allclose(layer.weight, twin.weight - 0.1 * twin.weight.grad)


def test_formatter_as_printed_gives_one_target_per_class():
    h, t = MySignalFormatter()((torch.ones(5, 2), torch.eye(3)[[0, 0, 1, 2, 1]]))
    assert torch.equal(t, torch.eye(3)) and MySignalFormatter()((h, None))[1] is None
    project, hidden, out = modules()
    signal = nn.Sequential(
        signals.LabelNumberToOnehot(3), MySignalFormatter(), MySignalGenerator(project, (3,), (6,))
    )
    net = sigprop.wrap([hidden, out], signal=signal, optimizer=sgd)
    before = hidden[0].weight.clone()
    assert net(torch.randn(7, 6), torch.arange(7) % 3).shape == (7, 3)
    assert not torch.equal(before, hidden[0].weight)
