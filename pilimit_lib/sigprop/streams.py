"""Both streams through one block, without one leaking into the other's batch statistics.

Running statistics belong to the input stream alone, because inference runs it alone. The target
stream is normalised by its own rows, in training and in evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core import batch, current_ids

# Modules that treat each row by itself, so that two streams in one call give what two calls give.
_ROWWISE = (
    nn.Sequential,
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.Upsample,
    nn.ZeroPad2d,
    nn.PixelShuffle,
    nn.ChannelShuffle,
    nn.RNN,
    nn.LSTM,
    nn.GRU,
)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def rowwise(module: nn.Module) -> bool:
    """Whether every part is known to treat rows one by one; a subclass is not known."""
    return all(
        type(m) in _ROWWISE or (type(m) in _INSTANCE_NORMS and not m.track_running_stats)
        for m in module.modules()
    )


def run(module: nn.Module, x: Tensor) -> Tensor:
    """One stream through a block: its output, for a recurrent layer that of every step."""
    if isinstance(module, nn.RNNBase) and not module.batch_first:
        raise ValueError(
            f"{type(module).__name__} must have batch_first=True: rows of the streams are samples"
        )
    out = module(x)
    if isinstance(module, nn.RNNBase):
        return out[0]
    if not isinstance(out, Tensor):
        raise TypeError(
            f"block {type(module).__name__} returned {type(out).__name__}, expected one tensor; "
            "wrap it in a module that returns the tensor to hand on"
        )
    return out


def run_both(
    module: nn.Module, h: Tensor, t: Tensor | None, fuse: bool | str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """Input and target stream through `module`: in one call if `fuse`, or if "auto" and every part
    is known to be rowwise.

    With batch norms inside one call is right as well, since they are kept apart, but joining and
    parting at each of them costs more than it saves on large feature maps: "auto" then makes two
    calls.
    """
    if t is None:
        return run(module, h), None
    if (
        h.shape[1:] == t.shape[1:]
        and h.dtype == t.dtype
        and (rowwise(module) if fuse == "auto" else fuse)
    ):
        return _fused(module, h, t)
    h1 = run(module, h)
    with _target_statistics(module, t):
        t1 = run(module, t) if len(t) == len(h) else _unnamed(module, t)
    return h1, t1


def _fused(module: nn.Module, h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    ids = current_ids()
    both = torch.cat([h, t])
    with _norms_apart(module, len(h)):
        if ids is None:
            out = run(module, both)
        elif len(ids) == len(t):
            with batch(torch.cat([ids, ids])):
                out = run(module, both)
        else:
            out = _unnamed(module, both)
    if len(out) != len(both):
        raise ValueError(
            f"block {type(module).__name__} made {len(out)} rows of {len(both)}; dimension 0 must "
            "stay the rows"
        )
    # split, not two slices: the gradient of a slice is a padded copy of the whole.
    return out.split([len(h), len(t)])


def _unnamed(module: nn.Module, x: Tensor) -> Tensor:
    with batch(None):  # rows of classes are no samples
        return run(module, x)


@contextmanager
def own_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms inside normalise by the rows at hand and leave their running statistics alone."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    before = [(m.training, m.track_running_stats) for m in norms]
    try:
        for m in norms:
            m.training, m.track_running_stats = True, False
        yield
    finally:
        for m, (training, track) in zip(norms, before):
            m.training, m.track_running_stats = training, track


def _target_statistics(module: nn.Module, t: Tensor):
    """Statistics of the target rows themselves. One row has none: in evaluation the running ones
    serve then, so that a last batch of one sample can be evaluated."""
    if len(t) == 1 and not module.training:
        return nullcontext()
    return own_statistics(module)


@contextmanager
def _norms_apart(module: nn.Module, rows: int) -> Iterator[None]:
    """Each batch norm inside sees the first `rows` rows as the input stream, the rest as the target
    stream."""
    norms = {m for m in module.modules() if isinstance(m, _BatchNorm)}

    def apart(norm: _BatchNorm):
        def forward(x: Tensor) -> Tensor:
            h, t = x.split([rows, len(x) - rows])
            h = type(norm).forward(norm, h)
            with _target_statistics(norm, t):
                return torch.cat([h, type(norm).forward(norm, t)])

        return forward

    try:
        for norm in norms:
            norm.forward = apart(norm)
        yield
    finally:
        for norm in norms:
            norm.__dict__.pop("forward", None)
