"""What keeps an attempt alive while it makes progress, and what must end it: cancel, stop, deadline, a lost lease.

Progress is told and the lease renewed in one UPDATE. A job that many workers share has lines of its own: the attempt's
renews its shard's lease too and tells how far all have come; a helper's knows its shards and nothing else of the job.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from shared import jobs, shards
from shared.db import Database, clock
from shared.errors import DatabaseUnavailable, DeadlineExceeded, StaleAttempt
from shared.jobs import Claim
from shared.settings import Settings
from shared.shards import ShardClaim, Standing
from shared.telemetry import log
from worker.enlarging import Progress
from worker.outcomes import CancelSeen, StopSeen
from worker.trace import Trace

PROGRESS_SECONDS = 0.5
"""Progress is written at most this late after a tile that made some ..."""
BAND_SECONDS = 0.1
"""... and at a band's end, but no oftener than this: small bands take milliseconds."""

TRACE_SECONDS = 5.0
"""So often the trace of a running attempt is written beside its progress."""

FINISH_RATHER_THAN_RELEASE_SECONDS = 5.0
"""A worker that stops finishes what will take no longer: doing it all again elsewhere would cost more."""

STORE_BYTES_PER_SECOND = 1_000_000
"""A slow line to object storage: what the lease is asked for before an upload, which then renews it as bytes go."""

# Shares of `fraction`: fetching and decoding come before the first tile, classifying and storing after the last.
FRACTION_BEFORE, FRACTION_AFTER = 0.02, 0.95


class ShardTaken(Exception):
    """Another worker has the shard that this one was working on: its lease had passed."""


class Lifeline:
    """Keeps one claimed attempt alive while it makes progress, and raises what must end it.

    A `worker.enlarging.Watch`: it is called between tiles and before anything that stays silent for long. Raises
    StaleAttempt, CancelSeen, StopSeen or DeadlineExceeded there. A database that is away does not end an attempt as
    long as the lease lasts.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        claim: Claim,
        *,
        deadline_in_seconds: float | None,
        is_stopping: Callable[[], bool],
        on_phase: Callable[[str], None] = lambda _: None,
        monotonic: Callable[[], float] = time.monotonic,
        memory: Callable[[], tuple[int, int | None]] = lambda: (0, None),
    ) -> None:
        self._database, self._settings, self._claim = database, settings, claim
        self._is_stopping, self._on_phase, self._monotonic = is_stopping, on_phase, monotonic
        now = monotonic()
        self._lease_ends = now + settings.lease_seconds
        self._deadline = None if deadline_in_seconds is None else now + deadline_in_seconds
        self._last = Progress(0, 0, 0, 0, None)
        self._phase = "claimed"
        self._written_at = now
        self._tenths_announced = 0
        # Uploads tell of their bytes from threads of their own.
        self._lock = threading.Lock()
        self._stale: StaleAttempt | None = None
        self._began_at = self._trace_written_at = now
        self._trace = Trace(memory=memory)

    @property
    def trace(self) -> dict[str, Any]:
        """What the attempt has looked like from within until now."""
        return self._trace.view(self._monotonic() - self._began_at)

    @property
    def is_alive(self) -> bool:
        """The lease has not passed, as far as this process knows."""
        return self._monotonic() < self._lease_ends

    def begins(self, phase: str, *, expected_seconds: float = 0.0) -> None:
        """A phase begins; where it may stay silent for long, the lease is renewed beforehand to cover it."""
        self._phase = phase
        self._trace.begins(phase, self._monotonic() - self._began_at)
        self._on_phase(phase)
        self._cover(expected_seconds)

    def _cover(self, expected_seconds: float) -> None:
        """Renews the lease where it would not outlast a silence of so many seconds."""
        self._check(left_seconds=0.0)
        needed_seconds = expected_seconds + self._settings.lease_renew_seconds
        if expected_seconds > 0 and self._lease_ends - self._monotonic() < needed_seconds:
            self._write(max(self._settings.lease_seconds, needed_seconds))

    def progressed(self, progress: Progress) -> None:
        self._trace.progressed(progress, self._monotonic() - self._began_at)
        self._check(left_seconds=progress.eta_seconds or 0.0)
        last, self._last = self._last, progress
        since_seconds = self._monotonic() - self._written_at
        is_first = last.tiles_total == 0
        # What comes after the last band is soon told by itself.
        band_ended = last.bands_done < progress.bands_done < progress.bands_total
        if is_first or since_seconds >= PROGRESS_SECONDS or (band_ended and since_seconds >= BAND_SECONDS):
            self._write(self._settings.lease_seconds)

    def routed(self, model: str, reason: str) -> None:
        """Writes down what `auto` came to, so that it shows while the work goes on."""
        with self._database.transaction() as session:
            jobs.route(session, self._claim, model=model, reason=reason)

    def sent(self, _bytes: int) -> None:
        """Some bytes of the result are in storage. Called from the upload's threads; raises nothing."""
        with self._lock:
            if self._stale is not None:
                return
            left = self._lease_ends - self._monotonic()
            if left < self._settings.lease_seconds - self._settings.lease_renew_seconds:
                try:
                    self._write(self._settings.lease_seconds)
                except StaleAttempt as error:
                    self._stale = error
                except (CancelSeen, DatabaseUnavailable):
                    # The upload is the last step: what comes after it finds out the same.
                    pass

    def raise_if_stale(self) -> None:
        """Raises StaleAttempt where `sent` has learned that the attempt is over."""
        if self._stale is not None:
            raise self._stale

    def _check(self, *, left_seconds: float) -> None:
        if self._deadline is not None and self._monotonic() > self._deadline:
            raise DeadlineExceeded("The deadline passed while the job was running.")
        if self._is_stopping() and left_seconds > FINISH_RATHER_THAN_RELEASE_SECONDS:
            raise StopSeen

    def _write(self, lease_seconds: float) -> None:
        """Writes how far the attempt has come and renews its lease, in one UPDATE."""
        progress = self._last
        share = progress.tiles_done / progress.tiles_total if progress.tiles_total else 0.0
        fraction = FRACTION_BEFORE + (FRACTION_AFTER - FRACTION_BEFORE) * share
        tenths = int(fraction * 10)
        # The lease is counted from before the statement: the database counts from a little later, never earlier.
        started = self._written_at = self._monotonic()
        try:
            with self._database.transaction(passing=True) as session:
                is_canceling = self._tell(session, fraction, lease_seconds, announce=tenths > self._tenths_announced)
        except DatabaseUnavailable as error:
            if not self.is_alive:
                raise
            log.warning("job.progress_not_written", detail=error.detail)
            return
        self._lease_ends = started + lease_seconds
        self._tenths_announced = max(self._tenths_announced, tenths)
        if is_canceling:
            raise CancelSeen

    def _tell(self, session: Session, fraction: float, lease_seconds: float, *, announce: bool) -> bool:
        """Writes it. True where the customer has asked to cancel. Raises StaleAttempt."""
        is_canceling = jobs.progress(
            session,
            self._claim,
            phase=self._phase,
            fraction=fraction,
            bands_done=self._last.bands_done,
            bands_total=self._last.bands_total,
            eta_seconds=self._last.eta_seconds,
            lease_seconds=lease_seconds,
            now=clock(session),
            announce=announce,
        )
        # Kept as it goes: a worker that is killed should leave behind what it looked like.
        if self._written_at - self._trace_written_at >= TRACE_SECONDS:
            jobs.keep_trace(session, self._claim, self.trace)
            self._trace_written_at = self._written_at
        return is_canceling


class ShardsLifeline(Lifeline):
    """Of an attempt, or a helper's, that makes a job in shards: keeps the one it makes, and the one it stores."""

    shard: ShardClaim | None = None
    """The one it makes."""
    _stored: ShardClaim | None = None

    def stores(self, claim: ShardClaim | None) -> None:
        """From now on the lease of this shard, which is made, is renewed too."""
        self._stored = claim

    def _renew(self, session: Session, progress: Progress, lease_seconds: float, now: datetime) -> None:
        """`progress`: with the one it makes. Raises StaleAttempt where that is somebody else's."""
        if self._stored is not None:
            shards.keep(session, self._stored, lease_seconds=lease_seconds, now=now)
        if self.shard is not None:
            shards.progress(
                session,
                self.shard,
                tiles_done=progress.tiles_done,
                # Before its first tile the shard knows better.
                tiles_total=progress.tiles_total or sum(len(band) for band in self.shard.bands),
                bands_done=progress.bands_done,
                lease_seconds=lease_seconds,
                now=now,
            )


class SharedLifeline(ShardsLifeline):
    """Of an attempt at a job that many workers share: tells how far all have come, and holds the shard it works on."""

    _mine = Progress(0, 0, 0, 0, None)
    _others = Standing(0, 0, 0, 0, 0, 0, None)
    _first: tuple[float, int] | None = None

    def begins(self, phase: str, *, expected_seconds: float = 0.0) -> None:
        # Each shard begins to upscale; the job does so once.
        if phase == self._phase:
            self._cover(expected_seconds)
        else:
            super().begins(phase, expected_seconds=expected_seconds)

    def works_on(self, claim: ShardClaim | None, others: Standing | None = None) -> None:
        """From now on the lease of this shard is renewed with the job's. `others`: how far all others have come."""
        self.shard, self._mine = claim, Progress(0, 0, 0, 0, None)
        self._others = others or self._others

    def progressed(self, progress: Progress) -> None:
        self._mine = progress
        super().progressed(self._of_all())

    def waits(self, standing: Standing) -> None:
        """There is nothing to do but wait for others. Raises what ends the attempt."""
        self._others = standing
        super().progressed(self._of_all())

    def _of_all(self) -> Progress:
        others, mine = self._others, self._mine
        # What a lost worker had done is done again; what is told never falls.
        done = max(self._last.tiles_done, others.tiles_done + mine.tiles_done)
        total = others.tiles_total + mine.tiles_total
        now = self._monotonic()
        since, at_first = self._first = self._first or (now, done)
        rate = (done - at_first) / (now - since) if now > since else 0.0
        left_seconds = (total - done) / rate if rate else self._mine.eta_seconds
        bands_done = max(self._last.bands_done, others.bands_done + mine.bands_done)
        bands_total = others.bands_total + (len(self.shard.bands) if self.shard else 0)
        return Progress(done, max(done, total), bands_done, bands_total, left_seconds)

    def _tell(self, session: Session, fraction: float, lease_seconds: float, *, announce: bool) -> bool:
        if super()._tell(session, fraction, lease_seconds, announce=announce):
            return True
        now = clock(session)
        try:
            self._renew(session, self._mine, lease_seconds, now)
        except StaleAttempt as error:
            raise ShardTaken(error.detail) from error
        max_tries = self._settings.max_attempts
        self._others = shards.standing(session, self._claim.job_id, max_tries=max_tries, now=now, without=self.shard)
        return False


class HelpersLifeline(ShardsLifeline):
    """Keeps a helper's shards alive, the one it makes and the one it stores, and nothing else of the job. A cancel
    reaches it as StaleAttempt."""

    def works_on(self, claim: ShardClaim) -> None:
        """From now on, of a shard that has just been claimed. To be said before all else."""
        self.shard, self._last = claim, Progress(0, 0, 0, 0, None)
        self._written_at = self._monotonic()
        self._lease_ends = self._written_at + self._settings.lease_seconds

    def stores(self, claim: ShardClaim | None) -> None:
        """As of every attempt; nothing is being made until `works_on`."""
        super().stores(claim)
        if claim is not None:
            self.shard = None

    def _tell(self, session: Session, fraction: float, lease_seconds: float, *, announce: bool) -> bool:  # noqa: ARG002
        self._renew(session, self._last, lease_seconds, clock(session))
        return False
