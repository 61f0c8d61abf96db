"""The picture of the job that probably comes next, fetched and decoded while the network is busy with another.

Nothing is claimed, nothing written: it is a guess about the queue. Where it comes true, an attempt finds its picture
ready; where another job comes, the picture is dropped; whatever goes wrong here happens again in the attempt it belongs
to, which knows what to do about it.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, cast

from shared.errors import EnlargerError
from shared.models import Job
from shared.pictures import PictureFacts
from shared.storage import Storage
from shared.telemetry import log
from worker.codec import Samples
from worker.codec.decode import Picture
from worker.codec.sandboxed import Sandboxed

MOST_PX = 12_000_000
"""Of a picture that is decoded ahead: of a larger one the network takes minutes and decoding a second, and both at once
would take the memory of both."""
LAST_WAIT_SECONDS = 5.0


@dataclass(frozen=True, eq=False)
class _Ready:
    source: BinaryIO
    facts: PictureFacts
    picture: Picture


class _Look:
    """One look at the queue, and what it has come to so far."""

    def __init__(self) -> None:
        self.job_id: str | None = None
        self.ready: _Ready | None = None
        self.is_dropped = False
        self.lock, self.ended = threading.Lock(), threading.Event()


class Ahead:
    """A Decoder that may know the picture already, and an Onlooker: when a network begins, it looks for the next job.

    Of one executor, whose attempts call everything. What it holds is dropped at the next `take`, whatever that is for.
    """

    def __init__(self, decoder: Sandboxed, storage: Storage, next_job: Callable[[], Job | None]) -> None:
        """`next_job` asks the queue; it may raise an EnlargerError."""
        self._decoder, self._storage, self._next_job = decoder, storage, next_job
        self._lock = threading.Lock()
        self._look: _Look | None = None
        self._taken: list[_Ready] = []
        """What attempts have taken and not decoded yet."""

    def begins(self, input_rgb: Samples, width: int, height: int, rows: range | None = None) -> None:  # noqa: ARG002
        """The network begins: looks for the next job's picture, by a thread of its own."""
        with self._lock:
            # A result that is made again finds the look under way, and so may one that is made beside another.
            if self._look is None:
                self._look = _Look()
                threading.Thread(target=self._run, args=(self._look,), name="ahead", daemon=True).start()

    def made(self, rows: Samples) -> None:
        """Nothing to see here."""

    def take(self, job_id: str) -> BinaryIO | None:
        """The job's input, fetched, where it is the one that was looked for; else None. The caller's to close; `decode`
        answers for it at once."""
        with self._lock:
            look, self._look = self._look, None
        if look is None:
            return None
        if look.job_id in (None, job_id):
            # Half way there is nearer than the start.
            look.ended.wait(LAST_WAIT_SECONDS)
        with look.lock:
            look.is_dropped = True
            ready = look.ready
        if ready is None:
            return None
        if look.job_id != job_id:
            ready.source.close()
            return None
        with self._lock:
            # An attempt that ends before it decodes closes its file.
            self._taken = [*(each for each in self._taken if not each.source.closed), ready]
        return ready.source

    def inspect(self, file: BinaryIO) -> PictureFacts:
        """As `Sandboxed.inspect`."""
        taken = next((each for each in self._taken if each.source is file), None)
        return self._decoder.inspect(file) if taken is None else taken.facts

    def decode(self, file: BinaryIO, facts: PictureFacts) -> Picture:
        """As `Sandboxed.decode`. What is known is given away once."""
        with self._lock:
            taken = next((each for each in self._taken if each.source is file), None)
            self._taken = [each for each in self._taken if each is not taken]
        return self._decoder.decode(file, facts) if taken is None else taken.picture

    def _run(self, look: _Look) -> None:
        try:
            job = self._next_job()
            if job is not None and job.input_width * job.input_height <= MOST_PX:
                look.job_id = job.id
                self._prepare(look, job)
        except (EnlargerError, OSError, MemoryError) as error:
            # It is the attempt's to fail of it.
            log.info("job.not_ahead", error=f"{type(error).__name__}: {error}")
        finally:
            look.ended.set()

    def _prepare(self, look: _Look, job: Job) -> None:
        with contextlib.ExitStack() as closing:
            # Without a name: nothing is left of it, however this process ends.
            source = cast(BinaryIO, closing.enter_context(tempfile.TemporaryFile()))
            self._storage.get(job.input_key, source)
            facts = self._decoder.inspect(source)
            if facts.pixels > MOST_PX or look.is_dropped:
                return
            ready = _Ready(source, facts, self._decoder.decode(source, facts))
            with look.lock:
                if not look.is_dropped:
                    look.ready = ready
                    closing.pop_all()
