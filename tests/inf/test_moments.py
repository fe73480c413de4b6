"""The layer of constant size against growing rows with the same kernel, against exact rows, and
against its finite twins."""

import copy

import pytest
import torch
from torch import nn

from pilimit_lib.core import batch, restore, snapshot
from pilimit_lib.inf import (
    InfMLP,
    InfPiLinear,
    InfPiLinearReLU,
    PiSGD,
    clip_grad_norm_,
    hermite_series,
    param_groups,
)
from pilimit_lib.inf.numerics import direction
from pilimit_lib.inf.rows.merge import K1


class PolynomialRows:
    """The oracle: a π-network of growing rows with a polynomial dual kernel, written from the
    formulas with plain lists.

    Every layer's function of its input is differentiated by autograd; a step appends rows by hand.
    """

    def __init__(self, net: InfMLP, rows: InfMLP):
        self.kernel = net.layers[1].series.kernel
        self.A_in = net.layers[0].A.detach().clone()
        self.bias = [layer.bias.detach().clone() for layer in net.layers]
        self.rows = [
            [layer.A.blocks.dense(), layer.Amult.blocks.dense(), layer.B.blocks.dense()]
            for layer in rows.layers[1:]
        ]
        self.alphas = [
            net.first_layer_alpha,
            net.last_layer_alpha,
            net.bias_alpha,
            net.last_bias_alpha,
        ]

    def double(self):
        """The same start, computed in float64 from now on."""
        self.A_in, self.bias = self.A_in.double(), [b.double() for b in self.bias]
        self.rows = [[part.double() for part in parts] for parts in self.rows]
        return self

    def forward(self, x, A_in, bias):
        """(output, the inputs of every π-layer, the outputs of every π-layer)."""
        first, last, bias_alpha, last_bias_alpha = self.alphas
        g = first * (x @ A_in + bias_alpha * bias[0])
        inputs, outputs = [], []
        for number, (A, Amult, B) in enumerate(self.rows):
            alpha = last_bias_alpha if number == len(self.rows) - 1 else bias_alpha
            inputs.append(g)
            unit, s = direction(g)
            h = (self.kernel(unit @ B.T) * Amult) @ A * s
            outputs.append(h)
            g = h + alpha * bias[number + 1]
        return last * g, inputs, outputs

    def step(self, x, loss_of, groups, clip):
        A_in, bias = (
            self.A_in.clone().requires_grad_(),
            [b.clone().requires_grad_() for b in self.bias],
        )
        output, inputs, outputs = self.forward(x, A_in, bias)
        loss_of(output).backward(inputs=[A_in, *bias], retain_graph=True)
        signals = torch.autograd.grad(loss_of(output), outputs)
        new = [
            (signal * direction(g)[1].detach(), direction(g)[0].detach())
            for signal, g in zip(signals, inputs)
        ]
        gradients = [A_in.grad, *(b.grad for b in bias)]
        norms = [((A @ A.T) * self.kernel(B @ B.T)).sum().clamp_min(0).sqrt() for A, B in new]
        norms += [torch.linalg.vector_norm(gradient) for gradient in gradients]
        factor = (clip / (torch.stack(norms).norm() + 1e-6)).clamp(max=1)
        lr = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
        for number, (A, B) in enumerate(new):
            rate, decay = lr["last" if number == len(new) - 1 else "hidden"]
            old_A, old_mult, old_B = self.rows[number]
            mult = torch.cat([old_mult * (1 - rate * decay), A.new_full((len(A),), -rate)])
            self.rows[number] = [torch.cat([old_A, A * factor]), mult, torch.cat([old_B, B])]
        rate, decay = lr["first"]
        self.A_in = self.A_in - rate * (A_in.grad * factor + decay * self.A_in)
        rate, decay = lr["bias"]
        self.bias = [b.detach() - rate * (b.grad * factor + decay * b.detach()) for b in bias]


SETTINGS = {"first_layer_lr_mult": 0.3, "last_layer_lr_mult": 2.0, "bias_lr_mult": 0.5}


def task(dtype, d=12, o=4, n=64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(d, o, generator=generator, dtype=torch.float64)).argmax(1)
    return x.to(dtype), y


def pair(dtype, degree=2, fit="hermite", fused=False, **options):
    """(moments, rows) that start from the same draw."""
    nets = []
    for memory in ({"memory": "moments", "degree": degree, "fit": fit, "fused": fused}, {}):
        torch.manual_seed(3)
        nets.append(
            InfMLP(
                12,
                4,
                10,
                2,
                bias_alpha=0.5,
                last_layer_alpha=0.7,
                dtype=dtype,
                row_dtype=dtype,
                **memory,
                **options,
            )
        )
    return nets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("degree, fit, fused", [(2, "hermite", False), (4, "minimax", True)])
def test_growing_polynomial_rows_are_moments_along_200_steps(dtype, degree, fit, fused):
    """Training carries every rounding on, so the yardstick runs along: the oracle in float32 drifts
    from the oracle in float64, and moments of float32 may drift four times as far. In float64
    moments and oracle each drift by the same factor times float64's rounding; 1e-10 leaves that
    factor 4e5, where it is some 200."""
    moments, rows = pair(dtype, degree, fit, fused)
    oracle, exact = PolynomialRows(moments, rows), PolynomialRows(moments, rows).double()
    x, y = task(dtype)
    groups = param_groups(moments, 0.4, 1e-2, **SETTINGS)
    optimizer = PiSGD(groups, lr=0.4)
    worst, drift, clipped = 0.0, 0.0, 0
    for step in range(200):
        part = slice(8 * step % 64, 8 * step % 64 + 8)
        output = moments(x[part])
        outputs = [
            o.forward(x[part].to(o.A_in), o.A_in, o.bias)[0].detach() for o in (oracle, exact)
        ]
        worst = max(worst, float((output.detach() - outputs[1]).abs().max()))
        drift = max(drift, float((outputs[0] - outputs[1]).abs().max()))
        optimizer.zero_grad()
        nn.functional.cross_entropy(output, y[part]).backward()
        clipped += bool(clip_grad_norm_(moments, 0.3) > 0.3)
        optimizer.step()
        for other in (oracle, exact):
            other.step(
                x[part].to(other.A_in),
                lambda out, part=part: nn.functional.cross_entropy(out, y[part]),
                groups,
                0.3,
            )
    assert worst < (4 * drift if dtype == torch.float32 else 1e-10)
    assert drift < 1e-4
    assert clipped > 20
    assert len(oracle.rows[0][0]) == 10 + 8 * 200
    assert float(output.detach().abs().max()) > 0.1


def test_one_seed_gives_rows_and_moments_the_same_start():
    moments, rows = pair(torch.float64, 4)
    x, _ = task(torch.float64)
    torch.testing.assert_close(
        rows.to_moments(4).state_dict()["layers.1.V"], moments.state_dict()["layers.1.V"]
    )
    hidden = [net.layers[1](net.layers[0](x)).detach() for net in (moments, rows)]
    assert float((hidden[0] - hidden[1]).abs().max()) < 0.2


@pytest.mark.parametrize("layernorm", [False, True])
def test_truncation_bounds_the_distance_to_exact_rows(layernorm):
    """Σ |Amult A| · truncation bounds outputs per unit of |g|, and more degrees come closer."""
    torch.manual_seed(0)
    layer = InfPiLinearReLU(9, 5, layernorm=layernorm, dtype=torch.float64)
    g = 3 * torch.randn(40, 9, dtype=torch.float64)
    scale = 1 if layernorm else torch.linalg.vector_norm(g, dim=1)
    size = float(
        torch.linalg.vector_norm(layer.A.blocks.dense(), dim=1) @ layer.Amult.blocks.dense().abs()
    )
    distances = []
    for degree in (1, 2, 4, 6):
        moments = layer.to_moments(degree)
        gap = torch.linalg.vector_norm(moments(g) - layer(g), dim=1).detach()
        assert float((gap / scale).max()) <= size * moments.truncation
        distances.append(float(gap.max()))
    assert distances == sorted(distances, reverse=True) and distances[-1] < 0.1 * distances[0]


def test_vanishing_pre_activations_give_zero_and_pass_no_gradient():
    for layernorm in (False, True):
        layer = InfPiLinear(4, 3, bias_alpha=0, layernorm=layernorm, dtype=torch.float64)
        g = torch.zeros(2, 4, dtype=torch.float64)
        g[1] = torch.tensor([1.0, 2, 0, 0])
        g.requires_grad_()
        out = layer(g)
        out.sum().backward()
        assert not out[0].any() and not g.grad[0].any() and g.grad[1].any()
        assert torch.isfinite(layer.V.grad).all()


def test_gradient_of_a_layer_is_that_of_finite_differences():
    for layernorm in (False, True):
        layer = InfPiLinear(
            5, 3, activation="gelu", degree=3, layernorm=layernorm, dtype=torch.float64
        )
        g = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda g, V, bias, layer=layer: layer(g), (g, layer.V, layer.bias)
        )


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "relu"},
        {"activation": "relu", "fit": "minimax", "layernorm": True},
        {"activation": "tanh", "degree": 3},
        {"activation": "gelu", "degree": 3},
    ],
)
def test_finite_twins_converge_at_rate_one_over_root_n(options):
    torch.manual_seed(0)
    net = InfMLP(6, 3, 5, 2, memory="moments", bias_alpha=0.5, dtype=torch.float64, **options)
    x = torch.randn(20, 6, dtype=torch.float64)
    nn.init.normal_(net.layers[-1].V, std=0.3)
    expected = net(x).detach()
    errors = []
    with torch.no_grad():
        for n in (64, 1024):
            errors.append(
                torch.stack([(net.sample(n)(x) - expected).square().mean() for _ in range(8)])
                .mean()
                .sqrt()
            )
    # 16 times the width: a quarter of the error.
    assert 2.5 < float(errors[0] / errors[1]) < 6
    assert float(errors[1]) < 0.25 * float(expected.square().mean().sqrt())


def test_training_a_finite_twin_follows_the_moments_network():
    x, y = task(torch.float32)
    finals = {}
    for n in (0, 64, 65, 66, 1024, 1025, 1026):
        torch.manual_seed(5)
        net = InfMLP(12, 4, 6, 1, memory="moments", bias_alpha=0.5)
        if n:
            net = net.sample(n)
        optimizer = PiSGD(param_groups(net, 1.0, 1e-3, **SETTINGS))
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            clip_grad_norm_(net, 1.0)
            optimizer.step()
        finals[n] = net(x).detach()
    near, far = (
        float(
            torch.stack([(finals[n + i] - finals[0]).square().mean() for i in range(3)])
            .mean()
            .sqrt()
        )
        for n in (1024, 64)
    )
    assert 2.5 < far / near < 6  # 16 times the width
    assert near < 0.25 * float(finals[0].square().mean().sqrt())


class TestCheckpoints:
    def trained(self, memory="moments", **options):
        torch.manual_seed(0)
        net = InfMLP(12, 4, 8, 1, bias_alpha=0.5, memory=memory, **options)
        optimizer = PiSGD(param_groups(net, 0.4, 1e-3))
        x, y = task(torch.float32)
        for _ in range(6):
            optimizer.zero_grad()
            with batch(torch.arange(64)):
                nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        return net, x

    def test_moments_load_into_moments(self):
        net, x = self.trained(fit="minimax")
        twin = InfMLP.from_state_dict(net.state_dict())
        assert twin.memory == "moments" and twin.fit == "minimax" and torch.equal(twin(x), net(x))

    @pytest.mark.parametrize("options", [{}, {"row_budget": 50}, {"merge": 0.9}])
    def test_rows_load_into_moments(self, options):
        net, x = self.trained("rows", **options)
        converted = net.to_moments()
        loaded = InfMLP(12, 4, 8, 1, bias_alpha=0.5, memory="moments")
        loaded.load_state_dict(net.state_dict())
        torch.testing.assert_close(loaded(x), converted(x), rtol=1e-5, atol=1e-6)
        assert float((loaded(x) - net(x)).detach().abs().max()) < 0.1 * float(
            net(x).detach().abs().max()
        )
        restored = InfMLP(12, 4, 8, 1, bias_alpha=0.5, memory="moments")
        restore(restored, snapshot(net))
        assert torch.equal(restored(x), loaded(x))

    def test_every_kind_of_rows_loads_into_its_kind(self):
        for options in ({}, {"row_budget": 50}, {"merge": 0.9}):
            net, x = self.trained("rows", **options)
            twin = InfMLP.from_state_dict(net.state_dict())
            assert torch.equal(twin(x), net(x)) and twin.rows == net.rows
            if "row_budget" in options:
                assert (
                    int(twin.layers[1].folded.rows) > 0
                    and twin.layers[1].folded.error == net.layers[1].folded.error
                )

    @pytest.mark.parametrize(
        "there, here, message",
        [
            ({}, {"degree": 3, "fit": "minimax"}, "kernel coefficients"),
            ({"activation": "gelu"}, {}, "kernel coefficients"),
            ({}, {"memory": "rows"}, "layers.1.A is missing"),
            ({"memory": "rows"}, {"activation": "gelu"}, "ReLU units"),
            (
                {"memory": "rows", "row_budget": 20},
                {"memory": "rows"},
                "build the network with row_budget",
            ),
            ({"memory": "rows", "row_budget": 20}, {"fit": "minimax"}, "kernel coefficients"),
        ],
    )
    def test_what_does_not_fit_is_refused_before_anything_changes(self, there, here, message):
        saved, _ = self.trained(**there)
        net, x = self.trained(**here)
        before = net(x)
        with pytest.raises(RuntimeError, match=message):
            net.load_state_dict(saved.state_dict())
        assert torch.equal(net(x), before)

    def test_a_function_as_activation_can_be_loaded_but_not_guessed(self):
        net, x = self.trained(activation=torch.sin, degree=3)
        twin = InfMLP(12, 4, 8, 1, bias_alpha=0.5, memory="moments", activation=torch.sin, degree=3)
        twin.load_state_dict(net.state_dict())
        assert torch.equal(twin(x), net(x))
        with pytest.raises(ValueError, match="only its author has"):
            InfMLP.from_state_dict(net.state_dict())

    def test_to_moments_keeps_everything_else_and_shares_nothing(self):
        net, x = self.trained("rows")
        moments = net.to_moments(4)
        before = net(x)
        assert moments.architecture() == net.architecture() | {"memory": "moments", "degree": 4}
        assert list(dict(moments.named_parameters())) == [
            "layers.0.A",
            "layers.0.bias",
            "layers.1.V",
            "layers.1.bias",
            "layers.2.V",
            "layers.2.bias",
        ]
        with torch.no_grad():
            for parameter in moments.parameters():
                parameter.add_(1)
        moments.register_forward_hook(lambda *_: None)
        assert torch.equal(net(x), before) and not net._forward_hooks

    def test_rows_in_many_parts_are_summed_alike(self, monkeypatch):
        from pilimit_lib.inf.moments import sums as feature_linear

        net, x = self.trained("rows")
        expected = net.to_moments()(x)
        monkeypatch.setattr(feature_linear, "ROWS_AT_ONCE", 7)
        torch.testing.assert_close(net.to_moments()(x), expected, rtol=1e-5, atol=1e-6)

    def test_checkpoint_of_the_original_code_becomes_moments(self):
        from pilimit_lib.inf.checkpoints.original import to_pilimit_orig

        net, x = self.trained("rows")
        moments = InfMLP(12, 4, 8, 1, bias_alpha=0.5, memory="moments")
        moments.load_pilimit_orig_net(to_pilimit_orig(net))
        torch.testing.assert_close(moments(x), net.to_moments()(x), rtol=1e-5, atol=1e-6)
        for other in (moments, self.trained("rows", row_budget=20)[0]):
            with pytest.raises(ValueError, match="keeps moments"):
                to_pilimit_orig(other)

    def test_pending_rows_are_not_lost_by_conversion(self):
        net, x = self.trained("rows")
        net(x).sum().backward()
        with pytest.raises(ValueError, match="pending rows"):
            net.to_moments()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"memory": "row"}, "'rows' or 'moments'"),
        ({"activation": "gelu"}, "exact for ReLU only"),
        ({"fused": True}, "moments altogether"),
        ({"memory": "moments", "row_budget": 9, "activation": "gelu"}, "for ReLU only"),
        ({"memory": "moments", "merge": 0.9}, "memory='rows'"),
        ({"row_budget": -1}, "row_budget is -1"),
        ({"merge": 1.5}, "cosine above which"),
        ({"memory": "moments", "degree": -1}, "degree is -1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        InfMLP(5, 2, 4, 1, **arguments)


def test_moments_that_do_not_fit_say_how_large_they_would_be():
    with pytest.raises(
        MemoryError, match=r"degree 6 at r=400 .* x 400: [\d,.]+ GiB, and .* free. Lower the degree"
    ):
        InfPiLinear(400, degree=6)


def test_the_object_tells_its_truncation():
    layer = InfPiLinear(4, degree=2)
    assert (
        layer.truncation
        == hermite_series("relu", 2).error
        == pytest.approx(K1 - sum(layer.series.kappa))
    )
    assert "truncation=0.011" in repr(layer) and layer.P == 15 and layer.row_bytes == 15 * 4 * 4


def test_pi_layer_of_wrong_rank_is_told_so():
    with pytest.raises(ValueError, match=r"expects pre-activations \[..., 4\], got \[2, 5\]"):
        InfPiLinear(4)(torch.randn(2, 5))


def test_bfloat16_moments_train():
    torch.manual_seed(0)
    net = InfMLP(12, 4, 8, 1, memory="moments", row_dtype=torch.bfloat16)
    x, y = task(torch.float32)
    optimizer = PiSGD(param_groups(net, 1.0))
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(net(x), y))
        losses[-1].backward()
        optimizer.step()
    assert net.layers[1].V.dtype == torch.bfloat16 and net(x).dtype == torch.float32
    assert losses[-1] < 0.7 * losses[0]
    copy.deepcopy(net)


def test_a_budget_of_rows_turns_into_moments_of_its_own_degree():
    net = InfMLP(4, 2, 5, 1, row_budget=6, degree=4, fit="minimax")
    moments = net.to_moments()
    assert (moments.degree, moments.fit) == (4, "minimax") and moments.layers[1].series.degree == 4
    assert InfMLP(4, 2, 5, 1).to_moments().degree == 2
