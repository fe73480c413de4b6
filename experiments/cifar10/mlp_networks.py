"""The networks of `cifar10mlp` with their optimisers, schedules and losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pilimit_lib.inf import InfMLP, PiSGD, param_groups

from ..training.distributed import ALONE, Ranks
from ..training.flags import milestones
from ..training.images import ImageSet
from ..training.process import seed_everything
from .settings import Settings


def build(settings: Settings, data: ImageSet, device: torch.device) -> nn.Module:
    """The network that the settings describe, freshly initialised from the seed."""
    s = settings
    seed_everything(s.seed)
    # On a GPU rows are kept in half precision, as the original does, unless --float is given; sums
    # are float32 always. Moments are a sum that goes on growing, in which float16 loses small steps
    # and Adam's overflow.
    half = device.type == "cuda" and not s.float and s.memory == "rows"
    # Each step's update is added at once where nothing else asks for the gradient.
    plain_sgd = s.optimizer == "sgd" and not s.momentum
    net: nn.Module = InfMLP(
        data.features,
        data.classes,
        s.r,
        s.depth,
        s.first_layer_alpha,
        s.last_layer_alpha,
        s.bias_alpha,
        s.last_bias_alpha,
        s.layernorm,
        row_dtype=torch.float16 if half else torch.float32,
        memory=s.memory,
        degree=s.degree,
        fit=s.fit,
        activation=s.activation,
        row_budget=s.row_budget,
        merge=s.merge,
        fused=s.memory == "moments" and s.row_budget is None and plain_sgd,
    )
    if s.width:
        net = net.sample(s.width)
        if s.gaussian_init:
            net.gaussian_init_()
    return net.to(device)


def optimizer_of(settings: Settings, net: nn.Module) -> torch.optim.Optimizer:
    s = settings
    groups = param_groups(
        net,
        s.lr,
        s.wd,
        s.first_layer_lr_mult,
        s.last_layer_lr_mult,
        s.bias_lr_mult,
        not s.no_apply_lr_mult_to_wd,
    )
    if s.optimizer == "sgd":
        # without momentum torch's fused kernel makes the same numbers in one pass
        return PiSGD(groups, lr=s.lr, momentum=s.momentum, fused=None if s.momentum else True)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[s.optimizer]
    return kind(groups, lr=s.lr, fused=True)


def scheduler_of(
    settings: Settings, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Schedules advance with every epoch."""
    s, schedulers = settings, torch.optim.lr_scheduler
    if s.scheduler == "multistep":
        return schedulers.MultiStepLR(optimizer, milestones(s.lr_drop_milestones), s.lr_drop_ratio)
    if s.scheduler == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, s.epochs)
    return None


def loss_of(
    settings: Settings,
    output: Tensor,
    y: Tensor,
    teacher_output: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy, or mean squared error to centred one-hot labels; mixed with the teacher's soft
    labels where there is one."""
    if settings.loss == "xent":
        loss = F.cross_entropy(output, y, label_smoothing=label_smoothing)
    else:
        classes = output.shape[1]
        loss = F.mse_loss(output, F.one_hot(y, classes).to(output) - 1 / classes)
    if teacher_output is not None:
        t = settings.teacher_temp
        logs = (F.log_softmax(logits / t, 1) for logits in (output, teacher_output))
        soft = F.kl_div(*logs, reduction="batchmean", log_target=True)
        loss = (1 - settings.teacher_alpha) * loss + settings.teacher_alpha * t * t * soft
    return loss


@torch.no_grad()
def evaluate(
    net: nn.Module, x: Tensor, y: Tensor, settings: Settings, ranks: Ranks = ALONE
) -> tuple[float, float]:
    """(mean loss, accuracy as a fraction) over all images, shared out over the processes."""
    loss, correct, size = 0.0, 0, settings.test_batch_size
    parts = list(zip(x.split(size), y.split(size)))
    for part, labels in parts[ranks.share(len(parts))]:
        output = net(part.flatten(1))
        loss += loss_of(settings, output, labels).item() * len(labels)
        correct += (output.argmax(1) == labels).sum().item()
    loss, correct = ranks.total([loss, correct])
    return loss / len(x), correct / len(x)
