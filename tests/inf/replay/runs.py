"""A small run with its record, for every kind of network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pilimit_lib.core import batch
from pilimit_lib.inf import InfMLP, PiSGD, clip_grad_norm_
from pilimit_lib.inf.replay import Recorder, RunRecord

F64 = torch.float64
SAMPLES = 15
MOMENTUM = {"momentum": 0.9, "decay": 0.01, "halve_at": 2}
PER_PARAM = {"clip": 0.2, "per_param": True}
# every way of training on rows, and each kind of network in one way
RUNS = [("rows", {}), ("rows", MOMENTUM), ("rows", PER_PARAM), ("rows", {"clip": 0.3})]
RUNS += [("moments", MOMENTUM), ("finite", PER_PARAM), ("layernorm", MOMENTUM)]


def named(value: object) -> str:
    """The name of a parameter of a test."""
    return value if isinstance(value, str) else "-".join(value) or "plain"


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 5, generator=generator, dtype=F64)
    return x, torch.randint(0, 3, (SAMPLES,), generator=generator)


def order(epochs: int = 3, size: int = 4, seed: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    perms = [torch.randperm(SAMPLES, generator=generator) for _ in range(epochs)]
    return [ids for perm in perms for ids in perm.split(size)]


def fresh(kind: str) -> nn.Module:
    torch.manual_seed(0)
    memory = "moments" if kind == "moments" else "rows"
    net = InfMLP(
        5, 3, r=4, L=1, bias_alpha=0.5, memory=memory, layernorm=kind == "layernorm", dtype=F64
    )
    return net.sample(12) if kind == "finite" else net


def optimizer_of(net: nn.Module, momentum: float = 0.0, decay: float = 0.0) -> PiSGD:
    inner, last = list(net.layers[:-1].parameters()), list(net.layers[-1].parameters())
    groups = [{"params": inner, "lr": 0.3}, {"params": last, "lr": 0.6, "weight_decay": decay}]
    return PiSGD(groups, lr=0.3, momentum=momentum, weight_decay=decay)


def train(
    net: nn.Module,
    optimizer: PiSGD,
    batches: list[Tensor],
    x: Tensor,
    y: Tensor,
    clip: float | None = None,
    per_param: bool = False,
    halve_at: int | None = None,
    without: tuple[int, ...] = (),
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> None:
    """The loop that a user would write; samples `without` are left out of their batches."""
    gone = torch.tensor(without, dtype=torch.long)
    for step, ids in enumerate(batches):
        if step == halve_at:
            for group in optimizer.param_groups:
                group["lr"] /= 2
        ids = ids[~torch.isin(ids, gone)]
        if not len(ids):
            continue
        optimizer.zero_grad()
        with batch(ids):
            out = net(x[ids])
        loss(out, y[ids]).backward()
        if clip is not None:
            clip_grad_norm_(net, clip, per_param)
        optimizer.step()


def recorded(kind: str, batches: list[Tensor] | None = None, **how) -> tuple[nn.Module, RunRecord]:
    """A trained network and the record of its run."""
    net = fresh(kind)
    optimizer = optimizer_of(net, how.pop("momentum", 0.0), how.pop("decay", 0.0))
    clip, per_param = how.get("clip"), how.get("per_param", False)
    with Recorder(net, optimizer, clip, per_param) as recorder:
        train(net, optimizer, order() if batches is None else batches, *data(), **how)
    return net, recorder.record
