"""Do claims scale: one to many workers, threads with connections of their own, empty a long queue on PostgreSQL.

    python -m tests.benchmarks.claims [--queued 10000] [--jobs 500] [--workers 1,5,10,20]

A message has a worker claim the job whose turn it is, renew its lease once and finish it, by the verbs of
`shared.jobs`: what is measured is SQL and nothing else. The jobs are those of KEYS keys. Where the whole queue is done,
each message comes twice, as after a relay's re-send: half of the claims find nothing. No job may be granted twice.
Prints rates, statements per job, and how many statements of claims and how many others waited for a row at one of the
looks that are taken 20 times a second.
"""

from __future__ import annotations

import argparse
import queue
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
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

KEYS = 10
CLAIMING = ("SELECT jobs.id", "UPDATE jobs SET state=", "INSERT INTO attempts")
"""How the statements of a claim begin."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how claims scale on PostgreSQL.")
    parser.add_argument("--queued", type=int, default=10_000, help="length of the queue")
    parser.add_argument("--jobs", type=int, default=500, help="how many of them are done in a run")
    parser.add_argument("--workers", default="1,5,10,20", help="how many at once, one run each")
    asked = parser.parse_args()
    run(workers=list(map(int, asked.workers.split(","))), queued=asked.queued, count=asked.jobs)


def run(*, workers: Sequence[int], queued: int, count: int) -> None:
    """One run for each number of workers: of `queued` jobs `count` are done. Prints a table."""
    print(f"{count:,} of {queued:,} queued jobs")
    print("workers   jobs/s   claim p50 ms   p95 ms   statements/job   claims waited   others waited   granted twice")
    with tempfile.TemporaryDirectory() as folder, start_postgresql(Path(folder)) as server:
        migrations.upgrade(server.url)
        for each in workers:
            measure(server.url, each, queued, count)


def fill(session: Session, queued: int) -> list[str]:
    """A queue of that many jobs, and their ids: one handed in, the others its copies, in a few statements. KEYS keys
    have as many each, which stand where they would had each key handed in all of its own."""
    now = clock(session)
    keys = [a_key(session, now).id for _ in range(KEYS)]
    first = a_job(session, keys[0], now)
    facts = {column.name: getattr(first, column.name) for column in Job.__table__.columns}
    copies = []
    for number in range(1, queued):
        place, key = divmod(number, KEYS)
        tag_px = place * first.output_px
        copies.append({**facts, "id": jobs.new_job_id(now), "owner_key_id": keys[key], "start_tag_px": tag_px})
    for start in range(0, len(copies), 500):
        session.execute(insert(Job), copies[start : start + 500])
    return [first.id, *(copy["id"] for copy in copies)]


def measure(url: str, workers: int, queued: int, count: int) -> None:
    """One run on a fresh queue; prints its line."""
    database = Database(url)
    with database.transaction() as session:
        session.execute(text("TRUNCATE jobs, attempts, deliveries, api_keys CASCADE"))
        fill(session, queued)
    with database.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("ANALYZE"))
    messages: queue.SimpleQueue[None] = queue.SimpleQueue()
    for _ in range(2 * count if count == queued else count):
        messages.put(None)
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
                messages.get_nowait()
            except queue.Empty:
                return
            began = time.perf_counter()
            with database.transaction() as session:
                now = clock(session)
                job_id = jobs.next_due(session, ["cpu.interactive", "cpu.bulk"], now=now)
                claim = None
                if job_id is not None:
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

    watching = threading.Event()
    waits: Counter[str] = Counter()

    def watch() -> None:
        looking = Database(url)
        while not watching.wait(0.05):
            with looking.reading() as session:
                waiting = session.scalars(text("SELECT query FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
                waits.update("claims" if query.startswith(CLAIMING) else "others" for query in waiting)
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
        f"{statements / count:14.2f}   {waits['claims']:13}   {waits['others']:13}   {twice:13}",
        flush=True,
    )
    database.close()


if __name__ == "__main__":
    main()
