"""Edits of the architecture against masking, direct counts and dense equivalents, on everything
that couples neurons."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from pilimit_lib.lab import Refused, watch

from .conftest import PlainNet


class Concatenated(nn.Module):
    """A concatenation read by a convolution and flattened: what lies behind the grown operand has
    to move."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 3, 3, padding=1)
        self.c = nn.Conv2d(7, 4, 3, padding=1)
        self.out = nn.Linear(11 * 16, 3)

    def forward(self, x):
        x = F.avg_pool2d(x, 2)
        both = torch.cat([self.a(x), self.b(x)], 1).relu()
        return self.out(torch.cat([self.c(both), both], 1).flatten(1))


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.depth = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1, groups=4),
        )
        self.norm, self.act = nn.BatchNorm2d(4), nn.PReLU(4)
        self.up = nn.ConvTranspose2d(4, 5, 2, stride=2)
        self.scale = nn.Parameter(torch.rand(5, 1, 1) + 0.5)
        self.last = nn.Conv2d(5, 2, 3)

    def forward(self, x):
        return self.last(
            (self.up(self.act(self.norm(self.depth(self.stem(x))))) * self.scale).relu()
        )


class Tokens(nn.Module):
    """A feed-forward block on sequences inside a residual stream, and a branch that depends on the
    data."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        x = self.embed(x.flatten(1, 2))
        if x.sum() > -1e9:
            x = x + self.down(F.gelu(self.up(x)))
        return self.out(x)


MODELS = {
    "plain": (PlainNet, ["stem", "inner", "narrow", "hidden"]),
    "concatenated": (Concatenated, ["a", "b", "c"]),
    "depthwise": (Depthwise, ["stem", "depth", "up"]),
    "tokens": (Tokens, ["embed", "up"]),
}
CASES = [(name, layer) for name, (_, layers) in MODELS.items() for layer in layers]


def build(name, seed=0):
    """A network whose norms hold statistics and whose optimiser holds moments of real steps."""
    torch.manual_seed(seed)
    model = MODELS[name][0]()
    optimizer = optim.Adam(model.parameters(), lr=1e-3)
    x = torch.randn(16, 1, 8, 8)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model, optimizer, x


def masked(model, layer, neurons, x):
    """Set the neurons to zero by hand: the outputs of everything that computes them, behind its
    norm."""
    hooks = []
    stream = {
        "stem": ["norm", "inner_norm"],
        "inner": ["norm", "inner_norm"],
        "depth": ["scale"],
        "embed": ["embed", "down"],
    }
    if isinstance(model, Depthwise) and layer in ("stem", "depth"):
        targets = ["act"]
    else:
        targets = stream.get(layer, [layer])
    for target in targets:

        def silence(module, args, output):
            output = output.clone()
            output.index_fill_(
                output.ndim - 1 if isinstance(module, nn.Linear) else 1, torch.tensor(neurons), 0
            )
            return output

        hooks.append(model.get_submodule(target).register_forward_hook(silence))
    with torch.no_grad():
        result = model(x)
    for hook in hooks:
        hook.remove()
    return result


@pytest.mark.parametrize("name, layer", CASES)
def test_pruning_equals_masking(name, layer):
    model, optimizer, x = build(name)
    model.double().eval()
    neurons = [0, 2]
    expected = masked(model, layer, neurons, x.double())
    original = model(x.double())
    watch(model, example=x.double()[:4]).ops.prune(layer=layer, neuron_indices=neurons)
    torch.testing.assert_close(model(x.double()), expected, rtol=1e-10, atol=1e-12)
    assert (expected - original).abs().max() > 1e-4, (
        "the mask has to matter, or the test says nothing"
    )


@pytest.mark.parametrize("init", ["zero_out", "split"])
@pytest.mark.parametrize("name, layer", CASES)
def test_adding_preserves_the_function_and_the_new_neurons_learn(name, layer, init):
    model, optimizer, x = build(name)
    lab = watch(model, optimizer, example=x[:4])
    model.eval()
    before = model(x)
    lab.ops.add_neurons(layer=layer, neuron_count=3, init=init)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    model.train()
    weight = model.get_submodule(layer).weight
    dim = 1 if isinstance(model.get_submodule(layer), nn.ConvTranspose2d) else 0
    fresh = weight.detach().narrow(dim, weight.shape[dim] - 3, 3).clone()
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    moved = (weight.detach().narrow(dim, weight.shape[dim] - 3, 3) - fresh).abs().flatten(1).amax(1)
    assert (moved > 0).all()


@pytest.mark.parametrize("name, layer", CASES)
def test_adding_then_pruning_the_new_ones_is_the_identity_bit_for_bit(name, layer):
    model, optimizer, x = build(name)
    lab = watch(model, optimizer, example=x[:4])
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    moments = {key: optimizer.state[p]["exp_avg"].clone() for key, p in model.named_parameters()}
    size = lab.planner().coupling(model.get_submodule(layer)).size
    lab.ops.add_neurons(layer=layer, neuron_count=2)
    lab.ops.prune(layer=layer, neuron_indices=[size, size + 1])
    for key, value in model.state_dict().items():
        assert torch.equal(value, tensors[key]), key
    for key, p in model.named_parameters():
        assert torch.equal(optimizer.state[p]["exp_avg"], moments[key]), key


def test_a_tensor_met_twice_is_edited_twice():
    """The inner convolution of a residual block: rows and columns belong to the same neurons."""
    model, optimizer, x = build("plain")
    weight, moment = (
        model.inner.weight.detach().clone(),
        optimizer.state[model.inner.weight]["exp_avg"].clone(),
    )
    watch(model, optimizer, example=x[:4]).ops.prune(layer="stem", neuron_indices={1})
    rest = torch.tensor([0, 2, 3, 4, 5])
    assert torch.equal(model.inner.weight, weight[rest][:, rest])
    assert torch.equal(optimizer.state[model.inner.weight]["exp_avg"], moment[rest][:, rest])


@pytest.mark.parametrize(
    "optimizer_class, options",
    [
        (optim.SGD, {"momentum": 0.9}),
        (optim.AdamW, {"weight_decay": 0.1}),
        (optim.Adam, {"amsgrad": True}),
    ],
)
def test_optimiser_state_follows_and_nothing_is_rebuilt(optimizer_class, options):
    torch.manual_seed(0)
    model = PlainNet()
    optimizer = optimizer_class(
        [
            {
                "params": [p for n, p in model.named_parameters() if "norm" not in n],
                "lr": 1e-2,
                **options,
            },
            {"params": [p for n, p in model.named_parameters() if "norm" in n], "lr": 3e-3},
        ],
        lr=1e-2,
    )
    schedule = optim.lr_scheduler.StepLR(optimizer, 2)
    x = torch.randn(16, 1, 8, 8)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        schedule.step()
    before = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}
    rates = [group["lr"] for group in optimizer.param_groups]
    lab = watch(model, optimizer, example=x[:4])
    lab.ops.prune(layer="narrow", neuron_indices={1})
    lab.ops.add_neurons(layer="narrow", neuron_count=1)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters()
    }
    assert [group["lr"] for group in optimizer.param_groups] == rates
    for key, value in before["narrow.weight"].items():
        now = optimizer.state[model.narrow.weight][key]
        if value is not None and value.ndim:
            assert torch.equal(now[:3], value[[0, 2, 3]]) and (now[3] == 0).all()
        elif value is not None:
            assert torch.equal(now, value)
    for key, value in before["hidden.weight"].items():
        if value is not None and value.ndim:
            kept = torch.cat([torch.arange(9), torch.arange(18, 36)])
            assert torch.equal(optimizer.state[model.hidden.weight][key][:, :27], value[:, kept])
    schedule.step()
    model(x).square().mean().backward()
    optimizer.step()


def test_an_edit_with_a_live_graph_does_not_break_it():
    model, optimizer, x = build("plain")
    loss = model(x).square().mean()
    watch(model, optimizer, example=x[:4]).ops.prune(layer="stem", neuron_indices={1})
    loss.backward()  # with .data of another shape: "returned an invalid gradient"
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def test_reinitialised_neurons_learn_again_through_batch_norm():
    model, optimizer, x = build("plain")
    lab = watch(model, optimizer, example=x[:4])
    model.eval()
    expected = masked(model, "stem", [3], x)
    lab.ops.reinit_neurons(layer="stem", neuron_indices={3})
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert (
        model.norm.weight[3] == 1
        and model.norm.running_var[3] == 1
        and model.norm.running_mean[3] == 0
    )
    assert (model.narrow.weight[:, 3] == 0).all() and (
        optimizer.state[model.stem.weight]["exp_avg"][3] == 0
    ).all()
    row, gamma = model.stem.weight[3].detach().clone(), model.norm.weight[3].detach().clone()
    model.train()
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert (model.narrow.weight[:, 3] != 0).all(), "outgoing weights have to wake up"
    assert (model.stem.weight[3] != row).all() and model.norm.weight[3] != gamma


def test_perturbation_is_a_little_noise():
    model, optimizer, x = build("plain")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    watch(model, optimizer, example=x[:4]).ops.reinit_neurons(
        layer="narrow", neuron_indices={0, 2}, perturbation_ratio=0.2
    )
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"narrow.weight", "narrow.bias"}
    ratio = model.narrow.weight / before["narrow.weight"]
    assert torch.equal(ratio[[1, 3]], torch.ones_like(ratio[[1, 3]]))
    assert (ratio[[0, 2]] >= 0.8 - 1e-6).all() and (ratio[[0, 2]] <= 1.2 + 1e-6).all()
    assert len(ratio[[0, 2]].unique()) > 50, "continuous noise, not three values"


def test_counters_and_rates_follow_the_neuron():
    model, optimizer, x = build("plain")
    lab = watch(model, optimizer, example=x[:4])
    model(x)
    stem, narrow = lab.neurons[model.stem], lab.neurons[model.narrow]
    counts = stem.train_triggers.clone()
    stem.set_rate({4}, 0.0)
    narrow.set_rate({4}, 0.25, incoming=True)
    lab.ops.prune(layer="stem", neuron_indices={0, 2})
    assert (
        torch.equal(stem.train_triggers, counts[[1, 3, 4, 5]])
        and stem.train_triggers.dtype == torch.long
    )
    assert stem.rate.tolist() == [1, 1, 0, 1] and narrow.in_rate.tolist() == [1, 1, 0.25, 1]
    frozen = model.stem.weight[2].detach().clone()
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    assert torch.equal(model.stem.weight[2], frozen) and not torch.equal(
        model.stem.weight[1], model.stem.weight[2]
    )
    lab.ops.add_neurons(layer="stem", neuron_count=1)
    assert (
        stem.rate.tolist() == [1, 1, 0, 1, 1]
        and stem.train_triggers[-1] == 0
        and stem.train_seen[-1] == 0
    )


def test_frozen_parameters_are_planned_and_stay_frozen():
    model, optimizer, x = build("plain")
    model.inner.requires_grad_(False)
    watch(model, optimizer, example=x[:4]).ops.prune(layer="stem", neuron_indices={1})
    assert (
        model.inner.weight.shape[:2] == (5, 5)
        and not model.inner.weight.requires_grad
        and model.stem.weight.requires_grad
    )


class TestPlan:
    def test_a_plan_lists_every_tensor_and_changes_nothing(self):
        model, optimizer, x = build("plain")
        lab = watch(model, optimizer, example=x[:4])
        before = {name: (id(p), p.clone()) for name, p in model.state_dict(keep_vars=True).items()}
        generator = torch.get_rng_state()
        plan = lab.ops.plan("prune", layer="stem", neuron_indices={0})
        assert torch.equal(generator, torch.get_rng_state()) and model.training
        assert all(
            id(p) == before[n][0] and torch.equal(p, before[n][1])
            for n, p in model.state_dict(keep_vars=True).items()
        )
        lab.ops.prune(layer="stem", neuron_indices={0})
        changed = {
            name
            for name, value in model.state_dict().items()
            if value.shape != before[name][1].shape
        }
        listed = {entry.tensor: entry for entry in plan.tensors}
        assert changed == {name for name in listed if "(" not in name}
        assert all(
            list(listed[name].after) == list(model.state_dict()[name].shape) for name in changed
        )
        assert listed["inner.weight"].after == (5, 5, 3, 3) and listed[
            "stem.weight"
        ].optimizer_state == ("exp_avg", "exp_avg_sq")
        assert "stem.weight" in str(plan) and "[6, 1, 3, 3] -> [5, 1, 3, 3]" in str(plan)

    def test_a_plan_refuses_what_the_edit_would_refuse(self):
        model, optimizer, x = build("plain")
        lab = watch(model, optimizer, example=x[:4])
        with pytest.raises(Refused, match="output layer"):
            lab.ops.plan("prune", layer="out", neuron_indices={0})
        with pytest.raises(ValueError, match="no operation 'shrink'"):
            lab.ops.plan("shrink", layer="stem")


class Unsuited(nn.Module):
    """One reason to refuse per variant."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=2 if kind == "grouped" else 1)
        self.norm = nn.GroupNorm(2, 4) if kind == "group norm" else nn.Identity()
        if kind == "weight norm":
            nn.utils.parametrizations.weight_norm(self.second)
        if kind == "tied":
            self.third = nn.Conv2d(4, 4, 3, padding=1)
            self.third.weight = self.second.weight
        self.out = nn.Linear(64, 2)

    def forward(self, x):
        x = self.first(F.avg_pool2d(x, 2))
        x = x.view(len(x), 4, 4, 4) if self.kind == "fixed view" else x
        x = x.softmax(1) if self.kind == "softmax" else x
        x = self.second(self.norm(x).relu())
        x = self.third(x) if self.kind == "tied" else x
        return self.out(x.flatten(1))


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("grouped", "groups=2"),
        ("group norm", "normalises across"),
        ("weight norm", "parametrisation"),
        ("tied", "shared between"),
        ("fixed view", "names a size"),
        ("softmax", "mixes neurons"),
    ],
)
def test_what_cannot_be_edited_is_refused_with_a_reason_and_nothing_changes(kind, reason):
    torch.manual_seed(0)
    model = Unsuited(kind)
    optimizer = optim.Adam(model.parameters())
    x = torch.randn(8, 1, 8, 8)
    model(x).square().mean().backward()
    optimizer.step()
    lab = watch(model, optimizer, example=x)
    tensors = {
        name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()
    }
    state = {p: dict(entry) for p, entry in optimizer.state.items()}
    with pytest.raises(Refused, match=reason):
        lab.ops.prune(layer="first", neuron_indices={1})
    now = model.state_dict(keep_vars=True)
    assert all(
        now[name] is value and torch.equal(value, copied)
        for name, (value, copied) in tensors.items()
    )
    assert set(optimizer.state) == set(state) and all(
        optimizer.state[p][k] is v for p in state for k, v in state[p].items()
    )
    assert model.first.out_channels == 4 and lab.journal.events == []


class Shuffled(nn.Module):
    """Channels change places between two convolutions: torch-pruning either fails to trace it or
    takes it for element-wise."""

    def __init__(self, groups):
        super().__init__()
        self.first, self.second, self.groups = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3, 3), groups

    def forward(self, x):
        x = self.first(x).relu()
        if self.groups:
            x = (
                x.view(len(x), self.groups, -1, *x.shape[2:])
                .transpose(1, 2)
                .reshape(len(x), -1, *x.shape[2:])
            )
        else:
            x = x.flip(1)
        return self.second(x).mean((2, 3))


@pytest.mark.parametrize("groups", [0, 2])
def test_shuffled_channels_are_refused_not_mixed_up(groups):
    torch.manual_seed(0)
    model = Shuffled(groups)
    x = torch.randn(4, 1, 8, 8)
    lab = watch(model, example=x)
    model.train()
    before = model(x)
    assert lab.neuron_stats()["layer"].unique().tolist() == ["first", "second"], (
        "statistics need no plan"
    )
    with pytest.raises(Refused):
        lab.ops.prune(layer="first", neuron_indices={0})
    assert torch.equal(model(x), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "squeezenet1_0"])
def test_networks_of_torchvision(name):
    models = pytest.importorskip(
        "torchvision.models", reason="needs torchvision: pip install 'pilimit[images]'"
    )
    torch.manual_seed(0)
    model, x = getattr(models, name)(num_classes=10).eval(), torch.randn(2, 3, 64, 64)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lab = watch(model, optimizer, example=x)
    order = lab.execution_order()
    for layer in order[:: max(1, len(order) // 8)][:-1]:
        lab.ops.prune(layer=layer, neuron_indices={0, 3})  # each edit checks itself against masking
        before = model(x)
        lab.ops.add_neurons(layer=layer, neuron_count=2)
        torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)
    model.train()
    model(x).square().mean().backward()
    optimizer.step()


def test_output_neurons_only_where_asked_for():
    model, optimizer, x = build("plain")
    lab = watch(model, optimizer, example=x[:4])
    rows = model.out.weight.detach().clone()
    for call in (
        lambda: lab.ops.prune(layer="out", neuron_indices={1}),
        lambda: lab.ops.add_neurons(layer="out", neuron_count=1),
        lambda: lab.ops.reinit_neurons(layer="out", neuron_indices={1}),
    ):
        with pytest.raises(Refused, match="output layer"):
            call()
    lab.ops.add_neurons(layer="out", neuron_count=2, allow_output=True)
    assert model(x).shape == (16, 12) and torch.equal(model.out.weight[:10], rows)
    lab.ops.prune(layer="out", neuron_indices={0}, allow_output=True)
    assert torch.equal(model.out.weight[:9], rows[1:])
