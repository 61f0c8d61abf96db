"""Tasks in lanes: those that need others come after them, and whoever stops leaves nobody waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import wait_until
from worker.networks.lanes import Lanes

SECONDS = 20


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    made = Lanes(2)
    yield made
    made.close()


@given(
    count=st.integers(1, 4),
    needs=st.lists(st.lists(st.integers(0, 30), max_size=3), max_size=30),
    lag=st.integers(0, 2),
)
def test_every_task_is_done_once_and_after_what_it_needs(count: int, needs: list[list[int]], lag: int) -> None:
    """Each needs some before it whole, and waits in its midst for the one `lag` before it, behind which it is."""
    lanes, done, midst = Lanes(count), list[int](), [threading.Event() for _ in needs]
    made: list[Future[int]] = []
    for number, each in enumerate(needs):
        wanted = [need % number for need in each] if number else []

        def work(number: int = number, wanted: list[int] = wanted) -> int:
            assert set(wanted) <= set(done)
            midst[number].set()
            if lag and number >= lag:
                assert midst[number - lag].wait(SECONDS)
            done.append(number)
            return number

        behind = made[number - lag] if lag and number >= lag else None
        made.append(lanes.add(work, after=[made[need] for need in wanted], behind=behind))
    assert [each.result(SECONDS) for each in made] == list(range(len(needs)))
    lanes.close()
    assert sorted(done) == list(range(len(needs)))


def test_two_tasks_are_under_way_at_once(lanes: Lanes) -> None:
    meet = threading.Barrier(2)
    for each in [lanes.add(lambda: meet.wait(SECONDS)) for _ in range(2)]:
        each.result(SECONDS)


def test_what_a_task_raises_is_its_own_and_who_needs_it_is_told(lanes: Lanes) -> None:
    def fail() -> None:
        raise ValueError("no good")

    failed = lanes.add(fail)
    needs = lanes.add(lambda: failed.result(), after=[failed])
    other = lanes.add(lambda: 7)
    assert other.result(SECONDS) == 7
    for each in (failed, needs):
        with pytest.raises(ValueError, match="no good"):
            each.result(SECONDS)


def test_closing_waits_for_what_has_begun_and_begins_nothing_more() -> None:
    lanes, go = Lanes(1), threading.Event()
    begun = lanes.add(lambda: go.wait(SECONDS))
    never = lanes.add(lambda: 1)
    wait_until(begun.running, seconds=SECONDS, what="the first task")
    closing = threading.Thread(target=lanes.close)
    closing.start()
    wait_until(lambda: lanes.is_closed, seconds=SECONDS, what="the closing")
    assert closing.is_alive()
    go.set()
    closing.join(SECONDS)
    assert begun.result(0)
    with pytest.raises(CancelledError):
        never.result(0)
    assert not [each for each in threading.enumerate() if each in lanes._threads]
