"""What flags may be set to, and what goes with it. Imports no torch, so that --help need not."""

from __future__ import annotations

DATASETS = ("digits", "cifar10", "fashion_mnist")
# pixels that augmentation moves an image at most
SHIFT = {"digits": 1, "cifar10": 4, "fashion_mnist": 2, "imagenet32": 4}
# a mirrored digit is another sign
FLIPS = {"digits": False, "cifar10": True, "fashion_mnist": True, "imagenet32": True}
# of `pilimit_lib.inf.dual.hermite`
ACTIVATIONS = ("relu", "gelu", "erf", "tanh", "silu")
FITS = ("hermite", "minimax")
PADDING_MODES = ("zeros", "circular", "reflect", "replicate")  # of `pilimit_lib.inf.conv.geometry`
# ridges of a regression that tries several, relative to the kernel's mean diagonal
REGS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
