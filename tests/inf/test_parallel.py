"""Gradients of several processes (Gloo) as one, against the same training in one process."""

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from pilimit_lib.core import batch, restore, save, snapshot
from pilimit_lib.core.collectives import counted
from pilimit_lib.inf import (
    InfMLP,
    InfPiConvNet,
    InputFactors,
    PiSGD,
    clip_grad_norm_,
    shard_rows,
    sum_gradients_,
)
from pilimit_lib.inf.gp import KernelMLP
from pilimit_lib.inf.gp.relu import ReLUKernel
from pilimit_lib.inf.rows.shard import sharded_snapshot
from tests.inf.test_rows_shard import build, started, step

SIZES = (7, 6, 5, 2, 1, 7)  # of batches: uneven shares, and fewer samples than ranks


def mlp(**how):
    return InfMLP(4, 3, 5, 2, **how)


NETWORKS = {
    "rows": lambda: mlp(),
    "rows within a budget": lambda: mlp(row_budget=12),
    "moments, fused": lambda: mlp(memory="moments", fused=True),
    "moments": lambda: mlp(memory="moments"),
    "finite": lambda: mlp().sample(16),
    "kernel": lambda: KernelMLP(4, 3, ReLUKernel(2)),
    "convolutions": lambda: InfPiConvNet(channels=1, classes=3, ranks=(3, 4), pools=(2,)),
}


def samples(name, number):
    generator = torch.Generator().manual_seed(number)
    shape = (1, 4, 4) if name == "convolutions" else (4,)
    x = torch.randn(SIZES[number], *shape, generator=generator)
    return x, torch.randint(3, (len(x),), generator=generator)


def trained(name, rank=0, size=1, adam=False):
    """The network after steps on this rank's share of each batch."""
    torch.manual_seed(5)
    net = NETWORKS[name]()
    kind = torch.optim.Adam if adam else PiSGD
    optimizer = kind(net.parameters(), lr=0.01 if adam else 0.3)
    inputs = InputFactors(net) if size > 1 and name != "moments" else None
    for number in range(len(SIZES)):
        x, y = samples(name, number)
        here = slice(rank * len(x) // size, (rank + 1) * len(x) // size)
        ids = torch.arange(len(x))[here]
        optimizer.zero_grad()
        if len(ids):
            with batch(ids):
                output = net(x[here])
            (F.cross_entropy(output, y[here]) * len(ids) / len(x)).backward()
        if size > 1:
            sum_gradients_(net, inputs=inputs)
        clip_grad_norm_(net, 0.4)
        optimizer.step()
    return net.state_dict()


def share_of_each(rank, size, folder):
    for name in NETWORKS:
        state = trained(name, rank, size)
        torch.save(without_text(state), f"{folder}/{name}-{rank}.pt")
    state = trained("moments, fused", rank, size, adam=True)
    torch.save(without_text(state), f"{folder}/adam-{rank}.pt")
    chosen_by_size(size)
    none_stays_none(rank)
    with pytest.raises(RuntimeError, match="sharded: every rank sees the whole batch"):
        sum_gradients_(shard_rows(mlp()))


def without_text(state):
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def chosen_by_size(size):
    """Factors of few samples, ∂V of many."""
    received = {}
    for samples_here in (2, 4000):
        net = InfMLP(200, 40, 40, 0, memory="moments", fused=True, bias_alpha=0)
        inputs = InputFactors(net)
        F.cross_entropy(
            net(torch.randn(samples_here, 200)), torch.ones(samples_here).long()
        ).backward()
        with counted() as traffic:
            sum_gradients_(net, inputs=inputs)
        received[samples_here] = traffic.bytes
        assert net.layers[1].V.in_factors == (samples_here == 2)
    header, others = 8 * 2 * (size - 1), size - 1
    assert received[2] == header + 4 * 2 * (200 + 40 + 40 + 40) * others
    numbers = net.layers[0].A.numel() + net.layers[1].V.numel()
    assert received[4000] == header + 4 * 2 * others / size * numbers


def none_stays_none(rank):
    """A gradient of one rank reaches the others; one of no rank is none, which Adam passes over."""
    net = torch.nn.ModuleList(torch.nn.Linear(2, 2, bias=False) for _ in range(3))
    if rank == 1:
        net[0](torch.ones(1, 2)).sum().backward()
    net[2].requires_grad_(False)
    sum_gradients_(net)
    assert net[0].weight.grad.tolist() == [[1, 1], [1, 1]]
    assert net[1].weight.grad is None and net[2].weight.grad is None


def compare(folder, size):
    for name in (*NETWORKS, "adam"):
        adam = name == "adam"
        expected = trained("moments, fused" if adam else name, adam=adam)
        found = [
            torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(size)
        ]
        for entry, value in without_text(expected).items():
            assert all(torch.equal(found[0][entry], other[entry]) for other in found), (name, entry)
            if not entry.endswith(("_raw", "_factors")):
                torch.testing.assert_close(found[0][entry], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("size", [2, 3])
def test_shares_of_a_batch_train_one_network(tmp_path, size):
    assert started(share_of_each, size, tmp_path) == [0] * size
    compare(tmp_path, size)


def write_snapshot(rank, size, folder):
    net, optimizer = build()
    step(net, optimizer, 0)
    shard_rows(net, optimizer=optimizer)
    step(net, optimizer, 1)
    state = sharded_snapshot(net, optimizer, told=3)
    if rank == 0:
        save(state, f"{folder}/{size}.pt")
    else:
        assert state["model"]["layers.1.A"] is None
    step(net, optimizer, 2)  # goes on
    assert net.layers[1].shard.total == 6 + 3 * 5
    dist.barrier()


@pytest.mark.parametrize("size", [2, 3])
def test_a_snapshot_of_sharded_rows_is_that_of_one_process(tmp_path, size):
    assert started(write_snapshot, size, tmp_path) == [0] * size
    net, optimizer = build()
    losses = [step(net, optimizer, number) for number in range(2)]
    expected = snapshot(net, optimizer)
    found = torch.load(tmp_path / f"{size}.pt", weights_only=True)
    assert found["structure"] == expected["structure"]
    other, its_optimizer = build()
    assert restore(other, found, its_optimizer) == {"told": 3}
    losses = [step(*pair, 2) for pair in ((net, optimizer), (other, its_optimizer))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name in ("A", "Amult", "B", "origin"):
        pair = (getattr(each.layers[2], name).detach() for each in (net, other))
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)


def in_columns(rank, size, folder):
    """V shared out by columns by torch's own FSDP, as PARALLEL.md says."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, init_device_mesh

    def columns(p):
        return Shard(1) if p.ndim == 2 and p.shape[1] % size == 0 else Shard(0)

    net, mesh = even_network(), init_device_mesh("cpu", (size,))
    for layer in net.layers:
        fully_shard(layer, mesh=mesh, shard_placement_fn=columns)
    fully_shard(net, mesh=mesh, shard_placement_fn=columns)
    assert net.layers[1].V.to_local().shape == (net.layers[1].P, 4 // size)
    steps_of_adam(net, slice(rank, None, size))
    full = {name: value.full_tensor() for name, value in net.named_parameters()}
    torch.save(full, f"{folder}/{rank}.pt")


def even_network():
    torch.manual_seed(5)
    return InfMLP(4, 3, 4, 1, memory="moments")


def steps_of_adam(net, here):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 4, generator=generator), torch.arange(6) % 3
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(x[here]), y[here]).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()


@pytest.mark.slow
def test_moments_shared_out_by_columns(tmp_path):
    assert started(in_columns, 2, tmp_path) == [0, 0]
    net = even_network()
    steps_of_adam(net, slice(None))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in net.named_parameters():
            torch.testing.assert_close(found[name], value.detach(), rtol=1e-5, atol=1e-6)
