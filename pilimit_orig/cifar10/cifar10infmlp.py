"""Train the paper's π-MLP, infinite or finite, on CIFAR-10 with hand-written gradients: the slow,
plain way.

    python -m pilimit_orig.cifar10.cifar10infmlp --data DIR --r 400 --depth 2 --lr 1.0 --gclip 0.4
        --gclip-per-param \\ --wd 0.00001 --no-apply-lr-mult-to-wd --bias-alpha 0.5
        --last-layer-alpha 0.5 --first-layer-lr-mult 0.1 \\ --last-layer-lr-mult 4 --batch-size 8
        --epochs 50 --scheduler multistep --lr-drop-milestones 40 --lr-drop-ratio 0.15

--depth counts stages of ReLU units, as in the paper's code, whose network on CIFAR-10 is --depth 2;
experiments.cifar10.cifar10mlp counts hidden π-layers, one less. With --save-dir every epoch writes
settings.json, metrics.csv and last.pt, from which --resume goes on bit for bit. Left out, because
they led nowhere: --init-from-data, --cycarr.
"""

import argparse
import csv
import json
import os
import sys
import time

import torch

from pilimit_orig import checkpoint
from pilimit_orig.cifar10.data import load
from pilimit_orig.command import CommandLine
from pilimit_orig.inf import FinPiMLP, InfPiMLP
from pilimit_orig.inf.optim import InfSGD, cosine, multistep
from pilimit_orig.losses import LOSSES

FLAGS = {  # name: default; a default of False makes a switch
    "data": "./dataset",
    "save-dir": "",
    "save-model": False,
    "cuda": False,
    "float": False,
    "batch-size": 64,
    "test-batch-size": 64,
    "lr": 2.0,
    "momentum": 0.0,
    "scheduler": "None",
    "lr-drop-ratio": 0.5,
    "gclip-drop-ratio": 0.5,
    "lr-drop-milestones": "",
    "gclip-drop-milestones": "",
    "wd": 1e-4,
    "gclip": 0.2,
    "gclip-per-param": False,
    "layernorm": False,
    "no-Gproj": False,
    "first-layer-lr-mult": 0.1,
    "last-layer-lr-mult": 1.0,
    "bias-lr-mult": 0.5,
    "first-layer-alpha": 1.0,
    "bias-alpha": 1.0,
    "last-layer-alpha": 1.0,
    "last-bias-alpha": None,
    "last-layer-grad-no-alpha": False,
    "no-apply-lr-mult-to-wd": False,
    "depth": 2,
    "loss": "xent",
    "r": 200,
    "gaussian-init": False,
    "human": False,
    "width": 0,
    "epochs": 24,
    "quiet": False,
    "verbose": False,
    "seed": 1,
    "train-subset-size": None,
    "test-subset-size": None,
    "tie-omegas": False,
    "resume": False,
}
MEANINGS = {  # by group
    "data": {
        "data": "folder that holds cifar-10-batches-py",
        "batch-size": "images of a step; each appends a row; the paper: 8",
        "test-batch-size": "images of a forward pass while testing",
        "seed": "of network and order of images",
        "train-subset-size": "learn from so many images; None: all",
        "test-subset-size": "test on so many images; None: all",
    },
    "network": {
        "float": "rows in float32 on a GPU too",
        "layernorm": "layer norm of pre-activations",
        "first-layer-alpha": "multiplier of the first layer's output; the paper: 1",
        "bias-alpha": "multiplier of biases, 0 none; the paper: 0.5",
        "last-layer-alpha": "multiplier of the readout's output; the paper: 0.5",
        "last-bias-alpha": "multiplier of the readout's bias; None: that of --bias-alpha",
        "last-layer-grad-no-alpha": "leave --last-layer-alpha out of the readout's gradient",
        "depth": "stages of ReLU units, one more than the hidden π-layers that cifar10mlp "
        "counts; the paper: 2",
        "loss": "cross entropy or squared error",
        "r": "rank; the paper: 200 and 400",
        "gaussian-init": "the finite μ-network, not the π-network",
        "width": "units of a finite network; 0 the infinite one",
        "tie-omegas": "one draw of random weights for all layers of the finite network",
    },
    "optimiser": {
        "lr": "learning rate; the paper: 1.0",
        "momentum": "of SGD",
        "wd": "weight decay per step; the paper: 1e-5",
        "gclip": "bound on the gradient's norm, 0 none; the paper: 0.4",
        "gclip-per-param": "clip every parameter by itself; the paper: on",
        "no-Gproj": "do not project gradients of the finite π-network",
        "first-layer-lr-mult": "the first layer's share of --lr; the paper: 0.1",
        "last-layer-lr-mult": "the readout's share of --lr; the paper: 4",
        "bias-lr-mult": "the biases' share of --lr; the paper: 0.5",
        "no-apply-lr-mult-to-wd": "the same decay in all layers; the paper: on",
    },
    "schedule": {
        "scheduler": "how the learning rate falls; the paper: multistep",
        "lr-drop-ratio": "factor of the learning rate at a milestone; the paper: 0.15",
        "gclip-drop-ratio": "factor of the clip at a milestone; the paper: 0.15",
        "lr-drop-milestones": "epochs at which the rate falls, such as 30,45; the paper: 40",
        "gclip-drop-milestones": "epochs at which the clip falls; the paper: 40",
        "epochs": "passes over the training images; the paper: 50",
    },
    "output": {
        "save-dir": "output folder; nothing is written without one",
        "save-model": "write the network at the end, in the original's format",
        "cuda": "run on the GPU",
        "human": "show loss, accuracy and rows while an epoch runs",
        "quiet": "print nothing",
        "verbose": "print the network",
        "resume": "go on with the run in --save-dir",
    },
}
CHOICES = {"scheduler": ("None", "cosine", "multistep"), "loss": tuple(LOSSES)}
OUTPUT_ONLY = ("save_dir", "save_model", "human", "quiet", "verbose", "resume", "data")


def parser():
    out = CommandLine(
        prog="python -m pilimit_orig.cifar10.cifar10infmlp",
        usage="%(prog)s [flags]",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, meanings in MEANINGS.items():
        group = out.add_argument_group(title)
        for name, meaning in meanings.items():
            default = FLAGS[name]
            if default is False:
                group.add_argument(f"--{name}", action="store_true", help=meaning)
                continue
            kind = {"last-bias-alpha": float}.get(name, int) if default is None else type(default)
            group.add_argument(
                f"--{name}",
                type=kind,
                default=default,
                choices=CHOICES.get(name),
                help=f"{meaning} (default {default})" if default != "" else meaning,
            )
    return out


def check(args):
    """What contradicts itself or cannot be meant, or None."""
    for name in ("batch_size", "test_batch_size", "depth", "r", "epochs"):
        if getattr(args, name) < 1:
            return f"--{name.replace('_', '-')} is {getattr(args, name)}, it must be at least 1"
    finite_only = [
        flag
        for flag in ("no_Gproj", "gaussian_init", "tie_omegas")
        if getattr(args, flag) and not args.width
    ]
    if finite_only:
        return f"--{finite_only[0].replace('_', '-')} concerns finite networks: give a --width"
    if args.width and not args.gaussian_init and args.width < args.r:
        return f"--width {args.width} is below --r {args.r}"
    if args.last_layer_grad_no_alpha and args.width:
        return "--last-layer-grad-no-alpha exists for the infinite network only"
    if (args.scheduler == "multistep") != bool(args.lr_drop_milestones):
        return "--scheduler multistep and --lr-drop-milestones belong together"
    if args.cuda and not torch.cuda.is_available():
        return "--cuda was given, but there is no CUDA device"
    if (args.save_model or args.resume) and not args.save_dir:
        return "--save-model and --resume need a --save-dir"
    if args.save_model and args.width:
        return "--save-model writes infinite networks"
    return None


def build(args, d, classes):
    """The network that the flags describe, from --seed."""
    device = "cuda" if args.cuda else "cpu"
    alphas = {
        name: getattr(args, name)
        for name in ("first_layer_alpha", "last_layer_alpha", "bias_alpha", "last_bias_alpha")
    }
    if args.width and args.gaussian_init:
        return FinPiMLP(
            d,
            classes,
            args.depth,
            args.width,
            layernorm=args.layernorm,
            device=device,
            seed=args.seed,
            **alphas,
        )
    net = InfPiMLP(
        d,
        classes,
        args.depth,
        args.r,
        layernorm=args.layernorm,
        device=device,
        seed=args.seed,
        last_layer_grad_no_alpha=args.last_layer_grad_no_alpha,
        **alphas,
    )
    if args.width:
        return net.sample(args.width, seed=args.seed + 1, tieomegas=args.tie_omegas)
    # As the paper's code: half precision on a GPU unless told otherwise.
    return net.half() if args.cuda and not args.float else net


def rows_of(net):
    return sum(len(a) for a in net.Amult.values()) if isinstance(net, InfPiMLP) else 0


def evaluate(net, x, y, args):
    """(mean loss, accuracy) over all images."""
    loss, right = 0.0, 0
    for part, labels in zip(x.split(args.test_batch_size), y.split(args.test_batch_size)):
        out = net.predict(part) if isinstance(net, InfPiMLP) else net(part)
        loss += float(LOSSES[args.loss][0](out, labels)[0]) * len(labels)
        right += int((out.argmax(1) == labels).sum())
    return loss / len(x), right / len(x)


def train_epoch(net, optimizer, x, y, epoch, rng, args):
    """One pass in a new order; returns (mean loss, accuracy) on the way."""
    order = torch.randperm(len(x), generator=rng).to(x.device)
    loss_of, steps = LOSSES[args.loss][0], -(-len(x) // args.batch_size)
    total, right = 0.0, 0
    for step, index in enumerate(order.split(args.batch_size)):
        if args.scheduler == "cosine":
            optimizer.lr = args.lr * cosine(epoch * steps + step, args.epochs * steps)
        out = net(x[index])
        loss, delta = loss_of(out, y[index])
        optimizer.zero_grad()
        net.backward(delta)
        optimizer.step()
        total, right = (
            total + float(loss) * len(index),
            right + int((out.argmax(1) == y[index]).sum()),
        )
        if args.human and not args.quiet and step % 20 == 0:
            seen = step * args.batch_size + len(index)
            so_far = f"loss {total / seen:.4f} acc {right / seen:.4f} rows {rows_of(net)}"
            print(
                f"\repoch {epoch + 1} step {step + 1}/{steps} {so_far}",
                end="",
                file=sys.stderr,
                flush=True,
            )
    if args.human and not args.quiet:
        print(file=sys.stderr)
    return total / len(x), right / len(x)


def state_of(net):
    """Everything of a network that training changes."""
    names = (
        ("As", "Bs", "Amult", "biases", "velocity")
        if isinstance(net, InfPiMLP)
        else ("W", "b", "Omega", "basis", "velocity")
    )
    return {name: getattr(net, name) for name in names}


def write(save, path):
    """A file written whole or not at all."""
    save(path + ".part")
    os.replace(path + ".part", path)


def save_epoch(args, net, records, rng):
    """metrics.csv and last.pt as they stand after an epoch."""

    def table(path):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)

    write(table, os.path.join(args.save_dir, "metrics.csv"))
    state = {"net": state_of(net), "records": records, "rng": rng.get_state()}
    write(lambda path: torch.save(state, path), os.path.join(args.save_dir, "last.pt"))


def resume(args, net, rng, settings):
    """Puts net and rng where last.pt left them; returns the records of the epochs done."""
    with open(os.path.join(args.save_dir, "settings.json")) as file:
        before = json.load(file)
    differing = [key for key in settings if key != "epochs" and settings[key] != before.get(key)]
    if differing:
        raise ValueError(f"the run in {args.save_dir} had other settings: {', '.join(differing)}")
    state = torch.load(
        os.path.join(args.save_dir, "last.pt"), weights_only=True, map_location=net.device
    )
    for name, value in state["net"].items():
        setattr(net, name, value)
    rng.set_state(state["rng"].cpu())
    return state["records"]


def train(args):
    """Runs the training; returns one record per epoch."""
    x, y, test_x, test_y = load(args.data, args.train_subset_size, args.test_subset_size)
    net, rng = build(args, x.shape[1], int(y.max()) + 1), torch.Generator().manual_seed(args.seed)
    x, y, test_x, test_y = (t.to(net.device) for t in (x, y, test_x, test_y))
    optimizer = InfSGD(
        net,
        args.lr,
        args.wd,
        args.momentum,
        args.bias_lr_mult,
        args.first_layer_lr_mult,
        args.last_layer_lr_mult,
        not args.no_apply_lr_mult_to_wd,
        args.gclip,
        args.gclip_per_param,
        project=bool(args.width) and not (args.no_Gproj or args.gaussian_init),
    )
    settings = {name: value for name, value in vars(args).items() if name not in OUTPUT_ONLY}
    records = resume(args, net, rng, settings) if args.resume else []
    if args.save_dir and not args.resume:
        os.makedirs(args.save_dir, exist_ok=True)
        if os.path.exists(os.path.join(args.save_dir, "settings.json")):
            raise FileExistsError(
                f"{args.save_dir} already holds a run: --resume it or choose another --save-dir"
            )
        with open(os.path.join(args.save_dir, "settings.json"), "w") as file:
            json.dump(settings, file, indent=2)
    if args.verbose:
        print(json.dumps(settings, indent=2))
    for epoch in range(len(records), args.epochs):
        started = time.time()
        if args.scheduler == "multistep":
            optimizer.lr = args.lr * multistep(
                epoch, milestones(args.lr_drop_milestones), args.lr_drop_ratio
            )
        optimizer.gclip = args.gclip * multistep(
            epoch, milestones(args.gclip_drop_milestones), args.gclip_drop_ratio
        )
        train_loss, train_acc = train_epoch(net, optimizer, x, y, epoch, rng, args)
        test_loss, test_acc = evaluate(net, test_x, test_y, args)
        records.append(
            {
                "epoch": epoch + 1,
                "train_loss": train_loss,
                "train_acc": train_acc,
                "test_loss": test_loss,
                "test_acc": test_acc,
                "rows": rows_of(net),
                "seconds": round(time.time() - started, 2),
            }
        )
        if args.save_dir:
            save_epoch(args, net, records, rng)
        if not args.quiet:
            print(
                " ".join(
                    f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
                    for key, value in records[-1].items()
                ),
                flush=True,
            )
    if args.save_model:
        net.save(os.path.join(args.save_dir, "checkpoint.th"))
    return records


def milestones(text):
    return [int(part) for part in text.split(",") if part.strip()]


def main(argv=None):
    arguments = parser()
    args = arguments.parse_args(argv)
    try:
        for text in (args.lr_drop_milestones, args.gclip_drop_milestones):
            milestones(text)
    except ValueError:
        arguments.error(f"milestones are epochs separated by commas, such as 40,45; got {text!r}")
    if problem := check(args):
        arguments.error(problem)
    try:
        return train(args)
    except (ValueError, OSError, checkpoint.CheckpointError) as error:
        arguments.error(str(error))
    except KeyboardInterrupt:
        where = (
            f": --resume --save-dir {args.save_dir} goes on from the last epoch"
            if args.save_dir
            else ""
        )
        print(f"\ninterrupted{where}", file=sys.stderr)
        return None


if __name__ == "__main__":
    main()
