"""What the original implementation computed, reproduced: training traces and checkpoints beside the
repository."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pilimit_lib.core import load
from pilimit_lib.inf import InfMLP, PiSGD, clip_grad_norm_, param_groups

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "pilimit"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def found(pattern: str) -> list:
    files = sorted(FOLDER.glob(pattern))
    absent = pytest.mark.skip(
        reason=f"no {pattern} in ../shared/fixtures/pilimit beside the repository"
    )
    return [pytest.param(file, id=file.stem) for file in files] or [
        pytest.param(None, marks=absent, id="absent")
    ]


class Trace:
    """One recorded run: a network built from its hyper-parameters, with the recorded initial
    values."""

    def __init__(self, file: Path, dtype: torch.dtype) -> None:
        self.arrays = dict(np.load(file))
        self.hp = {
            key[4:]: value.item() for key, value in self.arrays.items() if key.startswith("hp__")
        }
        self.dtype = dtype
        last = self.hp["last_bias_alpha"]
        init = self.named("init__")
        d, r = init["layers.0.A"].shape
        self.net = InfMLP(
            d,
            self.arrays["test_preds"].shape[-1],
            r,
            int(self.hp["L"]),
            float(self.hp["first_layer_alpha"]),
            float(self.hp["last_layer_alpha"]),
            float(self.hp["bias_alpha"]),
            None if last in ("None", None) else float(last),
            layernorm=bool(self.hp["layernorm"]),
            dtype=dtype,
        )
        own = dict(self.net.named_parameters())
        self.net.load_state_dict(
            {key: value for key, value in init.items() if key in own}, strict=False
        )
        self.optimizer = PiSGD(
            param_groups(
                self.net,
                float(self.hp["lr"]),
                float(self.hp["wd"]),
                float(self.hp["first_layer_lr_mult"]),
                float(self.hp["last_layer_lr_mult"]),
                float(self.hp["bias_lr_mult"]),
                not self.hp["no_apply_lr_mult_to_wd"],
            )
        )

    def named(self, prefix: str) -> dict[str, torch.Tensor]:
        return {
            key.removeprefix(prefix): torch.from_numpy(value).to(self.dtype)
            for key, value in self.arrays.items()
            if key.startswith(prefix)
        }

    def tensor(self, name: str) -> torch.Tensor:
        value = torch.from_numpy(self.arrays[name])
        return value.to(self.dtype) if value.is_floating_point() else value

    def loss(self, out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.hp["loss"] == "xent":
            return nn.functional.cross_entropy(out, y)
        return (out - (nn.functional.one_hot(y, out.shape[1]) - 0.1)).square().mean()

    def step(self, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.optimizer.zero_grad()
        out = self.net(self.tensor("X")[t])
        loss = self.loss(out, self.tensor("Y")[t])
        loss.backward()
        if self.hp["gclip"]:
            clip_grad_norm_(
                self.net, float(self.hp["gclip"]), per_param=bool(self.hp["gclip_per_param"])
            )
        return loss.detach(), out.detach()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("file", found("trace_*.npz"))
def test_training_trace(file, dtype):
    trace = Trace(file, dtype)
    exact = dtype == torch.float64
    losses, predictions = [], [trace.net(trace.tensor("X_test")).detach()]
    for t in range(len(trace.arrays["X"])):
        loss, out = trace.step(t)
        losses.append(loss)
        torch.testing.assert_close(out, trace.tensor("train_outputs")[t], rtol=0, atol=1e-5)
        trace.optimizer.step()
        predictions.append(trace.net(trace.tensor("X_test")).detach())
    suffix = "_f64" if exact else ""
    torch.testing.assert_close(
        torch.stack(losses), trace.tensor("losses" + suffix), rtol=0, atol=TOLERANCE[dtype]
    )
    torch.testing.assert_close(
        torch.stack(predictions), trace.tensor("test_preds" + suffix), rtol=0, atol=TOLERANCE[dtype]
    )
    assert trace.net.rows == [
        len(trace.named("final__")[f"layers.{i}.A"]) for i in range(1, trace.net.L + 2)
    ]
    for name, parameter in trace.net.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), trace.named("final__")[name], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("file", found("trace_*.npz"))
def test_gradients_of_the_first_two_steps(file):
    trace = Trace(file, torch.float32)
    for t in range(2):
        trace.step(t)
        recorded = trace.named(f"grads_step{t}__")
        for name, parameter in trace.net.named_parameters():
            torch.testing.assert_close(
                parameter.grad.as_subclass(torch.Tensor), recorded[name], rtol=0, atol=1e-5
            )
        trace.optimizer.step()


@pytest.mark.parametrize("file", found("lib_*_state_dict.th"))
def test_checkpoint_of_the_original_library(file):
    arrays = dict(np.load(str(file).replace("_state_dict.th", ".npz")))
    state = load(file)
    x, expected = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y_pred"])
    layernorm = bool(arrays["layernorm"])
    built = InfMLP.from_state_dict(state, layernorm=layernorm)
    fresh = InfMLP(
        x.shape[1], expected.shape[1], int(arrays["r"]), int(arrays["L"]), layernorm=layernorm
    )
    fresh.load_state_dict(state, strict=True)
    for net in (built, fresh):
        torch.testing.assert_close(net(x).detach(), expected, rtol=0, atol=1e-5)
        for key, value in arrays.items():
            if key.startswith("param__layers") and not key.endswith("alpha"):
                assert torch.equal(
                    net.state_dict()[key.removeprefix("param__")], torch.from_numpy(value)
                )
    assert (built.L, built.r) == (int(arrays["L"]), int(arrays["r"]))
    if layernorm:
        other = InfMLP.from_state_dict(state, layernorm=False)
        assert not torch.allclose(other(x), expected, atol=1e-3)
