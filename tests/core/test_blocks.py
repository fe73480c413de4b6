"""Blocks against the dense tensor that they stand for."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pilimit_lib.core import Blocks


class Machine(RuleBasedStateMachine):
    """Any sequence of edits does to blocks of three rows what it does to one tensor."""

    def __init__(self):
        super().__init__()
        self.blocks, self.dense = Blocks((2,), block_rows=3), torch.zeros(0, 2)

    @rule(count=st.integers(0, 8))
    def append(self, count):
        values = torch.randn(count, 2)
        self.blocks.append(values)
        self.dense = torch.cat([self.dense, values])

    @rule(data=st.data())
    def truncate(self, data):
        rows = data.draw(st.integers(0, len(self.dense)))
        self.blocks.truncate(rows)
        self.dense = self.dense[:rows]

    @rule(data=st.data())
    def keep(self, data):
        index = data.draw(
            st.lists(st.integers(0, len(self.dense) - 1), max_size=9)
            if len(self.dense)
            else st.just([])
        )
        index = torch.tensor(index, dtype=torch.long)
        self.blocks.keep(index)
        self.dense = self.dense[index]

    @rule(factor=st.sampled_from([0.0, 0.5, 1.0, -2.0, 2.0**-30]))
    def scale(self, factor):
        self.blocks.scale_(factor)
        self.dense = self.dense * factor

    @rule(alpha=st.sampled_from([1.0, -0.5]))
    def add(self, alpha):
        values = torch.randn_like(self.dense)
        self.blocks.add_(values, alpha=alpha)
        self.dense = self.dense.add(values, alpha=alpha)

    @rule(data=st.data())
    def put(self, data):
        position = data.draw(
            st.lists(st.integers(0, len(self.dense) - 1), unique=True)
            if len(self.dense)
            else st.just([])
        )
        position = torch.tensor(position, dtype=torch.long)
        values = torch.randn(len(position), 2)
        self.blocks.put(position, values)
        self.dense = self.dense.index_put((position,), values)

    @rule()
    def reload(self):
        state, twin = self.blocks.state(), Blocks((2,), block_rows=3)
        twin.load_state(state)
        self.blocks = twin

    @rule()
    def write(self):
        self.dense = torch.randn_like(self.dense)
        self.blocks.write(self.dense)

    @rule(count=st.integers(0, 8))
    def set(self, count):
        self.dense = torch.randn(count, 2)
        self.blocks.set(self.dense)

    @rule(twin=st.sampled_from([copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))]))
    def replaced_by_its_copy(self, twin):
        old, self.blocks = self.blocks, twin(self.blocks)
        old.add_(torch.ones(old.shape))

    @invariant()
    def equal(self):
        assert torch.equal(self.blocks.dense(), self.dense)
        assert self.blocks.shape == self.dense.shape and len(self.blocks) == len(self.dense)
        assert [len(view) for view in self.blocks.views()] == [
            len(part) for part in self.dense.split(3) if len(part)
        ]


TestMachine = Machine.TestCase


@given(rows=st.integers(0, 10), shown=st.integers(0, 10))
def test_views_of_the_first_rows(rows, shown):
    values = torch.randn(rows, 2)
    blocks = Blocks.of(values, block_rows=3)
    assert torch.equal(
        torch.cat([torch.zeros(0, 2), *blocks.views(min(rows, shown))]), values[: min(rows, shown)]
    )


def test_appending_leaves_old_rows_where_they_are():
    blocks = Blocks.of(torch.randn(4, 2), block_rows=3)
    before = [view.data_ptr() for view in blocks.views()]
    blocks.append(torch.randn(7, 2))
    assert [view.data_ptr() for view in blocks.views()][:2] == before


def test_only_changes_of_existing_rows_count_as_edits():
    blocks = Blocks.of(torch.randn(4), block_rows=3)
    start = blocks.edits
    blocks.append(torch.randn(3))
    blocks.scale_(1)
    assert blocks.edits == start
    for act in (
        lambda: blocks.scale_(0.5),
        lambda: blocks.add_(torch.ones(7)),
        lambda: blocks.truncate(5),
        lambda: blocks.write(torch.ones(5)),
        lambda: blocks.keep(torch.tensor([1])),
        lambda: blocks.set(torch.ones(2)),
    ):
        act()
        start += 1
        assert blocks.edits == start


def test_conversion_of_dtype():
    blocks = Blocks.of(torch.randn(4, 2), block_rows=3)
    values = blocks.dense()
    blocks.convert(torch.Tensor.half)
    assert blocks.dtype == torch.float16 and torch.equal(blocks.dense(), values.half())
    blocks.append(torch.ones(1, 2, dtype=torch.float64))
    assert blocks.dense().dtype == torch.float16
    blocks.convert(torch.Tensor.double, keep_dtype=True)
    assert blocks.dtype == torch.float16


def test_values_on_the_tape_are_copied_off_it():
    source = torch.randn(4, 2, requires_grad=True)
    blocks = Blocks.of(source, block_rows=3)
    blocks.append(source)
    blocks.write(torch.cat([source, source]))
    blocks.add_(torch.cat([source, source]))
    assert not blocks.dense().requires_grad


REFUSED = {
    "append another tail": (lambda b: b.append(torch.ones(2, 3)), ValueError, r"\[k, 2\]"),
    "append a vector": (lambda b: b.append(torch.ones(2)), ValueError, r"\[k, 2\]"),
    "set another tail": (lambda b: b.set(torch.ones(2, 3)), ValueError, r"\[k, 2\]"),
    "write another length": (lambda b: b.write(torch.ones(4, 2)), ValueError, r"\[5, 2\]"),
    "add another length": (lambda b: b.add_(torch.ones(4, 2)), ValueError, r"\[5, 2\]"),
    "truncate to more": (lambda b: b.truncate(6), ValueError, "6 rows of 5"),
    "truncate to fewer than none": (lambda b: b.truncate(-1), ValueError, "-1 rows of 5"),
    "keep beyond the end": (lambda b: b.keep(torch.tensor([0, 5])), IndexError, "0 to 5 .* 5 rows"),
    "keep a negative position": (lambda b: b.keep(torch.tensor([-1])), IndexError, "-1"),
    "put beyond the end": (
        lambda b: b.put(torch.tensor([5]), torch.ones(1, 2)),
        IndexError,
        "5 rows",
    ),
    "put another number": (
        lambda b: b.put(torch.tensor([1, 2]), torch.ones(1, 2)),
        ValueError,
        "1 rows .* 2 positions",
    ),
    "put another tail": (
        lambda b: b.put(torch.tensor([1]), torch.ones(1, 3)),
        ValueError,
        r"\[k, 2\]",
    ),
    "select beyond the end": (lambda b: b.select(torch.tensor([7])), IndexError, "7"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_changed(name):
    act, error, message = REFUSED[name]
    blocks = Blocks.of(torch.randn(5, 2), block_rows=3)
    before, edits = blocks.dense(), blocks.edits
    with pytest.raises(error, match=message):
        act(blocks)
    assert torch.equal(before, blocks.dense()) and blocks.edits == edits


def test_scaling_does_not_touch_rows_and_what_is_loaded_goes_on_alike():
    values = torch.randn(7, 2)
    blocks = Blocks.of(values, block_rows=3)
    for _ in range(10):
        blocks.scale_(0.9)
    assert torch.equal(torch.cat([part.values for part in blocks.parts()]), values)
    torch.testing.assert_close(blocks.dense(), values * 0.9**10)
    twin, rounded = Blocks((2,), block_rows=3), Blocks.of(blocks.dense(), block_rows=3)
    twin.load_state(blocks.state())
    for held in (blocks, twin, rounded):
        held.append(torch.ones(1, 2))
        held.scale_(0.7)
    assert (
        torch.equal(twin.dense(), blocks.dense())
        and blocks.dense()[-1].tolist() == [pytest.approx(0.7)] * 2
    )
    assert not torch.equal(rounded.dense(), blocks.dense()), "else the factors need not be kept"


def test_a_state_whose_rows_were_edited_counts_as_edited():
    blocks = Blocks.of(torch.randn(7, 2), block_rows=3)
    blocks.scale_(0.9)
    state = blocks.state()
    state[""][0] = 5.0
    twin = Blocks((2,), block_rows=3)
    twin.load_state(state)
    assert torch.equal(twin.dense(), state[""])


def test_blocks_need_a_row():
    with pytest.raises(ValueError, match="block_rows is 0"):
        Blocks(block_rows=0)
