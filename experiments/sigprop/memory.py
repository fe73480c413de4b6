"""Memory of a training step against depth: bytes saved for backward, and all tensors that are
alive, beside backprop.

    python -m experiments.sigprop.memory
    python -m experiments.sigprop.memory --width 256 --batch 1024 --depths 4 8 16 32 64

"saved" is what autograd holds at one time, counted by saved-tensor hooks, without parameters.
"live" is the peak of all storages created during a step, gradients and temporaries of optimisers
included, parameters and their moments not. On a GPU "allocated" is the allocator's own peak above
what was there before the step. Gradients of local layers are dropped after each local step.
"""

from __future__ import annotations

import weakref
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint_sequential

from pilimit_lib import sigprop

from ..training.flags import add_out, plain_command_line
from .methods import Settings, make, step

WAYS = ("sigprop", "sigprop per class", "backprop", "backprop checkpointed")


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside create, for as long as they live:
    `held` now, `peak` at most."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._take(leaf.untyped_storage())
        return out

    def existing(self, tensors) -> None:
        """Storages that are there before do not count."""
        self._known.update(t.untyped_storage()._cdata for t in tensors)

    def _take(self, storage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


class Checkpointed(nn.Module):
    """The same chain, recomputing activations in about sqrt(depth) segments."""

    def __init__(self, chain: nn.Sequential):
        super().__init__()
        self.chain = chain

    def forward(self, x):
        return checkpoint_sequential(
            self.chain, max(1, round(len(self.chain) ** 0.5)), x, use_reentrant=False
        )


def measure(way: str, depth: int, width: int, batch: int, device: str) -> dict:
    """One MLP of `depth` hidden layers: the second step, when optimisers have their moments."""
    torch.manual_seed(0)
    settings = Settings(
        network="mlp",
        width=width,
        depth=depth,
        per_class=way == "sigprop per class",
        partners="label" if way == "sigprop per class" else "product",
    )
    model, optimizer = make(settings, way.split()[0], (1, 8, 8))
    if way == "backprop checkpointed":
        model = Checkpointed(model)
    model.to(device)
    x, y = torch.randn(batch, 1, 8, 8, device=device), torch.randint(10, (batch,), device=device)
    step(model, optimizer, x, y)
    found = {"way": way, "depth": depth}
    with sigprop.monitors.Memory(model) as saved:
        step(model, optimizer, x, y)
    found["saved kB"] = saved.peak / 1000
    optimizer.zero_grad()
    optimizers = [optimizer]
    if isinstance(model, sigprop.models.Model):
        optimizers.extend(model.local_optimizers().values())
    live = Live()
    live.existing([x, y, *model.state_dict().values()])
    live.existing(
        v
        for o in optimizers
        for s in o.state.values()
        for v in s.values()
        if isinstance(v, torch.Tensor)
    )
    with live:
        step(model, optimizer, x, y)
    found["live kB"] = live.peak / 1000
    if device == "cuda":
        optimizer.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, optimizer, x, y)
        found["allocated kB"] = (torch.cuda.max_memory_allocated() - before) / 1000
    return found


def plot(frame: pd.DataFrame, path: Path) -> None:
    """Both measures against depth."""
    import seaborn as sns
    from matplotlib.figure import Figure  # not pyplot: nothing global, no window

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for ax, column in zip(figure.subplots(1, 2, sharex=True), ("saved kB", "live kB")):
        sns.lineplot(
            frame, x="depth", y=column, hue="way", marker="o", ax=ax, legend=column == "saved kB"
        )
        ax.set(
            xscale="log",
            xticks=sorted(frame.depth.unique()),
            xticklabels=sorted(frame.depth.unique()),
            xlabel="hidden layers",
        )
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> pd.DataFrame:
    flags = plain_command_line("sigprop.memory", __doc__)
    flags.add_argument(
        "--depths",
        nargs="+",
        type=int,
        default=[4, 8, 16, 32],
        help="numbers of layers (default 4 8 16 32)",
    )
    flags.add_argument(
        "--width", type=int, default=64, help="units or channels of a layer (default 64)"
    )
    flags.add_argument("--batch", type=int, default=256, help="images of a step (default 256)")
    flags.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where torch computes (default a GPU where there is one)",
    )
    flags.add_argument(
        "--cuda",
        dest="device",
        action="store_const",
        const="cuda",
        help="the same as --device cuda",
    )
    add_out(flags, "results/sigprop/memory", "folder of table and figure")
    args = flags.parse_args(argv)
    frame = pd.DataFrame(
        [
            measure(way, depth, args.width, args.batch, args.device)
            for way in WAYS
            for depth in args.depths
        ]
    )
    args.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(args.out / "memory.csv", index=False)
    plot(frame, args.out / "memory.png")
    print(f"width {args.width}, batch {args.batch}, {args.device}")
    print(frame.pivot(index="way", columns="depth").round(0).to_string())
    return frame


if __name__ == "__main__":
    main()
