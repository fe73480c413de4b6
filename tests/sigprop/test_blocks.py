"""Networks as a chain of blocks, read from their forward: the chain is the network."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pilimit_lib import sigprop
from pilimit_lib.sigprop.blocks import blocks_of, follow_forward


class Plain(nn.Module):
    """The usual hand-written network, with operations between its modules."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.fc = nn.Linear(6 * 9, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, x, scale=2.0):
        x = F.max_pool2d(F.relu(self.norm(self.conv1(x / 2))), 2)
        x = F.relu(self.conv2(x) * scale)
        x = x.view(x.size(0), -1)
        return self.out(torch.tanh(self.fc(x)))


class Residual(nn.Module):
    """Residual connections in the network's own forward, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.shift = nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.b(F.relu(self.a(x)))
        x = x + self.shift
        return self.head(x)


def resnet():
    models = pytest.importorskip("torchvision.models")
    return models.resnet.ResNet(models.resnet.BasicBlock, [1, 2, 1, 1], num_classes=3)


def vgg(norm=True):
    models = pytest.importorskip("torchvision.models")
    features = models.vgg.make_layers([8, "M", 16, 16, "M"], batch_norm=norm)
    with torch.device("meta"):  # its own classifier has a hundred million weights
        net = models.VGG(features, num_classes=3, init_weights=False)
    net.classifier = nn.Sequential(
        nn.Linear(16 * 49, 12), nn.ReLU(True), nn.Dropout(0.0), nn.Linear(12, 3)
    )
    net.features = models.vgg.make_layers([8, "M", 16, 16, "M"], batch_norm=norm)
    return net


CHAINS = {
    "plain": (Plain, (3, 8, 8), 4),
    "residual": (Residual, (3,), 3),
    "resnet": (resnet, (3, 32, 32), 7),
    "vgg": (vgg, (3, 16, 16), 5),
    "vgg without norm": (lambda: vgg(False), (3, 16, 16), 5),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_chain_is_the_network(name):
    make, shape, count = CHAINS[name]
    torch.manual_seed(0)
    net = make()
    x = torch.randn(4, *shape)
    twin = copy.deepcopy(net)
    blocks = follow_forward(net)
    assert len(blocks) == count
    # in training, where norms measure, and in evaluation
    for mode in (True, False):
        assert torch.equal(nn.Sequential(*blocks).train(mode)(x), twin.train(mode)(x))
    shared = {id(p) for block in blocks for p in block.parameters()}
    assert shared == {id(p) for p in net.parameters()}
    assert all(any(p.ndim > 1 for p in block.parameters()) for block in blocks)


@pytest.mark.parametrize("name", ["resnet", "vgg", "vgg without norm"])
@pytest.mark.parametrize("per_class", [True, False])
def test_torchvision_networks_learn_block_by_block_in_one_call(name, per_class):
    make, shape, count = CHAINS[name]
    torch.manual_seed(0)
    network = make()
    net = sigprop.wrap(
        network,
        signal=sigprop.signals.project_labels(3, shape, per_class=per_class),
        loss=sigprop.loss.Contrast(by="label", cosine=True, temperature=0.1),
        optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1),
    )
    assert len(net.model) == count and len(net.local_optimizers()) == count
    assert len(list(net.parameters())) == 2  # the last linear layer
    outer = torch.optim.SGD(net.parameters(), 0.1)
    before = {n: p.clone() for n, p in network.named_parameters()}
    x, y = torch.randn(6, *shape), torch.arange(6) % 3
    F.cross_entropy(net(x, y), y).backward()
    outer.step()
    for part, p in network.named_parameters():
        # a bias before a batch norm has no effect, hence no gradient but rounding
        if not ("features" in part and "bias" in part):
            assert not torch.equal(p, before[part]), part
    assert net.eval()(x).shape == (6, 3) and torch.equal(net(x), network.eval()(x))


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("resnet18", ["Sequential", *["BasicBlock"] * 7, "Sequential", "Linear"]),
        ("resnet50", ["Sequential", *["Bottleneck"] * 15, "Sequential", "Linear"]),
        ("vgg11", [*["Sequential"] * 10, "Linear"]),
        ("vgg16_bn", [*["Sequential"] * 15, "Linear"]),
        ("alexnet", [*["Sequential"] * 7, "Linear"]),
    ],
)
def test_blocks_of_known_networks(name, kinds):
    """Without their weights: on the meta device."""
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        net = getattr(models, name)(num_classes=10)
    assert [type(block).__name__ for block in blocks_of(net)] == kinds


class Moody(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(F.dropout(self.a(x), training=self.training))


class Branching(Moody):
    def forward(self, x):
        return self.b(self.a(x)) if x.sum() > 0 else self.a(x)


class Pair(Moody):
    def forward(self, x, y):
        return self.b(self.a(x) + y)


class Several(Moody):
    def forward(self, x):
        return self.a(x), self.b(self.a(x))


@pytest.mark.parametrize(
    "cls, message",
    [
        (Moody, "differs between training and evaluation"),
        (Branching, "cannot be followed .*control flow"),
        (Pair, "missing 1 required positional argument"),
        (Several, "returns a tuple"),
    ],
)
def test_what_cannot_be_followed_says_why_and_what_to_do(cls, message):
    net = cls()
    with pytest.raises(ValueError, match=rf"(?s)holds 0 lists of blocks.*{message}.*blocks='...'"):
        blocks_of(net)
    assert net.training and net.a.training
