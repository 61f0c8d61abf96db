"""What keeps an attempt alive, on real SQL; time is a fake."""

from __future__ import annotations

from typing import Any

import pytest

from shared import jobs
from shared.db import Database, clock
from shared.errors import DatabaseUnavailable, StaleAttempt
from shared.jobs import Claim
from shared.models import Delivery, Job
from shared.settings import Settings
from tests.factories import LEASE_SECONDS, a_claim, a_job, a_key
from tests.worker.a_bench import away
from worker.enlarging import Progress
from worker.lifeline import Lifeline
from worker.outcomes import StopSeen


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class Line:
    """A running attempt and its lifeline, with a clock to move."""

    def __init__(self, database: Database, settings: Settings, **asked: Any) -> None:
        self.database = database
        with database.transaction() as session:
            now = clock(session)
            self.job_id = a_job(session, a_key(session, now), now, **asked).id
            self.claim = a_claim(session, self.job_id, now)
        self.clock = Clock()
        self.is_stopping = False
        self.lifeline = Lifeline(
            database,
            settings,
            self.claim,
            deadline_in_seconds=None,
            is_stopping=lambda: self.is_stopping,
            monotonic=self.clock,
        )

    @property
    def job(self) -> Job:
        with self.database.transaction() as session:
            return session.get_one(Job, self.job_id)

    def lease_left(self) -> float:
        with self.database.transaction() as session:
            lease_until = session.get_one(Job, self.job_id).lease_until
            assert lease_until is not None
            return (lease_until - clock(session)).total_seconds()


def progress(tiles_done: int, bands_done: int = 0, eta_seconds: float = 9.0) -> Progress:
    return Progress(tiles_done, 20, bands_done, 5, eta_seconds)


@pytest.fixture
def line(sqlite_database: Database, settings: Settings) -> Line:
    return Line(sqlite_database, settings)


def test_progress_is_written_at_once_then_by_time_and_at_bands(line: Line) -> None:
    def written(told: Progress, after_seconds: float) -> bool:
        line.clock.seconds += after_seconds
        before = line.job.version
        line.lifeline.progressed(told)
        return line.job.version > before

    line.lifeline.begins("upscale")
    assert written(progress(0), 0.0)
    assert (line.job.phase, line.job.bands_total, line.job.eta_seconds) == ("upscale", 5, 9.0)
    assert not written(progress(1), 0.4)
    assert written(progress(2), 0.11)
    assert written(progress(4, bands_done=1), 0.2)
    assert not written(progress(8, bands_done=2), 0.05)
    assert line.job.bands_done == 1
    # A tenth of the way and a little for what came before.
    assert line.job.fraction == pytest.approx(0.02 + 0.93 * 4 / 20)


def test_progress_renews_the_lease(line: Line) -> None:
    line.lifeline.begins("upscale")
    line.lifeline.progressed(progress(0))
    line.clock.seconds += 15
    assert line.lifeline.is_alive
    line.lifeline.progressed(progress(1))
    line.clock.seconds += LEASE_SECONDS - 1
    assert line.lifeline.is_alive
    line.clock.seconds += 2
    assert not line.lifeline.is_alive


def test_before_a_long_silence_the_lease_is_made_to_cover_it(line: Line) -> None:
    line.lifeline.begins("decode", expected_seconds=1.0)
    assert line.lease_left() <= LEASE_SECONDS
    line.lifeline.begins("encode", expected_seconds=100.0)
    assert 100 < line.lease_left() <= 105
    assert line.job.phase == "encode"
    line.clock.seconds += 99
    assert line.lifeline.is_alive


def test_a_worker_that_stops_gives_up_what_takes_long_and_nothing_else(line: Line) -> None:
    line.is_stopping = True
    line.lifeline.begins("upscale")
    line.lifeline.progressed(progress(19, eta_seconds=1.0))
    with pytest.raises(StopSeen):
        line.lifeline.progressed(progress(1, eta_seconds=60.0))


def test_progress_is_announced_at_most_each_tenth(sqlite_database: Database, settings: Settings) -> None:
    line = Line(sqlite_database, settings, webhook_url="https://example.com/", webhook_events=("job.progress",))
    line.claim = Claim(line.job_id, line.claim.attempt, announces_progress=True)
    line.lifeline._claim = line.claim
    for tile in range(21):
        line.clock.seconds += 1
        line.lifeline.progressed(progress(tile))
    with sqlite_database.transaction() as session:
        announced = [d.payload["data"]["progress"]["fraction"] for d in session.query(Delivery).order_by(Delivery.id)]
    # From 0.02 to 0.95 there are nine whole tenths.
    assert [int(fraction * 10) for fraction in announced] == list(range(1, 10))


def test_an_upload_renews_the_lease_as_bytes_go_and_not_at_each(line: Line, settings: Settings) -> None:
    version = line.job.version
    for _ in range(10):
        line.lifeline.sent(1)
    assert line.job.version == version
    line.clock.seconds += settings.lease_renew_seconds + 0.1
    line.lifeline.sent(1)
    line.lifeline.sent(1)
    assert line.job.version == version + 1
    line.clock.seconds += LEASE_SECONDS - 1
    assert line.lifeline.is_alive


def test_an_upload_of_a_late_worker_hears_it_once_and_does_not_break(
    line: Line, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with line.database.transaction() as session:
        jobs.release(session, line.claim, now=clock(session))
    line.lifeline.raise_if_stale()
    line.clock.seconds += settings.lease_renew_seconds + 0.1
    line.lifeline.sent(1)
    line.lifeline.sent(1)
    with pytest.raises(StaleAttempt):
        line.lifeline.raise_if_stale()


def test_an_upload_goes_on_through_a_cancel_and_without_a_database(
    line: Line, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with line.database.transaction() as session:
        jobs.cancel(session, line.job_id, now=clock(session))
    line.clock.seconds += settings.lease_renew_seconds + 0.1
    line.lifeline.sent(1)
    with away(line.database, monkeypatch):
        line.clock.seconds += 2 * LEASE_SECONDS
        line.lifeline.sent(1)
    line.lifeline.raise_if_stale()


def test_without_a_database_an_attempt_lasts_as_long_as_its_lease(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    with away(line.database, monkeypatch):
        line.lifeline.progressed(progress(1))
        line.clock.seconds += LEASE_SECONDS - 1
        line.lifeline.progressed(progress(2))
        line.clock.seconds += 2
        with pytest.raises(DatabaseUnavailable):
            line.lifeline.progressed(progress(3))
