"""The settings of a meta-learning run, and the command line made of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..training.choices import FITS
from ..training.flags import (
    CommandLine,
    add_log,
    add_save_dir,
    add_switches,
    command_line,
    milestones,
    require_none,
    too_small,
)
from .meanings import PAPER, TEXTS

REMOVED = {
    "--orig-model": "the convolutional network of the MAML paper is not part of this library",
    "--lin-model": "the linear infinite network is not part of this library",
    **dict.fromkeys(
        (
            "--sigma1",
            "--sigma2",
            "--sigmab",
            "--first-layer-init-alpha",
            "--second-layer-init-alpha",
        ),
        "it belonged to the linear infinite network",
    ),
}
# of everything but rows
DTYPES = {"float16": "float32", "float32": "float32", "float64": "float64"}

AT_LEAST_ONE = (
    "num_ways",
    "num_shots",
    "num_shots_test",
    "infnet_r",
    "batch_size",
    "num_epochs",
    "num_batches",
    "num_test_batches",
    "num_steps",
    "depth",
)
NOT_NEGATIVE = (
    "step_size",
    "meta_lr",
    "meta_momentum",
    "first_layer_lr_mult",
    "last_layer_lr_mult",
    "bias_lr_mult",
)


@dataclass(frozen=True)
class Settings:
    """One run. Flags and defaults of the original where it had them; `depth` counts hidden layers
    of ReLU units."""

    folder: str = "./dataset"
    dataset: str = "omniglot"
    ink: bool = False
    load_model_path: str = ""
    num_ways: int = 5
    num_shots: int = 5
    num_shots_test: int = 15
    hidden_size: int = 64
    depth: int = 2
    infnet_r: int = 100
    memory: str = "rows"
    degree: int = 2
    fit: str = "hermite"
    normalize: str = "None"
    mu_init: bool = False
    gp: bool = False
    ntk: bool = False
    gp1lp: bool = False
    ntk1lp: bool = False
    varw: float = 1.0
    varb: float = 0.0
    bias_alpha: float = 1.0
    last_bias_alpha: float = 0.0
    first_layer_alpha: float = 1.0
    no_adapt_readout: bool = False
    adapt_readout_only: bool = False
    train_last_layer_only: bool = False
    readout_zero_init: bool = False
    optimizer: str = "sgd"
    scheduler: str = "None"
    lr_drop_ratio: float = 0.5
    lr_drop_milestones: str = ""
    first_layer_lr_mult: float = 1.0
    last_layer_lr_mult: float = 1.0
    bias_lr_mult: float = 1.0
    meta_lr: float = 0.001
    meta_momentum: float = 0.0
    grad_clip: float = -1.0
    gclip_per_param: bool = False
    Gproj_inner: bool = False
    Gproj_outer: bool = False
    train_loss_function: str = "None"
    batch_size: int = 25
    num_steps: int = 1
    step_size: float = 0.1
    first_order: bool = False
    num_epochs: int = 50
    num_batches: int = 100
    num_test_batches: int = 100
    no_train_shuffle: bool = False
    test_dataset_split: str = "val"
    unrotated_test: bool = False
    sum_tasks: bool = False
    num_workers: int = 1
    use_cuda: bool = False
    implementation: str = "auto"
    dtype: str = "float64"
    seed: int = 1

    @property
    def kernel(self) -> str | None:
        """nngp or ntk for learners without features, else None."""
        if self.gp or self.gp1lp:
            return "nngp"
        return "ntk" if self.ntk or self.ntk1lp else None

    @property
    def hidden_layers(self) -> int:
        return 1 if self.gp1lp or self.ntk1lp else self.depth

    @property
    def infinite(self) -> bool:
        return self.hidden_size == -1

    @property
    def sums(self) -> tuple[str, ...]:
        """What an infinite network sums over: rows or moments."""
        return (self.memory,) if self.infinite and self.kernel is None else ()

    @property
    def not_native(self) -> str | None:
        """Why C++ can't sum for this run on any machine, or None."""
        if self.use_cuda:
            return "it runs on the CPU, and --use-cuda was given"
        if DTYPES[self.dtype] != "float32":
            return f"it sums float32, and --dtype is {self.dtype}"
        if self.memory == "moments" and self.degree > 2:
            return f"it knows degrees up to 2, and --degree is {self.degree}"
        return None

    def describe(self) -> str:
        what = {"nngp": "NNGP", "ntk": "NTK"}.get(self.kernel or "")
        if what is None:
            finite = f"finite {'μ' if self.mu_init else 'π'}-network, width {self.hidden_size}"
            what = f"infinite π-network, {self.memory}" if self.infinite else finite
            what += f", r={self.infnet_r}"
        tasks = (
            self.dataset
            if self.dataset == "sinusoid"
            else f"{self.dataset} {self.num_ways}-way {self.num_shots}-shot"
        )
        return f"{tasks}: {what}, depth {self.hidden_layers}, seed {self.seed}"

    def note_on_depth(self) -> str:
        """What to say before training where the network on Omniglot isn't the paper's, else
        nothing."""
        if self.dataset != "omniglot" or self.kernel or self.depth == 2:
            return ""
        stages = "one stage" if self.depth == 1 else f"{self.depth} stages"
        return (
            f"--depth {self.depth} is {stages} of ReLU units; the paper's network on Omniglot has "
            "two, an input layer and one hidden π-layer: --depth 2"
        )

    def check(self) -> None:
        """Raise on settings that contradict each other or can't be meant."""
        problems = too_small(self, AT_LEAST_ONE, 1) + too_small(self, NOT_NEGATIVE, 0)
        if self.dataset == "miniimagenet":
            problems.append(
                "there is no reader of mini-ImageNet here; --dataset omniglot or sinusoid"
            )
        if self.normalize == "BN":
            problems.append(
                "batch norm has no infinite-width counterpart here; --normalize LN is layer norm"
            )
        if self.hidden_size < 1 and not self.infinite:
            problems.append(
                "--hidden-size is the width of a finite network, or -1 for the infinite one; got "
                f"{self.hidden_size}"
            )
        if sum((self.gp, self.ntk, self.gp1lp, self.ntk1lp)) > 1:
            problems.append("give one of --gp, --ntk, --gp1lp and --ntk1lp")
        if self.mu_init and (self.infinite or self.kernel):
            problems.append("--mu-init makes a finite μ-network: give its width with --hidden-size")
        if self.adapt_readout_only and self.no_adapt_readout:
            problems.append("--adapt-readout-only and --no-adapt-readout leave nothing to adapt")
        if self.kernel and self.no_adapt_readout:
            problems.append(
                "a kernel learner is a readout only, so --no-adapt-readout leaves nothing to adapt"
            )
        if bool(milestones(self.lr_drop_milestones)) != (self.scheduler == "multistep"):
            problems.append("--scheduler multistep and --lr-drop-milestones belong together")
        rows = self.memory == "rows" and self.infinite and not self.kernel
        if rows and not self.first_order and not self.adapt_readout_only:
            problems.append(
                "second order through adapted rows is no sum of rows: --adapt-readout-only, "
                "--first-order, or --memory moments"
            )
        learned_rows = rows and (
            self.depth > 1 and not self.train_last_layer_only or self.last_layer_lr_mult
        )
        if self.optimizer != "sgd" and (learned_rows or self.kernel):
            problems.append(
                f"--optimizer {self.optimizer} needs --memory moments or a finite network: rows "
                "are appended by SGD only"
            )
        if self.optimizer != "sgd" and self.meta_momentum:
            problems.append(f"--meta-momentum is SGD's; --optimizer {self.optimizer} has its own")
        require_none(problems)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


CHOICES = {
    "implementation": ("auto", "plain", "native"),
    "dataset": ("sinusoid", "omniglot", "miniimagenet"),
    "normalize": ("BN", "LN", "None"),
    "memory": ("rows", "moments"),
    "fit": FITS,
    "optimizer": ("sgd", "adam"),
    "scheduler": ("None", "cosine", "multistep", "linear", "exp"),
    "train_loss_function": ("None", "SmoothL1Loss"),
    "test_dataset_split": ("test", "val"),
    "dtype": tuple(DTYPES),
}


def parser(description: str | None = None) -> CommandLine:
    """The command line of `train`: one flag per setting, and what concerns the output only."""
    result = command_line(
        "meta.train",
        Settings,
        description,
        choices=CHOICES,
        texts=TEXTS,
        paper=PAPER,
        aliases={"infnet_r": ("--infnet_r",), "use_cuda": ("--cuda",)},
        positional="folder",
    )
    add_save_dir(result, "meta", "--output-folder")
    output = result.group("output")
    output.add_argument(
        "--overwrite-existing",
        "--overwrite",
        action="store_true",
        help="replace the run in --save-dir",
    )
    output.add_argument(
        "--store",
        choices=("jsonl", "cox"),
        default="jsonl",
        help="cox: also write the tables as a cox store (pip install 'pilimit[cox]')",
    )
    switches = {
        "resume": "continue the run in --save-dir",
        "validate-only": "no training: validate the network of --load-model-path, or a fresh one",
        "verbose": "print the network",
        "quiet": "print nothing while training",
    }
    add_switches(result, switches)
    add_log(result)
    return result
