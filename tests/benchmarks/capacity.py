"""How far a deployment carries, and what gives way first: service times measured here, and a fleet simulated with them.

    python -m tests.benchmarks.capacity [--side 256] [--workers 10,100,1000] [--euros-per-hour 0.08]

Measured: a whole picture through the engine (one worker with every core of this machine), a job's SQL on PostgreSQL.
Simulated: workers that take jobs from a queue that is never empty, each job with its statements, all of which pass
through one SQL server of so many lanes at once. What a statement waits for the others is what a fleet loses.
"""

from __future__ import annotations

import argparse
import heapq
import io
import math
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import BinaryIO, cast

from sqlalchemy import event, text

import migrations
from shared import jobs
from shared.db import Database, clock
from shared.jobs import JobResult
from shared.servers import start_postgresql
from shared.settings import Settings
from tests.benchmarks.claims import fill
from tests.factories import a_png
from worker.enlarging import Engine, Wanted
from worker.execute import PROGRESS_SECONDS

BEAT_STATEMENTS, BEAT_SECONDS = 3, 10.0
"""Of a worker's row: the clock, the look and the UPDATE of each beat."""
PROGRESS_STATEMENTS = 2
CONNECTIONS_PER_WORKER = 2
POSTGRESQL_CONNECTIONS = 100
"""What PostgreSQL grants unless it is told otherwise."""
SIMULATED_SECONDS = 30.0
"""Or ten jobs, where that is longer; beside them two jobs' time in which nothing is counted yet."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure service times and simulate fleets with them.")
    parser.add_argument("--side", type=int, default=256, help="side of the picture, px")
    parser.add_argument("--workers", default="10,100,1000", help="sizes of the fleet")
    parser.add_argument("--sql-lanes", type=int, default=8, help="statements that the SQL server runs at once")
    parser.add_argument("--euros-per-hour", type=float, default=0.08, help="price of one worker's machine")
    parser.add_argument("--job-seconds", type=float, help="take this for a job and measure none")
    asked = parser.parse_args()
    job_seconds = asked.job_seconds or measured_job_seconds(asked.side)
    megapixels = (4 * asked.side) ** 2 / 1e6
    statements, statement_seconds = measured_sql()
    per_hour = 3600 / job_seconds
    print(
        f"one job: {asked.side} x {asked.side} px to {megapixels:.2f} MP in {job_seconds:.2f} s; {os.cpu_count()} cores"
    )
    print(f"one worker: {per_hour:.0f} jobs/h, {per_hour * megapixels:.0f} MP/h")
    print(f"1,000 pictures: {1000 / per_hour:.2f} h of one worker, {1000 / per_hour * asked.euros_per_hour:.3f} euros")
    print(f"its SQL: {statements:.0f} statements and {1000 * statement_seconds:.2f} ms each; progress, beats beside")
    print("\nworkers   jobs/s   MP/s   SQL/s   SQL busy   lost to SQL   connections   S3 MB/s")
    for workers in map(int, asked.workers.split(",")):
        simulate(workers, job_seconds, megapixels, round(statements), statement_seconds, asked.sql_lanes)
    print(
        f"\nSQL busy: of {asked.sql_lanes} statements at once. connections: PostgreSQL grants {POSTGRESQL_CONNECTIONS}."
    )


def measured_job_seconds(side_px: int) -> float:
    """Median of three pictures through the engine, from file to file."""
    engine = Engine.of(Settings(), "cpu")
    wanted = Wanted(scale=4, model="srgan", format="png")
    picture = a_png(side_px, side_px)
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(4):
            began = time.perf_counter()
            engine.enlarge_file(cast(BinaryIO, io.BytesIO(picture)), Path(folder) / "out.png", wanted)
            seconds.append(time.perf_counter() - began)
    # The first also loads the network.
    return median(seconds[1:])


def measured_sql(rounds: int = 100) -> tuple[float, float]:
    """(statements of one job from claim to finish, seconds of each), one client on an otherwise idle PostgreSQL."""
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    with tempfile.TemporaryDirectory() as folder, start_postgresql(Path(folder)) as server:
        migrations.upgrade(server.url)
        database = Database(server.url)
        with database.transaction() as session:
            fill(session, rounds)
            session.execute(text("SELECT 1"))
        event.listen(database.engine, "before_cursor_execute", counted)
        began = time.perf_counter()
        for _ in range(rounds):
            with database.transaction() as session:
                now = clock(session)
                job_id = jobs.next_due(session, ["cpu.interactive"], now=now)
                assert job_id is not None
                claim = jobs.claim(session, job_id, worker_id="w", device="cpu", lease_seconds=20, now=now)
            assert claim is not None
            with database.transaction() as session:
                jobs.succeed(session, claim, JobResult("key", 32, 24, 1000, "ab" * 32), now=clock(session))
        seconds = time.perf_counter() - began
        database.close()
    return count / rounds, seconds / count


def simulate(
    workers: int, job_seconds: float, megapixels: float, statements: int, statement_seconds: float, lanes: int
) -> None:
    """Runs the fleet for SIMULATED_SECONDS and prints its line."""
    chance = random.Random(1)
    events: list[tuple[float, int, Callable[[float], None]]] = []
    free = [0.0] * lanes
    busy = sent = done = 0.0
    number = 0
    begins = 2 * job_seconds
    span = max(SIMULATED_SECONDS, 10 * job_seconds)

    def at(moment: float, act: Callable[[float], None]) -> None:
        nonlocal number
        number += 1
        heapq.heappush(events, (moment, number, act))

    def sql(now: float, count: int, then: Callable[[float], None]) -> None:
        """That many statements one after the other, each in the first lane that is free."""
        nonlocal busy, sent
        if count == 0:
            then(now)
            return
        starts = max(now, heapq.heappop(free))
        takes = chance.expovariate(1 / statement_seconds)
        heapq.heappush(free, starts + takes)
        if begins <= starts < begins + span:
            busy += takes
            sent += 1
        at(starts + takes, lambda ended: sql(ended, count - 1, then))

    def job(now: float) -> None:
        left = job_seconds * chance.uniform(0.9, 1.1)

        def work(now: float) -> None:
            nonlocal left
            if left <= PROGRESS_SECONDS:
                at(now + left, lambda ended: sql(ended, statements - statements // 2, finish))
            else:
                left -= PROGRESS_SECONDS
                at(now + PROGRESS_SECONDS, lambda ended: sql(ended, PROGRESS_STATEMENTS, work))

        sql(now, statements // 2, work)

    def finish(now: float) -> None:
        nonlocal done
        if now >= begins:
            done += 1
        job(now)

    def beat(now: float) -> None:
        sql(now, BEAT_STATEMENTS, lambda _: None)
        at(now + BEAT_SECONDS, beat)

    for _ in range(workers):
        at(chance.uniform(0, job_seconds), job)
        at(chance.uniform(0, BEAT_SECONDS), beat)
    while events[0][0] < begins + span:
        moment, _, act = heapq.heappop(events)
        act(moment)
    rate = done / span
    reports = PROGRESS_STATEMENTS * max(0, math.ceil(job_seconds / PROGRESS_SECONDS) - 1)
    ideal = workers / (job_seconds + (statements + reports) * statement_seconds)
    print(
        f"{workers:7}   {rate:6.1f}   {rate * megapixels:4.0f}   {sent / span:5.0f}   {busy / span / lanes:8.0%}   "
        f"{max(0.0, 1 - rate / ideal):11.0%}   {workers * CONNECTIONS_PER_WORKER:11}   {rate * megapixels * 1.5:7.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
