"""Dendrites that learn to correlate with the error: cascade correlation.

Our reading of Fahlman & Lebiere 1990 ("The cascade-correlation learning architecture") and of the
abstract of arXiv 2501.18018; the authors of the latter may do otherwise in detail. With E_in =
∂L/∂y_in, the error that reaches neuron i at sample or position n,

    S_i = |Σ_n (a_in − ā_i)(E_in − Ē_i)|       ∂S_i/∂a_in ≈ s_i (E_in − Ē_i)

with s_i the sign of the covariance.

A candidate maximises Σ_i S_i: `tap` lets y pass unchanged and, in the backward pass, gives the
candidate's activation the gradient of −S. Means and signs are running averages over batches.
Neurons are frozen meanwhile, and nothing flows from a dendrite to earlier layers.
"""

import torch
from torch import Tensor, nn

MOMENTUM = 0.1  # weight of a new batch in the running averages


class CorrelationStats(nn.Module):
    """Running averages that the gradient needs, and the sums over an epoch that give the score.
    Buffers, so that they are saved."""

    def __init__(self, neurons: int, like: Tensor):
        super().__init__()
        for name in ("mean_a", "mean_e", "covariance", "sum_a", "sum_e", "sum_ae"):
            self.register_buffer(
                name, torch.zeros(neurons, dtype=torch.float64, device=like.device)
            )
        self.register_buffer("count", torch.zeros((), dtype=torch.float64, device=like.device))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long, device=like.device))

    @torch.no_grad()
    def update(self, a: Tensor, e: Tensor) -> None:
        """Take in a batch: activations and errors [N n]."""
        weight = torch.where(self.batches == 0, 1.0, MOMENTUM)
        self.mean_a += weight * (a.mean(0) - self.mean_a)
        self.mean_e += weight * (e.mean(0) - self.mean_e)
        batch_covariance = ((a - self.mean_a) * (e - self.mean_e)).sum(0)
        self.covariance += weight * (batch_covariance - self.covariance)
        self.batches += 1
        self.sum_a += a.sum(0)
        self.sum_e += e.sum(0)
        self.sum_ae += (a * e).sum(0)
        self.count += len(a)

    @torch.no_grad()
    def take_scores(self) -> Tensor:
        """S_i [n] over the batches since the last call."""
        scores = (self.sum_ae - self.sum_a * self.sum_e / self.count.clamp_min(1)).abs()
        for total in (self.sum_a, self.sum_e, self.sum_ae, self.count):
            total.zero_()
        return scores


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, a, stats, axis, warmup):
        ctx.save_for_backward(a)
        ctx.stats, ctx.axis, ctx.warmup = stats, axis, warmup
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        (a,) = ctx.saved_tensors
        stats = ctx.stats
        neurons_last = [t.movedim(ctx.axis, -1) for t in (a, grad)]
        stats.update(*(t.reshape(-1, t.shape[-1]).double() for t in neurons_last))
        learning = (stats.batches > ctx.warmup).to(grad.dtype)
        error = neurons_last[1] - stats.mean_e.to(grad.dtype)
        grad_a = -(stats.covariance.sign().to(grad.dtype) * error * learning).movedim(-1, ctx.axis)
        return grad, grad_a.to(a.dtype), None, None, None


def tap(y: Tensor, a: Tensor, stats: CorrelationStats, axis: int, warmup: int = 0) -> Tensor:
    """y unchanged; in backward a receives −∂S/∂a instead of the task's gradient. The first
    ``warmup`` batches only gather averages."""
    return _Tap.apply(y, a, stats, axis, warmup)
