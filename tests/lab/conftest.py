"""Small real data and small networks for the lab's tests."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.utils.data import TensorDataset

pytest.importorskip(
    "torch_pruning", reason="the lab plans edits with torch-pruning: pip install 'pilimit[lab]'"
)

from pilimit_lib.lab import (
    Conv2dWithNeuronOps,
    Experiment,
    LinearWithNeuronOps,
    NetworkWithOps,
    TrackingMode,
)  # noqa: E402


class MNISTModel(NetworkWithOps):
    """The documented example, word for word."""

    def __init__(self):
        super(MNISTModel, self).__init__()  # noqa: UP008
        self.tracking_mode = TrackingMode.DISABLED
        self.layer0 = Conv2dWithNeuronOps(in_channels=1, out_channels=2, kernel_size=3)
        self.mpool0 = nn.MaxPool2d(2)
        self.layer1 = Conv2dWithNeuronOps(in_channels=2, out_channels=4, kernel_size=3)
        self.mpool1 = nn.MaxPool2d(2)
        self.layer2 = Conv2dWithNeuronOps(in_channels=4, out_channels=10, kernel_size=3)
        self.mpool2 = nn.MaxPool2d(2)
        self.out = LinearWithNeuronOps(in_features=10, out_features=10)
        self.layers = [self.layer0, self.layer1, self.layer2, self.out]

    def forward(self, input: torch.Tensor):
        self.maybe_update_age(input)

        x = self.layer0(input)
        x = F.relu(x)
        x = self.mpool0(x)

        x = self.layer1(x)
        x = F.relu(x)
        x = self.mpool1(x)

        x = self.layer2(x)
        x = F.relu(x)
        x = self.mpool2(x)

        x = x.view(x.size(0), -1)
        output = self.out(x, skip_register=True)

        output = F.log_softmax(output, dim=1)
        return output


class PlainNet(nn.Module):
    """Everything that couples: batch norm, a residual block, dropout, flatten, two linear layers.
    Nothing of the lab in it."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(6)
        self.narrow = nn.Conv2d(6, 4, 3)
        self.drop = nn.Dropout(dropout)
        self.hidden = nn.Linear(4 * 9, 12)
        self.out = nn.Linear(12, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.inner_norm(self.inner(x)))
        x = F.max_pool2d(F.relu(self.narrow(x)), 2)
        x = F.relu(self.hidden(self.drop(x).flatten(1)))
        return self.out(x)


def digits(count=200, size=8, start=0):
    data = load_digits()
    images = torch.tensor(data.images[start : start + count], dtype=torch.float32).unsqueeze(1) / 16
    if size != 8:
        images = F.interpolate(images, size=(size, size), mode="bilinear")
    return TensorDataset(images, torch.tensor(data.target[start : start + count]))


@contextmanager
def full_disk(size):
    """A real limit: inside the `with` every write beyond `size` bytes of a file fails, as it does
    on a full disk."""
    resource = pytest.importorskip("resource", reason="this system cannot limit the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def train_set():
    return digits(200)


@pytest.fixture
def eval_set():
    return digits(100, start=1000)


@pytest.fixture
def seed_experiment(tmp_path):
    """The documented experiment, on digits of 28 x 28."""
    torch.manual_seed(0)
    return Experiment(
        model=MNISTModel(),
        optimizer_class=optim.Adam,
        train_dataset=digits(256, 28),
        eval_dataset=digits(96, 28, 1000),
        device="cpu",
        learning_rate=1e-2,
        batch_size=32,
        name="x0",
        root_log_dir=tmp_path,
        tensorboard=False,
        progress=False,
    )


@pytest.fixture
def make(tmp_path, train_set, eval_set):
    """An experiment on a plain torch module; keyword arguments as for Experiment."""

    def build(model=None, name="plain", seed=0, **options):
        torch.manual_seed(seed)
        model = PlainNet() if model is None else model
        defaults = {
            "optimizer_class": optim.Adam,
            "learning_rate": 1e-2,
            "batch_size": 32,
            "train_dataset": train_set,
            "eval_dataset": eval_set,
            "tensorboard": False,
            "progress": False,
        }
        return Experiment(
            model,
            device="cpu",
            name=name,
            root_log_dir=tmp_path / "runs",
            **{**defaults, **options},
        )

    return build
