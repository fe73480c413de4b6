"""An optimiser follows edits: training commutes with reordering, and rewound growth leaves no
trace."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from pilimit_lib.core import Axis, Change, follow, parameters_of

from .things import NAMES, OPTIMIZERS, Branching, Hidden, same, state_of, train

ALL = {
    **OPTIMIZERS,
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


@every
def test_training_commutes_with_a_permutation(make):
    """Train, permute, train = train, train, permute: only true if every state tensor is rearranged
    like its parameter."""
    left = Hidden(5).double()
    right = copy.deepcopy(left)
    left_optimizer, right_optimizer = make(left.parameters()), make(right.parameters())
    order = torch.tensor([3, 1, 4, 0, 2])
    train(left, left_optimizer, 4, seed=1)
    follow(left_optimizer, left.axis.keep(order))
    train(left, left_optimizer, 4, seed=2)
    train(right, right_optimizer, 4, seed=1)
    train(right, right_optimizer, 4, seed=2)
    follow(right_optimizer, right.axis.keep(order))
    for a, b in zip(state_of(left, left_optimizer), state_of(right, right_optimizer)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@every
def test_rewound_growth_leaves_no_trace(make):
    left = Hidden(5)
    right = copy.deepcopy(left)
    left_optimizer, right_optimizer = make(left.parameters()), make(right.parameters())
    train(left, left_optimizer, 3, seed=1)
    mark = left.axis.mark()
    follow(left_optimizer, left.axis.append(left.values(3)))
    follow(left_optimizer, left.axis.rewind(mark))
    train(left, left_optimizer, 3, seed=2)
    train(right, right_optimizer, 3, seed=1)
    train(right, right_optimizer, 3, seed=2)
    assert same(state_of(left, left_optimizer), state_of(right, right_optimizer))


@every
def test_new_slices_start_with_zero_state_and_old_ones_keep_theirs(make):
    model = Hidden(5)
    optimizer = make(model.parameters())
    train(model, optimizer, 3)
    old = {name: copy.deepcopy(optimizer.state.get(p, {})) for name, p in model.named_parameters()}
    follow(optimizer, model.axis.append(model.values(2)))
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        assert set(state) == set(old[name])
        for key, value in state.items():
            before = old[name][key]
            if isinstance(value, torch.Tensor) and value.ndim and name != "down.bias":
                assert value.shape == parameter.shape
                dim = 1 if name == "down.weight" else 0
                assert (
                    torch.equal(value.narrow(dim, 0, 5), before)
                    and not value.narrow(dim, 5, 2).any()
                )
            elif before is not None:
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(before))
    train(model, optimizer, 3)


@every
def test_nothing_that_was_replaced_is_held_any_more(make):
    model = Hidden(5)
    optimizer = make(model.parameters())
    train(model, optimizer, 1)
    follow(optimizer, model.axis.append(model.values(2)))
    held = {id(p) for p in model.parameters()}
    assert {id(p) for p in parameters_of(optimizer)} == held
    assert {id(p) for p in optimizer.state} <= held
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 1)


@given(st.lists(st.sampled_from(["append", "keep", "drop"]), min_size=1, max_size=4))
def test_changes_add_up(verbs):
    """follow(change1 + change2 + …) = follow(change1), follow(change2), …"""
    left = Hidden(4)
    right = copy.deepcopy(left)
    left_optimizer, right_optimizer = (
        torch.optim.Adam(m.parameters(), lr=0.01) for m in (left, right)
    )
    train(left, left_optimizer, 2)
    train(right, right_optimizer, 2)
    total = None
    for verb in verbs:
        values = left.values(2)
        changes = []
        for model in (left, right):
            size = model.axis.size
            changes.append(
                model.axis.append(values)
                if verb == "append"
                else model.axis.keep(torch.arange(size - 1, -1, -1))
                if verb == "keep"
                else model.axis.keep(torch.arange(max(1, size - 1)))
            )
        follow(left_optimizer, changes[0])
        total = changes[1] if total is None else total + changes[1]
    follow(right_optimizer, total)
    assert len(total.edits) == 5 * len(verbs)
    assert same(state_of(left, left_optimizer), state_of(right, right_optimizer))


def test_addition_is_associative_and_has_a_zero():
    model = Hidden(4)
    twins = [copy.deepcopy(model) for _ in range(3)]
    changes = []
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in twins]
    values = [model.values(1), model.values(2)]
    for twin, optimizer in zip(twins, optimizers):
        train(twin, optimizer, 1)
        changes.append(
            (
                twin.axis.append(values[0]),
                twin.axis.keep(torch.tensor([4, 3, 0, 1, 2])),
                twin.axis.append(values[1]),
            )
        )
    (a, b, c), (d, e, f), (g, h, i) = changes
    follow(optimizers[0], (a + b) + c)
    follow(optimizers[1], d + (e + f))
    follow(optimizers[2], Change() + g + (h + Change()) + i)
    states = [state_of(m, o) for m, o in zip(twins, optimizers)]
    assert same(states[0], states[1]) and same(states[0], states[2])


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.1),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_stay_valid(scheduler):
    model = Hidden(4)
    twin = copy.deepcopy(model)
    rates = []
    for net, grows in ((model, True), (twin, False)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        schedule = scheduler(optimizer)
        seen = []
        for t in range(8):
            if grows and t == 3:
                follow(optimizer, net.axis.append(net.values(1)))
            before = net.up.weight.detach().clone()
            train(net, optimizer, 1, seed=t)
            assert not torch.equal(before, net.up.weight)
            schedule.step()
            seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        rates.append(seen)
    assert rates[0] == rates[1]


def test_groups_keep_their_settings_and_order():
    model = Hidden(4)
    optimizer = torch.optim.SGD(
        [
            {"params": [model.down.weight, model.up.bias], "lr": 0.3},
            {"params": [model.up.weight], "lr": 0.7, "weight_decay": 0.1},
        ],
        lr=1.0,
    )
    settings = [
        {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
    ]
    follow(optimizer, model.axis.append(model.values(2)))
    assert [
        {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
    ] == settings
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(model.down.weight), id(model.up.bias)],
        [id(model.up.weight)],
    ]


def test_each_of_several_optimizers_follows_its_own_share():
    model = Hidden(4)
    first, second = (
        torch.optim.Adam(model.up.parameters()),
        torch.optim.Adam(model.down.parameters()),
    )
    model(torch.randn(2, 3)).sum().backward()
    first.step(), second.step()
    change = model.axis.append(model.values(2))
    for optimizer in (first, second):
        follow(optimizer, change)
    assert {id(p) for p in parameters_of(first)} == {id(p) for p in model.up.parameters()}
    assert {id(p) for p in parameters_of(second)} == {id(p) for p in model.down.parameters()}


def test_added_parameters_join_the_group_of_their_neighbour():
    model = Branching()
    optimizer = torch.optim.SGD(
        [{"params": [model.trunk.weight], "lr": 0.5}, {"params": [model.trunk.bias], "lr": 0.1}],
        lr=1.0,
    )
    follow(optimizer, model.branch())
    assert len(optimizer.param_groups[0]["params"]) == 1 + 4
    follow(optimizer, Change.adding(extra := nn.Parameter(torch.zeros(2))))
    assert optimizer.param_groups[1]["params"][-1] is extra
    follow(optimizer, Change.removing(extra))
    follow(optimizer, model.prune())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]


def test_removed_parameters_take_their_state_along():
    model = Branching()
    optimizer = torch.optim.Adam(model.parameters())
    follow(optimizer, model.branch())
    train(model, optimizer, 1)
    follow(optimizer, model.prune())
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}


def test_adding_twice_is_refused():
    optimizer = torch.optim.Adam([parameter := nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=r"\[3\].*already holds"):
        follow(optimizer, Change.adding(parameter))
    assert optimizer.param_groups[0]["params"] == [parameter]


@pytest.mark.skipif(not NAMES, reason="optimisers of this torch take no names")
def test_named_groups_stay_in_step_with_their_parameters():
    """torch checks `param_names` against `params` whenever an optimiser state is loaded."""
    model = Branching()
    optimizer = torch.optim.Adam(model.named_parameters())
    follow(optimizer, model.branch())
    group = optimizer.param_groups[0]
    assert "param_names" not in group or len(group["param_names"]) == len(group["params"])
    train(model, optimizer, 1)
    follow(optimizer, model.prune())
    assert "param_names" not in group or len(group["param_names"]) == len(group["params"])
    optimizer.load_state_dict(optimizer.state_dict())


def test_an_edit_of_an_optimised_parameter_that_is_not_followed_is_found_out_by_snapshot():
    from pilimit_lib.core import snapshot

    model = Hidden(4)
    optimizer = torch.optim.Adam(model.parameters())
    model.axis.append(model.values(2))
    with pytest.raises(ValueError, match="follow"):
        snapshot(model, optimizer)


@pytest.mark.skipif(
    not hasattr(torch.optim, "Adafactor"), reason="this torch has no Adafactor: since 2.5"
)
@pytest.mark.parametrize("dim", [0, 1])
def test_factored_statistics_follow_the_dimension_that_they_extend_along(dim):
    """Adafactor keeps [o 1] and [1 i] beside a weight [o i]."""
    layer = nn.Linear(3, 4, bias=False)
    axis = Axis("units").join(layer, "weight", dim=dim)
    optimizer = torch.optim.Adafactor(layer.parameters(), lr=0.1)
    for size in (3, 5 if dim else 3):
        optimizer.zero_grad()
        layer(torch.randn(5, size)).square().sum().backward()
        optimizer.step()
        if axis.size == (3 if dim else 4):
            follow(optimizer, axis.append({"weight": torch.zeros((4, 2) if dim else (2, 3))}))
    state = optimizer.state[layer.weight]
    o, i = layer.weight.shape
    assert (
        state["row_var"].shape == (o, 1)
        and state["col_var"].shape == (1, i)
        and torch.isfinite(layer.weight).all()
    )
