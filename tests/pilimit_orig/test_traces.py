"""pilimit_orig against the recorded training runs of the original code: every hyperparameter, ten
steps."""

import pytest
import torch

from pilimit_orig.inf import InfPiMLP
from pilimit_orig.losses import LOSSES
from tests.pilimit_orig.fixtures import arrays, found


def start(t, dtype):
    """The network that a trace starts from; the library's layer i is our layer i + 1."""
    L = t["hp__L"] + 1
    last = None if t["hp__last_bias_alpha"] == "None" else float(t["hp__last_bias_alpha"])
    net = InfPiMLP(
        t["X"].shape[-1],
        t["test_preds"].shape[-1],
        L,
        t["init__layers.0.A"].shape[1],
        bias_alpha=t["hp__bias_alpha"],
        last_bias_alpha=last,
        first_layer_alpha=t["hp__first_layer_alpha"],
        last_layer_alpha=t["hp__last_layer_alpha"],
        layernorm=t["hp__layernorm"],
        dtype=dtype,
    )
    net.As = {l: t[f"init__layers.{l - 1}.A"] for l in range(1, L + 2)}
    net.Bs = {l: t[f"init__layers.{l - 1}.B"] for l in range(2, L + 2)}
    net.Amult = {l: t[f"init__layers.{l - 1}.Amult"] for l in range(2, L + 2)}
    net.biases = {l: t[f"init__layers.{l - 1}.bias"] for l in net.biases}
    return net


def train(net, t):
    """Losses before each of the steps, outputs on the test inputs before and after each, and the
    clipped gradients."""
    loss_of = LOSSES[t["hp__loss"]][0]
    losses, preds, gradients = [], [net.predict(t["X_test"])], []
    for x, y in zip(t["X"], t["Y"]):
        loss, delta = loss_of(net(x), y)
        net.zero_grad()
        net.backward(delta)
        if t["hp__gclip"] > 0:
            net.gclip(t["hp__gclip"], per_param=t["hp__gclip_per_param"])
        net.step(
            t["hp__lr"],
            t["hp__wd"],
            bias_lr_mult=t["hp__bias_lr_mult"],
            first_layer_lr_mult=t["hp__first_layer_lr_mult"],
            last_layer_lr_mult=t["hp__last_layer_lr_mult"],
            apply_lr_mult_to_wd=not t["hp__no_apply_lr_mult_to_wd"],
        )
        losses.append(loss)
        preds.append(net.predict(t["X_test"]))
        gradients.append(net.grads)
    return torch.stack(losses), torch.stack(preds), gradients


@pytest.mark.parametrize(
    "dtype, tolerance, suffix",
    [(torch.float32, 1e-5, ""), (torch.float64, 1e-10, "_f64")],
    ids=["float32", "float64"],
)
@pytest.mark.parametrize("file", found("trace_*.npz"))
def test_trace(file, dtype, tolerance, suffix):
    t = arrays(file, torch.float64 if suffix else torch.float32)
    losses, preds, _ = train(start(t, dtype), t)
    expected_preds = arrays(file, dtype)["test_preds" + suffix]
    assert losses.dtype == dtype and len(losses) == 10
    assert (
        losses.double() - arrays(file, torch.float64)["losses" + suffix]
    ).abs().max() < tolerance
    assert (preds - expected_preds).abs().max() < tolerance


@pytest.mark.parametrize("file", found("trace_*.npz"))
def test_gradients_after_clipping_and_final_state(file):
    t = arrays(file)
    net = start(t, torch.float32)
    _, _, gradients = train(net, t)
    for step in (0, 1):
        G = gradients[step]
        assert torch.allclose(G.first, t[f"grads_step{step}__layers.0.A"], atol=1e-5)
        for l in range(2, net.L + 2):
            A, B = G.rows(l)
            assert torch.allclose(A, t[f"grads_step{step}__layers.{l - 1}.A"], atol=1e-5)
            assert torch.allclose(B, t[f"grads_step{step}__layers.{l - 1}.B"], atol=1e-5)
        for l, b in G.bias.items():
            assert torch.allclose(b, t[f"grads_step{step}__layers.{l - 1}.bias"], atol=1e-5)
    for l in range(1, net.L + 2):
        assert torch.allclose(net.As[l], t[f"final__layers.{l - 1}.A"], atol=2e-5)
        if l > 1:
            assert torch.allclose(net.Amult[l], t[f"final__layers.{l - 1}.Amult"], atol=1e-5)
            assert net.Bs[l].shape == t[f"final__layers.{l - 1}.B"].shape
