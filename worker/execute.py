"""One attempt at a job, told in steps: claim, fetch, enlarge, store, finish.

Whatever happens between claim and finish becomes an Outcome; deciding which is apart from recording it. The attempt
lives by its lease: progress renews it, silence lets it pass, and who has lost it changes nothing any more.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar, assert_never, cast

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared import catalog, jobs, own_models, queries, shards, workers
from shared.catalog import ModelCard
from shared.db import Database, clock
from shared.errors import (
    DatabaseUnavailable,
    DeadlineExceeded,
    DeviceBroken,
    DiskFull,
    EnlargerError,
    InternalError,
    OutOfMemory,
    StaleAttempt,
    StorageUnavailable,
    Unavailable,
)
from shared.jobs import Claim, JobResult
from shared.models import Job
from shared.outbox import Broker, call_helpers
from shared.pictures import format_named
from shared.settings import Settings
from shared.shards import ShardClaim, Standing
from shared.storage import Storage
from shared.telemetry import log, tallies
from shared.traces import Phases, Traces
from shared.workers import Presence
from worker import contact_sheet, sharding, upscale
from worker.ahead import Ahead
from worker.codec import Samples
from worker.decoding import Sandboxed
from worker.enlarging import Engine, Enlarged, Onlooker, Progress, Wanted
from worker.networks import own
from worker.previews import Previews
from worker.sharding import Handover, PartMaker, ShardTaken, Sharing
from worker.storing import Storing
from worker.thumbnails import Thumbnails
from worker.trace import Trace
from worker.usage import Usage

PROGRESS_SECONDS = 0.5
"""Progress is written at most this late after a tile that made some ..."""
BAND_SECONDS = 0.1
"""... and at a band's end, but no oftener than this: small bands take milliseconds."""

TRACE_SECONDS = 5.0
"""So often the trace of a running attempt is written beside its progress."""

CLAIM_TRIES = 5
"""So often a claim tries again that met other workers at every job that is due."""

HELD_LOOK_SECONDS = 1.0
"""A worker that holds a message looks this often whether there is something for it to do ..."""
HELD_SPELL_SECONDS = 1200.0
"""... and ends the task it waits in after this: the broker gives a message that is held for two hours to another."""

# An attempt's process ends at its limit. That is the last net, far above what the plan expects: the lease and the
# deadline between tiles act long before.
LIMIT_FACTOR = 10
LEAST_LIMIT_SECONDS = 1800.0

FINISH_RATHER_THAN_RELEASE_SECONDS = 5.0
"""A worker that stops finishes what will take no longer: doing it all again elsewhere would cost more."""

SERVER_AWAY_SECONDS = 10.0
"""How long a job waits that met a server which did not answer."""

STORE_BYTES_PER_SECOND = 1_000_000
"""A slow line to object storage: what the lease is asked for before an upload, which then renews it as bytes go."""

RETRY_RECORDING_SECONDS = (0.1, 2.0)
"""First and longest wait before what an attempt came to is written again, where the database is away."""

# Shares of `fraction`: fetching and decoding come before the first tile, classifying and storing after the last.
FRACTION_BEFORE, FRACTION_AFTER = 0.02, 0.95


LAST_FIRST_SECONDS = 0.25
"""So long what is done beside a network waits for the attempt before it to be finished: encoding it may take longer."""

AFTER_NETWORK = ("encode", "store")
"""Phases that an attempt does not need the network for any more."""


@dataclass(frozen=True)
class Succeeded:
    result: JobResult


@dataclass(frozen=True)
class Retryable:
    """Another attempt may do better. `queue` sends it to another device's queue."""

    error: EnlargerError
    queue: str | None = None


@dataclass(frozen=True)
class Fatal:
    """No attempt will do better."""

    error: EnlargerError


@dataclass(frozen=True)
class Canceled:
    """The customer has taken the job back."""


@dataclass(frozen=True)
class Released:
    """The job goes back to its queue and this attempt does not count: the worker is asked to stop, or a server it
    depends on does not answer, which `error` names."""

    error: EnlargerError | None = None


@dataclass(frozen=True)
class Superseded:
    """Another attempt owns the job, or it is gone: there is nothing to record."""


@dataclass(frozen=True)
class Helped:
    """A shard of somebody else's attempt is made."""


Outcome = Succeeded | Retryable | Fatal | Canceled | Released | Superseded | Helped


class CancelSeen(Exception):
    """Raised between tiles: the customer has asked to cancel."""


class StopSeen(Exception):
    """Raised between tiles: this process has been asked to stop."""


def decide(error: BaseException, *, on_gpu: bool, priority: str) -> Outcome:
    """What an attempt that raised `error` came to."""
    match error:
        case StaleAttempt():
            return Superseded()
        case CancelSeen():
            return Canceled()
        case StopSeen() | SystemExit() | KeyboardInterrupt():
            return Released()
        case OutOfMemory() if on_gpu:
            # The customer gets a picture and not an error, also where a GPU was asked for by name.
            return Retryable(error, queue=f"cpu.{priority}")
        case OSError() if error.errno in DiskFull.ERRNOS:
            return Released(DiskFull())
        case MemoryError():
            return Retryable(OutOfMemory("The worker ran out of memory."))
        case Unavailable() if error.retryable:
            # Not the job's fault, and perhaps every job's lot for hours: they wait, and none uses up its attempts.
            return Released(error)
        case DeviceBroken() if error.facts.get("only_waited"):
            # Whatever broke it, this job had no part in it: of jobs side by side a bad one must not use up the others'
            # attempts.
            return Released()
        case EnlargerError():
            return Retryable(error) if error.retryable else Fatal(error)
        case _:
            return Retryable(InternalError(f"Something unforeseen happened: {type(error).__name__}."))


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


class _ShardsLifeline(Lifeline):
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


class SharedLifeline(_ShardsLifeline):
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


class HelpersLifeline(_ShardsLifeline):
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


LifelineT = TypeVar("LifelineT", bound=Lifeline)


@dataclass(frozen=True)
class _UnderWay:
    """An attempt that a thread of the pool makes."""

    device: str
    turn: Turn
    outcome: Future[Outcome]


class Executor:
    """Makes attempts in one image process: on a CPU one at a time has the network, on a GPU some, and one may be
    finished beside them."""

    def __init__(
        self,
        database: Database,
        storage: Storage,
        settings: Settings,
        engines: dict[str, Engine],
        facts: workers.WorkerFacts,
        decoder: Sandboxed | None = None,
        traces: Traces | None = None,
        own_cards: Sequence[ModelCard] = (),
        ahead: Ahead | None = None,
        slots: Mapping[str, int] | None = None,
        broker: Broker | None = None,
    ) -> None:
        """`engines` by the contract's word for their device: `cpu`, and `gpu` where there is one. `decoder`: theirs,
        closed with this. `own_cards`: models of its own that it offers to everybody. `ahead`: the engines' decoder too,
        where pictures are to be decoded ahead. `slots`: how many attempts may have a network at once, by the same
        words; more than one only where that engine is batched. As the settings say where it is not given. `broker`:
        to call helpers at once; where there is none the relay does so in a second."""
        self.must_end = False
        """No further attempt may be made in this process: its device is broken, or it has been told to exit."""
        self.set_limit: Callable[[float], object] = lambda _seconds: None
        """Told, when an attempt begins, after how many seconds this process is to be killed; 0 when it has ended."""
        self._database, self._storage, self._settings = database, storage, settings
        self._engines = engines
        self._decoder = decoder
        self._ahead = ahead
        self._broker = broker
        self._traces = traces or Traces("", "images")
        self._stopping = threading.Event()
        # Of each attempt under way, with the moment when the process is to be killed for its sake.
        self._lifelines: dict[Lifeline, float] = {}
        self._limiting = threading.Lock()
        self._slots = {"cpu": 1, "gpu": settings.gpu_attempts, **(slots or {})}
        self._networks = {device: threading.Semaphore(self._slots[device]) for device in engines}
        # One beside those that have a network.
        self._most_under_way = 1 + max(self._slots[device] for device in engines)
        self._attempts = ThreadPoolExecutor(self._most_under_way, "attempt")
        self._under_way: list[_UnderWay] = []
        self._is_drained = False
        self._lacks = False
        """Jobs waited at the last look, and this process can run none of them."""
        self._owed_queues: list[str] = []
        """Of a process that holds a message: where it belongs, while it could not be given back yet."""
        self._interactive_in_a_row = 0
        self._usage = Usage(on_gpu=facts.device == "gpu")
        self.presence = Presence(
            database,
            facts,
            interval_seconds=settings.worker_lost_after_seconds / 3,
            is_alive=self._is_alive,
            models_loaded=lambda: engines[facts.device or "cpu"].models_loaded,
            usage=self._usage.now,
            speeds=lambda: engines[facts.device or "cpu"].speeds,
            on_enlist=lambda session, now: own_models.offer(
                session,
                facts.id,
                own_cards,
                worker_lost_after_seconds=settings.worker_lost_after_seconds,
                now=now,
            ),
        )

    @classmethod
    def start(cls, settings: Settings, *, queues: Sequence[str]) -> Executor:
        """Makes this process an image worker: loads the default network, tries it out, and enlists.

        Raises ModelUnavailable where there is no such device or no weights: a process that cannot work must not look
        as if it could.
        """
        started = time.monotonic()
        cores = upscale.prepare_process(0)
        threads = upscale.prepare_process(settings.torch_threads or max(1, cores // settings.worker_concurrency))
        device = upscale.choose_device(settings.worker_device)
        kind = "cpu" if device == "cpu" else "gpu"
        decoder = Sandboxed(settings.max_input_px)
        # It warms up while the network does.
        decoder.sandbox.start()
        own_cards = _own_models(settings)
        facts = workers.this_process(
            "images",
            queues=queues,
            device=kind,
            device_name=_device_name(kind),
            models=(*catalog.runnable(), *(card.name for card in own_cards)),
        )
        database, storage = Database(settings.sqlalchemy_url), Storage(settings)

        def next_job() -> Job | None:
            with database.reading() as session:
                return queries.likely_next(
                    session,
                    queues,
                    worker_id=facts.id,
                    worker_lost_after_seconds=settings.worker_lost_after_seconds,
                    now=clock(session),
                    runs=facts.models,
                )

        ahead = Ahead(decoder, storage, next_job)
        engines = {kind: Engine.of(settings, device, ahead, own_cards)}
        engines.setdefault("cpu", Engine.of(settings, "cpu", ahead, own_cards))
        engines[kind].warm_up()
        sweep_scratch()
        traces = Traces(settings.traces_url, "images")
        broker = Broker(settings)
        executor = cls(database, storage, settings, engines, facts, decoder, traces, own_cards, ahead, broker=broker)
        executor.presence.start()
        log.info(
            "worker.ready",
            worker_id=facts.id,
            device=device,
            queues=list(queues),
            models=list(facts.models or ()),
            threads=threads,
            seconds=round(time.monotonic() - started, 2),
        )
        return executor

    def ask_to_stop(self) -> None:
        """From now on a running attempt gives its lease back at its next tile, unless it is nearly done. A signal
        handler may call it."""
        self._stopping.set()

    def stop(self) -> None:
        """The process ends: finishes what is to be finished, gives back what still has a network, says so, and lets go
        of its connections."""
        self.ask_to_stop()
        self._attempts.shutdown()
        for engine in self._engines.values():
            engine.close()
        self.presence.stop()
        if self._decoder is not None:
            self._decoder.close()
        if self._broker is not None:
            self._broker.close()
        self._traces.close()
        self._storage.close()
        self._database.close()

    def run(self, job_id: str, queue: str | None = None) -> Outcome | None:
        """One attempt at a job, from claim to finish. None where there was nothing to claim.

        The message of `job_id` has come from `queue` (None: the one the job waits in). It says that there is work for
        the queue's device; which job that is, SQL decides: the one whose turn it is. As many messages as jobs are on
        their way to a device, so that one whose job is done already stands for another that waits.

        Raises nothing that is the job's fault. Where the database does not answer at the claim, nothing has happened,
        and the relay sends a message again.
        """
        claimed = self._claimed(job_id, queue)
        return None if claimed is None else self._attempted(*claimed, self._turn(claimed[3]))

    def run_network(self, job_id: str, queue: str | None = None) -> None:
        """As `run`, and returns as soon as the network has a slot for the next job: a thread does the rest.

        One attempt more than there are slots is under way at most: one then encodes, stores and records. Where the
        caller is interrupted, all attempts are asked to stop, and what interrupts it is raised when that has happened.
        """
        if self.must_end:
            # Of attempts side by side one has broken the device since the last message came.
            self._pass_on(job_id, queue)
            return
        claimed = self._claimed(job_id, queue)
        if claimed is None:
            return
        device = claimed[3]
        turn = self._turn(device)
        context = contextvars.copy_context()
        attempt = self._attempts.submit(context.run, lambda: self._attempted(*claimed, turn))
        attempt.add_done_callback(_log_unforeseen)
        self._under_way.append(_UnderWay(device, turn, attempt))
        try:
            self._wait_for_room(device)
        except BaseException:
            self.ask_to_stop()
            wait([each.outcome for each in self._under_way])
            raise

    def _turn(self, device: str) -> Turn:
        return Turn(self._networks[device])

    def _wait_for_room(self, device: str) -> None:
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

    def _finishing(self) -> list[Future[Outcome]]:
        return [each.outcome for each in list(self._under_way) if each.turn.over.done()]

    def _pass_on(self, job_id: str, queue: str | None) -> None:
        """The message is another process's: it is given back without a look at what it leads to."""
        with contextlib.suppress(DatabaseUnavailable), self._database.transaction() as session:
            served = self._served(queue or session.scalar(select(Job.queue).where(Job.id == job_id)) or "")
            if served:
                self._give_back(session, served, clock(session))

    def _claimed(self, job_id: str, queue: str | None) -> tuple[Claim, Job, datetime, str] | None:
        with structlog.contextvars.bound_contextvars(job_id=job_id):
            try:
                claimed = self._claim(job_id, queue)
            except DatabaseUnavailable as error:
                log.warning("job.not_claimed", detail=error.detail)
                return None
            if claimed is None:
                log.info("job.nothing_to_claim", drained=self._is_drained, lacks=self._lacks)
                claimed = self._claimed_while_held()
            return claimed

    def _attempted(self, claim: Claim, job: Job, now: datetime, device: str, turn: Turn) -> Outcome:
        with turn, structlog.contextvars.bound_contextvars(job_id=job.id):
            self._traces.begin("job.wait", job.traceparent, at=job.queued_at, job_id=job.id, queue=job.queue).end(now)
            span = self._traces.begin("job.attempt", job.traceparent, job_id=job.id, attempt=claim.attempt)
            with structlog.contextvars.bound_contextvars(attempt=claim.attempt, traceparent=span.traceparent):
                outcome = self._attempt(claim, job, now, device, Phases(self._traces, span.traceparent), turn)
            span.end(outcome=type(outcome).__name__.lower(), device=device)
            return outcome

    def help(self, job_id: str, queue: str | None = None) -> Outcome | None:
        """Makes shards of a job that another attempt holds, as long as no job waits. None where there was none to take.

        Its message, as one for `run`, says that there is work for the device of `queue`: a job that waits comes first.
        Helping is for whoever is idle, or a large picture would hold every worker before other keys' turn comes.
        Raises nothing that is the job's fault.
        """
        with structlog.contextvars.bound_contextvars(job_id=job_id):
            try:
                waiting = self._claim(job_id, queue)
            except DatabaseUnavailable as error:
                log.warning("shard.not_claimed", detail=error.detail)
                return None
        if waiting is not None:
            # Where that fails, the relay sends another when this one has not come to anything for long.
            with contextlib.suppress(DatabaseUnavailable), self._database.transaction() as session:
                shards.give_message_back(session, job_id)
            return self._attempted(*waiting, self._turn(waiting[3]))
        with structlog.contextvars.bound_contextvars(job_id=job_id):
            try:
                claimed = self._claim_to_help(job_id)
            except DatabaseUnavailable as error:
                log.warning("shard.not_claimed", detail=error.detail)
                return None
            if claimed is None:
                log.info("shard.nothing_to_claim", drained=self._is_drained, lacks=self._lacks)
                waiting = self._claimed_while_held()
                return None if waiting is None else self._attempted(*waiting, self._turn(waiting[3]))
            claim, job, now, device = claimed
            span = self._traces.begin("job.shard", job.traceparent, job_id=job_id, shard=claim.position)
            with (
                structlog.contextvars.bound_contextvars(traceparent=span.traceparent),
                self._turn(device) as turn,
            ):
                outcome = self._help(claim, job, now, device, Phases(self._traces, span.traceparent), turn)
            span.end(outcome=type(outcome).__name__.lower(), device=device)
            return outcome

    @property
    def _runs(self) -> tuple[str, ...] | None:
        return self.presence.facts.models

    def _claim(self, job_id: str, queue: str | None, *, holds: bool = False) -> tuple[Claim, Job, datetime, str] | None:
        """A job that this process can run, of the queues of its message's device. Where there is none for it while
        others wait, or it is drained, the message is given back: once, not by one who `holds` it already."""
        worker_id = self.presence.facts.id
        for _ in range(CLAIM_TRIES):
            # A claim that a power cut undoes was of a worker of this very host.
            with self._database.transaction(passing=True) as session:
                now = clock(session)
                # A message of before a job was moved to another device leads to the jobs of its own.
                served = self._served(queue or session.scalar(select(Job.queue).where(Job.id == job_id)) or "")
                if not holds:
                    self._owed_queues = []
                next_id = jobs.next_due(session, served, runs=self._runs, now=now) if served else None
                self._is_drained = self._lacks = False
                if next_id is None:
                    self._is_drained = workers.is_drained(session, worker_id)
                    if not self._is_drained and self._runs is not None and jobs.is_any_due(session, served, now=now):
                        self._lacks = True
                        if not holds:
                            self._give_back(session, served, now)
                    return None
                device = "cpu" if served[0].startswith("cpu.") else "gpu"
                claim = jobs.claim(
                    session,
                    next_id,
                    worker_id=worker_id,
                    device=device,
                    lease_seconds=self._settings.lease_seconds,
                    now=now,
                )
                if claim is not None:
                    workers.working_on(session, worker_id, claim.job_id, now=now)
                    job = session.get_one(Job, claim.job_id)
                    self._interactive_in_a_row = 0 if job.queue.endswith(".bulk") else self._interactive_in_a_row + 1
                    return claim, job, now, device
                self._is_drained = workers.is_drained(session, worker_id)
                if self._is_drained:
                    if not holds:
                        self._give_back(session, served, now)
                    return None
            # Another worker was taking it: what it left behind is seen by a new transaction.
        return None

    def _served(self, queue: str) -> list[str]:
        """The queues of this one's device that the process serves, in the order in which jobs are taken from them."""
        device = queue.partition(".")[0]
        served = [each for each in self.presence.facts.queues if each.partition(".")[0] == device]
        if self._interactive_in_a_row >= self._settings.bulk_after_interactive_jobs:
            served.sort(key=lambda each: not each.endswith(".bulk"))
        return served

    def _claim_to_help(self, job_id: str, below: int | None = None) -> tuple[ShardClaim, Job, datetime, str] | None:
        """`below`: of a helper that has made this shard and would go on; None then also where a job waits for it."""
        worker_id = self.presence.facts.id
        with self._database.transaction() as session:
            now = clock(session)
            asked = session.execute(select(Job.queue, Job.model).where(Job.id == job_id)).one_or_none()
            # The job may have been moved to another device's queue since.
            if asked is None or asked.queue not in self.presence.facts.queues:
                return None
            if self._runs is not None and asked.model not in self._runs:
                self._lacks = True
                shards.give_message_back(session, job_id)
                return None
            if below is not None:
                served = self._served(asked.queue)
                if jobs.next_due(session, served, runs=self._runs, now=now) is not None:
                    return None
            device = "cpu" if asked.queue.startswith("cpu.") else "gpu"
            claim = shards.claim_to_help(
                session,
                job_id,
                worker_id=worker_id,
                max_tries=self._settings.max_attempts,
                lease_seconds=self._settings.lease_seconds,
                now=now,
                below=below,
            )
            if claim is None and below is not None:
                return None
            if claim is None:
                self._is_drained = workers.is_drained(session, worker_id)
                if self._is_drained:
                    shards.give_message_back(session, job_id)
                return None
            workers.working_on(session, worker_id, job_id, now=now)
            return claim, session.get_one(Job, job_id), now, device

    def _claimed_while_held(self) -> tuple[Claim, Job, datetime, str] | None:
        """Holds the message, which has been given back, so that the broker hands this process no other: while it is
        drained, and while only jobs wait that it cannot run. The first that it can it takes, whoever's message it was;
        None where there is nothing to hold it for any more."""
        ends_at = time.monotonic() + HELD_SPELL_SECONDS
        while (self._is_drained or self._lacks) and time.monotonic() < ends_at and not self._stopping.is_set():
            # As in `_record`, nobody sets it: a signal handler that did would wait for a lock this very thread holds.
            threading.Event().wait(HELD_LOOK_SECONDS)
            with contextlib.suppress(DatabaseUnavailable):
                if self._owed_queues:
                    with self._database.transaction() as session:
                        self._give_back(session, self._owed_queues, clock(session))
                if self._is_drained:
                    with self._database.reading() as session:
                        self._is_drained = workers.is_drained(session, self.presence.facts.id)
                elif (claimed := self._claim_of_any_device()) is not None:
                    return claimed
        return None

    def _give_back(self, session: Session, queues: list[str], now: datetime) -> None:
        """The message of one of these queues; one that is faster than its mark in SQL is owed until that is there."""
        self._owed_queues = [] if jobs.give_message_back(session, queues, now=now) else queues

    def _claim_of_any_device(self) -> tuple[Claim, Job, datetime, str] | None:
        lacks = False
        for device in dict.fromkeys(queue.partition(".")[0] for queue in self.presence.facts.queues):
            claimed = self._claim("", f"{device}.", holds=True)
            if claimed is not None or self._is_drained:
                return claimed
            lacks = lacks or self._lacks
        self._lacks = lacks
        return None

    def _attempt(
        self, claim: Claim, job: Job, claimed_at: datetime, device: str, phases: Phases, turn: Turn
    ) -> Outcome:
        queued_seconds = max(0.0, (claimed_at - job.queued_at).total_seconds())
        log.info("job.claimed", wait_seconds=round(queued_seconds, 3), device=device, worker=self.presence.facts.id)
        tallies.observe("enlarger_queue_wait_seconds", queued_seconds, queue=job.queue)
        started = time.monotonic()
        lifeline: Lifeline
        if sharding.may_share(job, self._engines[device], self._settings):
            lifeline = shared = self._lifeline_of(SharedLifeline, claim, job, claimed_at, phases, turn)
            work = partial(self._work_together, claim, job, queued_seconds, device, shared)
        else:
            lifeline = self._lifeline_of(Lifeline, claim, job, claimed_at, phases, turn)
            work = partial(self._work, claim, job, queued_seconds, device, lifeline)
        with self._watched(lifeline, _limit_seconds(job), phases):
            outcome = self._outcome_of(lambda: Succeeded(work()), job, device)
            phases.begins("record")
            self._record(claim, outcome, lifeline.trace)
        _count(outcome, job.model)
        log.info(
            "job.attempt_ended",
            outcome=type(outcome).__name__.lower(),
            seconds=round(time.monotonic() - started, 3),
            timings=outcome.result.timings if isinstance(outcome, Succeeded) else None,
        )
        return outcome

    @contextmanager
    def _watched(self, lifeline: Lifeline, limit_seconds: float, phases: Phases) -> Iterator[None]:
        """While the block runs, the process counts as alive as long as the lease lasts, and is killed at its limit."""
        self._limit(lifeline, time.monotonic() + limit_seconds)
        try:
            yield
        finally:
            self._limit(lifeline, None)
            phases.end()

    def _limit(self, lifeline: Lifeline, ends_at: float | None) -> None:
        """Of attempts side by side the last limit counts: to kill the process for one would take the others with it,
        and the lease of one that hangs passes long before."""
        with self._limiting:
            if ends_at is None:
                del self._lifelines[lifeline]
            else:
                self._lifelines[lifeline] = ends_at
            left = max(self._lifelines.values()) - time.monotonic() if self._lifelines else 0
            # 0 would be none; a limit that has passed behind another's is one of now.
            self.set_limit(max(0.001, round(left, 3)) if self._lifelines else 0)

    def _help(
        self, claim: ShardClaim, job: Job, claimed_at: datetime, device: str, phases: Phases, turn: Turn
    ) -> Outcome:
        log.info("shard.claimed", shard=claim.position, device=device, worker=self.presence.facts.id)
        started = time.monotonic()
        lifeline = self._lifeline_of(HelpersLifeline, Claim(job.id, job.attempt), job, claimed_at, phases, turn)
        lifeline.works_on(claim)
        # As for the whole job: a worker that is slower than the others may be making the last of it alone.
        with self._watched(lifeline, _limit_seconds(job), phases):
            outcome = self._outcome_of(lambda: self._make_shards(claim, job, device, lifeline), job, device)
        self._give_shard_back(job.id, lifeline.shard, outcome)
        seconds = round(time.monotonic() - started, 3)
        log.info(
            "shard.ended",
            shard=(lifeline.shard or claim).position,
            outcome=type(outcome).__name__.lower(),
            seconds=seconds,
        )
        return outcome

    def _make_shards(self, claim: ShardClaim, job: Job, device: str, lifeline: HelpersLifeline) -> Helped:
        """From the stored input to the stored parts: the picture is fetched and decoded once. Raises whatever goes
        wrong with one of them."""
        with (
            scratch_folder() as folder,
            self._fetched(job, folder, lifeline) as source,
            Thumbnails(self._storage, job.blob_prefix, job.attempt) as thumbnails,
            Previews(self._storage, job.blob_prefix, job.attempt) as previews,
        ):
            assert job.split is not None, "a job that has shards is shared"
            making = self._engines[device].opened(source, wanted_of(job), lifeline, thumbnails, previews)
            maker = PartMaker(self._storage, job.blob_prefix, folder, making, thumbnails, job.split)
            with Handover(self._database, self._storage, lifeline, maker) as handover:
                while True:
                    handover.take(claim, maker.make(claim))
                    following = self._next_to_help(claim, job)
                    if following is None:
                        handover.finish()
                        if handover.stale is not None:
                            raise handover.stale
                        return Helped()
                    claim = following
                    log.info("shard.claimed", shard=claim.position, device=device, worker=self.presence.facts.id)
                    lifeline.works_on(claim)

    def _next_to_help(self, made: ShardClaim, job: Job) -> ShardClaim | None:
        """Another shard of the job. None where there is none, or this process has something better to do."""
        if self._stopping.is_set():
            return None
        try:
            claimed = self._claim_to_help(made.job_id, below=made.position)
        except DatabaseUnavailable:
            return None
        if claimed is None or claimed[1].split != job.split:
            # What holds for all shards has changed since the picture was opened: on other terms it is opened anew.
            if claimed is not None:
                sharding.give_back(self._database, claimed[0])
            return None
        return claimed[0]

    def _give_shard_back(self, job_id: str, claim: ShardClaim | None, outcome: Outcome) -> None:
        """What a helper could not make is somebody else's; where the database cannot be told, once the lease passes.
        `claim` is None where there was nothing left to make."""
        worker_id = self.presence.facts.id
        try:
            with self._database.transaction() as session:
                workers.done_with(session, worker_id, job_id, now=clock(session))
                match outcome:
                    case Retryable(error) | Fatal(error) if claim is not None:
                        shards.give_back(session, claim, error)
                    case Released() if claim is not None:
                        shards.give_back(session, claim)
        except StaleAttempt as error:
            log.info("shard.superseded", detail=error.detail)
        except DatabaseUnavailable as error:
            log.warning("shard.not_recorded", detail=error.detail)

    def _lifeline_of(
        self, kind: type[LifelineT], claim: Claim, job: Job, claimed_at: datetime, phases: Phases, turn: Turn
    ) -> LifelineT:
        def on_phase(phase: str) -> None:
            turn.begins(phase)
            phases.begins(phase)

        return kind(
            self._database,
            self._settings,
            claim,
            deadline_in_seconds=None if job.deadline_at is None else (job.deadline_at - claimed_at).total_seconds(),
            is_stopping=self._stopping.is_set,
            memory=self._usage.memory,
            on_phase=on_phase,
        )

    def _outcome_of(self, work: Callable[[], Outcome], job: Job, device: str) -> Outcome:
        try:
            return work()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it becomes an Outcome
            outcome = decide(error, on_gpu=device == "gpu", priority=job.priority)
            # Of two attempts either may be the one; the other does not take it back.
            self.must_end = self.must_end or isinstance(error, DeviceBroken | SystemExit)
            _log_broken_off(error, outcome)
            return outcome

    @contextmanager
    def _fetched(self, job: Job, folder: Path, lifeline: Lifeline) -> Iterator[BinaryIO]:
        """The picture handed in, as a file that is gone when the block ends."""
        lifeline.begins("fetch", expected_seconds=job.input_bytes / STORE_BYTES_PER_SECOND)
        ready = None if self._ahead is None else self._ahead.take(job.id)
        with ready or cast(BinaryIO, tempfile.TemporaryFile(dir=folder)) as source:
            if ready is None:
                self._storage.get(job.input_key, source)
            yield source

    def _work(self, claim: Claim, job: Job, queued_seconds: float, device: str, lifeline: Lifeline) -> JobResult:
        """From the stored input to the stored result. Raises whatever goes wrong."""
        format = format_named(job.format)
        # Named after the attempt: a worker that wakes up after a rescue must not overwrite the winner's result.
        key = f"{job.blob_prefix}/result-{claim.attempt}{format.extension}"
        started = time.monotonic()
        with (
            scratch_folder() as folder,
            self._fetched(job, folder, lifeline) as source,
            Thumbnails(self._storage, job.blob_prefix, claim.attempt) as thumbnails,
            Previews(self._storage, job.blob_prefix, claim.attempt) as previews,
            Storing(
                self._storage, key, target := folder / f"result{format.extension}", format, on_bytes=lifeline.sent
            ) as result,
        ):
            fetched = time.monotonic()
            onlookers: list[Onlooker] = [LastFirst(self._finishing), thumbnails, previews, result]
            if self._ahead is not None and not self._stopping.is_set():
                onlookers.append(self._ahead)
            made = self._made(job, device, source, target, lifeline, *onlookers)

            storing = time.monotonic()
            lifeline.begins("store", expected_seconds=made.bytes / STORE_BYTES_PER_SECOND)
            # Its thread ends while the result is stored, and is not waited for afterwards.
            previews.end()
            with thumbnails.storing_result():
                sha256 = result.finish()
            lifeline.raise_if_stale()
        timings = {
            "queued_seconds": queued_seconds,
            "fetch_seconds": fetched - started,
            **made.timings,
            "store_seconds": time.monotonic() - storing,
        }
        return self._result_of(job, device, made, key, sha256, timings)

    def _work_together(
        self, claim: Claim, job: Job, queued_seconds: float, device: str, lifeline: SharedLifeline
    ) -> JobResult:
        """As `_work`, with every worker that is free. Raises whatever goes wrong."""
        format = format_named(job.format)
        with (
            scratch_folder() as folder,
            Thumbnails(self._storage, job.blob_prefix, claim.attempt) as thumbnails,
            Previews(self._storage, job.blob_prefix, claim.attempt) as previews,
        ):
            started = time.monotonic()
            with self._fetched(job, folder, lifeline) as source:
                fetch_seconds = time.monotonic() - started
                making = self._engines[device].opened(source, wanted_of(job), lifeline, thumbnails, previews)
            if job.split is not None or len(sharding.runs_of(making, self._settings)) > 1:
                making.begin()
                sharing = Sharing(
                    self._database,
                    self._storage,
                    self._settings,
                    claim,
                    job,
                    self.presence.facts.id,
                    lifeline,
                    self._call_helpers,
                )
                key = f"{job.blob_prefix}/result-{claim.attempt}{format.extension}"
                made, sha256 = sharing.make(making, folder, thumbnails, key)
                timings = {"queued_seconds": queued_seconds, "fetch_seconds": fetch_seconds, **made.timings}
                return self._result_of(job, device, made, key, sha256, timings)
        # Of a large picture one copy is enough.
        del making
        return self._work(claim, job, queued_seconds, device, lifeline)

    def _call_helpers(self) -> None:
        """By a thread of its own: a network that waits for Redis would wait for as long as that is frozen."""
        if (broker := self._broker) is not None:

            def call() -> None:
                try:
                    call_helpers(self._database, broker, self._settings)
                except Unavailable as error:
                    log.info("shard.helpers_not_called", detail=error.detail)

            threading.Thread(target=call, name="helpers", daemon=True).start()

    def _result_of(
        self, job: Job, device: str, made: Enlarged, key: str, sha256: str, timings: Mapping[str, float]
    ) -> JobResult:
        warnings = made.warnings
        if job.device == "gpu" and device == "cpu":
            warnings = (*warnings, "A GPU was asked for; its memory did not suffice, so a CPU did the work.")
        labels = None
        if made.labels is not None:
            labels = [
                {"label": each.label, "index": each.index, "probability": round(each.probability, 4)}
                for each in made.labels
            ]
        return JobResult(
            key=key,
            width=made.width,
            height=made.height,
            bytes=made.bytes,
            sha256=sha256,
            labels=labels,
            timings={name: round(value, 4) for name, value in timings.items()},
            warnings=warnings,
            report=made.report,
            preview=None if job.preview is None else {**job.preview, "cells": made.cells},
        )

    def _made(
        self, job: Job, device: str, source: BinaryIO, target: Path, lifeline: Lifeline, *onlookers: Onlooker
    ) -> Enlarged:
        """The larger picture, or the contact sheet of a preview, in `target`."""
        engine = self._engines[device]
        if job.preview is None:
            return engine.enlarge_file(source, target, wanted_of(job), lifeline, *onlookers)
        return contact_sheet.make(
            engine,
            source,
            target,
            crop=job.preview["crop"],
            models=job.preview["models"],
            scale=job.scale,
            watch=lifeline,
            onlookers=onlookers,
        )

    def _record(self, claim: Claim, outcome: Outcome, trace: Mapping[str, Any]) -> None:
        """Writes down what the attempt came to. A database that is away is waited for as long as a lease lasts: after
        that the job is somebody else's."""
        wait_seconds, longest_seconds = RETRY_RECORDING_SECONDS
        ends_at = time.monotonic() + self._settings.lease_seconds
        while True:
            try:
                self._record_once(claim, outcome, trace)
                return
            except DatabaseUnavailable as error:
                if time.monotonic() + wait_seconds > ends_at:
                    log.warning("job.not_recorded", outcome=type(outcome).__name__.lower(), detail=error.detail)
                    return
            # Nobody sets it: the wait is only a wait.
            threading.Event().wait(wait_seconds)
            wait_seconds = min(2 * wait_seconds, longest_seconds)

    def _record_once(self, claim: Claim, outcome: Outcome, trace: Mapping[str, Any]) -> None:
        worker_id = self.presence.facts.id
        try:
            with self._database.transaction() as session:
                now = clock(session)
                self._write(session, claim, outcome, now)
                jobs.keep_trace(session, claim, trace)
                workers.done_with(session, worker_id, claim.job_id, now=now)
            return
        except StaleAttempt as error:
            log.info("job.superseded", detail=error.detail)
        with self._database.transaction() as session:
            now = clock(session)
            workers.done_with(session, worker_id, claim.job_id, now=now)
            if isinstance(outcome, Succeeded):
                # Perhaps it came too late in another way: a job that is being canceled cannot succeed any more.
                with contextlib.suppress(StaleAttempt):
                    jobs.acknowledge_cancel(session, claim, now=now)
                kept_key = session.scalar(select(Job.result_key).where(Job.id == claim.job_id))
        # Not where it is the job's after all: the commit before may have lost its reply and nothing else.
        if isinstance(outcome, Succeeded) and outcome.result.key != kept_key:
            with contextlib.suppress(StorageUnavailable):
                self._storage.remove(outcome.result.key)

    def _write(self, session: Session, claim: Claim, outcome: Outcome, now: datetime) -> None:
        match outcome:
            case Succeeded(result):
                jobs.succeed(session, claim, result, now=now)
            case Retryable(error, queue):
                jobs.fail(
                    session,
                    claim,
                    error,
                    retry_delay_seconds=self._settings.retry_delay_seconds,
                    now=now,
                    queue=queue,
                )
            case Fatal(error):
                jobs.fail(session, claim, error, retry_delay_seconds=self._settings.retry_delay_seconds, now=now)
            case Canceled():
                jobs.acknowledge_cancel(session, claim, now=now)
            case Released(error):
                jobs.release(session, claim, error=error, delay_seconds=SERVER_AWAY_SECONDS if error else 0.0, now=now)
            case Superseded() | Helped():
                pass
            case _:
                assert_never(outcome)

    def _is_alive(self) -> bool:
        return all(lifeline.is_alive for lifeline in list(self._lifelines))


def _limit_seconds(job: Job) -> float:
    return max(LEAST_LIMIT_SECONDS, LIMIT_FACTOR * job.expected_seconds)


def _count(outcome: Outcome, model: str) -> None:
    """What an attempt came to, for `/metrics`."""
    tallies.count("enlarger_attempts_total", outcome=type(outcome).__name__.lower())
    if isinstance(outcome, Succeeded):
        result = outcome.result
        tallies.count("enlarger_output_megapixels_total", result.width * result.height / 1e6, model=model)
        for name, seconds in result.timings.items():
            # Beside the seconds of phases there are numbers of what the work was.
            if name.endswith("_seconds") and name != "queued_seconds":
                tallies.observe("enlarger_phase_seconds", seconds, phase=name.removesuffix("_seconds"))


def _own_models(settings: Settings) -> list[ModelCard]:
    """What lies in `models_dir`. A file that cannot be used is logged, and harms nothing."""
    if not settings.models_dir:
        return []
    cards, faults = own.scan(Path(settings.models_dir))
    for fault in faults:
        log.warning("model.unusable", path=fault.path, detail=fault.reason)
    return cards


def wanted_of(job: Job) -> Wanted:
    """What the job asks of its picture. Its words were checked at submit."""
    return Wanted(
        scale=job.scale,
        model=job.model,
        format=job.format,
        classify=job.classify,
        quality=job.quality,
        lossless=job.lossless,
        metadata_policy=cast(Any, job.metadata_policy),
        alpha=cast(Any, job.alpha),
        background=job.background,
    )


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for one attempt's files, gone with all in it when the block ends."""
    with tempfile.TemporaryDirectory(prefix=f"{_scratch_prefix()}{os.getpid()}-") as name:
        yield Path(name)


def sweep_scratch() -> int:
    """Removes the folders of processes of this host that were killed in the middle of an attempt. Returns how many."""
    removed = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{_scratch_prefix()}*"):
        owner = folder.name.removeprefix(_scratch_prefix()).partition("-")[0]
        if owner.isdigit() and not _is_running(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return removed


def _scratch_prefix() -> str:
    # The host's name too: containers that share a /tmp do not share process ids.
    return f"enlarger-{socket.gethostname()}-"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _device_name(kind: str) -> str | None:
    """What the kernel or the driver calls the device, for people; None where they do not say."""
    if kind == "cpu":
        paths, pattern = [Path("/proc/cpuinfo")], r"model name\s*:\s*(.+)"
    else:
        paths, pattern = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")), r"Model:\s*(.+)"
    for path in paths:
        with contextlib.suppress(OSError):
            if found := re.search(pattern, path.read_text()):
                return found[1].strip()
    return None


def _log_unforeseen(attempt: Future[Outcome]) -> None:
    """Nobody asks for what an attempt has come to that is finished beside another."""
    if error := attempt.exception():
        log.error("job.attempt_unforeseen", error=f"{type(error).__name__}: {error}", exc_info=error)


def _log_broken_off(error: BaseException, outcome: Outcome) -> None:
    what = f"{type(error).__name__}: {error}"
    if isinstance(outcome, Retryable) and isinstance(outcome.error, InternalError):
        log.warning("job.attempt_broken_off", error=what, exc_info=error)
    else:
        log.info("job.attempt_broken_off", error=what)
