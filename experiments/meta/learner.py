"""What is meta-learned: the network or kernel machine of a run, one meta-step, and the test of an
adapted network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pilimit_lib.inf import FinPiMLPSample, InfMLP, PiSGD, clip_grad_norm_, param_groups
from pilimit_lib.inf.gp import KernelMLP, ReLUKernel
from pilimit_lib.inf.meta import (
    Adapted,
    TaskLoss,
    adapt,
    cross_entropy,
    mse,
    readout_kernel,
    smooth_l1,
)
from pilimit_lib.inf.numerics import direction

from ..training.distributed import ALONE, Ranks
from ..training.flags import milestones
from ..training.process import seed_everything, shows_bars
from .episodes import Batch, Classes, Episodes, Sinusoids
from .omniglot import load_omniglot
from .settings import DTYPES, Settings


def dtype_of(settings: Settings) -> torch.dtype:
    """Of everything but rows."""
    return getattr(torch, DTYPES[settings.dtype])


def tasks(
    settings: Settings, split: str, seed: int, quiet: bool = False, batch_size: int | None = None
) -> Episodes | Sinusoids:
    """The stream of batches of one split ('train', 'val', 'test'); sinusoids have no split but the
    seed."""
    s, size = settings, batch_size or settings.batch_size
    if s.dataset == "sinusoid":
        return Sinusoids(s.num_shots, s.num_shots_test, size, seed, dtype_of(s))
    rotations = not (s.unrotated_test and split == "test")
    classes = Classes(load_omniglot(s.folder, split, quiet), rotations)
    return Episodes(
        classes, s.num_ways, s.num_shots, s.num_shots_test, size, seed, s.ink, dtype_of(s)
    )


@dataclass(frozen=True)
class OfDirections:
    """A kernel of the directions of samples, all scaled to the length √d: what layer norm is to
    learners without layers."""

    kernel: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.kernel(*(direction(side)[0] * side.shape[1] ** 0.5 for side in (x, y)))


def build(settings: Settings, device: torch.device) -> nn.Module:
    """The learner that the settings describe, freshly initialised from the seed."""
    seed_everything(settings.seed)
    s, dtype = settings, dtype_of(settings)
    d, o = (1, 1) if s.dataset == "sinusoid" else (28 * 28, s.num_ways)
    if s.kernel:
        hidden = s.hidden_layers
        lrw = (s.first_layer_lr_mult, *[1.0] * (hidden - 1), s.last_layer_lr_mult or 1.0)
        kernel = ReLUKernel(hidden, s.kernel == "ntk", s.varw, s.varb, lrw)
        net: nn.Module = KernelMLP(
            d, o, OfDirections(kernel) if s.normalize == "LN" else kernel, dtype=dtype
        )
    else:
        # On a GPU rows are half as long, as the original's; on the CPU half precision is slow, and
        # moments need their digits.
        row_dtype = (
            torch.float16
            if s.dtype == "float16" and device.type == "cuda" and s.memory == "rows"
            else dtype
        )
        moments = s.infinite and s.memory == "moments"
        fused = (
            moments
            and not s.meta_momentum
            and s.optimizer == "sgd"
            and (s.first_order or s.adapt_readout_only)
        )
        net = InfMLP(
            d,
            o,
            s.infnet_r,
            s.depth - 1,
            s.first_layer_alpha,
            1,
            s.bias_alpha,
            s.last_bias_alpha,
            s.normalize == "LN",
            dtype=dtype,
            row_dtype=row_dtype,
            memory="moments" if moments else "rows",
            degree=s.degree,
            fit=s.fit,
            fused=fused,
        )
        if not s.infinite:
            net = net.sample(s.hidden_size)
            if s.mu_init:
                net.gaussian_init_()
            for layer in net.layers[:-1]:
                layer.project = s.Gproj_outer and not s.mu_init
    return net.to(device)


def hold_fixed(settings: Settings, net: nn.Module) -> None:
    """What the meta-optimiser doesn't learn gets no gradient, so that it costs nothing and no norm
    counts it."""
    last = len(net.layers) - 1
    # a network of one layer has a readout only, so the last entry wins
    mults = {0: settings.first_layer_lr_mult} | {last: settings.last_layer_lr_mult}
    for number, layer in enumerate(net.layers):
        learned = number == last or not settings.train_last_layer_only
        for name, parameter in layer.named_parameters():
            mult = settings.bias_lr_mult if name == "bias" else mults.get(number, 1)
            parameter.requires_grad_(bool(mult) and learned)


def optimizer_of(settings: Settings, net: nn.Module) -> torch.optim.Optimizer:
    s = settings
    if isinstance(net, KernelMLP):
        return PiSGD(
            [{"params": list(net.parameters()), "lr": s.meta_lr * s.last_layer_lr_mult}],
            lr=s.meta_lr,
            momentum=s.meta_momentum,
        )
    groups = param_groups(
        net, s.meta_lr, 0, s.first_layer_lr_mult, s.last_layer_lr_mult, s.bias_lr_mult
    )
    if s.optimizer == "adam":
        return torch.optim.Adam(groups, lr=s.meta_lr, fused=True)
    return PiSGD(groups, lr=s.meta_lr, momentum=s.meta_momentum)


def scheduler_of(
    settings: Settings, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Schedules advance with every batch; milestones and the ratio of 'exp' are in epochs."""
    s, schedulers = settings, torch.optim.lr_scheduler
    total = s.num_epochs * s.num_batches
    if s.scheduler == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, total)
    if s.scheduler == "linear":
        return schedulers.LinearLR(optimizer, 1, 1e-8, total)
    if s.scheduler == "exp":
        return schedulers.ExponentialLR(optimizer, s.lr_drop_ratio ** (1 / s.num_batches))
    if s.scheduler == "multistep":
        return schedulers.MultiStepLR(
            optimizer,
            [m * s.num_batches for m in milestones(s.lr_drop_milestones)],
            s.lr_drop_ratio,
        )
    return None


def losses_of(settings: Settings) -> tuple[TaskLoss, TaskLoss]:
    """(of inner steps, of queries): the training loss can be another one, the query loss is the
    task's own."""
    own = mse if settings.dataset == "sinusoid" else cross_entropy
    if settings.train_loss_function == "None":
        return own, own
    if own is cross_entropy:
        return lambda out, y: smooth_l1(out, F.one_hot(y, out.shape[-1]).to(out)), own
    return smooth_l1, own


def adapted_to(
    settings: Settings, net: nn.Module, batch: Batch, learn: bool, steps: int | None = None
) -> Adapted:
    """The network after the inner steps on the support sets of a batch; on the tape where it shall
    `learn` by second order."""
    s = settings
    return adapt(
        net,
        *batch["train"],
        step_size=s.step_size,
        steps=s.num_steps if steps is None else steps,
        loss=losses_of(s)[0],
        readout_only=s.adapt_readout_only,
        body_only=s.no_adapt_readout,
        second_order=learn and not s.first_order,
        project=s.Gproj_inner and not s.mu_init,
    )


def placed(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """A batch on the device, samples as vectors: torchmeta's own may still be images."""
    return {
        side: (
            x.to(device, dtype).flatten(2),
            (y.to(device, dtype) if y.is_floating_point() else y.to(device)),
        )
        for side, (x, y) in ((side, batch[side]) for side in ("train", "test"))
    }


def meta_step(
    settings: Settings,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """One step of the meta-optimiser on the query loss of a batch; the mean of that loss and the
    accuracy before the step, as far as the tasks of this process add to them."""
    optimizer.zero_grad()
    count = len(batch["test"][1])
    here = ranks.share(count)
    share = len(batch["test"][1][here]) / count
    found = {}
    if share:
        mine = {side: (x[here], y[here]) for side, (x, y) in batch.items()}
        outputs = adapted_to(settings, net, mine, learn=True)(mine["test"][0])
        losses = losses_of(settings)[1](outputs, mine["test"][1])
        loss = losses.mean()
        if loss.requires_grad:  # a kernel learner whose readout is fixed has nothing to learn
            (losses.sum() if settings.sum_tasks else loss * share).backward()
        found = {"loss": loss.item(), **accuracy(settings, outputs, mine["test"][1])}
    if any(parameter.requires_grad for parameter in net.parameters()):
        ranks.sum_gradients(net)
        if settings.grad_clip > 0:
            clip_grad_norm_(net, settings.grad_clip, settings.gclip_per_param)
        optimizer.step()
    return {name: value * share for name, value in found.items()}


def accuracy(settings: Settings, outputs: Tensor, y: Tensor) -> dict[str, float]:
    return (
        {}
        if settings.dataset == "sinusoid"
        else {"acc": (outputs.argmax(-1) == y).double().mean().item()}
    )


@torch.no_grad()
def nilmax(net: nn.Module, batch: Batch, regression: bool, reg: float = 1e-6) -> Tensor:
    """Outputs without inner steps, from the readout's kernel alone.

    For each class the mean inner product with its support samples; for regression, kernel ridge
    regression on the support set.
    """
    (x, y), (query, _) = batch["train"], batch["test"]
    cross = readout_kernel(net, query, x)
    if not regression:
        members = F.one_hot(y).to(cross)
        return cross @ (members / members.sum(1, keepdim=True))
    own = readout_kernel(net, x, x)
    ridge = (
        reg * own.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(x.shape[1]).to(own)
    )
    return cross @ torch.linalg.solve(own + ridge, y)


def evaluate(
    settings: Settings,
    net: nn.Module,
    batches: Iterable[Batch],
    count: int,
    device: torch.device,
    quiet: bool = True,
    steps: int | None = None,
    without_steps: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Mean query loss and accuracy over `count` batches of tasks, and half the width of a 95 %
    interval (of one task None). Batches are shared out over the processes."""
    per_task: dict[str, list[Tensor]] = {"loss": [], "acc": []}
    here = range(count)[ranks.share(count)]
    for number, batch in tqdm(
        enumerate(islice(batches, count)),
        total=count,
        desc="testing",
        leave=False,
        disable=not shows_bars(quiet),
    ):
        if number not in here:
            continue
        batch = placed(batch, device, dtype_of(settings))
        y = batch["test"][1]
        if without_steps:
            outputs = nilmax(net, batch, settings.dataset == "sinusoid")
        else:
            adapted = adapted_to(settings, net, batch, learn=False, steps=steps)
            with torch.no_grad():
                outputs = adapted(batch["test"][0])
        per_task["loss"].append(losses_of(settings)[1](outputs, y))
        if settings.dataset != "sinusoid":
            per_task["acc"].append((outputs.argmax(-1) == y).double().mean(1))
    found: dict[str, Any] = {}
    for name, parts in per_task.items():
        if name == "loss" or settings.dataset != "sinusoid":
            none = torch.zeros(0, dtype=torch.float64, device=device)
            values = ranks.joined(torch.cat(parts).double() if parts else none)
            found |= {
                name: values.mean().item(),
                "tasks": len(values),
                f"{name}_ci95": 1.96 * values.std().item() / math.sqrt(len(values))
                if len(values) > 1
                else None,
            }
    return found


def size_of(net: nn.Module) -> dict[str, int]:
    """Rows (0 of a finite network) and bytes, for the tables."""
    if isinstance(net, FinPiMLPSample):
        return {"rows": 0, "bytes": sum(p.numel() * p.element_size() for p in net.parameters())}
    return {"rows": sum(net.rows), "bytes": net.row_bytes}
