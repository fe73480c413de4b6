"""A torchvision ResNet with dendrites: every convolution and its norm become one block by the
documented replacement.

python -m experiments.dendrites.resnet --data DIR --images 600 --epochs 4 --out
results/dendrites/resnet
"""

import os

import torch
import torchvision
from tqdm import tqdm

from pilimit_lib.dendrites import GPA, PBM, UPA

from ..training.flags import add_out, plain_command_line
from .data import fashion
from .training import accuracy, train_epoch


def main(argv=None):
    parser = plain_command_line("dendrites.resnet", __doc__)
    parser.add_argument("--data", required=True, help="folder of the Fashion-MNIST files")
    parser.add_argument("--images", type=int, default=600, help="training images (default 600)")
    parser.add_argument("--epochs", type=int, default=4, help="epochs at most (default 4)")
    parser.add_argument("--switch", type=int, default=2, help="epochs between growths (default 2)")
    add_out(parser, "results/dendrites/resnet", "folder of the networks")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    sets = {
        k: (x.expand(-1, 3, -1, -1), y)
        for k, (x, y) in fashion(args.data, args.images, args.images // 2).items()
    }
    out = args.out
    out.parent.mkdir(parents=True, exist_ok=True)

    GPA.pc.set_testing_dendrite_capacity(False)
    GPA.pc.set_switch_mode(GPA.pc.DOING_FIXED_SWITCH)
    GPA.pc.set_fixed_switch_num(args.switch)
    GPA.pc.set_max_dendrites(1)
    GPA.pc.append_modules_to_replace([torchvision.models.resnet.ResNet])
    GPA.pc.append_replacement_modules([PBM.ResNetPB])
    network = torchvision.models.resnet.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10
    )
    model = UPA.initialize_pai(network, save_name=os.fspath(out))
    tracker = GPA.pai_tracker
    tracker.set_optimizer(torch.optim.Adam)
    optimizer = tracker.setup_optimizer(
        model, {"params": model.parameters(), "lr": 1e-3, "fused": True}
    )
    x, y = sets["train"]
    for _ in tqdm(range(args.epochs), mininterval=2):
        train_epoch(model, optimizer, x, y)
        score = accuracy(model, *sets["val"], batch=200)
        model, restructured, complete = tracker.add_validation_score(score, model)
        print(f"validation {score:.1f} %, parameters {UPA.count_params(model):,}")
        if complete:
            break
        if restructured:
            optimizer = tracker.setup_optimizer(
                model, {"params": model.parameters(), "lr": 1e-3, "fused": True}
            )


if __name__ == "__main__":
    main()
