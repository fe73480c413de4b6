"""Losses of the paper's commands with their first derivative and their curvature, by hand. Means
over the batch.

Each is a pair: value_and_delta(out [b o], labels [b]) -> loss, ∂loss/∂out; curvature(out, labels, v
[b o]) -> (∂²loss/∂out²) v.
"""

import torch


def one_hot(labels, classes, center=True):
    """[b classes] targets in the dtype float64: 1 at the label, minus 1/classes everywhere when
    centred."""
    return torch.nn.functional.one_hot(labels.long(), classes).double() - (
        1 / classes if center else 0.0
    )


def xent(out, labels):
    """Cross entropy of the softmax of out with integer labels."""
    logp = out.log_softmax(1)
    b = torch.arange(out.shape[0], device=out.device)
    delta = logp.exp()
    delta[b, labels] -= 1
    return -logp[b, labels].mean(), delta / out.shape[0]


def xent_curvature(out, labels, v):
    p = out.softmax(1)
    return (p * v - p * (p * v).sum(1, keepdim=True)) / out.shape[0]


def mse(out, targets, offset=0.1):
    """Mean over all b·o numbers of (out − target)²; integer labels stand for one-hot targets minus
    `offset`."""
    if not targets.is_floating_point():
        targets = one_hot(targets, out.shape[1], center=False).to(out.dtype) - offset
    difference = out - targets
    return (difference * difference).mean(), 2 * difference / out.numel()


def mse_curvature(out, targets, v):
    return 2 * v / out.numel()


LOSSES = {"xent": (xent, xent_curvature), "mse": (mse, mse_curvature)}
