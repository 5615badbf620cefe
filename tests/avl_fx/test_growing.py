"""Caches that grow in place: whatever a user does with their tensors, each shows what `cat` would have given."""

import copy
import threading

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_fx import growing
from avl_fx.growing import claim, longer, reserve


def rows(count: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, count, 4, generator=torch.Generator().manual_seed(seed))


def appended(view: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """What a graph call does: claim, store behind the end, take the longer view."""
    claimed = claim(view)
    longest = claimed.as_strided((*claimed.shape[:2], claimed.shape[2] + 1, claimed.shape[3]), claimed.stride())
    longest[:, :, -1:] = row
    return longer(claimed)


def test_reserve_copies_and_leaves_room():
    source = rows()
    view = reserve(source)
    assert torch.equal(view, source)
    assert view.data_ptr() != source.data_ptr()
    assert view.stride(1) // view.stride(2) >= 5 + growing.SPARE_ROWS
    assert claim(view) is view


def test_rows_are_stored_without_a_copy():
    view = reserve(rows())
    address, expected = view.data_ptr(), rows()
    for step in range(50):
        view, expected = appended(view, rows(1, step)), torch.cat([expected, rows(1, step)], 2)
        assert view.data_ptr() == address
        assert torch.equal(view, expected)


def test_a_full_buffer_is_replaced_before_its_last_row_is_needed(monkeypatch):
    monkeypatch.setattr(growing, "SPARE_ROWS", 1)
    view, expected, addresses = reserve(rows()), rows(), set()
    for step in range(300):
        view, expected = appended(view, rows(1, step)), torch.cat([expected, rows(1, step)], 2)
        addresses.add(view.untyped_storage().data_ptr())
        assert view.shape[2] < view.stride(1) // view.stride(2)
        assert torch.equal(view, expected)
    assert len(addresses) > 2


def test_rows_that_somebody_sees_are_never_written():
    first = reserve(rows())
    second = appended(first, rows(1, 1))
    other = appended(first, rows(1, 2))  # the same point, continued twice
    assert torch.equal(first, rows())
    assert torch.equal(second, torch.cat([rows(), rows(1, 1)], 2))
    assert torch.equal(other, torch.cat([rows(), rows(1, 2)], 2))


def test_a_cropped_cache_is_copied_with_its_strides():
    """Also where a buffer for so few rows would be smaller: the graph was compiled for these strides."""
    view = appended(reserve(rows(70)), rows(1, 1))
    cropped = view[:, :, :3]
    grown = appended(cropped, rows(1, 2))
    assert reserve(cropped).stride() != view.stride()
    assert grown.stride() == view.stride()
    assert torch.equal(grown, torch.cat([rows(70)[:, :, :3], rows(1, 2)], 2))
    assert torch.equal(view, torch.cat([rows(70), rows(1, 1)], 2))


def test_a_view_whose_memory_was_exchanged_has_no_room_there():
    """Offloading assigns to `tensor.data`; the attribute stays, the memory is somebody else's."""
    other = reserve(rows(seed=1))
    shown = appended(other, rows(1, 2))
    view = reserve(rows())
    view.data = other.data
    assert torch.equal(appended(view, rows(1, 3)), torch.cat([rows(seed=1), rows(1, 3)], 2))
    assert torch.equal(shown, torch.cat([rows(seed=1), rows(1, 2)], 2))


def test_a_deep_copy_has_a_buffer_of_its_own():
    view = reserve(rows())
    other = copy.deepcopy(view)
    mine, theirs = appended(view, rows(1, 1)), appended(other, rows(1, 2))
    assert torch.equal(mine, torch.cat([rows(), rows(1, 1)], 2))
    assert torch.equal(theirs, torch.cat([rows(), rows(1, 2)], 2))


def test_only_one_of_many_threads_gets_the_room():
    view = reserve(rows())
    got, start = [], threading.Barrier(8)

    def run() -> None:
        start.wait()
        got.append(claim(view))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(claimed is view for claimed in got) == 1
    assert len({claimed.untyped_storage().data_ptr() for claimed in got}) == 8


def test_a_call_that_failed_leaves_the_cache_usable():
    view = reserve(rows())
    claim(view)  # the call that claimed it raised
    assert torch.equal(appended(view, rows(1, 1)), torch.cat([rows(), rows(1, 1)], 2))


ACTIONS = ("append", "append", "append", "crop", "fork", "select", "deepcopy", "touch")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 10_000)), max_size=40))
def test_any_use_shows_what_cat_would_have_given(actions):
    """Several caches at once, each a pair of what we keep and what it should be; all compared after every action."""
    spare, growing.SPARE_ROWS = growing.SPARE_ROWS, 2
    try:
        caches = [(reserve(rows()), rows())]
        for number, (action, chance) in enumerate(actions):
            index = chance % len(caches)
            view, expected = caches[index]
            if action == "append":
                row = rows(1, number)
                caches[index] = appended(view, row), torch.cat([expected, row], 2)
            elif action == "crop" and view.shape[2] > 1:
                keep = 1 + chance % (view.shape[2] - 1)
                caches[index] = view[:, :, :keep], expected[:, :, :keep]
            elif action == "fork":
                caches.append((view, expected))
            elif action == "select":  # such a cache meets another graph, whose result gets room again
                caches[index] = reserve(view.index_select(0, torch.tensor([1, 1]))), expected[[1, 1]]
            elif action == "deepcopy":
                caches.append((copy.deepcopy(view), expected))
            elif action == "touch":  # a write by the user shows in every view of the same memory, as without us
                shown = [i for i, (v, _) in enumerate(caches) if v.data_ptr() == view.data_ptr()]
                view[0, 0, 0, 0] = number
                for i in shown:
                    caches[i] = caches[i][0], caches[i][1].clone()
                    caches[i][1][0, 0, 0, 0] = number
            for kept, wanted in caches:
                assert torch.equal(kept, wanted)
    finally:
        growing.SPARE_ROWS = spare
