"""How far a deployment carries, and what gives way first: service times measured here, and a fleet simulated with them.

    python -m tests.benchmarks.capacity [--side PX] [--workers 10,100,1000,5000] [--euros-per-hour 0.08] [--sql-cores 8]
    python -m tests.benchmarks.capacity --page docs/capacity.md

Measured: a whole picture through the engine (one worker with every core of this machine), what its result takes, and a
job's SQL on PostgreSQL: how long a client waits for a statement, and how much of that the server computes. Simulated:
workers that take jobs from a queue that is never empty, each job with its statements, which need a core of one SQL
server each. What a statement waits for the others is what a fleet loses. Then the same with each remedy.

`--page` measures claims too (`tests.benchmarks.claims`), and writes all that is printed into the page, between its
marks; on a quiet machine it takes about two minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import io
import math
import os
import random
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import BinaryIO, cast

from sqlalchemy import event, text

import migrations
from shared import calibration, jobs
from shared.db import Database, clock
from shared.jobs import JobResult
from shared.servers import start_postgresql
from shared.settings import Settings
from tests.benchmarks import claims
from tests.benchmarks.claims import fill
from tests.factories import a_png
from worker.enlarging import Engine, Wanted
from worker.lifeline import PROGRESS_SECONDS

BEAT_STATEMENTS, BEAT_SECONDS = 3, 10.0
"""Of a worker's row: the clock, the look and the UPDATE of each beat."""
PROGRESS_STATEMENTS = 2
CONNECTIONS_PER_WORKER = 2
POSTGRESQL_CONNECTIONS = 100
"""What PostgreSQL grants unless it is told otherwise."""
LINE_MEGABYTES_PER_SECOND = 125.0
"""Of 1 Gbit/s."""
BEARABLE_LOSS = 0.1
"""A fleet that loses more of its time to SQL has outgrown its server."""
SIMULATED_SECONDS = 20.0
"""Or ten jobs, where that is longer; beside them two jobs' time in which nothing is counted yet."""
LONGEST_QUEUE = 10_000


@dataclass(frozen=True)
class Services:
    """What was measured, and what is assumed beside it: how many statements the SQL server computes at once, and how
    often progress is told."""

    job_seconds: float
    megapixels: float
    result_bytes: int
    statements: int
    statement_seconds: float
    """As a client sees it."""
    server_seconds: float
    """Of those, what the server computes."""
    sql_cores: int
    progress_seconds: float = PROGRESS_SECONDS


@dataclass(frozen=True)
class Load:
    """What a fleet comes to."""

    workers: int
    jobs_per_second: float
    sql_per_second: float
    sql_busy: float
    lost: float
    """Share of the jobs that the same workers would do if no statement waited for another."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure service times and simulate fleets with them.")
    parser.add_argument("--side", type=int, default=256, help="side of the picture, px")
    parser.add_argument("--workers", default="10,100,1000,5000", help="sizes of the fleet")
    parser.add_argument("--sql-cores", type=int, default=8, help="statements that the SQL server computes at once")
    parser.add_argument("--euros-per-hour", type=float, default=0.08, help="price of one worker's machine")
    parser.add_argument("--page", type=Path, help="write what is printed into this page")
    asked = parser.parse_args()
    print(of_the_machine())
    services = measured(asked.side, asked.sql_cores)
    printed = {"cost": cost(services, asked.side, asked.euros_per_hour)}
    printed["fleets"] = fleets(services, list(map(int, asked.workers.split(","))))
    for block in printed.values():
        print(f"\n{block}")
    if asked.page:
        printed["claims"] = claims_printed()
        printed["machine"] = of_the_machine()
        print(f"\n{printed['claims']}\n\n{printed['machine']}")
        asked.page.write_text(written(asked.page.read_text(), printed))


def of_the_machine() -> str:
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    now = datetime.now(UTC)
    return f"{os.cpu_count()} cores of {calibration.processor()}; load averages {load} on {now:%Y-%m-%d at %H:%M} UTC"


def measured(side_px: int, sql_cores: int) -> Services:
    job_seconds, result_bytes = measured_job(side_px)
    statements, statement_seconds, server_seconds = measured_sql()
    return Services(
        job_seconds, (4 * side_px) ** 2 / 1e6, result_bytes, statements, statement_seconds, server_seconds, sql_cores
    )


def cost(services: Services, side_px: int, euros_per_hour: float) -> str:
    per_hour = 3600 / services.job_seconds
    hours = 1000 * services.job_seconds / 3600
    return "\n".join(
        (
            f"one job: {side_px} x {side_px} px by srgan x4 to {services.megapixels:.2f} MP, "
            f"{services.result_bytes / 1e6:.2f} MB as PNG, in {services.job_seconds:.2f} s",
            f"one worker: 3600 / {services.job_seconds:.2f} = {per_hour:.0f} jobs/h, "
            f"x {services.megapixels:.2f} = {per_hour * services.megapixels:.0f} MP/h",
            f"1,000 pictures: 1000 x {services.job_seconds:.2f} / 3600 = {hours:.2f} h of one worker, "
            f"x {euros_per_hour:.2f} euros an hour = {hours * euros_per_hour:.3f} euros",
            f"its SQL: {services.statements} statements from claim to finish; a client waits "
            f"{1000 * services.statement_seconds:.2f} ms for one, of which the server computes "
            f"{1000 * services.server_seconds:.2f} ms",
        )
    )


def fleets(services: Services, sizes: list[int]) -> str:
    """The simulation's table, and below it what gives way in each fleet and what helps."""
    lines = ["workers   jobs/s   MP/s   SQL/s   SQL busy   lost to SQL   connections   S3 MB/s"]
    advice = []
    for workers in sizes:
        load = simulate(workers, services)
        megabytes = load.jobs_per_second * services.result_bytes / 1e6
        lines.append(
            f"{workers:7}   {load.jobs_per_second:6.1f}   {load.jobs_per_second * services.megapixels:4.0f}   "
            f"{load.sql_per_second:5.0f}   {load.sql_busy:8.0%}   {load.lost:11.0%}   "
            f"{workers * CONNECTIONS_PER_WORKER:11}   {megabytes:7.0f}"
        )
        advice += [f"{workers:7}   {each}" for each in gives_way(load, services, megabytes)]
    return "\n".join([*lines, "", "workers   what gives way, and what helps", *advice])


def gives_way(load: Load, services: Services, megabytes_per_second: float) -> list[str]:
    found = []
    connections = load.workers * CONNECTIONS_PER_WORKER
    if connections > POSTGRESQL_CONNECTIONS:
        found.append(f"connections: {connections}, PostgreSQL grants {POSTGRESQL_CONNECTIONS}: PgBouncer")
    if load.lost > BEARABLE_LOSS:
        rarer = simulate(load.workers, replace(services, progress_seconds=2 * services.progress_seconds))
        found.append(
            f"SQL: {load.lost:.0%} lost; progress each {2 * services.progress_seconds:g} s and not each "
            f"{services.progress_seconds:g} s: {rarer.lost:.0%}"
        )
        parts = 1
        divided = load
        while divided.lost > BEARABLE_LOSS:
            parts += 1
            divided = simulate(math.ceil(load.workers / parts), services)
        found.append(f"SQL: queues divided over {parts} servers: {divided.lost:.0%} lost")
    if megabytes_per_second > LINE_MEGABYTES_PER_SECOND:
        lines = math.ceil(megabytes_per_second / LINE_MEGABYTES_PER_SECOND)
        found.append(
            f"storage: {megabytes_per_second:.0f} MB/s of results, {lines} lines of 1 Gbit/s, or more prefixes"
        )
    return found or ["nothing"]


def measured_job(side_px: int) -> tuple[float, int]:
    """(median of five pictures through the engine, from file to file, in seconds; bytes of the result)."""
    engine = Engine.of(Settings(), "cpu")
    wanted = Wanted(scale=4, model="srgan", format="png")
    picture = a_png(side_px, side_px)
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.png"
        for _ in range(6):
            began = time.perf_counter()
            engine.enlarge_file(cast(BinaryIO, io.BytesIO(picture)), target, wanted)
            seconds.append(time.perf_counter() - began)
        # The first also loads the network.
        return median(seconds[1:]), target.stat().st_size


def measured_sql(rounds: int = 200) -> tuple[int, float, float]:
    """(statements of one job from claim to finish, seconds that a client waits for each, those that the server computes
    of them): one client, LONGEST_QUEUE jobs in the queue, a PostgreSQL that does not wait for the disk."""
    count = 0
    waited = began = 0.0

    def begins(*_: object) -> None:
        nonlocal began
        began = time.perf_counter()

    def ends(*_: object) -> None:
        nonlocal count, waited
        count += 1
        waited += time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder, start_postgresql(Path(folder)) as server:
        migrations.upgrade(server.url)
        database = Database(server.url)
        with database.transaction() as session:
            fill(session, LONGEST_QUEUE)
        with database.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(text("ANALYZE"))
            backend = connection.scalar(text("SELECT pg_backend_pid()"))
        assert isinstance(backend, int)

        def once() -> None:
            with database.transaction() as session:
                now = clock(session)
                job_id = jobs.next_due(session, ["cpu.interactive"], now=now)
                assert job_id is not None
                claim = jobs.claim(session, job_id, worker_id="w", device="cpu", lease_seconds=20, now=now)
            assert claim is not None
            with database.transaction() as session:
                jobs.succeed(session, claim, JobResult("key", 32, 24, 1000, "ab" * 32), now=clock(session))

        for _ in range(20):
            once()
        event.listen(database.engine, "before_cursor_execute", begins)
        event.listen(database.engine, "after_cursor_execute", ends)
        computed = _computed_seconds(backend)
        for _ in range(rounds):
            once()
        computed = _computed_seconds(backend) - computed
        database.close()
    return round(count / rounds), waited / count, computed / count


def _computed_seconds(pid: int) -> float:
    """Processor time that a process of this machine has had: proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def simulate(workers: int, services: Services) -> Load:
    """Runs the fleet for SIMULATED_SECONDS."""
    chance = random.Random(1)
    events: list[tuple[float, int, Callable[[float], None]]] = []
    free = [0.0] * services.sql_cores
    busy = sent = done = 0.0
    number = 0
    begins = 2 * services.job_seconds
    span = max(SIMULATED_SECONDS, 10 * services.job_seconds)
    on_the_way_seconds = max(0.0, services.statement_seconds - services.server_seconds)

    def at(moment: float, act: Callable[[float], None]) -> None:
        nonlocal number
        number += 1
        heapq.heappush(events, (moment, number, act))

    def sql(now: float, count: int, then: Callable[[float], None]) -> None:
        """That many statements one after the other, each on the first core that is free."""
        nonlocal busy, sent
        if count == 0:
            then(now)
            return
        starts = max(now, heapq.heappop(free))
        takes = chance.expovariate(1 / services.server_seconds)
        heapq.heappush(free, starts + takes)
        if begins <= starts < begins + span:
            busy += takes
            sent += 1
        at(starts + takes + on_the_way_seconds, lambda ended: sql(ended, count - 1, then))

    def job(now: float) -> None:
        left = services.job_seconds * chance.uniform(0.9, 1.1)

        def work(now: float) -> None:
            nonlocal left
            if left <= services.progress_seconds:
                at(now + left, lambda ended: sql(ended, services.statements - services.statements // 2, finish))
            else:
                left -= services.progress_seconds
                at(now + services.progress_seconds, lambda ended: sql(ended, PROGRESS_STATEMENTS, work))

        sql(now, services.statements // 2, work)

    def finish(now: float) -> None:
        nonlocal done
        if now >= begins:
            done += 1
        job(now)

    def beat(now: float) -> None:
        sql(now, BEAT_STATEMENTS, lambda _: None)
        at(now + BEAT_SECONDS, beat)

    for _ in range(workers):
        at(chance.uniform(0, services.job_seconds), job)
        at(chance.uniform(0, BEAT_SECONDS), beat)
    while events[0][0] < begins + span:
        moment, _, act = heapq.heappop(events)
        act(moment)
    rate = done / span
    reports = PROGRESS_STATEMENTS * max(0, math.ceil(services.job_seconds / services.progress_seconds) - 1)
    ideal = workers / (services.job_seconds + (services.statements + reports) * services.statement_seconds)
    return Load(workers, rate, sent / span, busy / span / services.sql_cores, max(0.0, 1 - rate / ideal))


def claims_printed() -> str:
    """What `python -m tests.benchmarks.claims` prints: runs from a long queue, and one that empties it."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        claims.run(workers=(1, 5, 10, 20), queued=LONGEST_QUEUE, count=500)
        claims.run(workers=(20,), queued=LONGEST_QUEUE // 4, count=LONGEST_QUEUE // 4)
    return said.getvalue().rstrip()


def written(page: str, printed: dict[str, str]) -> str:
    """The page with each block between its marks replaced. Raises ValueError where the page lacks one."""
    for name, block in printed.items():
        mark = re.compile(rf"(<!-- printed: {name} -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)
        indented = "\n".join(f"    {line}".rstrip() for line in block.splitlines())
        page, count = mark.subn(lambda found, told=indented: f"{found[1]}{told}{found[2]}", page)
        if count != 1:
            raise ValueError(f"The page has {count} places for {name!r}.")
    return page


if __name__ == "__main__":
    main()
