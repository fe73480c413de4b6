"""How a dendrite begins: the neurons' architecture with fresh weights."""

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
REMEDIES = {
    WeightNorm: "torch.nn.utils.remove_weight_norm(layer) and, to keep it, "
    "torch.nn.utils.parametrizations.weight_norm(layer)",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm(layer) and, to keep it, "
    "torch.nn.utils.parametrizations.spectral_norm(layer)",
    BasePruningMethod: "torch.nn.utils.prune.remove(layer, 'weight')",
}
POWER_ITERATIONS = 15


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


def check_copyable(neuron: nn.Module, name: str) -> None:
    """Refuse layers whose weight is no parameter but made by a hook before each forward pass: such
    a tensor can't be copied once it has a graph."""
    for module in neuron.modules():
        for hook in module._forward_pre_hooks.values():
            remedy = next((text for kind, text in REMEDIES.items() if isinstance(hook, kind)), None)
            if remedy is not None:
                raise TypeError(
                    f"layer '{name}' ({type(neuron).__name__}) can't have dendrites: a "
                    f"{type(hook).__name__} hook makes its '{_tensor_of(hook)}'. Before the "
                    f"conversion call {remedy}, or track the layer: "
                    f"DendriteConfig(track=['.{name}'])"
                )


def _tensor_of(hook) -> str:
    return getattr(hook, "name", None) or getattr(hook, "_tensor_name", "weight")


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: its gain starts at one, never at noise."""
    if type(module).__module__.startswith("torch.nn.utils"):
        return False  # of weights, not of activations
    return (
        isinstance(module, nn.modules.batchnorm._NormBase)
        or "norm" in type(module).__name__.lower()
    )


def fresh_copy(
    neuron: nn.Module, generator: torch.Generator | None, scale: float, by_main: bool
) -> nn.Module:
    """The same architecture with parameters N(0, 1)·scale (· mean |θ| of the neurons); norm layers
    start neutral, parametrised weights (weight norm, spectral norm) as those of that draw.

    Without a generator the contents are zero: they are about to be overwritten. Drawn on the CPU in
    order of the parameters' names, so that devices and ranks agree. Hooks stay with the neurons.
    """
    hooks = [vars(m)[name] for m in neuron.modules() for name in HOOKS]
    body = copy.deepcopy(neuron, {id(held): OrderedDict() for held in hooks})
    if by_main:
        values = torch.cat(
            [p.detach().abs().flatten() for p in neuron.parameters() if p.is_floating_point()]
        )
        scale = scale * values.mean().item()

    def drawn(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul_(scale)

    with torch.no_grad():
        for name, parameter in body.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point())
            parameter.grad = None
            if not parameter.is_floating_point():
                continue
            if generator is None:
                parameter.zero_()
            elif "parametrizations." not in name:
                parameter.copy_(drawn(parameter.shape))
        for module in body.modules():
            if is_norm(module):
                _neutral(module)
            if generator is not None and parametrize.is_parametrized(module):
                for name in module.parametrizations:
                    _assign(module, name, drawn)
    return body


def _assign(module: nn.Module, name: str, drawn: Callable[[torch.Size], Tensor]) -> None:
    """Give a parametrised tensor fresh contents."""
    weight = getattr(module, name)
    try:
        setattr(module, name, drawn(weight.shape).to(weight))
    except RuntimeError:  # a parametrisation of the user's without right_inverse
        for original in module.parametrizations[name].parameters():
            original.copy_(drawn(original.shape))
    was_training = module.training
    module.train()
    for _ in range(POWER_ITERATIONS):  # spectral norm estimates anew, one iteration a time
        getattr(module, name)
    module.train(was_training)


def _neutral(norm: nn.Module) -> None:
    if hasattr(norm, "reset_running_stats"):
        norm.reset_running_stats()
    for name, parameter in norm.named_parameters(recurse=False):
        parameter.fill_(1.0 if "weight" in name or "gain" in name or "scale" in name else 0.0)
