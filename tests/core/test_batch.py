"""Who is in the batch, and where that is visible."""

import asyncio
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pilimit_lib.core import batch, current_ids


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_ids_are_visible_inside_and_gone_outside(ids):
    assert current_ids() is None
    with batch(ids) as given_ids:
        assert current_ids().tolist() == ids == given_ids.tolist()
        assert current_ids().dtype == torch.long and current_ids(len(ids)) is not None
    assert current_ids() is None


def test_batches_nest_and_errors_end_them():
    with batch([1]):
        with pytest.raises(ZeroDivisionError), batch([2, 3]):
            assert current_ids().tolist() == [2, 3]
            raise ZeroDivisionError
        assert current_ids().tolist() == [1]
    assert current_ids() is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype(dtype):
    with batch(torch.tensor([1, 2], dtype=dtype)):
        assert current_ids().dtype == torch.long


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.ones(2), "integers"),
        (torch.ones(2, 2, dtype=torch.long), r"\[2, 2\]"),
        (torch.tensor(1), "vector"),
        ([True], "integers"),
        ([-1], "negative"),
        ([3, -7], "-7"),
    ],
)
def test_what_is_not_a_list_of_ids(ids, message):
    with pytest.raises(ValueError, match=message), batch(ids):
        pass
    assert current_ids() is None


def test_an_empty_batch_has_no_ids():
    with batch([]):
        assert current_ids(0).tolist() == []


def test_a_batch_of_another_size_is_an_error():
    with batch([1, 2]), pytest.raises(ValueError, match="3 samples .* names 2"):
        current_ids(3)


def test_threads_do_not_see_each_others_batch():
    seen = []
    with batch([1, 2]):
        thread = threading.Thread(target=lambda: seen.append(current_ids()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_tasks_do_not_see_each_others_batch():
    async def task(number):
        with batch([number]):
            await asyncio.sleep(0)
            return current_ids().tolist()

    async def both():
        return await asyncio.gather(task(1), task(2))

    assert asyncio.run(both()) == [[1], [2]]


def test_none_suspends_a_surrounding_batch():
    with batch([3, 4]):
        with batch(None) as inner:
            assert inner is None and current_ids(7) is None
        assert current_ids().tolist() == [3, 4]
