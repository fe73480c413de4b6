"""Kernel models: functions f(x) = Σ_m Amult_m A_m K(X_m, x) trained by the steps of a π-MLP, K the
NNGP or NTK of a ReLU MLP.

NTK parametrisation, weights N(0, varw), biases N(0, varb), inputs scaled by 1/√d. Source: Lee et
al. (2018), Jacot et al. (2018).
"""

import torch

from pilimit_orig.inf import relu


def _layers(X, Y, varws, varbs):
    """Per hidden layer l: cosine of its pre-activations, E[φφ] [a b]; the inner products over d
    come first."""
    d = X.shape[1]
    cov, vx, vy = X @ Y.T / d, (X * X).sum(1, keepdim=True) / d, (Y * Y).sum(1)[None] / d
    yield None, cov
    for varw, varb in zip(varws, varbs):
        cov, vx, vy = varw * cov + varb, varw * vx + varb, varw * vy + varb
        size = (vx * vy).sqrt()
        c = (cov / size.masked_fill(size == 0, float("inf"))).clamp(-1, 1)
        cov, vx, vy = size * relu.k(c), vx / 2, vy / 2
        yield c, cov


def relu_gp_fn(varws, varbs):
    """K(X [a d], Y [b d]) = E[φφ] after len(varws) hidden layers: the NNGP of a readout of unit
    variance without bias."""
    _check(varws, varbs)

    def kernel(X, Y):
        *_, (_, cov) = _layers(X, Y, varws, varbs)
        return cov

    return kernel


def relu_ntk_fn(varws, varbs, lrws, lrbs, varw_readout=None, as_published=False):
    """NTK of len(varws) hidden layers; lrws, lrbs have one learning-rate multiplier per layer of
    weights, the readout's included.

    varw_readout is the variance of the readout's weights (default: that of the last hidden
    layer's).

    as_published repeats what the paper's code computes: the derivative kernel is taken at the
    correlation *after* the ReLU and is twice E[φ'φ']. The published NTK figures were made with it;
    it is no network's tangent kernel.
    """
    _check(varws, varbs)
    if len(lrws) != len(varws) + 1 or len(lrbs) != len(lrws):
        raise ValueError(
            f"{len(lrws)} and {len(lrbs)} multipliers for {len(varws)} hidden layers: "
            f"expected {len(varws) + 1} of each"
        )

    above = [*varws[1:], varws[-1] if varw_readout is None else varw_readout]

    def kernel(X, Y):
        theta = None
        for l, (c, cov) in enumerate(_layers(X, Y, varws, varbs)):
            if l == 0:
                theta = lrws[0] * cov + lrbs[0]
                continue
            slope = 2 * relu.dk(2 * relu.k(c)) if as_published else relu.dk(c)
            theta = lrws[l] * cov + lrbs[l] + above[l - 1] * slope * theta
        return theta

    return kernel


def _check(varws, varbs):
    if not varws or len(varws) != len(varbs):
        raise ValueError(
            f"{len(varws)} weight and {len(varbs)} bias variances: expected one of each per hidden "
            "layer, "
            "and at least one layer"
        )


class KernelModel:
    """Arrays As [M dout], Xs [M d], Amult [M]; starts as the zero function.

    Use: out = model(X); model.backward(∂loss/∂out); model.step(lr).
    """

    def __init__(self, d, dout, kernel, dtype=torch.float32):
        self.d, self.dout, self.kernel, self.dtype = d, dout, kernel, dtype
        self.As, self.Xs, self.Amult = (
            torch.zeros(0, *size, dtype=dtype) for size in ((dout,), (d,), ())
        )
        self.marks = []
        self.zero_grad()

    def zero_grad(self):
        self.dAs, self.dXs = [], []

    def __call__(self, X):
        self.X = X.reshape(X.shape[0], -1).to(self.dtype)
        return self.kernel(self.X, self.Xs) @ (self.Amult[:, None] * self.As)

    def backward(self, delta):
        """Adds rows delta [b dout] at the inputs of the last call."""
        self.dAs.append(delta.to(self.dtype))
        self.dXs.append(self.X)

    def gnorm(self):
        """Length of the waiting update in the kernel's space."""
        A, X = torch.cat(self.dAs), torch.cat(self.dXs)
        return ((A @ A.T) * self.kernel(X, X)).sum().clamp(min=0).sqrt()

    def gclip(self, max_norm):
        factor = (max_norm / (self.gnorm() + 1e-6)).clamp(max=1)
        self.dAs = [A * factor for A in self.dAs]

    def step(self, lr, wd=0.0):
        """Appends the waiting rows with multiplier −lr; older ones decay by 1 − lr·wd."""
        A, X = torch.cat(self.dAs), torch.cat(self.dXs)
        self.Amult = torch.cat(
            [self.Amult * (1 - lr * wd), self.Amult.new_full((A.shape[0],), -lr)]
        )
        self.As, self.Xs = torch.cat([self.As, A]), torch.cat([self.Xs, X])

    def checkpoint(self):
        self.marks.append((self.As, self.Xs, self.Amult))

    def restore(self):
        """Back to the last checkpoint, which is used up."""
        self.As, self.Xs, self.Amult = self.marks.pop()


class InfReLUGPModel(KernelModel):
    """The readout of an infinitely wide random ReLU MLP, trained by SGD: its NNGP as a kernel
    model."""

    def __init__(self, varws, varbs, d, dout, dtype=torch.float32):
        super().__init__(d, dout, relu_gp_fn(varws, varbs), dtype)


class InfReLUNTKModel(KernelModel):
    """An infinitely wide ReLU MLP in the lazy regime, trained by SGD: its NTK as a kernel model."""

    def __init__(self, varws, varbs, lrws, lrbs, d, dout, dtype=torch.float32, as_published=False):
        super().__init__(
            d, dout, relu_ntk_fn(varws, varbs, lrws, lrbs, as_published=as_published), dtype
        )
