"""Runs that tests start in processes of their own: a training run that saves or continues, and one
of several ranks.

python -m tests.dendrites.worker train PATH EPOCHS MODE [resume]
python -m tests.dendrites.worker ddp INIT_FILE RANK OUT
"""

import sys

import torch
from torch import nn

from pilimit_lib.core import save
from pilimit_lib.dendrites import DendriteConfig, Growth, PAISequential, Patience, dendritic
from tests.dendrites.helpers import ConvNet


def problem(seed=0, n=60):
    """Images in three classes that a small conv net learns slowly."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=generator)
    x = torch.randn(n, 1, 6, 6, generator=generator)
    x[torch.arange(n), 0, y, y] += 2.0
    return x, y


class Run:
    """A network with dropout and batch norm, so that random state and buffers matter; scores fall
    and rise by a fixed script."""

    script = [
        1.0,
        2.0,
        2.0,
        2.0,
        3.0,
        2.5,
        2.5,
        1.0,
        1.0,
        1.0,
        4.0,
        4.0,
        4.0,
        4.0,
        5.0,
        5.0,
        5.0,
        5.0,
        5.0,
        5.0,
        5.0,
        5.0,
    ]

    def __init__(self, mode="joint", optimizer_state="keep", save_dir=None):
        torch.manual_seed(3)
        config = DendriteConfig(
            switch=Patience(patience=2),
            mode=mode,
            optimizer_state=optimizer_state,
            cap_at_n=True,
            save_dir=save_dir,
            wait_for_lower_lr=False,
        )
        self.net = dendritic(nn.Sequential(ConvNet(PAISequential), nn.Dropout(0.2)), config)
        self.growth = Growth(
            self.net,
            config,
            optimizer=lambda ps: torch.optim.Adam(ps, 1e-2),
            scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(
                o, mode="max", patience=0, factor=0.5
            ),
        )
        self.x, self.y = problem()
        self.actions = []

    def epoch(self):
        model, growth = self.growth.model, self.growth
        model.train()
        for batch in torch.randperm(len(self.x)).split(20):
            growth.optimizer.zero_grad()
            nn.functional.cross_entropy(model(self.x[batch]), self.y[batch]).backward()
            growth.optimizer.step()
        result = growth.step(
            self.script[min(self.growth.plateau.state.epoch, len(self.script) - 1)]
        )
        self.actions.append(result.action)
        return result

    def outcome(self):
        self.growth.network.eval()
        with torch.no_grad():
            out = self.growth.network(self.x)
        return {
            "out": out,
            "model": {k: v.clone() for k, v in self.net.state_dict().items()},
            "actions": self.actions,
            "optimizer": self.growth.snapshot()["optimizer"],
            "plateau": self.growth.plateau.state_dict(),
        }


def train(path, epochs, mode, resume=False):
    run = Run(mode)
    if resume:
        torch.manual_seed(99)  # the run's own random state must come from the file
        run.growth.load(path)
    for _ in range(int(epochs)):
        run.epoch()
    if resume:
        save(run.outcome(), path + ".continued")
    else:
        run.growth.save(path)


def ddp(init_file, rank, out):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    rank = int(rank)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    # ranks disagree on everything that is random unless somebody sees to it
    torch.manual_seed(rank)
    config = DendriteConfig(switch=Patience(patience=1), max_tries=2, wait_for_lower_lr=False)
    net = dendritic(ConvNet(PAISequential), config)
    growth = Growth(
        DistributedDataParallel(net), config, optimizer=lambda ps: torch.optim.Adam(ps, 1e-2)
    )
    x, y = problem()
    scores = [1.0, 1.0, 2.0, 1.5, 1.0, 3.0, 3.0]
    seen = []
    for epoch, score in enumerate(scores):
        growth.model.train()
        for batch in torch.arange(len(x)).split(20):
            mine = batch[rank::2]
            growth.optimizer.zero_grad()
            nn.functional.cross_entropy(growth.model(x[mine]), y[mine]).backward()
            growth.optimizer.step()
        result = growth.step(score if rank == 0 else 100.0 + epoch)  # rank 1 would decide otherwise
        seen.append((result.action, type(result.model).__name__))
    growth.save(out + ".run")
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    save({"seen": seen, "flat": flat, "dendrites": growth.plateau.state.dendrites}, f"{out}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, *args = sys.argv[1:]
    {"train": train, "ddp": ddp}[kind](*args)
