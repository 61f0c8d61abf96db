"""What is kept, and for how long: objects are counted before and after everything that lets go of some."""

from __future__ import annotations

import io
from datetime import datetime, timedelta

import pytest

from shared import jobs
from shared.db import Database, clock, moment_of, new_id
from shared.models import BlobRemoval, Job, JobState, Upload
from shared.settings import Settings
from shared.storage import Storage
from tests.factories import a_claim, a_job, a_job_in, a_key, a_result
from worker.chores import sweep, sweep_strays

DAY = timedelta(days=1)


def put(storage: Storage, *keys: str) -> None:
    for key in keys:
        storage.put(key, io.BytesIO(b"blob"), "image/png")


def all_strays(database: Database, storage: Storage, settings: Settings, *, limit: int = 1000) -> int:
    """Rounds of the sweep until it is through; how many there were."""
    rounds, after = 0, ""
    while True:
        after = sweep_strays(database, storage, settings, after=after, limit=limit)
        rounds += 1
        if not after:
            return rounds


def test_an_id_tells_when_it_was_made(now: datetime) -> None:
    made = moment_of(new_id("job", now))
    assert made is not None
    assert abs((made - now).total_seconds()) <= 0.001
    for other in ("", "job", "job_1", "job_" + "u" * 26, "job_" + "z" * 26, "../../etc/passwd"):
        assert moment_of(other) is None, other


def test_a_picture_whose_job_was_never_written_goes_after_a_day(
    database: Database, storage: Storage, settings: Settings
) -> None:
    # Given the leavings of APIs that were killed between storing and committing, and of presigned uploads,
    with database.transaction() as session:
        now = clock(session)
        key = a_key(session, now)
        old, young = (now - 2 * DAY, now - timedelta(hours=3))
        orphans = [f"{jobs.blob_prefix(jobs.new_job_id(at))}/input" for at in (old, young)]
        uploads = [f"uploads/{new_id('upl', at)}/aa" for at in (old, young)]
        # and what belongs to somebody, however old,
        job = a_job(session, key, old)
        held = f"{job.blob_prefix}/input"
        upload_id = new_id("upl", old)
        session.add(
            Upload(
                id=upload_id,
                owner_key_id=key.id,
                blob_key=f"uploads/{upload_id}/bb",
                created_at=old,
                expires_at=now + DAY,
            )
        )
        held_upload = f"uploads/{upload_id}/bb"
    # and what is not ours to judge,
    foreign = ["readme.txt", "jobs/notes", "backups/2026/a/b", "jobs/job_by_hand/x/input"]
    put(storage, *orphans, *uploads, held, held_upload, *foreign)
    assert len(storage.keys()) == 10
    # When the sweep has come round, in pages of three,
    assert all_strays(database, storage, settings, limit=3) == 4
    # Then what is nobody's and a day old is gone, and nothing else.
    assert set(storage.keys()) == {orphans[1], uploads[1], held, held_upload, *foreign}
    assert all_strays(database, storage, settings) == 1
    assert len(storage.keys()) == 8


@pytest.mark.parametrize("end", [JobState.SUCCEEDED, JobState.CANCELED, JobState.RUNNING])
def test_results_of_attempts_that_lost_go_an_hour_after_the_jobs_end(
    sqlite_database: Database, storage: Storage, settings: Settings, end: JobState
) -> None:
    with sqlite_database.transaction() as session:
        now = clock(session)
        job = a_job(session, a_key(session, now), now)
        prefix = job.blob_prefix
        first = a_claim(session, job.id, now)
        jobs.release(session, first, error=None, delay_seconds=0, now=now)
        second = a_claim(session, job.id, now)
        if end == JobState.SUCCEEDED:
            jobs.succeed(session, second, a_result(second, key=f"{prefix}/result-2.png"), now=now)
        elif end == JobState.CANCELED:
            jobs.cancel(session, job.id, now=now)
            jobs.acknowledge_cancel(session, second, now=now)
    losers = [f"{prefix}/result-1.png", f"{prefix}/parts/0001-1.part"] + (
        [f"{prefix}/result-2.png"] if end == JobState.CANCELED else []
    )
    kept = [f"{prefix}/input", f"{prefix}/other-1.webp"]
    if end != JobState.CANCELED:
        kept.append(f"{prefix}/result-2.png")
    put(storage, *losers, *kept)
    # Its writer may be at work still.
    all_strays(sqlite_database, storage, settings)
    assert len(storage.keys()) == len(losers) + len(kept)
    with sqlite_database.transaction() as session:
        row = session.get_one(Job, job.id)
        if row.finished_at is not None:
            row.finished_at -= timedelta(seconds=jobs.LATE_WRITER_SECONDS + 1)
    all_strays(sqlite_database, storage, settings)
    left = set(kept) | (set(losers) if end == JobState.RUNNING else set())
    assert set(storage.keys()) == left


def test_what_a_late_writer_leaves_behind_a_swept_job_goes_too(
    sqlite_database: Database, storage: Storage, settings: Settings
) -> None:
    with sqlite_database.transaction() as session:
        now = clock(session)
        job, _ = a_job_in(JobState.SUCCEEDED, session, a_key(session, now), now - 3 * DAY, ttl_seconds=60)
    put(storage, f"{job.blob_prefix}/input", f"{job.blob_prefix}/result-1.png")
    assert sweep(sqlite_database, storage, settings) == 2
    put(storage, f"{job.blob_prefix}/result-1.png")
    all_strays(sqlite_database, storage, settings)
    assert storage.keys() == []


def test_parts_of_an_upload_that_was_broken_off_are_thrown_away(
    sqlite_database: Database, storage: Storage, settings: Settings
) -> None:
    begun = storage._client.create_multipart_upload(Bucket=storage.bucket, Key="jobs/x/y/result-1.png")
    storage._client.upload_part(
        Bucket=storage.bucket, Key="jobs/x/y/result-1.png", PartNumber=1, UploadId=begun["UploadId"], Body=b"part"
    )

    def under_way() -> int:
        return len(storage._client.list_multipart_uploads(Bucket=storage.bucket).get("Uploads", ()))

    with sqlite_database.reading() as session:
        now = clock(session)
    assert under_way() == 1
    assert storage.abort_uploads(begun_before=now - DAY) == 0
    all_strays(sqlite_database, storage, settings)
    assert under_way() == 1, "it may be under way"
    assert storage.abort_uploads(begun_before=now + DAY) == 1
    assert under_way() == 0


@pytest.mark.parametrize("state", list(JobState))
def test_deleting_a_job_in_any_state_leaves_no_blob(
    sqlite_database: Database, storage: Storage, settings: Settings, state: JobState
) -> None:
    with sqlite_database.transaction() as session:
        now = clock(session)
        key = a_key(session, now)
        job, _ = a_job_in(state, session, key, now)
        other, _ = a_job_in(state, session, key, now)
        prefix = job.blob_prefix
    put(storage, *(f"{prefix}/{name}" for name in ("input", "result-1.png", "result-2.png", "preview/3.webp")))
    put(storage, f"{other.blob_prefix}/input")
    assert len(storage.keys()) == 5
    with sqlite_database.transaction() as session:
        jobs.remove(session, job.id, now=clock(session))
    sweep(sqlite_database, storage, settings)
    assert storage.keys() == [f"{other.blob_prefix}/input"]
    if state != JobState.RUNNING:
        return
    # The worker that was in the middle of it stores its result after all: looked for once more, an hour later.
    put(storage, f"{prefix}/result-1.png")
    with sqlite_database.transaction() as session:
        (later,) = session.query(BlobRemoval).all()
        assert later.due_at > clock(session)
        later.due_at = clock(session)
    sweep(sqlite_database, storage, settings)
    assert storage.keys() == [f"{other.blob_prefix}/input"]
