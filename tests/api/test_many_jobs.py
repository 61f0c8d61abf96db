"""The operator's pages with a hundred thousand jobs: what they ask of SQL stays quick, and the figures are printed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from api.app import create_app
from shared import figures, keys, queries, queueing
from shared.db import Database, clock
from shared.queries import JobFilter
from shared.settings import Settings
from tests.factories import a_key, many_jobs

JOBS = 100_000
GENEROUS_SECONDS = 10.0
"""Many times what each takes on a quiet machine: a missing index would take longer still, a busy machine will not."""


@pytest.fixture
def crowded(sqlite_database: Database) -> Database:
    """A week of work: a hundred thousand jobs, hours that are over kept as rows."""
    now = datetime.now(UTC)
    with sqlite_database.transaction() as session:
        many_jobs(session, a_key(session, now), JOBS, now=now)
    with sqlite_database.transaction() as session:
        figures.roll_up(session, now=now)
    return sqlite_database


def test_what_the_pages_ask_stays_quick_with_a_hundred_thousand_jobs(
    crowded: Database, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    took: dict[str, float] = {}

    def timed(name: str, ask: Callable[[], Any]) -> Any:
        best = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            answer = ask()
            best = min(best, time.perf_counter() - began)
        took[name] = best
        return answer

    with crowded.reading() as session:
        now = clock(session)
        for window, span in figures.WINDOWS.items():
            done = timed(f"figures of {window}", lambda span=span: figures.figures(session, span, now=now))
            assert done.total.jobs > 0
        assert done.total.jobs > 0.9 * JOBS
        timed("depths", lambda: queueing.queue_depths(session, worker_lost_after_seconds=30, now=now))
        timed("counts by state", lambda: queries.counts_by_state(session))
        timed("storage used", lambda: queries.storage_used(session))
        failed = JobFilter(any_of=(("state", ("failed",)), ("model", ("srgan",))))
        page = timed("page, status and model", lambda: queries.page_of_jobs(session, failed, limit=25, cursor=None))
        assert len(page.rows) == 25
        timed("count, status and model", lambda: queries.count_jobs(session, failed))
        rare = JobFilter(words=("nowhere-to-be-found",))
        timed("page, a name that is nowhere", lambda: queries.page_of_jobs(session, rare, limit=25, cursor=None))

    app = create_app(settings)
    client = app.test_client()
    with crowded.transaction() as session:
        key, _ = keys.create(session, name="operator", scopes=["viewer"], now=now)
    client.get(f"/sign-in?token={keys.sign_in_token(settings.secret_key, key.id)}")
    servers = app.extensions["enlarger"]
    for path in ("/admin/jobs", "/admin/jobs?q=status:failed", "/admin/jobs?q=status:queued+after:2h"):
        answer = timed(path, lambda path=path: client.get(path))
        assert answer.status_code == 200
        assert "job" in answer.text
    servers.close()
    with capsys.disabled():
        sys.stdout.write("\n" + "".join(f"    {seconds * 1000:7.1f} ms  {name}\n" for name, seconds in took.items()))
    slow = {name: round(seconds, 2) for name, seconds in took.items() if seconds > GENEROUS_SECONDS}
    assert slow == {}
