"""The tasks of the chores queue: webhooks, renditions and sweeps. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from celery import shared_task
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from shared import jobs, keys, workers
from shared.db import Database, clock, moment_of
from shared.errors import StaleAttempt, Unavailable
from shared.models import TERMINAL_STATES, BlobRemoval, IdempotencyRecord, Job, Upload
from shared.outbox import CHORES_QUEUE, DELIVER_WEBHOOK, MAKE_RENDITION, SWEEP_BLOBS
from shared.outgoing import GuardedClient
from shared.settings import Settings
from shared.storage import Storage
from shared.telemetry import log
from shared.workers import Presence
from worker.app import ProcessLoader
from worker.webhooks import Postman

REMOVALS_PER_SWEEP = 500
"""A sweep is one chore among many: what is left waits for the next."""
KEYS_PER_SWEEP = 1000
"""Keys of storage that one sweep holds against SQL; the next goes on behind them, round and round."""
STRAY_AFTER_SECONDS = 86400
"""A blob whose row is not there may be about to get one; after a day it is nobody's."""


class Chores:
    """What a chores process works with; made once in each."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(settings.sqlalchemy_url)
        self.storage = Storage(settings)
        self.strays_after = ""
        self.postman = Postman(self.database, GuardedClient(settings.allow_private_addresses), settings)
        self.presence = Presence(
            self.database,
            workers.this_process("chores", queues=[CHORES_QUEUE]),
            interval_seconds=settings.worker_lost_after_seconds / 3,
        )

    def close(self) -> None:
        self.presence.stop()
        self.storage.close()
        self.database.close()


class ChoresLoader(ProcessLoader):
    chores: Chores
    """Of a child; the main process has none."""

    def process_started(self) -> None:
        self.chores = Chores(self.settings)
        self.chores.presence.start()

    def process_stopped(self) -> None:
        self.chores.close()


@shared_task(name=DELIVER_WEBHOOK, bind=True)
def deliver_webhook(self: Any, delivery_id: str) -> None:
    """One try at a delivery; nothing where it is not due. What fails here is tried again when the relay asks."""
    try:
        self.app.loader.chores.postman.deliver(delivery_id)
    except StaleAttempt as error:
        log.info("webhook.stale", delivery_id=delivery_id, detail=error.detail)
    except Unavailable as error:
        log.warning("webhook.not_recorded", delivery_id=delivery_id, code=error.code, detail=error.detail)


@shared_task(name=MAKE_RENDITION, bind=True)
def make_rendition(self: Any, job_id: str, kind: str) -> None:
    """One try at a stored result in another form; nothing where it is not owed."""
    # Here and not above: libvips starts threads when it is loaded, and they do not survive the fork of this process.
    from worker import renditions

    chores = self.app.loader.chores
    try:
        renditions.make(chores.database, chores.storage, job_id, kind)
    except StaleAttempt as error:
        log.info("rendition.stale", job_id=job_id, kind=kind, detail=error.detail)
    except Unavailable as error:
        log.warning("rendition.not_recorded", job_id=job_id, kind=kind, code=error.code, detail=error.detail)


@shared_task(name=SWEEP_BLOBS, bind=True)
def sweep_blobs(self: Any) -> None:
    """Lets go of what has expired. What cannot be done now is left for the next sweep."""
    chores = self.app.loader.chores
    try:
        sweep(chores.database, chores.storage, chores.settings)
        chores.strays_after = sweep_strays(chores.database, chores.storage, chores.settings, after=chores.strays_after)
    except Unavailable as error:
        log.warning("sweep.broken_off", code=error.code, detail=error.detail)


def sweep(database: Database, storage: Storage, settings: Settings) -> int:
    """Forgets expired rows, then deletes the blobs nobody needs any more. Returns how many blobs were deleted.

    Each removal is a row until its blobs are gone, so a sweep broken off in between only leaves work for the next, and
    two sweeps at once do no harm. Raises Unavailable.
    """
    with database.transaction() as session:
        now = clock(session)
        swept = jobs.sweep_expired(session, now=now, limit=REMOVALS_PER_SWEEP)
        uploads = session.execute(
            delete(Upload)
            .where(Upload.id.in_(select(Upload.id).where(Upload.expires_at < now).limit(REMOVALS_PER_SWEEP)))
            .returning(Upload.blob_key)
        ).scalars()
        for key in uploads.all():
            jobs.owe_blob_removal(session, key, now=now)
        oldest = now - timedelta(seconds=settings.idempotency_ttl_seconds)
        session.execute(delete(IdempotencyRecord).where(IdempotencyRecord.created_at < oldest))
        keys.forget_sessions(session, now=now)
        forgotten = workers.forget_lost(session, now=now)
    removed = 0
    with database.reading() as session:
        due = session.execute(
            select(BlobRemoval.id, BlobRemoval.prefix)
            .where(BlobRemoval.due_at <= clock(session))
            .order_by(BlobRemoval.due_at)
            .limit(REMOVALS_PER_SWEEP)
        ).all()
    for removal in due:
        removed += storage.remove(removal.prefix)
        with database.transaction() as session:
            session.execute(delete(BlobRemoval).where(BlobRemoval.id == removal.id))
    if swept or removed or forgotten:
        log.info("sweep.done", jobs=len(swept), removals=len(due), blobs=removed, workers_forgotten=forgotten)
    return removed


def sweep_strays(
    database: Database, storage: Storage, settings: Settings, *, after: str = "", limit: int = KEYS_PER_SWEEP
) -> str:
    """Deletes blobs that belong to nothing any more, among the next `limit` keys behind `after`. Returns where the next
    sweep is to go on, "" at the end.

    Three kinds are left behind by processes that were killed at the wrong moment, and no row knows of them: a picture
    whose job was never written, a result of an attempt that lost its job, the parts of an upload that was broken off.
    Raises Unavailable.
    """
    keys_found = storage.page("", after=after, limit=limit)
    with database.reading() as session:
        now = clock(session)
        strays = _strays(session, keys_found, now, settings)
    for key in strays:
        storage.remove(key)
    if not after:
        storage.abort_uploads(begun_before=now - timedelta(seconds=STRAY_AFTER_SECONDS))
    if strays:
        log.info("sweep.strays", strays=len(strays))
    return keys_found[-1] if len(keys_found) == limit else ""


def _strays(session: Session, keys_found: Sequence[str], now: datetime, settings: Settings) -> list[str]:
    owners = {key: key.split("/")[1] for key in keys_found if key.startswith(("jobs/", "uploads/")) and "/" in key[8:]}
    ids = sorted(set(owners.values()))
    held_jobs = {job.id: job for job in session.scalars(select(Job).where(Job.id.in_(ids), Job.swept_at.is_(None)))}
    held_uploads = set(session.scalars(select(Upload.id).where(Upload.id.in_(ids))))
    longest_seconds = STRAY_AFTER_SECONDS + settings.upload_ttl_seconds
    strays = []
    for key, owner in owners.items():
        made_at = moment_of(owner)
        job = held_jobs.get(owner)
        if job is not None:
            if _is_a_losers(key, job, now):
                strays.append(key)
        elif owner not in held_uploads and made_at is not None and made_at < now - timedelta(seconds=longest_seconds):
            strays.append(key)
    return strays


def _is_a_losers(key: str, job: Job, now: datetime) -> bool:
    """A result that is not the job's: of an attempt that was taken for dead, or came after a cancel; or a part of one.
    While the job may still run, and for a while after its end, a late worker may be writing."""
    is_result = key.startswith((f"{job.blob_prefix}/result-", jobs.parts_prefix(job.blob_prefix)))
    ended_at = job.finished_at if job.state in TERMINAL_STATES else None
    is_over = ended_at is not None and ended_at < now - timedelta(seconds=jobs.LATE_WRITER_SECONDS)
    return is_result and key != job.result_key and is_over
