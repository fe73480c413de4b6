"""The lab and π-networks: their rows know their samples, so a prediction can be taken apart into
the samples that made it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pilimit_lib.core import batch
from pilimit_lib.inf import InfMLP, PiSGD
from pilimit_lib.lab import Experiment, NotFound, Refused, watch


def trained(epochs=2, L=1, momentum=0.0, dtype=torch.float64, alpha=0.7):
    """A π-network on 24 samples, under watch; each sample leaves a row per layer and epoch."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 5, dtype=dtype), torch.randint(0, 3, (24,)))
    net = InfMLP(5, 3, r=6, L=L, bias_alpha=0.5, last_layer_alpha=alpha, dtype=dtype)
    optimizer = PiSGD(net.parameters(), lr=0.5, momentum=momentum)
    lab = watch(net, optimizer, DataLoader(data, batch_size=8, shuffle=True), example=data[:2][0])
    for _ in range(epochs):
        train(net, optimizer, lab)
    return net, optimizer, lab, data


def each_loss(out, target):
    return F.cross_entropy(out, target, reduction="none")


def train(net, optimizer, lab):
    net.train()
    for x, y in lab.loader:
        with batch(lab.loader.ids):
            out = net(x)
        loss = F.cross_entropy(out, y, reduction="none")
        lab.record(loss, out, y)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()


@pytest.mark.parametrize("L", [1, 2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_contributions_add_up_to_the_prediction(L, momentum):
    net, _, lab, data = trained(L=L, momentum=momentum)
    x = torch.randn(4, 5, dtype=torch.float64)
    found = lab.provenance().contributions(x)
    torch.testing.assert_close(found.total(), net(x).detach(), rtol=1e-9, atol=1e-11)
    assert found.ids.tolist() == [-1, *range(24)] and found.values.shape == (25, 4, 3)
    assert (found.values[0] == 0).all(), (
        "the readout starts at zero: its first rows contribute nothing"
    )
    assert (found.values[1:].abs().amax((1, 2)) > 0).all()


def test_a_contribution_is_the_sum_over_the_samples_rows_computed_by_hand():
    net, _, lab, data = trained()
    x = torch.randn(3, 5, dtype=torch.float64)
    found = lab.provenance().contributions(x)
    readout, g = net.layers[-1], x
    for layer in net.layers[:-1]:
        g = layer(g)
    s = torch.linalg.vector_norm(g, dim=1, keepdim=True)
    q = (g / s @ readout.B.blocks.dense().T).clamp(-1, 1)
    # Cho & Saul, order 1
    kernel = ((1 - q * q).clamp_min(0).sqrt() + (torch.pi - torch.arccos(q)) * q) / (2 * torch.pi)
    # [b m]
    each = s * kernel * readout.Amult.blocks.dense()
    for sample in (0, 7, 23):
        mine = readout.origin == sample
        expected = 0.7 * each[:, mine] @ readout.A.blocks.dense()[mine]
        torch.testing.assert_close(
            found.values[found.ids.tolist().index(sample)], expected.detach(), rtol=1e-9, atol=1e-12
        )
    frame = found.frame(item=0, output=1)
    assert frame["contribution"].abs().is_monotonic_decreasing and frame.index.name == "sample_id"


def test_removing_a_sample_equals_a_network_without_its_rows():
    net, optimizer, lab, data = trained(L=2, momentum=0.9)
    x = torch.randn(4, 5, dtype=torch.float64)
    twin = copy.deepcopy(net)
    for layer in twin.layers[1:]:
        A = layer.A.blocks.dense()
        A[torch.isin(layer.origin, torch.tensor([3, 9]))] = 0
        layer.set_rows(A, layer.Amult.blocks.dense(), layer.B.blocks.dense(), layer.origin)
    before = net(x).detach()
    lab.forget([3, 9])
    torch.testing.assert_close(net(x), twin(x), rtol=1e-10, atol=1e-12)
    assert not any(torch.isin(layer.origin, torch.tensor([3, 9])).any() for layer in net.layers[1:])
    assert lab.loader.dataset.ledger["denied"].nonzero()[0].tolist() == [3, 9]
    train(net, optimizer, lab)  # momentum followed: the next steps run, and serve neither
    assert not any(torch.isin(layer.origin, torch.tensor([3, 9])).any() for layer in net.layers[1:])
    lab.undo()
    assert torch.equal(net(x).detach(), before)


def test_influence_ranks_samples_by_what_forgetting_them_does():
    net, _, lab, data = trained(epochs=4)
    x, y = data.tensors
    frame = lab.provenance().influence(x, y, each_loss)
    assert (
        sorted(frame.index) == list(range(24)) and frame["influence"].abs().is_monotonic_decreasing
    )
    first = int(frame.index[0])
    with torch.no_grad():
        base = float(F.cross_entropy(net(x), y))
        lab.forget([first])
        assert float(F.cross_entropy(net(x), y)) - base == pytest.approx(
            frame["influence"].iloc[0], rel=1e-9
        )
    own = lab.provenance().influence(x[5:6], y[5:6], each_loss, samples=[5, 6])
    assert own["influence"][5] > 0, "without its own rows a sample is predicted worse"


def test_rows_per_sample_and_refusals():
    net, _, lab, _ = trained(L=2)
    rows = lab.provenance().rows()
    assert list(rows.columns) == ["layers.1", "layers.2", "layers.3"] and (rows.loc[0:] == 2).all(
        axis=None
    )
    before = net.rows
    with pytest.raises(NotFound, match=r"samples \[99\] made no rows"):
        lab.forget([3, 99])
    assert net.rows == before and not lab.loader.dataset.ledger["denied"].any()
    with pytest.raises(NotFound, match="no layer 'layers.9'"):
        lab.provenance("layers.9")
    with pytest.raises(Refused, match="knows its samples"):
        watch(nn.Linear(2, 2)).provenance()
    with pytest.raises(Refused, match="more than a scale and a shift"):
        watch(nn.Sequential(net, nn.LogSoftmax(1))).provenance().contributions(
            torch.randn(2, 5, dtype=torch.float64)
        )


def test_an_experiment_trains_a_pi_network_and_its_rows_know_their_samples(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(40, 5)
    y = (x[:, 0] > 0).long()
    exp = Experiment(
        InfMLP(5, 2, r=6, L=1),
        PiSGD,
        TensorDataset(x, y),
        TensorDataset(x, y),
        "cpu",
        0.5,
        8,
        "pi",
        root_log_dir=tmp_path,
        tensorboard=False,
        progress=False,
    )
    exp.train_n_steps_with_eval_full(10)
    assert exp.lab.provenance().ids().tolist() == list(range(40))
    found = exp.lab.provenance().contributions(x[:3])
    torch.testing.assert_close(found.total(), exp.module(x[:3]).detach(), rtol=1e-4, atol=1e-5)
    exp.lab.forget({0, 1})
    exp.train_n_steps(5)
    assert exp.report(tmp_path / "pi.html").stat().st_size > 10_000


def test_a_watched_pi_network_goes_back_bit_for_bit(tmp_path):
    net, optimizer, lab, data = trained(momentum=0.9)
    lab = watch(net, optimizer, lab.loader, example=data[:2][0], folder=tmp_path)
    train(net, optimizer, lab)
    lab.dump()
    train(net, optimizer, lab)
    x = data[:][0]
    expected, rows = net(x).detach(), net.rows
    lab.load(0)
    assert net.rows != rows
    train(net, optimizer, lab)
    assert torch.equal(net(x).detach(), expected) and net.rows == rows
