"""Whose turn it is: keys have equal shares of the workers, in px of results, and no message is ever one too few."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from itertools import pairwise

import pytest
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from shared import jobs, queries, queueing, workers
from shared.db import Database
from shared.jobs import Claim
from shared.models import Job, JobState
from shared.outbox import mark_published
from shared.workers import WorkerFacts
from tests.conftest import statements
from tests.factories import LEASE_SECONDS, a_claim, a_job, a_key, a_result, options, picture, retryable

INTERACTIVE, BULK = "cpu.interactive", "cpu.bulk"
QUEUES = (INTERACTIVE, BULK)


def take(session: Session, now: datetime, *, queues: Sequence[str] = QUEUES, worker_id: str = "w1") -> Claim | None:
    """What a worker does with a message."""
    job_id = jobs.next_due(session, queues, now=now)
    if job_id is None:
        return None
    return jobs.claim(session, job_id, worker_id=worker_id, device="cpu", lease_seconds=LEASE_SECONDS, now=now)


def take_and_finish(session: Session, now: datetime) -> Job:
    claim = take(session, now)
    assert claim is not None
    jobs.succeed(session, claim, a_result(claim), now=now)
    return session.get_one(Job, claim.job_id)


def hand_in(session: Session, key_id: str, now: datetime, side_px: int, **asked: object) -> str:
    return jobs.submit(
        session,
        owner_key_id=key_id,
        options=options(**asked),
        picture=picture(now, width=side_px, height=side_px),
        max_attempts=3,
        max_queued_jobs=1000,
        now=now,
    ).id


def test_a_thousand_jobs_of_one_key_are_behind_the_single_one_of_another(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        many, one = a_key(session, now).id, a_key(session, now).id
        handed_in = [a_job(session, many, now) for _ in range(20)]
        # The others as copies, to save the time: each stands where the one before it ends.
        facts = {column.name: getattr(handed_in[-1], column.name) for column in Job.__table__.columns}
        tags_px = range(facts["start_tag_px"], 1000 * facts["output_px"], facts["output_px"])
        assert [job.start_tag_px for job in handed_in[-2:]] == [tags_px[0] - tags_px.step, tags_px[0]]
        session.execute(
            insert(Job), [{**facts, "id": jobs.new_job_id(now), "start_tag_px": tag_px} for tag_px in tags_px[1:]]
        )
        assert queries.counts_by_state(session)["queued"] == 1000
    # Given three workers, each with a job of the many,
    with database.transaction() as session:
        running = [take(session, now, worker_id=f"w{number}") for number in range(3)]
        single = a_job(session, one, now)
        assert queueing.queue_position(session, single) == 1
        assert queries.pulse(session, single.id, one).queue_position == 1
    # when the first of them is done, then it takes the single one.
    with database.transaction() as session:
        assert running[1] is not None
        jobs.succeed(session, running[1], a_result(running[1]), now=now)
        claim = take(session, now, worker_id="w1")
        assert claim == Claim(single.id, 1)


def test_keys_are_served_as_many_px_each_whatever_the_size_of_their_jobs(
    sqlite_database: Database, now: datetime
) -> None:
    chance = random.Random(7)
    with sqlite_database.transaction() as session:
        sides_px = {a_key(session, now).id: side_px for side_px in (10, 20, 40)}
        for key_id, side_px in sides_px.items():
            for _ in range(3200 // side_px**2 + 2):
                hand_in(session, key_id, now, side_px)
        largest_px = 40**2 * 16
        served_px = dict.fromkeys(sides_px, 0)
        running: list[Claim] = []
        for _ in range(25):
            claim = take(session, now)
            assert claim is not None
            job = session.get_one(Job, claim.job_id)
            served_px[job.owner_key_id] += job.output_px
            # Start-time fair queueing's bound: the largest job of either key.
            assert max(served_px.values()) - min(served_px.values()) <= 2 * largest_px
            running.append(claim)
            if len(running) == 3:
                done = running.pop(chance.randrange(3))
                jobs.succeed(session, done, a_result(done), now=now)
    assert min(served_px.values()) >= 3200 * 16 / 2


def test_a_key_that_waits_for_each_result_has_its_share_in_px_too(sqlite_database: Database, now: datetime) -> None:
    """One hands in a large job whenever the last is done, the other has a hundred small ones waiting."""
    with sqlite_database.transaction() as session:
        small, large = a_key(session, now).id, a_key(session, now).id
        for _ in range(100):
            hand_in(session, small, now, 10)
        hand_in(session, large, now, 40)
        served: list[str] = []
        while len(served) < 60:
            job = take_and_finish(session, now)
            served.append(job.owner_key_id)
            if job.owner_key_id == large:
                hand_in(session, large, now, 40)
    places = [place for place, owner in enumerate(served) if owner == large]
    # 16 small jobs are as many px as a large one.
    assert len(places) >= 3
    assert all(15 <= later - earlier <= 19 for earlier, later in pairwise(places)), places


def test_neither_a_rest_nor_jobs_taken_back_are_held_against_a_key(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session:
        first, second = a_key(session, now).id, a_key(session, now).id
        # Given a key that has had ten jobs done while nobody else had any, and one that took back ten,
        for _ in range(10):
            a_job(session, first, now)
            take_and_finish(session, now)
        for job_id in [a_job(session, second, now).id for _ in range(10)]:
            jobs.cancel(session, job_id, now=now)
        # when both hand in three, then they take turns.
        for _ in range(3):
            a_job(session, second, now)
            a_job(session, first, now)
        owners = [take_and_finish(session, now).owner_key_id for _ in range(6)]
    for served in range(1, 7):
        so_far = Counter(owners[:served])
        assert abs(so_far[first] - so_far[second]) <= 2, owners


def test_a_job_given_back_keeps_its_turn_and_one_retried_by_hand_has_a_new_one(
    database: Database, now: datetime
) -> None:
    with database.transaction() as session:
        one, other = a_key(session, now).id, a_key(session, now).id
        ids = [a_job(session, one, now).id for _ in range(3)]
        claim = take(session, now)
        assert claim == Claim(ids[0], 1)
        jobs.fail(session, claim, retryable(), retry_delay_seconds=2, now=now)
        later = now + timedelta(seconds=2)
        assert take(session, later) == Claim(ids[0], 2)
        jobs.cancel(session, ids[2], now=later)
        jobs.cancel(session, ids[1], now=later)
        late = a_job(session, other, later).id
        for job_id in (ids[2], ids[1]):
            jobs.retry(session, job_id, now=later)
        taken = [take(session, later) for _ in range(3)]
    assert [claim.job_id for claim in taken if claim] == [late, ids[2], ids[1]]


def test_a_preview_counts_with_what_is_enlarged_of_it(sqlite_database: Database, now: datetime) -> None:
    crop = {"x": 0, "y": 0, "width": 10, "height": 5}
    with sqlite_database.transaction() as session:
        key = a_key(session, now)
        asked = a_job(session, key, now, scale=2, preview={"crop": crop, "models": ["srgan", "fsrcnn", "lanczos"]})
        assert asked.output_px == 10 * 5 * 2**2 * 3


def test_a_job_sent_to_a_cpu_is_where_its_key_would_stand_there(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        one, other = a_key(session, now).id, a_key(session, now).id
        for _ in range(3):
            a_job(session, one, now)
        a_job(session, other, now)
        too_large = a_job(session, one, now, queue="gpu.interactive")
        claim = a_claim(session, too_large.id, now, device="gpu")
        jobs.fail(session, claim, retryable(), retry_delay_seconds=2, now=now, queue=INTERACTIVE)
        taken = [take_and_finish(session, now) for _ in range(5)]
    assert [job.owner_key_id for job in taken].index(other) <= 1
    assert taken[-1].id == too_large.id


def test_jobs_handed_in_over_many_connections_stand_one_behind_the_other(
    postgresql_database: Database, now: datetime
) -> None:
    with postgresql_database.transaction() as session:
        key_id = a_key(session, now).id
    start = threading.Barrier(6)

    def submit_three(_: int) -> None:
        start.wait(30)
        for _ in range(3):
            with postgresql_database.transaction() as session:
                a_job(session, key_id, now)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(submit_three, range(6)))
    with postgresql_database.reading() as session:
        tags = session.scalars(select(Job.start_tag_px).order_by(Job.start_tag_px)).all()
    assert tags == [number * 8 * 6 * 16 for number in range(18)]


def test_many_workers_at_once_take_every_job_once(postgresql_database: Database, now: datetime) -> None:
    with postgresql_database.transaction() as session:
        for _ in range(4):
            key = a_key(session, now)
            for number in range(15):
                a_job(session, key, now, queue=QUEUES[number % 2])
    start = threading.Barrier(8)

    def work(number: int) -> list[str]:
        start.wait(30)
        found = []
        # As many messages as jobs, and some copies.
        for _ in range(10):
            with postgresql_database.transaction() as session:
                claim = take(session, now, worker_id=f"w{number}")
            if claim is not None:
                found.append(claim.job_id)
        return found

    with ThreadPoolExecutor(8) as threads:
        taken = [job_id for found in threads.map(work, range(8)) for job_id in found]
    assert len(taken) == len(set(taken)) == 60


def test_a_job_whose_row_is_held_is_waited_for_where_it_is_the_only_one(
    postgresql_database: Database, now: datetime
) -> None:
    """A message that comes while its job is being marked as sent: were the job passed over, nobody would come for it
    until the relay sends another."""
    with postgresql_database.transaction() as session:
        first, second = (a_job(session, a_key(session, now), now).id for _ in range(2))
    with postgresql_database.transaction() as marking, ThreadPoolExecutor(1) as thread:
        mark_published(marking, [first], "generation", now)
        with postgresql_database.transaction() as session:
            assert take(session, now) == Claim(second, 1), "what is held is passed over where there is another"
        waiting = threading.Event()

        def wait_for_it() -> Claim | None:
            with postgresql_database.transaction() as session:
                waiting.set()
                return take(session, now)

        taking = thread.submit(wait_for_it)
        assert waiting.wait(30)
        marking.commit()
        assert taking.result(30) == Claim(first, 1)


def test_a_claim_costs_the_same_statements_however_long_the_queue_is(database: Database, now: datetime) -> None:
    sent = {}
    for queued in (2, 150):
        with database.transaction() as session:
            key = a_key(session, now)
            for _ in range(queued):
                a_job(session, key, now)
        with database.transaction() as session, statements(database) as of_claim:
            assert take(session, now) is not None
        sent[queued] = len(of_claim)
    # Whose turn it is; the UPDATE; the attempt; the row; who is to be told of its start, and of its progress.
    assert sent == {2: 6, 150: 6}


# --- messages are worth the same, and as many as jobs ---------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_no_job_waits_for_a_message_to_be_sent_again(sqlite_database: Database, now: datetime, seed: int) -> None:
    """Messages come in any order, to any worker, drained ones too; jobs fail, are taken back and retried. The relay
    sends what was never sent or was given back, and never because of age."""
    chance = random.Random(seed)
    never_again = dict.fromkeys(queueing.IMAGE_QUEUES, 1e9)
    messages: list[str] = []
    submitted: list[str] = []
    running: list[Claim] = []
    claims: Counter[Claim] = Counter()

    def relay() -> None:
        with sqlite_database.transaction() as session:
            due = queries.unpublished(session, generation="g", resend_after=never_again, now=now)
            mark_published(session, [job.id for job in due], "g", now)
            messages.extend(job.id for job in due)

    def deliver() -> None:
        if not messages:
            return
        messages.pop(chance.randrange(len(messages)))
        with sqlite_database.transaction() as session:
            if chance.random() < 0.2:
                jobs.give_message_back(session, QUEUES, now=now)
                return
            claim = take(session, now, queues=chance.sample(QUEUES, 2))
        if claim is not None:
            claims[claim] += 1
            running.append(claim)

    def end() -> None:
        if not running:
            return
        claim = running.pop(chance.randrange(len(running)))
        with sqlite_database.transaction() as session:
            match chance.randrange(4):
                case 0:
                    jobs.fail(session, claim, retryable(), retry_delay_seconds=2, now=now)
                case 1:
                    jobs.release(session, claim, now=now)
                case _:
                    jobs.succeed(session, claim, a_result(claim), now=now)

    def submit() -> None:
        with sqlite_database.transaction() as session:
            submitted.append(a_job(session, chance.choice(keys), now, queue=chance.choice(QUEUES), max_attempts=99).id)

    def take_back() -> None:
        with sqlite_database.transaction() as session:
            waiting = session.scalars(select(Job.id).where(Job.state == JobState.QUEUED)).all()
            for job_id in waiting[:1]:
                jobs.cancel(session, job_id, now=now)
                if chance.random() < 0.5:
                    jobs.retry(session, job_id, now=now)

    with sqlite_database.transaction() as session:
        keys = [a_key(session, now).id for _ in range(3)]
    acts = [submit] * 3 + [deliver] * 4 + [relay] * 2 + [end] * 3 + [take_back]
    for _ in range(120):
        now += timedelta(seconds=1)
        chance.choice(acts)()
    for _ in range(40):
        now += timedelta(seconds=600)
        relay()
        while messages:
            deliver()
        while running:
            end()
    with sqlite_database.reading() as session:
        states = {row.id: row.state for row in session.execute(select(Job.id, Job.state))}
    assert set(states) == set(submitted)
    assert set(states.values()) == {JobState.SUCCEEDED, JobState.CANCELED}
    assert set(claims.values()) == {1}


# --- where `auto` jobs wait -----------------------------------------------------------------------------------------


def enlist(session: Session, worker_id: str, device: str, now: datetime, *, queues: tuple[str, ...] = ()) -> None:
    served = queues or (f"{device}.interactive", f"{device}.bulk")
    workers.enlist(session, WorkerFacts(worker_id, "images", worker_id, 1, served, device), now=now)


def stranded(session: Session, now: datetime) -> list[tuple[str, str]]:
    """Of jobs that need nothing; `tests/shared/test_needs.py` has the others."""
    found = queueing.stranded_queues(session, worker_lost_after_seconds=30, now=now)
    return [(source, target) for source, target, needs in found if not needs]


TO_CPU = [("gpu.interactive", "cpu.interactive"), ("gpu.bulk", "cpu.bulk")]
TO_GPU = [(cpu, gpu) for gpu, cpu in TO_CPU]


def test_queues_are_stranded_when_a_gpu_is_gone_for_good_and_when_one_is_there(
    database: Database, now: datetime
) -> None:
    with database.transaction() as session:
        assert stranded(session, now) == [], "there is nowhere to go"
        enlist(session, "slow", "cpu", now)
        assert stranded(session, now) == TO_CPU, "no GPU was ever there"
        enlist(session, "quick", "gpu", now)
        assert stranded(session, now) == TO_GPU
        workers.drain(session, "quick", now=now)
        assert stranded(session, now) == TO_CPU
        workers.resume(session, "quick")
        workers.stopped(session, "quick", now=now)
        assert stranded(session, now) == [], "it may be about to be replaced"
    later = now + timedelta(seconds=31)
    with database.transaction() as session:
        workers.seen(session, "slow", models_loaded=[], now=later)
        assert stranded(session, later) == TO_CPU
        # One that serves both, on a machine with a GPU, is all there is: everything waits where its GPU is.
        enlist(session, "both", "gpu", later, queues=queueing.IMAGE_QUEUES)
        workers.stopped(session, "slow", now=later)
        assert stranded(session, later) == TO_GPU


def test_only_auto_jobs_are_sent_elsewhere_and_their_messages_with_them(database: Database, now: datetime) -> None:
    gpu, cpu = TO_CPU[0]
    with database.transaction() as session:
        key, other = a_key(session, now).id, a_key(session, now).id
        auto = [a_job(session, owner, now, queue=gpu).id for owner in (key, other, key)]
        asked = a_job(session, key, now, queue=gpu, device="gpu").id
        tried = a_job(session, other, now, queue=cpu).id
        jobs.release(session, a_claim(session, tried, now), now=now)
        mark_published(session, [*auto, asked, tried], "generation", now)
        jobs.pause_queue(session, gpu, now=now)
        assert jobs.reroute(session, gpu, cpu, now=now) == [], "a paused queue keeps its jobs"
        jobs.resume_queue(session, gpu)
        mark_published(session, [*auto, asked, tried], "generation", now)
    # A few at a time, key after key.
    with database.transaction() as session:
        assert len(jobs.reroute(session, gpu, cpu, now=now, limit=2)) == 2
        assert len(jobs.reroute(session, gpu, cpu, now=now, limit=2)) == 1
    with database.transaction() as session:
        rows = {row.id: row for row in session.scalars(select(Job))}
        assert {job_id for job_id, row in rows.items() if row.queue == gpu} == {asked}
        assert {job_id for job_id, row in rows.items() if row.published_at is None} == set(auto)
        assert rows[auto[0]].start_tag_px < rows[auto[2]].start_tag_px
        # Back again, but for the one that has been tried: a GPU's memory may have been too small for it.
        assert set(jobs.reroute(session, cpu, gpu, now=now)) == set(auto)
        assert session.get_one(Job, tried).queue == cpu
