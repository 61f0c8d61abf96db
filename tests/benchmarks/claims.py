"""Do claims scale: one to many workers, threads with connections of their own, empty a long queue on PostgreSQL.

    python -m tests.benchmarks.claims [--queued 10000] [--jobs 500] [--workers 1,5,10,20]

A worker claims the next message's job, renews its lease once and finishes it, by the verbs of `shared.jobs`: what is
measured is SQL and nothing else. Two messages lead to each job, as after a relay's re-send: half of the claims find
nothing, and none may be granted twice. Prints statements per job, waits for locks that PostgreSQL saw, and rates.
"""

from __future__ import annotations

import argparse
import queue
import tempfile
import threading
import time
from pathlib import Path
from statistics import quantiles

from sqlalchemy import event, func, insert, select, text
from sqlalchemy.orm import Session

import migrations
from shared import jobs
from shared.db import Database, clock
from shared.jobs import JobResult
from shared.models import Attempt, Job, JobState
from shared.servers import start_postgresql
from tests.factories import a_job, a_key


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how claims scale on PostgreSQL.")
    parser.add_argument("--queued", type=int, default=10_000, help="length of the queue")
    parser.add_argument("--jobs", type=int, default=500, help="how many of them are done in a run")
    parser.add_argument("--workers", default="1,5,10,20", help="how many at once, one run each")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, start_postgresql(Path(folder)) as server:
        migrations.upgrade(server.url)
        print("workers   jobs/s   claim p50 ms   p95 ms   statements/job   lock waits seen   granted twice")
        for workers in map(int, asked.workers.split(",")):
            measure(server.url, workers, asked.queued, asked.jobs)


def fill(session: Session, queued: int) -> list[str]:
    """A queue of that many jobs, and their ids: one handed in, the others its copies, in a few statements."""
    now = clock(session)
    first = a_job(session, a_key(session, now), now)
    facts = {column.name: getattr(first, column.name) for column in Job.__table__.columns}
    copies = [{**facts, "id": jobs.new_job_id(now)} for _ in range(queued - 1)]
    for start in range(0, len(copies), 500):
        session.execute(insert(Job), copies[start : start + 500])
    return [first.id, *(copy["id"] for copy in copies)]


def measure(url: str, workers: int, queued: int, count: int) -> None:
    """One run on a fresh queue; prints its line."""
    database = Database(url)
    with database.transaction() as session:
        session.execute(text("TRUNCATE jobs, attempts, deliveries, api_keys CASCADE"))
        ids = fill(session, queued)[:count]
    with database.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("ANALYZE"))
    messages: queue.SimpleQueue[str] = queue.SimpleQueue()
    for job_id in ids:
        messages.put(job_id)
        messages.put(job_id)
    statements = 0
    seconds: list[float] = []
    counting = threading.Lock()

    def count_statement(*_: object) -> None:
        nonlocal statements
        with counting:
            statements += 1

    event.listen(database.engine, "before_cursor_execute", count_statement)

    def work(name: str) -> None:
        while True:
            try:
                job_id = messages.get_nowait()
            except queue.Empty:
                return
            began = time.perf_counter()
            with database.transaction() as session:
                now = clock(session)
                claim = jobs.claim(session, job_id, worker_id=name, device="cpu", lease_seconds=20, now=now)
            took = time.perf_counter() - began
            with counting:
                seconds.append(took)
            if claim is None:
                continue
            with database.transaction() as session:
                jobs.heartbeat(session, claim, lease_seconds=20, now=clock(session))
            result = JobResult(f"{job_id}/result", 32, 24, 1000, "ab" * 32)
            with database.transaction() as session:
                jobs.succeed(session, claim, result, now=clock(session))

    watching, waits = threading.Event(), 0

    def watch() -> None:
        nonlocal waits
        looking = Database(url)
        while not watching.wait(0.05):
            with looking.reading() as session:
                found = session.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
                waits += int(found or 0)
        looking.close()

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    watching.set()
    watcher.join()
    with database.reading() as session:
        done = session.scalar(select(func.count()).where(Job.state == JobState.SUCCEEDED))
        twice = session.scalar(select(func.count()).where(Attempt.number > 1))
    assert done == count, f"{done} of {count} jobs succeeded"
    cuts = quantiles(seconds, n=20)
    print(
        f"{workers:7}   {count / took:6.0f}   {1000 * cuts[9]:12.1f}   {1000 * cuts[18]:6.1f}   "
        f"{statements / count:14.2f}   {waits:15}   {twice:13}",
        flush=True,
    )
    database.close()


if __name__ == "__main__":
    main()
