"""Sends what was not sent, gives back what a dead worker held: a plain loop over SQL, in a process of its own.

    python -m worker.relay

It is no Celery schedule, because it must go on when Redis does not. Two relays at once do no harm: all they do is
conditional. Each step has a thread of its own: one that waits for a frozen Redis must not hold up the rescue of jobs.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from shared import deliveries, figures, jobs, queries, queueing, shards, workers
from shared.db import Database, clock
from shared.errors import Unavailable
from shared.outbox import SWEEP_BLOBS, Broker, relay_due
from shared.settings import Settings, load
from shared.telemetry import configure_logs, log
from shared.workers import Presence

ROWS_AT_ONCE = 100
"""Rows one transaction changes at most: SQLite has one writer, and others wait for it."""

FIGURES_SECONDS = 60.0
"""Hours end once in an hour; looking is one SELECT."""

JUMP_SECONDS = 2.0
"""A clock that is set by less shifts no lease by much; a good time service moves it in smaller steps."""

LAST_WAIT_SECONDS = 0.3
"""How long a stop waits for the steps; what a step was doing then is conditional and can end anywhere."""


@dataclass(frozen=True)
class Step:
    """Something to do again and again. It may raise Unavailable, and is then simply tried at its next turn."""

    name: str
    interval_seconds: float
    act: Callable[[], None]


def run(steps: Sequence[Step], stopping: threading.Event) -> bool:
    """Runs every step in a thread of its own until `stopping` is set. True where all ended because of that.

    A step that raises anything but Unavailable has met a fault of ours: its thread ends, `stopping` is set, and the
    answer is False. The process should end then; whoever supervises it starts it afresh.
    """
    failed = threading.Event()
    threads = [
        threading.Thread(target=_repeat, args=(step, stopping, failed), name=f"relay-{step.name}", daemon=True)
        for step in steps
    ]
    for thread in threads:
        thread.start()
    stopping.wait()
    for thread in threads:
        thread.join(LAST_WAIT_SECONDS / len(threads))
    return not failed.is_set()


def _repeat(step: Step, stopping: threading.Event, failed: threading.Event) -> None:
    is_put_off = False
    try:
        while not stopping.is_set():
            try:
                step.act()
            except Unavailable as error:
                # Said once: a server that is away for an hour would fill the log.
                if not is_put_off:
                    log.warning("relay.step_put_off", step=step.name, code=error.code, detail=error.detail)
                is_put_off = True
            else:
                if is_put_off:
                    log.info("relay.step_resumed", step=step.name)
                is_put_off = False
            stopping.wait(step.interval_seconds)
    except Exception:  # noqa: BLE001  (logged in full; the process ends and is started afresh)
        log.exception("relay.step_failed", step=step.name)
        failed.set()
        stopping.set()


class ClockWatch:
    """Notices when the database's clock is set, by a clock of this process that cannot be."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._ahead_seconds: float | None = None
        self._looked_seconds = 0.0

    def jumped_seconds(self, now: datetime) -> float:
        """By how much it was set since the last `accept`, 0.0 where that is within JUMP_SECONDS."""
        self._looked_seconds = now.timestamp() - self._monotonic()
        jump_seconds = 0.0 if self._ahead_seconds is None else self._looked_seconds - self._ahead_seconds
        return jump_seconds if abs(jump_seconds) > JUMP_SECONDS else 0.0

    def accept(self) -> None:
        """What the last look found has been seen to, and is committed."""
        self._ahead_seconds = self._looked_seconds


def steps(database: Database, broker: Broker, settings: Settings, stopping: threading.Event) -> list[Step]:
    """What the relay does, and how often."""
    watch = ClockWatch()
    return [
        Step("rescue", settings.rescue_interval_seconds, lambda: rescue(database, settings, watch)),
        Step("publish", settings.relay_interval_seconds, lambda: publish(database, broker, settings, stopping)),
        Step("route", settings.worker_lost_after_seconds / 3, lambda: route(database, settings)),
        Step("figures", FIGURES_SECONDS, lambda: keep_hours(database)),
        Step("sweep", settings.sweep_interval_seconds, lambda: broker.publish_chore(SWEEP_BLOBS)),
    ]


def rescue(database: Database, settings: Settings, watch: ClockWatch) -> None:
    """Gives back jobs whose lease has passed, and ends queued ones whose deadline has. SQL only. Raises Unavailable."""
    while True:
        with database.reading() as session:
            now = clock(session)
            if not watch.jumped_seconds(now) and not queries.is_any_late(session, now=now):
                # As on most turns: a transaction takes the turn of somebody who has something to write.
                watch.accept()
                return
        with database.transaction() as session:
            now = clock(session)
            if jump_seconds := watch.jumped_seconds(now):
                log.warning("relay.clock_jumped", seconds=round(jump_seconds, 1))
                jobs.clock_jumped(session, jump_seconds, lease_seconds=settings.lease_seconds, now=now)
                shards.clock_jumped(session, lease_seconds=settings.lease_seconds, now=now)
                deliveries.clock_jumped(session, jump_seconds, now=now)
            rescued = jobs.rescue_lost(
                session, retry_delay_seconds=settings.retry_delay_seconds, now=now, limit=ROWS_AT_ONCE
            )
        watch.accept()
        with database.transaction() as session:
            expired = jobs.expire_overdue(session, now=clock(session), limit=ROWS_AT_ONCE)
        if rescued or expired:
            log.info("relay.rescued", jobs=rescued, expired=expired)
        if max(len(rescued), len(expired)) < ROWS_AT_ONCE:
            return


def route(database: Database, settings: Settings) -> None:
    """Moves `auto` jobs from where nobody serves them any more to where somebody does. SQL only. Raises Unavailable."""
    with database.reading() as session:
        stranded = queueing.stranded_queues(
            session, worker_lost_after_seconds=settings.worker_lost_after_seconds, now=clock(session)
        )
    for source, target, needs in stranded:
        moved = ROWS_AT_ONCE
        while moved == ROWS_AT_ONCE:
            with database.transaction() as session:
                moved = len(jobs.reroute(session, source, target, needs=needs, now=clock(session), limit=ROWS_AT_ONCE))
            if moved:
                log.info("relay.rerouted", jobs=moved, queue=target)


def keep_hours(database: Database) -> None:
    """Keeps a row of figures for every hour that is over, for the operator's charts. SQL only. Raises Unavailable."""
    with database.transaction() as session:
        figures.roll_up(session, now=clock(session))


def publish(database: Database, broker: Broker, settings: Settings, stopping: threading.Event) -> None:
    """Sends every message that is due. Raises Unavailable."""
    sent = relay_due(database, broker, settings, stopping=stopping.is_set)
    if sent:
        log.info("relay.sent", messages=sent)


def main() -> int:
    """Runs until SIGTERM or SIGINT; ends within a second of it. The exit status is 1 where a step failed."""
    settings = load()
    configure_logs(settings.log_level, settings.log_format)
    database, broker = Database(settings.sqlalchemy_url), Broker(settings)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    presence = Presence(
        database, workers.this_process("relay"), interval_seconds=settings.worker_lost_after_seconds / 3
    )
    presence.start()
    log.info("relay.started", worker_id=presence.facts.id)
    is_well = run(steps(database, broker, settings, stopping), stopping)
    presence.stop()
    log.info("relay.stopped", well=is_well)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
