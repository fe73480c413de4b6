"""Parameters of every floating type, and local optimisers that cannot serve."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from pilimit_lib import sigprop
from pilimit_lib.sigprop import managers, models, propagators, signals

TYPES = [torch.double, torch.bfloat16, torch.half]
# Of the length of a step: what is left of a type's eight or eleven bits after some fifty roundings.
# Double is compared with single precision.
SHARE = {torch.double: 1e-4, torch.bfloat16: 0.25, torch.half: 0.25}


def moves(net, before):
    """What one step changed in the layers that learn locally, as one vector of single precision."""
    pairs = zip(net.named_parameters(), before.named_parameters())
    parts = [p.float() - q.float() for (name, p), (_, q) in pairs if "model.2" not in name]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_a_converted_model_learns_as_in_single_precision(make, data, dtype, per_class, norm):
    x, y = data
    loss = sigprop.loss.Contrast(by="label", normalize=True)
    net = make(per_class=per_class, norm=norm, loss=loss)
    twin = copy.deepcopy(net).to(dtype)
    out = twin(x.to(dtype), y)
    assert out.dtype == dtype and {p.dtype for _, p in twin.named_parameters()} == {dtype}
    F.cross_entropy(out, y).backward()
    before, after = copy.deepcopy(net), net
    start = copy.deepcopy(net).to(dtype)
    after(x, y)
    expected, got = moves(after, before), moves(twin, start)
    assert expected.norm() > 0.01 and (got - expected).norm() < SHARE[dtype] * expected.norm()
    assert twin.eval()(x.to(dtype)).dtype == dtype
    assert list(twin.exits(x.to(dtype))) == ["signal", "model.0", "model.1", "output"]


@pytest.mark.parametrize("dtype", TYPES)
def test_onehot_rows_follow_the_model(dtype):
    y = torch.tensor([0, 2])
    for formatter in (signals.LabelNumberToOnehot(3), signals.DistinctBatchLabelsOnehot()):
        formatter.to(dtype)
        rows = y if isinstance(formatter, signals.LabelNumberToOnehot) else torch.eye(3).to(dtype)
        assert formatter((None, rows))[1].dtype == dtype and not formatter.state_dict()
    # a projection converted on its own reads rows of another type
    projection = signals.ProjectionContext(nn.Linear(3, 4).to(dtype), (3,), (4,))
    assert projection((None, torch.eye(3)))[1].dtype == dtype


def test_a_soft_label_follows_as_well(make, data):
    x, y = data
    net = make().double()
    assert net(x.double(), F.one_hot(y, 3).float()).dtype == torch.double


def adam(module):
    return optim.Adam(module.parameters(), 0.01)


def test_converting_after_learning_says_how_to_go_on(make, data):
    x, y = data
    net = make(optimizer=adam)
    net(x, y)
    net.double()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"exp_avg of Adam is torch.float32.*load_optimizer_state"):
        net(x.double(), y)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.load_optimizer_state_dict(net.optimizer_state_dict())
    net(x.double(), y)


def test_adam_in_half_precision_is_refused_where_its_eps_vanishes(make, data):
    x, y = data
    net = make(optimizer=adam).half()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="eps=1e-08 of Adam is 0 in float16.*eps=1e-4"):
        net(x.half(), y)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net = make(optimizer=lambda m: optim.Adam(m.parameters(), 0.01, eps=1e-4)).half()
    net(x.half(), y)
    assert all(p.isfinite().all() for _, p in net.named_parameters())


@pytest.mark.parametrize(
    "optimizer, message",
    [
        (optim.Adam, r"optimizer is Adam.*optimizer=lambda module: torch.optim.Adam\(module.param"),
        (functools.partial(optim.SGD, lr=0.1), r"is SGD.*lambda module: torch.optim.SGD\("),
        (lambda m: optim.Adam, r"class Adam; build it, as in Adam\(module.parameters"),
        (lambda m: optim.LBFGS(m.parameters()), "LBFGS evaluates its loss several times.*SGD"),
        (lambda m: 0.1, "must be a built optimiser like Adam.*got float"),
        (0.1, "must be a function module -> optimiser, got float: pass optimizer=lambda"),
    ],
)
def test_optimizers_that_cannot_serve_get_a_remedy(make, optimizer, message):
    with pytest.raises(TypeError, match=message):
        make(optimizer=optimizer)
    with pytest.raises(TypeError):
        manager = managers.Preset(
            models.Forward, propagators.Loss, propagators.signals.Loss, optimizer
        )
        manager.set_signal(
            signals.project_labels(3, (4,)), loss=sigprop.loss.v9_input_target_max_all
        )


@pytest.mark.parametrize("cls", [propagators.Loss, propagators.signals.Loss])
@pytest.mark.parametrize(
    "build, message",
    [
        (lambda p: optim.Adam, "class Adam; build it"),
        (optim.LBFGS, "needs no closure"),
    ],
)
def test_propagators_refuse_them_too(cls, build, message):
    layer = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=message):
        cls(layer, build(layer.parameters()), sigprop.loss.v9_input_target_max_all)
