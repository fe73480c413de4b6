"""Small float64 networks in a general position, and their function for autograd: an oracle that
shares no code with them."""

import math

import torch

from pilimit_orig.inf import InfPiMLP


def network(
    L=2,
    layernorm=False,
    bias_alpha=0.7,
    last_bias_alpha=0.3,
    rows=9,
    d=5,
    dout=3,
    r=4,
    seed=0,
    **kw,
):
    """A float64 network whose rows, multipliers and biases are all random."""
    net = InfPiMLP(
        d,
        dout,
        L,
        r,
        initsize=rows,
        bias_alpha=bias_alpha,
        last_bias_alpha=last_bias_alpha,
        first_layer_alpha=1.4,
        last_layer_alpha=0.6,
        layernorm=layernorm,
        dtype=torch.float64,
        seed=seed,
        **kw,
    )
    g = torch.Generator().manual_seed(seed + 100)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    net.As[L + 1] = normal(rows, dout)
    net.Amult = {l: 0.5 + 0.5 * normal(rows).abs() for l in net.Amult}
    net.biases = {l: normal(len(b)) for l, b in net.biases.items()}
    return net


def data(net, b=6, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, net.d, generator=g, dtype=torch.float64), torch.randint(
        net.dout, (b,), generator=g
    )


def leaves(net):
    """{(kind, layer): tensor that requires grad} of everything that the function depends on
    smoothly."""
    out = {("A", l): a for l, a in net.As.items()} | {("bias", l): b for l, b in net.biases.items()}
    return {key: t.clone().requires_grad_() for key, t in out.items()}


def function(net, p, X, extra=(), bias_shift=0.0):
    """(outputs, direction, scale of the readout's argument) with parameters p.

    extra: (coefficients [m o], directions [m r]) of rows appended to the readout.
    """
    g = X @ p["A", 1]
    if ("bias", 1) in p:
        g = g + net.bias_alpha * p["bias", 1]
    g = net.first_layer_alpha * g
    for l in range(2, net.L + 2):
        s = (g**2).sum(1, keepdim=True).sqrt()
        u, sigma = g / s, torch.ones_like(s) if net.layernorm else s
        g = kernel(u @ net.Bs[l].T) @ (net.Amult[l][:, None] * p["A", l])
        if l == net.L + 1:
            g = g + sum((kernel(u @ B.T) @ A for A, B in extra), torch.zeros(()))
        g = sigma * g
        if ("bias", l) in p:
            alpha = net.last_bias_alpha if l == net.L + 1 else net.bias_alpha
            g = g + alpha * (p["bias", l] + (bias_shift if l == net.L + 1 else 0.0))
    return net.last_layer_alpha * g, u, sigma


def kernel(c):
    """E[φφ] by its definition; just inside the ends, where the derivative of acos would be infinite
    times zero."""
    c = c.clamp(-1 + 1e-14, 1 - 1e-14)
    return ((1 - c**2).sqrt() + c * (math.pi - torch.acos(c))) / (2 * math.pi)


def by_parameter(net, grads):
    """The rows in grads as gradients of the existing A: ∂loss/∂A_m = Amult_m Σ_rows k(⟨B_m, B⟩)
    A."""
    out = {("A", 1): grads.first} | {("bias", l): b for l, b in grads.bias.items()}
    for l in range(2, net.L + 2):
        rows = grads.rows(l)
        if rows is not None:
            out["A", l] = net.Amult[l][:, None] * (kernel(net.Bs[l] @ rows[1].T) @ rows[0])
    return out
