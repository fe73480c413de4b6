"""The verbs of an axis, by their laws, and what they refuse before anything has changed."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pilimit_lib.core import Axis, Blocks

from .things import Hidden, same, state_of

sizes = st.integers(0, 7)


def function(model):
    return model(torch.linspace(-1, 1, 12).reshape(4, 3).to(model.up.weight.dtype))


@given(units=st.integers(1, 9), counts=st.lists(sizes, max_size=4))
def test_append_then_rewind_is_the_identity(units, counts):
    model = Hidden(units)
    before, output = state_of(model), function(model)
    mark = model.axis.mark()
    for count in counts:
        model.axis.append(model.values(count))
    assert model.axis.size == units + sum(counts)
    model.axis.rewind(mark)
    assert same(before, state_of(model)) and torch.equal(output, function(model))


@given(units=st.integers(1, 9), count=sizes)
def test_append_keeps_old_slices_and_adds_the_new_ones_along_each_members_dimension(units, count):
    model = Hidden(units)
    old = {m.label: copy.deepcopy(m.value) for m in model.axis.members}
    values = model.values(count)
    change = model.axis.append(values)
    for member in model.axis.members:
        dense = member.value.dense() if isinstance(member.value, Blocks) else member.value
        start = (
            old[member.label].dense()
            if isinstance(old[member.label], Blocks)
            else old[member.label]
        )
        assert torch.equal(dense, torch.cat([start, values[member.label]], member.dim))
    assert [e.source.tolist() for e in change.edits] == [[*range(units), *[-1] * count]] * 5


@given(st.permutations(range(6)))
def test_a_permutation_keeps_the_function(order):
    model = Hidden(6).double()
    before, output = state_of(model), function(model)
    index = torch.tensor(order)
    model.axis.keep(index)
    torch.testing.assert_close(function(model), output, rtol=0, atol=1e-14)
    model.axis.keep(index.argsort())
    assert same(before, state_of(model))


@given(st.lists(st.booleans(), min_size=6, max_size=6))
def test_a_mask_is_the_same_as_its_positions(mask):
    left = Hidden(6)
    right = copy.deepcopy(left)
    left.axis.keep(torch.tensor(mask))
    right.axis.keep(torch.tensor(mask).nonzero().squeeze(1))
    assert left.axis.size == sum(mask) and same(state_of(left), state_of(right))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_splitting_a_unit_and_its_outgoing_weight_keeps_the_function(index):
    """Duplicates: m copies of a unit, each with 1/m of its outgoing weight, are that unit (units
    left out get weight 0)."""
    model = Hidden(5).double()
    index = torch.cat([torch.arange(5), torch.tensor(index)])
    output = function(model)
    model.axis.keep(index)
    with torch.no_grad():
        model.down.weight /= index.bincount(minlength=5)[index]
    torch.testing.assert_close(function(model), output, rtol=0, atol=1e-13)


@given(first=st.lists(st.integers(-1, 4), max_size=8), data=st.data())
def test_two_edits_are_their_composition(first, data):
    second = data.draw(
        st.lists(st.integers(0, len(first) - 1), max_size=8) if first else st.just([])
    )
    model = Hidden(5)
    twin = copy.deepcopy(model)
    fresh = first.count(-1)
    fill = model.values(fresh)
    model.axis.take(torch.tensor(first, dtype=torch.long), fill)
    model.axis.keep(torch.tensor(second, dtype=torch.long))
    numbered = {
        position: number
        for number, position in enumerate(p for p, s in enumerate(first) if s == -1)
    }
    composed = [first[position] for position in second]
    used = torch.tensor([numbered[p] for p in second if first[p] == -1], dtype=torch.long)
    twin.axis.take(
        torch.tensor(composed, dtype=torch.long),
        {m.label: fill[m.label].index_select(m.dim, used) for m in twin.axis.members},
    )
    assert same(state_of(model), state_of(twin))


def test_take_without_fill_gives_zero_slices():
    model = Hidden(3)
    model.axis.take(torch.tensor([-1, 2, -1]))
    assert (
        not model.up.weight[[0, 2]].any()
        and not model.down.weight[:, [0, 2]].any()
        and not model.usage[[0, 2]].any()
    )
    assert not model.log.dense()[[0, 2]].any() and model.up.weight[1].any()


def test_parameters_are_replaced_and_a_live_graph_stays_usable():
    model = Hidden(3)
    old = model.up.weight
    loss = model(torch.randn(2, 3)).sum()
    change = model.axis.append(model.values(2))
    loss.backward()
    assert old.grad is not None and model.up.weight is not old and model.up.weight.grad is None
    edit = next(e for e in change.edits if e.old is old)
    assert (
        edit.new is model.up.weight
        and edit.module is model.up
        and edit.name == "weight"
        and edit.dim == 0
    )
    assert (
        isinstance(model.up.weight, nn.Parameter)
        and model.up.weight.requires_grad
        and model.up.weight.is_leaf
    )
    assert {name for name, _ in model.named_buffers()} == {"usage"}


def test_gradients_are_rearranged_with_their_parameters():
    model = Hidden(3)
    model(torch.randn(2, 3)).sum().backward()
    grad = model.up.weight.grad.clone()
    model.axis.take(torch.tensor([2, -1, 0]))
    assert torch.equal(model.up.weight.grad, torch.stack([grad[2], torch.zeros(3), grad[0]]))


def test_frozen_parameters_stay_frozen():
    model = Hidden(3)
    model.up.weight.requires_grad_(False)
    model.axis.append(model.values(2))
    assert not model.up.weight.requires_grad and model.up.bias.requires_grad


def test_new_slices_take_the_dtype_of_the_member():
    model = Hidden(3).half()
    model.axis.append({label: value.double() for label, value in model.values(2).items()})
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_values_are_copied_and_leave_the_tape():
    model = Hidden(3)
    values = {label: value.requires_grad_() for label, value in model.values(2).items()}
    model.axis.append(values)
    with torch.no_grad():
        values["bias"].fill_(100)
        values["log"].fill_(100)
    assert (
        model.up.bias.max() < 50
        and model.log.dense().max() < 50
        and not model.log.dense().requires_grad
    )


@pytest.mark.parametrize(
    "twin",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_has_its_own_axis(twin):
    model = Hidden(3)
    other = twin(model)
    assert all(m.module in list(other.modules()) for m in other.axis.members)
    other.axis.append(other.values(4))
    assert (model.axis.size, other.axis.size) == (3, 7)
    function(model), function(other)


def test_conversion_keeps_the_axis_alive():
    model = Hidden(3).double()
    model.axis.append(model.values(2))
    assert function(model).dtype == torch.float64 and model.axis.size == 5


REFUSED = {
    "no such label": (
        lambda m: m.axis.append({**m.values(2), "weight": torch.zeros(2)}),
        KeyError,
        "weight",
    ),
    "a member is missing": (
        lambda m: m.axis.append({k: v for k, v in m.values(2).items() if k != "out"}),
        ValueError,
        "out",
    ),
    "nothing at all": (lambda m: m.axis.append({}), ValueError, "missing"),
    "different lengths": (
        lambda m: m.axis.append({**m.values(2), "bias": torch.zeros(3)}),
        ValueError,
        "lengths",
    ),
    "wrong other dimension": (
        lambda m: m.axis.append({**m.values(2), "in": torch.zeros(2, 4)}),
        ValueError,
        "'in' needs",
    ),
    "too few dimensions": (
        lambda m: m.axis.append({**m.values(2), "out": torch.zeros(2)}),
        ValueError,
        "lengths",
    ),
    "wrong tail of blocks": (
        lambda m: m.axis.append({**m.values(2), "log": torch.zeros(2, 3)}),
        ValueError,
        "'log' needs",
    ),
    "not a tensor": (lambda m: m.axis.append({**m.values(1), "bias": [0.0]}), TypeError, "bias"),
    "position too large": (lambda m: m.axis.keep(torch.tensor([0, 5])), IndexError, "size 5"),
    "negative position": (lambda m: m.axis.keep(torch.tensor([-1])), IndexError, "negative"),
    "mask of another length": (
        lambda m: m.axis.keep(torch.ones(4, dtype=torch.bool)),
        ValueError,
        "mask",
    ),
    "positions of a matrix": (
        lambda m: m.axis.keep(torch.zeros(1, 2, dtype=torch.long)),
        ValueError,
        "vector",
    ),
    "a single position": (lambda m: m.axis.keep(torch.tensor(2)), ValueError, "vector"),
    "fractional positions": (
        lambda m: m.axis.keep(torch.tensor([0.5, 1.0])),
        ValueError,
        "positions",
    ),
    "source out of range": (lambda m: m.axis.take(torch.tensor([-2])), IndexError, "-2"),
    "source of floats": (lambda m: m.axis.take(torch.tensor([1.0])), ValueError, "positions"),
    "fill for an unknown label": (
        lambda m: m.axis.take(torch.tensor([-1]), {"weight": torch.zeros(1)}),
        KeyError,
        "weight",
    ),
    "fill of another length": (
        lambda m: m.axis.take(torch.tensor([-1]), {"bias": torch.zeros(2)}),
        ValueError,
        "'bias' needs",
    ),
    "mark of another axis": (
        lambda m: m.axis.rewind(Axis("rows").join(nn.Linear(1, 1), "bias").mark()),
        ValueError,
        "rows",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_changed(name):
    act, error, message = REFUSED[name]
    model = Hidden(5)
    before, held = state_of(model), [id(p) for p in model.parameters()]
    with pytest.raises(error, match=message) as caught:
        act(model)
    if name != "mark of another axis":
        assert "units" in str(caught.value)
    assert (
        same(before, state_of(model))
        and held == [id(p) for p in model.parameters()]
        and model.axis.size == 5
    )


@pytest.mark.parametrize(
    "reorder",
    [
        lambda m: m.axis.keep(torch.arange(2)),
        lambda m: m.axis.keep(torch.tensor([4, 3, 2, 1, 0])),
        lambda m: m.axis.take(torch.tensor([-1, 0, 1, 2, 3, 4])),
    ],
)
def test_a_mark_ends_when_slices_are_reordered(reorder):
    model = Hidden(5)
    mark = model.axis.mark()
    reorder(model)
    before = state_of(model)
    with pytest.raises(ValueError, match="new mark"):
        model.axis.rewind(mark)
    assert same(before, state_of(model))


def test_marks_nest():
    model = Hidden(2)
    outer = model.axis.mark()
    model.axis.append(model.values(3))
    inner = model.axis.mark()
    model.axis.append(model.values(3))
    model.axis.rewind(inner)
    assert model.axis.size == 5
    model.axis.rewind(outer)
    assert model.axis.size == 2
    with pytest.raises(ValueError, match="new mark"):
        model.axis.rewind(inner)


JOIN_REFUSED = {
    "no attribute": (lambda m: m.axis.join(m, "nothing"), ValueError, "no attribute 'nothing'"),
    "not a tensor": (lambda m: m.axis.join(m, "up"), TypeError, "Linear"),
    "no such dimension": (
        lambda m: m.axis.join(m.down, "weight", dim=2, label="x"),
        ValueError,
        "no dimension 2",
    ),
    "another size": (lambda m: m.axis.join(m.down, "bias", label="x"), ValueError, "size 5"),
    "label taken": (lambda m: m.axis.join(m, "usage"), ValueError, "already"),
    "blocks along another dimension": (
        lambda m: m.axis.join(m, "log", dim=1, label="x"),
        ValueError,
        "dimension 0",
    ),
    "the same tensor twice": (lambda m: m.axis.join(m, "usage", label="x"), ValueError, "'usage'"),
}


@pytest.mark.parametrize("name", JOIN_REFUSED)
def test_join_refuses(name):
    act, error, message = JOIN_REFUSED[name]
    model = Hidden(5)
    with pytest.raises(error, match=message):
        act(model)
    assert [m.label for m in model.axis.members] == ["in", "bias", "out", "usage", "log"]


def test_a_square_weight_cannot_join_along_both_dimensions():
    """One edit replaces a tensor once: a recurrent weight needs one axis per dimension."""
    model = nn.Linear(4, 4)
    axis = Axis("units").join(model, "weight", label="in")
    with pytest.raises(ValueError, match="'in'"):
        axis.join(model, "weight", dim=1, label="out")


def test_two_axes_may_share_a_tensor():
    layer = nn.Linear(3, 4, bias=False)
    rows, columns = (
        Axis("rows").join(layer, "weight"),
        Axis("columns").join(layer, "weight", dim=-1),
    )
    rows.append({"weight": torch.zeros(2, 3)})
    columns.append({"weight": torch.zeros(6, 1)})
    assert layer.weight.shape == (6, 4) and rows.size == 6 and columns.size == 4


def test_an_axis_without_members_says_so():
    with pytest.raises(ValueError, match="join"):
        _ = Axis("rows").size


def test_a_failure_while_building_changes_nothing(monkeypatch):
    """Out of memory, say, at the last of the members."""
    model = Hidden(5)
    before = state_of(model)
    values = model.values(2)

    def fail(self, index):
        raise MemoryError("no memory left")

    monkeypatch.setattr(Blocks, "select", fail)
    with pytest.raises(MemoryError):
        model.axis.take(torch.tensor([0, -1, -1]), values)
    monkeypatch.undo()
    assert same(before, state_of(model))
