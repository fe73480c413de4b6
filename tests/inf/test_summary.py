"""What a network prints, to the letter, for a small network of each kind."""

import pytest
import torch
from torch import nn

from pilimit_lib.inf import InfMLP, InfPiConvNet
from pilimit_lib.inf.gp import KernelMLP, ReLUKernel

ROWS = """
InfMLP(d_in=5, d_out=3, r=6, L=1)
  layer     kind             size  rows  parameters  stored as  bytes
  layers.0  weights, input  5 → 6                36    float32  144 B
  layers.1  rows            6 → 6     6          84    float32  384 B
  layers.2  rows, readout   6 → 3     6          63    float32  300 B
  in all                             12         183             828 B
"""
MOMENTS = """
InfMLP(d_in=5, d_out=3, r=6, L=1, first_layer_alpha=0.5, layernorm=True, memory='moments')
  layer     kind               size   P  parameters  stored as    bytes
  layers.0  weights, input    5 → 6              36    float32    144 B
  layers.1  moments           6 → 6  28         174    float32    696 B
  layers.2  moments, readout  6 → 3  28          87    float32    348 B
  in all                                        297             1.2 KiB
"""
FOLDED = """
InfMLP(d_in=784, d_out=10, r=30, L=1, row_budget=100)
  layer     kind                size  rows    P  parameters  stored as      bytes
  layers.0  weights, input  784 → 30                 23,550    float32   92.0 KiB
  layers.1  rows             30 → 30    30  496       1,860       int8   60.9 KiB
  layers.2  rows, readout    30 → 10    30  496       1,240       int8   21.5 KiB
  in all                                60           26,650             174.3 KiB
"""
FINITE = """
FinPiMLPSample(n=32, d_in=5, d_out=3, r=6, L=1)
  layer     kind                 size  rank  parameters  stored as    bytes
  layers.0  weights, input     5 → 32     6         192    float32  2.2 KiB
  layers.1  weights           32 → 32     6       1,056    float32  5.6 KiB
  layers.2  weights, readout   32 → 3                99    float32    396 B
  in all                                          1,347             8.3 KiB
"""
CONV = """
InfPiConvNet(channels=3, classes=10, ranks=(4, 4, 8), pools=(1, 2), shortcuts=((0, 1),))
  layer     kind                size   P  window         parameters  stored as    bytes
  layers.0  weights, input     3 → 4      3×3                   108    float32    432 B
  layers.1  moments            4 → 4  15  3×3                   540    float32  2.1 KiB
  layers.2  moments            4 → 8  15  3×3, pool 2×2       1,080    float32  4.2 KiB
  layers.3  moments, readout  8 → 10  45  1×1                   450    float32  1.8 KiB
  in all                                                      2,178             8.5 KiB
"""
FINITE_CONV = """
FinPiConvNetSample(n=16, shortcuts=((0, 1),))
  layer     kind                 size  rank  window         parameters  stored as     bytes
  layers.0  weights, input     3 → 16     4  3×3                   432    float32   2.2 KiB
  layers.1  weights           16 → 16     4  3×3                 2,304    float32   9.5 KiB
  layers.2  weights           16 → 16     8  3×3, pool 2×2       2,304    float32  10.0 KiB
  layers.3  weights, readout  16 → 10        1×1                   160    float32     640 B
  in all                                                         5,200             22.3 KiB
"""
KERNEL = """
KernelMLP(d_in=5, d_out=3, kernel=ReLUKernel(depth=2, ntk=False, varw=1.0, varb=0.0, lrw=1.0, lrb=None, as_published=False))
  layer     kind                        size  rows  parameters  stored as  bytes
  layers.0  rows of a kernel, readout  5 → 3     0           0    float32    0 B
  in all                                         0           0               0 B
"""  # noqa: E501


def conv_net() -> InfPiConvNet:
    return InfPiConvNet(3, 10, (4, 4, 8), pools=(1, 2), shortcuts=((0, 1),))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: InfMLP(5, 3, 6, 1), ROWS),
        (
            lambda: InfMLP(5, 3, 6, 1, memory="moments", layernorm=True, first_layer_alpha=0.5),
            MOMENTS,
        ),
        (lambda: InfMLP(784, 10, 30, 1, row_budget=100, row_dtype=torch.int8), FOLDED),
        (lambda: InfMLP(5, 3, 6, 1).sample(32), FINITE),
        (conv_net, CONV),
        (lambda: conv_net().sample(16), FINITE_CONV),
        (lambda: KernelMLP(5, 3, ReLUKernel(2)), KERNEL),
    ],
    ids=["rows", "moments", "folded", "finite", "conv", "finite conv", "kernel"],
)
def test_the_text_of_a_network(make, text):
    assert repr(make()) == text.strip()


def test_the_first_line_makes_the_network_again():
    net = InfMLP(5, 3, 6, 1, bias_alpha=0.5, last_bias_alpha=0, memory="moments", degree=3)
    again = eval(repr(net).splitlines()[0], {"InfMLP": InfMLP})
    assert again.architecture() == net.architecture() and repr(again) == repr(net)


def test_rows_in_other_precisions_count_as_they_are_stored():
    """6 rows of a hidden layer: A and B [6 6], Amult float32 and origin int64 [6], bias [6]."""
    for dtype, numbers in ((torch.float16, 2 * 6 * 6 * 2), (torch.int8, 2 * 6 * (6 + 8))):
        line = repr(InfMLP(5, 3, 6, 1, row_dtype=dtype)).splitlines()[3]
        assert line.split()[-3:] == [str(dtype)[6:], str(numbers + 6 * (4 + 8) + 6 * 4), "B"]


def test_large_sizes_have_units():
    net = InfMLP(3072, 10, 400, 1, memory="moments", device="meta")
    assert repr(net).splitlines()[3].endswith("123.0 MiB")


def test_a_network_inside_another_module_is_indented():
    lines = repr(nn.Sequential(nn.Flatten(), InfMLP(5, 3, 6, 1))).splitlines()
    assert lines[2] == "  (1): InfMLP(d_in=5, d_out=3, r=6, L=1)" and lines[3].startswith("    lay")


def test_a_layer_of_another_kind_does_not_keep_a_network_from_being_printed():
    net = InfMLP(5, 3, 6, 1)
    net.layers[1] = nn.Identity()
    assert "layers.1" in repr(net)
