"""A dendrite that begins with pre-activations of unit variance, so that it is no constant.

N(0, 1)·0.01 as weights gives σ(z) = .50 ± .005 over samples, which the bias of the neurons gives
already. Here the first batch of training that the dendrite sees rescales its last layer: over
samples and positions, and over all ranks, z_i gets variance 1 and the mean s_i ~ N(0, 1), so that
σ bends both ways. Its weight w is zero then, so the network computes the same.
"""

import torch
from torch import Tensor, nn

from .. import distributed
from .initial import is_norm

RESCALED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def last_layer(body: nn.Module) -> nn.Module | None:
    """The layer whose output is the dendrite's pre-activation, where it can be rescaled."""
    while isinstance(body, nn.Sequential) and len(body):
        body = body[-1]
    affine_norm = is_norm(body) and getattr(body, "bias", None) is not None
    return body if type(body) in RESCALED or affine_norm else None


@torch.no_grad()
def standardise(body: nn.Module, z: Tensor, axis: int, shifts: Tensor) -> None:
    """Rescale the last layer by what it gave: z, with the neurons along ``axis``; shifts [n]."""
    layer = last_layer(body)
    rows = z.movedim(axis, -1).reshape(-1, z.shape[axis]).double()
    moments = torch.stack([rows.mean(0), rows.square().mean(0)])
    mean, square = torch.tensor(
        distributed.agree(moments.flatten().tolist(), "mean", z.device), dtype=torch.float64
    ).view(2, -1)
    scale = (square - mean.square()).clamp_min(1e-24).rsqrt()
    if is_norm(layer):
        layer.bias.copy_(shifts)
        return
    layer.weight.mul_(scale.to(layer.weight).view(-1, *[1] * (layer.weight.dim() - 1)))
    if layer.bias is not None:
        layer.bias.copy_((layer.bias.double().cpu() - mean) * scale + shifts)
