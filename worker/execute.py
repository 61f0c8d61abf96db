"""One attempt at a job, told in steps: claim, fetch, enlarge, store, finish.

Whatever happens between claim and finish becomes an Outcome; deciding which is apart from recording it. The attempt
lives by its lease: progress renews it, silence lets it pass, and who has lost it changes nothing any more.

Here is the order of things. What is claimed is in `worker.claiming`, whose turn it is at the network in `worker.turns`,
what keeps an attempt alive in `worker.lifeline`, what it came to in `worker.outcomes` and `worker.recording`.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import structlog

from shared import catalog, own_models, queueing, workers
from shared.catalog import ModelCard
from shared.db import Database, clock
from shared.errors import DeviceBroken, Unavailable
from shared.jobs import Claim, JobResult
from shared.models import Job
from shared.outbox import Broker, call_helpers
from shared.pictures import format_named
from shared.settings import Settings
from shared.storage import Storage
from shared.telemetry import log, tallies
from shared.traces import Phases, Traces
from shared.workers import Presence
from worker import contact_sheet, outcomes, sharding, upscale
from worker.ahead import Ahead
from worker.claiming import ClaimedJob, ClaimedShard, Claiming
from worker.codec.sandboxed import Sandboxed
from worker.enlarging import Engine, Enlarged, Onlooker, Wanted
from worker.lifeline import STORE_BYTES_PER_SECOND, HelpersLifeline, Lifeline, SharedLifeline
from worker.networks import own
from worker.outcomes import Helped, Outcome, Succeeded
from worker.previews import Previews
from worker.recording import Recording
from worker.scratch import scratch_folder, sweep_scratch
from worker.sharding import Handover, PartMaker, Sharing
from worker.storing import Storing
from worker.thumbnails import Thumbnails
from worker.turns import LastFirst, Turn, Turns
from worker.usage import Usage

# An attempt's process ends at its limit. That is the last net, far above what the plan expects: the lease and the
# deadline between tiles act long before.
LIMIT_FACTOR = 10
LEAST_LIMIT_SECONDS = 1800.0

LifelineT = TypeVar("LifelineT", bound=Lifeline)


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
        slots = {"cpu": 1, "gpu": settings.gpu_attempts, **(slots or {})}
        self._turns = Turns({device: slots[device] for device in engines})
        self._claiming = Claiming(database, settings, facts, is_stopping=self._stopping.is_set)
        self._recording = Recording(database, storage, settings, facts.id)
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
                return queueing.likely_next(
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
        self._turns.close()
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
        claimed = self._claiming.claim(job_id, queue)
        return None if claimed is None else self._attempted(claimed, self._turns.turn(claimed.device))

    def run_network(self, job_id: str, queue: str | None = None) -> None:
        """As `run`, and returns as soon as the network has a slot for the next job: a thread does the rest.

        One attempt more than there are slots is under way at most: one then encodes, stores and records. Where the
        caller is interrupted, all attempts are asked to stop, and what interrupts it is raised when that has happened.
        """
        if self.must_end:
            # Of attempts side by side one has broken the device since the last message came.
            self._claiming.pass_on(job_id, queue)
            return
        claimed = self._claiming.claim(job_id, queue)
        if claimed is None:
            return
        self._turns.begin(claimed.device, partial(self._attempted, claimed))
        try:
            self._turns.wait_for_room(claimed.device)
        except BaseException:
            self.ask_to_stop()
            self._turns.wait_for_all()
            raise

    def help(self, job_id: str, queue: str | None = None) -> Outcome | None:
        """Makes shards of a job that another attempt holds, as long as no job waits. None where there was none to take.

        Its message, as one for `run`, says that there is work for the device of `queue`: a job that waits comes first.
        Helping is for whoever is idle, or a large picture would hold every worker before other keys' turn comes.
        Raises nothing that is the job's fault.
        """
        claimed = self._claiming.claim_or_help(job_id, queue)
        if claimed is None:
            return None
        turn = self._turns.turn(claimed.device)
        return self._helped(claimed, turn) if isinstance(claimed, ClaimedShard) else self._attempted(claimed, turn)

    def _attempted(self, claimed: ClaimedJob, turn: Turn) -> Outcome:
        """Under its name in logs and traces."""
        job, claim = claimed.job, claimed.claim
        with turn, structlog.contextvars.bound_contextvars(job_id=job.id):
            waited = self._traces.begin("job.wait", job.traceparent, at=job.queued_at, job_id=job.id, queue=job.queue)
            waited.end(claimed.at)
            span = self._traces.begin("job.attempt", job.traceparent, job_id=job.id, attempt=claim.attempt)
            with structlog.contextvars.bound_contextvars(attempt=claim.attempt, traceparent=span.traceparent):
                outcome = self._attempt(claimed, Phases(self._traces, span.traceparent), turn)
            span.end(outcome=outcomes.name_of(outcome), device=claimed.device)
            return outcome

    def _attempt(self, claimed: ClaimedJob, phases: Phases, turn: Turn) -> Outcome:
        job, device = claimed.job, claimed.device
        wait_seconds = round(claimed.queued_seconds, 3)
        log.info("job.claimed", wait_seconds=wait_seconds, device=device, worker=self.presence.facts.id)
        tallies.observe("enlarger_queue_wait_seconds", claimed.queued_seconds, queue=job.queue)
        started = time.monotonic()
        lifeline: Lifeline
        if sharding.may_share(job, self._engines[device], self._settings):
            lifeline = shared = self._lifeline_of(SharedLifeline, claimed.claim, claimed, phases, turn)
            work = partial(self._work_together, claimed, shared)
        else:
            lifeline = self._lifeline_of(Lifeline, claimed.claim, claimed, phases, turn)
            work = partial(self._work, claimed, lifeline)
        with self._watched(lifeline, _limit_seconds(job), phases):
            outcome = self._outcome_of(lambda: Succeeded(work()), job, device)
            phases.begins("record")
            self._recording.record(claimed.claim, outcome, lifeline.trace)
        outcomes.count(outcome, job.model)
        log.info(
            "job.attempt_ended",
            outcome=outcomes.name_of(outcome),
            seconds=round(time.monotonic() - started, 3),
            timings=outcome.result.timings if isinstance(outcome, Succeeded) else None,
        )
        return outcome

    def _helped(self, claimed: ClaimedShard, turn: Turn) -> Outcome:
        """Under its name in logs and traces."""
        job = claimed.job
        with turn, structlog.contextvars.bound_contextvars(job_id=job.id):
            span = self._traces.begin("job.shard", job.traceparent, job_id=job.id, shard=claimed.claim.position)
            with structlog.contextvars.bound_contextvars(traceparent=span.traceparent):
                outcome = self._help(claimed, Phases(self._traces, span.traceparent), turn)
            span.end(outcome=outcomes.name_of(outcome), device=claimed.device)
            return outcome

    def _help(self, claimed: ClaimedShard, phases: Phases, turn: Turn) -> Outcome:
        job, claim, device = claimed.job, claimed.claim, claimed.device
        log.info("shard.claimed", shard=claim.position, device=device, worker=self.presence.facts.id)
        started = time.monotonic()
        lifeline = self._lifeline_of(HelpersLifeline, Claim(job.id, job.attempt), claimed, phases, turn)
        lifeline.works_on(claim)
        # As for the whole job: a worker that is slower than the others may be making the last of it alone.
        with self._watched(lifeline, _limit_seconds(job), phases):
            outcome = self._outcome_of(lambda: self._make_shards(claimed, lifeline), job, device)
        self._recording.give_shard_back(job.id, lifeline.shard, outcome)
        log.info(
            "shard.ended",
            shard=(lifeline.shard or claim).position,
            outcome=outcomes.name_of(outcome),
            seconds=round(time.monotonic() - started, 3),
        )
        return outcome

    def _lifeline_of(
        self, kind: type[LifelineT], claim: Claim, claimed: ClaimedJob | ClaimedShard, phases: Phases, turn: Turn
    ) -> LifelineT:
        deadline_at = claimed.job.deadline_at

        def on_phase(phase: str) -> None:
            turn.begins(phase)
            phases.begins(phase)

        return kind(
            self._database,
            self._settings,
            claim,
            deadline_in_seconds=None if deadline_at is None else (deadline_at - claimed.at).total_seconds(),
            is_stopping=self._stopping.is_set,
            memory=self._usage.memory,
            on_phase=on_phase,
        )

    def _outcome_of(self, work: Callable[[], Outcome], job: Job, device: str) -> Outcome:
        """What `work` comes to, whatever it raises."""
        try:
            return work()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it becomes an Outcome
            outcome = outcomes.decide(error, on_gpu=device == "gpu", priority=job.priority)
            # Of two attempts either may be the one; the other does not take it back.
            self.must_end = self.must_end or isinstance(error, DeviceBroken | SystemExit)
            outcomes.log_broken_off(error, outcome)
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

    def _is_alive(self) -> bool:
        return all(lifeline.is_alive for lifeline in list(self._lifelines))

    def _work(self, claimed: ClaimedJob, lifeline: Lifeline) -> JobResult:
        """From the stored input to the stored result. Raises whatever goes wrong."""
        job, claim, device = claimed.job, claimed.claim, claimed.device
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
            onlookers: list[Onlooker] = [LastFirst(self._turns.finishing), thumbnails, previews, result]
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
            "queued_seconds": claimed.queued_seconds,
            "fetch_seconds": fetched - started,
            **made.timings,
            "store_seconds": time.monotonic() - storing,
        }
        return self._result_of(job, device, made, key, sha256, timings)

    def _work_together(self, claimed: ClaimedJob, lifeline: SharedLifeline) -> JobResult:
        """As `_work`, with every worker that is free. Raises whatever goes wrong."""
        job, claim, device = claimed.job, claimed.claim, claimed.device
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
                timings = {"queued_seconds": claimed.queued_seconds, "fetch_seconds": fetch_seconds, **made.timings}
                return self._result_of(job, device, made, key, sha256, timings)
        # Of a large picture one copy is enough.
        del making
        return self._work(claimed, lifeline)

    def _make_shards(self, claimed: ClaimedShard, lifeline: HelpersLifeline) -> Helped:
        """From the stored input to the stored parts: the picture is fetched and decoded once. Raises whatever goes
        wrong with one of them."""
        job, claim, device = claimed.job, claimed.claim, claimed.device
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
                    following = self._claiming.claim_below(claim, job)
                    if following is None:
                        handover.finish()
                        if handover.stale is not None:
                            raise handover.stale
                        return Helped()
                    claim = following
                    log.info("shard.claimed", shard=claim.position, device=device, worker=self.presence.facts.id)
                    lifeline.works_on(claim)

    @contextmanager
    def _fetched(self, job: Job, folder: Path, lifeline: Lifeline) -> Iterator[BinaryIO]:
        """The picture handed in, as a file that is gone when the block ends."""
        lifeline.begins("fetch", expected_seconds=job.input_bytes / STORE_BYTES_PER_SECOND)
        ready = None if self._ahead is None else self._ahead.take(job.id)
        with ready or cast(BinaryIO, tempfile.TemporaryFile(dir=folder)) as source:
            if ready is None:
                self._storage.get(job.input_key, source)
            yield source

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

    def _call_helpers(self) -> None:
        """By a thread of its own: a network that waits for Redis would wait for as long as that is frozen."""
        if (broker := self._broker) is not None:

            def call() -> None:
                try:
                    call_helpers(self._database, broker, self._settings)
                except Unavailable as error:
                    log.info("shard.helpers_not_called", detail=error.detail)

            threading.Thread(target=call, name="helpers", daemon=True).start()


def _limit_seconds(job: Job) -> float:
    return max(LEAST_LIMIT_SECONDS, LIMIT_FACTOR * job.expected_seconds)


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
