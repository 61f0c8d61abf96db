"""One large picture by many workers, as the attempt that holds the job and those who help see it.

Both make the same thing: a part, some neighbouring bands computed as they were planned, so that the joined picture is
the one that a single worker makes (`CONTRIBUTING.md` has how nearly). What may happen to a shard is in
`shared.shards`; how parts are encoded and joined is in `worker.codec.parts`.
"""

from __future__ import annotations

import contextlib
import contextvars
import io
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np
from sqlalchemy.orm import Session

from shared import jobs, shards
from shared.db import Database, clock
from shared.errors import DatabaseUnavailable, EnlargerError, StaleAttempt, StorageUnavailable, WorkerLost
from shared.jobs import Claim
from shared.models import Job
from shared.pictures import format_named
from shared.settings import Settings
from shared.shards import ShardClaim, Standing
from shared.storage import Storage
from shared.telemetry import log
from worker.codec import Samples, parts
from worker.enlarging import Engine, Enlarged, MadePart, Making, NotTrue
from worker.fidelity import Sums
from worker.lifeline import STORE_BYTES_PER_SECOND, ShardsLifeline, ShardTaken, SharedLifeline
from worker.thumbnails import Thumbnails
from worker.tiling import Band, Region, Tile
from worker.upscale import Repairs, Work

T = TypeVar("T")

LOOK_SECONDS = 0.1
"""So often the attempt that holds the job looks whether others have made what it waits for."""

JOIN_LOOK_SECONDS = 1.0
"""So often it looks whether they have made what is to be joined next, while there is still much to make."""

LEAST_REACHES = 2
"""A shard in strips is at least so many times as high as its network sees. That is computed twice where a worker does
not go on from the shard above, which is seldom: once for each that helps, and a few times near the end."""

SAMPLED = ".npy"
"""Beside each part lies what it adds to the thumbnail of the result, under the part's key with this behind it."""


@dataclass(frozen=True)
class WrittenPart:
    """A part that is made and lies in a file of this host."""

    path: Path
    made: MadePart
    sampled: Samples
    """What it adds to the thumbnail of the result."""


@dataclass(frozen=True)
class StoredPart:
    key: str
    bytes: int
    facts: dict[str, Any]


def may_share(job: Job, engine: Engine, settings: Settings) -> bool:
    """Whether the job is large enough to share, and of a kind that can be. No SQL."""
    if job.split is not None:
        return True
    if not 0 < settings.split_above_px < job.input_width * job.input_height:
        return False
    if job.preview is not None or job.format not in parts.FORMATS:
        return False
    try:
        return engine.can_share(job.model, job.scale)
    except EnlargerError:
        # What is wrong with the model will be said on the ordinary way.
        return False


def runs_of(making: Making, settings: Settings) -> list[tuple[Band, ...]]:
    """The bands of each shard, from the top; one run where the work is not worth sharing."""
    least_rows = LEAST_REACHES * making.network.reach_px if making.work.plans[0].in_strips else 1
    return cut(making.work, settings.shard_output_px, least_rows=least_rows)


def cut(work: Work, shard_output_px: int, *, least_rows: int = 1) -> list[tuple[Band, ...]]:
    """The bands of the work in runs of about `shard_output_px` of the result, and of about `least_rows` of the input at
    least, from the top; one run where the work cannot be shared."""
    if len(work.plans) != 1:
        return [tuple(itertools.chain.from_iterable(plan.bands for plan in work.plans))]
    bands = work.plans[0].bands
    wanted = max(1, round(work.width * work.height * work.scale**2 / shard_output_px))
    wanted = min(wanted, work.height // least_rows)
    # Of few an even number: with three shards one of two workers would wait for the other.
    wanted = max(1, wanted - wanted % 2 if wanted > 1 else wanted)
    runs: list[list[Band]] = [[]]
    for band in bands:
        # Balanced: the n-th run ends where n shares of the picture do.
        if runs[-1] and band.region.y * wanted >= len(runs) * work.height:
            runs.append([])
        runs[-1].append(band)
    return [tuple(run) for run in runs]


def packed(bands: Sequence[Band]) -> shards.Bands:
    """As a shard's row holds them."""
    return [[[*_numbers(tile.keep), *_numbers(tile.read)] for tile in band.tiles] for band in bands]


def _numbers(region: Region) -> tuple[int, int, int, int]:
    return region.x, region.y, region.width, region.height


def unpacked(bands: shards.Bands) -> tuple[Band, ...]:
    found = []
    for index, numbers in enumerate(bands):
        tiles = tuple(Tile(Region(*each[:4]), Region(*each[4:])) for each in numbers)
        top, right = min(tile.keep.y for tile in tiles), max(tile.keep.right for tile in tiles)
        bottom = max(tile.keep.bottom for tile in tiles)
        found.append(Band(index, Region(0, top, right, bottom - top), tiles))
    return tuple(found)


class PartMaker:
    """Makes parts of one picture and stores them."""

    def __init__(
        self,
        storage: Storage,
        blob_prefix: str,
        folder: Path,
        making: Making,
        thumbnails: Thumbnails,
        terms: dict[str, Any],
    ) -> None:
        """`making` shows its rows to `thumbnails`, among others. `terms`: what holds for all shards of the job."""
        self._storage, self._blob_prefix, self._folder = storage, blob_prefix, folder
        self._making, self._thumbnails, self._terms = making, thumbnails, terms

    def make(self, claim: ShardClaim) -> WrittenPart:
        """Raises as `Making.write_part`."""
        path = self._folder / claim.part_name
        made = self._making.write_part(
            path,
            unpacked(claim.bands),
            in_strips=self._terms["in_strips"],
            rows_in_strip=self._terms["rows_in_strip"],
            precise=self._terms["precise"],
        )
        seen = self._thumbnails.seen()
        # A part of few rows may have none that the thumbnail is made of.
        return WrittenPart(path, made, np.empty((0,), np.uint8) if seen is None else seen)

    def store(self, claim: ShardClaim, written: WrittenPart, on_bytes: Callable[[int], None]) -> StoredPart:
        """The part, whose file is gone afterwards. Raises StorageUnavailable."""
        # Named after the try: a worker that wakes up late must not overwrite the winner's part.
        key = jobs.parts_prefix(self._blob_prefix) + claim.part_name
        try:
            sampled = io.BytesIO()
            np.save(sampled, written.sampled)
            sampled.seek(0)
            self._storage.put(key + SAMPLED, sampled, "application/octet-stream")
            with written.path.open("rb") as file:
                self._storage.put(key, file, "application/octet-stream", on_bytes=on_bytes)
        except BaseException:
            with contextlib.suppress(StorageUnavailable):
                self._storage.remove(key)
            raise
        finally:
            written.path.unlink(missing_ok=True)
        return StoredPart(key, written.made.bytes, _facts(written.made))


def _facts(made: MadePart) -> dict[str, Any]:
    return {
        "part": made.facts,
        "sums": asdict(made.sums),
        "repairs": asdict(made.repairs),
        "timings": {name: round(seconds, 4) for name, seconds in made.timings.items()},
    }


class _Beside(Generic[T]):
    """Something that another thread does while the network goes on."""

    def __init__(self, act: Callable[[Callable[[int], None]], T], thread: ThreadPoolExecutor) -> None:
        """`act` is given what it is to tell of bytes that have come to storage, or from there."""
        self._bytes = 0
        self._future = thread.submit(contextvars.copy_context().run, act, self._tell)

    def _tell(self, bytes: int) -> None:
        self._bytes += bytes

    def result(self, lifeline: ShardsLifeline) -> T:
        """Waits for it; as long as bytes go, the lease is renewed. Raises what `act` has raised."""
        told = self._bytes
        while not wait([self._future], LOOK_SECONDS).done:
            # By this thread, whose own progress renews the lease otherwise: never by both at once.
            if (seen := self._bytes) > told:
                lifeline.sent(seen - told)
                told = seen
        return self._future.result()

    def end(self) -> None:
        """Waits for it, whatever it comes to."""
        wait([self._future])


class Handover:
    """Brings parts to storage and into SQL while the network makes the next: one at a time.

    A context manager: leaving it waits for the one under way. What goes wrong with a part gives its shard back, and
    comes out of the next call; that it comes too late is `stale`.
    """

    def __init__(
        self,
        database: Database,
        storage: Storage,
        lifeline: ShardsLifeline,
        maker: PartMaker,
        on_recorded: Callable[[], None] = lambda: None,
    ) -> None:
        self._database, self._storage, self._lifeline, self._maker = database, storage, lifeline, maker
        self._on_recorded = on_recorded
        self.stale: StaleAttempt | None = None
        """Why the last part was not recorded, where another worker has its shard or the job has ended."""
        self._under_way: _Beside[None] | None = None
        # One for all parts: a new one took over the allocator's memory of a thread that had encoded and was gone, so
        # that the next to encode filled another.
        self._thread = ThreadPoolExecutor(1, "handover")
        self._expected_seconds = 0.0

    def take(self, claim: ShardClaim, written: WrittenPart) -> None:
        """The next part; waits for the one before. Where it raises, this one has not been taken."""
        try:
            self.finish()
        except BaseException:
            written.path.unlink(missing_ok=True)
            raise
        self._lifeline.stores(claim)
        self.stale = None
        self._expected_seconds = written.made.bytes / STORE_BYTES_PER_SECOND
        self._under_way = _Beside(partial(self._hand_over, claim, written), self._thread)

    @property
    def is_under_way(self) -> bool:
        return self._under_way is not None

    def finish(self) -> None:
        """Returns when all that was taken is recorded."""
        if self._under_way is None:
            return
        self._lifeline.begins("upscale", expected_seconds=self._expected_seconds)
        try:
            self._under_way.result(self._lifeline)
        finally:
            self._ended()

    def _ended(self) -> None:
        if self._under_way is not None:
            self._under_way.end()
            self._under_way = None
            self._lifeline.stores(None)

    def _hand_over(self, claim: ShardClaim, written: WrittenPart, on_bytes: Callable[[int], None]) -> None:
        try:
            part = self._maker.store(claim, written, on_bytes)
            self._record(claim, part)
        except StaleAttempt as error:
            self.stale = error
            log.info("shard.taken", detail=error.detail)
        except BaseException:
            # Not counted: what has gone wrong is no fault of the shard's.
            give_back(self._database, claim)
            raise
        else:
            self._on_recorded()

    def _record(self, claim: ShardClaim, part: StoredPart) -> None:
        """The shard is made. Raises StaleAttempt where it is somebody else's by now, and the part is gone then."""

        def made(session: Session, now: datetime) -> None:
            shards.made(session, claim, key=part.key, bytes=part.bytes, facts=part.facts, now=now)

        try:
            _written(self._database, self._lifeline, made)
        except StaleAttempt:
            with contextlib.suppress(StorageUnavailable):
                self._storage.remove(part.key)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended()
        self._thread.shutdown()


def give_back(database: Database, claim: ShardClaim) -> None:
    """Whoever is next may take the shard, and the try does not count. Where that cannot be written its lease passes."""
    with contextlib.suppress(StaleAttempt, DatabaseUnavailable), database.transaction() as session:
        shards.give_back(session, claim)


class _GivenUp(Exception):
    """The result is not to be joined after all."""


class _Joining:
    """Joins the parts of a result while the last of them are made: each as soon as all above it are there.

    A context manager: leaving it before `finish` has returned throws away what was joined.
    """

    def __init__(
        self,
        database: Database,
        storage: Storage,
        job_id: str,
        key: str,
        mime_type: str,
        front: bytes,
        sampled_of: Callable[[str], Samples],
    ) -> None:
        self._database, self._storage, self._job_id, self._key = database, storage, job_id, key
        self._mime_type, self._front, self._sampled_of = mime_type, front, sampled_of
        self.sampled: list[Samples] = []
        """Of the parts joined so far, from the top, what they add to the thumbnail."""
        self._turn = threading.Condition()
        self._tail: bytes | None = None
        self._has_news = self._is_given_up = False
        self._thread = ThreadPoolExecutor(1, "joining")
        self._joined = _Beside(self._join, self._thread)

    def look(self) -> None:
        """One more part has been made."""
        with self._turn:
            self._has_news = True
            self._turn.notify_all()

    def finish(self, tail: bytes, lifeline: ShardsLifeline) -> tuple[int, str]:
        """All parts are made, and `tail` stands behind the last: size and SHA-256 of the result. Raises
        StorageUnavailable or DatabaseUnavailable, also where that was away a while ago."""
        with self._turn:
            self._tail = tail
            self._turn.notify_all()
        return self._joined.result(lifeline)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._turn:
            self._is_given_up = True
            self._turn.notify_all()
        self._thread.shutdown()

    def _join(self, on_bytes: Callable[[int], None]) -> tuple[int, str]:
        return self._storage.join(self._key, self._pieces(), self._mime_type, on_bytes=on_bytes)

    def _pieces(self) -> Iterator[bytes | str]:
        yield self._front
        joined = 0
        while True:
            with self._turn:
                self._has_news, tail = False, self._tail
                if self._is_given_up:
                    raise _GivenUp
            with self._database.reading() as session:
                keys = shards.keys_from(session, self._job_id, joined)
            for key in keys:
                self.sampled.append(self._sampled_of(key))
                yield key
            joined += len(keys)
            if tail is not None:
                # It was known before the keys were asked for, and it comes after the last of them. Where the job has
                # ended since there are none, and what this makes of it nobody will take.
                yield tail
                return
            if not keys:
                with self._turn:
                    self._turn.wait_for(
                        lambda: self._has_news or self._tail is not None or self._is_given_up, JOIN_LOOK_SECONDS
                    )


class Sharing:
    """The attempt that holds the job: shares it, works on it as all others do, and joins what has been made."""

    def __init__(
        self,
        database: Database,
        storage: Storage,
        settings: Settings,
        claim: Claim,
        job: Job,
        worker_id: str,
        lifeline: SharedLifeline,
        call_helpers: Callable[[], None] = lambda: None,
    ) -> None:
        """`call_helpers` is called once the job is shared, and must be quick: the relay calls them otherwise."""
        self._call_helpers = call_helpers
        self._database, self._storage, self._settings = database, storage, settings
        self._claim, self._job, self._worker_id, self._lifeline = claim, job, worker_id, lifeline

    def make(self, making: Making, folder: Path, thumbnails: Thumbnails, key: str) -> tuple[Enlarged, str]:
        """The result, stored under `key`, and its SHA-256. Raises whatever goes wrong; parts that are made stay for the
        next attempt."""
        terms = self._terms(making)
        try:
            return self._made(making, folder, thumbnails, terms, key)
        except NotTrue:
            # As an ordinary job: once more, in float32, where half precision may be to blame.
            if terms["precise"]:
                raise
        terms = {**terms, "precise": True}
        self._write(lambda session, _: shards.begin_again(session, self._claim, terms))
        return self._made(making, folder, thumbnails, terms, key)

    def _made(
        self, making: Making, folder: Path, thumbnails: Thumbnails, terms: dict[str, Any], key: str
    ) -> tuple[Enlarged, str]:
        maker = PartMaker(self._storage, self._job.blob_prefix, folder, making, thumbnails, terms)
        front = parts.front(making.layout(terms["rows_in_strip"]), making.metadata)
        joining: contextlib.AbstractContextManager[_Joining | None] = contextlib.nullcontext()
        if front is not None:
            mime_type = format_named(self._job.format).mime_type
            joining = _Joining(self._database, self._storage, self._claim.job_id, key, mime_type, front, self._sampled)
        with joining as early:
            with making.clock.time("upscale"):
                self._make_parts(maker, (lambda: None) if early is None else early.look)
            return self._joined(making, thumbnails, terms, key, early)

    def _terms(self, making: Making) -> dict[str, Any]:
        """What holds for all shards; they are written where an earlier attempt has not done so."""
        if self._job.split is not None:
            return self._job.split
        runs = runs_of(making, self._settings)
        rows = [sum(band.region.height for band in run) * making.wanted.scale for run in runs]
        layout = making.layout(1)
        row_bytes = layout.width * layout.channels * layout.bits // 8
        terms = {
            "precise": not making.network.prefers_half,
            "in_strips": making.work.plans[0].in_strips,
            "rows_in_strip": parts.rows_in_strip(rows[:-1] or rows, row_bytes),
        }
        self._write(lambda session, _: shards.begin(session, self._claim, [packed(run) for run in runs], terms))
        log.info("job.shared", shards=len(runs))
        self._call_helpers()
        return terms

    def _make_parts(self, maker: PartMaker, on_recorded: Callable[[], None]) -> None:
        below: int | None = None
        with Handover(self._database, self._storage, self._lifeline, maker, on_recorded) as handover:
            while True:
                mine, standing = self._write(partial(self._next, below))
                if mine is not None:
                    self._make_part(maker, handover, mine, standing)
                    below = mine.position
                elif handover.is_under_way:
                    handover.finish()
                elif standing.all_made:
                    return
                elif standing.lost is not None:
                    raise WorkerLost(
                        f"Shard {standing.lost} of the picture has cost {self._settings.max_attempts} workers.",
                        shard=standing.lost,
                    )
                else:
                    self._lifeline.waits(standing)
                    # Nobody sets it: the wait is only a wait.
                    threading.Event().wait(LOOK_SECONDS)

    def _next(self, below: int | None, session: Session, now: datetime) -> tuple[ShardClaim | None, Standing]:
        max_tries = self._settings.max_attempts
        mine = shards.claim(
            session,
            self._claim,
            worker_id=self._worker_id,
            max_tries=max_tries,
            lease_seconds=self._settings.lease_seconds,
            now=now,
            below=below,
        )
        standing = shards.standing(session, self._claim.job_id, max_tries=max_tries, now=now, without=mine)
        if mine is None and standing.shards == 0:
            raise self._ended()
        return mine, standing

    def _ended(self) -> StaleAttempt:
        return StaleAttempt(f"The shards of {self._claim.job_id} are gone: it has ended.", job_id=self._claim.job_id)

    def _make_part(self, maker: PartMaker, handover: Handover, claim: ShardClaim, others: Standing) -> None:
        self._lifeline.works_on(claim, others)
        try:
            handover.take(claim, maker.make(claim))
        except ShardTaken as error:
            log.info("shard.taken", detail=str(error))
        except BaseException:
            # Not counted: what has gone wrong counts against the job.
            give_back(self._database, claim)
            raise
        finally:
            self._lifeline.works_on(None)

    def _joined(
        self, making: Making, thumbnails: Thumbnails, terms: dict[str, Any], key: str, early: _Joining | None
    ) -> tuple[Enlarged, str]:
        with self._database.reading() as session:
            rows = shards.of_job(session, self._claim.job_id)
        if not rows:
            raise self._ended()
        facts = [row.facts or {} for row in rows]
        keys = [str(row.key) for row in rows]
        sums = [Sums(**each["sums"]) for each in facts]
        repairs = Repairs(**{name: sum(each["repairs"][name] for each in facts) for name in asdict(Repairs())})
        compare_seconds = sum(each["timings"].get("compare_seconds", 0.0) for each in facts)
        report = making.report(
            sum(sums[1:], sums[0]), repairs, precise=terms["precise"], compare_seconds=compare_seconds
        )
        labels = making.labels()
        making.clock.timings["shards"] = float(len(rows))
        format = format_named(self._job.format)
        all_bytes = sum(row.bytes or 0 for row in rows)
        self._lifeline.begins("store", expected_seconds=all_bytes / STORE_BYTES_PER_SECOND)
        with making.clock.time("store"):
            layout = making.layout(terms["rows_in_strip"])
            head, tail = parts.joined(layout, [each["part"] for each in facts], making.metadata)
            sha256 = ""
            if early is not None:
                try:
                    size, sha256 = early.finish(tail, self._lifeline)
                    sampled = early.sampled
                except (StorageUnavailable, DatabaseUnavailable) as error:
                    # It may have been away while the parts were made, and be back.
                    log.info("result.part_not_stored", detail=error.detail)
            if not sha256:
                sampled = [self._sampled(each) for each in keys]
                pieces: list[bytes | str] = [head, *keys, tail]
                size, sha256 = self._storage.join(key, pieces, format.mime_type, on_bytes=self._lifeline.sent)
            with thumbnails.storing_result([each for each in sampled if each.size]):
                pass
        self._lifeline.raise_if_stale()
        return making.enlarged(labels, size, report), sha256

    def _sampled(self, key: str) -> Samples:
        file = io.BytesIO()
        self._storage.get(key + SAMPLED, file)
        file.seek(0)
        sampled: Samples = np.load(file)
        return sampled

    def _write(self, act: Callable[[Session, datetime], T]) -> T:
        return _written(self._database, self._lifeline, act)


def _written(database: Database, lifeline: ShardsLifeline, act: Callable[[Session, datetime], T]) -> T:
    """What `act` answers, in a transaction. A database that is away is waited for as long as the lease lasts."""
    while True:
        try:
            with database.transaction() as session:
                return act(session, clock(session))
        except DatabaseUnavailable as error:
            if not lifeline.is_alive:
                raise
            log.warning("job.progress_not_written", detail=error.detail)
        threading.Event().wait(LOOK_SECONDS)
