"""Replay, compared with a run that never saw the samples."""

import copy

import pytest
import torch

from pilimit_lib.core import batch
from pilimit_lib.inf import PiSGD
from pilimit_lib.inf.replay import Recorder, RunRecord, replay, retrain

from .runs import RUNS, SAMPLES, data, fresh, named, optimizer_of, order, recorded, train

GONE = (3, 7, 8)


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "how"), RUNS, ids=named)
def test_replay_is_the_run_that_never_saw_them(kind, how):
    net, record = recorded(kind, **how)
    x, y = data()
    same(replay(record, net, x, y), net)
    true = fresh(kind)
    optimizer = optimizer_of(true, how.get("momentum", 0.0), how.get("decay", 0.0))
    rest = {k: v for k, v in how.items() if k not in ("momentum", "decay")}
    train(true, optimizer, order(), x, y, without=GONE, **rest)
    without = replay(record, net, x, y, without=GONE)
    same(without, true)
    with torch.no_grad():
        assert (without(x) - net(x)).abs().max() > 1e-3


def test_removing_rows_is_something_else():
    net, record = recorded("rows")
    x, y = data()
    removed = copy.deepcopy(net)
    for layer in removed.layers[1:]:
        layer.axis.keep(~torch.isin(layer.origin, torch.tensor(GONE)))
    true = replay(record, net, x, y, without=GONE)
    with torch.no_grad():
        outputs = {name: n(x) for name, n in (("full", net), ("removed", removed), ("true", true))}
    assert (outputs["removed"] - outputs["true"]).norm() > (
        outputs["full"] - outputs["true"]
    ).norm()


def test_a_batch_of_which_nothing_is_left_makes_no_step():
    batches = [torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([3, 4, 2])]
    net, record = recorded("rows", batches, decay=0.1)
    x, y = data()
    true = fresh("rows")
    train(true, optimizer_of(true, decay=0.1), batches, x, y, without=(2,))
    same(replay(record, net, x, y, without=torch.tensor([2])), true)
    assert true.rows == [4 + 4] * 2


def test_dividing_by_the_whole_batch_leaves_the_steps_of_the_others_as_they_were():
    batches = [torch.tensor([0, 1, 2, 3])]
    net, record = recorded("moments", batches)
    x, y = data()
    full = replay(record, net, x, y, average="batch")
    same(full, net)
    start = fresh("moments").state_dict()["layers.2.V"]
    parts = [
        replay(record, net, x, y, without=rest, average="batch").state_dict()["layers.2.V"] - start
        for rest in ([0, 1], [2, 3])
    ]
    torch.testing.assert_close(sum(parts), net.state_dict()["layers.2.V"] - start)
    with pytest.raises(ValueError, match="'kept' or 'batch'"):
        replay(record, net, x, y, average="mean")


def test_it_goes_on_after_an_interruption(tmp_path, monkeypatch):
    net, record = recorded("rows", momentum=0.5)
    x, y = data()
    whole = replay(record, net, x, y, without=GONE)
    path, step = tmp_path / "replay.pt", retrain.retrain_step

    def stops_in_step_9(record, number, *rest):
        if number == 9:
            raise KeyboardInterrupt
        return step(record, number, *rest)

    monkeypatch.setattr(retrain, "retrain_step", stops_in_step_9)
    with pytest.raises(KeyboardInterrupt):
        replay(record, net, x, y, without=GONE, checkpoint=path, every=4)
    done = []
    monkeypatch.setattr(
        retrain, "retrain_step", lambda r, n, *rest: done.append(n) or step(r, n, *rest)
    )
    with pytest.raises(ValueError, match="without other samples"):
        replay(record, net, x, y, without=[1], checkpoint=path)
    resumed = replay(record, net, x, y, without=GONE, checkpoint=path, every=4)
    assert done == list(range(8, len(record))) and not path.exists()
    same(resumed, whole)


def test_the_record_is_small_and_comes_back_from_its_file(tmp_path):
    net, record = recorded("rows", halve_at=5)
    x, y = data()
    assert len(record) == 12 and record.samples().tolist() == list(range(SAMPLES))
    assert sorted(record.rates) == [0, 5] and record.rates_at(11)[0]["lr"] == 0.15
    record.save(tmp_path / "record.pt")
    again = RunRecord.load(tmp_path / "record.pt")
    same(replay(again, net, x, y, without=GONE), replay(record, net, x, y, without=GONE))
    assert all(torch.equal(a, b) for a, b in zip(again.ids, record.ids))
    start = sum(t.nbytes for t in record.start["model"].values())
    assert record.nbytes() == start + 8 * 3 * SAMPLES  # 3 epochs
    (tmp_path / "other.pt").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="other.pt"):
        RunRecord.load(tmp_path / "other.pt")
    torch.save({"a": 1}, tmp_path / "dict.pt")
    with pytest.raises(ValueError, match="no record of a run"):
        RunRecord.load(tmp_path / "dict.pt")


def test_refusals():
    net, record = recorded("rows")
    x, y = data()
    with pytest.raises(ValueError, match=r"did not learn from samples \[99\]"):
        replay(record, net, x, y, without=[3, 99])
    moments = fresh("moments")
    with pytest.raises(TypeError, match="Adam are not recorded"):
        Recorder(moments, torch.optim.Adam(moments.parameters()))
    net = fresh("rows")
    optimizer = PiSGD(net.parameters(), lr=0.1)
    with Recorder(net, optimizer) as recorder:
        net(x).sum().backward()
        with pytest.raises(RuntimeError, match="after 0 forward passes"):
            optimizer.step()
        with torch.no_grad(), batch(torch.arange(SAMPLES)):
            net(x)  # an evaluation is no step
        with batch(torch.arange(SAMPLES)):
            net(x).sum().backward()
        optimizer.step()
    assert len(recorder.record) == 1
    optimizer.zero_grad()
    net(x).sum().backward()
    optimizer.step()  # no longer recorded
    assert len(recorder.record) == 1
