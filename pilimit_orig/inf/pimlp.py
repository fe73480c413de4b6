"""InfPiMLP: the infinite-width π-MLP as dictionaries of arrays and hand-written gradients."""

import copy

import torch

from pilimit_orig import checkpoint
from pilimit_orig.inf import passes, update
from pilimit_orig.inf.grads import Grads


class InfPiMLP:
    """L hidden layers of infinite width, d inputs, dout outputs, rank r.

    The depth is counted as in the paper's code: L hidden layers. The library's InfMLP counts one
    less, so L here is L - 1 there.
    Arrays: As {1: [d r], l: [M o]}, Bs {l: [M r]} (unit rows), Amult {l: [M]}, biases {l: [o]},
    layers 1..L+1. A layer whose bias multiplier is zero has no bias. Use: out = net(X);
    net.backward(∂loss/∂out); net.step(lr).
    """

    def __init__(
        self,
        d,
        dout,
        L,
        r,
        initsize=None,
        bias_alpha=0.0,
        last_bias_alpha=None,
        first_layer_alpha=1.0,
        last_layer_alpha=1.0,
        layernorm=False,
        readout_zero_init=False,
        last_layer_grad_no_alpha=False,
        dtype=torch.float32,
        device="cpu",
        seed=None,
    ):
        for name, value in {"d": d, "dout": dout, "L": L, "r": r}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}: expected a whole number of at least 1")
        self.d, self.dout, self.L, self.r = d, dout, L, r
        self.bias_alpha = float(bias_alpha)
        self.last_bias_alpha = (
            self.bias_alpha if last_bias_alpha is None else float(last_bias_alpha)
        )
        self.first_layer_alpha, self.last_layer_alpha = (
            float(first_layer_alpha),
            float(last_layer_alpha),
        )
        self.layernorm, self.last_layer_grad_no_alpha = (
            bool(layernorm),
            bool(last_layer_grad_no_alpha),
        )
        self.dtype, self.device = dtype, torch.device(device)
        self.initialize(initsize or r, readout_zero_init, seed)

    def initialize(self, initsize, readout_zero_init=False, seed=None):
        """Random start: unit columns in A_1, B rows uniform on the sphere, A ~ N(0, 1/o), the
        readout and the biases zero."""
        rng = torch.Generator().manual_seed(seed) if seed is not None else None

        def normal(*size):
            return torch.randn(*size, generator=rng, dtype=torch.float64)

        def put(t):
            return t.to(self.device, self.dtype)

        first = normal(self.d, self.r)
        self.As, self.Bs, self.Amult = {1: put(first / first.norm(dim=0))}, {}, {}
        for l in range(2, self.L + 2):
            last = l == self.L + 1
            rows = 1 if last and readout_zero_init else initsize
            B = normal(rows, self.r)
            self.Bs[l] = put(B / B.norm(dim=1, keepdim=True))
            self.As[l] = put(
                torch.zeros(rows, self.dout) if last else normal(rows, self.r) / self.r**0.5
            )
            self.Amult[l] = put((torch.zeros if last and readout_zero_init else torch.ones)(rows))
        self.biases = {
            l: put(torch.zeros(self.width_of(l)))
            for l in range(1, self.L + 2)
            if self.alpha_of_bias(l) != 0
        }
        self.velocity = {}
        self.grads, self.tape, self.marks = Grads(self.L), None, []

    def width_of(self, l):
        """Length of layer l's output vector."""
        return self.dout if l == self.L + 1 else self.r

    def alpha_of_bias(self, l):
        """Multiplier of layer l's bias."""
        return self.last_bias_alpha if l == self.L + 1 else self.bias_alpha

    def __call__(self, X):
        """Outputs [b dout]; what `backward` needs is kept until the next call."""
        out, self.tape = passes.forward(self, X.reshape(X.shape[0], -1))
        return out

    def predict(self, X):
        """Outputs [b dout] without touching what a later `backward` needs."""
        return passes.forward(self, X.reshape(X.shape[0], -1), record=False)[0]

    def embedding(self, X):
        """Unit directions ĝ_L [b r] of the pre-activations that feed the readout: the features of
        the trained network."""
        return passes.forward(self, X.reshape(X.shape[0], -1))[1]["embedding"]

    def newgradbuffer(self):
        """An empty set of gradients, for `backward(..., buffer)` and `step(..., buffer)`."""
        return Grads(self.L)

    def zero_grad(self):
        self.grads = Grads(self.L)

    def backward(self, delta, buffer=None):
        """Adds the gradients of the last call to the buffer (default: the network's own); delta =
        ∂loss/∂out [b dout]."""
        if self.tape is None or delta.shape != (self.tape["X"].shape[0], self.dout):
            had = None if self.tape is None else (self.tape["X"].shape[0], self.dout)
            raise ValueError(
                f"delta has shape {tuple(delta.shape)}, the last call's outputs {had}: "
                "call the network on this batch first"
            )
        passes.backward(
            self, self.tape, delta.to(self.dtype), self.grads if buffer is None else buffer
        )

    def readout_backward(self, delta, buffer=None):
        """As `backward`, for the readout alone."""
        passes.readout_rows(
            self, self.tape, delta.to(self.dtype), self.grads if buffer is None else buffer
        )

    def gclip(self, max_norm, buffer=None, per_param=False, exclude_last_layer=False):
        """Clips the waiting gradients; see Grads.clip."""
        return (self.grads if buffer is None else buffer).clip(
            max_norm, per_param, exclude_last_layer
        )

    def step(
        self,
        lr,
        wd=0.0,
        buffer=None,
        momentum=0.0,
        dampening=0.0,
        bias_lr_mult=1.0,
        first_layer_lr_mult=1.0,
        last_layer_lr_mult=1.0,
        apply_lr_mult_to_wd=True,
    ):
        """One step of SGD on the function: rows are appended; see update.step. The gradients stay
        until zero_grad."""
        update.step(
            self,
            self.grads if buffer is None else buffer,
            lr,
            wd,
            momentum,
            dampening,
            bias_lr_mult,
            first_layer_lr_mult,
            last_layer_lr_mult,
            apply_lr_mult_to_wd,
        )

    def checkpoint(self):
        """Remembers the present state; `restore` comes back to it. Old rows are never written to,
        so nothing large is copied."""
        self.marks.append(
            {
                name: copy.copy(getattr(self, name))
                for name in ("As", "Bs", "Amult", "biases", "velocity")
            }
        )

    def restore(self):
        """Back to the last `checkpoint`, which is used up."""
        if not self.marks:
            raise RuntimeError(
                "restore() without a checkpoint(): call checkpoint() before the steps that are to "
                "be undone"
            )
        for name, value in self.marks.pop().items():
            setattr(self, name, value)

    def to(self, device=None, dtype=None):
        """Moves all arrays; dtype is that of the computation (see `half` for rows alone)."""
        self.device = torch.device(device) if device is not None else self.device
        self.dtype = dtype or self.dtype
        for arrays in (self.As, self.Bs, self.Amult, self.biases):
            arrays.update({l: a.to(self.device, self.dtype) for l, a in arrays.items()})
        return self

    def half(self):
        """Stores the rows in half precision; multipliers, biases and the arithmetic keep theirs."""
        for arrays in (self.As, self.Bs):
            arrays.update({l: a.half() for l, a in arrays.items() if l > 1})
        return self

    def state(self):
        """The dictionary of pilimit_orig.checkpoint, sharing this network's arrays."""
        return {
            name: getattr(self, name)
            for name in (*checkpoint.ALPHAS, "layernorm", *checkpoint.ARRAYS)
        }

    def save(self, path):
        """Writes `state()` as plain tensors; gradients and velocities are not part of it."""
        checkpoint.write(self.state(), path)

    @classmethod
    def load(cls, path, dtype=torch.float32, device="cpu"):
        """A network from any file of the original code, from what `save` or convert_net wrote, or
        from such a dictionary.

        dtype is that of the computation; rows keep the precision that they were saved in.
        """
        found = checkpoint.checked(path) if isinstance(path, dict) else checkpoint.read(path)
        L = len(found["As"]) - 1
        net = cls(
            *found["As"][1].shape[:1],
            found["As"][L + 1].shape[1],
            L,
            found["As"][1].shape[1],
            initsize=1,
            layernorm=found["layernorm"],
            dtype=dtype,
            device=device,
            **{name: found[name] for name in checkpoint.ALPHAS},
        )
        rows = {
            name: {l: a.to(net.device) for l, a in found[name].items() if l > 1}
            for name in ("As", "Bs")
        }
        net.As, net.Bs = {1: found["As"][1].to(net.device, dtype)} | rows["As"], rows["Bs"]
        net.Amult = {l: a.to(net.device, dtype) for l, a in found["Amult"].items()}
        net.biases = {l: found["biases"][l].to(net.device, dtype) for l in net.biases}
        return net

    def sample(self, width, seed=None, tieomegas=False):
        """A FinPiMLP of this width whose function tends to this network's as the width grows."""
        from pilimit_orig.inf.finpimlp import FinPiMLP

        return FinPiMLP.from_infinite(self, width, seed, tieomegas)
