"""Dendrites that learn to correlate with the error: cascade correlation.

Our reading of Fahlman & Lebiere 1990 ("The cascade-correlation learning architecture") and of the
abstract of arXiv 2501.18018; the authors of the latter may do otherwise in detail. With E_in =
∂L/∂y_in, the error that reaches neuron i at sample or position n,

    C_i = Σ_n (a_in − ā_i)(E_in − Ē_i)       ∂|C_i|/∂a_in ≈ s_i (E_in − Ē_i),   s_i the sign of C_i

A candidate maximises Σ_i |C_i|: `tap` lets y pass unchanged and, in the backward pass, gives the
candidate's activation the gradient of −Σ_i |C_i|, which is as large as the errors are (a gradient
scaler divides it by its scale like any other). Means and signs are running averages over batches.
Neurons are frozen meanwhile, and nothing flows from a dendrite to earlier layers.

The score that is reported and decides is free of the loss's units, of its scale and of the batch
size: S_i = |C_i| / (N std_n E_in), how far the activation moves with one standard deviation of the
error. A candidate that has learnt nothing stays below .001.

A batch that is not finite (gradient scalers make one by design) is passed over by all averages; its
gradients are handed on as they are, for the scaler must see them.
"""

import torch
from torch import Tensor, nn

MOMENTUM = 0.1  # weight of a new batch in the running averages
AVERAGES = ("mean_a", "mean_e", "covariance")
SUMS = ("sum_a", "sum_e", "sum_ae", "sum_ee")


class CorrelationStats(nn.Module):
    """Running averages that the gradient needs, and the sums over an epoch that give the score.
    Buffers, so that they are saved."""

    def __init__(self, neurons: int, like: Tensor):
        super().__init__()
        for name in (*AVERAGES, *SUMS):
            zeros = torch.zeros(neurons, dtype=torch.float64, device=like.device)
            self.register_buffer(name, zeros)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64, device=like.device))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long, device=like.device))

    @torch.no_grad()
    def update(self, a: Tensor, e: Tensor) -> None:
        """Take in a batch: activations and errors [N n]; nothing, where one is not finite."""
        finite = a.isfinite().all() & e.isfinite().all()
        a, e = (torch.where(finite, t, 0.0) for t in (a, e))
        weight = torch.where(self.batches == 0, 1.0, MOMENTUM) * finite
        self.mean_a += weight * (a.mean(0) - self.mean_a)
        self.mean_e += weight * (e.mean(0) - self.mean_e)
        batch_covariance = ((a - self.mean_a) * (e - self.mean_e)).sum(0)
        self.covariance += weight * (batch_covariance - self.covariance)
        self.batches += finite
        self.sum_a += a.sum(0)
        self.sum_e += e.sum(0)
        self.sum_ae += (a * e).sum(0)
        self.sum_ee += (e * e).sum(0)
        self.count += len(a) * finite

    @torch.no_grad()
    def take_scores(self) -> Tensor:
        """S_i [n] over the batches since the last call."""
        count = self.count.clamp_min(1)
        covariance = (self.sum_ae - self.sum_a * self.sum_e / count).abs()
        variance = self.sum_ee - self.sum_e.square() / count
        scores = torch.where(variance > 0, covariance / (count * variance).sqrt(), 0.0)
        for total in (*(getattr(self, name) for name in SUMS), self.count):
            total.zero_()
        return scores

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # files written before the score was free of units; sums are zero where epochs end
        state_dict.setdefault(f"{prefix}sum_ee", torch.zeros_like(self.sum_ee))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


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
