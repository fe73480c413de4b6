"""Test a saved network, its feature kernel, or the NNGP and NTK of a ReLU network, on images. No
training.

    # a checkpoint of this library, and one of the paper's code
    python -m experiments.cifar10.cifar10test --load-model-path PATH
    python -m experiments.cifar10.cifar10test --load-model-path PATH --load-from-pilimit-orig
    # a finite sample of it, and regression on its features
    python -m experiments.cifar10.cifar10test --load-model-path PATH --width 4096
    python -m experiments.cifar10.cifar10test --load-model-path PATH --test-kernel
    # NNGP; --ntk for the NTK
    python -m experiments.cifar10.cifar10test --gp --depth 2 --train-subset-size 10000

Kernel regression says what memory it needs before it starts. --save-kernel keeps the kernel matrix
in --save-dir; the same command line then goes on where it was interrupted. Results go to
settings.json, results.jsonl and, of several --multiple-regs, regs.png there.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pilimit_lib.core import write_text
from pilimit_lib.inf import InfMLP
from pilimit_lib.inf.gp import (
    ReLUKernel,
    embed,
    features_of,
    kernel_matrix,
    kernel_product,
    kernel_ridge,
    memory_needed,
    require_memory,
)

from ..training.choices import DATASETS, REGS
from ..training.errors import errors_of
from ..training.flags import (
    CommandLine,
    add_save_dir,
    add_switches,
    command_line,
    dated_folder,
    flag_of,
    picked,
    require_none,
    settings_of,
)
from ..training.images import ImageSet, load_images
from ..training.lock import only_process
from ..training.process import human_bytes, pick_device, shows_bars
from .mlp_networks import evaluate
from .results import draw, prepare
from .saved_networks import ALPHAS, load_network
from .settings import Settings as TrainSettings

FEATURES_OF = {"digits": 64, "cifar10": 3072, "fashion_mnist": 784}


@dataclass(frozen=True)
class Settings:
    """What is tested, and on which images. None: as the checkpoint says, or as the help says."""

    load_model_path: str = ""
    load_from_pilimit_orig: bool = False
    gp: bool = False
    ntk: bool = False
    ntk_as_published: bool = False
    test_kernel: bool = False
    width: int | None = None
    r: int | None = None
    depth: int | None = None
    layernorm: bool = False
    first_layer_alpha: float | None = None
    last_layer_alpha: float | None = None
    bias_alpha: float | None = None
    last_bias_alpha: float | None = None
    varw: float = 1.0
    varb: float = 0.0
    first_layer_lr_mult: float = 1.0
    last_layer_lr_mult: float = 1.0
    bias_lr_mult: float | None = None
    kernel_reg: float = 1e-8
    multiple_regs: bool = False
    method: str = "auto"
    dataset: str | None = None
    data: str = "./dataset"
    train_subset_size: int | None = None
    test_subset_size: int | None = None
    held_out: int = 0
    loss: str = "xent"
    batch_size: int = 64
    test_batch_size: int = 512
    seed: int = 1
    cuda: bool = False
    float: bool = False

    def check(self) -> None:
        """Raise on settings that contradict each other or can't be meant."""
        problems = []
        if bool(self.load_model_path) + self.gp + self.ntk != 1:
            problems.append("give one of --load-model-path, --gp and --ntk")
        if not self.load_model_path:
            for name in (
                "load_from_pilimit_orig",
                "test_kernel",
                "width",
                "r",
                "layernorm",
                *ALPHAS,
            ):
                if getattr(self, name):
                    problems.append(
                        f"{flag_of(name)} belongs to a network: give its --load-model-path"
                    )
        if self.load_model_path or self.gp:
            for name in (
                "first_layer_lr_mult",
                "last_layer_lr_mult",
                "bias_lr_mult",
                "ntk_as_published",
            ):
                if getattr(self, name) != getattr(type(self), name):
                    problems.append(
                        f"{flag_of(name)} is part of the tangent kernel: it needs --ntk"
                    )
        if self.width is not None and self.width < 1:
            problems.append(
                f"--width must be at least 1, got {self.width}; leave it out for the infinite "
                "network"
            )
        if self.held_out and self.load_model_path and not self.test_kernel:
            problems.append(
                "--held-out leaves training images for choosing a ridge: it needs --gp, --ntk or "
                "--test-kernel"
            )
        if self.held_out < 0:
            problems.append(f"--held-out must not be negative, got {self.held_out}")
        if self.kernel_reg < 0:
            problems.append(f"--kernel-reg must not be negative, got {self.kernel_reg}")
        require_none(problems)

    @property
    def regs(self) -> list[float]:
        """Ridges to try, relative to the mean diagonal of the kernel."""
        return sorted({*REGS, self.kernel_reg}) if self.multiple_regs else [self.kernel_reg]


def network(settings: Settings, device: torch.device) -> nn.Module:
    """The saved network, or the finite sample of it that --width asks for."""
    given = {
        "r": settings.r,
        "L": settings.depth,
        "layernorm": settings.layernorm or None,
        **{name: getattr(settings, name) for name in ALPHAS},
    }
    net = load_network(
        settings.load_model_path,
        given,
        settings.load_from_pilimit_orig,
        device,
        torch.float32 if settings.float else None,
    )
    if settings.width is None or getattr(net, "n", None) == settings.width:
        return net
    if not isinstance(net, InfMLP):
        raise ValueError(
            f"--width {settings.width}, but the saved network is finite already, of width {net.n}"
        )
    torch.manual_seed(settings.seed)
    return net.sample(settings.width)


def images_for(settings: Settings, net: nn.Module | None) -> ImageSet:
    """The data set that was named, or the one whose images have the network's input size."""
    name = settings.dataset
    if name is None:
        fitting = [known for known, size in FEATURES_OF.items() if net is None or size == net.d_in]
        if not fitting:
            raise ValueError(
                f"the network takes {net.d_in} numbers; no data set here has such images "
                f"({', '.join(f'{k}: {v}' for k, v in FEATURES_OF.items())})"
            )
        name = "cifar10" if net is None else fitting[0]
    data = load_images(name, settings.data, settings.train_subset_size, settings.test_subset_size)
    data = data.hold_out(settings.held_out)
    if net is not None and data.features != net.d_in:
        raise ValueError(
            f"the network takes {net.d_in} numbers, images of {name} have {data.features}"
        )
    return data


def test_network(settings: Settings, net: nn.Module, data: ImageSet) -> list[dict[str, Any]]:
    """Loss and accuracy of the network itself on the test images."""
    if net.d_out != data.classes:
        raise ValueError(
            f"the network has {net.d_out} outputs, {data.name} {data.classes} classes: "
            "only its features can be tested (--test-kernel)"
        )
    device = next(net.parameters()).device
    how = TrainSettings(loss=settings.loss, test_batch_size=settings.test_batch_size)
    loss, accuracy = evaluate(net, data.test_x.to(device), data.test_y.to(device), how)
    return [{"what": describe(settings, net), "test_loss": loss, "test_acc": accuracy}]


def kernel_of(settings: Settings) -> ReLUKernel:
    """The NNGP or NTK that the settings describe."""
    depth = 2 if settings.depth is None else settings.depth
    lrw = (settings.first_layer_lr_mult, *[1.0] * (depth - 1), settings.last_layer_lr_mult)
    return ReLUKernel(
        depth,
        settings.ntk,
        settings.varw,
        settings.varb,
        lrw,
        settings.bias_lr_mult,
        settings.ntk_as_published,
    )


def test_kernel(
    settings: Settings,
    net: nn.Module | None,
    data: ImageSet,
    folder: Path,
    save_kernel: bool,
    quiet: bool,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Accuracy of regression with the kernel on the test images, for each ridge."""
    judged = {"test": (data.test_x, data.test_y)}
    if data.held_out_x is not None:
        judged["held_out"] = (data.held_out_x, data.held_out_y)
    if net is None:
        kernel = kernel_of(settings)
    else:
        kernel = features_of(net)

    def inputs(images: Tensor) -> Tensor:
        if net is None:
            return images.flatten(1)
        return embed(net, images, settings.batch_size, shows_bars(quiet))

    x = inputs(data.train_x)
    dtype = torch.float32 if settings.float else torch.float64
    needed = memory_needed(len(x), dtype, settings.method, len(settings.regs))
    print(
        f"kernel of {len(x)} samples in {str(dtype).split('.')[1]} with {len(settings.regs)} "
        "ridge(s): "
        f"{human_bytes(needed)} of memory",
        flush=True,
    )
    require_memory(needed)
    started, spent = time.perf_counter(), time.process_time()
    K = kernel_matrix(
        kernel,
        x,
        dtype=dtype,
        cache=folder / "kernel.npy" if save_kernel else None,
        device=device,
        progress=shows_bars(quiet),
    )
    built = time.perf_counter() - started
    targets = nn.functional.one_hot(data.train_y, data.classes).double() - 1 / data.classes
    coefficients, records = [], []
    # Together for the eigendecomposition, which they share; else one by one, so that one that fails
    # leaves the others.
    for group in (
        [settings.regs] if settings.method == "eigen" else [[reg] for reg in settings.regs]
    ):
        try:
            coefficients += list(
                kernel_ridge(
                    K,
                    targets,
                    group,
                    method=settings.method,
                    progress=shows_bars(quiet),
                    keep=folder / "factor" if save_kernel else None,
                )
            )
            records += [{"what": describe(settings, net), "reg": reg} for reg in group]
        except ValueError as error:
            records += [
                {"what": describe(settings, net), "reg": reg, "failed": str(error)} for reg in group
            ]
    if not coefficients:
        return records
    solved = [record for record in records if "failed" not in record]
    for side, (images, labels) in judged.items():
        outputs = kernel_product(
            kernel,
            inputs(images),
            x,
            torch.stack(coefficients),
            device=device,
            progress=shows_bars(quiet),
        )
        for record, output in zip(solved, outputs):
            record |= scores(output, labels, side)
    for record in solved:
        record["kernel_seconds"] = round(built, 1)
        record["seconds"] = round(time.perf_counter() - started, 1)
        record["cpu_seconds"] = round(time.process_time() - spent, 1)
    return records


def scores(outputs: Tensor, labels: Tensor, side: str = "test") -> dict[str, float]:
    """Accuracy, and mean squared error to centred one-hot labels, of the images that are judged."""
    targets = nn.functional.one_hot(labels, outputs.shape[1]).double() - 1 / outputs.shape[1]
    return {
        f"{side}_loss": float((outputs - targets).square().mean()),
        f"{side}_acc": float((outputs.argmax(1) == labels).double().mean()),
    }


def describe(settings: Settings, net: nn.Module | None) -> str:
    if net is None:
        published = " as published" if settings.ntk_as_published else ""
        return f"{'NTK' if settings.ntk else 'NNGP'}{published}, depth {kernel_of(settings).depth}"
    kind = f"finite network, width {net.n}" if hasattr(net, "n") else "infinite network"
    return f"{'feature kernel of ' if settings.test_kernel else ''}{kind}, r={net.r}, depth {net.L}"


def run(
    settings: Settings,
    save_dir: str | Path,
    *,
    save_kernel: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    verbose: bool = False,
) -> list[dict[str, Any]]:
    """Test what the settings describe; one record per ridge (accuracies are fractions), also
    written to `save_dir`."""
    settings.check()
    device = pick_device(settings.cuda)
    net = network(settings, device) if settings.load_model_path else None
    data = images_for(settings, net)
    folder = Path(save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with only_process(folder):
        prepare(folder, asdict(settings), overwrite, asdict(Settings()))
        if verbose:
            print(net if net is not None else kernel_of(settings))
        if net is not None and not settings.test_kernel:
            records = test_network(settings, net, data)
        else:
            records = test_kernel(settings, net, data, folder, save_kernel, quiet, device)
        for record in records:
            record |= {"dataset": data.name, "train": len(data.train_y), "test": len(data.test_y)}
        write_text(
            folder / "results.jsonl", "".join(json.dumps(record) + "\n" for record in records)
        )
        draw(records, folder)
    return records


CHOICES = {
    "dataset": DATASETS,
    "loss": ("xent", "mse"),
    "method": ("auto", "cholesky", "eigen"),
}
TEXTS = {
    "what is tested": {
        "load_model_path": "state_dict of a network",
        "load_from_pilimit_orig": "it is a checkpoint of the paper's code",
        "gp": "the NNGP of a ReLU network instead",
        "ntk": "its NTK instead",
        "ntk_as_published": "the tangent kernel as the paper's code computes it",
        "test_kernel": "regression on the network's features, not the network itself",
        "width": "a finite sample of this width",
    },
    "network": {
        "r": "to check the network",
        "depth": "of a kernel: its stages of ReLU units, as the paper's code counts (default 2: "
        "the kernel of the network that cifar10mlp --depth 1 trains); of a network: its hidden "
        "π-layers, as cifar10mlp counts, to check it",
        "layernorm": "to check the network",
        "first_layer_alpha": "to check the network, as are the other alphas",
        "last_layer_alpha": "to check the network",
        "bias_alpha": "to check the network",
        "last_bias_alpha": "to check the network",
        "loss": "cross entropy, or squared error to one-hot labels: what is printed",
    },
    "kernel": {
        "varw": "variance of the weights, times their fan-in",
        "varb": "variance of the biases",
        "first_layer_lr_mult": "share of the learning rate, in the NTK: of the first layer",
        "last_layer_lr_mult": "likewise of the readout",
        "bias_lr_mult": "likewise of biases (default 1 where --varb is positive, else no biases)",
        "kernel_reg": "ridge, relative to the mean of the kernel's diagonal",
        "multiple_regs": "try ten ridges from 1e-8 to 10, and draw them",
        "method": "how the regression is solved; eigen shares its work among ridges",
    },
    "memory": {"float": "float32 kernel and rows"},
    "data": {
        "dataset": "images to test on (default what fits the network; cifar10 for --gp and --ntk)",
        "batch_size": "samples whose features are computed at once; changes no result",
        "seed": "of the finite sample that --width asks for",
    },
}


def parser() -> CommandLine:
    """The command line: one flag per setting, and what concerns the output only."""
    result = command_line("cifar10.cifar10test", Settings, __doc__, choices=CHOICES, texts=TEXTS)
    add_save_dir(result, "cifar10test")
    switches = {
        "save-kernel": "keep the kernel matrix in --save-dir, and its factor while that is made",
        "overwrite": "replace the test in --save-dir",
        "verbose": "print the network or kernel",
        "quiet": "no progress bars",
        "human": "round what is printed",
    }
    add_switches(result, switches)
    return result


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    arguments = parser()
    args = arguments.parse_args(argv)
    if args.save_kernel and not args.save_dir:
        arguments.error("--save-kernel needs a --save-dir, to be found there again")
    save_dir = args.save_dir or dated_folder("cifar10test")
    with errors_of(arguments):
        how = picked(args, ("save_kernel", "overwrite", "quiet", "verbose"))
        records = run(settings_of(args, Settings), save_dir, **how)
        for record in records:
            reg = f", ridge {record['reg']:g}" if "reg" in record else ""
            if "failed" in record:
                print(f"{record['what']}{reg}: {record['failed']}")
            else:
                digits = 1 if args.human else 2
                held_out = (
                    f", {100 * record['held_out_acc']:.{digits}f} % of held-out images"
                    if "held_out_acc" in record
                    else ""
                )
                print(
                    f"{record['what']}{reg}: {100 * record['test_acc']:.{digits}f} % of "
                    f"{record['test']} test images ({record['dataset']}), loss "
                    f"{record['test_loss']:.4f}{held_out}"
                )
        print(f"results in {save_dir}")
    return records


if __name__ == "__main__":
    main()
