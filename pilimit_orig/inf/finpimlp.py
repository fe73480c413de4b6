"""FinPiMLP: the finite-width network whose function and training tend to InfPiMLP's, with
hand-written gradients."""

import torch

from pilimit_orig.inf.relu import unit


class FinPiMLP:
    """L hidden ReLU layers of `width` units.

    W {1: [n d], l: [n n], L+1: [dout n]}, b {l}, Omega {1..L: [n r]} (None for a Gaussian start).

    Pre-activations have coordinates of order n^-1/2. With Omegas, the gradients of all layers but
    the readout are projected on their span before clipping and stepping (`project`). Layers are
    counted as in InfPiMLP.
    """

    def __init__(
        self,
        d,
        dout,
        L,
        width,
        bias_alpha=0.0,
        last_bias_alpha=None,
        first_layer_alpha=1.0,
        last_layer_alpha=1.0,
        layernorm=False,
        dtype=torch.float32,
        device="cpu",
        seed=None,
    ):
        self.d, self.dout, self.L, self.width = d, dout, L, width
        self.bias_alpha = float(bias_alpha)
        self.last_bias_alpha = (
            self.bias_alpha if last_bias_alpha is None else float(last_bias_alpha)
        )
        self.first_layer_alpha, self.last_layer_alpha = (
            float(first_layer_alpha),
            float(last_layer_alpha),
        )
        self.layernorm, self.dtype, self.device = bool(layernorm), dtype, torch.device(device)
        rng = torch.Generator().manual_seed(seed) if seed is not None else None

        def normal(rows, cols, var):
            return (torch.randn(rows, cols, generator=rng, dtype=torch.float64) * var**0.5).to(
                self.device, dtype
            )

        # μP: |h| stays of order 1 at every width, the readout starts at zero.
        self.W = {1: normal(width, d, 1 / (width * d))} | {
            l: normal(width, width, 1 / width) for l in range(2, L + 1)
        }
        self.W[L + 1] = torch.zeros(dout, width, dtype=dtype, device=self.device)
        self.b = {
            l: torch.zeros(dout if l == L + 1 else width, dtype=dtype, device=self.device)
            for l in range(1, L + 2)
            if self.alpha_of_bias(l) != 0
        }
        self.Omega, self.basis, self.velocity, self.tape = None, None, {}, None
        self.zero_grad()

    def alpha_of_bias(self, l):
        return self.last_bias_alpha if l == self.L + 1 else self.bias_alpha

    @classmethod
    def from_infinite(cls, inf, width, seed=None, tieomegas=False, omegas=None):
        """Samples an infinite network; omegas {l: [width r]} fixes the draws, tieomegas uses one
        draw for all layers."""
        if width < inf.r:
            raise ValueError(
                f"width {width} is below the rank {inf.r}: the projection needs width >= r"
            )
        net = cls(
            inf.d,
            inf.dout,
            inf.L,
            width,
            inf.bias_alpha,
            inf.last_bias_alpha,
            inf.first_layer_alpha,
            inf.last_layer_alpha,
            inf.layernorm,
            inf.dtype,
            inf.device,
        )
        rng = torch.Generator().manual_seed(seed) if seed is not None else None

        def draw():
            return torch.randn(width, inf.r, generator=rng, dtype=torch.float64).to(
                inf.device, inf.dtype
            )

        first = draw() if omegas is None else None
        net.Omega = omegas or {
            l: first if l == 1 or tieomegas else draw() for l in range(1, inf.L + 1)
        }
        net.basis = {l: torch.linalg.qr(O.double())[0].to(inf.dtype) for l, O in net.Omega.items()}
        net.W[1] = width**-0.5 * net.Omega[1] @ inf.As[1].to(inf.dtype).T
        for l in range(2, inf.L + 2):
            # [n m]
            below = (net.Omega[l - 1] @ inf.Bs[l].to(inf.dtype).T).clamp(min=0)
            # [o n]
            rows = (inf.Amult[l].to(inf.dtype)[:, None] * inf.As[l].to(inf.dtype)).T @ below.T
            net.W[l] = width**-0.5 * rows if l == inf.L + 1 else net.Omega[l] @ rows / width
        net.b = {
            l: bias.clone() if l == inf.L + 1 else width**-0.5 * net.Omega[l] @ bias
            for l, bias in inf.biases.items()
        }
        return net

    def __call__(self, X):
        """Outputs [b dout]; what `backward` needs is kept until the next call."""
        x = X.reshape(X.shape[0], -1).to(self.dtype)
        tape = {"in": {1: x}, "h": {}}
        for l in range(1, self.L + 2):
            if l > 1:
                h = tape["h"][l - 1]
                x = tape["in"][l] = (unit(h)[0] if self.layernorm else h).clamp(min=0)
            h = x @ self.W[l].T
            if l in self.b:
                h = h + self.alpha_of_bias(l) * self.b[l]
            tape["h"][l] = self.first_layer_alpha * h if l == 1 else h
        self.tape = tape
        return self.last_layer_alpha * tape["h"][self.L + 1]

    def embedding(self, X):
        """Unit features [b n]: φ(h_L/|h_L|)·√2, whose inner products tend to k(cos)/k(1) of the
        infinite network's ĝ_L."""
        self(X)
        return unit(unit(self.tape["h"][self.L])[0].clamp(min=0))[0]

    def zero_grad(self):
        self.dW, self.db = {}, {}

    def backward(self, delta):
        """Adds the gradients of a loss whose derivative by the outputs is delta [b dout]."""

        def add(grads, l, G):
            grads[l] = grads[l] + G if l in grads else G

        G = self.last_layer_alpha * delta.to(self.dtype)
        for l in range(self.L + 1, 0, -1):
            G = self.first_layer_alpha * G if l == 1 else G
            add(self.dW, l, G.T @ self.tape["in"][l])
            if l in self.b:
                add(self.db, l, self.alpha_of_bias(l) * G.sum(0))
            if l == 1:
                return
            h = self.tape["h"][l - 1]
            G = (G @ self.W[l]) * (h > 0)
            if self.layernorm:
                u, s = unit(h)
                G = (G - (G * u).sum(1, keepdim=True) * u) / s.masked_fill(s == 0, float("inf"))

    def project(self):
        """Projects the gradients of every layer but the readout on the span of its Omega, which
        only a sampled network has."""
        if self.basis is None:
            raise RuntimeError(
                "project() needs Omegas: this network has a Gaussian start; leave the projection "
                "out (--no-Gproj)"
            )
        for l, Q in self.basis.items():
            self.dW[l] = Q @ (Q.T @ self.dW[l])
            if l in self.db:
                self.db[l] = Q @ (Q.T @ self.db[l])

    def gclip(self, max_norm, per_param=False):
        """Scales gradients by min(1, max_norm / (norm + 1e-6)), each by its own norm or all by the
        common one."""
        everything = [(grads, l) for grads in (self.dW, self.db) for l in grads]
        common = torch.stack([grads[l].norm() for grads, l in everything]).norm()
        for grads, l in everything:
            norm = grads[l].norm() if per_param else common
            grads[l] = grads[l] * (max_norm / (norm + 1e-6)).clamp(max=1)

    def step(
        self,
        lr,
        wd=0.0,
        momentum=0.0,
        bias_lr_mult=1.0,
        first_layer_lr_mult=1.0,
        last_layer_lr_mult=1.0,
        apply_lr_mult_to_wd=True,
    ):
        """SGD with the multipliers of InfPiMLP.step; a zero multiplier freezes the parameter but
        for its undivided decay."""
        weight_mult = {1: first_layer_lr_mult, self.L + 1: last_layer_lr_mult}
        for params, grads, name in ((self.W, self.dW, "W"), (self.b, self.db, "b")):
            for l, G in grads.items():
                mult = weight_mult.get(l, 1.0) if name == "W" else bias_lr_mult
                if mult == 0:
                    params[l] = params[l] * (1 if apply_lr_mult_to_wd else 1 - lr * wd)
                    continue
                v = G + (wd if apply_lr_mult_to_wd else wd / mult) * params[l]
                if momentum:
                    v = self.velocity[name, l] = momentum * self.velocity.get((name, l), 0.0) + v
                params[l] = params[l] - lr * mult * v
