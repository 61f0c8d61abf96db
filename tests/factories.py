"""Rows for tests, made the way the product makes them: a job in a state has come there by the verbs of `shared.jobs`,
so no factory can build a row that could not exist."""

from __future__ import annotations

import io
import math
import random
from datetime import datetime, timedelta
from typing import Any

from PIL import Image
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from shared import jobs, keys
from shared.db import new_id
from shared.errors import InternalError, InvalidImage
from shared.jobs import Claim, JobInput, JobOptions, JobResult
from shared.models import ApiKey, Batch, Endpoint, Job, JobState

LEASE_SECONDS = 20.0


def a_key(session: Session, now: datetime, *, name: str = "tester", scopes: tuple[str, ...] = ("jobs",)) -> ApiKey:
    return keys.create(session, name=name, scopes=scopes, now=now)[0]


def options(**changes: Any) -> JobOptions:
    return JobOptions(**{"model": "srgan", "scale": 4, "format": "png", "queue": "cpu.interactive", **changes})


def picture(now: datetime, **changes: Any) -> JobInput:
    job_id = jobs.new_job_id(now)
    prefix = jobs.blob_prefix(job_id)
    facts: dict[str, Any] = {
        "job_id": job_id,
        "blob_prefix": prefix,
        "key": f"{prefix}/input",
        "width": 8,
        "height": 6,
        "format": "png",
        "bytes": 100,
        "sha256": "ab" * 32,
    }
    return JobInput(**facts | changes)


def a_job(
    session: Session,
    key: ApiKey | str,
    now: datetime,
    *,
    max_attempts: int = 3,
    max_queued_jobs: int = 1000,
    name: str | None = None,
    **asked: Any,
) -> Job:
    """A queued job; `asked` are fields of JobOptions."""
    return jobs.submit(
        session,
        owner_key_id=key if isinstance(key, str) else key.id,
        options=options(**asked),
        picture=picture(now, name=name),
        max_attempts=max_attempts,
        max_queued_jobs=max_queued_jobs,
        now=now,
    )


def a_claim(
    session: Session,
    job_id: str,
    now: datetime,
    *,
    worker_id: str = "w1",
    device: str = "cpu",
    lease_seconds: float = LEASE_SECONDS,
) -> Claim:
    claim = jobs.claim(session, job_id, worker_id=worker_id, device=device, lease_seconds=lease_seconds, now=now)
    assert claim is not None, f"{job_id} cannot be claimed"
    return claim


def a_result(claim: Claim, **changes: Any) -> JobResult:
    facts: dict[str, Any] = {
        "key": f"jobs/{claim.job_id}/result-{claim.attempt}.png",
        "width": 32,
        "height": 24,
        "bytes": 1000,
        "sha256": "cd" * 32,
        "labels": [{"label": "goldfinch", "index": 11, "probability": 0.93}],
        "timings": {"queued_seconds": 1.0, "upscale_seconds": 2.5},
    }
    return JobResult(**facts | changes)


def a_job_in(state: JobState, session: Session, key: ApiKey | str, now: datetime, **asked: Any) -> tuple[Job, Claim]:
    """A job brought to `state` by the verbs, and the claim of its newest attempt (number 0 where none was made)."""
    if state == JobState.EXPIRED:
        asked["deadline_seconds"] = 1
    job = a_job(session, key, now, **asked)
    claim = Claim(job.id, 0)
    if state in (JobState.RUNNING, JobState.SUCCEEDED, JobState.FAILED):
        claim = a_claim(session, job.id, now)
    match state:
        case JobState.SUCCEEDED:
            jobs.succeed(session, claim, a_result(claim), now=now)
        case JobState.FAILED:
            jobs.fail(session, claim, InvalidImage("not a picture"), retry_delay_seconds=2, now=now)
        case JobState.CANCELED:
            jobs.cancel(session, job.id, now=now)
        case JobState.EXPIRED:
            assert jobs.expire_overdue(session, now=now + timedelta(seconds=1)) == [job.id]
        case _:
            pass
    session.refresh(job)
    assert job.state == state
    return job, claim


def many_jobs(session: Session, key: ApiKey | str, count: int, *, now: datetime, queued: float = 0.02) -> list[str]:
    """A week of work, in a few statements: that share of it `queued`, of the rest nine in ten succeeded. Copies of a
    job that was handed in. Returns the ids in the order of their making; the last job is a queued one."""
    chance = random.Random(5)
    made = a_job(session, key, now)
    template = dict(session.execute(select(Job.__table__).where(Job.id == made.id)).mappings().one())
    ended = [JobState.SUCCEEDED] * 92 + [JobState.FAILED] * 5 + [JobState.CANCELED] * 3
    rows: list[dict[str, Any]] = []
    for number in range(1, count):
        at = now - timedelta(days=7) * (count - number) / count
        state = JobState.QUEUED if chance.random() < queued else chance.choice(ended)
        is_over, is_made = state != JobState.QUEUED, state == JobState.SUCCEEDED
        rows.append(
            {
                **template,
                # Not by `new_id`: among 100,000 of the same few milliseconds none is the newest.
                "id": f"job_{number:026}",
                "model": chance.choice(("srgan", "srresnet")),
                "state": state,
                "created_at": at,
                "queued_at": at,
                "attempt": int(is_over),
                "started_at": at + timedelta(seconds=chance.random()) if is_over else None,
                "finished_at": at + timedelta(seconds=1 + chance.random() * 9) if is_over else None,
                "result_width": 1024 if is_made else None,
                "result_height": 1024 if is_made else None,
                "result_bytes": 10**6 if is_made else None,
                "error_code": "invalid-image" if state == JobState.FAILED else None,
                "error_detail": "not a picture" if state == JobState.FAILED else None,
            }
        )
    for start in range(0, len(rows), 10_000):
        session.execute(insert(Job.__table__), rows[start : start + 10_000])
    return [*(row["id"] for row in rows), made.id]


def a_batch(session: Session, key: ApiKey, now: datetime, *, total: int, webhook_url: str | None = None) -> Batch:
    """A batch row as the API writes it, before the jobs that name it."""
    batch = Batch(
        id=new_id("batch", now),
        owner_key_id=key.id,
        created_at=now,
        total=total,
        remaining=total,
        webhook_url=webhook_url,
    )
    session.add(batch)
    session.flush()
    return batch


def an_endpoint(session: Session, key: ApiKey, now: datetime, *, url: str, events: tuple[str, ...]) -> Endpoint:
    endpoint = Endpoint(id=new_id("we", now), owner_key_id=key.id, url=url, events=list(events), created_at=now)
    session.add(endpoint)
    session.flush()
    return endpoint


def retryable() -> InternalError:
    return InternalError("the attempt went wrong")


def a_png(width: int = 16, height: int = 12, seed: int = 1) -> bytes:
    """A small RGB picture with some structure, as PNG bytes."""
    pixels = bytes((x * 7 * seed + y * 3 + c * 80) % 256 for y in range(height) for x in range(width) for c in range(3))
    file = io.BytesIO()
    Image.frombytes("RGB", (width, height), pixels).save(file, "PNG")
    return file.getvalue()


def a_scene(width: int, height: int) -> bytes:
    """As `a_png`, about as hard to compress as a photograph: soft shapes and some noise."""
    chance = random.Random(3)
    pixels = bytearray()
    for y in range(height):
        for x in range(width):
            wave = 90 * math.sin(9 * x / width + 4 * y / height)
            pixels += bytes(int(128 + wave * tint + chance.gauss(0, 6)) for tint in (1.0, 0.8, -0.9))
    file = io.BytesIO()
    Image.frombytes("RGB", (width, height), bytes(pixels)).save(file, "PNG")
    return file.getvalue()
