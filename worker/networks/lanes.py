"""Threads that work off tasks, of which some need what others make."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

Made = TypeVar("Made")


@dataclass(frozen=True)
class _Task:
    work: Callable[[], Any]
    after: Sequence[Future[Any]]
    behind: weakref.ref[Future[Any]] | None
    """Weak, lest what was made stays for longer than somebody wants it."""
    made: Future[Any]

    @property
    def may_begin(self) -> bool:
        # The lanes hold one that has not begun.
        behind = None if self.behind is None else self.behind()
        begun = behind is None or behind.running() or behind.done()
        return begun and all(each.done() for each in self.after)


class Lanes:
    """`count` threads; each takes the earliest task that may begin. A task may wait for one that has begun before it,
    and none ever waits for one that has not: some lane always gets on.

    To be closed: the threads stay until then.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.is_closed = False
        self._waiting: list[_Task] = []
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def add(
        self, work: Callable[[], Made], *, after: Sequence[Future[Any]] = (), behind: Future[Any] | None = None
    ) -> Future[Made]:
        """Begins when all of `after` are finished, well or not, and `behind` has begun. What `work` raises is the
        Future's. Of one not begun when the lanes are closed the Future is cancelled."""
        made: Future[Made] = Future()
        with self._changed:
            if not self._threads:
                # Daemons: who never closes its lanes can still end.
                self._threads = [
                    threading.Thread(target=self._run, name=f"lane-{number}", daemon=True)
                    for number in range(self.count)
                ]
                for thread in self._threads:
                    thread.start()
            self._waiting.append(_Task(work, after, None if behind is None else weakref.ref(behind), made))
            self._changed.notify()
        return made

    def close(self) -> None:
        """Begins nothing more, and waits for what has begun; long work looks at `is_closed`."""
        with self._changed:
            self.is_closed = True
            for task in self._waiting:
                task.made.cancel()
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (task := self._next()) is not None:
            try:
                made = task.work()
            except BaseException as error:  # noqa: BLE001 - whoever asks for what was made is told
                task.made.set_exception(error)
            else:
                task.made.set_result(made)
                del made
            # Nothing is held for as long as there is nothing to do.
            del task
            with self._changed:
                self._changed.notify_all()

    def _next(self) -> _Task | None:
        with self._changed:
            while not self.is_closed:
                for index, task in enumerate(self._waiting):
                    if task.may_begin:
                        del self._waiting[index]
                        task.made.set_running_or_notify_cancel()
                        # Another may now begin behind it.
                        self._changed.notify_all()
                        return task
                self._changed.wait()
        return None
