"""A message is a hint that is sent again until something came of it; nobody ever waits for the broker."""

from __future__ import annotations

import base64
import functools
import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import redis
from sqlalchemy import select

from shared import deliveries, jobs, outbox, queueing, servers
from shared.db import Database, clock
from shared.errors import BrokerUnavailable, DatabaseUnavailable
from shared.models import Delivery, Job
from shared.outbox import Broker, Hurrier, JobMessage
from shared.settings import Settings
from tests.conftest import closed_port, statements, wait_until
from tests.factories import a_claim, a_job, a_key, retryable

HOOK = "https://receiver.example/hook"


@pytest.fixture
def broker(settings: Settings, redis_url: str) -> Iterator[Broker]:
    made = Broker(settings)
    yield made
    made.close()


@contextmanager
def a_frozen_redis() -> Iterator[str]:
    """A server that takes connections and never says a word, as a stopped Redis does."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"


@contextmanager
def broker_at(settings: Settings, url: str) -> Iterator[Broker]:
    made = Broker(settings.model_copy(update={"redis_url": url}))
    try:
        yield made
    finally:
        made.close()


def messages(url: str, queue: str) -> list[dict[str, Any]]:
    """What waits in a queue of Redis, the newest first: task, args, time limits."""
    with closing(redis.Redis.from_url(url)) as client:
        found = []
        for raw in client.lrange(queue, 0, -1):
            envelope = json.loads(raw)
            args, kwargs, _ = json.loads(base64.b64decode(envelope["body"]))
            assert kwargs == {}
            headers = envelope["headers"]
            found.append({"task": headers["task"], "args": args, "timelimit": headers["timelimit"]})
        return found


def ids_in(url: str, queue: str = "cpu.interactive") -> list[str]:
    return [message["args"][0] for message in messages(url, queue)]


def never() -> bool:
    return False


def queue_jobs(database: Database, count: int, **asked: Any) -> list[str]:
    with database.transaction() as session:
        now = clock(session)
        key = a_key(session, now)
        return [a_job(session, key, now, **asked).id for _ in range(count)]


def published(database: Database) -> list[tuple[int, bool]]:
    """(copies sent, and whether a moment is written) of every job."""
    with database.reading() as session:
        rows = session.execute(select(Job.published_count, Job.published_at).order_by(Job.id))
        return [(row.published_count, row.published_at is not None) for row in rows]


# --- the message ----------------------------------------------------------------------------------------------------


def test_a_message_carries_an_id_and_nothing_else(broker: Broker, redis_url: str) -> None:
    broker.publish_job(JobMessage("job_1", "cpu.interactive"))
    broker.publish_job(JobMessage("job_2", "gpu.bulk"))
    broker.publish_chore(outbox.DELIVER_WEBHOOK, "msg_1")
    broker.publish_chore(outbox.SWEEP_BLOBS)
    assert messages(redis_url, "cpu.interactive") == [
        {"task": outbox.RUN_JOB, "args": ["job_1"], "timelimit": [None, None]}
    ]
    assert messages(redis_url, "gpu.bulk") == [{"task": outbox.RUN_JOB, "args": ["job_2"], "timelimit": [None, None]}]
    assert messages(redis_url, "chores") == [
        {"task": outbox.SWEEP_BLOBS, "args": [], "timelimit": [None, None]},
        {"task": outbox.DELIVER_WEBHOOK, "args": ["msg_1"], "timelimit": [None, None]},
    ]


def test_a_mistyped_queue_is_an_error_and_not_a_queue_nobody_reads(broker: Broker) -> None:
    with pytest.raises(Exception, match="cpu.interactiv"):
        broker.publish_job(JobMessage("job_1", "cpu.interactiv"))


def test_celery_is_set_as_reliability_asks(settings: Settings) -> None:
    app = outbox.celery_app(settings)
    conf, transport = app.conf, app.conf.broker_transport_options
    assert (transport["visibility_timeout"], transport["unacked_restore_interval"]) == (7200, 10)
    assert (transport["unacked_restore_throttle"], transport["retry_on_timeout"]) == (1, False)
    assert (transport["socket_timeout"], transport["socket_connect_timeout"]) == (5, 2)
    assert (transport["socket_keepalive"], transport["health_check_interval"]) == (True, 10)
    assert (conf.broker_connection_retry_on_startup, conf.broker_connection_max_retries) == (True, None)
    assert (conf.broker_pool_acquire_timeout, conf.task_publish_retry) == (2, False)
    assert (conf.task_acks_late, conf.task_acks_on_failure, conf.task_acks_on_timeout) == (True, True, True)
    assert (conf.task_reject_on_worker_lost, conf.worker_prefetch_multiplier) == (False, 1)
    assert (conf.worker_pool, conf.worker_proc_alive_timeout) == ("prefork", 120)
    assert conf.worker_cancel_long_running_tasks_on_connection_loss is False
    assert conf.worker_soft_shutdown_timeout == 30
    assert (conf.worker_enable_remote_control, conf.worker_send_task_events) == (False, False)
    assert (conf.task_ignore_result, conf.accept_content) == (True, ["json"])
    assert not conf.get("result_backend")
    assert conf.task_create_missing_queues is False
    assert {queue.name for queue in conf.task_queues} == {*queueing.IMAGE_QUEUES, "chores"}
    app.close()


def test_the_generation_stays_until_redis_is_wiped(broker: Broker, redis_url: str) -> None:
    first = broker.generation()
    assert broker.generation() == first
    with closing(redis.Redis.from_url(redis_url)) as client:
        client.flushall()
    assert broker.generation() != first


# --- the relay ------------------------------------------------------------------------------------------------------


def test_the_relay_sends_what_was_never_sent_and_marks_it_after(
    database: Database, broker: Broker, settings: Settings, redis_url: str
) -> None:
    ids = queue_jobs(database, 3)
    assert outbox.relay_due(database, broker, settings, stopping=never) == 3
    assert ids_in(redis_url)[::-1] == sorted(ids)
    assert published(database) == [(1, True)] * 3
    assert outbox.relay_due(database, broker, settings, stopping=never) == 0
    assert len(ids_in(redis_url)) == 3


def test_while_jobs_wait_whose_messages_are_on_their_way_a_turn_is_one_statement(
    database: Database, broker: Broker, settings: Settings
) -> None:
    queue_jobs(database, 3)
    assert outbox.relay_due(database, broker, settings, stopping=never) == 3
    with statements(database) as turn:
        assert outbox.relay_due(database, broker, settings, stopping=never) == 0
    assert len([each for each in turn if "clock_timestamp" not in each]) == 1


def test_each_job_goes_to_its_own_queue(
    sqlite_database: Database, broker: Broker, settings: Settings, redis_url: str
) -> None:
    ids = {queue: queue_jobs(sqlite_database, 1, queue=queue) for queue in queueing.IMAGE_QUEUES}
    outbox.relay_due(sqlite_database, broker, settings, stopping=never)
    assert {queue: ids_in(redis_url, queue) for queue in ids} == ids


def test_a_wiped_redis_is_sent_everything_that_waits_again(
    database: Database, broker: Broker, settings: Settings, redis_url: str
) -> None:
    ids = queue_jobs(database, 5)
    outbox.relay_due(database, broker, settings, stopping=never)
    with database.transaction() as session:
        a_claim(session, ids[0], clock(session))
    with closing(redis.Redis.from_url(redis_url)) as client:
        client.flushall()
    assert outbox.relay_due(database, broker, settings, stopping=never) == 4
    assert sorted(ids_in(redis_url)) == sorted(ids[1:])
    assert outbox.relay_due(database, broker, settings, stopping=never) == 0


def test_copies_that_were_wiped_do_not_make_the_next_one_wait_longer(
    database: Database, broker: Broker, settings: Settings, redis_url: str
) -> None:
    """Found by the chaos: after 20 wipes, a message that was lost would have been sent again an hour later."""
    queue_jobs(database, 1)
    with closing(redis.Redis.from_url(redis_url)) as client:
        for _ in range(6):
            assert outbox.relay_due(database, broker, settings, stopping=never) == 1
            client.flushall()
    assert published(database) == [(1, True)]


def test_without_the_generation_key_a_wipe_would_go_unnoticed(
    sqlite_database: Database, broker: Broker, settings: Settings, redis_url: str
) -> None:
    """The control: the same wipe, with the key put back, is not seen until the messages are old."""
    queue_jobs(sqlite_database, 5)
    generation = broker.generation()
    outbox.relay_due(sqlite_database, broker, settings, stopping=never)
    with closing(redis.Redis.from_url(redis_url)) as client:
        client.flushall()
        client.set(outbox.GENERATION_KEY, generation)
    assert outbox.relay_due(sqlite_database, broker, settings, stopping=never) == 0
    assert ids_in(redis_url) == []


def test_a_message_that_came_to_nothing_is_sent_again_and_copies_are_capped(
    sqlite_database: Database, broker: Broker, settings: Settings, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_jobs(sqlite_database, 1)
    moved = timedelta()
    monkeypatch.setattr(outbox, "clock", lambda session: clock(session) + moved)
    sent = []
    # An hour, looked at each minute by a relay that never sees the job start.
    for _ in range(60):
        if outbox.relay_due(sqlite_database, broker, settings, stopping=never):
            sent.append(moved.total_seconds())
        moved += timedelta(minutes=1)
    assert sent == [0, 60, 180, 420, 900], "each copy waits twice as long as the one before"
    assert len(ids_in(redis_url)) == 5


def test_a_long_backlog_is_not_flooded_with_copies(
    sqlite_database: Database, broker: Broker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_jobs(sqlite_database, 4, expected_seconds=100.0)
    assert outbox.relay_due(sqlite_database, broker, settings, stopping=never) == 4
    # 400 s of work ahead: a message may well be that old before its turn comes.
    for seconds, copies in ((70, 0), (790, 0), (810, 4)):
        moved = timedelta(seconds=seconds)
        monkeypatch.setattr(outbox, "clock", lambda session, moved=moved: clock(session) + moved)
        assert outbox.relay_due(sqlite_database, broker, settings, stopping=never) == copies


def test_a_job_given_back_is_sent_when_its_time_has_come(
    database: Database, broker: Broker, settings: Settings, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job_id,) = queue_jobs(database, 1)
    outbox.relay_due(database, broker, settings, stopping=never)
    with database.transaction() as session:
        now = clock(session)
        claim = a_claim(session, job_id, now)
        jobs.fail(session, claim, retryable(), retry_delay_seconds=100, now=now)
    assert outbox.relay_due(database, broker, settings, stopping=never) == 0
    monkeypatch.setattr(outbox, "clock", lambda session: clock(session) + timedelta(seconds=101))
    assert outbox.relay_due(database, broker, settings, stopping=never) == 1
    assert ids_in(redis_url) == [job_id, job_id]


def test_the_relay_works_off_a_backlog_larger_than_one_look(
    sqlite_database: Database, broker: Broker, settings: Settings, redis_url: str
) -> None:
    ids = queue_jobs(sqlite_database, 501)
    assert outbox.relay_due(sqlite_database, broker, settings, stopping=never) == 501
    assert sorted(ids_in(redis_url)) == sorted(ids)


def test_a_relay_that_is_to_stop_leaves_the_rest_to_its_successor(
    sqlite_database: Database, broker: Broker, settings: Settings, redis_url: str
) -> None:
    queue_jobs(sqlite_database, 1)
    assert outbox.relay_due(sqlite_database, broker, settings, stopping=lambda: True) == 0
    assert published(sqlite_database) == [(0, False)]
    assert outbox.relay_due(sqlite_database, broker, settings, stopping=never) == 1


def test_a_broker_that_refuses_leaves_jobs_unmarked(sqlite_database: Database, settings: Settings) -> None:
    queue_jobs(sqlite_database, 2)
    with broker_at(settings, f"redis://127.0.0.1:{closed_port()}/0") as refused:
        with pytest.raises(BrokerUnavailable):
            outbox.relay_due(sqlite_database, refused, settings, stopping=never)
        with pytest.raises(BrokerUnavailable):
            refused.ping()
    assert published(sqlite_database) == [(0, False)] * 2


def test_a_broker_that_fails_in_the_middle_costs_copies_and_never_a_job(
    sqlite_database: Database, broker: Broker, settings: Settings, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent first, marked after: what was sent before the failure is unmarked, and sent once more."""
    ids = queue_jobs(sqlite_database, 3)
    publish, left = broker.publish_job, [2]

    def stumbling(message: JobMessage) -> None:
        if left[0] == 0:
            raise BrokerUnavailable("gone")
        left[0] -= 1
        publish(message)

    monkeypatch.setattr(broker, "publish_job", stumbling)
    with pytest.raises(BrokerUnavailable):
        outbox.relay_due(sqlite_database, broker, settings, stopping=never)
    assert published(sqlite_database) == [(0, False)] * 3
    left[0] = 3
    assert outbox.relay_due(sqlite_database, broker, settings, stopping=never) == 3
    assert sorted(ids_in(redis_url)) == sorted([*ids, *sorted(ids)[:2]])


def owe_webhooks(database: Database, count: int) -> list[str]:
    with database.transaction() as session:
        now = clock(session)
        key = a_key(session, now)
        for _ in range(count):
            jobs.cancel(session, a_job(session, key, now, webhook_url=HOOK).id, now=now)
        return list(session.scalars(select(Delivery.id)))


def test_a_delivery_that_is_owed_is_sent_to_the_chores(
    database: Database, broker: Broker, settings: Settings, redis_url: str
) -> None:
    owed = owe_webhooks(database, 3)
    assert outbox.relay_due(database, broker, settings, stopping=never) == 3
    assert sorted(ids_in(redis_url, "chores")) == sorted(owed)
    assert {message["task"] for message in messages(redis_url, "chores")} == {outbox.DELIVER_WEBHOOK}
    assert outbox.relay_due(database, broker, settings, stopping=never) == 0


def test_a_delivery_whose_message_was_refused_is_sent_at_the_next_look(
    sqlite_database: Database, broker: Broker, settings: Settings, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owed = owe_webhooks(sqlite_database, 3)
    publish, left = broker.publish_chore, [1]

    def stumbling(task: str, *args: str) -> None:
        if left[0] == 0:
            raise BrokerUnavailable("gone")
        left[0] -= 1
        publish(task, *args)

    monkeypatch.setattr(broker, "publish_chore", stumbling)
    with pytest.raises(BrokerUnavailable):
        outbox.relay_due(sqlite_database, broker, settings, stopping=never)
    left[0] = 3
    assert outbox.relay_due(sqlite_database, broker, settings, stopping=never) == 2
    assert sorted(ids_in(redis_url, "chores")) == sorted(owed)


def test_a_delivery_that_fails_fast_is_not_held_back_by_its_own_message(
    sqlite_database: Database, broker: Broker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The try may end before the relay goes on: what it wrote about the next one must stand."""
    (delivery_id,) = owe_webhooks(sqlite_database, 1)
    publish = broker.publish_chore

    def tried_at_once(task: str, *args: str) -> None:
        publish(task, *args)
        with sqlite_database.transaction() as session:
            now = clock(session)
            claim = deliveries.claim(session, delivery_id, lease_seconds=30, now=now)
            assert claim is not None
            deliveries.defer(
                session,
                claim,
                status=500,
                error="x",
                seconds=0.1,
                schedule_seconds=(0, 5),
                retry_after_seconds=None,
                jitter=0,
                now=now,
            )

    monkeypatch.setattr(broker, "publish_chore", tried_at_once)
    assert outbox.relay_due(sqlite_database, broker, settings, stopping=never) == 1
    with sqlite_database.transaction() as session:
        in_six_seconds = clock(session) + timedelta(seconds=6)
        assert deliveries.due(session, resend_after_seconds=60, now=in_six_seconds) == [delivery_id]


def test_two_relays_at_once_only_send_copies(
    database: Database, broker: Broker, settings: Settings, redis_url: str
) -> None:
    ids = queue_jobs(database, 20)
    failures: list[BaseException] = []

    def relay() -> None:
        try:
            outbox.relay_due(database, broker, settings, stopping=never)
        except BaseException as error:  # noqa: BLE001  (judged by the test's own thread)
            failures.append(error)

    threads = [threading.Thread(target=relay) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert set(ids_in(redis_url)) == set(ids)
    assert len(ids_in(redis_url)) <= 2 * len(ids)


# --- the hurrier ----------------------------------------------------------------------------------------------------


def test_the_hurrier_sends_at_once_and_marks_what_it_sent(
    database: Database, broker: Broker, settings: Settings, redis_url: str
) -> None:
    (job_id,) = queue_jobs(database, 1)
    hurrier = Hurrier(broker, database)
    hurrier.publish(JobMessage(job_id, "cpu.interactive"))
    wait_until(lambda: published(database) == [(1, True)], seconds=20, what="the mark of the hurrier")
    hurrier.close()
    assert ids_in(redis_url) == [job_id]
    assert outbox.relay_due(database, broker, settings, stopping=never) == 0, "the relay finds nothing left to send"


@pytest.mark.parametrize("kind", ["refused", "frozen"])
def test_publishing_never_waits_for_redis(sqlite_database: Database, settings: Settings, kind: str) -> None:
    ids = queue_jobs(sqlite_database, 200)
    with ExitStack() as server:
        frozen = kind == "frozen"
        url = server.enter_context(a_frozen_redis()) if frozen else f"redis://127.0.0.1:{closed_port()}/0"
        with broker_at(settings, url) as broker:
            hurrier = Hurrier(broker, sqlite_database)
            seconds = []
            for job_id in ids:
                began = time.perf_counter()
                hurrier.publish(JobMessage(job_id, "cpu.interactive"))
                seconds.append(time.perf_counter() - began)
            # The median, since another process may hold the processor for any single one.
            assert statistics.median(seconds) < 0.005, f"a publish took {max(seconds) * 1000:.1f} ms"
            assert sum(seconds) < 2
            # Let go of whoever still waits for an answer.
            server.close()
            hurrier.close()
    assert published(sqlite_database) == [(0, False)] * 200, "what was not sent is not marked"


def test_a_hurrier_with_a_full_backlog_drops_and_does_not_wait(
    sqlite_database: Database, settings: Settings, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job_id,) = queue_jobs(sqlite_database, 1)
    message = JobMessage(job_id, "cpu.interactive")
    asked, going_on = threading.Event(), threading.Event()

    def slow_generation() -> str:
        asked.set()
        assert going_on.wait(30)
        return "g1"

    with broker_at(settings, redis_url) as broker:
        monkeypatch.setattr(broker, "generation", slow_generation)
        hurrier = Hurrier(broker, sqlite_database, backlog=3)
        hurrier.publish(message)
        assert asked.wait(30)
        began = time.monotonic()
        for _ in range(50):
            hurrier.publish(message)
        assert time.monotonic() - began < 5
        going_on.set()
        hurrier.close()
    assert ids_in(redis_url) == [job_id] * 4, "the one under way and the three that there was room for"


def test_a_hurrier_that_is_closed_sends_what_waits_and_ends_its_thread(
    sqlite_database: Database, broker: Broker, redis_url: str
) -> None:
    ids = queue_jobs(sqlite_database, 30)
    hurrier = Hurrier(broker, sqlite_database)
    hurrier.close()
    for job_id in ids:
        hurrier.publish(JobMessage(job_id, "cpu.interactive"))
    hurrier.close()
    assert sorted(ids_in(redis_url)) == sorted(ids)
    assert published(sqlite_database) == [(1, True)] * 30
    assert not any(thread.name == "outbox-hurrier" for thread in threading.enumerate())


def test_a_hurrier_whose_sql_is_away_goes_on_publishing(
    sqlite_database: Database, settings: Settings, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unmarked means sent once more by the relay: harmless, and no reason to stop hurrying."""
    ids = queue_jobs(sqlite_database, 2)
    marked: list[Sequence[str]] = []

    def mark(session: Any, job_ids: Sequence[str], *_: Any) -> None:
        marked.append(job_ids)
        raise DatabaseUnavailable("gone")

    def has_marked(count: int) -> bool:
        return len(marked) == count

    monkeypatch.setattr(outbox, "mark_published", mark)
    with broker_at(settings, redis_url) as broker:
        hurrier = Hurrier(broker, sqlite_database)
        for count, job_id in enumerate(ids, start=1):
            hurrier.publish(JobMessage(job_id, "cpu.interactive"))
            wait_until(functools.partial(has_marked, count), seconds=20, what="the hurrier's mark")
        hurrier.close()
    assert sorted(ids_in(redis_url)) == sorted(ids)


def test_a_message_is_made_from_its_row(sqlite_database: Database) -> None:
    (job_id,) = queue_jobs(sqlite_database, 1, queue="gpu.bulk")
    with sqlite_database.reading() as session:
        message = outbox.message_of(session.get_one(Job, job_id))
    assert message == JobMessage(job_id, "gpu.bulk")
    assert replace(message, job_id="x") != message


# --- a broker that is away ------------------------------------------------------------------------------------------


def test_a_frozen_redis_holds_nobody_for_longer_than_its_timeouts(settings: Settings) -> None:
    with a_frozen_redis() as url, broker_at(settings, url) as broker:
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            broker.publish_job(JobMessage("job_1", "cpu.interactive"))
        assert time.monotonic() - began < 20


def test_redis_is_used_again_when_it_is_back(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("redis-that-dies")
    message = JobMessage("job_1", "cpu.interactive")
    with servers.start_redis(folder) as server, broker_at(settings, server.url) as broker:
        broker.publish_job(message)
        server.kill()
        with pytest.raises(BrokerUnavailable):
            broker.publish_job(message)
        with pytest.raises(BrokerUnavailable):
            broker.generation()
        port = int(server.url.rpartition(":")[2].partition("/")[0])
        with servers.start_redis(folder, port=port) as again:
            assert again.url == server.url
            broker.publish_job(message)
            broker.ping()
            assert "job_1" in ids_in(again.url)
