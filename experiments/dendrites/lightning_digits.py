"""Dendrites in a Lightning Trainer, on digits. Needs the extra: pip install 'pilimit[dendrites]'

python -m experiments.dendrites.lightning_digits --epochs 40 --out results/dendrites/lightning
"""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pilimit_lib.dendrites import DendriteConfig, Patience, dendritic
from pilimit_lib.dendrites.integrations.lightning import DendriteCallback

from ..training.flags import add_out, plain_command_line
from .data import digits
from .images import ConvNet


class Digits(pl.LightningModule):
    """The conv net of the image experiment as a Lightning module; only the call of `dendritic` is
    new."""

    def __init__(self, config: DendriteConfig):
        super().__init__()
        self.net = dendritic(ConvNet(0.25, 8), config)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log(
            "val_acc",
            100 * (self.net(batch[0]).argmax(1) == batch[1]).float().mean(),
            prog_bar=True,
        )

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3, fused=True)


def main(argv=None):
    parser = plain_command_line("dendrites.lightning_digits", __doc__)
    parser.add_argument("--epochs", type=int, default=40, help="epochs at most (default 40)")
    add_out(parser, "results/dendrites/lightning", "folder of tables and pictures")
    args = parser.parse_args(argv)
    pl.seed_everything(0)
    config = DendriteConfig(
        switch=Patience(patience=5), max_dendrites=2, save_dir=str(args.out), seed=0
    )
    sets = digits()

    def load(name: str, shuffle: bool) -> DataLoader:
        return DataLoader(TensorDataset(*sets[name]), batch_size=64, shuffle=shuffle)

    callback = DendriteCallback("val_acc", config)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        callbacks=[callback],
        default_root_dir=str(args.out),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Digits(config), load("train", True), load("val", False))
    for row in callback.growth.records.rows.best.values():
        print(row)


if __name__ == "__main__":
    main()
