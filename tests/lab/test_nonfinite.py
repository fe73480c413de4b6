"""NaN is found at the first batch that has it, its samples are named, and nothing is learned from
it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from pilimit_lib.lab import NonFinite, watch

from .conftest import MNISTModel, PlainNet, digits
from .test_checkpoints import everything, same


def poisoned(*ids, size=8, value=float("nan"), count=200):
    images, labels = digits(count, size).tensors
    for i in ids:
        images[i, 0, 3, 3] = value
    return TensorDataset(images, labels)


def until_it_stops(exp, steps=20):
    with pytest.raises(NonFinite) as caught:
        exp.train_n_steps(steps)
    return caught.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind, size", [(PlainNet, 8), (MNISTModel, 28)])
def test_training_stops_at_the_first_batch_and_names_its_samples(make, kind, size, value):
    exp = make(
        kind(),
        train_dataset=poisoned(17, size=size, value=value),
        eval_dataset=digits(32, size, 900),
    )
    error = until_it_stops(exp)
    assert error.suspects == [17] and 17 in error.ids and "[17]" in str(error)
    assert 17 in exp.train_loader.ids.tolist() and exp.age == 32 * exp.lab.steps
    assert all(torch.isfinite(t).all() for t in exp.module.state_dict().values())
    assert np.isfinite(exp.train_loader.dataset.get_dataframe()["prediction_loss"]).all()
    assert getattr(exp.module, "age", exp.age) == exp.age
    exp.train_loader.dataset.denylist_samples(error.suspects)
    exp.train_n_steps(7)  # through the rest of the epoch and on


def test_nothing_was_learned_from_the_batch(make):
    exp = make(train_dataset=poisoned(17))
    states = []
    with pytest.raises(NonFinite):
        while True:
            states.append(everything(exp))
            exp.train_n_steps(1)
    after = everything(exp)
    for path, value in states[-1].items():
        if "loaders" not in path:
            same({path: value}, {path: after[path]})


def test_on_request_it_is_flagged_and_skipped(make):
    exp = make(train_dataset=poisoned(17, 90), nonfinite="skip")
    loss, accuracy = exp.train_n_steps(14)  # two epochs
    assert np.isfinite([loss, accuracy]).all() and exp.lab.steps < 14
    frame = exp.train_loader.dataset.get_dataframe(all_samples=True)
    assert {17, 90} <= set(frame.query("nonfinite > 0").index)
    seen, unseen = frame.query("exposure_amount > 0"), frame.query("exposure_amount == 0")
    assert np.isfinite(seen["prediction_loss"]).all() and np.isfinite(seen["confidence"]).all()
    assert unseen["prediction_loss"].isna().all() and {17, 90} <= set(unseen.index)
    assert (frame.query("nonfinite > 0 and exposure_amount == 0")["nonfinite"] == 2).all()
    assert all(torch.isfinite(t).all() for t in exp.module.state_dict().values())
    assert [e["suspects"] for e in exp.lab.journal.events if e["kind"] == "non-finite"]
    with pytest.raises(ValueError, match="'stop' or 'skip'"):
        make(nonfinite="ignore")


def test_a_diverging_model_stops_too_without_blaming_the_data(make):
    exp = make(learning_rate=1e30, optimizer_class=optim.SGD)
    error = until_it_stops(exp)
    assert error.suspects == [] and len(error.ids) == 32
    assert "data of samples" not in str(error)


def test_evaluation_names_them_or_leaves_them_out_of_the_mean(make):
    data = poisoned(5, count=100)
    exp = make(eval_dataset=data)
    with pytest.raises(NonFinite) as caught:
        exp.eval_full()
    assert caught.value.ids == caught.value.suspects == [5] and exp.module.training
    exp = make(eval_dataset=data, nonfinite="skip", name="skip")
    loss, accuracy = exp.eval_full()
    rest = torch.arange(100) != 5
    exp.module.eval()
    out, labels = exp.module(data.tensors[0][rest]).detach(), data.tensors[1][rest]
    assert loss == pytest.approx(float(F.cross_entropy(out, labels)), rel=1e-5)
    assert accuracy == pytest.approx(float((out.argmax(1) == labels).float().mean()))


def test_an_own_loop_is_stopped_before_it_learns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    data = DataLoader(poisoned(40, 41, count=96), 16)

    def epoch(lab):
        for x, y in lab.loader:
            out = model(x)
            loss = F.cross_entropy(out, y, reduction="none")
            lab.record(loss, out, y)
            if lab.finite:
                optimizer.zero_grad()
                loss.mean().backward()
                optimizer.step()

    lab = watch(model, optimizer, data)
    with pytest.raises(NonFinite) as caught:
        epoch(lab)
    assert caught.value.ids == [40, 41] and lab.age == 32
    lab.close()
    lab = watch(model, optimizer, data, nonfinite="skip")
    epoch(lab)
    assert lab.age == 80 and all(torch.isfinite(p).all() for p in model.parameters())
    frame = lab.loader.dataset.get_dataframe(all_samples=True)
    assert frame.query("nonfinite > 0").index.tolist() == [40, 41]
    assert len(frame.query("exposure_amount > 0")) == 94, "the others of the batch were predicted"


class Averaging(PlainNet):
    """With a buffer of its own that each forward pass in training replaces."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen = 0.9 * self.seen + 0.1 * x.mean()
        return super().forward(x)


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_under_watch_a_refused_batch_leaves_the_models_buffers_and_counters(nonfinite):
    torch.manual_seed(0)
    model = Averaging()
    optimizer = optim.Adam(model.parameters(), lr=1e-2)
    lab = watch(model, optimizer, DataLoader(poisoned(40, count=96), 16), nonfinite=nonfinite)
    refused = 0
    for x, y in lab.loader:
        before = everything(lab)
        model(x)  # a second view of the batch
        out = model(x)
        loss = F.cross_entropy(out, y, reduction="none")
        try:
            lab.record(loss, out, y)
        except NonFinite:
            assert nonfinite == "stop"
        if lab.finite:
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            continue
        refused += 1
        after = everything(lab)
        for path, value in before.items():
            if "loaders" not in path and "nonfinite" not in path:
                same({path: value}, {path: after[path]})
    assert refused == 1 and lab.steps == 5 and model.norm.num_batches_tracked == 10
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert lab.neurons[model.stem].train_seen.tolist() == [160] * 6


def test_checkpoints_of_before_the_column_load(make):
    exp = make()
    exp.train_n_steps(2)
    state = exp.train_loader.dataset.ledger.state()
    del state["columns"]["nonfinite"]
    exp.train_loader.dataset.ledger.load_state(state)
    assert (exp.train_loader.dataset.get_dataframe()["nonfinite"] == 0).all()
