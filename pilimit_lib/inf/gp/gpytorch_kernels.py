"""Kernels of infinitely wide networks for GPyTorch (extra `gp`): NNGP and NTK with variances that
are learned, and the feature kernel of a trained network, all differentiable.

    from pilimit_lib.inf.gp.gpytorch_kernels import FeatureKernel, ReLUNetworkKernel

Multiply them with an output scale by `gpytorch.kernels.ScaleKernel`.
"""

from __future__ import annotations

from typing import Any

import torch
from gpytorch.constraints import Positive
from gpytorch.kernels import Kernel
from torch import Tensor, nn

from ..dual.relu import relu_k_taped
from .relu import propagated


class ReLUNetworkKernel(Kernel):
    """NNGP or, with `ntk`, NTK of a ReLU network with `depth` hidden layers, as `gp.ReLUKernel`
    with the same variances in every layer; both are positive parameters that training may change.

    Inputs count: |x| and the angles between samples, so standardise them.
    """

    has_lengthscale = False

    def __init__(
        self,
        depth: int,
        ntk: bool = False,
        weight_variance: float = 2.0,
        bias_variance: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(depth, int) or depth < 1:
            raise ValueError(
                f"depth counts hidden layers and is {depth!r}; at least 1 was expected"
            )
        self.depth, self.ntk = depth, ntk
        for name, value in (("weight_variance", weight_variance), ("bias_variance", bias_variance)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; a positive number was expected")
            self.register_parameter(f"raw_{name}", nn.Parameter(torch.zeros(*self.batch_shape, 1)))
            self.register_constraint(f"raw_{name}", Positive())
            self.initialize(
                **{f"raw_{name}": self._constraint(name).inverse_transform(torch.tensor(value))}
            )

    @property
    def weight_variance(self) -> Tensor:
        return self._constraint("weight_variance").transform(self.raw_weight_variance)

    @property
    def bias_variance(self) -> Tensor:
        return self._constraint("bias_variance").transform(self.raw_bias_variance)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """[... a b] for samples [... a d] and [... b d]; their diagonal [... a] where `diag`."""
        own_x, own_y = x1.square().mean(-1), x2.square().mean(-1)
        varw, varb = self.weight_variance, self.bias_variance
        if diag:
            cov = (x1 * x2).mean(-1)
        else:
            cov = x1 @ x2.mT / x1.shape[-1]
            own_x, own_y = own_x[..., :, None], own_y[..., None, :]
            varw, varb = varw[..., None], varb[..., None]
        layers, ones = self.depth + 1, [1.0] * (self.depth + 1)
        return propagated(
            cov,
            own_x,
            own_y,
            [varw] * layers,
            [varb] * layers,
            ones,
            ones,
            self.ntk,
            k=lambda c: relu_k_taped(c)[0],
            slope=lambda c, dual: relu_k_taped(c)[1],
        )

    def _constraint(self, name: str) -> Positive:
        return getattr(self, f"raw_{name}_constraint")


class FeatureKernel(Kernel):
    """The kernel k(⟨ĝ, ĝ'⟩) of the features that an infinite network has learned, as
    `gp.InfiniteFeatures` on `net.embedding`; of a finite one ⟨φ(ĥ), φ(ĥ')⟩.

    The parameters of `net` are the kernel's, so that a network of moments can be trained by the
    marginal likelihood; `net.requires_grad_(False)` keeps it as it is.
    """

    has_lengthscale = False

    def __init__(self, net: nn.Module, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not hasattr(net, "embedding"):
            raise TypeError(
                f"{type(net).__name__} has no embedding; an InfMLP or a network sampled from one "
                "was expected"
            )
        self.net = net

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """[... a b] for samples [... a d] and [... b d]; their diagonal [... a] where `diag`."""
        u, v = (self._embedded(x) for x in (x1, x2))
        if hasattr(self.net, "n"):
            u, v = u.relu(), v.relu()
            return (u * v).sum(-1) if diag else u @ v.mT
        if diag:
            return relu_k_taped((u * v).sum(-1))[0] * u.any(-1) * v.any(-1)
        # No direction, no activation: φ(0) = 0.
        alive = u.any(-1)[..., :, None] * v.any(-1)[..., None, :]
        return relu_k_taped(u @ v.mT)[0] * alive

    def _embedded(self, x: Tensor) -> Tensor:
        flat = self.net.embedding(x.reshape(-1, x.shape[-1]))
        return flat.reshape(*x.shape[:-1], -1)
