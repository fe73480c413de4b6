"""Networks of the tests: small, in float64, and with nothing at its trivial initial value."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pilimit_lib.inf import InfMLP


def network(
    d: int = 5,
    o: int = 3,
    r: int = 6,
    L: int = 1,
    *,
    dtype: torch.dtype = torch.float64,
    **settings,
) -> InfMLP:
    """An InfMLP whose readout, multipliers and biases are not those of a fresh one."""
    net = InfMLP(d, o, r, L, dtype=dtype, **settings)
    with torch.no_grad():
        for layer in net.layers:
            if layer.bias is not None:
                layer.bias.normal_(std=0.1)
        for layer in net.layers[1:]:
            m = len(layer)
            layer.set_rows(
                torch.randn(m, layer.r_out).to(dtype) / layer.r_out**0.5,
                torch.rand(m).to(dtype) + 0.5,
                layer.B.detach().clone(),
            )
    return net


def data(
    b: int = 4, d: int = 5, o: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    return torch.randn(b, d, dtype=dtype), torch.randint(o, (b,))


def cross_entropy(y: Tensor) -> callable:
    return lambda out: nn.functional.cross_entropy(out, y)


def tensors(net: nn.Module) -> dict[str, Tensor]:
    """What training changes, and the multipliers; not the record of the architecture."""
    return {
        name: value.clone()
        for name, value in net.state_dict().items()
        if not name.endswith("_extra_state")
    }


def assert_unchanged(before: dict[str, Tensor], net: nn.Module) -> None:
    after = tensors(net)
    assert list(before) == list(after)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
