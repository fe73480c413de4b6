"""Models: call forms, who trains what, local optimisers listed, scheduled, saved and resumed, early
exits, loops."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pilimit_lib import core, sigprop
from pilimit_lib.sigprop import models, propagators
from pilimit_lib.sigprop.models import trial

V9 = sigprop.loss.v9_input_target_max_all


def train(net, data, steps=3, optimizer=None, schedule=None):
    x, y = data
    net.train()
    optimizer = optimizer or torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(steps):
        loss = F.cross_entropy(net(x, y), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return optimizer


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_every_call_form(make, data):
    x, y = data
    nets = [make(norm=True) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    assert torch.equal(nets[0](x, y), nets[1]((x, y))) and same(*nets)
    nets[1](x, context=y), nets[0]([x, y])
    assert same(*nets)
    net = nets[0].eval()
    assert torch.equal(net(x), net(x, None)) and torch.equal(net(x), net((x, None)))
    assert torch.equal(net(x), net(x, y))  # labels in evaluation teach nothing
    assert same(*nets)


def test_a_pass_trains_hidden_layers_and_the_caller_the_output(make, data):
    net, before = (n := make()), copy.deepcopy(n.state_dict())
    train(net, data, 1)
    assert all(
        not torch.equal(v, before[k]) for k, v in net.state_dict().items() if "num_batches" not in k
    )
    outer = {k for k, _ in net.named_parameters() if k.startswith("model.2")}
    assert {id(p) for p in net.parameters()} == {
        id(p) for k, p in net.named_parameters() if k in outer
    }
    assert len(list(net.named_parameters())) > len(outer) == 2


def test_targets_propagate_through_every_layer(make, data):
    x, y = data
    net = make(lr=0.0)
    seen = {}
    for name, learner in net.learners().items():
        learner.register_forward_hook(
            lambda m, args, out, name=name: seen.__setitem__(name, (args[0], out))
        )
    net(x, y)
    _, (h, t) = seen["signal"]
    for i in (0, 1):
        into, out = seen[f"model.{i}"]
        assert torch.equal(into[0], h) and torch.equal(into[1], t) and out.context is y
        assert torch.allclose(out.h, net.model[i].module(h)) and torch.allclose(
            out.t, net.model[i].module(t)
        )
        h, t = out.h, out.t
    assert list(seen) == ["signal", "model.0", "model.1"] and len(t) == len(x)
    assert make(per_class=True, lr=0.0)(x, y).shape == (24, 3)


def test_layers_learn_as_if_each_were_trained_alone(make, data):
    """Autograd's answer for the sum of all local losses with detached inputs, against one pass of
    the model, in float64."""
    x, y = data[0].double(), data[1]
    torch.set_default_dtype(torch.double)
    try:
        net = make(dtype=torch.double, lr=0.1)
        twin = copy.deepcopy(net)
        h0, t0 = x, F.one_hot(y, 3).double()
        gen = twin.signal.module[1]
        h, t = gen.module_input(x), gen.module_context(t0)
        loss = V9(None, h, t, h0, t0, y)
        for p in list(twin.model)[:-1]:
            h0, t0 = h.detach(), t.detach()
            h, t = p.module(h0), p.module(t0)
            loss = loss + V9(None, h, t, h0, t0, y)
        gradients = torch.autograd.grad(
            loss, [p for n, p in twin.named_parameters() if not n.startswith("model.2")]
        )
        expected = [
            p - 0.1 * g
            for (n, p), g in zip(
                ((n, p) for n, p in twin.named_parameters() if not n.startswith("model.2")),
                gradients,
            )
        ]
        net(x, y)
        got = [p for n, p in net.named_parameters() if not n.startswith("model.2")]
        for a, b in zip(got, expected):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


def test_one_target_per_class_trains_as_one_per_sample(make, data):
    a, b = make(loss=sigprop.loss.Contrast(counts=True), per_class=True), make()
    b.load_state_dict({k.replace("module.2", "module.1"): v for k, v in a.state_dict().items()})
    train(a, data, 5), train(b, data, 5)
    for (_, p), (_, q) in zip(a.named_parameters(), b.named_parameters()):
        assert torch.allclose(p, q, atol=1e-5)


def test_local_optimizers_are_listed_and_scheduled(make, data):
    net = make()
    optimizers = net.local_optimizers()
    assert list(optimizers) == ["signal", "model.0", "model.1"]
    schedule = net.schedule(lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5))
    train(net, data, 2, schedule=schedule)
    assert {o.param_groups[0]["lr"] for o in optimizers.values()} == {0.025}


def adam(m):
    return torch.optim.Adam(m.parameters(), 0.01)


@pytest.mark.parametrize("per_class", [True, False])
def test_resume_is_bit_for_bit(make, data, tmp_path, per_class):
    def fresh(seed):
        torch.manual_seed(seed)
        net = make(
            optimizer=adam,
            norm=True,
            per_class=per_class,
            loss=sigprop.loss.v14_input_target_max_rand,
        )
        return (
            net,
            adam(net),
            net.schedule(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10)),
        )

    net, optimizer, schedule = fresh(0)
    train(net, data, 4, optimizer, schedule)
    core.save(
        core.snapshot(net, optimizer, local=net.optimizer_state_dict(), rng=core.rng_state()),
        tmp_path / "c.pt",
    )
    train(net, data, 4, optimizer, schedule)

    again, optimizer2, schedule2 = fresh(1)
    extras = core.restore(again, core.load(tmp_path / "c.pt"), optimizer2)
    again.load_optimizer_state_dict(extras["local"])
    core.set_rng_state(extras["rng"])
    train(again, data, 4, optimizer2, schedule2)
    assert same(net, again)
    # The control: without the local optimisers' state the runs part.
    lossy, optimizer3, schedule3 = fresh(1)
    core.set_rng_state(core.restore(lossy, core.load(tmp_path / "c.pt"), optimizer3)["rng"])
    train(lossy, data, 4, optimizer3, schedule3)
    assert not same(net, lossy)


def test_loading_state_that_does_not_fit_changes_nothing(make, data):
    net = make(optimizer=adam)
    train(net, data)
    before = net.optimizer_state_dict()
    state = copy.deepcopy(before)
    state["optimizers"]["model.1"]["state"][0]["exp_avg"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"'model.1': exp_avg was saved with shape \[3, 3\]"):
        net.load_optimizer_state_dict(state)
    with pytest.raises(ValueError, match="optimizers do not match"):
        net.load_optimizer_state_dict(
            {**before, "optimizers": {"signal": before["optimizers"]["signal"]}}
        )
    with pytest.raises(ValueError, match="call model.schedule"):
        net.load_optimizer_state_dict({**before, "schedulers": {"signal": {}}})
    with pytest.raises(ValueError, match="not a state of local optimisers"):
        net.load_optimizer_state_dict({})
    after = net.optimizer_state_dict()
    for name, o in before["optimizers"].items():
        for key, entry in o["state"].items():
            assert all(
                torch.equal(v, after["optimizers"][name]["state"][key][k]) for k, v in entry.items()
            )


def test_a_copy_is_independent(make, data):
    net = make(optimizer=adam)
    train(net, data)
    twin = copy.deepcopy(net)
    train(twin, data), train(net, data)
    assert same(net, twin)
    frozen = copy.deepcopy(net.state_dict())
    train(twin, data)
    assert all(torch.equal(v, frozen[k]) for k, v in net.state_dict().items())


def test_gradients_add_up_over_batches_until_the_step(make, data):
    x, y = data
    net, twin = (
        (n := make(loss=sigprop.loss.v1_input_label_direct, per_class=True)),
        copy.deepcopy(n),
    )
    with net.accumulate():
        net(x[:12], y[:12]), net(x[12:], y[12:])
    assert same(net, twin)
    net.local_step()
    # mean over halves, summed: twice the gradient of the whole
    for p in twin.learners().values():
        p.optimizer.param_groups[0]["lr"] *= 2
    twin(x, y)
    for (_, p), (_, q) in zip(net.named_parameters(), twin.named_parameters()):
        assert torch.allclose(p, q, atol=1e-6)
    assert not any(p.deferred for p in net.learners().values())


def test_zero_grad_and_requires_grad_reach_all_parameters(make, data):
    x, y = data
    net = make()
    with net.accumulate():
        F.cross_entropy(net(x, y), y).backward()
    assert all(p.grad is not None for _, p in net.named_parameters())
    net.zero_grad()
    assert all(p.grad is None for _, p in net.named_parameters())
    assert not any(p.requires_grad for _, p in net.requires_grad_(False).named_parameters())


def test_early_exits(make, data):
    x, y = data
    net = make(norm=True)
    train(net, data, 60)
    state = copy.deepcopy(net.state_dict())
    exits = net.exits(x)
    assert list(exits) == ["signal", "model.0", "model.1", "output"] and all(
        e.shape == (24, 3) for e in exits.values()
    )
    assert torch.equal(exits["output"], net.eval()(x))
    assert all((e.argmax(1) == y).float().mean() > 0.6 for e in exits.values())
    upto = net.train().exits(x, upto="model.0")
    assert list(upto) == ["signal", "model.0"] and torch.equal(upto["model.0"], exits["model.0"])
    assert net.training and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    with pytest.raises(ValueError, match="no learner is called 'model.9'"):
        net.exits(x, upto="model.9")


def test_compiled_blocks_compute_the_same(make, data):
    net, twin = (n := make(norm=True)), copy.deepcopy(n)
    net.compile_blocks(backend="aot_eager")
    train(net, data, 2), train(twin, data, 2)
    assert list(net.state_dict()) == list(twin.state_dict())
    for (_, p), (_, q) in zip(net.named_parameters(), twin.named_parameters()):
        assert torch.allclose(p, q, atol=1e-5)


def loop(cls, seed=0):
    torch.manual_seed(seed)
    error = lambda out, y: F.one_hot(y, 3).float() - out.softmax(1)  # noqa: E731
    context = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))
    start = sigprop.signals.ProjectionContextInput(
        context, nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8)), (3,), (8,)
    )
    if cls is models.ForwardLoopBack:  # here labels come in as well as errors

        class LabelsOrErrors(sigprop.signals.Formatter):
            def forward(self, input):
                h, t = input
                return h, t if t is None or t.is_floating_point() else F.one_hot(t, 3).float()

        start = nn.Sequential(LabelsOrErrors(), start)
    layer = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    return cls(
        nn.Sequential(propagators.Loss(layer, loss=V9), propagators.Identity(nn.Linear(8, 3))),
        propagators.signals.Loss(start, loss=V9),
        error=error,
        optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.05),
    )


@pytest.mark.parametrize("cls, updates", [(models.LoopBack, 1), (models.ForwardLoopBack, 2)])
def test_loops_update_as_often_as_they_say(cls, updates, data):
    x, y = data
    net = loop(cls)
    trial.fits(net, x)
    net._tried = True
    steps, targets = [], []
    learner = net.learners()["model.0"]
    step = learner.optimizer.step
    learner.optimizer.step = lambda: (steps.append(1), step())
    net.signal.register_forward_pre_hook(lambda m, args: targets.append(args[0][1]))
    out = net(x, y)
    assert out.requires_grad and len(steps) == updates
    # An error (label minus prediction) sums to zero and is positive at the label alone, unlike the
    # label itself.
    assert torch.allclose(targets[-1].sum(1), torch.zeros(24), atol=1e-6)
    assert torch.equal(targets[-1] > 0, F.one_hot(y, 3).bool())
    assert (targets[0] is None) == (cls is models.LoopBack)
    norm = net.signal.get_submodule(
        "module" if cls is models.LoopBack else "module.1"
    ).module_input[1]
    assert norm.num_batches_tracked == updates
    assert net.eval()(x).shape == (24, 3) and len(steps) == updates
    with pytest.raises(TypeError, match="error must be callable"):
        cls(net.model, net.signal, error=None)


def bad(net, x, y):
    return {
        "no labels in training": (lambda: net(x), ValueError, "training needs the context"),
        "labels of another batch": (
            lambda: net(x, y[:5]),
            ValueError,
            "24 inputs but a context of shape",
        ),
        "labels out of range": (lambda: net(x, y + 1), ValueError, "labels must lie in 0 .. 2"),
        "negative labels": (lambda: net(x, y - 1), ValueError, "got values from -1"),
        "wrong width": (lambda: net(x[:, :5], y), RuntimeError, "shapes cannot be multiplied"),
        "labels beside a pair": (lambda: net((x, y), y), TypeError, "beside a context"),
        "a triple": (lambda: net((x, y, y)), TypeError, r"call model\(x, y\) or model\(\(x, y\)\)"),
    }


@pytest.mark.parametrize("name", list(bad(None, torch.zeros(1), torch.zeros(1))))
def test_bad_input_is_refused_before_anything_changes(make, data, name):
    net = make(norm=True)
    before = copy.deepcopy(net.state_dict())
    call, error, message = bad(net, *data)[name]
    with pytest.raises(error, match=message):
        call()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_batch_smaller_than_k_is_refused_before_the_first_layer_learns(data):
    x, y = data
    layers = [
        propagators.Loss(nn.Linear(8, 8), loss=loss)
        for loss in (V9, sigprop.loss.v15_input_target_topk(6))
    ]
    signal = propagators.signals.Loss(
        sigprop.signals.project_labels(3, (8,), nn.Linear(12, 8)), loss=V9
    )
    net = models.Forward(
        nn.Sequential(*layers, propagators.Identity(nn.Linear(8, 3))), signal, optimizer=adam
    )
    net(x, y)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="k=6 partners but there are only 4.*drop_last=True"):
        net(x[:4], y[:4])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("loss", ["function", "module", "watched", "by label"])
def test_a_short_last_batch_can_be_evaluated_with_its_labels(
    make, data, rows, per_class, fuse, loss
):
    x, y = data
    topk = sigprop.loss.v15_input_target_topk(topk=3 if per_class else 6)
    options = {
        "function": {"loss": lambda *args: topk(*args)},
        "module": {"loss": topk},
        "watched": {"loss": topk, "monitor": sigprop.monitors.loss.LabelMetrics},
        "by label": {"loss": sigprop.loss.Contrast("topk", k=3, by="label")},
    }
    net = make(norm=True, per_class=per_class, fuse=fuse, **options[loss])
    net(x, y)
    out = net.eval()(x, y)
    assert torch.allclose(net(x[:rows], y[:rows]), out[:rows], atol=1e-6)
    assert all(learner.last_loss.isfinite() for learner in net.learners().values())


def test_a_block_that_does_not_fit_is_found_before_any_has_learnt(data):
    layers = [
        nn.Linear(8, 8),
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)),
        nn.Linear(7, 8),
        nn.Linear(8, 3),
    ]
    net = sigprop.wrap(
        layers, signal=sigprop.signals.project_labels(3, (8,), nn.Linear(12, 8)), optimizer=adam
    )
    before = copy.deepcopy(net.state_dict())
    with core.batch(torch.arange(24)):
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=r"(?s)shapes cannot be multiplied.*raised in 'model.2' \(Loss\("
            ):
                net(*data)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and all(
        m.training for m in net.modules()
    )
    net.model[2] = propagators.Loss(nn.Linear(8, 8), loss=V9)
    assert net(*data).shape == (24, 3)


def test_v1_refuses_targets_of_samples(make, data):
    v1 = sigprop.loss.v1_input_label_direct
    with pytest.raises(ValueError, match="the 24 target rows stand for samples.*per_class=True"):
        make(loss=v1)(*data)
    x, y = data
    # as many samples as classes: the signal says which
    make(loss=v1, per_class=True)(x[:3], y[:3])


def test_streams_of_different_shape_are_refused_by_the_signal(make, data):
    net = make(signal=sigprop.signals.project_labels(3, (9,), nn.Linear(12, 8)))
    with pytest.raises(ValueError, match=r"input rows of shape \[8\] and target rows of \[9\]"):
        net(*data)


def test_parts_that_are_not_wrapped_are_named():
    signal = propagators.signals.Fixed(sigprop.signals.project_labels(3, (8,)))
    with pytest.raises(TypeError, match="model must contain propagators, got Sequential"):
        models.Forward(nn.Sequential(nn.Linear(8, 3)), signal)
    with pytest.raises(TypeError, match="signal must contain propagators, got Sequential"):
        models.Forward(propagators.Identity(nn.Linear(8, 3)), signal.module)
    with pytest.raises(TypeError, match="optimizer must be a function"):
        models.Forward(
            propagators.Identity(nn.Linear(8, 3)), signal, optimizer=adam(nn.Linear(1, 1))
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("half", [False, True])
def test_the_gpu_trains_as_the_cpu(make, data, half):
    x, y = data
    net = make(norm=True, per_class=True, loss=sigprop.loss.Contrast(by="label"))
    twin = copy.deepcopy(net).cuda()
    if half:
        for learner in twin.learners().values():
            learner.scaler = torch.amp.GradScaler("cuda")
    with torch.autocast("cuda", dtype=torch.float16, enabled=half):
        out = twin(x.cuda(), y.cuda())
    tolerance = 2e-2 if half else 1e-4
    assert torch.allclose(net(x, y), out.float().cpu(), atol=tolerance)
    for (_, p), (_, q) in zip(net.named_parameters(), twin.named_parameters()):
        assert torch.allclose(p, q.cpu(), atol=tolerance)
