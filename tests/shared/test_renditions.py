"""A rendition's life, on both databases: who may make it, how often, and how many at once."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from sqlalchemy.orm import Session

from shared import jobs, renditions
from shared.db import Database
from shared.errors import InternalError, InvalidImage, NotFound, StaleAttempt
from shared.models import Job, JobState, Rendition
from tests.factories import a_job_in, a_key

RESEND_SECONDS = 60.0


def a_result_of(session: Session, now: datetime) -> Job:
    return a_job_in(JobState.SUCCEEDED, session, a_key(session, now), now)[0]


def due(session: Session, now: datetime) -> list[tuple[str, str]]:
    return renditions.due(session, resend_after_seconds=RESEND_SECONDS, now=now)


def test_it_is_asked_for_claimed_and_made_once(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job = a_result_of(session, now)
        first = renditions.ask(session, job, "webp", now=now)
        assert renditions.ask(session, job, "webp", now=now) is first
        assert renditions.view(first)["status"] == "pending"
        assert due(session, now) == [(job.id, "webp")]
        assert due(session, now) == [], "a message is on its way"
        claim = renditions.claim(session, job.id, "webp", now=now)
        assert claim is not None
        assert renditions.claim(session, job.id, "webp", now=now) is None
        renditions.made(session, claim, key="k", bytes=7, now=now)
        view = renditions.view(renditions.found(session, job.id, "webp"))
        assert (view["status"], view["bytes"], view["url"]) == ("made", 7, f"/v1/jobs/{job.id}/renditions/webp/file")
        assert renditions.claim(session, job.id, "webp", now=now) is None
        with pytest.raises(StaleAttempt):
            renditions.made(session, claim, key="other", bytes=8, now=now)
        with pytest.raises(NotFound):
            renditions.found(session, job.id, "avif")


def test_a_lost_message_is_sent_again_and_one_the_broker_refused_at_once(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job = a_result_of(session, now)
        renditions.ask(session, job, "webp", now=now)
        owed = due(session, now)
        renditions.not_sent(session, owed)
        assert due(session, now) == owed
        assert due(session, now + timedelta(seconds=RESEND_SECONDS - 1)) == []
        assert due(session, now + timedelta(seconds=RESEND_SECONDS + 1)) == owed


def test_a_worker_that_was_lost_is_followed_by_another_and_fenced_off(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job = a_result_of(session, now)
        renditions.ask(session, job, "webp", now=now)
        claims = []
        for _ in range(renditions.MAX_TRIES):
            assert due(session, now) == [(job.id, "webp")]
            claim = renditions.claim(session, job.id, "webp", now=now)
            assert claim is not None
            claims.append(claim)
            now += timedelta(hours=1)
        with pytest.raises(StaleAttempt):
            renditions.made(session, claims[0], key="late", bytes=1, now=now)
        # The third was lost too: it has failed, and says so.
        assert due(session, now) == []
        view = renditions.view(session.get_one(Rendition, (job.id, "webp"), populate_existing=True))
        assert (view["status"], view["error"]["code"]) == ("failed", "worker-lost")
        # Asked again, it begins anew; its number goes on.
        renditions.ask(session, job, "webp", now=now)
        assert due(session, now) == [(job.id, "webp")]
        fresh = renditions.claim(session, job.id, "webp", now=now)
        assert fresh is not None
        assert fresh.number == renditions.MAX_TRIES + 1


def test_only_some_are_made_at_once(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job = a_result_of(session, now)
        for kind in renditions.KINDS:
            renditions.ask(session, job, kind, now=now)
        first = due(session, now)
        assert len(first) == renditions.AT_ONCE
        claims = [renditions.claim(session, *owed, now=now) for owed in first]
        assert due(session, now) == []
        assert claims[0] is not None
        renditions.made(session, claims[0], key="k", bytes=1, now=now)
        assert len(due(session, now)) == 1


def test_what_can_help_is_tried_again_and_what_cannot_fails_at_once(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job = a_result_of(session, now)
        for kind, error, status in (("webp", InternalError("x"), "pending"), ("avif", InvalidImage("y"), "failed")):
            renditions.ask(session, job, kind, now=now)
            claim = renditions.claim(session, job.id, kind, now=now)
            assert claim is not None
            renditions.failed(session, claim, error, now=now)
            found = session.get_one(Rendition, (job.id, kind), populate_existing=True)
            assert renditions.view(found)["status"] == status
        later = now + timedelta(seconds=renditions.RETRY_SECONDS + 1)
        assert due(session, later) == [(job.id, "webp")]


def test_it_goes_with_its_job(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job = a_result_of(session, now)
        renditions.ask(session, job, "webp", now=now)
        jobs.remove(session, job.id, now=now)
        assert session.query(Rendition).count() == 0
        with pytest.raises(NotFound):
            renditions.ask(session, job, "webp", now=now)
