"""The library against pilimit_orig, a second implementation that shares no code with it: 100 steps
on random data.

    # a table; exit status 1 if any case differs by more than the tolerance
    python experiments/tests/compare_mlp.py
    # the same cases as tests
    pytest tests/compare_mlp.py

Every case trains both networks from the same start on the same batches and compares losses and test
outputs after every step, as max|difference| / max|output|: within 1e-5 in float32, 1e-10 in
float64.
"""

import sys
from dataclasses import dataclass

import torch

from pilimit_lib.inf import InfMLP, PiSGD, clip_grad_norm_, param_groups
from pilimit_orig.inf import InfPiMLP
from pilimit_orig.inf.optim import InfSGD
from pilimit_orig.losses import LOSSES, one_hot

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@dataclass(frozen=True)
class Case:
    """One pair of runs. L is the library's depth; pilimit_orig's is L + 1."""

    name: str
    L: int = 1
    r: int = 12
    batch: int = 8
    steps: int = 100
    layernorm: bool = False
    alphas: tuple = (1.0, 0.5, 0.5, None)  # first layer, last layer, bias, last bias
    readout_zero_init: bool = False
    loss: str = "xent"
    lr: float = 0.2
    wd: float = 0.0
    momentum: float = 0.0
    mults: tuple = (0.5, 2.0, 0.5)  # first layer, last layer, bias
    apply_lr_mult_to_wd: bool = True
    gclip: float = 0.0
    gclip_per_param: bool = False


CASES = [
    Case("plain"),
    Case("depth 0", L=0),
    Case("depth 2", L=2),
    Case("depth 3, layer norm", L=3, layernorm=True),
    Case("layer norm", layernorm=True),
    Case("batch 1", batch=1),
    Case("batch 32", batch=32),
    Case("no bias", alphas=(1.0, 1.0, 0.0, None)),
    Case("no last bias", alphas=(2.0, 0.5, 4.0, 0.0)),
    Case("only a last bias", alphas=(1.0, 1.0, 0.0, 0.7)),
    Case("another last bias", alphas=(1.5, 0.5, 0.5, 0.25)),
    Case("readout of one zero row", readout_zero_init=True),
    Case("squared error", loss="mse", lr=0.5),
    Case("weight decay", wd=0.01),
    Case("undivided weight decay", wd=0.01, apply_lr_mult_to_wd=False),
    Case("clip per parameter", gclip=0.1, gclip_per_param=True, lr=0.5),
    Case("clip together", gclip=0.1, lr=0.5),
    Case("momentum", momentum=0.8, lr=0.05),
    Case("momentum and weight decay", momentum=0.8, wd=0.05, lr=0.05, apply_lr_mult_to_wd=False),
    Case(
        "the paper's CIFAR-10 settings",
        L=2,
        lr=1.0,
        wd=1e-5,
        gclip=0.4,
        gclip_per_param=True,
        mults=(0.1, 4.0, 0.5),
        apply_lr_mult_to_wd=False,
    ),
]


def start(case: Case, d: int, classes: int, dtype: torch.dtype) -> InfPiMLP:
    """The original's network in a general position: trained networks have no zero readout and no
    zero biases."""
    first, last, bias, last_bias = case.alphas
    net = InfPiMLP(
        d,
        classes,
        case.L + 1,
        case.r,
        bias_alpha=bias,
        last_bias_alpha=last_bias,
        first_layer_alpha=first,
        last_layer_alpha=last,
        layernorm=case.layernorm,
        readout_zero_init=case.readout_zero_init,
        dtype=dtype,
        seed=1,
    )
    rng = torch.Generator().manual_seed(2)
    if not case.readout_zero_init:
        net.As[case.L + 2] = 0.1 * torch.randn(
            net.As[case.L + 2].shape, generator=rng, dtype=torch.float64
        ).to(dtype)
    net.biases = {
        l: 0.1 * torch.randn(b.shape, generator=rng, dtype=torch.float64).to(dtype)
        for l, b in net.biases.items()
    }
    return net


def random_data(case: Case, dtype: torch.dtype, d: int = 16, classes: int = 3) -> tuple:
    """(batches x [steps b d], labels [steps b], test x): labels follow a linear rule, so that there
    is something to learn."""
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(case.steps, case.batch, d, generator=rng, dtype=torch.float64)
    rule = torch.randn(d, classes, generator=rng, dtype=torch.float64)
    return (
        x.to(dtype),
        (x @ rule).argmax(-1),
        torch.randn(16, d, generator=rng, dtype=torch.float64).to(dtype),
    )


def train(
    case: Case,
    orig: InfPiMLP,
    net: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    test_x: torch.Tensor,
) -> float:
    """The largest relative difference of losses and test outputs over all steps; both networks are
    trained."""
    first, last, bias = case.mults
    theirs = InfSGD(
        orig,
        case.lr,
        case.wd,
        case.momentum,
        bias,
        first,
        last,
        case.apply_lr_mult_to_wd,
        case.gclip,
        case.gclip_per_param,
    )
    ours = PiSGD(
        param_groups(net, case.lr, case.wd, first, last, bias, case.apply_lr_mult_to_wd),
        case.lr,
        case.momentum,
    )
    worst = difference(net(test_x).detach(), orig.predict(test_x))
    for batch, labels in zip(x, y):
        theirs.zero_grad()
        loss, delta = LOSSES[case.loss][0](orig(batch), labels)
        orig.backward(delta)
        theirs.step()
        ours.zero_grad()
        out = net(batch)
        own = (
            torch.nn.functional.cross_entropy(out, labels)
            if case.loss == "xent"
            else torch.nn.functional.mse_loss(
                out, (one_hot(labels, out.shape[1], center=False) - 0.1).to(out.dtype)
            )
        )
        own.backward()
        if case.gclip:
            clip_grad_norm_(net, case.gclip, case.gclip_per_param)
        ours.step()
        with torch.no_grad():
            worst = max(
                worst,
                difference(net(test_x), orig.predict(test_x)),
                float((own - loss).abs() / loss.abs()),
            )
    return worst


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def compare(case: Case, dtype: torch.dtype, data: tuple | None = None) -> float:
    """Largest relative difference of one case."""
    x, y, test_x = data or random_data(case, dtype)
    orig = start(case, x.shape[-1], int(y.max()) + 1, dtype)
    net = InfMLP.from_pilimit_orig(orig.state(), dtype=dtype, row_dtype=dtype)
    worst = train(case, orig, net, x, y, test_x)
    assert net.rows == [len(orig.Amult[l]) for l in sorted(orig.Amult)]
    return worst


def table(cases: list[Case], data_of=random_data) -> int:
    """Prints every case in both precisions; returns how many are beyond their tolerance."""
    print(f"{'case':<32}{'float32':>12}{'float64':>12}")
    failed = 0
    for case in cases:
        worst = {dtype: compare(case, dtype, data_of(case, dtype)) for dtype in TOLERANCE}
        bad = [dtype for dtype, value in worst.items() if not value < TOLERANCE[dtype]]
        failed += bool(bad)
        verdict = "   DIFFERS" if bad else ""
        print(
            f"{case.name:<32}{worst[torch.float32]:>12.1e}{worst[torch.float64]:>12.1e}{verdict}",
            flush=True,
        )
    print(f"{len(cases) - failed} of {len(cases)} cases agree")
    return failed


if __name__ == "__main__":
    sys.exit(1 if table(CASES) else 0)
