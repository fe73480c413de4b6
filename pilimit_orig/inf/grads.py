"""Gradients of a π-MLP that wait for a step: plain dictionaries keyed by layer, their norms and
their clipping."""

import torch

from pilimit_orig.inf.relu import rows_norm


class Grads:
    """A: {1: [d r], l: list of [b o]}, B: {l: list of [b r]}, bias: {l: [o]}. Adding accumulates,
    as micro-batches need."""

    def __init__(self, L):
        self.L = L
        self.first = None
        self.A = {l: [] for l in range(2, L + 2)}
        self.B = {l: [] for l in range(2, L + 2)}
        self.bias = {}

    def add_first(self, G):
        self.first = G if self.first is None else self.first + G

    def add_rows(self, l, A, B):
        self.A[l].append(A)
        self.B[l].append(B)

    def add_bias(self, l, G):
        self.bias[l] = self.bias[l] + G if l in self.bias else G

    def rows(self, l):
        """All pending rows of layer l as A [m o], B [m r], or None."""
        return (torch.cat(self.A[l]), torch.cat(self.B[l])) if self.A[l] else None

    def norms(self):
        """{("A", l) | ("bias", l): length of that parameter's gradient}."""
        out = {}
        if self.first is not None:
            out["A", 1] = self.first.norm()
        for l in range(2, self.L + 2):
            if self.A[l]:
                out["A", l] = rows_norm(*self.rows(l))
        out.update({("bias", l): G.norm() for l, G in self.bias.items()})
        return out

    def norm(self, exclude_last_layer=False):
        """Root of the sum of squares over all parameters; the readout can be left out of the
        sum."""
        parts = [
            n for (_, l), n in self.norms().items() if not (exclude_last_layer and l == self.L + 1)
        ]
        return torch.stack(parts).norm() if parts else torch.zeros(())

    def scale(self, kind, l, factor):
        """Multiplies one parameter's gradient: of rows only A, their directions B are unit
        vectors."""
        if kind == "bias":
            self.bias[l] = self.bias[l] * factor
        elif l == 1:
            self.first = self.first * factor
        else:
            self.A[l] = [A * factor for A in self.A[l]]

    def clip(self, max_norm, per_param=False, exclude_last_layer=False):
        """Scales every gradient by min(1, max_norm / (norm + 1e-6)), its own norm or the common
        one; returns the norms before.

        exclude_last_layer leaves the readout out of the common norm, but scales it too; per
        parameter it stays unclipped.
        """
        if max_norm <= 0:
            raise ValueError(
                f"max_norm is {max_norm}: a clipping norm must be positive; leave clipping out for "
                "none"
            )
        before = self.norms()
        common = None if per_param else self.norm(exclude_last_layer)
        for (kind, l), own in before.items():
            if per_param and exclude_last_layer and l == self.L + 1:
                continue
            norm = own if per_param else common
            self.scale(kind, l, (max_norm / (norm + 1e-6)).clamp(max=1))
        return before
