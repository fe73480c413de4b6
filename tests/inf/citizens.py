"""What torch's tools do with every kind of network: works, or is refused with a remedy.

A tool is a function of a fresh network that raises where the outcome is not the right one; what is
right comes from a finite difference, a loop, or a twin that was trained without the tool. The table
in docs/TORCH.md is made by `python -m tests.inf.citizens`, and `test_citizens` compares each of its
cells with what runs.
"""

from __future__ import annotations

import copy
import functools
import io
import re
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, stack_module_state, vmap

from pilimit_lib.inf import InfMLP, InfPiConvNet, PiSGD, clip_grad_norm_, param_groups
from tests import warm

PAGE = Path(__file__).resolve().parents[2] / "docs" / "TORCH.md"
RATE = 0.1
# What an error may send its reader to; the first that a message names stands in the table.
REMEDIES = (
    "fused=False",
    "memory='moments'",
    "shard_rows",
    "PiSGD",
    "clip_grad_norm_",
    "p.detach()",
    "from_state_dict",
    "state_dict",
    "requires_grad_(False)",
    "load",
)
LAYER = re.compile("InfPi|InfMLP|FinPi|π-layer|fused layer|rows")


@dataclass
class Case:
    """A network with something in its readout, inputs x, labels y; `main` is the readout's weight,
    in which outputs are linear."""

    kind: str
    net: nn.Module
    x: Tensor
    y: Tensor

    @property
    def main(self) -> str:
        names = {"rows": "A", "moments": "V", "fused moments": "V", "ConvNet": "V"}
        return f"layers.{len(self.net.layers) - 1}.{names.get(self.kind, 'weight')}"

    def twin(self) -> Case:
        """An equal network of its own."""
        return case(self.kind, self.x.dtype)

    def loss(self, net: nn.Module | None = None, x: Tensor | None = None) -> Tensor:
        outputs = (net or self.net)(self.x if x is None else x)
        return nn.functional.cross_entropy(outputs, self.y)

    def values(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.net.named_parameters()}

    def optimizer(self, lr: float = RATE) -> PiSGD:
        return PiSGD(param_groups(self.net, lr))

    def after_step(self, backward: Callable[[], None] | None = None, lr: float = RATE) -> Tensor:
        """Outputs after one step of SGD on the gradients that `backward` leaves."""
        optimizer = self.optimizer(lr)
        optimizer.zero_grad()
        if backward is None:
            self.loss().backward()
        else:
            backward()
        optimizer.step()
        with torch.no_grad():
            return self.net(self.x)


def _mlp(kind: str, dtype: torch.dtype) -> nn.Module:
    how = {"rows": {}, "fused moments": {"memory": "moments", "fused": True}}
    how = how.get(kind, {"memory": "moments"})
    net = InfMLP(4, 3, 4, 1, bias_alpha=0.5, dtype=dtype, row_dtype=dtype, **how)
    _fill(net.layers[-1])
    if kind in ("finite π", "μ"):
        net = net.sample(12)
    return net.gaussian_init_() if kind == "μ" else net


def _convnet(kind: str, dtype: torch.dtype) -> nn.Module:
    net = InfPiConvNet(2, 3, (3, 4), bias_alpha=0.5, dtype=dtype, V_dtype=dtype)
    _fill(net.layers[-1])
    return net.sample(8) if kind == "finite ConvNet" else net


def _fill(readout: nn.Module) -> None:
    """A readout begins at zero, where half of the mistakes would not show."""
    if hasattr(readout, "V"):
        with torch.no_grad():
            readout.V.normal_(std=0.3)
    else:
        shape, B = (len(readout), readout.r_out), readout.B.detach().clone()
        readout.set_rows(0.3 * torch.randn(shape).to(B), torch.ones(len(B)).to(B), B)


KINDS: dict[str, Callable[[str, torch.dtype], nn.Module]] = {
    "rows": _mlp,
    "moments": _mlp,
    "fused moments": _mlp,
    "ConvNet": _convnet,
    "finite π": _mlp,
    "finite ConvNet": _convnet,
    "μ": _mlp,
}
TOOLS: dict[str, Callable[[Case], None]] = {}


def case(kind: str, dtype: torch.dtype = torch.float64) -> Case:
    """A fresh case, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = KINDS[kind](kind, dtype)
        size = (2, 5, 5) if "ConvNet" in kind else (4,)
        return Case(kind, net, torch.randn(6, *size).to(dtype), torch.arange(6) % 3)


def tool(name: str) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    def register(function: Callable[[Case], None]) -> Callable[[Case], None]:
        TOOLS[name] = function
        return function

    return register


def same(found, expected, rtol: float = 1e-7, atol: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def jacobian_by_loop(net: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    outputs = net(x)
    rows = [torch.autograd.grad(out, x, retain_graph=True)[0] for out in outputs.flatten()]
    return torch.stack(rows).view(*outputs.shape, *x.shape)


def slope(function: Callable[[Tensor], Tensor], x: Tensor, along: Tensor) -> Tensor:
    """The derivative of `function` at `x` along a direction, by finite differences."""
    step = 1e-6
    with torch.no_grad():
        return (function(x + step * along) - function(x - step * along)) / (2 * step)


def check_step(c: Case, loss: Callable[[], Tensor]) -> None:
    """A small step of SGD lowers the loss by lr · |gradient|², the norm being that of clipping:
    true of any width, and only of the right gradient."""
    lr = 1e-6
    optimizer, before = c.optimizer(lr), loss()
    before.backward()
    norm = clip_grad_norm_(c.net, 1e9)
    assert norm > 1e-3
    optimizer.step()
    with torch.no_grad():
        same((before - loss()) / lr, norm**2, rtol=1e-3, atol=0)


@tool("backward, twice before a step")
def _(c: Case) -> None:
    def halves() -> None:
        for part in (slice(0, 2), slice(2, 6)):
            outputs = c.net(c.x[part])
            nn.functional.cross_entropy(outputs, c.y[part], reduction="sum").backward()

    twin = c.twin()
    same(c.after_step(halves), twin.after_step(lambda: (6 * twin.loss()).backward()))


@tool("backward with retain_graph")
def _(c: Case) -> None:
    def twice() -> None:
        loss = c.loss()
        loss.backward(retain_graph=True)
        loss.backward()

    same(c.after_step(twice), c.twin().after_step(lr=2 * RATE))


@tool("autograd.grad by inputs")
def _(c: Case) -> None:
    x, along = c.x.clone().requires_grad_(), torch.randn_like(c.x)
    (found,) = torch.autograd.grad(c.loss(x=x), x)
    same((found * along).sum(), slope(lambda x: c.loss(x=x), c.x, along), rtol=1e-6)
    optimizer = c.optimizer()  # nothing may be left behind
    optimizer.step()
    same(c.net(c.x), c.twin().net(c.x))


@tool("autograd.grad by parameters")
def _(c: Case) -> None:
    twin = c.twin()
    twin.loss().backward()
    found = torch.autograd.grad(c.loss(), list(c.net.parameters()))
    same(list(found), [parameter.grad for parameter in twin.net.parameters()])


@tool("create_graph (gradient penalty)")
def _(c: Case) -> None:
    def penalty(main: Tensor | None = None) -> Tensor:
        x = c.x.clone().requires_grad_()
        with torch.enable_grad():
            net = c.net
            if main is not None:
                net = lambda x: functional_call(c.net, {c.main: main}, x)  # noqa: E731
            (found,) = torch.autograd.grad(c.loss(net, x), x, create_graph=True)
        return found.square().sum()

    penalty().backward()
    parameter = c.net.get_parameter(c.main)
    along = torch.randn_like(parameter)
    expected = slope(penalty, parameter.detach(), along)
    same((parameter.grad * along).sum(), expected, rtol=1e-5)


@tool("autograd.functional.jacobian, vectorised")
def _(c: Case) -> None:
    found = torch.autograd.functional.jacobian(c.net, c.x, vectorize=True)
    same(found, jacobian_by_loop(c.net, c.x))


@tool("is_grads_batched")
def _(c: Case) -> None:
    x = c.x.clone().requires_grad_()
    outputs = c.net(x)
    eye = torch.eye(outputs.numel(), dtype=x.dtype).view(-1, *outputs.shape)
    (found,) = torch.autograd.grad(outputs, x, eye, is_grads_batched=True)
    same(found.view(*outputs.shape, *x.shape), jacobian_by_loop(c.net, c.x))


@tool("forward mode")
def _(c: Case) -> None:
    along = torch.randn_like(c.x)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(c.net(forward_ad.make_dual(c.x, along))).tangent
    same(found, torch.tensordot(jacobian_by_loop(c.net, c.x), along, c.x.ndim))


@tool("func.grad")
def _(c: Case) -> None:
    x = c.x.clone().requires_grad_()
    expected = torch.autograd.grad(c.loss(x=x), x)[0]
    same(grad(lambda x: c.loss(x=x))(c.x), expected)


@tool("func.vmap")
def _(c: Case) -> None:
    with torch.no_grad():
        same(vmap(c.net)(c.x[:, None])[:, 0], c.net(c.x))


@tool("func.jacrev")
def _(c: Case) -> None:
    same(jacrev(c.net)(c.x), jacobian_by_loop(c.net, c.x))


@tool("func.jacfwd")
def _(c: Case) -> None:
    same(jacfwd(c.net)(c.x), jacobian_by_loop(c.net, c.x))


@tool("func.hessian")
def _(c: Case) -> None:
    def total(x: Tensor) -> Tensor:
        return c.net(x).square().sum()

    x, along = c.x[:1], torch.randn_like(c.x[:1])
    found = torch.tensordot(hessian(total)(x), along, x.ndim)

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            return torch.autograd.grad(total(x), x)[0]

    same(found, slope(gradient, x, along), rtol=1e-5, atol=1e-6)


@tool("func.functional_call")
def _(c: Case) -> None:
    values = c.values()
    main = values[c.main]
    with torch.no_grad():
        found = functional_call(c.net, values | {c.main: 1.5 * main}, c.x)
        nothing = functional_call(c.net, values | {c.main: 0 * main}, c.x)
        same(found, nothing + 1.5 * (c.net(c.x) - nothing))


@tool("func: gradients of each sample")
def _(c: Case) -> None:
    def single(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = functional_call(c.net, values, x[None])
        return nn.functional.cross_entropy(outputs, y[None])

    values = c.values()
    main, along = values[c.main], torch.randn_like(values[c.main])
    found = vmap(grad(single), (None, 0, 0))(values, c.x, c.y)[c.main]
    for number in range(len(c.x)):
        expected = slope(
            lambda V, n=number: single(values | {c.main: V}, c.x[n], c.y[n]), main, along
        )
        same((found[number] * along).sum(), expected, rtol=1e-6)


@tool("func.stack_module_state")
def _(c: Case) -> None:
    nets = [c.net, c.twin().net]
    nets[1].first_layer_alpha = nets[0].first_layer_alpha
    values, buffers = stack_module_state(nets)
    with torch.no_grad():
        values = {name: value.clone() for name, value in values.items()}
        values[c.main][1] *= 2
        base = copy.deepcopy(c.net)
        found = vmap(lambda v, b: functional_call(base, (v, b), (c.x,)))(values, buffers)
        nothing = functional_call(c.net, c.values() | {c.main: 0 * c.values()[c.main]}, c.x)
        same(found, torch.stack([c.net(c.x), 2 * c.net(c.x) - nothing]))


@tool("torch.compile")
def _(c: Case) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(c.net, backend="aot_eager")
    backward = lambda: nn.functional.cross_entropy(compiled(c.x), c.y).backward()  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler of some torch versions warns about itself
        same(compiled(c.x), c.net(c.x))
        same(c.after_step(backward), c.twin().after_step())


@tool("torch.export")
def _(c: Case) -> None:
    program = torch.export.export(c.net, (c.x,))
    same(program.module()(c.x), c.net(c.x))


@tool("inference_mode")
def _(c: Case) -> None:
    with torch.inference_mode():
        found = c.net(c.x)
    same(found.clone(), c.net(c.x))
    same(c.after_step(), c.twin().after_step())


@tool("autocast to bfloat16")
def _(c: Case) -> None:
    c = case(c.kind, torch.float32)
    expected = c.net(c.x)
    with torch.autocast("cpu", torch.bfloat16):
        found = c.net(c.x)
        loss = nn.functional.cross_entropy(found.float(), c.y)
    same(found.float(), expected, rtol=0.05, atol=0.05)
    twin = c.twin()
    same(c.after_step(loss.backward), twin.after_step(), rtol=0.05, atol=0.05)


@tool("default dtype float64")
def _(c: Case) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        net = KINDS[c.kind](c.kind, None)
        check_step(Case(c.kind, net, c.x, c.y), lambda: c.loss(net))
        assert net(c.x).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


@tool("inputs that are not contiguous")
def _(c: Case) -> None:
    spread = torch.stack([c.x, torch.zeros_like(c.x)], -1)[..., 0]
    assert not spread.is_contiguous()
    turned = spread.transpose(0, -1).contiguous().transpose(0, -1)
    for x in (spread, turned):
        one, other = c.twin(), c.twin()
        same(one.after_step(lambda one=one, x=x: one.loss(x=x).backward()), other.after_step())


@tool("empty batches")
def _(c: Case) -> None:
    found = c.after_step(lambda: c.net(c.x[:0]).sum().backward())
    same(found, c.twin().net(c.x))
    assert c.net(c.x[:0]).shape == (0, 3)


@tool("utils.checkpoint")
def _(c: Case) -> None:
    run = functools.partial(torch.utils.checkpoint.checkpoint, c.net, use_reentrant=False)
    backward = lambda: nn.functional.cross_entropy(run(c.x), c.y).backward()  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older ones call a part of torch that is deprecated
        same(c.after_step(backward), c.twin().after_step())


@tool("graph.save_on_cpu")
def _(c: Case) -> None:
    with torch.autograd.graph.save_on_cpu():
        loss = c.loss()
    same(c.after_step(loss.backward), c.twin().after_step())


@tool("anomaly mode")
def _(c: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow
        with torch.autograd.detect_anomaly():
            found = c.after_step()
    same(found, c.twin().after_step())


@tool("hooks of modules")
def _(c: Case) -> None:
    seen: dict[str, Tensor] = {}
    layer = c.net.layers[1]
    layer.register_forward_hook(lambda module, inputs, output: seen.update(out=output))
    layer.register_full_backward_hook(lambda module, into, out: seen.update(grad=out[0]))
    loss = c.loss()
    (expected,) = torch.autograd.grad(loss, seen["out"], retain_graph=True)
    same(c.after_step(loss.backward), c.twin().after_step())
    same(seen["grad"], expected)


@tool("hooks of tensors")
def _(c: Case) -> None:
    first = next(c.net.layers[0].parameters())
    first.register_hook(lambda gradient: 3 * gradient)
    twin = c.twin()
    c.loss().backward()
    twin.loss().backward()
    same(first.grad, 3 * next(twin.net.layers[0].parameters()).grad)


@tool("register_post_accumulate_grad_hook")
def _(c: Case) -> None:
    seen: dict[str, Tensor] = {}
    for name, parameter in c.net.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda leaf, name=name: seen.update({name: leaf.grad.clone()})
        )
    twin = c.twin()
    c.loss().backward()
    twin.loss().backward()
    same(seen, {name: parameter.grad for name, parameter in twin.net.named_parameters()})


@tool("one layer used twice")
def _(c: Case) -> None:
    first, middle, last = c.net.layers

    def loss() -> Tensor:
        g = first(c.x)
        if "ConvNet" in c.kind:
            g = torch.cat([g, g], 1)[:, : middle.weight.shape[1] if c.kind != "ConvNet" else 3]
            out = last(middle(g)).mean((2, 3)) + last(middle(2 * g)).mean((2, 3))
        else:
            out = last(middle(middle(g)))
        return nn.functional.cross_entropy(out, c.y)

    check_step(c, loss)


@tool("parametrizations.weight_norm")
def _(c: Case) -> None:
    layer, name = c.net.layers[-1], c.main.rsplit(".", 1)[1]
    before = c.net(c.x).detach()
    nn.utils.parametrizations.weight_norm(layer, name, dim=1)
    same(c.net(c.x), before)
    size = layer.parametrizations[name].original0
    c.loss().backward()
    along = torch.randn_like(size)
    place = f"layers.{len(c.net.layers) - 1}.parametrizations.{name}.original0"

    def at(value: Tensor) -> Tensor:
        outputs = functional_call(c.net, {place: value}, c.x)
        return nn.functional.cross_entropy(outputs, c.y)

    same((size.grad * along).sum(), slope(at, size.detach(), along), rtol=1e-6)


@tool("requires_grad_(False) on all but the readout")
def _(c: Case) -> None:
    c.net.requires_grad_(False)
    c.net.layers[-1].requires_grad_(True)
    hidden = c.net.embedding(c.x).detach()
    check_step(c, c.loss)
    same(c.net.embedding(c.x), hidden)


@tool("optim.Adam")
def _(c: Case) -> None:
    twin, eps = c.twin(), 1e-3
    optimizer = torch.optim.Adam(c.net.parameters(), lr=RATE, eps=eps)
    c.loss().backward()
    optimizer.step()
    twin.loss().backward()
    for one, other in zip(c.net.parameters(), twin.net.parameters()):
        same(one, other - RATE * other.grad / (other.grad.abs() + eps))


@tool("nn.utils.clip_grad_norm_")
def _(c: Case) -> None:
    twin = c.twin()
    c.loss().backward()
    twin.loss().backward()
    found = nn.utils.clip_grad_norm_(c.net.parameters(), 0.01)
    same(found, clip_grad_norm_(twin.net, 0.01), rtol=1e-6)
    for one in (c, twin):
        one.optimizer().step()
    # torch divides by norm + 1e-6 too
    same(c.net(c.x), twin.net(c.x), rtol=1e-6)


@tool("amp.GradScaler")
def _(c: Case) -> None:
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), c.optimizer()
    scaler.scale(c.loss()).backward()
    scaler.step(optimizer)
    scaler.update()
    same(c.net(c.x), c.twin().after_step())


@tool("lr_scheduler")
def _(c: Case) -> None:
    optimizer = c.optimizer()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        c.loss().backward()
        optimizer.step()
        scheduler.step()
    twin = c.twin()
    twin.after_step()
    same(c.net(c.x), twin.after_step(lr=RATE / 2))


@tool("zero_grad")
def _(c: Case) -> None:
    optimizer = c.optimizer()
    for to_none in (True, False):
        c.loss().backward()
        optimizer.zero_grad(set_to_none=to_none)
        optimizer.step()
    same(c.net(c.x), c.twin().net(c.x))


@tool("two networks, one optimiser")
def _(c: Case) -> None:
    other = c.twin()
    optimizer = PiSGD(param_groups(c.net, RATE) + param_groups(other.net, RATE / 2))
    (c.loss() + other.loss()).backward()
    optimizer.step()
    same(c.net(c.x), c.twin().after_step())
    same(other.net(c.x), c.twin().after_step(lr=RATE / 2))


@tool("swa_utils.AveragedModel")
def _(c: Case) -> None:
    average = torch.optim.swa_utils.AveragedModel(c.net)
    average.update_parameters(c.net)
    values = {name: value.clone() for name, value in c.values().items()}
    c.after_step()
    average.update_parameters(c.net)
    for name, parameter in average.module.named_parameters():
        same(parameter.detach(), (values[name] + c.values()[name]) / 2)


@tool("DistributedDataParallel")
def _(c: Case) -> None:
    error = _replicas(c.kind)
    if error:
        raise RuntimeError(error)


def _replicas(kind: str) -> str:
    """Train on two processes and compare with one; returns the error that both refused with."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        processes = [warm.process(_replica, rank, kind, port, folder) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]
    if all(isinstance(outputs, str) for outputs in found):
        return found[0]
    for outputs in found:
        same(outputs, case(kind).after_step())
    return ""


def _replica(rank: int, kind: str, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    c = case(kind)
    try:
        model = nn.parallel.DistributedDataParallel(c.net)

        def backward() -> None:
            outputs = model(c.x[rank::2])
            nn.functional.cross_entropy(outputs, c.y[rank::2]).backward()

        result = c.after_step(backward)
    except (RuntimeError, ValueError, TypeError) as error:
        result = str(error)
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@tool("copy.deepcopy")
def _(c: Case) -> None:
    c.after_step()
    copied = Case(c.kind, copy.deepcopy(c.net), c.x, c.y)
    before = copied.net(c.x).detach()
    expected = c.after_step()
    same(copied.net(c.x), before)
    same(copied.after_step(), expected)


@tool("torch.save of a whole network")
def _(c: Case) -> None:
    file = io.BytesIO()
    torch.save(c.net, file)
    file.seek(0)
    loaded = Case(c.kind, torch.load(file, weights_only=False), c.x, c.y)
    same(loaded.after_step(), c.after_step())


@tool("state_dict, weights_only")
def _(c: Case) -> None:
    expected = c.after_step()
    file = io.BytesIO()
    torch.save(c.net.state_dict(), file)
    file.seek(0)
    twin = c.twin()
    twin.net.load_state_dict(torch.load(file, weights_only=True))
    same(twin.net(c.x), expected)


@tool("safetensors")
def _(c: Case) -> None:
    from safetensors.torch import load, save

    expected = c.after_step()
    twin = c.twin()
    twin.net.load_state_dict(load(save(c.net.state_dict())))
    same(twin.net(c.x), expected)


@tool("meta device and to_empty")
def _(c: Case) -> None:
    twin = c.twin()
    twin.net.to("meta")
    twin.net.to_empty(device="cpu")
    twin.net.load_state_dict(c.net.state_dict())
    same(twin.net(c.x), c.net(c.x))
    same(twin.after_step(), c.after_step())


@tool("conversion by .to(dtype)")
def _(c: Case) -> None:
    expected = c.net(c.x)
    same(c.net.float()(c.x.float()), expected.float(), rtol=1e-4, atol=1e-5)
    assert c.net.double()(c.x).dtype == torch.float64


def outcome(name: str, kind: str) -> str:
    """ "works", or "refused" with the remedy that the error names. Raises where it is neither."""
    try:
        TOOLS[name](case(kind))
    except (RuntimeError, TypeError, ValueError) as error:
        remedy = next((remedy for remedy in REMEDIES if remedy in str(error)), None)
        if remedy is None or not LAYER.search(str(error)):
            raise
        return f"refused: `{remedy}`"
    return "works"


def cells(page: str) -> dict[tuple[str, str], str]:
    """The table of a page: {(tool, kind): cell}."""
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    heads, rows = [cell.strip() for cell in lines[0]], lines[2:]
    return {
        (row[0].strip(), kind): cell.strip()
        for row in rows
        for kind, cell in zip(heads[1:], row[1:])
    }


def table(found: dict[tuple[str, str], str]) -> str:
    heads = ["tool", *KINDS]
    lines = [heads, ["---"] * len(heads)]
    lines += [[name, *(found[name, kind] for kind in KINDS)] for name in TOOLS]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Write the table into the page; a cell that is neither keeps what it said, and is reported."""
    warnings.simplefilter("ignore")
    page, found, wrong = PAGE.read_text(encoding="utf-8"), {}, []
    said = cells(page)
    for name in TOOLS:
        for kind in KINDS:
            try:
                found[name, kind] = outcome(name, kind)
            except Exception as error:  # noqa: BLE001 (reported below)
                found[name, kind] = said.get((name, kind), "works")
                wrong.append(f"{name}, {kind}: {type(error).__name__}: {str(error)[:300]}")
    before, after = re.split(r"(?:^\|.*\n)+", page, maxsplit=1, flags=re.MULTILINE)
    PAGE.write_text(before + table(found) + after, encoding="utf-8")
    print("\n".join(wrong), file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
