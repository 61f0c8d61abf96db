"""The memory in which ncnn computes: nothing lies in two places at once, and what is free is used first."""

from __future__ import annotations

import ctypes
import gc
import mmap
import weakref
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.networks import pool
from worker.networks.pool import Pool

pytest.importorskip("ncnn")


def address(capsule: Any) -> int:
    return int(pool._address_in(capsule, None))


# Not `st.floats`: torch has the process take subnormal numbers for 0, which Hypothesis objects to.
@given(st.lists(st.one_of(st.integers(1, 5000), st.integers(0, 999).map(lambda each: each / 1000)), max_size=60))
def test_what_is_in_use_never_overlaps_and_nothing_is_lost(steps: list[int | float]) -> None:
    """A whole number asks for so many bytes; a fraction frees the block at that place among those in use."""
    made, blocks = Pool(), list[tuple[Any, int]]()
    most = 0
    for step in steps:
        if isinstance(step, int):
            capsule = made.fastMalloc(step)
            begins = address(capsule)
            assert begins % 64 == 0
            assert all(begins + step <= address(other) or address(other) + size <= begins for other, size in blocks)
            ctypes.memset(begins, len(blocks) % 256, step)
            blocks.append((capsule, step))
        elif blocks:
            made.fastFree(blocks.pop(int(step * len(blocks)))[0])
        most = max(most, made.in_use_bytes)
        assert made.held_bytes >= made.in_use_bytes >= sum(size for _, size in blocks)
    assert made.most_held_bytes >= most
    for capsule, _ in blocks:
        made.fastFree(capsule)
    made.clear()
    assert (made.in_use_bytes, made.held_bytes) == (0, 0)


def test_a_blob_lies_in_the_lowest_place_where_it_fits() -> None:
    made = Pool()
    low, middle, high = (made.fastMalloc(size) for size in (1000, 2000, 3000))
    made.fastFree(low)
    held = made.held_bytes
    assert address(made.fastMalloc(1500)) > address(high), "the place of the lowest is too small"
    assert made.held_bytes > held
    made.fastFree(middle)
    # The two that were freed are one place now.
    assert address(made.fastMalloc(2900)) == address(low)


def test_pages_that_are_given_back_are_no_memory_and_can_be_used_again() -> None:
    made = Pool()
    small, large = made.fastMalloc(100), made.fastMalloc(40 * mmap.PAGESIZE)
    where = address(large)
    ctypes.memset(address(small), 7, 100)
    ctypes.memset(where, 7, 40 * mmap.PAGESIZE)
    made.fastFree(large)
    made.clear()
    assert made.held_bytes == made.in_use_bytes
    assert ctypes.string_at(address(small), 100) == b"\7" * 100
    again = made.fastMalloc(40 * mmap.PAGESIZE)
    assert address(again) == where
    # All but the page at each end came fresh from the system.
    assert ctypes.string_at(where + mmap.PAGESIZE, 38 * mmap.PAGESIZE) == bytes(38 * mmap.PAGESIZE)


def test_what_is_larger_than_a_segment_has_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SEGMENT_BYTES", 10_000)
    made = Pool()
    blocks = [made.fastMalloc(size) for size in (6_000, 6_000, 50_000)]
    assert len({address(block) for block in blocks}) == 3
    for block in blocks:
        ctypes.memset(address(block), 1, 6_000)


def test_where_there_is_no_memory_ncnn_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(pool.mmap, "mmap", none)
    assert Pool().fastMalloc(1) is None


def test_a_pool_stays_as_long_as_what_it_has_allocated() -> None:
    made = Pool()
    there = weakref.ref(made)
    block = made.fastMalloc(100)
    del made
    gc.collect()
    left = there()
    assert left is not None
    left.fastFree(block)
    del left
    gc.collect()
    assert there() is None


def test_garbage_that_is_collected_in_the_midst_of_a_change_waits_for_its_end() -> None:
    made = Pool()
    first, second = made.fastMalloc(100), made.fastMalloc(100)
    with made._lock:
        made.fastFree(first)
        held = made.in_use_bytes
    made.fastFree(second)
    assert (held, made.in_use_bytes) == (384, 0)
    assert address(made.fastMalloc(100)) == address(first)
