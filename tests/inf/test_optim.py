"""PiSGD as an optimiser of torch: groups, schedulers, states, hooks, and what it refuses."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from pilimit_lib.core import follow, load, restore, save, snapshot
from pilimit_lib.inf import (
    FinPiMLPSample,
    InfMLP,
    InfPiLinear,
    InfPiLinearReLU,
    InfSGD,
    PiSGD,
    clip_grad_norm_,
    param_groups,
)
from pilimit_lib.inf.rows.parameter import InfPiParameter

from .nets import assert_unchanged, cross_entropy, data, network, tensors


def backward(net, seed=0, b=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, net.d_in, dtype=torch.float64, generator=generator)
    y = torch.randint(net.d_out, (b,), generator=generator)
    loss = cross_entropy(y)(net(x))
    loss.backward()
    return loss


def step(net, optimizer, seed=0):
    optimizer.zero_grad()
    loss = backward(net, seed)
    optimizer.step()
    return float(loss.detach())


def assert_equal(left, right):
    assert_unchanged(tensors(left), right)


def test_the_name_of_the_original():
    assert InfSGD is PiSGD


def test_one_step_appends_one_row_per_sample():
    net = network()
    before = tensors(net)
    optimizer = PiSGD(net.parameters(), lr=0.25, weight_decay=0.1)
    backward(net)
    rows = {
        i: {
            name: getattr(net.layers[i], name).grad.clone().as_subclass(torch.Tensor)
            for name in "AB"
        }
        for i in (1, 2)
    }
    optimizer.step()
    for i in (1, 2):
        layer = net.layers[i]
        assert len(layer) == 6 + 4 and net.rows == [10, 10]
        for name in "AB":
            assert torch.equal(getattr(layer, name)[:6], before[f"layers.{i}.{name}"])
            assert torch.equal(getattr(layer, name)[6:], rows[i][name])
        torch.testing.assert_close(layer.B.norm(dim=1), torch.ones(10, dtype=torch.float64))
        torch.testing.assert_close(layer.Amult[:6], before[f"layers.{i}.Amult"] * (1 - 0.25 * 0.1))
        assert torch.equal(layer.Amult[6:], torch.full((4,), -0.25, dtype=torch.float64))
        assert layer.A.grad is None


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
}


def test_no_scheduler_of_torch_was_forgotten():
    present = {
        name
        for name, value in vars(lr_scheduler).items()
        if inspect.isclass(value)
        and issubclass(value, lr_scheduler.LRScheduler)
        and value is not lr_scheduler.LRScheduler
        and not name.startswith("_")
    }
    assert present == set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_torch(name):
    """The multiplier of each new row is the learning rate that the same scheduler gives torch's
    SGD."""
    net = network()
    ours = PiSGD(
        param_groups(net, 0.1, last_layer_lr_mult=4), momentum=0.9 if name == "CyclicLR" else 0
    )
    theirs = torch.optim.SGD(
        [{**group, "params": [nn.Parameter(torch.zeros(1))]} for group in ours.param_groups],
        momentum=ours.defaults["momentum"],
    )
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in (ours, theirs)]
    seen = set()
    for t in range(6):
        rates = {group["name"]: group["lr"] for group in theirs.param_groups}
        ours.zero_grad()
        backward(net, t)
        for group in ours.param_groups:
            # cyclic schedules move it too; here the row's first coefficient is looked at
            group["momentum"] = 0
        ours.step()
        theirs.step()
        assert (
            float(net.layers[1].Amult[-1]) == -rates["hidden"]
            and float(net.layers[2].Amult[-1]) == -rates["last"]
        )
        seen.add(rates["hidden"])
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len(seen) > 1, "the schedule never moved"


def test_groups_by_hand_as_the_original_writes_them():
    left, right = network(), None
    right = copy.deepcopy(left)
    groups = [
        {"params": [left.layers[0].A], "lr": 0.01},
        {"params": [layer.bias for layer in left.layers], "lr": 0.05},
    ]
    for layer, lr in ((left.layers[1], 0.1), (left.layers[2], 0.4)):
        groups.append(
            {"params": [layer.A, layer.Amult, layer.B], "lr": lr, "weight_decay": 0.1 * 0.1 / lr}
        )
    groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.1 * 0.1 / 0.01, 0.1 * 0.1 / 0.05
    by_hand = PiSGD(groups, lr=0.1)
    by_name = PiSGD(
        param_groups(
            right,
            0.1,
            0.1,
            first_layer_lr_mult=0.1,
            last_layer_lr_mult=4,
            bias_lr_mult=0.5,
            apply_lr_mult_to_wd=False,
        )
    )
    for t in range(3):
        step(left, by_hand, t), step(right, by_name, t)
    for name, value in tensors(left).items():
        torch.testing.assert_close(value, tensors(right)[name], rtol=1e-12, atol=1e-14)


def test_param_groups_cover_every_parameter_of_every_kind_of_network_once():
    net = network(L=2)
    for model in (
        net,
        FinPiMLPSample(net, 32),
        FinPiMLPSample(net, 32).gaussian_init_(),
        network(bias_alpha=0),
    ):
        groups = param_groups(model, 0.5, 0.01, 0.1, 4, 0.5, apply_lr_mult_to_wd=False)
        held = [id(p) for group in groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
        assert {g["name"]: g["lr"] for g in groups if g["name"] != "bias"} == {
            "first": 0.05,
            "hidden": 0.5,
            "last": 2.0,
        }
        for group in groups:
            assert group["lr"] * group["weight_decay"] == pytest.approx(0.5 * 0.01)


def test_what_param_groups_refuses():
    with pytest.raises(TypeError, match="Linear"):
        param_groups(nn.Linear(1, 1), 0.1)
    with pytest.raises(ValueError, match="last.*-1"):
        param_groups(network(), 0.1, last_layer_lr_mult=-1)
    with pytest.raises(ValueError, match="divided"):
        param_groups(network(), 0.1, 0.1, first_layer_lr_mult=0, apply_lr_mult_to_wd=False)


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_state_dict_round_trip(momentum):
    net = network()
    optimizer = PiSGD(param_groups(net, 0.1, 0.01), momentum=momentum)
    for t in range(3):
        step(net, optimizer, t)
    twin = copy.deepcopy(net)
    twin_optimizer = PiSGD(param_groups(twin, 7.0), momentum=0.1)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for t in range(3, 6):
        step(net, optimizer, t), step(twin, twin_optimizer, t)
    assert_equal(net, twin)


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_network_and_optimiser_from_a_file_into_fresh_ones(momentum, tmp_path):
    net = network()
    optimizer = PiSGD(param_groups(net, 0.1, 0.01), momentum=momentum)
    for t in range(3):
        step(net, optimizer, t)
    save(snapshot(net, optimizer), tmp_path / "c.pt")
    fresh = network()
    fresh_optimizer = PiSGD(param_groups(fresh, 7.0), momentum=0.1)
    restore(fresh, load(tmp_path / "c.pt"), fresh_optimizer)
    for t in range(3, 6):
        step(net, optimizer, t), step(fresh, fresh_optimizer, t)
    assert_equal(net, fresh)


def test_deepcopy_of_network_and_optimiser_together():
    net = network()
    optimizer = PiSGD(net.parameters(), lr=0.1, momentum=0.9)
    step(net, optimizer)
    twin, twin_optimizer = copy.deepcopy((net, optimizer))
    for t in range(1, 3):
        step(net, optimizer, t), step(twin, twin_optimizer, t)
    assert_equal(net, twin)


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_rewinding_rows_leaves_no_trace(momentum):
    net = network()
    optimizer = PiSGD(net.parameters(), lr=0.1, momentum=momentum)
    step(net, optimizer)
    twin, twin_optimizer = copy.deepcopy((net, optimizer))
    marks = [layer.axis.mark() for layer in net.layers[1:]]
    for layer in net.layers[1:]:
        layer.axis.append(
            {
                "A": torch.randn(3, layer.r_out),
                "Amult": torch.ones(3),
                "B": torch.randn(3, 6),
                "origin": torch.zeros(3, dtype=torch.long),
            }
        )
    for layer, mark in zip(net.layers[1:], marks):
        follow(optimizer, layer.axis.rewind(mark))
    step(net, optimizer, 1), step(twin, twin_optimizer, 1)
    assert_equal(net, twin)


def test_kept_rows_keep_their_momentum():
    net = network()
    optimizer = PiSGD(net.parameters(), lr=0.1, momentum=0.9)
    for t in range(2):
        step(net, optimizer, t)
    twin, twin_optimizer = copy.deepcopy((net, optimizer))
    for layer in net.layers[1:]:
        follow(optimizer, layer.axis.keep(torch.randperm(len(layer))))
    x, _ = data()
    for t in range(2, 5):
        step(net, optimizer, t), step(twin, twin_optimizer, t)
        torch.testing.assert_close(net(x), twin(x), rtol=0, atol=1e-12)


def test_momentum_that_did_not_follow_is_refused_before_anything_changed():
    net = network()
    optimizer = PiSGD(net.parameters(), lr=0.1, momentum=0.9)
    step(net, optimizer)
    net.layers[2].axis.keep(torch.arange(5))
    optimizer.zero_grad()
    backward(net)
    before = tensors(net)
    with pytest.raises(RuntimeError, match="follow"):
        optimizer.step()
    assert_unchanged(before, net)


# Gradients that are not finite


def test_nonfinite_rows_are_refused_before_anything_changed():
    net = network()
    optimizer = PiSGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    step(net, optimizer)
    backward(net)
    net.layers[2].pending.rows().A[0, 0] = float("nan")
    before = tensors(net)
    with pytest.raises(FloatingPointError, match="skip"):
        optimizer.step()
    assert_unchanged(before, net)
    step(net, optimizer)
    assert net.rows == [14, 14]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_rows_are_skipped_on_request(bad):
    net = network()
    optimizer = PiSGD(net.parameters(), lr=0.1, on_nonfinite="skip")
    backward(net)
    net.layers[2].pending.rows().A[0, 0] = bad
    before = tensors(net)
    optimizer.step()
    assert_unchanged(before, net)
    assert optimizer.nonfinite_skipped == 1 and all(
        layer.A.grad is None for layer in net.layers[1:]
    )
    step(net, optimizer)
    assert optimizer.nonfinite_skipped == 1 and net.rows == [10, 10]


@pytest.mark.parametrize(
    "settings", [{}, {"memory": "moments"}, {"memory": "moments", "fused": True}], ids=str
)
@pytest.mark.parametrize("how", ["raise", "skip"])
@pytest.mark.parametrize("place", ["sample", "bias", "moments"])
def test_a_gradient_that_is_not_finite_stops_the_whole_step(settings, how, place):
    """Momentum, weight decay, biases and the input layer too: half a step is no step."""
    net = InfMLP(5, 3, 6, 1, dtype=torch.float64, **settings)
    optimizer = PiSGD(param_groups(net, 0.1, 0.1), momentum=0.9, on_nonfinite=how)
    step(net, optimizer)
    optimizer.zero_grad()
    x, y = data()
    if place == "sample":
        x[0, 0] = float("nan")
    cross_entropy(y)(net(x)).backward()
    if place == "bias":
        net.layers[0].bias.grad[2] = float("inf")
    elif place == "moments" and settings:
        net.layers[2].V.grad[0, 1] = float("nan")
    elif place == "moments":
        net.layers[2].pending.rows().A[0, 1] = float("nan")
    before = tensors(net)
    momentum = {key: state["momentum_buffer"].clone() for key, state in optimizer.state.items()}
    if how == "raise":
        with pytest.raises(FloatingPointError, match="nothing was stepped"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.nonfinite_skipped == 1
    assert_unchanged(before, net)
    assert all(
        torch.equal(value, optimizer.state[key]["momentum_buffer"])
        for key, value in momentum.items()
    )
    step(net, optimizer)
    assert all(value.isfinite().all() for value in tensors(net).values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layernorm", [False, True])
@pytest.mark.parametrize("row_dtype", [torch.float32, torch.int8], ids=str)
def test_directions_that_are_not_finite_are_no_rows(bad, layernorm, row_dtype):
    """With layer norm the size of a bad pre-activation shows nothing, and no other parameter has a
    gradient here."""
    layer = InfPiLinearReLU(4, 3, bias_alpha=0, layernorm=layernorm, row_dtype=row_dtype)
    g = torch.randn(3, 4)
    g[1, 2] = bad
    layer(g).nan_to_num()[[0, 2]].sum().backward()
    with pytest.raises(FloatingPointError):
        PiSGD(layer.parameters(), lr=0.1).step()
    assert len(layer) == 4


def test_fused_moments_with_a_direction_that_is_not_finite():
    layer = InfPiLinear(4, 3, bias_alpha=0, layernorm=True, fused=True)
    before = layer.V.detach().clone()
    g = torch.full((1, 4), float("nan"))
    layer(g).nan_to_num().sum().backward()
    with pytest.raises(FloatingPointError):
        PiSGD(layer.parameters(), lr=0.1).step()
    assert torch.equal(before, layer.V)


def test_large_gradients_are_finite():
    """Their sum is not."""
    layer = nn.Linear(4, 2, bias=False)
    optimizer = PiSGD(layer.parameters(), lr=1e-38)
    layer.weight.grad = torch.full((2, 4), 3e38)
    optimizer.step()
    assert optimizer.nonfinite_skipped == 0 and layer.weight.isfinite().all()


def test_nonfinite_losses_of_a_whole_step():
    for how, context in (("raise", pytest.raises(FloatingPointError)), ("skip", None)):
        net = network()
        optimizer = PiSGD(net.parameters(), lr=0.1, on_nonfinite=how)
        (net(data()[0]) * float("nan")).sum().backward()
        before = tensors(net)
        if context:
            with context:
                optimizer.step()
            assert_unchanged(before, net)
        else:
            optimizer.step()
            assert net.rows == [6, 6]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"lr": -1.0}, "learning rate"),
        ({"lr": 0.1, "on_nonfinite": "ignore"}, "'ignore'"),
        ({"lr": 0.1, "momentum": -1.0}, "momentum"),
        ({"lr": 0.1, "nesterov": True}, "Nesterov"),
    ],
)
def test_settings_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PiSGD(network().parameters(), **arguments)


def test_a_layer_without_its_amult_is_refused():
    net = network()
    with pytest.raises(ValueError, match="Amult"):
        PiSGD([net.layers[1].A, net.layers[1].B], lr=0.1)
    optimizer = PiSGD(net.layers[0].parameters(), lr=0.1)
    optimizer.add_param_group({"params": [net.layers[1].A]})
    backward(net)
    before = tensors(net)
    with pytest.raises(ValueError, match="Amult"):
        optimizer.step()
    assert_unchanged(before, net)


# What is left alone


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"momentum": 0.9}])
def test_learning_rate_zero_keeps_the_function(settings):
    net = network()
    x, _ = data()
    expected = net(x)
    optimizer = PiSGD(net.parameters(), lr=0.0, **settings)
    for t in range(3):
        step(net, optimizer, t)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-14)
    if not settings.get("momentum"):
        assert net.rows == [6, 6], "rows that can never contribute"


def test_frozen_layers():
    net = network(L=2)
    net.layers[2].requires_grad_(False)
    net.layers[0].requires_grad_(False)
    optimizer = PiSGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    before = tensors(net)
    for t in range(2):
        step(net, optimizer, t)
    assert net.rows == [14, 6, 14]
    after = tensors(net)
    for name in before:
        assert (
            torch.equal(before[name], after[name]) == name.startswith(("layers.0", "layers.2"))
            or "alpha" in name
        )
    net.layers[2].requires_grad_(True)
    step(net, optimizer)
    assert net.rows == [18, 10, 18]


def test_a_fully_frozen_network_is_not_taped():
    net = network().requires_grad_(False)
    assert not net(data()[0]).requires_grad


def test_layers_that_the_optimiser_does_not_hold_keep_their_pending_rows():
    net = network()
    optimizer = PiSGD(net.layers[2].parameters(), lr=0.1)
    backward(net)
    optimizer.step()
    assert net.rows == [6, 10] and len(net.layers[1].A.grad) == 4


def test_zero_grad_forgets_pending_rows():
    for clear in (
        lambda net, optimizer: optimizer.zero_grad(),
        lambda net, optimizer: optimizer.zero_grad(set_to_none=False),
        lambda net, optimizer: net.zero_grad(),
    ):
        net = network()
        optimizer = PiSGD(net.parameters(), lr=0.1)
        backward(net)
        clear(net, optimizer)
        optimizer.step()
        assert net.rows == [6, 6]


def test_hooks_and_closure_run_once():
    net = network()
    optimizer = PiSGD(net.parameters(), lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        return backward(net)

    assert optimizer.step(closure).detach() > 0
    assert calls == ["before", "closure", "after"] and net.rows == [10, 10]


def test_finite_networks_are_stepped_as_by_torch():
    net = FinPiMLPSample(network(), 16)
    twin = copy.deepcopy(net)
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    ours, theirs = (
        PiSGD(net.parameters(), **settings),
        torch.optim.SGD(twin.parameters(), **settings),
    )
    for t in range(3):
        step(net, ours, t), step(twin, theirs, t)
    assert_equal(net, twin)


# Torch's own tools on rows


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.NAdam,
        torch.optim.Adadelta,
        torch.optim.Adamax,
        torch.optim.ASGD,
        lambda p, lr: torch.optim.AdamW(p, lr, foreach=True),
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.1),
        lambda p, lr: torch.optim.SGD(p, lr, foreach=True),
        lambda p, lr: torch.optim.Adam(p, lr, foreach=True),
    ],
)
def test_other_optimisers_give_the_remedy(make):
    net = network()
    optimizer = make([p for p in net.parameters() if isinstance(p, InfPiParameter)], lr=0.1)
    backward(net)
    before = tensors(net)
    with pytest.raises(RuntimeError, match="PiSGD"):
        optimizer.step()
    assert_unchanged(before, net)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_clipping_of_torch_gives_the_remedy(foreach):
    net = network()
    backward(net)
    before = [
        p.grad.clone().as_subclass(torch.Tensor)
        for p in net.layers[1:].parameters()
        if isinstance(p, InfPiParameter)
    ]
    with pytest.raises(RuntimeError, match=r"pilimit_lib.inf.clip.clip_grad_norm_"):
        nn.utils.clip_grad_norm_(net.layers[1:].parameters(), 0.01, foreach=foreach)
    with pytest.raises(RuntimeError, match=r"pilimit_lib.inf.clip.clip_grad_norm_"):
        nn.utils.clip_grad_value_(net.layers[1:].parameters(), 0.01, foreach=foreach)
    after = [p.grad for p in net.layers[1:].parameters() if isinstance(p, InfPiParameter)]
    assert all(torch.equal(a, b.as_subclass(torch.Tensor)) for a, b in zip(before, after))


def test_clipping_takes_a_network_its_parameters_or_one_of_them():
    net = network()
    backward(net)
    total = clip_grad_norm_(net, 1e9)
    assert torch.equal(total, clip_grad_norm_(net.parameters(), 1e9))
    first, rows = clip_grad_norm_(net.layers[0].A, 1e9), clip_grad_norm_([net.layers[1].B], 1e9)
    assert float(first) == pytest.approx(float(net.layers[0].A.grad.norm()))
    assert 0 < float(rows) < float(total)
    with pytest.raises(ValueError, match="positive"):
        clip_grad_norm_(net, 0)


def test_a_network_without_gradients_has_norm_zero():
    assert float(clip_grad_norm_(InfMLP(2, 2, 2, 1), 1.0)) == 0
