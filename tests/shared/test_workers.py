"""The rows of worker processes, and the thread that keeps one fresh."""

from __future__ import annotations

import os
import subprocess
import threading
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from shared import commands, queueing, workers
from shared.db import Database
from shared.errors import DatabaseUnavailable
from shared.models import Worker
from shared.workers import Presence, WorkerFacts
from tests.conftest import wait_until

FACTS = WorkerFacts("images-host-1-abc", "images", "host", 1, ("cpu.interactive",), "cpu", "a CPU")


def row(database: Database, worker_id: str = FACTS.id) -> Worker | None:
    with database.transaction() as session:
        return session.get(Worker, worker_id)


def test_a_process_that_enlists_is_alive_until_it_is_silent_or_stops(database: Database, now: datetime) -> None:
    def alive(at: datetime) -> list[str]:
        with database.transaction() as session:
            return [w.id for w in queueing.live_workers(session, worker_lost_after_seconds=30, now=at)]

    later = now + timedelta(seconds=29)
    with database.transaction() as session:
        workers.enlist(session, FACTS, models_loaded=["srgan"], now=now)
    assert alive(later) == [FACTS.id]
    assert alive(now + timedelta(seconds=31)) == []

    with database.transaction() as session:
        assert workers.seen(session, FACTS.id, models_loaded=["srgan", "srresnet"], now=later)
    assert alive(now + timedelta(seconds=31)) == [FACTS.id]

    with database.transaction() as session:
        workers.stopped(session, FACTS.id, now=later)
    assert alive(later) == []
    kept = row(database)
    assert kept is not None
    assert (kept.queues, kept.models_loaded, kept.device_name) == (
        ["cpu.interactive"],
        ["srgan", "srresnet"],
        "a CPU",
    )


def test_a_process_says_which_job_it_works_on(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        workers.enlist(session, FACTS, now=now)
    for change, job_id, current in (
        (workers.working_on, "job_1", "job_1"),
        (workers.working_on, "job_2", "job_2"),
        # It was finished beside the other.
        (workers.done_with, "job_1", "job_2"),
        (workers.done_with, "job_2", None),
    ):
        with database.transaction() as session:
            change(session, FACTS.id, job_id, now=now)
        found = row(database)
        assert found is not None
        assert found.current_job_id == current


def test_processes_not_heard_of_for_a_week_are_forgotten(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        workers.enlist(session, FACTS, now=now)
    week = timedelta(seconds=workers.KEPT_SECONDS)
    with database.transaction() as session:
        assert workers.forget_lost(session, now=now + week) == 0
        assert workers.forget_lost(session, now=now + week + timedelta(seconds=1)) == 1
    assert row(database) is None


def test_two_processes_never_have_the_same_id() -> None:
    first, second = workers.this_process("relay"), workers.this_process("relay")
    assert first.pid == second.pid
    assert first.id != second.id


def test_presence_enlists_beats_and_says_when_it_ends(sqlite_database: Database) -> None:
    facts = workers.this_process("chores", queues=["chores"])
    presence = Presence(sqlite_database, facts, interval_seconds=0.02)
    presence.start()
    first = row(sqlite_database, facts.id)
    assert first is not None
    wait_until(lambda: (r := row(sqlite_database, facts.id)) and r.seen_at > first.seen_at, seconds=10, what="a beat")
    presence.stop()
    last = row(sqlite_database, facts.id)
    assert last is not None
    assert last.stopped_at is not None


def test_a_process_that_hangs_comes_to_look_lost(sqlite_database: Database) -> None:
    facts = workers.this_process("images")
    is_alive, asked = threading.Event(), threading.Event()

    def answer() -> bool:
        asked.set()
        return is_alive.is_set()

    is_alive.set()
    presence = Presence(sqlite_database, facts, interval_seconds=0.02, is_alive=answer)
    presence.start()
    is_alive.clear()
    # Once the thread has asked again, the beat before that answer is over.
    asked.clear()
    wait_until(asked.is_set, seconds=10, what="a beat")
    asked.clear()
    wait_until(asked.is_set, seconds=10, what="another beat")
    silent = row(sqlite_database, facts.id)
    assert silent is not None
    asked.clear()
    wait_until(asked.is_set, seconds=10, what="one beat more")
    still = row(sqlite_database, facts.id)
    assert still is not None
    assert still.seen_at == silent.seen_at
    presence.stop()


def test_presence_waits_for_a_database_that_is_away(sqlite_database: Database) -> None:
    class Away(Database):
        is_away = True

        def transaction(self):  # type: ignore[no-untyped-def]
            if self.is_away:
                raise DatabaseUnavailable("away")
            return super().transaction()

    away = Away(sqlite_database.url.render_as_string(hide_password=False))
    facts = workers.this_process("relay")
    presence = Presence(away, facts, interval_seconds=0.02)
    presence.start()
    assert row(sqlite_database, facts.id) is None
    away.is_away = False
    wait_until(lambda: row(sqlite_database, facts.id), seconds=10, what="the row, now that the database is back")
    away.is_away = True
    presence.stop()
    away.close()
    found = row(sqlite_database, facts.id)
    assert found is not None
    assert found.stopped_at is None


# --- beats on this host's disk ---------------------------------------------------------------------------------------


@pytest.fixture
def beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process leaves its beats, and looks for them."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_beat_needs_no_database_and_ends_with_the_process(beats: Path) -> None:
    nowhere = Database("postgresql+psycopg://nobody@127.0.0.1:1/nothing")
    presence = Presence(nowhere, workers.this_process("relay"), interval_seconds=60)
    assert workers.silent_for_seconds() == {}
    presence.start()
    assert list(workers.silent_for_seconds()) == [os.getpid()]
    presence.stop()
    assert workers.silent_for_seconds() == {}
    nowhere.close()


def test_a_process_that_hangs_leaves_no_beat_and_is_told_of(beats: Path, sqlite_database: Database) -> None:
    presence = Presence(sqlite_database, workers.this_process("images"), interval_seconds=60)
    presence.start()
    [file] = beats.glob("enlarger-beat-*")
    assert CliRunner().invoke(commands.alive).exit_code == 0
    long_ago = file.stat().st_mtime - 100
    os.utime(file, (long_ago, long_ago))
    told = CliRunner().invoke(commands.alive)
    assert told.exit_code == 1
    assert f"Process {os.getpid()} has been silent for 100 s." in told.output
    presence.stop()
    assert "has begun" in CliRunner().invoke(commands.alive).output


def test_a_beat_of_a_process_that_is_gone_counts_for_nobody(beats: Path) -> None:
    # Its number is another process's today: that one was started at another moment.
    (beats / f"enlarger-beat-{os.getpid()}-1").touch()
    (beats / "enlarger-beat-of-somebody-else").touch()
    assert workers.silent_for_seconds() == {}


def test_what_killed_processes_have_left_is_removed_by_those_that_start(beats: Path, sqlite_database: Database) -> None:
    killed, of_another_container = (beats / f"enlarger-beat-{pid}-1" for pid in (4_000_001, 4_000_002))
    for file in (killed, of_another_container):
        file.touch()
    with subprocess.Popen(["sleep", "60"]) as hanging:
        of_hanging = beats / f"enlarger-beat-{hanging.pid}-{workers._started(hanging.pid)}"
        of_hanging.touch()
        for file in (killed, of_hanging):
            os.utime(file, (0, 0))
        presence = Presence(sqlite_database, workers.this_process("relay"), interval_seconds=60)
        presence.start()
        presence.stop()
        assert (killed.exists(), of_another_container.exists(), of_hanging.exists()) == (False, True, True)
        hanging.kill()
