"""What is swept, when, and that a sweep broken off loses nothing."""

from __future__ import annotations

import io
from datetime import timedelta

import pytest

from shared import jobs, keys, workers
from shared.db import Database, clock, new_id
from shared.errors import StorageUnavailable
from shared.models import BlobRemoval, IdempotencyRecord, Job, JobState, PageSession, Upload, Worker
from shared.settings import Settings
from shared.storage import Storage
from shared.workers import this_process
from tests.factories import a_job_in, a_key
from worker.chores import sweep


def stored(storage: Storage, *keys: str) -> None:
    for key in keys:
        storage.put(key, io.BytesIO(b"blob"), "image/png")


def test_pictures_of_an_expired_job_are_deleted_and_its_row_stays(
    sqlite_database: Database, storage: Storage, settings: Settings
) -> None:
    with sqlite_database.transaction() as session:
        now = clock(session)
        key = a_key(session, now)
        old, _ = a_job_in(JobState.SUCCEEDED, session, key, now, ttl_seconds=60)
        young, _ = a_job_in(JobState.SUCCEEDED, session, key, now, ttl_seconds=3600)
        old.expires_at = now - timedelta(seconds=1)
    stored(storage, f"{old.blob_prefix}/input", f"{old.blob_prefix}/result-1.png", f"{young.blob_prefix}/input")

    assert sweep(sqlite_database, storage, settings) == 2
    assert storage.keys() == [f"{young.blob_prefix}/input"]
    with sqlite_database.transaction() as session:
        assert session.get_one(Job, old.id).swept_at is not None
        assert session.get_one(Job, young.id).swept_at is None
        assert session.query(BlobRemoval).count() == 0
    assert sweep(sqlite_database, storage, settings) == 0


def test_blobs_of_a_removed_job_go_and_a_late_writers_blobs_go_later(
    sqlite_database: Database, storage: Storage, settings: Settings
) -> None:
    with sqlite_database.transaction() as session:
        now = clock(session)
        job, _ = a_job_in(JobState.RUNNING, session, a_key(session, now), now)
        prefix = jobs.remove(session, job.id, now=now)
    stored(storage, f"{prefix}/input")
    assert sweep(sqlite_database, storage, settings) == 1

    # The worker that was in the middle of it stores its result after all.
    stored(storage, f"{prefix}/result-1.png")
    assert sweep(sqlite_database, storage, settings) == 0
    with sqlite_database.transaction() as session:
        (later,) = session.query(BlobRemoval).all()
        later.due_at = clock(session)
    assert sweep(sqlite_database, storage, settings) == 1
    assert storage.keys() == []


def test_an_upload_that_no_job_took_is_deleted_when_it_expires(
    sqlite_database: Database, storage: Storage, settings: Settings
) -> None:
    with sqlite_database.transaction() as session:
        now = clock(session)
        key = a_key(session, now)
        for name, expires_at in (("old", now - timedelta(seconds=1)), ("new", now + timedelta(hours=1))):
            session.add(
                Upload(
                    id=f"upl_{name}",
                    owner_key_id=key.id,
                    blob_key=f"uploads/{name}",
                    created_at=now,
                    expires_at=expires_at,
                )
            )
    stored(storage, "uploads/old", "uploads/new")
    assert sweep(sqlite_database, storage, settings) == 1
    assert storage.keys() == ["uploads/new"]
    with sqlite_database.transaction() as session:
        assert [upload.id for upload in session.query(Upload)] == ["upl_new"]


def test_old_idempotency_records_sessions_and_lost_workers_are_forgotten(
    sqlite_database: Database, storage: Storage, settings: Settings
) -> None:
    with sqlite_database.transaction() as session:
        now = clock(session)
        key = a_key(session, now)
        for age_seconds in (settings.idempotency_ttl_seconds - 60, settings.idempotency_ttl_seconds + 60):
            session.add(
                IdempotencyRecord(
                    id=new_id("idem", now),
                    owner_key_id=key.id,
                    key=str(age_seconds),
                    created_at=now - timedelta(seconds=age_seconds),
                )
            )
        for age_seconds in (workers.KEPT_SECONDS - 60, workers.KEPT_SECONDS + 60):
            workers.enlist(session, this_process("relay"), now=now - timedelta(seconds=age_seconds))
    with sqlite_database.transaction() as session:
        for seconds in (60, -60):
            keys.begin_session(session, key.id, seconds=seconds, now=now)
    sweep(sqlite_database, storage, settings)
    with sqlite_database.transaction() as session:
        assert session.query(PageSession).count() == 1
        assert [r.key for r in session.query(IdempotencyRecord)] == [str(settings.idempotency_ttl_seconds - 60)]
        assert session.query(Worker).count() == 1


def test_a_removal_is_kept_until_its_blobs_are_gone(sqlite_database: Database, settings: Settings) -> None:
    with sqlite_database.transaction() as session:
        jobs.owe_blob_removal(session, "jobs/x/", now=clock(session))
    # Nothing listens at the address of these settings.
    nowhere = Storage(settings.model_copy(update={"storage_timeout_seconds": 0.2}))
    with pytest.raises(StorageUnavailable):
        sweep(sqlite_database, nowhere, settings)
    nowhere.close()
    with sqlite_database.transaction() as session:
        assert session.query(BlobRemoval).count() == 1
