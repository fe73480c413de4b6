"""A dendrite that begins where its outgoing weight gets the largest gradient (after GradMax: Evci,
van Merriënboer, Unterthiner, Vladymyrov & Pedregosa 2022, arXiv 2201.05125).

With the error e_in = ∂L/∂y_in at sample or position n, the outgoing weight w_i, zero at birth, gets
the gradient Σ_n e_in σ(u·x_n + s). GradMax takes σ to first order and the direction u that makes
its norm largest: a singular vector of Σ_n e_n x_nᵀ. A dendrite adds to the neuron that sees the
same input, so that this matrix is the gradient of the neurons' own weights, and vanishes where they
have converged, which is when dendrites grow. Hence σ to second order:

    ∂L/∂w_i ≈ σ''(s)/2 · Σ_n e_in (u·x_n)² = N σ''(s)/2 · uᵀ M_i u      M_i = 1/N Σ_n e_in x_n x_nᵀ

Inputs are centred and whitened, x [N r] within their leading principal components, so that |u| = 1
means a pre-activation of unit variance; of the errors, what a constant and a linear map of x
explain is left out. The largest |uᵀ M_i u| is the largest singular value of M_i, at its singular
vector. The sign of u and the shift s are those with the largest gradient for one standard deviation
of the activation, σ as it is.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .dendrite import Dendrite
from .initial import is_norm
from .layer import DendriticLayer
from .standardise import RESCALED

VARIANCE = 0.95  # share that the principal components hold: whitened, the rest would be noise
RANK = 64  # of them at most, and a quarter of the rows
ROWS = 1024  # samples or positions that a batch gives at most
SHIFTS = torch.linspace(-2, 2, 9, dtype=torch.float64)


class Whitened(NamedTuple):
    """Rows [N r] of unit covariance; ``rows = (x − mean) @ basis`` for inputs x [N d]."""

    rows: Tensor
    mean: Tensor
    basis: Tensor


def whiten(x: Tensor, share: float = VARIANCE) -> Whitened:
    """Inputs [N d] in the principal components that hold a share of their variance."""
    mean = x.mean(0)
    centred = x - mean
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(x))
    variances, axes = variances.flip(0), axes.flip(1)
    total = variances.clamp_min(0).sum()
    before = variances.cumsum(0) - variances  # held by larger ones
    kept = (before < share * total) & (variances > variances[0] * 1e-9)
    kept[min(RANK, len(x) // 4) :] = False
    basis = axes[:, kept] * variances[kept].rsqrt()
    return Whitened(centred @ basis, mean, basis)


def unexplained(e: Tensor, rows: Tensor) -> Tensor:
    """Errors [N o] without what a constant and a linear map of white rows [N r] explain."""
    e = e - e.mean(0)
    return e - rows @ (rows.T @ e) / len(rows)


def directions(rows: Tensor, e: Tensor, order: int = 0) -> Tensor:
    """Unit vectors [o r]: the singular vector of each M_i, of the largest singular value but
    ``order``."""
    found = []
    for error in e.unbind(1):
        values, vectors = torch.linalg.eigh((rows * error[:, None]).T @ rows / len(rows))
        ranked = values.abs().argsort(descending=True, stable=True)
        found.append(vectors[:, ranked[order % len(ranked)]])
    u = torch.stack(found)
    largest = u.gather(1, u.abs().argmax(1, keepdim=True))
    return u * largest.sign()  # the same on every machine


def signs_and_shifts(
    z: Tensor, e: Tensor, activate: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Sign and shift s [o] with the largest |Σ_n e σ(±z + s)| / std σ, for pre-activations and
    errors [N o]."""
    choices = [(sign, shift) for shift in SHIFTS for sign in (1.0, -1.0)]
    strengths = []
    for sign, shift in choices:
        a = activate(sign * z + shift)
        strengths.append((e * a).sum(0).abs() / a.std(0, correction=0).clamp_min(1e-12))
    best = torch.stack(strengths).nan_to_num(0.0).argmax(0)
    table = torch.tensor(choices, dtype=z.dtype, device=z.device)[best]
    return table[:, 0], table[:, 1]


def linear_part(body: nn.Module) -> tuple[nn.Module, nn.Module | None] | None:
    """The layer whose weight is the direction, and the batch norm behind it if there is one; None
    for other bodies."""
    parts = list(body) if isinstance(body, nn.Sequential) else [body]
    if not 1 <= len(parts) <= 2 or type(parts[0]) not in RESCALED:
        return None
    if getattr(parts[0], "groups", 1) != 1:
        return None
    norm = parts[1] if len(parts) == 2 else None
    by_neuron = norm is None or (
        is_norm(norm) and isinstance(norm, nn.modules.batchnorm._BatchNorm)
    )
    return (parts[0], norm) if by_neuron else None


def patches(layer: nn.Module, x: Tensor, axis: int) -> Tensor:
    """What each output of a linear or convolutional layer is a linear map of: [N d]."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, layer.in_features)
    fan_in = layer.weight[0].numel()
    eye = torch.eye(fan_in, dtype=x.dtype, device=x.device).view(-1, *layer.weight.shape[1:])
    return layer._conv_forward(x, eye, None).movedim(axis, -1).reshape(-1, fan_in)


class ErrorRows:
    """A watcher that gathers the inputs x [N d] of a layer's linear part and the errors e [N o] at
    its output, at most ROWS of a batch; rows that are not finite count for nothing."""

    def __init__(self, layer: DendriticLayer, part: nn.Module):
        self.layer, self.part = layer, part
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.x: list[Tensor] = []
        self.e: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(0)  # which rows; nobody else's numbers

    def __call__(self, y: Tensor, args: tuple, kwargs: dict) -> Tensor:
        probe = torch.zeros_like(y, requires_grad=True)
        self.seen.append((probe, (args[0] if args else kwargs["input"]).detach()))
        return y + probe

    def take(self, x: Tensor, error: Tensor) -> None:
        axis = self.layer.axis
        with torch.no_grad():
            x = patches(self.part, x.to(self.part.weight), axis)
        e = error.movedim(axis, -1).reshape(-1, error.shape[axis])
        if len(e) > ROWS:
            some = torch.randperm(len(e), generator=self.generator)[:ROWS].to(e.device)
            x, e = x[some], e[some]
        finite = x.isfinite().all(1) & e.isfinite().all(1)
        self.x.append(x[finite].double())
        self.e.append(e[finite].double())


@torch.no_grad()
def begin(
    dendrite: Dendrite,
    x: Tensor,
    e: Tensor,
    activate: Callable[[Tensor], Tensor],
    order: int = 0,
) -> bool:
    """Give a new dendrite its direction, from inputs [N d] and errors [N o]; False, and nothing
    changed, where they tell none apart."""
    layer, norm = linear_part(dendrite.body)
    if len(x) == 0:
        return False
    white = whiten(x)
    e = unexplained(e, white.rows)
    if white.rows.shape[1] == 0 or not e.any():
        return False
    u = directions(white.rows, e, order)
    signs, shifts = signs_and_shifts(white.rows @ u.T, e, activate)
    weight = (signs[:, None] * u) @ white.basis.T
    layer.weight.copy_(weight.view_as(layer.weight))
    bias = layer.bias if norm is None else norm.bias
    if bias is not None:
        bias.copy_(shifts if norm is not None else shifts - weight @ white.mean)
    dendrite.shifts = None
    return True
