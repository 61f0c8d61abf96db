"""Questions are answered from the rows as they stand, alike on both databases, and none of them writes."""

from __future__ import annotations

from bisect import bisect_left
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared import jobs, outbox, queries, queueing
from shared.db import Database
from shared.errors import InvalidRequest, NotFound
from shared.models import Job, JobState
from shared.queries import JobFilter
from tests.factories import a_claim, a_job, a_job_in, a_key, a_result, retryable

HOOK = "https://receiver.example/hook"
SECOND = timedelta(seconds=1)


# --- whose, and where in the queue ----------------------------------------------------------------------------------


def test_a_strangers_job_is_not_there(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session:
        owner, stranger = a_key(session, now), a_key(session, now)
        job = a_job(session, owner, now)
        assert queries.owned_job(session, job.id, owner.id) is job
        assert queries.pulse(session, job.id, owner.id).state == JobState.QUEUED
        assert queries.any_job(session, job.id) is job
        said = set()
        for job_id in (job.id, "job_nobody"):
            for ask in (queries.owned_job, queries.pulse):
                with pytest.raises(NotFound) as refused:
                    ask(session, job_id, stranger.id)
                said.add(refused.value.detail)
        assert len(said) == 1
        with pytest.raises(NotFound):
            queries.any_job(session, "job_nobody")


def test_a_pulse_changes_with_what_a_watcher_must_see(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        job, claim = a_job_in(JobState.RUNNING, session, key, now)
        seen = [queries.pulse(session, job.id, key.id)]
        jobs.cancel(session, job.id, now=now)
        seen.append(queries.pulse(session, job.id, key.id))
        jobs.acknowledge_cancel(session, claim, now=now)
        seen.append(queries.pulse(session, job.id, key.id))
        assert [pulse.is_canceling for pulse in seen] == [False, True, True]
        assert [pulse.is_finished for pulse in seen] == [False, False, True]
        assert len({pulse.version for pulse in seen}) == 3
        session.refresh(job)
        assert queries.is_finished(job)


def test_the_history_of_a_job_is_told_newest_first(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session:
        job, claim = a_job_in(JobState.RUNNING, session, a_key(session, now), now)
        jobs.release(session, claim, now=now)
        a_claim(session, job.id, now)
        assert [attempt.number for attempt in queries.attempts(session, job.id)] == [2, 1]


# --- pages ----------------------------------------------------------------------------------------------------------


def test_pages_show_every_job_once_though_new_ones_come_in(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        ids = [a_job(session, key, now + n * SECOND).id for n in range(7)]
        seen: list[str] = []
        cursor = None
        while True:
            page = queries.page_of_jobs(session, JobFilter(owner_key_id=key.id), limit=3, cursor=cursor)
            seen += [job.id for job in page.rows]
            a_job(session, key, now + 3600 * SECOND)
            cursor = page.next_cursor
            if cursor is None:
                break
        assert seen == ids[::-1]


def test_a_page_that_ends_with_the_list_has_no_next(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session:
        key = a_key(session, now)
        for _ in range(3):
            a_job(session, key, now)
        assert queries.page_of_jobs(session, JobFilter(), limit=3, cursor=None).next_cursor is None
        assert queries.page_of_jobs(session, JobFilter(), limit=2, cursor=None).next_cursor is not None


@pytest.mark.parametrize("cursor", ["", "!", "\u00e9", "AAA=A", "_", "gA", "AA", "a" * 3001])
def test_a_cursor_that_we_did_not_give_is_refused_or_finds_a_place(
    database: Database, now: datetime, cursor: str
) -> None:
    with database.reading() as session:
        for page_of in (
            lambda: queries.page_of_jobs(session, JobFilter(), limit=3, cursor=cursor),
            lambda: queries.page_of_deliveries(session, owner_key_id=None, job_id=None, limit=3, cursor=cursor),
        ):
            try:
                assert page_of().rows == []
            except InvalidRequest as refused:
                assert refused.facts == {"parameter": "cursor"}  # noqa: PT017  (either is right, a crash is not)


def test_a_list_can_be_narrowed(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key, other = a_key(session, now), a_key(session, now)
        old = a_job(session, key, now - 3600 * SECOND, model="srresnet")
        done, _ = a_job_in(JobState.SUCCEEDED, session, key, now, external_id="order-7")
        theirs = a_job(session, other, now + SECOND)

        def found(**wanted: Any) -> set[str]:
            return {job.id for job in queries.page_of_jobs(session, JobFilter(**wanted), limit=9, cursor=None).rows}

        assert found() == {old.id, done.id, theirs.id}
        assert found(owner_key_id=key.id) == {old.id, done.id}
        assert found(status="succeeded") == {done.id}
        assert found(model="srresnet") == {old.id}
        assert found(external_id="order-7") == {done.id}
        assert found(created_after=now - SECOND) == {done.id, theirs.id}
        assert found(created_after=now) == {theirs.id}
        assert found(id=old.id, owner_key_id=other.id) == set()


def test_deliveries_are_listed_by_owner_and_by_job(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        keys = [a_key(session, now) for _ in range(2)]
        made = [a_job(session, key, now, webhook_url=HOOK) for key in keys]
        for job in made:
            jobs.cancel(session, job.id, now=now)

        def listed(owner: str | None, job: str | None) -> set[str | None]:
            page = queries.page_of_deliveries(session, owner_key_id=owner, job_id=job, limit=9, cursor=None)
            return {delivery.job_id for delivery in page.rows}

        assert listed(None, None) == {job.id for job in made}
        assert listed(keys[0].id, None) == {made[0].id}
        assert listed(keys[0].id, made[1].id) == set()
        assert queries.deliveries_pending(session) == 2
        first = queries.page_of_deliveries(session, owner_key_id=None, job_id=None, limit=1, cursor=None)
        rest = queries.page_of_deliveries(session, owner_key_id=None, job_id=None, limit=1, cursor=first.next_cursor)
        assert {first.rows[0].job_id, rest.rows[0].job_id} == {job.id for job in made}


# --- depths, workers, rates -----------------------------------------------------------------------------------------


def test_every_state_is_counted_also_those_no_job_is_in(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        for state in (JobState.QUEUED, JobState.QUEUED, JobState.FAILED):
            a_job_in(state, session, key, now)
        counts = queries.counts_by_state(session)
        assert counts == {"queued": 2, "running": 0, "succeeded": 0, "failed": 1, "canceled": 0, "expired": 0}
        assert queries.key_names(session, [key.id, "key_nobody"]) == {key.id: "tester"}


def test_history_is_what_jobs_of_the_model_took_on_the_device_over_what_they_were_expected_to(
    database: Database, now: datetime
) -> None:
    with database.transaction() as session:
        key = a_key(session, now)

        def history(device: str = "cpu", expected_seconds: float = 3.0, sample: int = 200) -> queries.RunHistory:
            return queries.run_history(
                session, "srgan", device=device, expected_seconds=expected_seconds, sample=sample
            )

        def done(number: int, seconds: float, expected_seconds: float, device: str = "cpu") -> None:
            job = a_job(session, key, now, expected_seconds=expected_seconds)
            claim = a_claim(session, job.id, now, device=device)
            timings = {
                "queued_seconds": 999.0,
                "upscale_seconds": seconds / 2,
                "store_seconds": seconds / 2,
                "tiles": 7.0,
            }
            jobs.succeed(session, claim, a_result(claim, timings=timings), now=now + number * SECOND)

        assert history() == queries.RunHistory(0, None, None)
        for number in range(1, 11):
            done(number, seconds=0.2 * number, expected_seconds=2.0)
        a_job_in(JobState.SUCCEEDED, session, key, now, model="srresnet", expected_seconds=2.0)
        done(11, seconds=0.02, expected_seconds=2.0, device="gpu")
        assert history() == queries.RunHistory(10, pytest.approx(1.5), pytest.approx(3.0))
        assert history(expected_seconds=6.0) == queries.RunHistory(10, pytest.approx(3.0), pytest.approx(6.0))
        assert history(sample=2) == queries.RunHistory(2, pytest.approx(2.7), pytest.approx(3.0))
        assert history(device="gpu") == queries.RunHistory(1, pytest.approx(0.03), pytest.approx(0.03))
        # Of small jobs the fixed costs are the most: they say nothing of large ones, unless there is nothing else.
        for number in range(12, 17):
            done(number, seconds=1.0, expected_seconds=0.01)
        assert history() == queries.RunHistory(10, pytest.approx(1.5), pytest.approx(3.0))
        assert history(expected_seconds=0.02) == queries.RunHistory(5, pytest.approx(2.0), pytest.approx(2.0))
        assert history(expected_seconds=900.0).jobs == 15


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([1], 0.5, 1),
        ([1, 2], 0.5, 1),
        ([1, 2, 3], 0.5, 2),
        ([1, 2, 3, 4, 5, 6], 0.5, 3),
        ([1, 2], 0.95, 2),
        ([1, 2], 0, 1),
    ],
)
def test_percentiles_are_nearest_rank(values: list[float], share: float, expected: float) -> None:
    assert queries.percentile(values, share) == expected


# --- what is to be published ----------------------------------------------------------------------------------------

RESEND = dict.fromkeys(queueing.IMAGE_QUEUES, 60.0)


def unpublished(session: Session, now: datetime, *, generation: str | None = "g1") -> list[str]:
    return [job.id for job in queries.unpublished(session, generation=generation, resend_after=RESEND, now=now)]


def test_a_job_is_to_be_published_while_it_waits_and_no_message_is_on_its_way(
    database: Database, now: datetime
) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        fresh = a_job(session, key, now)
        a_job_in(JobState.RUNNING, session, key, now)
        a_job_in(JobState.SUCCEEDED, session, key, now)
        later, claim = a_job_in(JobState.RUNNING, session, key, now)
        jobs.fail(session, claim, retryable(), retry_delay_seconds=5, now=now)
        assert unpublished(session, now) == [fresh.id]
        assert set(unpublished(session, now + 5 * SECOND)) == {fresh.id, later.id}
        outbox.mark_published(session, [fresh.id], "g1", now)
        assert unpublished(session, now) == []
        # Redis was wiped: its generation is another one now, or none.
        assert unpublished(session, now, generation="g2") == [fresh.id]
        assert unpublished(session, now, generation=None) == []


def test_copies_of_a_message_become_rarer_and_then_hourly(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job = a_job(session, a_key(session, now), now)
        gaps = []
        for _ in range(7):
            outbox.mark_published(session, [job.id], "g1", now)
            # Once it is due it stays so: where that begins is found by halves.
            waited = 30 * bisect_left(
                range(4000 // 30), True, key=lambda n: bool(unpublished(session, now + (30 * n + 0.001) * SECOND))
            )
            assert unpublished(session, now + waited * SECOND) == []
            gaps.append(waited)
            now += waited * SECOND
        assert gaps == [60, 120, 240, 480, 3600, 3600, 3600]


def test_a_retry_by_hand_is_published_at_once(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, _ = a_job_in(JobState.FAILED, session, a_key(session, now), now)
        outbox.mark_published(session, [job.id], "g1", now)
        jobs.retry(session, job.id, now=now)
        assert unpublished(session, now) == [job.id]


def test_the_oldest_jobs_are_published_first_in_bounded_numbers(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session:
        key = a_key(session, now)
        ids = [a_job(session, key, now + n * SECOND).id for n in range(3)]
        found = queries.unpublished(session, generation="g", resend_after={}, now=now, limit=2)
        assert [job.id for job in found] == ids[:2]
        assert session.scalars(select(Job.published_at)).all() == [None] * 3, "a question changes nothing"


# --- alarms ---------------------------------------------------------------------------------------------------------


def test_a_lease_that_has_passed_counts_until_the_relay_has_seen_it(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        made = a_job(session, a_key(session, now), now)
        a_claim(session, made.id, now)
        assert queries.lapsed_leases(session, now=now) == 0
        later = now + 60 * SECOND
        assert queries.lapsed_leases(session, now=later) == 1
        jobs.rescue_lost(session, retry_delay_seconds=0, now=later)
        assert queries.lapsed_leases(session, now=later) == 0


def test_what_ended_lately_is_counted_by_how_it_ended(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        for state in (JobState.SUCCEEDED, JobState.SUCCEEDED, JobState.FAILED, JobState.QUEUED):
            a_job_in(state, session, key, now)
        ended = queries.ended_by_state(session, since=now - 3600 * SECOND)
        assert ended == {"succeeded": 2, "failed": 1, "canceled": 0, "expired": 0}
        assert sum(queries.ended_by_state(session, since=now).values()) == 0


def test_removals_of_blobs_count_once_they_are_due(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        jobs.owe_blob_removal(session, "jobs/a", now=now)
        jobs.owe_blob_removal(session, "jobs/b", now=now + 60 * SECOND)
        assert queries.blob_removals_due(session, now=now + SECOND) == 1
