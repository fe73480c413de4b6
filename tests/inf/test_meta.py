"""Meta-gradients against the hand-written ones of pilimit_orig, explicit MAML, finite differences,
and finite networks."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from pilimit_lib.inf import FinPiMLPSample, InfMLP, PiSGD, clip_grad_norm_, param_groups
from pilimit_lib.inf.gp import KernelMLP, ReLUKernel
from pilimit_lib.inf.meta import adapt, cross_entropy, mse
from pilimit_lib.inf.numerics import direction, length
from pilimit_orig.inf.meta import adapt_readout, meta_backward
from tests.pilimit_orig import small

from .nets import assert_unchanged, network, tensors
from .test_sampling import slope

T, B, Q, D, O = 3, 4, 5, 5, 3


def tasks(t: int = T, dtype: torch.dtype = torch.float64):
    """Support and query sets of t tasks."""
    generator = torch.Generator().manual_seed(3)

    def draw(b):
        return (
            torch.randn(t, b, D, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(O, (t, b), generator=generator),
        )

    return draw(B), draw(Q)


def moments(**settings) -> InfMLP:
    """A network of moments with nothing at its trivial value."""
    net = InfMLP(
        D,
        O,
        4,
        1,
        dtype=torch.float64,
        memory="moments",
        last_layer_alpha=0.7,
        first_layer_alpha=1.3,
        **settings,
    )
    with torch.no_grad():
        for layer in net.layers:
            if layer.bias is not None:
                layer.bias.normal_(std=0.1)
        net.layers[-1].V.normal_()
    return net


def finite(project: bool = True, **settings) -> FinPiMLPSample:
    net = network(D, O, 4, 1, last_layer_alpha=0.7, first_layer_alpha=1.3, **settings).sample(7)
    for layer in net.layers[:-1]:
        layer.project = project
    return net


def meta_loss(net: nn.Module, support, query, **how):
    adapted = adapt(net, *support, step_size=0.6, **how)
    return cross_entropy(adapted(query[0]), query[1]).mean()


# ---- (a) the hand-written meta-gradient of the paper's method


def as_ours(net) -> InfMLP:
    ours = InfMLP.from_pilimit_orig(net.state(), dtype=torch.float64, row_dtype=torch.float64)
    assert ours.layers[-1].A.dtype == torch.float64
    return ours


def by_parameter(net: InfMLP, theirs) -> dict:
    """Our gradients in the form of small.by_parameter: pending rows as gradients of the existing
    A."""
    grads = theirs.newgradbuffer()
    grads.first = net.layers[0].A.grad
    for l, layer in enumerate(net.layers, start=1):
        if layer.bias is not None:
            grads.add_bias(l, layer.bias.grad)
        if l > 1:
            rows = layer.pending.rows()
            grads.add_rows(l, rows.A, rows.B)
    return small.by_parameter(theirs, grads)


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("loss", ["xent", "mse"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "case",
    [
        dict(),
        dict(layernorm=True),
        dict(L=3),
        dict(bias_alpha=0.0, last_bias_alpha=None),
        dict(L=1, last_bias_alpha=0.0),
    ],
    ids=str,
)
def test_the_meta_gradient_of_rows_is_the_hand_written_one(case, steps, loss, second_order):
    theirs = small.network(**case)
    sets = [(small.data(theirs, 5, seed=s), small.data(theirs, 7, seed=s + 50)) for s in range(3)]
    buffer, values = theirs.newgradbuffer(), []
    for support, query in sets:
        adaptation = adapt_readout(
            theirs, *support, lr=0.7, steps=steps, loss=loss, bias_lr_mult=0.5
        )
        values.append(
            meta_backward(theirs, adaptation, *query, buffer, second_order, weight=1 / 3)[0]
        )
        theirs.restore()
    ours = as_ours(theirs)
    (x, y), (xq, yq) = ([torch.stack(part) for part in zip(*side)] for side in zip(*sets))
    per_task = cross_entropy if loss == "xent" else centred_mse
    adapted = adapt(
        ours,
        x,
        y,
        step_size=0.7,
        steps=steps,
        loss=per_task,
        readout_only=True,
        second_order=second_order,
        bias_lr_mult=0.5,
    )
    value = per_task(adapted(xq), yq).mean()
    assert torch.isclose(value, torch.stack(values).mean())
    value.backward()
    got, expected = by_parameter(ours, theirs), small.by_parameter(theirs, buffer)
    assert got.keys() == expected.keys()
    for key in expected:
        assert torch.allclose(got[key], expected[key], rtol=1e-9, atol=1e-10), key


def centred_mse(out, y):
    return mse(out, nn.functional.one_hot(y, out.shape[-1]).to(out) - 0.1)


def test_a_meta_step_is_the_hand_written_one_clipped_by_all_parameters():
    theirs = small.network(layernorm=True)
    ours, support, query = (
        as_ours(theirs),
        small.data(theirs, 5, seed=1),
        small.data(theirs, 7, seed=2),
    )
    buffer = theirs.newgradbuffer()
    meta_backward(theirs, adapt_readout(theirs, *support, lr=0.7), *query, buffer)
    theirs.restore()
    total = buffer.norm()
    theirs.gclip(0.5 * float(total), buffer)
    theirs.step(0.3, buffer=buffer, wd=1e-2, momentum=0.9, bias_lr_mult=0.5)
    optimizer = PiSGD(param_groups(ours, 0.3, 1e-2, bias_lr_mult=0.5), lr=0.3, momentum=0.9)
    adapted = adapt(ours, support[0][None], support[1][None], step_size=0.7, readout_only=True)
    cross_entropy(adapted(query[0][None]), query[1][None]).mean().backward()
    assert torch.isclose(clip_grad_norm_(ours, 0.5 * float(total)), total)
    optimizer.step()
    assert torch.allclose(ours(query[0]), theirs.predict(query[0]), rtol=1e-10)


# ---- explicit MAML: copies of all parameters, plain autograd


def explicit(net: nn.Module, support, query, steps: int, chosen: slice, second_order: bool):
    """The mean query loss, task by task: p' = p − η ∂loss/∂p for the parameters of the chosen
    layers."""
    own = dict(net.named_parameters())
    adapted_names = [
        f"layers.{number}.{name}"
        for number in range(len(net.layers))[chosen]
        for name, _ in net.layers[number].named_parameters()
    ]
    losses = []
    for x, y, xq, yq in zip(*support, *query):
        current = dict(own)
        for _ in range(steps):
            loss = nn.functional.cross_entropy(functional_call(net, current, (x,)), y)
            grads = torch.autograd.grad(
                loss, [current[name] for name in adapted_names], create_graph=second_order
            )
            for name, grad in zip(adapted_names, grads):
                current[name] = current[name] - 0.6 * grad
        losses.append(nn.functional.cross_entropy(functional_call(net, current, (xq,)), yq))
    return torch.stack(losses).mean()


WHICH = {
    "readout": ({"readout_only": True}, slice(-1, None)),
    "all": ({}, slice(None)),
    "body": ({"body_only": True}, slice(0, -1)),
}
NETS = {
    "moments": moments,
    "moments with layer norm": lambda: moments(layernorm=True, degree=3),
    "moments without bias": lambda: moments(bias_alpha=0),
    "finite": finite,
    "finite, not projected": lambda: finite(False, layernorm=True),
}


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("kind", NETS)
def test_fast_rows_are_maml_with_copied_parameters(kind, which, steps, second_order):
    net, (support, query), (how, chosen) = NETS[kind](), tasks(), WHICH[which]
    loss = meta_loss(
        net,
        support,
        query,
        steps=steps,
        second_order=second_order,
        project=net.layers[0].project if hasattr(net.layers[0], "project") else True,
        **how,
    )
    expected = explicit(net, support, query, steps, chosen, second_order)
    assert torch.isclose(loss, expected, rtol=1e-10)
    names, parameters = zip(*net.named_parameters())
    for name, got, wanted in zip(
        names, *(torch.autograd.grad(value, parameters) for value in (loss, expected))
    ):
        assert torch.allclose(got, wanted, rtol=1e-8, atol=1e-11), name


def test_first_and_second_order_and_one_and_two_steps_differ():
    """Where they did not, the tests above could not tell them apart."""
    net, (support, query) = moments(), tasks()
    grads = [
        torch.autograd.grad(meta_loss(net, support, query, **how), net.layers[0].A)[0]
        for how in ({}, {"second_order": False}, {"steps": 2}, {"readout_only": True})
    ]
    for other in grads[1:]:
        assert (grads[0] - other).norm() > 0.02 * grads[0].norm()


def test_outer_and_inner_projection_are_separate():
    support, query = tasks()
    grads = {}
    for outer in (True, False):
        for inner in (True, False):
            torch.manual_seed(0)
            net = finite(outer)
            grads[outer, inner] = torch.autograd.grad(
                meta_loss(net, support, query, project=inner), net.layers[1].weight
            )[0]
    basis = net.layers[1].basis
    for inner in (True, False):
        assert torch.allclose(grads[True, inner], basis @ basis.T @ grads[False, inner])
    assert (grads[True, True] - grads[True, False]).norm() > 1e-3 * grads[True, True].norm()


def test_by_default_inner_gradients_are_projected_where_the_layers_own_are():
    support, query = tasks()
    for mu in (False, True):
        net = finite()
        net = net.gaussian_init_() if mu else net
        losses = {
            project: meta_loss(net, support, query, project=project)
            for project in (None, True, False)
        }
        assert torch.equal(losses[None], losses[not mu]) and not torch.isclose(
            losses[True], losses[False]
        )
        assert torch.isclose(
            losses[None], explicit(net, support, query, 1, slice(None), True), rtol=1e-10
        )


# ---- samples that are zero


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("kind", ["infinite", "finite"])
@pytest.mark.parametrize("layernorm", [False, True], ids=["", "LN"])
def test_a_support_sample_of_zeros_has_finite_second_derivatives(kind, degree, layernorm):
    net, (support, query) = moments(degree=degree, layernorm=layernorm), tasks()
    net = net.sample(7) if kind == "finite" else net
    for layer in net.layers:
        nn.init.zeros_(layer.bias)
    support[0][0, 0] = 0
    loss = meta_loss(net, support, query, steps=2)
    grads = torch.autograd.grad(loss, list(net.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


def test_a_support_sample_of_zeros_under_layer_norm_of_relu_networks():
    net, (support, query) = finite(layernorm=True), tasks()
    for layer in net.layers:
        nn.init.zeros_(layer.bias)
    support[0][0, 0] = 0
    grads = torch.autograd.grad(meta_loss(net, support, query), list(net.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


def test_lengths_are_those_of_torch_and_those_of_zero_are_differentiable_twice():
    g = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    for found, expected in zip(
        direction(g), (nn.functional.normalize(g), g.norm(dim=1, keepdim=True))
    ):
        assert torch.equal(found, expected)
    assert torch.autograd.gradgradcheck(length, g)
    zero = torch.zeros(2, 4, requires_grad=True)
    (first,) = torch.autograd.grad(length(zero).sum(), zero, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), zero)
    assert not first.any() and not second.any()


# ---- (b) finite differences


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("kind", ["moments", "finite, not projected"])
def test_the_meta_gradient_is_a_finite_difference(kind, which):
    net, (support, query), (how, _) = NETS[kind](), tasks(), WHICH[which]
    meta_loss(net, support, query, steps=2, project=False, **how).backward()
    eps = 1e-6
    for name, parameter in net.named_parameters():
        direction = torch.randn_like(parameter)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * eps * direction
            values.append(meta_loss(net, support, query, steps=2, project=False, **how))
            with torch.no_grad():
                parameter -= sign * eps * direction
        difference = (values[0] - values[1]) / (2 * eps)
        assert torch.isclose(
            (parameter.grad * direction).sum(), difference, rtol=1e-5, atol=1e-8
        ), name


# ---- first order with rows everywhere: an adapted network is a network that was stepped


@pytest.mark.parametrize("layernorm", [False, True])
def test_adapting_all_rows_is_stepping_a_copy(layernorm):
    net, ((x, y), (xq, yq)) = network(D, O, L=2, layernorm=layernorm, last_layer_alpha=0.7), tasks()
    adapted = adapt(net, x, y, step_size=0.6, steps=3, second_order=False)
    out = adapted(xq)
    cross_entropy(out, yq).mean().backward()
    for task in range(T):
        twin = copy.deepcopy(net)
        optimizer = PiSGD(twin.parameters(), lr=0.6)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(twin(x[task]), y[task]).backward()
            optimizer.step()
        assert torch.allclose(twin(xq[task]), out[task], rtol=1e-10)
    assert [len(layer.pending.rows()) for layer in net.layers[1:]] == [T * Q] * 3


# ---- (c) the limit of finite networks


def one_meta_step(net: nn.Module, support, query, probe, **how) -> torch.Tensor:
    optimizer = PiSGD(param_groups(net, 0.5, first_layer_lr_mult=0.5), lr=0.5)
    meta_loss(net, support, query, **how).backward()
    clip_grad_norm_(net, 0.5)
    optimizer.step()
    adapted = adapt(
        net,
        *support,
        step_size=0.6,
        second_order=False,
        **{k: v for k, v in how.items() if k != "second_order"},
    )
    return adapted(probe).detach()


@pytest.mark.parametrize(
    "kind, how",
    [
        ("rows", {"readout_only": True}),
        ("rows", {"second_order": False, "steps": 2}),
        ("moments", {"steps": 2}),
    ],
    ids=["readout", "first order", "second order, all layers"],
)
def test_finite_networks_adapt_and_learn_like_the_infinite_one_as_they_widen(kind, how):
    infinite = network(D, O, last_layer_alpha=0.7) if kind == "rows" else moments()
    (support, query), probe = tasks(), torch.randn(T, 16, D, dtype=torch.float64)
    expected = one_meta_step(copy.deepcopy(infinite), support, query, probe, **how)
    sizes, draws = [64, 256, 1024], [24, 12, 6]
    errors = []
    for n, count in zip(sizes, draws):
        off = [
            (one_meta_step(infinite.sample(n), support, query, probe, **how) - expected)
            .square()
            .mean()
            for _ in range(count)
        ]
        errors.append(float(torch.stack(off).mean().sqrt()))
    moved = (expected - infinite(probe.flatten(0, 1)).view_as(expected)).square().mean().sqrt()
    assert -0.65 < slope(sizes, errors) < -0.35
    assert errors[-1] < 0.3 * moved  # they agree in what they learned, not in what they were


# ---- tasks, the network left alone, kernels


@pytest.mark.parametrize("kind", ["rows", "moments", "fused", "finite", "kernel"])
def test_tasks_of_a_batch_are_tasks_one_by_one(kind):
    net, (support, query) = (
        {
            "rows": lambda: network(D, O),
            "moments": moments,
            "fused": lambda: moments(fused=True),
            "finite": finite,
            "kernel": kernel_net,
        }[kind](),
        tasks(),
    )
    twin = copy.deepcopy(net)
    meta_loss(net, support, query, steps=2, readout_only=True).backward()
    for task in range(T):
        one = slice(task, task + 1)
        (
            meta_loss(
                twin,
                *([part[one] for part in side] for side in (support, query)),
                steps=2,
                readout_only=True,
            )
            / T
        ).backward()
    optimizers = [PiSGD(each.parameters(), lr=0.3) for each in (net, twin)]
    norms = [clip_grad_norm_(each, 1e3) for each in (net, twin)]
    assert torch.isclose(*norms) and norms[0] > 1e-3
    for optimizer in optimizers:
        optimizer.step()
    assert torch.allclose(net(query[0][0]), twin(query[0][0]), rtol=1e-9)


@pytest.mark.parametrize("how", [{"second_order": False}, {"readout_only": True}], ids=str)
@pytest.mark.parametrize("kind", ["rows", "moments", "fused", "finite", "kernel"])
def test_adapting_leaves_the_network_as_it_was(kind, how):
    net = {
        "rows": lambda: network(D, O),
        "moments": moments,
        "fused": lambda: moments(fused=True),
        "finite": finite,
        "kernel": kernel_net,
    }[kind]()
    (x, y), (xq, _) = tasks()
    before = tensors(net)
    adapted = adapt(net, x, y, step_size=0.6, steps=2, **how)
    with torch.no_grad():
        assert not torch.allclose(adapted(xq), net(xq.flatten(0, 1)).view(T, Q, O))
    assert_unchanged(before, net)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def kernel_net(rows: int = 6, dtype: torch.dtype = torch.float64, ntk: bool = True) -> KernelMLP:
    net = KernelMLP(D, O, ReLUKernel(2, ntk, varw=2.0, varb=0.1), dtype=dtype)
    net.layers[0].axis.append(
        {
            "A": torch.randn(rows, O),
            "Amult": torch.rand(rows),
            "B": torch.randn(rows, D),
            "origin": torch.full((rows,), -1),
        }
    )
    return net


def explicit_kernel_maml(net: KernelMLP, alpha, support, query, steps: int):
    """f = Σ_m alpha_m K(x_m, ·) with functional gradient steps written out; the loss,
    differentiable in alpha [m o]."""
    B, losses = net.layers[0].B.detach().clone().as_subclass(torch.Tensor), []
    for x, y, xq, yq in zip(*support, *query):
        centres, values = B, alpha
        for _ in range(steps):
            out = net.kernel(x, centres) @ values
            delta = (out.softmax(1) - nn.functional.one_hot(y, O)) / len(y)
            centres, values = torch.cat([centres, x]), torch.cat([values, -0.6 * delta])
        losses.append(nn.functional.cross_entropy(net.kernel(xq, centres) @ values, yq))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("ntk", [False, True], ids=["NNGP", "NTK"])
def test_a_kernel_learner_descends_in_the_space_of_its_kernel(ntk):
    net, (support, query) = kernel_net(ntk=ntk), tasks()
    A, Amult, X = (
        (getattr(net.layers[0], name) * 1).detach().as_subclass(torch.Tensor)
        for name in ("A", "Amult", "B")
    )
    alpha = (Amult[:, None] * A).requires_grad_()
    expected = explicit_kernel_maml(net, alpha, support, query, 2)
    loss = meta_loss(net, support, query, steps=2)
    assert torch.isclose(loss, expected)
    loss.backward()
    rows = net.layers[0].pending.rows()
    assert torch.allclose(net.kernel(X, rows.B) @ rows.A, torch.autograd.grad(expected, alpha)[0])
    whole = (rows.A * (net.kernel(rows.B, rows.B) @ rows.A)).sum().sqrt()
    assert torch.isclose(clip_grad_norm_(net, 1e3), whole)
    PiSGD(net.parameters(), lr=0.3).step()
    # each inner step's outputs depend on f, and the query outputs do
    assert net.rows == [6 + T * (2 * B + Q)]


def test_a_kernel_learner_is_saved_and_loaded_with_its_rows():
    net, other = (
        kernel_net(),
        KernelMLP(D, O, ReLUKernel(2, True, varw=2.0, varb=0.1), dtype=torch.float64),
    )
    other.load_state_dict(net.state_dict())
    x = torch.randn(4, D, dtype=torch.float64)
    assert torch.equal(other(x), net(x)) and other.rows == [6]
    assert net.float()(x.float()).dtype == torch.float32 and net.layers[0].A.dtype == torch.float32


# ---- errors


def test_errors_name_what_was_got_and_the_remedy():
    net, ((x, y), _) = network(D, O, L=1), tasks()
    before = tensors(net)
    for message, call in {
        "moments with fused=False": lambda: adapt(net, x, y, step_size=0.1),
        "fused moments": lambda: adapt(moments(fused=True), x, y, step_size=0.1),
        r"x\[None\]": lambda: adapt(net, x[0], y[0], step_size=0.1, readout_only=True),
        "nothing to adapt": lambda: adapt(
            net, x, y, step_size=0.1, readout_only=True, body_only=True
        ),
        "readout only": lambda: adapt(kernel_net(), x, y, step_size=0.1, body_only=True),
        "must not be negative": lambda: adapt(net, x, y, step_size=-1, readout_only=True),
        "one number per task": lambda: adapt(
            net, x, y, step_size=0.1, readout_only=True, loss=lambda out, y: out.square().mean()
        ),
        "was adapted to 3 tasks": lambda: adapt(net, x, y, step_size=0.1, readout_only=True)(x[:2]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="Sequential"):
        adapt(nn.Sequential(nn.Linear(D, O)), x, y, step_size=0.1)
    odd = moments()
    odd.layers[1] = nn.Linear(4, 4).double()
    with pytest.raises(TypeError, match="Linear can't be adapted"):
        adapt(odd, x, y, step_size=0.1)
    assert_unchanged(before, net)
