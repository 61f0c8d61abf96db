"""SQLite and PostgreSQL behave alike above this module: UTC times, committed or rolled back, honest when away."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, StatementError

from shared import jobs, servers
from shared.db import Database, clock, new_id
from shared.errors import DatabaseUnavailable
from shared.models import ApiKey, Attempt, Worker
from tests.chaos.proxy import Mode, Proxy
from tests.conftest import closed_port, wait_until
from tests.factories import a_claim, a_job, a_key


def test_a_transaction_commits_at_its_end(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
    with database.reading() as session:
        assert session.get_one(ApiKey, key.id).name == "tester"


def test_a_transaction_that_raises_changes_nothing(database: Database, now: datetime) -> None:
    def stop_halfway() -> None:
        with database.transaction() as session:
            a_key(session, now)
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        stop_halfway()
    with database.reading() as session:
        assert session.query(ApiKey).count() == 0


def test_reading_leaves_nothing_behind(database: Database, now: datetime) -> None:
    with database.reading() as session:
        a_key(session, now)
    with database.reading() as session:
        assert session.query(ApiKey).count() == 0


def test_times_come_back_in_utc_to_the_microsecond(database: Database) -> None:
    east = timezone(timedelta(hours=5, minutes=30))
    moment = datetime(2026, 3, 4, 1, 2, 3, 123456, east)
    with database.transaction() as session:
        key = a_key(session, moment)
    with database.reading() as session:
        read = session.get_one(ApiKey, key.id).created_at
    assert read == moment
    assert read.tzinfo is UTC
    assert read.microsecond == 123456


def test_a_time_without_a_zone_is_refused(database: Database) -> None:
    with pytest.raises(StatementError, match="naive datetime"), database.transaction() as session:
        a_key(session, datetime(2026, 3, 4))  # noqa: DTZ001  (that is what is tried)


def test_times_are_compared_as_moments(database: Database, now: datetime) -> None:
    """Leases are compared in SQL: a value written in one zone and asked for in another must be the same moment."""
    west = timezone(timedelta(hours=-8))
    with database.transaction() as session:
        a_key(session, now)
        later = (now + timedelta(microseconds=1)).astimezone(west)
        assert session.query(ApiKey).where(ApiKey.created_at < later).count() == 1
        assert session.query(ApiKey).where(ApiKey.created_at < now.astimezone(west)).count() == 0


def test_foreign_keys_are_kept(database: Database, now: datetime) -> None:
    with pytest.raises(IntegrityError), database.transaction() as session:
        session.add(Attempt(job_id="job_nobody", number=1, worker_id="w", device="cpu", started_at=now))


def test_the_clock_moves_and_is_utc(database: Database) -> None:
    with database.reading() as session:
        first, second = clock(session), clock(session)
    assert first.tzinfo is UTC
    assert second > first
    assert abs((first - datetime.now(UTC)).total_seconds()) < 60


def test_ids_sort_by_time_and_do_not_repeat(now: datetime) -> None:
    ids = [new_id("job", now + timedelta(milliseconds=n)) for n in range(1000)]
    assert ids == sorted(ids)
    assert len({new_id("job", now) for _ in range(10_000)}) == 10_000
    assert all(len(each) == len("job_") + 26 for each in ids)


def test_ids_sort_in_sql_as_they_do_here(database: Database, now: datetime) -> None:
    ids = [new_id("w", now) for _ in range(200)]
    with database.transaction() as session:
        for each in ids:
            session.add(
                Worker(id=each, kind="relay", host="h", pid=1, queues=[], models_loaded=[], started_at=now, seen_at=now)
            )
    with database.reading() as session:
        assert list(session.scalars(text("SELECT id FROM workers ORDER BY id"))) == sorted(ids)


def test_a_reader_does_not_wait_for_a_writer(database: Database, now: datetime) -> None:
    with database.transaction() as writer:
        a_key(writer, now)
        started = time.monotonic()
        with database.reading() as reader:
            assert reader.query(ApiKey).count() == 0, "what is not committed is not seen"
        assert time.monotonic() - started < 5, "the reader waited for the writer"


def test_writers_wait_for_each_other_and_lose_no_update(database: Database, now: datetime) -> None:
    """Sixteen threads add one to a counter. Reading first and writing later must neither fail nor lose one."""
    with database.transaction() as session:
        key = a_key(session, now, name="0")
    failures: list[BaseException] = []

    def add_one() -> None:
        try:
            for _ in range(5):
                with database.transaction() as session:
                    held = session.get_one(ApiKey, key.id, with_for_update=True)
                    held.name = str(int(held.name) + 1)
        except BaseException as failure:  # noqa: BLE001  (shown by the test's own thread)
            failures.append(failure)

    threads = [threading.Thread(target=add_one) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    with database.reading() as session:
        assert session.get_one(ApiKey, key.id).name == "80"


def test_sqlite_survives_a_crash_of_the_process(sqlite_database: Database) -> None:
    with sqlite_database.reading() as session:
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
        assert session.scalar(text("PRAGMA foreign_keys")) == 1


def test_on_sqlite_a_202_waits_for_the_disk_and_progress_does_not(sqlite_database: Database) -> None:
    for passing in (False, True, True, False, True):
        with sqlite_database.transaction(passing=passing) as session:
            assert session.scalar(text("PRAGMA synchronous")) == (1 if passing else 2)


def test_ping_says_when_there_is_no_server() -> None:
    gone = Database(f"postgresql+psycopg://nobody:none@127.0.0.1:{closed_port()}/none")
    try:
        with pytest.raises(DatabaseUnavailable) as unavailable:
            gone.ping()
    finally:
        gone.close()
    assert unavailable.value.retryable
    assert unavailable.value.facts == {"retry_after_seconds": 2}


def test_ping_is_quiet_when_the_server_is_there(database: Database) -> None:
    database.ping()


def test_a_locked_sqlite_is_unavailable_and_not_a_crash(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch, now: datetime
) -> None:
    monkeypatch.setattr("shared.db.SQLITE_BUSY_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr("shared.db.SQLITE_TURN_PATIENCE_SECONDS", 0.05)
    impatient = Database(sqlite_database.url.render_as_string(hide_password=False))
    try:
        with sqlite_database.transaction() as holder:
            a_key(holder, now)
            with pytest.raises(DatabaseUnavailable), impatient.transaction() as session:
                a_key(session, now)
    finally:
        impatient.close()


def test_a_writer_whose_turn_does_not_come_is_told_so_and_the_next_has_it(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch, now: datetime
) -> None:
    def write() -> None:
        with sqlite_database.transaction() as session:
            a_key(session, now)

    monkeypatch.setattr("shared.db.SQLITE_BUSY_TIMEOUT_SECONDS", 0.05)
    with ThreadPoolExecutor(1) as other:
        with sqlite_database.transaction(), pytest.raises(DatabaseUnavailable):
            other.submit(write).result()
        with pytest.raises(ZeroDivisionError), sqlite_database.transaction():
            _ = 1 / 0
        other.submit(write).result()


@pytest.fixture
def other_process(sqlite_database: Database) -> Iterator[Database]:
    """The same file as another process would have it: files are locked by whoever opened them."""
    made = Database(sqlite_database.url.render_as_string(hide_password=False))
    yield made
    made.close()


def test_a_process_of_many_writers_lets_another_have_its_turn(
    sqlite_database: Database, other_process: Database, now: datetime
) -> None:
    with sqlite_database.transaction() as session:
        key = a_key(session, now, name="0")
    is_over = threading.Event()
    commits = 0

    def write() -> None:
        nonlocal commits
        while not is_over.is_set():
            with sqlite_database.transaction() as session:
                session.execute(text("UPDATE api_keys SET name = name + 1"))
                commits += 1

    meanwhile = []
    with ThreadPoolExecutor(8) as writers:
        for _ in range(8):
            writers.submit(write)
        wait_until(lambda: commits > 8, seconds=30, what="all of them to write")
        for _ in range(10):
            asked_at = commits
            with other_process.transaction() as session:
                meanwhile.append(commits - asked_at)
                session.execute(text("UPDATE api_keys SET name = name + 1"))
        is_over.set()
    # The one that writes, and one that has come before us.
    assert max(meanwhile) <= 3, meanwhile
    with sqlite_database.reading() as session:
        assert session.get_one(ApiKey, key.id).name == str(commits + 10)


def test_the_turn_of_a_process_that_is_killed_is_free(sqlite_database: Database, now: datetime) -> None:
    url = sqlite_database.url.render_as_string(hide_password=False)
    program = (
        "import sys, time; from sqlalchemy import text; from shared.db import Database\n"
        "with Database(sys.argv[1]).transaction() as session:\n"
        "    session.execute(text('SELECT 1')); print('writing', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, url], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        writer.kill()
        began = time.monotonic()
        with sqlite_database.transaction() as session:
            a_key(session, now)
        assert time.monotonic() - began < 1


@pytest.mark.parametrize("held", ["queue", "turn"])
def test_a_turn_that_does_not_come_is_not_waited_for_for_ever(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch, now: datetime, held: str
) -> None:
    """Somebody is frozen with it and is not writing: SQLite has no objection."""
    monkeypatch.setattr("shared.db.SQLITE_TURN_PATIENCE_SECONDS", 0.05)
    with open(f"{sqlite_database.url.database}-{held}", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with sqlite_database.transaction() as session:
            key = a_key(session, now)
    with sqlite_database.transaction() as session:
        assert session.get_one(ApiKey, key.id).name == "tester"


def test_a_lost_connection_is_replaced_and_a_killed_server_is_unavailable(tmp_path: Path) -> None:
    with servers.start_postgresql(tmp_path) as server:
        database = Database(server.url)
        try:
            database.ping()
            _end_every_connection(database)
            # The pool looks before it leaps: the dead connection is replaced without an error.
            database.ping()
            server.kill()
            with pytest.raises(DatabaseUnavailable):
                database.ping()
        finally:
            database.close()


@pytest.mark.parametrize(("how", "is_away"), [("freeze", True), ("half_open", False)])
def test_a_server_that_falls_silent_holds_nobody_for_ever(
    postgresql_database: Database, monkeypatch: pytest.MonkeyPatch, how: Mode, is_away: bool
) -> None:
    monkeypatch.setattr("shared.db.POSTGRESQL_SILENCE_SECONDS", 1)
    monkeypatch.setattr("shared.db.POSTGRESQL_CONNECT_TIMEOUT_SECONDS", 2)
    with Proxy(postgresql_database.url.port or 0) as proxy:
        database = Database(postgresql_database.url.set(port=proxy.port).render_as_string(hide_password=False))
        try:
            database.ping()
            proxy.set(how)
            began = time.monotonic()
            # A connection that has gone without a word is replaced; a server that has is unavailable.
            assert _answers(database) != is_away
            assert time.monotonic() - began < 30
            proxy.set("pass")
            wait_until(lambda: _answers(database), seconds=30, what="the database to be reachable again")
        finally:
            database.close()


def _answers(database: Database) -> bool:
    try:
        database.ping()
    except DatabaseUnavailable:
        return False
    return True


def test_a_worker_that_freezes_in_a_transaction_does_not_hold_its_job(
    postgresql_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.db.POSTGRESQL_IDLE_TRANSACTION_SECONDS", 1)
    frozen = Database(postgresql_database.url.render_as_string(hide_password=False))
    try:
        with postgresql_database.transaction() as session:
            now = clock(session)
            job_id = a_job(session, a_key(session, now), now).id
            claim = a_claim(session, job_id, now)
        later = now + timedelta(hours=1)

        def rescued() -> list[str]:
            with postgresql_database.transaction() as session:
                return jobs.rescue_lost(session, retry_delay_seconds=1, now=later)

        def freeze_before_the_commit() -> None:
            with frozen.transaction() as session:
                jobs.heartbeat(session, claim, lease_seconds=1, now=now)
                # When its lease passes, then the job is rescued although the worker says nothing,
                assert rescued() == [], "the row is not held: nothing is tried here"
                assert wait_until(rescued, seconds=30, what="the row to be let go of") == [job_id]

        # Given a worker that has renewed its lease and freezes,
        with pytest.raises(DatabaseUnavailable):
            freeze_before_the_commit()
        # and the worker learns that it has written nothing.
    finally:
        frozen.close()


def test_a_connection_that_is_in_use_when_its_database_is_closed_ends_when_it_comes_back(
    postgresql_database: Database,
) -> None:
    database = Database(postgresql_database.url.render_as_string(hide_password=False))
    with database.reading() as session:
        session.execute(text("SELECT 1"))
        connection = session.connection().connection.dbapi_connection
        assert connection is not None
        database.close()
        assert not connection.closed  # type: ignore[attr-defined]
    assert connection.closed  # type: ignore[attr-defined]


def _end_every_connection(database: Database) -> None:
    other = Database(database.url.render_as_string(hide_password=False))
    try:
        with other.engine.connect() as connection:
            ended: Any = connection.execute(
                text("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
            )
            assert ended.scalar_one() >= 1
    finally:
        other.close()
