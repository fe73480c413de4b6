"""A GRU with dendrites that reads digits row by row, through the documented calls: processors,
dimensions, tracker.

python -m experiments.dendrites.sequences --epochs 60 --out results/dendrites/gru
"""

import os

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from pilimit_lib.dendrites import GPA, PBM, UPA

from ..training.flags import add_out, plain_command_line
from .data import digits
from .training import accuracy, train_epoch


class RowReader(nn.Module):
    """Reads an image [b 1 h w] as h steps of w numbers; the last output decides."""

    def __init__(self, hidden: int):
        super().__init__()
        self.rnn = nn.GRU(8, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, 10)

    def forward(self, x):
        out, _ = self.rnn(x[:, 0])
        return self.fc(out[:, -1])


def main(argv=None):
    parser = plain_command_line("dendrites.sequences", __doc__)
    add_out(parser, "results/dendrites/gru", "folder of the networks and tables")
    parser.add_argument("--hidden", type=int, default=6, help="units of the GRU (default 6)")
    parser.add_argument("--epochs", type=int, default=60, help="epochs at most (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of network and order (default 0)")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    sets, out = digits(), args.out
    out.parent.mkdir(parents=True, exist_ok=True)

    GPA.pc.set_testing_dendrite_capacity(False)
    GPA.pc.set_n_epochs_to_switch(8)
    GPA.pc.append_module_names_to_convert(["GRU"])
    GPA.pc.append_module_names_with_processing(["GRU"])
    GPA.pc.append_module_by_name_processing_classes([PBM.GRUProcessor])
    model = UPA.initialize_pai(RowReader(args.hidden), save_name=os.fspath(out))
    model.rnn.set_this_input_dimensions([-1, -1, 0])
    tracker = GPA.pai_tracker
    tracker.set_optimizer(torch.optim.Adam)
    tracker.set_scheduler(ReduceLROnPlateau)

    def setup():
        return tracker.setup_optimizer(
            model,
            {"params": model.parameters(), "lr": 1e-2, "fused": True},
            {"mode": "max", "patience": 3},
        )

    optimizer, _ = setup()
    x, y = sets["train"]
    for _ in tqdm(range(args.epochs), mininterval=2):
        train_epoch(model, optimizer, x, y)
        tracker.add_extra_score(accuracy(model, x, y), "train")
        tracker.add_test_score(accuracy(model, *sets["test"]), "test")
        model, restructured, complete = tracker.add_validation_score(
            accuracy(model, *sets["val"]), model
        )
        if complete:
            break
        if restructured:
            optimizer, _ = setup()
    print((out / f"{out.name}bestTestScores.csv").read_text())


if __name__ == "__main__":
    main()
