"""Attempts side by side in one process: whose turn it is at a device's networks, and which are finished beside them."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from shared.telemetry import log
from worker.codec import Samples
from worker.outcomes import Outcome

LAST_FIRST_SECONDS = 0.25
"""So long what is done beside a network waits for the attempt before it to be finished: encoding it may take longer."""

AFTER_NETWORK = ("encode", "store")
"""Phases that an attempt does not need the network for any more."""


class Turn:
    """An attempt's turn at its device's networks, for which there are slots: one, or some on a GPU.

    A context manager: at its end the turn is over in any case.
    """

    def __init__(self, network: threading.Semaphore) -> None:
        self.over: Future[None] = Future()
        """Has a result when the attempt needs its slot no more."""
        self._network = network
        self._has_it = False

    def begins(self, phase: str) -> None:
        """Takes a slot, or lets go of it, as the phase of the attempt says."""
        if phase == "upscale" and not self._has_it:
            # Taken once more by a result that has to be made again.
            self._has_it = self._network.acquire()
        elif phase in AFTER_NETWORK:
            self._let_go()

    def _let_go(self) -> None:
        if self._has_it:
            self._has_it = False
            self._network.release()
        if not self.over.done():
            self.over.set_result(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go()


class LastFirst:
    """An Onlooker (`worker.enlarging`) that has the others wait while the attempt before this one is finished: a
    customer waits for that one, and nobody yet for what is done beside the network of this one."""

    def __init__(self, finishing: Callable[[], Sequence[Future[Outcome]]]) -> None:
        """`finishing`: the attempts that need no network any more."""
        self._finishing = finishing

    def begins(self, input_rgb: Samples, width: int, height: int, rows: range | None = None) -> None:  # noqa: ARG002
        if finishing := self._finishing():
            wait(finishing, LAST_FIRST_SECONDS)

    def made(self, rows: Samples) -> None:
        """Nothing to see here."""


@dataclass(frozen=True)
class _UnderWay:
    """An attempt that a thread of the pool makes."""

    device: str
    turn: Turn
    outcome: Future[Outcome]


class Turns:
    """The turns of all attempts of one process. Of one executor, whose caller alone begins attempts."""

    def __init__(self, slots: Mapping[str, int]) -> None:
        """`slots`: how many attempts may have the networks of a device at once."""
        self._slots = slots
        self._networks = {device: threading.Semaphore(number) for device, number in slots.items()}
        # One beside those that have a network.
        self._most_under_way = 1 + max(slots.values())
        self._attempts = ThreadPoolExecutor(self._most_under_way, "attempt")
        self._under_way: list[_UnderWay] = []

    def turn(self, device: str) -> Turn:
        """For an attempt that the caller makes itself."""
        return Turn(self._networks[device])

    def begin(self, device: str, attempt: Callable[[Turn], Outcome]) -> None:
        """Makes the attempt in a thread. There must be room for it."""
        turn = self.turn(device)
        context = contextvars.copy_context()
        outcome = self._attempts.submit(context.run, attempt, turn)
        outcome.add_done_callback(_log_unforeseen)
        self._under_way.append(_UnderWay(device, turn, outcome))

    def wait_for_room(self, device: str) -> None:
        """Returns when the device has a slot, and the pool a thread, for the next attempt.

        Nor do attempts at another device's jobs begin meanwhile: while the CPU works, in a process that has a GPU too,
        nobody else takes a job.
        """
        while True:
            self._under_way = [each for each in self._under_way if not each.outcome.done()]
            turns = [each.turn.over for each in self._under_way if not each.turn.over.done() and each.device == device]
            if len(turns) >= self._slots[device]:
                wait(turns, return_when=FIRST_COMPLETED)
            elif len(self._under_way) >= self._most_under_way:
                # The oldest, or storage that hangs would pile up results in memory.
                wait([next(each.outcome for each in self._under_way if each.turn.over.done())])
            else:
                return

    def wait_for_all(self) -> None:
        """Returns when every attempt that was begun has ended."""
        wait([each.outcome for each in self._under_way])

    def finishing(self) -> list[Future[Outcome]]:
        """The attempts that need no network any more."""
        return [each.outcome for each in list(self._under_way) if each.turn.over.done()]

    def close(self) -> None:
        """Waits for every attempt, and ends the threads."""
        self._attempts.shutdown()


def _log_unforeseen(attempt: Future[Outcome]) -> None:
    """Nobody asks for what an attempt has come to that is finished beside another."""
    if error := attempt.exception():
        log.error("job.attempt_unforeseen", error=f"{type(error).__name__}: {error}", exc_info=error)
