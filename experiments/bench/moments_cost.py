"""What a training step costs in time and memory: moments against exact rows, and against rows kept
as the original code does.

    python -m experiments.bench.moments_cost --out output/moments_cost
    python -m experiments.bench.moments_cost --out output/moments_cost --r 100 --b 8 32 --rows 20000
    200000

One step is forward, backward, clipping and SGD with weight decay of a network with one hidden
π-layer, timed in process CPU time (minimum over repetitions, all variants in one process). Rows in
the original's style are torch.cat on every step, a scaled copy of A, and arc cosines on the whole
[b m] matrix. Results are kept per case in results.jsonl; the same command resumes.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from pilimit_lib.core import write_text
from pilimit_lib.inf import InfMLP, PiSGD, clip_grad_norm_, param_groups

from ..training.flags import add_out, plain_command_line
from .machine import describe

D_IN, D_OUT = 192, 10


class CopyingRows(nn.Module):
    """A π-layer as the original keeps it: tensors that are concatenated anew at every step,
    hand-written gradients."""

    def __init__(self, r: int, r_out: int, rows: int) -> None:
        super().__init__()
        self.A, self.Amult = torch.randn(rows, r_out) / rows, torch.ones(rows)
        self.B = F.normalize(torch.randn(rows, r), dim=1)

    def forward(self, g: torch.Tensor) -> torch.Tensor:
        self.s = g.norm(dim=1, keepdim=True)
        self.unit = g / self.s
        self.q = (self.unit @ self.B.T).clamp(-1, 1)
        kernel = ((1 - self.q**2).sqrt() + self.q * (math.pi - self.q.acos())) / (2 * math.pi)
        return self.s * (kernel @ (self.A * self.Amult[:, None]))

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        dgamma = grad @ (self.A * self.Amult[:, None]).T
        along = (dgamma * (1 - self.q**2).sqrt() / (2 * math.pi)).sum(1, keepdim=True)
        return (dgamma * (math.pi - self.q.acos()) / (2 * math.pi)) @ self.B + along * self.unit

    def step(self, grad: torch.Tensor, lr: float, decay: float) -> None:
        self.Amult = torch.cat([self.Amult * (1 - lr * decay), torch.full((len(grad),), -lr)])
        self.A, self.B = torch.cat([self.A, grad * self.s]), torch.cat([self.B, self.unit])


def best(step, repeats: int) -> float:
    """Least CPU time of a call in milliseconds, after one to warm up."""
    step()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        step()
        times.append(time.process_time() - started)
    return 1e3 * min(times)


def network_step(net: InfMLP, b: int):
    optimizer = PiSGD(param_groups(net, 0.01, 1e-5))
    x, y = torch.randn(b, D_IN), torch.randint(D_OUT, (b,))

    def step() -> None:
        F.cross_entropy(net(x), y).backward()
        clip_grad_norm_(net, 0.4, per_param=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


def copying_step(r: int, rows: int, b: int):
    first, layers = (
        torch.randn(D_IN, r) / math.sqrt(r),
        [CopyingRows(r, r, rows), CopyingRows(r, D_OUT, rows)],
    )
    x, y = torch.randn(b, D_IN), torch.randint(D_OUT, (b,))

    def step() -> None:
        outputs = [layers[0](x @ first)]
        outputs.append(layers[1](outputs[0]))
        grad = (outputs[1].softmax(1) - F.one_hot(y, D_OUT)) / b
        for layer in reversed(layers):
            below = layer.backward(grad)
            layer.step(grad, 0.01, 1e-5)
            grad = below
        first.sub_(x.T @ grad, alpha=0.01)

    return step


def stream_seconds(byte_count: int) -> float:
    """Time to read and write so many bytes in place: half each. The floor of a fused step is 3
    reads and 1 write of V."""
    buffer = torch.zeros(min(byte_count, 2**28) // 4)
    per_byte = (
        min(best(lambda: buffer.mul_(0.999), 5) for _ in range(2)) / 1e3 / (2 * 4 * len(buffer))
    )
    return per_byte * byte_count


def measure(case: dict, repeats: int) -> dict:
    """One line of results for {kind, r, b, rows}: milliseconds per step and megabytes of what the
    layers keep."""
    r, b, rows = case["r"], case["b"], case["rows"]
    torch.manual_seed(0)
    if case["kind"] == "moments":
        net = InfMLP(D_IN, D_OUT, r, 1, memory="moments", fused=True)
        floor = 1e3 * stream_seconds(4 * net.row_bytes)
        return case | {
            "ms": best(network_step(net, b), repeats),
            "MB": net.row_bytes / 1e6,
            "floor_ms": floor,
        }
    if case["kind"] == "rows":
        net = InfMLP(D_IN, D_OUT, r, 1)
        for layer in net.layers[1:]:
            layer.set_rows(
                torch.randn(rows, layer.r_out) / rows,
                torch.ones(rows),
                F.normalize(torch.randn(rows, r), dim=1),
            )
        return case | {"MB": net.row_bytes / 1e6, "ms": best(network_step(net, b), repeats)}
    return case | {
        "ms": best(copying_step(r, rows, b), repeats),
        "MB": 4 * rows * (3 * r + D_OUT) / 1e6,
    }


def extrapolated(frame: pd.DataFrame, rows: int) -> pd.DataFrame:
    """Rows at a number that was not run, from the slope between the two largest that were: time and
    memory are linear in it."""
    lines = []
    for (kind, r, b), group in frame[frame["kind"] != "moments"].groupby(["kind", "r", "b"]):
        group = group.sort_values("rows").tail(2)
        if len(group) == 2 and group["rows"].iloc[1] < rows:
            (m0, m1), line = group["rows"], {"kind": kind, "r": r, "b": b, "rows": rows}
            for column in ("ms", "MB"):
                v0, v1 = group[column]
                line[column] = v1 + (v1 - v0) / (m1 - m0) * (rows - m1)
            lines.append(line)
    return pd.DataFrame(lines)


def table(frame: pd.DataFrame) -> str:
    """Ratios of time and memory of rows to moments."""
    moments = frame[frame["kind"] == "moments"].set_index(["r", "b"])
    lines = [
        "| r | b | moments ms (MB) | floor ms | rows | exact rows ms (ratio) | original-style ms "
        "(ratio) "
        "| MB of rows (ratio) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    others = frame[frame["kind"] != "moments"]
    for (r, b, rows), group in others.groupby(["r", "b", "rows"]):
        if (r, b) not in moments.index:
            continue
        mine = moments.loc[(r, b)]
        ms = {line["kind"]: line["ms"] for _, line in group.iterrows()}
        cells = [
            f"{ms[kind]:.0f} ({ms[kind] / mine['ms']:.1f}x)" if kind in ms else ""
            for kind in ("rows", "original-style")
        ]
        MB = group["MB"].iloc[0]
        mark = " (slope)" if group["extrapolated"].any() else ""
        lines.append(
            f"| {r} | {b} | {mine['ms']:.1f} ({mine['MB']:.0f}) | {mine['floor_ms']:.1f} | "
            f"{rows:,}{mark} | "
            f"{cells[0]} | {cells[1]} | {MB:.0f} ({MB / mine['MB']:.0f}x) |"
        )
    return "\n".join(lines) + "\n"


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Time of a step against the number of rows, one panel per rank; moments are the flat lines."""
    import seaborn as sns

    ranks = sorted(frame["r"].unique())
    figure = Figure(figsize=(4.4 * len(ranks), 3.6), layout="constrained")
    for axis, r in zip(figure.subplots(1, len(ranks), squeeze=False)[0], ranks):
        part = frame[frame["r"] == r].astype({"b": str})
        sns.lineplot(
            part[part["kind"] != "moments"],
            x="rows",
            y="ms",
            hue="b",
            style="kind",
            markers=True,
            ax=axis,
        )
        for _, line in part[part["kind"] == "moments"].iterrows():
            axis.axhline(line["ms"], color="black", linewidth=0.8, linestyle=":")
            axis.annotate(
                f"moments, b={line['b']}",
                (part["rows"].max(), line["ms"]),
                fontsize=7,
                ha="right",
                va="bottom",
            )
        axis.set(xscale="log", yscale="log", title=f"r = {r}", xlabel="rows", ylabel="ms per step")
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = plain_command_line("bench.moments_cost", __doc__)
    add_out(parser, None, "folder of results.jsonl, from which a command goes on, and table")
    parser.add_argument(
        "--r", type=int, nargs="+", default=[100, 200, 400], help="ranks (default 100 200 400)"
    )
    parser.add_argument(
        "--b", type=int, nargs="+", default=[8, 32, 128], help="batch sizes (default 8 32 128)"
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[20_000, 200_000],
        help="numbers of rows (default 20000 200000)",
    )
    parser.add_argument(
        "--slope-to",
        type=int,
        default=2_000_000,
        help="number of rows to extrapolate to (default 2000000)",
    )
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each (default 5)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    known = {(line["kind"], line["r"], line["b"], line["rows"]) for line in results}
    for r in args.r:
        for b in args.b:
            for kind, rows in [
                ("moments", 0),
                *((k, m) for m in args.rows for k in ("rows", "original-style")),
            ]:
                if (kind, r, b, rows) not in known:
                    results.append(
                        measure({"kind": kind, "r": r, "b": b, "rows": rows}, args.repeats)
                    )
                    print(results[-1], flush=True)
                    write_text(path, "".join(json.dumps(line) + "\n" for line in results))
    frame = pd.DataFrame(results).assign(extrapolated=False)
    frame = pd.concat(
        [frame, extrapolated(frame, args.slope_to).assign(extrapolated=True)], ignore_index=True
    )
    found = f"{describe()}\n\n{table(frame)}"
    write_text(args.out / "table.md", found)
    draw(frame, args.out / "cost.png")
    print(found)


if __name__ == "__main__":
    main()
