"""Derivatives of moments, ConvNets and finite networks by torch.func, forward mode and many
gradients at once, against one backward pass after the other, and against the dense formula."""

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
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

from pilimit_lib.inf import InfMLP, InfPiConvNet
from pilimit_lib.inf.dual.features import column_indices

# torch's forward mode still compiles a part of itself by torch.jit.script, which it deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")

TIGHT = dict(rtol=1e-9, atol=1e-11)


def mlp(**how):
    net = InfMLP(4, 3, 4, 1, memory="moments", degree=3, bias_alpha=0.5, **how)
    nn.init.normal_(net.layers[-1].V)
    return net, torch.randn(5, 4)


def convnet():
    net = InfPiConvNet(2, 3, (3, 4), pools=(2,), bias_alpha=0.5, degree=3)
    nn.init.normal_(net.layers[-1].V)
    return net, torch.randn(3, 2, 6, 6)


def sampled(make, n):
    net, x = make()
    return net.sample(n), x


NETWORKS = {
    "moments": mlp,
    "fused": lambda: mlp(fused=True),
    "layer norm": lambda: mlp(layernorm=True),
    "convnet": convnet,
    "finite": lambda: sampled(mlp, 12),
    "finite convnet": lambda: sampled(convnet, 10),
}


@pytest.fixture(params=NETWORKS)
def case(request):
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield NETWORKS[request.param]()
    torch.set_default_dtype(before)


def parameters(net):
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


def call(net):
    return lambda values, x: functional_call(net, values, x)


def one_by_one(outputs: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The Jacobian by one backward pass for each number of `outputs`."""
    passes = [
        torch.autograd.grad(number, inputs, retain_graph=True) for number in outputs.flatten()
    ]
    return [
        torch.stack(found).view(*outputs.shape, *value.shape)
        for found, value in zip(zip(*passes), inputs)
    ]


def test_jacobians_by_parameters(case):
    net, x = case
    values = parameters(net)
    expected = dict(zip(values, one_by_one(net(x), list(net.parameters()))))
    torch.testing.assert_close(jacrev(call(net))(values, x), expected, **TIGHT)
    torch.testing.assert_close(jacfwd(call(net))(values, x), expected, **TIGHT)
    single = jacrev(lambda values, x: call(net)(values, x[None])[0])
    torch.testing.assert_close(vmap(single, (None, 0))(values, x), expected, **TIGHT)


def test_jacobians_by_inputs(case):
    net, x = case
    leaf = x.clone().requires_grad_()
    outputs = net(leaf)
    (expected,) = one_by_one(outputs, [leaf])
    torch.testing.assert_close(jacrev(net)(x), expected, **TIGHT)
    torch.testing.assert_close(jacfwd(net)(x), expected, **TIGHT)
    for how in ({"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}):
        found = torch.autograd.functional.jacobian(net, x, **how)
        torch.testing.assert_close(found, expected, **TIGHT)
    eye = torch.eye(outputs.numel()).view(-1, *outputs.shape)
    (found,) = torch.autograd.grad(
        outputs, leaf, eye, is_grads_batched=True, retain_graph=True, create_graph=True
    )
    torch.testing.assert_close(found.view_as(expected), expected, **TIGHT)
    found = vmap(lambda v: torch.autograd.grad(outputs, leaf, v, retain_graph=True)[0])(eye)
    torch.testing.assert_close(found.view_as(expected), expected, **TIGHT)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_many_gradients_at_once(case):
    net, x = case
    outputs, leaves = net(x), list(net.parameters())
    expected = one_by_one(outputs, leaves)
    eye = torch.eye(outputs.numel()).view(-1, *outputs.shape)
    found = torch.autograd.grad(outputs, leaves, eye, is_grads_batched=True)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one.view_as(other), other, **TIGHT)


def test_gradients_of_the_batch_and_of_each_sample(case):
    net, x = case
    values = parameters(net)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    expected = dict(zip(values, expected))
    found = grad(lambda values: call(net)(values, x).square().sum())(values)
    torch.testing.assert_close(found, expected, **TIGHT)

    def single(values, sample):
        return call(net)(values, sample[None]).square().sum()

    each = vmap(grad(single), (None, 0))(values, x)
    for number, sample in enumerate(x):
        alone = torch.autograd.grad(net(sample[None]).square().sum(), list(net.parameters()))
        for name, value in zip(values, alone):
            torch.testing.assert_close(each[name][number], value, **TIGHT)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_vmap_in_training_and_inference(case, mode):
    net, x = case
    with mode():
        torch.testing.assert_close(vmap(net)(x[:, None])[:, 0], net(x), **TIGHT)
    found = vmap(net)(x[:, None])[:, 0]
    by_vmap = torch.autograd.grad(found.square().sum(), list(net.parameters()))
    plain = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    torch.testing.assert_close(by_vmap, plain, **TIGHT)


def test_second_derivatives_agree_in_every_order_of_modes(case):
    net, x = case
    x = x[:1]

    def total(x):
        return net(x).sum()

    expected = torch.autograd.functional.hessian(total, x)
    for way in (
        hessian(total),
        jacrev(jacrev(total)),
        jacfwd(jacfwd(total)),
        jacrev(jacfwd(total)),
    ):
        torch.testing.assert_close(way(x), expected, **TIGHT)
    direction, step = torch.randn_like(x), 1e-5
    above, below = (grad(total)(x + sign * step * direction) for sign in (1, -1))
    product = jvp(grad(total), (x,), (direction,))[1]
    torch.testing.assert_close(product, (above - below) / (2 * step), rtol=1e-6, atol=1e-7)


def test_a_penalty_on_gradients_trains_rightly(case):
    net, x = case
    values = parameters(net)

    def penalty(values):
        slope = grad(lambda x: call(net)(values, x).square().sum())(x)
        return slope.square().sum()

    expected = grad(penalty)(values)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(leaf).square().sum(), leaf, create_graph=True)
    found = torch.autograd.grad(slope.square().sum(), list(net.parameters()), allow_unused=True)
    for value, other in zip(found, expected.values()):
        torch.testing.assert_close(torch.zeros_like(other) if value is None else value, other)
    name, step = "layers.1.bias", 1e-6
    along, basis = torch.ones_like(values[name]), getattr(net.layers[1], "basis", None)
    if basis is not None:  # finite layers learn along the range of Ω only
        along = basis @ (basis.T @ along)
    moved = [penalty(values | {name: values[name] + sign * step * along}) for sign in (1, -1)]
    torch.testing.assert_close(
        (expected[name] * along).sum(), (moved[0] - moved[1]) / (2 * step), rtol=1e-5, atol=1e-6
    )


def test_forward_mode(case):
    net, x = case
    tangent = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    (jacobian,) = one_by_one(net(leaf), [leaf])
    expected = torch.tensordot(jacobian, tangent, x.ndim)
    torch.testing.assert_close(jvp(net, (x,), (tangent,))[1], expected, **TIGHT)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(net(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, expected, **TIGHT)


def test_an_ensemble_is_one_call(case):
    net, x = case
    nets = [copy.deepcopy(net) for _ in range(3)]
    with torch.no_grad():
        for number, member in enumerate(nets):
            for parameter in member.parameters():
                parameter.mul_(1 + 0.1 * number)
    values, buffers = stack_module_state(nets)
    base = copy.deepcopy(net).to("meta")

    def outputs(values, buffers, x):
        return functional_call(base, (values, buffers), (x,))

    found = vmap(outputs, (0, 0, None))(values, buffers, x)
    torch.testing.assert_close(found, torch.stack([member(x) for member in nets]), **TIGHT)

    def loss(values, buffers, x):
        return outputs(values, buffers, x).square().sum()

    found = vmap(grad(loss), (0, 0, None))(values, buffers, x)
    for number, member in enumerate(nets):
        member(x).square().sum().backward()
        for name, parameter in member.named_parameters():
            torch.testing.assert_close(found[name][number], parameter.grad, **TIGHT)


def test_the_tangent_kernel_three_ways(case):
    """Θ(x, x') = ∂y(x) ∂y(x')ᵀ over all parameters: by the Jacobian of the batch, by gradients of
    every sample and output, and by double vector-Jacobian products, which form no Jacobian."""
    net, x = case
    values = parameters(net)
    size, classes = net(x).shape
    whole = [part.flatten(2) for part in jacrev(call(net))(values, x).values()]
    first = sum(torch.einsum("aip,bjp->aibj", part, part) for part in whole)

    def output(values, sample, which):
        return (call(net)(values, sample[None])[0] * which).sum()

    of_outputs = vmap(grad(output), (None, None, 0))
    single = vmap(of_outputs, (None, 0, None))(values, x, torch.eye(classes))
    second = sum(
        torch.einsum("aip,bjp->aibj", part.flatten(2), part.flatten(2)) for part in single.values()
    )
    outputs, pull = vjp(lambda values: call(net)(values, x), values)

    def product(vector):
        return jvp(lambda values: call(net)(values, x), (values,), pull(vector))[1]

    eye = torch.eye(outputs.numel()).view(-1, size, classes)
    third = vmap(product)(eye).view(size, classes, size, classes)
    for way in (second, third):
        torch.testing.assert_close(way, first, **TIGHT)


def test_the_readouts_part_of_the_tangent_kernel_is_the_dual_kernel():
    torch.manual_seed(0)
    net, x = mlp()
    net = net.double()
    x = x.double()
    jacobian = jacrev(lambda V: functional_call(net, {"layers.2.V": V}, x))(net.layers[2].V)
    found = torch.einsum("aipo,bjpo->aibj", jacobian, jacobian)
    g = net.layers[1](net.first_layer_alpha * net.layers[0](x))
    s = torch.linalg.vector_norm(g, dim=1, keepdim=True)
    kernel = s * net.layers[2].series.kernel((g / s) @ (g / s).T) * s.T
    expected = torch.einsum("ab,ij->aibj", kernel, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(found, net.last_layer_alpha**2 * expected, **TIGHT)


def dense(net: InfMLP) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """The outputs of a network of moments by the formula, column by column: u^α √κ √(j!/α!)."""
    monomials = []  # (indices, factor) of every column; the same in all layers
    features = net.layers[1].features
    for degree in features.degrees:
        for index in column_indices(features, degree).tolist():
            runs = [len(list(run)) for _, run in itertools.groupby(index)]
            ways = math.factorial(degree) / math.prod(math.factorial(run) for run in runs)
            monomials.append((index, math.sqrt(features.kappa[degree] * ways)))

    def column(u: Tensor, index: list[int], factor: float) -> Tensor:
        product = torch.full((len(u),), factor, dtype=u.dtype)
        for i in index:
            product = product * u[:, i]
        return product

    def outputs(values: dict[str, Tensor], x: Tensor) -> Tensor:
        g = net.first_layer_alpha * (x @ values["layers.0.A"] + 0.5 * values["layers.0.bias"])
        for number in range(1, len(net.layers)):
            s = g.square().sum(1, keepdim=True).sqrt()
            phi = torch.stack([column(g / s, *monomial) for monomial in monomials], 1)
            g = s * (phi @ values[f"layers.{number}.V"]) + 0.5 * values[f"layers.{number}.bias"]
        return net.last_layer_alpha * g

    return outputs


@pytest.mark.parametrize("fused", [False, True])
def test_second_order_agrees_with_autograd_of_the_dense_formula(fused):
    torch.manual_seed(0)
    net, x = mlp(fused=fused)
    net, x = net.double(), x.double()[:3]
    values = parameters(net)
    torch.testing.assert_close(net(x), dense(net)(values, x), **TIGHT)

    def second(function, modes):
        loss = lambda values: function(values, x).square().sum()  # noqa: E731
        return modes(loss)({name: values[name] for name in ("layers.1.bias", "layers.1.V")})

    def rest(function):
        return lambda some, x: function(values | some, x)

    expected = second(rest(dense(net)), lambda loss: jacrev(jacrev(loss)))
    torch.testing.assert_close(second(rest(call(net)), hessian), expected, **TIGHT)
    leaves = [net.layers[1].bias, net.layers[1].V]
    slopes = torch.autograd.grad(net(x).square().sum(), leaves, create_graph=True)
    for slope, name in zip(slopes, ("layers.1.bias", "layers.1.V")):
        rows = [
            torch.autograd.grad(number, leaves, retain_graph=True) for number in slope.flatten()
        ]
        for column, other in enumerate(("layers.1.bias", "layers.1.V")):
            block = torch.stack([row[column] for row in rows])
            torch.testing.assert_close(
                block.view_as(expected[name][other]), expected[name][other], **TIGHT
            )


def test_where_a_pre_activation_is_zero_all_derivatives_are_zero():
    torch.manual_seed(0)
    for net, x in (
        (InfMLP(4, 3, 4, 1, memory="moments", bias_alpha=0), torch.zeros(2, 4)),
        (InfPiConvNet(2, 3, (3, 4)), torch.zeros(2, 2, 6, 6)),
    ):
        nn.init.normal_(net.layers[-1].V)
        for way in (jacrev, jacfwd):
            assert torch.equal(way(net)(x), torch.zeros(2, 3, *x.shape))
        second = hessian(lambda x, net=net: net(x).sum())(x)
        assert torch.equal(second, torch.zeros(*x.shape, *x.shape))


@pytest.mark.filterwarnings("ignore")  # the compiler of some torch versions warns about itself
@pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"),
    reason="the compiler of torch before 2.6 can't trace functional_call",
)
@pytest.mark.parametrize("kind", ["moments", "convnet", "finite convnet"])
def test_transforms_of_a_network_compile_as_a_whole(kind):
    torch.manual_seed(0)
    net, x = NETWORKS[kind]()
    values = parameters(net)

    def single(values, sample):
        return call(net)(values, sample[None]).square().sum()

    each = vmap(grad(single), (None, 0))
    torch._dynamo.reset()
    compiled = torch.compile(each, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(values, x), each(values, x), rtol=1e-4, atol=1e-5)
