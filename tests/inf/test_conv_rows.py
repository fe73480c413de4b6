"""Moments of a convolution are its rows, exactly, while both train: rows written out from the
definition, in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pilimit_lib.inf.conv.layers import InfPiConv2d, InfPiInputConv2d
from tests.inf.conv_rows import InfPiConv2dRows

LR, DECAY, STEPS = 1.0, 0.01, 20


class Rows(nn.Module):
    """A tiny ConvNet of rows, stepped by hand."""

    def __init__(
        self, first: InfPiInputConv2d, layers: list[InfPiConv2dRows], residual: bool
    ) -> None:
        super().__init__()
        self.first, self.layers, self.residual = first, nn.ModuleList(layers), residual

    def forward(self, x):
        g = self.first(x)
        for layer in self.layers[:-1]:
            g = g + layer(g) if self.residual else layer(g)
        return self.layers[-1](g).mean((2, 3))

    def step(self):
        with torch.no_grad():
            for parameter in self.first.parameters():
                parameter -= LR * (parameter.grad + DECAY * parameter)
                parameter.grad = None
        for layer in self.layers:
            layer.step(LR, DECAY)


def networks(degree: int, residual: bool, **how):
    torch.manual_seed(0)
    layers = [
        InfPiConv2d(3, 3, degree=degree, dtype=torch.float64, **how),
        InfPiConv2d(
            3,
            2,
            1,
            degree=degree,
            dtype=torch.float64,
            output_layer=True,
            layernorm=how.get("layernorm", False),
        ),
    ]
    first = InfPiInputConv2d(2, 3, 3, padding=1, dtype=torch.float64)
    rows = []
    for layer in layers:
        B = F.normalize(torch.randn(4, 3, dtype=torch.float64), dim=1)
        A = torch.randn(4, layer.geometry.offsets, layer.r_out, dtype=torch.float64) * 0.3
        rows.append(InfPiConv2dRows(layer, A, torch.ones(4, dtype=torch.float64), B))
        layer.set_rows(
            [(A.view(4, *layer.geometry.kernel, -1), torch.ones(4, dtype=torch.float64), B)]
        )
    rows_net = Rows(InfPiInputConv2d(2, 3, 3, padding=1, dtype=torch.float64), rows, residual)
    rows_net.first.load_state_dict(first.state_dict())
    moments_net = Rows(first, layers, residual)
    return moments_net, rows_net


CASES = {
    "plain": {"padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2},
    "pooled": {"padding": 1, "pool": 2},
    "layer norm": {"padding": 1, "layernorm": True},
    "residual": {"padding": "same"},
    "bias": {"padding": 1, "bias_alpha": 0.5},
}


@pytest.mark.parametrize(
    "case, degree",
    [
        ("plain", 2),
        ("pooled", 4),
        ("strided", 2),
        ("bias", 2),
        *(
            pytest.param(case, degree, marks=pytest.mark.slow)
            for case, degree in (
                ("plain", 4),
                ("pooled", 2),
                ("strided", 4),
                ("layer norm", 2),
                ("layer norm", 4),
                ("residual", 2),
                ("residual", 4),
            )
        ),
    ],
)
def test_moments_equal_rows_along_twenty_steps(case, degree):
    moments, rows = networks(degree, case == "residual", **CASES[case])
    optimizer = torch.optim.SGD(moments.parameters(), LR, weight_decay=DECAY)
    x, y = torch.randn(3, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 1])
    outputs = []
    for _ in range(STEPS):
        torch.testing.assert_close(moments(x), rows(x), rtol=0, atol=1e-10)
        rows.layers[0].probes.clear(), rows.layers[1].probes.clear()
        loss = F.cross_entropy(moments(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        F.cross_entropy(rows(x), y).backward()
        rows.step()
        outputs.append(loss.item())
    torch.testing.assert_close(moments(x), rows(x), rtol=0, atol=1e-10)
    assert outputs[-1] < 0.95 * outputs[0]  # something was learned that the two could disagree on
    assert len(rows.layers[0]) == 4 + STEPS * 3 * 36 and moments.layers[0].V.shape == (
        moments.layers[0].P,
        3,
        3,
        3,
    )


def test_exact_relu_rows_are_what_higher_degrees_tend_to():
    torch.manual_seed(0)
    g, gaps = torch.randn(2, 3, 5, 5, dtype=torch.float64), []
    B = F.normalize(torch.randn(8, 3, dtype=torch.float64), dim=1)
    A, Amult = torch.randn(8, 9, 3, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    for degree in (2, 4, 8):
        layer = InfPiConv2d(3, padding=1, degree=degree, dtype=torch.float64)
        layer.set_rows([(A.view(8, 3, 3, 3), Amult, B)])
        exact = InfPiConv2dRows(layer, A, Amult, B, series=None)
        gaps.append((layer(g) - exact(g)).abs().max().item())
        bound = layer.truncation * A.norm(dim=2).sum() * g.norm(dim=1).max()
        assert gaps[-1] <= bound
    assert gaps[2] < 0.3 * gaps[1] < 0.3 * gaps[0]


def test_a_single_map_and_a_bias():
    moments, rows = networks(2, False, padding=1, bias_alpha=0.5)
    for layer, other in zip(moments.layers[:1], rows.layers):
        layer.bias.data.normal_()
        other.bias.data.copy_(layer.bias)
        g = torch.randn(3, 5, 5, dtype=torch.float64)
        torch.testing.assert_close(other(g), layer(g), rtol=0, atol=1e-12)


def test_rows_that_do_not_fit_are_refused():
    layer = InfPiConv2d(3)
    with pytest.raises(ValueError, match=r"A is \[4, 8, 3\], not \[4, 9, 3\]"):
        InfPiConv2dRows(layer, torch.zeros(4, 8, 3), torch.zeros(4), torch.zeros(4, 3))
