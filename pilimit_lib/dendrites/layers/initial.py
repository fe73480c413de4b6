"""How a dendrite begins: the neurons' architecture with fresh weights."""

import copy
import hashlib

import torch
from torch import Tensor, nn


def generator_for(seed: int, layer: str, generation: int, attempt: int) -> torch.Generator:
    """Random numbers that depend on nothing else: not on the device, the rank, or what was drawn
    before."""
    digest = hashlib.blake2b(
        f"{seed}|{layer}|{generation}|{attempt}".encode(), digest_size=8
    ).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def reference_parameter(neuron: nn.Module, name: str) -> Tensor:
    """The parameter whose device and dtype dendrites take over."""
    for parameter in neuron.parameters():
        if parameter.is_floating_point():
            return parameter
    raise ValueError(
        f"layer '{name}' ({type(neuron).__name__}) has no parameters, so dendrites of its kind "
        "could not learn; do not convert it"
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: its gain starts at one, never at noise."""
    return (
        isinstance(module, nn.modules.batchnorm._NormBase)
        or "norm" in type(module).__name__.lower()
    )


def fresh_copy(
    neuron: nn.Module, generator: torch.Generator | None, scale: float, by_main: bool
) -> nn.Module:
    """The same architecture with parameters N(0, 1)·scale (· mean |θ| of the neurons); norm layers
    start neutral.

    Without a generator the contents are zero: they are about to be overwritten. Drawn on the CPU in
    order of the parameters' names, so that devices and ranks agree.
    """
    body = copy.deepcopy(neuron)
    if by_main:
        values = torch.cat(
            [p.detach().abs().flatten() for p in neuron.parameters() if p.is_floating_point()]
        )
        scale = scale * values.mean().item()
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
            parameter.grad = None
            if not parameter.is_floating_point():
                continue
            if generator is None:
                parameter.zero_()
            else:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator, dtype=torch.float64).mul_(
                        scale
                    )
                )
        for module in body.modules():
            if is_norm(module):
                _neutral(module)
    return body


def _neutral(norm: nn.Module) -> None:
    if hasattr(norm, "reset_running_stats"):
        norm.reset_running_stats()
    for name, parameter in norm.named_parameters(recurse=False):
        parameter.fill_(1.0 if "weight" in name or "gain" in name or "scale" in name else 0.0)
