"""What every growable thing promises. Inherit `GrowableContract`, fill in `build` and `grow`, and
the tests come with it."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pilimit_lib.core import Change, Growable, follow, load, restore, save, snapshot


class GrowableContract:
    """Laws of a growable module: its function and its training survive copying, saving and
    restoring after it has grown."""

    optimizers: tuple[Callable[..., Optimizer], ...] = (
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
        partial(torch.optim.AdamW, lr=0.01),
    )

    def build(self) -> tuple[nn.Module, Tensor]:
        """A fresh module (same constructor arguments each time) and an input for it."""
        raise NotImplementedError

    def grow(self, model: nn.Module) -> Change | None:
        """Change the shape of `model`; the change, if its optimiser has to follow."""
        raise NotImplementedError

    def grown(self, make_optimizer) -> tuple[nn.Module, Optimizer, Tensor]:
        model, x = self.build()
        optimizer = make_optimizer(model.parameters())
        self.steps(model, optimizer, x, 2)
        change = self.grow(model)
        if change is not None:
            follow(optimizer, change)
        self.steps(model, optimizer, x, 2)
        return model, optimizer, x

    @staticmethod
    def steps(model: nn.Module, optimizer: Optimizer, x: Tensor, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    @staticmethod
    def tensors(model: nn.Module) -> dict[str, Tensor]:
        return {
            name: value.clone()
            for name, value in model.state_dict().items()
            if isinstance(value, Tensor)
        }

    def assert_same(self, left: nn.Module, right: nn.Module, x: Tensor) -> None:
        a, b = self.tensors(left), self.tensors(right)
        assert list(a) == list(b)
        for name in a:
            assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
        assert torch.equal(left(x), right(x))

    def pytest_generate_tests(self, metafunc) -> None:
        if "make_optimizer" in metafunc.fixturenames:
            names = [
                f"{f.func.__name__}{i}" if isinstance(f, partial) else str(i)
                for i, f in enumerate(self.optimizers)
            ]
            metafunc.parametrize("make_optimizer", self.optimizers, ids=names)

    def test_it_grows(self):
        model, _ = self.build()
        before = {name: value.shape for name, value in self.tensors(model).items()}
        self.grow(model)
        assert {name: value.shape for name, value in self.tensors(model).items()} != before

    def test_structure_is_plain(self):
        model, _ = self.build()
        self.grow(model)
        structures = [m.structure() for m in model.modules() if isinstance(m, Growable)]
        assert structures
        assert json.loads(json.dumps(structures)) == structures

    def test_restored_into_a_fresh_model_it_goes_on_bit_for_bit(self, make_optimizer, tmp_path):
        model, optimizer, x = self.grown(make_optimizer)
        save(snapshot(model, optimizer, epoch=3), tmp_path / "c.pt")
        fresh, _ = self.build()
        fresh_optimizer = make_optimizer(fresh.parameters())
        assert restore(fresh, load(tmp_path / "c.pt"), fresh_optimizer) == {"epoch": 3}
        self.assert_same(model, fresh, x)
        for net, opt in ((model, optimizer), (fresh, fresh_optimizer)):
            self.steps(net, opt, x, 3)
        self.assert_same(model, fresh, x)

    def test_restored_into_the_trained_and_regrown_model(self, make_optimizer):
        model, optimizer, x = self.grown(make_optimizer)
        kept = copy.deepcopy(model)
        snap = snapshot(model, optimizer)
        change = self.grow(model)
        if change is not None:
            follow(optimizer, change)
        self.steps(model, optimizer, x, 2)
        restore(model, snap, optimizer)
        self.assert_same(kept, model, x)

    def test_snapshot_owns_its_tensors(self, make_optimizer):
        model, optimizer, x = self.grown(make_optimizer)
        snap = snapshot(model, optimizer)
        before = {
            name: value.clone()
            for name, value in snap["model"].items()
            if isinstance(value, Tensor)
        }
        self.steps(model, optimizer, x, 1)
        assert all(torch.equal(before[name], snap["model"][name]) for name in before)
        for value in before:
            storage = snap["model"][value].untyped_storage().nbytes()
            assert storage == snap["model"][value].numel() * snap["model"][value].element_size()

    def test_deepcopy_is_equal_and_independent(self, make_optimizer):
        model, _, x = self.grown(make_optimizer)
        twin = copy.deepcopy(model)
        self.assert_same(model, twin, x)
        before = self.tensors(model)
        optimizer = make_optimizer(twin.parameters())
        self.steps(twin, optimizer, x, 1)
        change = self.grow(twin)
        if change is not None:
            follow(optimizer, change)
        self.steps(twin, optimizer, x, 1)
        after = self.tensors(model)
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_pickled_whole(self, make_optimizer):
        model, _, x = self.grown(make_optimizer)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
        self.assert_same(model, twin, x)
        self.grow(twin)
        twin(x)

    def test_state_dict_survives_conversion_there_and_back(self, make_optimizer):
        model, _, x = self.grown(make_optimizer)
        expected = model(x)
        model.double()
        assert model(x.double()).dtype == torch.float64
        torch.testing.assert_close(model(x.double()).float(), expected, rtol=1e-4, atol=1e-5)
        model.float()
        assert torch.equal(model(x), expected)
        self.grow(model)
        assert model(x).dtype == torch.float32

    def test_a_failing_restore_changes_nothing(self, make_optimizer):
        model, optimizer, x = self.grown(make_optimizer)
        other, _ = self.build()
        other_optimizer = make_optimizer(other.parameters())
        snap = snapshot(model, optimizer)
        name = next(name for name, value in snap["model"].items() if isinstance(value, Tensor))
        snap["model"][name + "_of_another_model"] = snap["model"].pop(name)
        before, reference = self.tensors(other), copy.deepcopy(other)
        with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
            restore(other, snap, other_optimizer)
        after = self.tensors(other)
        assert list(before) == list(after) and all(
            torch.equal(before[key], after[key]) for key in before
        )
        self.assert_same(other, reference, x)
        self.steps(other, other_optimizer, x, 1)
        self.steps(reference, make_optimizer(reference.parameters()), x, 1)
        self.assert_same(other, reference, x)
