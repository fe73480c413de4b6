"""Growth in several processes: rank 0 decides, and new weights agree. Without torch.distributed
everything here does nothing."""

import inspect

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

DDP_ARGUMENTS = (
    "device_ids",
    "output_device",
    "dim",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
    "process_group",
)
BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


def active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this process is the one that decides and writes files."""
    return not active() or dist.get_rank() == 0


def agree(
    values: list[float], reduce: str = "rank0", device: torch.device | None = None
) -> list[float]:
    """The same numbers on every rank: those of rank 0, or the mean."""
    if not active():
        return values
    on = device if device is not None and dist.get_backend() == "nccl" else torch.device("cpu")
    tensor = torch.tensor(values, dtype=torch.float64, device=on)
    if reduce == "mean":
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    else:
        dist.broadcast(tensor, src=0)
    return tensor.tolist()


def initial_seed() -> int:
    """The seed that torch started with, the same on every rank."""
    halves = divmod(torch.initial_seed(), 1 << 32)
    high, low = (int(v) for v in agree([float(h) for h in halves]))
    return (high << 32) + low


def synchronise(network: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    if active():
        with torch.no_grad():
            for tensor in (*network.parameters(), *network.buffers()):
                dist.broadcast(tensor.detach(), src=0)


def wait() -> None:
    if active():
        dist.barrier()


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel or torch.compile."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif "_orig_mod" in getattr(model, "_modules", {}):
            model = model._orig_mod
        else:
            return model


def rewrap(model: nn.Module, network: nn.Module) -> nn.Module:
    """Wrap a network that has changed as ``model`` was wrapped: DDP registers parameters once, when
    it is built.

    A compiled model stays the same object: it compiles anew by itself when the network has changed.
    """
    if isinstance(model, DistributedDataParallel):
        kwargs = {
            name: getattr(model, name) for name in (*DDP_ARGUMENTS, BUFFERS) if hasattr(model, name)
        }
        return DistributedDataParallel(network, **kwargs)
    if isinstance(model, DataParallel):
        known = {
            name: getattr(model, name)
            for name in ("device_ids", "output_device", "dim")
            if hasattr(model, name)
        }
        return (
            DataParallel(network, **known) if model.device_ids else DataParallel(network)
        )  # without devices it only passes calls on
    return model if "_orig_mod" in model._modules else network
