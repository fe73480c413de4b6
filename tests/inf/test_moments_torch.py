"""V is an ordinary parameter: what torch offers for parameters applies to it, and the fused path
gives the same numbers."""

import copy
import io
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pilimit_lib.core import load, restore, save, snapshot
from pilimit_lib.inf import InfMLP, PiSGD, clip_grad_norm_, param_groups
from pilimit_lib.inf.moments import sums as feature_linear
from pilimit_lib.inf.moments.parameter import FactoredParameter


def network(fused=False, **options):
    torch.manual_seed(0)
    return InfMLP(6, 3, 7, 1, memory="moments", bias_alpha=0.5, fused=fused, **options)


def data(n=16):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator)
    return x, x[:, :3].argmax(1)


def train(net, optimizer, steps=5, clip=None, scheduler=None):
    x, y = data()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        if clip is not None:
            clip(net)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


OPTIMIZERS = [
    name
    for name in (
        "SGD",
        "Adam",
        "AdamW",
        "NAdam",
        "RAdam",
        "Adamax",
        "Adagrad",
        "Adadelta",
        "RMSprop",
        "Rprop",
        "ASGD",
        "Adafactor",
    )
    if hasattr(torch.optim, name)
]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_of_torch_trains_moments(name, fused):
    net = network(fused)
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=1.0 if name == "Adadelta" else 0.02)
    losses = train(net, optimizer, 25)
    assert losses[-1] < losses[0]
    plain = network()
    assert (
        train(
            plain,
            getattr(torch.optim, name)(plain.parameters(), lr=1.0 if name == "Adadelta" else 0.02),
            25,
        )
        == losses
    )


def test_lbfgs_and_its_closure():
    net = network()
    x, y = data()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=5, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(3):
        optimizer.step(closure)
    assert closure().item() < 0.9 * first


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4], 0.1),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=5),
    ],
)
def test_schedulers(make):
    net = network()
    optimizer = torch.optim.SGD(
        param_groups(net, 0.1, last_layer_lr_mult=4.0), lr=0.1, momentum=0.9
    )
    train(net, optimizer, scheduler=make(optimizer))
    assert [group["name"] for group in optimizer.param_groups] == [
        "first",
        "hidden",
        "last",
        "bias",
    ]
    assert optimizer.param_groups[1]["params"][0] is net.layers[1].V
    assert optimizer.param_groups[2]["params"][0] is net.layers[2].V


@pytest.mark.parametrize("per_param", [False, True])
def test_clipping_is_torchs_own(per_param):
    """Our clipping of moments, fused or not, gives the numbers of torch.nn.utils.clip_grad_norm_ on
    plain gradients."""
    x, y = data()
    found = []
    for fused in (False, True):
        net = network(fused)
        (30 * nn.functional.cross_entropy(net(x), y)).backward()
        norm = clip_grad_norm_(net, 0.2, per_param)
        found.append((norm, [p.grad for p in net.parameters()]))
    net = network()
    (30 * nn.functional.cross_entropy(net(x), y)).backward()
    if per_param:
        for parameter in net.parameters():
            nn.utils.clip_grad_norm_([parameter], 0.2)
        expected_norm = found[0][0]
    else:
        expected_norm = nn.utils.clip_grad_norm_(net.parameters(), 0.2)
    for norm, gradients in found:
        torch.testing.assert_close(norm, expected_norm)
        torch.testing.assert_close(
            gradients, [p.grad for p in net.parameters()], rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"maximize": True}]
)
def test_fused_steps_give_the_numbers_of_plain_ones(options):
    nets = [network(fused).double() for fused in (False, True)]
    x, y = data()
    for net in nets:
        optimizer = PiSGD(param_groups(net, 0.1, 1e-2, last_layer_lr_mult=3.0), **options)
        for _ in range(10):
            optimizer.zero_grad()
            for part in (slice(0, 8), slice(8, 16)):  # gradients add up over two backward passes
                nn.functional.cross_entropy(net(x[part].double()), y[part]).backward()
            clip_grad_norm_(net, 0.5)
            optimizer.step()
    for one, other in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-12, atol=1e-13)
    assert isinstance(nets[1].layers[1].V, FactoredParameter)


def test_fused_steps_never_form_the_gradient(monkeypatch):
    net = network(True)
    optimizer = PiSGD(param_groups(net, 0.1, 1e-2))

    real = feature_linear.backward

    def without_V(features, u, V, grad, need_u, need_V):
        if need_V:
            raise AssertionError("∂L/∂V was formed")
        return real(features, u, V, grad, need_u, need_V)

    before = net.layers[1].V.detach().clone()
    monkeypatch.setattr(feature_linear, "backward", without_V)
    train(net, optimizer, 3, lambda net: clip_grad_norm_(net, 0.5))
    assert not torch.equal(before, net.layers[1].V)
    x, y = data()
    nn.functional.cross_entropy(net(x), y).backward()
    with pytest.raises(AssertionError, match="was formed"):
        _ = net.layers[1].V.grad


def test_gradient_in_factors_reads_clears_and_copies_like_any_gradient():
    x, y = data()
    nets = [network(fused) for fused in (False, True)]
    for net in nets:
        nn.functional.cross_entropy(net(x), y).backward()
    V, twin = nets[1].layers[1].V, copy.deepcopy(nets[1])
    torch.testing.assert_close(V.grad, nets[0].layers[1].V.grad)
    assert twin.layers[1].V.grad is None
    nn.functional.cross_entropy(nets[1](x), y).backward()
    torch.testing.assert_close(V.grad, 2 * nets[0].layers[1].V.grad)
    nets[1].zero_grad()
    assert V.grad is None
    nn.functional.cross_entropy(nets[1](x), y).backward()
    V.requires_grad_(False)
    V.grad = None
    nn.functional.cross_entropy(nets[1](x), y).backward()
    assert V.grad is None


def test_a_fused_parameter_has_the_methods_of_any_tensor():
    net = network(True)
    x, y = data()
    nn.functional.cross_entropy(net(x), y).backward()
    V = net.layers[1].V
    assert torch.equal(V.norm(), torch.linalg.vector_norm(V.detach())) and V.in_factors


def test_an_empty_batch_passes_no_gradient():
    for fused in (False, True):
        net = network(fused, degree=3)
        net(torch.randn(0, 6)).sum().backward()
        assert not any(parameter.grad.any() for parameter in net.parameters())


def test_nan_in_a_fused_gradient_changes_nothing():
    net = network(True)
    x, _ = data()
    for policy in ("raise", "skip"):
        optimizer = PiSGD(param_groups(net, 0.1), on_nonfinite=policy)
        optimizer.zero_grad()
        before = [p.detach().clone() for p in (net.layers[1].V, net.layers[2].V)]
        (net(x).sum() * float("nan")).backward()
        net.layers[0].A.grad = net.layers[0].bias.grad = net.layers[1].bias.grad = net.layers[
            2
        ].bias.grad = None
        if policy == "raise":
            with pytest.raises(FloatingPointError, match="NaN"):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.nonfinite_skipped == 1
        assert all(torch.equal(a, b) for a, b in zip(before, (net.layers[1].V, net.layers[2].V)))


@pytest.mark.parametrize("fused", [False, True])
def test_stale_graph_is_an_error(fused):
    net = network(fused)
    x, y = data()
    optimizer = PiSGD(param_groups(net, 0.1))
    nn.init.normal_(net.layers[2].V)
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_sums_in_float32():
    net = network()
    x, y = data()
    expected = net(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = net(x)
        loss = nn.functional.cross_entropy(output, y)
    loss.backward()
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    assert (
        net.layers[1].V.grad.dtype == torch.float32 and torch.isfinite(net.layers[1].V.grad).all()
    )


@pytest.mark.filterwarnings("ignore")  # the compiler of some torch versions warns about itself
@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler"),
            ],
        ),
    ],
)
def test_compiled_network_computes_and_trains_the_same(backend):
    torch._dynamo.reset()
    x, y = data()
    net, plain = network(degree=3, fit="minimax"), network(degree=3, fit="minimax")
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    for module in (compiled, plain):
        nn.init.normal_(
            (net if module is compiled else plain).layers[2].V,
            generator=torch.Generator().manual_seed(4),
        )
        nn.functional.cross_entropy(module(x), y).backward()
    torch.testing.assert_close(compiled(x), plain(x))
    for one, other in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_copying_pickling_and_checkpointing_adam(tmp_path):
    for fused in (False, True):
        net = network(fused)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        train(net, optimizer, 3)
        save(snapshot(net, optimizer), tmp_path / "a.pt")
        twin = copy.deepcopy(net)
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        pickled = torch.load(buffer, weights_only=False)
        x, _ = data()
        for other in (twin, pickled):
            assert torch.equal(other(x), net(x)) and other.layers[1].V is not net.layers[1].V
            assert type(other.layers[1].V) is type(net.layers[1].V)
        expected = train(net, optimizer, 3)
        fresh = network(fused, device="cpu")
        fresh_optimizer = torch.optim.Adam(fresh.parameters(), lr=0.5)
        restore(fresh, load(tmp_path / "a.pt"), fresh_optimizer)
        assert train(fresh, fresh_optimizer, 3) == expected


def test_second_derivatives_through_a_step():
    """d loss(V - η ∂L/∂V) / d V0 by autograd, against finite differences: what MAML needs."""
    net = network().double()
    x, y = (t.double() if t.is_floating_point() else t for t in data())
    layer = net.layers[1]
    nn.init.normal_(net.layers[2].V)

    def adapted(V):
        first = torch.func.functional_call(net, {"layers.1.V": V}, x)
        (grad,) = torch.autograd.grad(nn.functional.cross_entropy(first, y), V, create_graph=True)
        return nn.functional.cross_entropy(
            torch.func.functional_call(net, {"layers.1.V": V - 0.5 * grad}, x), y
        )

    V = layer.V.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(adapted(V), V)
    direction = torch.randn_like(V)
    step = 1e-5
    above, below = (
        adapted((V + sign * step * direction).detach().requires_grad_()).detach()
        for sign in (1, -1)
    )
    torch.testing.assert_close(
        (gradient * direction).sum(), (above - below) / (2 * step), rtol=1e-5, atol=1e-8
    )


def test_fused_layers_have_the_second_derivatives_of_plain_ones():
    found = []
    for fused in (False, True):
        net, (x, y) = network(fused).double(), data()
        nn.init.normal_(net.layers[2].V, generator=torch.Generator().manual_seed(0))
        loss = nn.functional.cross_entropy(net(x.double()), y)
        gradients = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        torch.stack([gradient.square().sum() for gradient in gradients]).sum().backward()
        found.append([parameter.grad for parameter in net.parameters()])
    torch.testing.assert_close(*found)


def test_only_backward_leaves_a_gradient_with_a_fused_layer():
    net, (x, y) = network(True), data()
    nn.init.normal_(net.layers[2].V)
    x.requires_grad_()
    V = net.layers[1].V
    torch.autograd.grad(nn.functional.cross_entropy(net(x), y), x)
    assert V.grad is None
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), V)
    assert V.grad is None
    nn.functional.cross_entropy(net(x), y).backward(inputs=[x])
    assert V.grad is None
    nn.functional.cross_entropy(net(x), y).backward(inputs=[V])
    assert V.in_factors
    torch.testing.assert_close(V.grad, gradient)


def _replica(rank, port, path):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    net, (x, y) = network(), data()
    with pytest.raises(RuntimeError, match="build it with fused=False"):
        DistributedDataParallel(network(True))(x)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(param_groups(net, 0.2, 1e-3), lr=0.2)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rank::2]), y[rank::2]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
    torch.save(net.state_dict(), f"{path}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_one_network(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_replica, (port, str(tmp_path)), nprocs=2)
    net = network()
    optimizer = torch.optim.SGD(param_groups(net, 0.2, 1e-3), lr=0.2)
    train(net, optimizer, 5, lambda net: nn.utils.clip_grad_norm_(net.parameters(), 0.5))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-5, atol=1e-6)
