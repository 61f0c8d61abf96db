"""Jobs that not every worker can run: who takes them, whom they hold up (nobody), and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from shared import jobs, queries, queueing, workers
from shared.db import Database
from shared.models import Job, JobState
from shared.workers import WorkerFacts
from tests.conftest import statements
from tests.factories import a_claim, a_job, a_key

QUEUES = ("cpu.interactive", "cpu.bulk")
PLAIN = ("srgan", "lanczos", "auto", "preview")
WITH_MINE = (*PLAIN, "mine")


def mine(session: Session, key: str, now: datetime, **asked: object) -> Job:
    return a_job(session, key, now, **{"model": "mine", "needs": "mine", **asked})


def turn(session: Session, now: datetime, runs: Sequence[str] | None, queues: Sequence[str] = QUEUES) -> str | None:
    return jobs.next_due(session, queues, runs=runs, now=now)


def test_a_worker_takes_only_what_it_can_run_and_in_the_order_of_shares(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key, other = a_key(session, now).id, a_key(session, now).id
        first = mine(session, key, now).id
        # Ids tell the time: of two at one place the older comes first.
        second, third = (a_job(session, other, now + timedelta(milliseconds=1)).id for _ in range(2))
        bulk = mine(session, key, now, queue="cpu.bulk").id
        now += timedelta(milliseconds=1)
        assert turn(session, now, WITH_MINE) == first
        assert turn(session, now, PLAIN) == second
        assert turn(session, now, None) == first, "one that says nothing takes any"
        a_claim(session, second, now)
        assert turn(session, now, WITH_MINE) == first
        assert turn(session, now, PLAIN) == third
        a_claim(session, third, now)
        assert turn(session, now, PLAIN) is None
        assert jobs.is_any_due(session, QUEUES, now=now)
        a_claim(session, first, now)
        assert turn(session, now, WITH_MINE) == bulk
        a_claim(session, bulk, now)
        assert turn(session, now, PLAIN) is None
        assert not jobs.is_any_due(session, QUEUES, now=now)


def test_a_preview_with_ones_own_goes_where_that_is(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session:
        key = a_key(session, now).id
        crop = {"x": 0, "y": 0, "width": 4, "height": 4}
        asked = {"crop": crop, "models": ["mine", "srgan"]}
        job_id = a_job(session, key, now, model="preview", needs="mine", preview=asked).id
        assert turn(session, now, PLAIN) is None
        assert turn(session, now, WITH_MINE) == job_id


def test_what_some_worker_turns_out_to_lack_is_set_aside_once(database: Database, now: datetime) -> None:
    """Weights that a host misses, or a card that an upgrade has added: the job was thought to suit everybody."""
    with database.transaction() as session:
        key = a_key(session, now).id
        new = [a_job(session, key, now, model="brand-new").id for _ in range(230)]
        last = a_job(session, key, now).id
    with database.transaction() as session:
        assert turn(session, now, PLAIN) == last
    with database.reading() as session:
        rows = session.execute(select(Job.id, Job.needs, Job.version)).all()
        assert {row.id for row in rows if row.needs == "brand-new"} == set(new)
        assert next(row.needs for row in rows if row.id == last) == ""
    with database.transaction() as session:
        assert turn(session, now, PLAIN) == last
        assert turn(session, now, (*PLAIN, "brand-new")) == new[0]
        # Whatever has become of it since: who has neither the need nor the model passes over it.
        session.get_one(Job, new[0]).model = "lanczos"
        session.get_one(Job, new[1]).model = "srgan"
        session.flush()
        assert turn(session, now, ("lanczos", "brand-new")) == new[0]
        session.get_one(Job, new[0]).model = "srgan"
        session.flush()
        a_claim(session, last, now)
        assert turn(session, now, ("lanczos", "brand-new")) is None


def test_a_claim_costs_the_same_statements_however_many_jobs_it_passes_over(database: Database, now: datetime) -> None:
    sent = {}
    for waiting in (2, 150):
        with database.transaction() as session:
            key, other = a_key(session, now).id, a_key(session, now).id
            for _ in range(waiting):
                mine(session, key, now)
            for _ in range(2):
                a_job(session, other, now).start_tag_px = 10**9
        with database.transaction() as session, statements(database) as of_turn:
            assert turn(session, now, PLAIN) is not None
        sent[waiting] = len(of_turn)
        with database.transaction() as session, statements(database) as of_idle:
            assert turn(session, now, ("bicubic",), ["cpu.bulk"]) is None
        assert len(of_idle) == 2
    # What is next; what is next of each kind; the job.
    assert sent == {2: 3, 150: 3}


def test_a_claim_does_not_read_the_queue(postgresql_database: Database, now: datetime) -> None:
    """By PostgreSQL's own account: an index look-up for each need that is met, and no walk over a backlog."""
    copies = (
        "INSERT INTO jobs SELECT (jsonb_populate_record(j, jsonb_build_object("
        "'id', j.id || n, 'start_tag_px', j.start_tag_px + n))).* FROM jobs AS j, generate_series(1, 3000) AS n"
    )
    with postgresql_database.transaction() as session:
        key = a_key(session, now).id
        mine(session, key, now)
        plain = a_job(session, key, now)
        plain.start_tag_px = 10_000
        session.flush()
        session.execute(text(copies))
        session.execute(text("ANALYZE jobs"))
        met = ("", *sorted(PLAIN))
        asked = {"queue": "cpu.interactive", "now": now}
        plans = []
        for statement in (jobs._first_due(("cpu.interactive",)), queueing._heads(met)):
            told = statement.compile(session.get_bind()).construct_expanded_state(asked)
            explained = session.connection().exec_driver_sql(f"EXPLAIN ANALYZE {told.statement}", told.parameters)
            plans.append("\n".join(explained.scalars()))
        assert turn(session, now, PLAIN) == plain.id
    for plan, index in zip(plans, ("state_queue_start_tag_px_id", "state_queue_needs_start_tag_px_id"), strict=True):
        assert f"ix_jobs_{index}" in plan, plan
        assert "Seq Scan on jobs" not in plan, plan
        assert "Rows Removed by Filter" not in plan, plan


def test_where_all_that_it_can_run_are_held_the_first_is_waited_for(
    postgresql_database: Database, now: datetime
) -> None:
    with postgresql_database.transaction() as session:
        key = a_key(session, now).id
        beyond, first = mine(session, key, now).id, a_job(session, key, now).id
    with postgresql_database.transaction() as holding:
        for job_id in (beyond, first):
            holding.scalar(select(Job.id).where(Job.id == job_id).with_for_update())

        def looks(runs: Sequence[str]) -> str | None:
            with postgresql_database.transaction() as session:
                return turn(session, now, runs)

        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(looks, PLAIN).result(30) == first
            assert thread.submit(looks, WITH_MINE).result(30) == beyond
            assert thread.submit(looks, ("bicubic",)).result(30) is None
    # The first of each kind held, and another behind it that is not.
    with postgresql_database.transaction() as session:
        second = a_job(session, key, now).id
    with postgresql_database.transaction() as holding:
        holding.scalar(select(Job.id).where(Job.id == first).with_for_update())
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(looks, PLAIN).result(30) == second


def test_jobs_that_nobody_can_run_give_newcomers_no_head_start(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key, other, newcomer = (a_key(session, now).id for _ in range(3))
        stuck = mine(session, key, now)
        plain = [a_job(session, other, now) for _ in range(3)]
        for job in plain[:2]:
            a_claim(session, job.id, now)
        assert plain[2].start_tag_px > plain[1].start_tag_px > stuck.start_tag_px
        came = a_job(session, newcomer, now)
        assert came.start_tag_px == plain[1].start_tag_px, "at the present, which is what runs"
        assert queueing.queue_position(session, came) == 1
        assert queries.pulse(session, came.id, newcomer).queue_position == 1
        behind = mine(session, other, now)
        assert queueing.queue_position(session, behind) == 4
        assert queries.pulse(session, behind.id, other).queue_position == 4


# --- who is there to run them ---------------------------------------------------------------------------------------


def come(
    session: Session, worker_id: str, device: str, now: datetime, models: Sequence[str] | None, *queues: str
) -> None:
    served = queues or (f"{device}.interactive", f"{device}.bulk")
    said = None if models is None else tuple(models)
    workers.enlist(session, WorkerFacts(worker_id, "images", worker_id, 1, served, device, models=said), now=now)


def oldest_seconds(session: Session, now: datetime) -> float | None:
    [depth] = [
        each
        for each in queueing.queue_depths(session, worker_lost_after_seconds=30.0, now=now)
        if each.queue == "cpu.interactive"
    ]
    assert depth.queued == 1
    return depth.oldest_seconds


def test_a_job_whose_model_nobody_has_says_so_and_so_does_the_operators_page(database: Database, now: datetime) -> None:
    lost_after = {"worker_lost_after_seconds": 30.0}
    with database.transaction() as session:
        key = a_key(session, now).id
        assert queueing.forsaken_models(session, **lost_after, now=now) == []
        job = mine(session, key, now)
        # Where nobody is there at all, whoever is started may have it: more workers are asked for.
        assert queueing.forsaken_models(session, **lost_after, now=now) == []
        assert oldest_seconds(session, now + timedelta(seconds=5)) == 5.0
        come(session, "plain", "cpu", now, PLAIN)
        # Of those that are there none has it, and more of them would not help.
        assert oldest_seconds(session, now + timedelta(seconds=5)) is None
        come(session, "elsewhere", "gpu", now, WITH_MINE)
        assert queueing.waits_for(session, job, **lost_after, now=now) is not None
        [forsaken] = queueing.forsaken_models(session, **lost_after, now=now + timedelta(seconds=5))
        assert (forsaken.queue, forsaken.needs, forsaken.queued) == ("cpu.interactive", "mine", 1)
        assert forsaken.oldest_seconds == 5.0
        come(session, "with-mine", "cpu", now, WITH_MINE)
        assert queueing.waits_for(session, job, **lost_after, now=now) is None
        assert queueing.forsaken_models(session, **lost_after, now=now) == []
        assert oldest_seconds(session, now + timedelta(seconds=5)) == 5.0
        # Work ahead is shared by those who can do it.
        wait = {"worker_lost_after_seconds": 30.0, "now": now, "before_tag_px": 10**9}
        job.expected_seconds = 10.0
        a_job(session, key, now, expected_seconds=4.0)
        session.flush()
        assert queueing.expected_wait_seconds(session, job.queue, **wait, needs="mine") == 14.0
        assert queueing.expected_wait_seconds(session, job.queue, **wait, needs="") == 2.0
        assert queueing.expected_wait_seconds(session, job.queue, **wait) == 7.0
        workers.drain(session, "with-mine", now=now)
        assert queueing.waits_for(session, job, **lost_after, now=now) is not None
        # One of the code before takes whatever it is sent.
        come(session, "old", "cpu", now, None)
        assert queueing.waits_for(session, job, **lost_after, now=now) is None


def test_auto_jobs_go_to_the_device_that_has_their_model(database: Database, now: datetime) -> None:
    gpu, cpu = "gpu.interactive", "cpu.interactive"
    lost_after = {"worker_lost_after_seconds": 30.0}

    def stranded(session: Session, needs: str, at: datetime) -> list[tuple[str, str]]:
        found = queueing.stranded_queues(session, **lost_after, now=at)
        return [(s, t) for s, t, each in found if each == needs and s.endswith("interactive")]

    with database.transaction() as session:
        key = a_key(session, now).id
        come(session, "quick", "gpu", now, PLAIN)
        assert queueing.gpu_is_alive(session, **lost_after, now=now)
        assert not queueing.gpu_is_alive(session, **lost_after, needs="mine", now=now)
        waits, plain = mine(session, key, now, queue=gpu).id, a_job(session, key, now, queue=gpu).id
        assert stranded(session, "mine", now) == [], "there is nowhere to go"
        come(session, "slow", "cpu", now, WITH_MINE)
        assert stranded(session, "", now) == [(cpu, gpu)]
        assert stranded(session, "mine", now) == [(gpu, cpu)]
        assert jobs.reroute(session, gpu, cpu, needs="mine", now=now) == [waits]
        assert session.get_one(Job, plain).queue == gpu
        come(session, "another", "gpu", now, WITH_MINE)
        assert queueing.gpu_is_alive(session, **lost_after, needs="mine", now=now)
        assert stranded(session, "mine", now) == [(cpu, gpu)]
        # It may be about to be replaced.
        workers.stopped(session, "another", now=now)
        assert stranded(session, "mine", now) == []


def test_the_next_picture_is_guessed_among_those_that_can_be_run(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session:
        key = a_key(session, now).id
        first, second = mine(session, key, now).id, a_job(session, key, now).id
        asked = {"worker_id": "w", "worker_lost_after_seconds": 30.0, "now": now}
        for runs, expected in ((None, first), (WITH_MINE, first), (PLAIN, second)):
            job = queueing.likely_next(session, QUEUES, **asked, runs=runs)
            assert job is not None
            assert job.id == expected
        assert queueing.likely_next(session, QUEUES, **asked, runs=("bicubic",)) is None


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.FAILED])
def test_needs_stay_with_a_job_that_is_tried_again(sqlite_database: Database, now: datetime, state: JobState) -> None:
    with sqlite_database.transaction() as session:
        job = mine(session, a_key(session, now).id, now, deadline_seconds=1)
        later = now + timedelta(seconds=2)
        if state == JobState.FAILED:
            assert jobs.expire_overdue(session, now=later) == [job.id]
            jobs.retry(session, job.id, now=later)
        else:
            jobs.release(session, a_claim(session, job.id, now), now=now)
            later = now
        assert turn(session, later, PLAIN) is None
        assert turn(session, later, WITH_MINE) == job.id
