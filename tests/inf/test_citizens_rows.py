"""Rows under the tools that torch's users reach for: the right value, or a refusal that says what
to do; never another network than was meant."""

import copy
import inspect
import math

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
from torch import nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from pilimit_lib.core import batch
from pilimit_lib.inf import InfMLP, InfPiLinearReLU, PiSGD, clip_grad_norm_, param_groups
from pilimit_lib.inf.gp.learner import KernelMLP
from pilimit_lib.inf.gp.relu import ReLUKernel
from pilimit_lib.inf.rows.sums.uncompiled import SAID
from tests.inf.nets import data, network
from tests.inf.test_rows_shard import started

# torch itself uses what it deprecates, when it first differentiates in forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")


def rows_of(net):
    return {
        f"{number}.{name}": value
        for number, layer in enumerate(net.layers)
        if isinstance(layer, InfPiLinearReLU)
        for name, value in zip(("A", "Amult", "B"), layer.dense_rows())
    }


def assert_same(left, right, **tolerance):
    found, expected = (net.state_dict() for net in (left, right))
    for name, value in expected.items():
        if isinstance(value, torch.Tensor) and not tolerance:
            assert torch.equal(found[name], value), name
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, **tolerance)


def pending(net):
    return [len(layer.pending.parts) for layer in net.layers[1:]]


def step(net, optimizer, x, y, between=lambda: None):
    optimizer.zero_grad()
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    between()
    optimizer.step()


# Derivatives that nobody accumulates.


def grad_of_inputs(net, x, y):
    x = x.clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(net(x), y), x)


def grad_of_ordinary_parameters(net, x, y):
    torch.autograd.grad(F.cross_entropy(net(x), y), [net.layers[0].A, net.layers[1].bias])


def grads_batched(net, x, y):
    x = x.clone().requires_grad_()
    torch.autograd.grad(net(x).sum(0), x, torch.eye(3).to(x), is_grads_batched=True)


def backward_of_inputs_only(net, x, y):
    x = x.clone().requires_grad_()
    F.cross_entropy(net(x), y).backward(inputs=[x])


EVALUATIONS = {
    "grad": grad_of_inputs,
    "grad of ordinary parameters": grad_of_ordinary_parameters,
    "is_grads_batched": grads_batched,
    "backward(inputs=)": backward_of_inputs_only,
    "jacobian": lambda net, x, y: torch.autograd.functional.jacobian(net, x),
    "jacobian, vectorised": lambda net, x, y: torch.autograd.functional.jacobian(
        net, x, vectorize=True
    ),
    "jacrev": lambda net, x, y: jacrev(net)(x),
    "jvp": lambda net, x, y: jvp(net, (x,), (torch.ones_like(x),)),
    "hessian": lambda net, x, y: hessian(lambda x: net(x).sum())(x),
}


@pytest.mark.parametrize("place", ["before backward", "before step"])
@pytest.mark.parametrize("how", EVALUATIONS)
def test_derivatives_that_backward_does_not_accumulate_leave_no_rows(how, place):
    """A network that is looked at every step, as for adversarial examples, and one that is not."""
    net, (x, y) = network(L=2), data()
    looked_at = copy.deepcopy(net)
    for each in (net, looked_at):
        optimizer = PiSGD(param_groups(each, 0.3), lr=0.3)
        for _ in range(3):
            look = (lambda: EVALUATIONS[how](looked_at, x + 1, y)) if each is looked_at else int
            if place == "before backward":
                look()
            step(each, optimizer, x, y, look if place == "before step" else int)
            assert pending(each) == [0, 0, 0]
    assert_same(looked_at, net)
    assert not any(layer.pending.coming for layer in looked_at.layers[1:])


def test_what_a_failed_backward_pass_delivered_is_forgotten():
    net, (x, y) = network(), data()

    def fail(grad):
        raise RuntimeError("on purpose")

    g = net.layers[0](x)
    g.register_hook(fail)
    loss = F.cross_entropy(net.layers[2](net.layers[1](g)), y)
    net.layers[1].register_full_backward_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match="on purpose"):
        loss.backward()
    net.zero_grad()
    assert pending(net) == [0, 0] and not any(layer.pending.coming for layer in net.layers[1:])


def test_a_graph_that_is_kept_gives_its_rows_at_every_backward_pass():
    net, (x, y) = network(), data()
    twice = copy.deepcopy(net)
    for each in (net, twice):
        loss = F.cross_entropy(each(x), y)
        if each is twice:
            loss.backward(retain_graph=True)
            loss.backward()
        else:
            (2 * loss).backward()
        PiSGD(param_groups(each, 0.3), lr=0.3).step()
    assert twice.rows == [6 + 8, 6 + 8] and net.rows == [6 + 4, 6 + 4]
    torch.testing.assert_close(twice(x), net(x), rtol=1e-12, atol=1e-12)


def test_backward_of_some_parameters_gives_rows_to_the_layers_among_them():
    net, (x, y) = network(), data()
    F.cross_entropy(net(x), y).backward(inputs=[net.layers[1].A, net.layers[0].A])
    assert pending(net) == [1, 0] and net.layers[0].A.grad is not None
    if "has_torch_function" not in inspect.getsource(torch.autograd.backward):
        pytest.skip("this torch does not ask B about backward(inputs=[B]); A is to be named")
    net.zero_grad()
    F.cross_entropy(net(x), y).backward(inputs=[net.layers[1].B, net.layers[0].A])
    assert pending(net) == [1, 0] and net.layers[0].A.grad is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_give_the_same_rows(reentrant):
    net, (x, y) = network(L=2), data()
    other = copy.deepcopy(net)
    F.cross_entropy(net(x), y).backward()
    g = other.layers[0](x)
    for layer in other.layers[1:]:
        g = checkpoint(layer, g, use_reentrant=reentrant)
    F.cross_entropy(g, y).backward()
    for layer, its in zip(net.layers[1:], other.layers[1:]):
        assert torch.equal(layer.A.grad, its.A.grad) and torch.equal(layer.B.grad, its.B.grad)


def test_a_layer_that_is_used_twice_gets_the_rows_of_both_uses():
    layer, x = InfPiLinearReLU(6, 6), torch.randn(4, 6)
    layer(layer(x)).square().sum().backward()
    once = copy.deepcopy(layer)
    out = once(x)
    twice = copy.deepcopy(once)
    twice(out).square().sum().backward()
    assert len(layer.pending.rows()) == 8
    torch.testing.assert_close(layer.B.grad[:4], twice.B.grad)  # the later use comes first


def test_a_kernel_learner_accumulates_only_by_backward():
    net = KernelMLP(5, 3, ReLUKernel(1))
    x, y = data(dtype=torch.float32)
    F.cross_entropy(net(x), y).backward()
    assert len(net.layers[0].pending.rows()) == 4
    out = net(x)
    other = torch.zeros((), requires_grad=True)
    torch.autograd.grad((out + other).sum(), other)
    assert len(net.layers[0].pending.rows()) == 4
    with pytest.raises(RuntimeError, match="second order"):
        net(x).sum().backward(create_graph=True)


# Second order.


def test_a_loss_of_second_order_is_refused_before_anything_is_trained():
    net, (x, y) = network(), data()
    x.requires_grad_()
    for create in (
        lambda: torch.autograd.grad(net(x).sum(), x, create_graph=True),
        lambda: F.cross_entropy(net(x), y).backward(create_graph=True),
        lambda: torch.autograd.functional.hessian(lambda x: net(x).sum(), x),
        lambda: torch.autograd.functional.hvp(lambda x: net(x).sum(), x, x),
    ):
        with pytest.raises(RuntimeError, match="second order.*moments"):
            create()
        net.zero_grad()
        assert pending(net) == [0, 0]


def test_a_penalty_made_with_torch_func_is_refused_too():
    net, (x, y) = network(), data()
    penalty = jacrev(lambda x: net(x).sum(0))(x).square().sum()
    with pytest.raises(RuntimeError, match="torch.func.*constants.*moments"):
        (F.cross_entropy(net(x), y) + penalty).backward()


# Several processes.


def _replica(rank, size, folder):
    torch.manual_seed(0)
    net = InfMLP(5, 3, 6, 1)
    x, y = data(dtype=torch.float32)
    for settings in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        model = DistributedDataParallel(net, **settings)
        with torch.no_grad():
            model(x)
        with pytest.raises(RuntimeError, match="DistributedDataParallel.*shard_rows.*moments"):
            model(x)
        assert net.rows == [6, 6] and pending(net) == [0, 0]
    for layer in net.layers[1:]:
        for parameter in (layer.A, layer.Amult, layer.B):
            parameter.requires_grad_(False)
    model = DistributedDataParallel(net)  # what is left are ordinary parameters
    F.cross_entropy(model(x[rank::2]), y[rank::2]).backward()
    bias = net.layers[2].bias
    grads = [torch.empty_like(bias) for _ in range(size)]
    dist.all_gather(grads, bias.grad)
    assert torch.equal(*grads) and bool(grads[0].any())


def test_distributed_data_parallel_is_refused_where_rows_train(tmp_path):
    assert started(_replica, 2, tmp_path) == [0, 0]


# Optimisers.


def test_a_grad_scaler_scales_rows_back():
    net, (x, y) = network(), data()
    scaled = copy.deepcopy(net)
    optimizer, other = (PiSGD(param_groups(each, 0.3), lr=0.3) for each in (net, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for _ in range(4):
        step(net, optimizer, x, y, lambda: clip_grad_norm_(net, 0.1))
        other.zero_grad()
        scaler.scale(F.cross_entropy(scaled(x), y)).backward()
        scaler.unscale_(other)
        clip_grad_norm_(scaled, 0.1)
        scaler.step(other)
        scaler.update()
    assert scaler.get_scale() == 4096.0
    assert_same(scaled, net, rtol=1e-12, atol=1e-12)  # a loss times 2^k is rounded alike


def test_a_grad_scaler_skips_a_step_whose_rows_are_not_finite():
    net, (x, y) = network(), data()
    optimizer = PiSGD(net.layers[2].parameters(), lr=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = rows_of(net)
    scaler.scale(F.cross_entropy(net(x), y)).backward()
    net.layers[2].pending.rows().A[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(value, before[name]) for name, value in rows_of(net).items())


def test_gradients_of_batches_of_different_sizes_add_up():
    net, (x, y) = network(), data(7)
    whole = copy.deepcopy(net)
    (F.cross_entropy(whole(x), y, reduction="sum") / 7).backward()
    for part in (slice(0, 4), slice(4, 5), slice(5, 7)):
        with batch(torch.arange(7)[part]):
            (F.cross_entropy(net(x[part]), y[part], reduction="sum") / 7).backward()
    for each in (net, whole):
        PiSGD(param_groups(each, 0.3, 0.1), lr=0.3).step()
    assert net.layers[1].origin[-7:].tolist() == list(range(7))
    torch.testing.assert_close(net(x), whole(x), rtol=1e-12, atol=1e-12)


def test_one_optimiser_for_two_networks():
    nets, (x, y) = [network(), network(r=4)], data()
    apart = copy.deepcopy(nets)
    both = PiSGD([p for net in nets for p in net.parameters()], lr=0.3, momentum=0.5)
    each = [PiSGD(net.parameters(), lr=0.3, momentum=0.5) for net in apart]
    for _ in range(3):
        both.zero_grad()
        sum(F.cross_entropy(net(x), y) for net in nets).backward()
        both.step()
        for net, optimizer in zip(apart, each):
            step(net, optimizer, x, y)
    for net, other in zip(nets, apart):
        assert_same(net, other)


def test_two_optimisers_for_the_layers_of_one_network():
    net, (x, y) = network(), data()
    split = copy.deepcopy(net)
    one = PiSGD(net.parameters(), lr=0.3, momentum=0.5)
    two = [PiSGD(layer.parameters(), lr=0.3, momentum=0.5) for layer in split.layers]
    for _ in range(3):
        step(net, one, x, y)
        for optimizer in two:
            optimizer.zero_grad()
        F.cross_entropy(split(x), y).backward()
        for optimizer in two:
            optimizer.step()
    assert_same(split, net)


def test_rows_are_not_stepped_a_second_time():
    net, (x, y) = network(), data()
    one, two = (PiSGD(net.parameters(), lr=0.3) for _ in range(2))
    step(net, one, x, y)
    held = copy.deepcopy(net)
    for optimizer in (one, two):
        with pytest.raises(RuntimeError, match="appended already.*zero_grad"):
            optimizer.step()
    assert_same(net, held)
    one.zero_grad()
    two.step()  # nothing is pending, and nothing was
    step(net, two, x, y)
    assert net.rows == [14, 14]


@pytest.mark.parametrize("lead", ["A", "Amult", "B"])
def test_layers_that_are_stepped_within_the_backward_pass(lead):
    """As with optimisers in hooks, which spare the memory of gradients."""
    net, (x, y) = network(L=2), data()
    hooked = copy.deepcopy(net)
    optimizer = PiSGD(net.parameters(), lr=0.3)
    for layer in hooked.layers[1:]:
        own = PiSGD([layer.A, layer.Amult, layer.B], lr=0.3)

        def step_now(parameter, own=own):
            own.step()
            own.zero_grad()

        getattr(layer, lead).register_post_accumulate_grad_hook(step_now)
    rest = [p for layer in hooked.layers for p in (layer.bias,)] + [hooked.layers[0].A]
    ordinary = PiSGD(rest, lr=0.3)
    for _ in range(3):
        step(net, optimizer, x, y)
        step(hooked, ordinary, x, y)
    assert_same(hooked, net)


def change_of_hidden(n, optimizer, lr, scaled=True):
    """Relative change of what the last hidden layer puts out, by 5 steps of a μ-network."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 20), torch.randint(5, (32,))
    net = InfMLP(20, 5, 16, 2, bias_alpha=0.5).sample(n).gaussian_init_()
    groups = param_groups(net, lr, optimizer=optimizer if scaled else "sgd")
    stepper = (PiSGD if optimizer == "sgd" else torch.optim.Adam)(groups, lr=lr)
    seen = []
    net.layers[-1].register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach()))
    for _ in range(6):
        step(net, stepper, x, y)
    return float((seen[-1] - seen[0]).norm() / seen[0].norm())


def test_adam_changes_features_alike_at_every_width():
    """Without rates that know the width the same steps move a network of 4096 units 20 times as
    far."""
    widths = (64, 256, 1024, 4096)
    changes = [change_of_hidden(n, "adam", 0.01) for n in widths]
    assert max(changes) < 1.2 * min(changes), changes
    assert changes[0] == change_of_hidden(64, "adam", 0.01, scaled=False)
    assert change_of_hidden(4096, "adam", 0.01, scaled=False) > 10 * changes[-1]
    changes = [change_of_hidden(n, "sgd", 1.0) for n in widths[:3]]
    assert max(changes) < 1.5 * min(changes), changes


def test_rates_for_adam_by_name_class_and_instance():
    net = InfMLP(20, 5, 16, 1, bias_alpha=0.5)
    finite = net.sample(256)

    def rates(net, **how):
        return [(g["name"], g["lr"], g["weight_decay"]) for g in param_groups(net, 1, 0.1, **how)]

    plain = [(name, 1, 0.1) for name in ("first", "hidden", "last", "bias")]
    assert rates(net) == rates(finite) == rates(net, optimizer=torch.optim.Adam) == plain
    expected = [
        ("first", 0.5, 0.2),
        ("hidden", 0.25, 0.4),
        ("last", 0.5, 0.2),
        ("bias", 0.5, 0.2),
        ("bias", 1, 0.1),
    ]
    adam = torch.optim.AdamW(finite.parameters())
    for optimizer in ("adam", torch.optim.AdamW, adam):
        assert rates(finite, optimizer=optimizer) == expected
    assert rates(finite, optimizer="adam", base_width=256) == plain
    held = {id(p) for group in param_groups(finite, 1, optimizer="adam") for p in group["params"]}
    assert held == {id(p) for p in finite.parameters()}
    for how in ({"optimizer": "adadelta"}, {"optimizer": "adam", "base_width": 0}):
        with pytest.raises(ValueError, match="was expected"):
            param_groups(finite, 1, **how)


# Ordinary tools.


def test_norms_of_one_of_three_parameters_are_refused():
    net, (x, y) = network(), data()
    F.cross_entropy(net(x), y).backward()
    layer = net.layers[1]
    for parameter in (layer.A, layer.Amult, layer.B):
        for norm in (
            lambda g: g.norm(),
            torch.linalg.vector_norm,
            torch.linalg.norm,
            lambda g: getattr(torch.nn.utils, "get_total_norm", torch._foreach_norm)([g]),
            lambda g: torch._foreach_norm([g]),
        ):
            with pytest.raises(RuntimeError, match="one gradient together.*clip_grad_norm_"):
                norm(parameter.grad)
    total = clip_grad_norm_(net, math.inf)
    ordinary = [p.grad.norm() for l in net.layers for p in (l.bias,)] + [
        net.layers[0].A.grad.norm()
    ]
    parts = [layer.pending.norm() for layer in net.layers[1:]] + ordinary
    torch.testing.assert_close(total, torch.stack(parts).norm())


REFUSED = {
    "adam": (lambda net: torch.optim.Adam(net.parameters()).step(), "PiSGD"),
    "sgd": (lambda net: torch.optim.SGD(net.parameters(), lr=0.1).step(), "PiSGD"),
    "clip": (lambda net: nn.utils.clip_grad_norm_(net.parameters(), 1), "clip_grad_norm_"),
    "clip value": (lambda net: nn.utils.clip_grad_value_(net.parameters(), 1), "clip_grad_norm_"),
    "averages": (lambda net: AveragedModel(net).update_parameters(net), "moments"),
    "hook": (lambda net: net.layers[1].A.register_hook(print), "post_accumulate"),
    "parameters of func": (
        lambda net: grad(lambda p: functional_call(net, p, (data()[0],)).sum())(
            dict(net.named_parameters())
        ),
        "detach",
    ),
    "grad": (
        lambda net: torch.autograd.grad(net(data()[0]).sum(), list(net.parameters())),
        "layer.A.grad",
    ),
    "nested jvp": (lambda net: jacfwd(jacfwd(net))(data()[0]), "jacfwd of jacrev"),
}


@pytest.mark.parametrize("tool", REFUSED)
def test_tools_that_would_change_something_else_are_refused(tool):
    net, (x, y) = network(), data()
    F.cross_entropy(net(x), y).backward()
    before = copy.deepcopy(net)
    use, remedy = REFUSED[tool]
    with pytest.raises(RuntimeError, match=remedy):
        use(net)
    assert all(torch.equal(value, rows_of(before)[name]) for name, value in rows_of(net).items())


def test_meta_device_and_back():
    net, (x, y) = network(), data()
    with torch.device("meta"):
        built = InfMLP(5, 3, 6, 1, dtype=torch.float64)
    moved = copy.deepcopy(net).to("meta")
    for empty in (built, moved):
        assert {p.device.type for p in empty.parameters()} == {"meta"}
        assert empty(x.to("meta")).shape == (4, 3)
        real = empty.to_empty(device="cpu")
        real.load_state_dict(net.state_dict())
        assert_same(real, net)
        step(real, PiSGD(real.parameters(), lr=0.1), x, y)
        assert real.rows == [10, 10]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_network_that_is_compiled_trains_as_one_that_is_not():
    torch._dynamo.reset()
    net, (x, y) = network(), data()
    other = copy.deepcopy(net)
    compiled = torch.compile(other, backend="eager")
    for each, module in ((net, net), (other, compiled)):
        optimizer = PiSGD(param_groups(each, 0.3), lr=0.3)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
    assert_same(other, net)
    torch._dynamo.reset()
    said = "a layer of rows grows with every step.*moments" if SAID else "disable.*eagerly"
    with pytest.raises(Exception, match=said):
        torch.compile(net, backend="eager", fullgraph=True)(x)


@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"),
    reason="this torch exports through its compiler, which leaves rows alone",
)
def test_an_exported_network_computes_what_it_computed():
    net, (x, y) = network(), data()
    step(net, PiSGD(net.parameters(), lr=0.1), x, y)
    program = torch.export.export(net, (x,)).module()
    for inputs in (x, x + 1):
        torch.testing.assert_close(program(inputs), net(inputs), rtol=1e-12, atol=1e-12)


# Transforms of torch.func.


def at_rows(net, x):
    """Inputs some of which are what a row was made of, where a cosine is 1."""
    step(net, PiSGD(net.parameters(), lr=0.1), x, torch.randint(3, (len(x),)))
    return x


@pytest.mark.parametrize("layernorm", [False, True])
@pytest.mark.parametrize("row_budget", [None, 5])
def test_derivatives_by_torch_func_are_those_of_autograd(layernorm, row_budget):
    net = network(layernorm=layernorm, row_budget=row_budget)
    x = at_rows(net, data()[0])
    expected = torch.stack(
        [
            torch.stack([torch.autograd.grad(net(leaf[None])[0, i], leaf)[0] for i in range(3)])
            for leaf in (row.clone().requires_grad_() for row in x)
        ]
    )
    one = lambda x: net(x[None])[0]  # noqa: E731
    tangent = torch.randn_like(x)
    close = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(vmap(jacrev(one))(x), expected, **close)
    torch.testing.assert_close(vmap(jacfwd(one))(x), expected, **close)
    torch.testing.assert_close(
        jvp(net, (x,), (tangent,))[1], torch.einsum("boi,bi->bo", expected, tangent), **close
    )
    weights = torch.randn(len(x), 3).to(x)
    torch.testing.assert_close(
        vjp(net, x)[1](weights)[0], torch.einsum("boi,bo->bi", expected, weights), **close
    )
    torch.testing.assert_close(vmap(grad(lambda x: one(x).sum()))(x), expected.sum(1), **close)
    with forward_ad.dual_level():
        moved = forward_ad.unpack_dual(net(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(moved, jvp(net, (x,), (tangent,))[1], **close)


def test_second_derivatives_by_torch_func_are_differences_of_first_ones():
    net = network()
    at_rows(net, data()[0])
    x, h = torch.randn(5).double(), 1e-5
    one = lambda x: net(x[None])[0]  # noqa: E731
    differences = torch.stack(
        [
            (jacrev(one)(x + h * unit) - jacrev(one)(x - h * unit)) / (2 * h)
            for unit in torch.eye(5).double()
        ],
        -1,
    )
    for second in (hessian(one), jacrev(jacrev(one)), jacrev(jacfwd(one))):
        torch.testing.assert_close(second(x), differences, rtol=1e-6, atol=1e-7)


def test_samples_under_vmap_train_as_a_batch():
    net, (x, y) = network(), data()
    mapped = copy.deepcopy(net)
    for each, run in ((net, net), (mapped, vmap(lambda x: mapped(x[None])[0]))):
        optimizer = PiSGD(each.parameters(), lr=0.3)
        for _ in range(2):
            step(run, optimizer, x, y)
    assert_same(mapped, net, rtol=1e-12, atol=1e-12)
    nested = vmap(vmap(lambda x: mapped(x[None])[0]))(x.view(2, 2, 5))
    torch.testing.assert_close(nested.view(4, 3), net(x), rtol=1e-12, atol=1e-12)


def test_rows_handed_in_as_tensors_are_an_ordinary_function_of_them():
    """The empirical tangent kernel of all weights in three ways, and by autograd on formulas."""
    net = network()
    x = at_rows(net, data()[0])
    held = {name: p.detach() for name, p in net.named_parameters()}
    torch.testing.assert_close(functional_call(net, held, (x,)), net(x))
    call = lambda p, x: functional_call(net, p, (x[None],))[0]  # noqa: E731

    def kernel(jacobians):
        return sum(torch.einsum("aow,bow->ab", *[j.flatten(2)] * 2) for j in jacobians.values())

    found = [
        kernel(vmap(jacrev(call), (None, 0))(held, x)),
        kernel(vmap(jacfwd(call), (None, 0))(held, x)),
        kernel(jacrev(lambda p: functional_call(net, p, (x,)))(held)),
    ]
    leaves = {name: value.clone().requires_grad_() for name, value in held.items()}
    rows = []
    for sample in x:
        g = sample @ leaves["layers.0.A"] + net.bias_alpha * leaves["layers.0.bias"]
        for number in (1, 2):
            A, amult, B, bias = (
                leaves[f"layers.{number}.{name}"] for name in ("A", "Amult", "B", "bias")
            )
            s = g.norm()
            c = (g / s @ B.T).clamp(-1 + 1e-12, 1 - 1e-12)
            g = s * ((((1 - c * c).sqrt() + c * torch.acos(-c)) / (2 * math.pi) * amult) @ A)
            g = g + net.bias_alpha * bias
        rows.append([torch.autograd.grad(o, list(leaves.values()), retain_graph=True) for o in g])
    flat = torch.stack(
        [torch.stack([torch.cat([v.flatten() for v in o]) for o in r]) for r in rows]
    )
    expected = torch.einsum("aow,bow->ab", flat, flat)
    for each in found:
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-6)
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-9, atol=1e-9)


def test_what_no_transform_reaches_trains_as_without():
    net, (x, y) = network(), data()
    plain = copy.deepcopy(net)
    scales = torch.ones(3).double()
    (vmap(lambda scale: F.cross_entropy(scale * net(x), y))(scales).sum() / 3).backward()
    F.cross_entropy(plain(x), y).backward()
    for layer, its in zip(net.layers[1:], plain.layers[1:]):
        torch.testing.assert_close(layer.A.grad, its.A.grad, rtol=1e-12, atol=1e-12)


def test_rows_that_are_replaced_in_part_are_not_left_untrained():
    net, (x, y) = network(), data()
    out = functional_call(net, {"layers.1.A": net.layers[1].A.detach()}, (x,))
    torch.testing.assert_close(out, net(x))
    with pytest.raises(RuntimeError, match="replaced.*moments"):
        F.cross_entropy(out, y).backward()
    for stranger in (nn.Parameter(net.layers[1].A.detach()), copy.deepcopy(net).layers[1].A):
        with pytest.raises(RuntimeError, match="hand in plain tensors"):
            functional_call(net, {"layers.1.A": stranger}, (x,))


def test_an_ensemble_in_one_call():
    nets, (x, _) = [network() for _ in range(3)], data()
    parameters, buffers = stack_module_state(nets)
    base = copy.deepcopy(nets[0]).to("meta")
    out = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(out, torch.stack([net(x) for net in nets]), rtol=1e-12, atol=1e-12)
