"""What an infinite-width convolution costs: the chunked operator against all of Φ in memory and
conv2d, for several ranks.

    python -m experiments.bench.conv --out output/bench_conv
    python -m experiments.bench.conv --out output/bench_conv --r 16 --size 32 --rounds 3

One call is forward and backward of one 3x3 layer with gradients of input and V. The obvious form
indexes the upper triangle of u ⊗ u, concatenates the columns of Φ and calls conv2d; "distances" is
the same with the columns of `PolynomialFeatures`, which index nothing. All take turns in one
process, one thread; ratios are medians of paired rounds, times the least CPU time. FLOPs are those
of the three products, 6·P·9·o a position; the machine's rate is that of a 1024³ float32 product in
the same rounds. Memory is the peak of tensors allocated within a call, beyond the inputs, from
torch's profiler. Kept per case in results.jsonl.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from pilimit_lib.core import write_text
from pilimit_lib.inf.conv.autograd import feature_conv2d
from pilimit_lib.inf.conv.geometry import Geometry
from pilimit_lib.inf.conv.sums import plain
from pilimit_lib.inf.dual.features import PolynomialFeatures
from pilimit_lib.inf.dual.hermite import hermite_series

from ..training.flags import add_out, plain_command_line
from .machine import describe

KAPPA = hermite_series("relu", 2, "minimax").kappa
GEOMETRY = Geometry((3, 3), padding=(1, 1))
CASES = [(8, 32), (16, 32), (16, 16), (32, 16), (32, 8), (64, 8)]


def obvious(r: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The layer as one would write it first: cat and conv2d. V as conv2d wants it, [o P 3 3]."""
    i, j = torch.triu_indices(r, r)
    weight = (torch.where(i == j, 1.0, 2**0.5) * KAPPA[2] ** 0.5)[:, None, None]

    def layer(g: Tensor, V: Tensor) -> Tensor:
        s = g.norm(dim=1, keepdim=True)
        u = g / s
        phi = (
            torch.cat(
                [
                    torch.full_like(s, KAPPA[0] ** 0.5),
                    u * KAPPA[1] ** 0.5,
                    u[:, i] * u[:, j] * weight,
                ],
                1,
            )
            * s
        )
        return F.conv2d(phi, V, padding=1)

    return layer


def calls(r: int, size: int, b: int) -> dict[str, Callable[[], None]]:
    """The forms of the layer, each as a call of forward and backward."""
    torch.manual_seed(0)
    features = PolynomialFeatures(r, KAPPA)
    g, grad = torch.randn(2, b, r, size, size)
    ours = g.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    V = torch.randn(features.P, 3, 3, r, requires_grad=True)
    g, theirs, layer = (
        g.requires_grad_(),
        torch.randn(r, features.P, 3, 3, requires_grad=True),
        obvious(r),
    )
    a = torch.randn(1024, 1024)
    return {
        "ours": lambda: torch.autograd.grad(
            feature_conv2d(features, ours, V, GEOMETRY), (ours, V), grad
        ),
        "obvious": lambda: torch.autograd.grad(layer(g, theirs), (g, theirs), grad),
        "distances": lambda: torch.autograd.grad(plain(features, g, V, GEOMETRY), (g, V), grad),
        "matmul": lambda: torch.mm(a, a),
    }


def peak_bytes(call: Callable[[], None]) -> int:
    """The most that tensors allocated within the call took at one time."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    held = peak = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def measure(r: int, size: int, b: int, rounds: int) -> dict:
    """One line of results for rank r on b maps of size x size."""
    forms = calls(r, size, b)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for call in forms.values():
        call()
    for _ in range(rounds):
        for name, call in forms.items():
            started = time.process_time()
            call()
            times[name].append(time.process_time() - started)
    P = PolynomialFeatures(r, KAPPA).P
    flops = 6 * P * 9 * r * b * size * size
    rate = 2 * 1024**3 / min(times["matmul"])
    result = {
        "r": r,
        "size": size,
        "b": b,
        "P": P,
        "GFLOP": flops / 1e9,
        "rate": rate / 1e9,
        "of_rate": flops / min(times["ours"]) / rate,
        "phi_MB": 4e-6 * P * b * size * size,
    }
    for name in ("ours", "obvious", "distances"):
        result |= {
            f"{name}_ms": 1e3 * min(times[name]),
            f"{name}_MB": peak_bytes(forms[name]) / 1e6,
        }
    for name in ("obvious", "distances"):
        result[f"{name}_ratio"] = statistics.median(
            t / mine for t, mine in zip(times[name], times["ours"])
        )
    return result


def table(results: list[dict]) -> str:
    lines = [
        "| r | map | P | GFLOP | ours ms | of the matmul rate | obvious: ratio | distances: ratio "
        "| ours MB | obvious MB "
        "| all of Φ, MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in results:
        lines.append(
            f"| {line['r']} | {line['b']}x{line['size']}x{line['size']} | {line['P']:,} | "
            f"{line['GFLOP']:.1f} | "
            f"{line['ours_ms']:.0f} | {100 * line['of_rate']:.0f} % of {line['rate']:.0f} GFLOP/s "
            "| "
            f"{line['obvious_ratio']:.1f}x | {line['distances_ratio']:.1f}x | "
            f"{line['ours_MB']:.0f} | "
            f"{line['obvious_MB']:.0f} | {line['phi_MB']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = plain_command_line("bench.conv", __doc__)
    add_out(parser, None, "folder of results.jsonl, from which a command goes on, and table")
    parser.add_argument(
        "--r", type=int, nargs="+", default=None, help="ranks (default a list of ranks and sizes)"
    )
    parser.add_argument(
        "--size", type=int, default=16, help="rows and columns of the maps, with --r (default 16)"
    )
    parser.add_argument("--b", type=int, default=64, help="maps of a batch (default 64)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default 5)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    known = {(line["r"], line["size"], line["b"]) for line in results}
    for r, size in CASES if args.r is None else [(r, args.size) for r in args.r]:
        if (r, size, args.b) not in known:
            results.append(measure(r, size, args.b, args.rounds))
            write_text(path, "".join(json.dumps(line) + "\n" for line in results))
    found = f"{describe()}\n\n{table(results)}"
    write_text(args.out / "table.md", found)
    print(found)


if __name__ == "__main__":
    main()
