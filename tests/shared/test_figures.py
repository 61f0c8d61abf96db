"""How the service has done: sums over slots, percentiles from buckets, hours that are kept."""

from __future__ import annotations

import random
from datetime import datetime, timedelta

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared import figures, jobs
from shared.db import Database
from shared.errors import InvalidImage
from shared.figures import HOUR, WINDOWS, Spans
from shared.models import HourOfJobs, JobState
from shared.queries import percentile
from tests.factories import a_claim, a_job, a_key, a_result


def a_run(session: Session, key: str, handed_in: datetime, wait_seconds: float, run_seconds: float) -> str:
    """A job of 32 x 24 px of output that succeeded."""
    job_id = a_job(session, key, handed_in).id
    started = handed_in + timedelta(seconds=wait_seconds)
    claim = a_claim(session, job_id, started)
    jobs.succeed(session, claim, a_result(claim), now=started + timedelta(seconds=run_seconds))
    return job_id


@pytest.mark.parametrize("share", [0.5, 0.95, 0.99])
def test_percentiles_from_buckets_are_within_eight_percent(share: float) -> None:
    chance = random.Random(4)
    values = sorted(chance.lognormvariate(0, 2) for _ in range(5000))
    spans = Spans()
    for value in values:
        spans.add(value)
    assert spans.percentile(share) == pytest.approx(percentile(values, share), rel=0.08)
    assert Spans().percentile(share) is None


def test_a_window_tells_what_ended_within_it(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now).id
        a_run(session, key, now - timedelta(minutes=50), 4, 60)
        a_run(session, key, now - timedelta(minutes=3), 2, 30)
        # Before the window.
        a_run(session, key, now - timedelta(hours=3), 2, 30)
        failed = a_claim(session, a_job(session, key, now).id, now - timedelta(minutes=2))
        jobs.fail(session, failed, InvalidImage("broken"), retry_delay_seconds=1, now=now - timedelta(minutes=1))
    with database.reading() as session:
        done = figures.figures(session, WINDOWS["1h"], now=now)
    assert len(done.slots) == 12
    assert dict(done.total.ended) == {JobState.SUCCEEDED: 2, JobState.FAILED: 1}
    assert done.total.error_share == pytest.approx(1 / 3)
    assert done.total.output_px == 2 * 32 * 24
    assert done.total.runs.percentile(0.5) == pytest.approx(30, rel=0.08)
    assert done.total.runs.percentile(0.99) == pytest.approx(60, rel=0.08)
    assert done.total.waits.percentile(0.99) == pytest.approx(4, rel=0.08)
    assert sum(slot.jobs for slot in done.slots) == 3


def test_a_window_in_which_nothing_ended_is_all_nothing(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.reading() as session:
        total = figures.figures(session, WINDOWS["7d"], now=now).total
    assert (total.jobs, total.error_share, total.megapixels_per_hour, total.runs.percentile(0.5)) == (
        0,
        None,
        0.0,
        None,
    )


def test_a_retry_by_hand_does_not_wait_since_it_was_first_handed_in(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now).id
        job_id = a_job(session, key, now - timedelta(minutes=40)).id
        jobs.cancel(session, job_id, now=now - timedelta(minutes=39))
        jobs.retry(session, job_id, now=now - timedelta(minutes=10))
        claim = a_claim(session, job_id, now - timedelta(minutes=9))
        jobs.succeed(session, claim, a_result(claim), now=now - timedelta(minutes=8))
    with database.reading() as session:
        waits = figures.figures(session, WINDOWS["1h"], now=now).total.waits
    assert waits.percentile(0.5) == pytest.approx(60, rel=0.08)


@pytest.mark.parametrize("window", ["24h", "7d"])
def test_hours_that_are_kept_tell_the_same_as_the_jobs(database: Database, now: datetime, window: str) -> None:
    chance = random.Random(7)
    with database.transaction() as session:
        key = a_key(session, now).id
        made = [
            a_run(session, key, now - timedelta(hours=chance.uniform(0.1, 160)), chance.uniform(0, 9), 20)
            for _ in range(60)
        ]
    with database.reading() as session:
        before = figures.figures(session, WINDOWS[window], now=now)
    with database.transaction() as session:
        assert figures.roll_up(session, now=now) == 7 * 24
    with database.transaction() as session:
        assert figures.roll_up(session, now=now) == 0, "every hour is kept once"
    with database.reading() as session:
        after = figures.figures(session, WINDOWS[window], now=now)
    assert [slot.start for slot in after.slots] == [slot.start for slot in before.slots]
    assert [slot.ended for slot in after.slots] == [slot.ended for slot in before.slots]
    assert after.total.waits == before.total.waits
    assert after.total.output_px == before.total.output_px

    # What has been deleted since has still been done.
    with database.transaction() as session:
        for job_id in made:
            jobs.remove(session, job_id, now=now)
    with database.reading() as session:
        kept = figures.figures(session, WINDOWS[window], now=now).total
        hour = now.replace(minute=0, second=0, microsecond=0)
        in_last_hour = before.slots[-1].jobs if window == "24h" else 0
        assert kept.jobs >= before.total.jobs - max(in_last_hour, 2)
        assert session.scalar(select(func.max(HourOfJobs.start))) == hour - HOUR


def test_hours_nobody_asks_about_any_more_go(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        figures.roll_up(session, now=now)
    later = now + figures.KEPT + HOUR
    with database.transaction() as session:
        # A relay that was away for weeks catches up with the longest window, and no further.
        assert figures.roll_up(session, now=later) == 7 * 24
        assert session.scalar(select(func.min(HourOfJobs.start))) > now


def test_two_relays_that_keep_the_same_hour_keep_it_once(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        figures.roll_up(session, now=now - HOUR)
    with database.transaction() as first:
        kept = figures.roll_up(first, now=now)
        first.rollback()
    with database.transaction() as second:
        assert figures.roll_up(second, now=now) == kept == 1
