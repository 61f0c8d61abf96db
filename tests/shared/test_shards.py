"""A shard's life on both databases: who may take it, who may write, and how it ends with its job."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared import jobs, outbox, shards, workers
from shared.db import Database, clock
from shared.errors import BadOutput, BrokerUnavailable, InvalidImage, StaleAttempt
from shared.jobs import Claim
from shared.models import BlobRemoval, Job, JobState, Shard
from shared.outbox import Broker
from shared.settings import Settings
from shared.shards import ShardClaim
from shared.workers import WorkerFacts
from tests.conftest import closed_port
from tests.factories import a_claim, a_job, a_key, a_result, retryable
from tests.shared.test_outbox import messages

TILE = [0, 0, 8, 8, 0, 0, 8, 12]
PIECES = [[[TILE, TILE], [TILE, TILE]], [[TILE, TILE]]]
"""Two shards: of two bands, and of one; bands have two tiles."""
TERMS = {"precise": True, "rows_in_strip": 8}
LATER = timedelta(seconds=21)


def a_shared_job(session: Session, now: datetime) -> tuple[Job, Claim]:
    job = a_job(session, a_key(session, now), now)
    claim = a_claim(session, job.id, now)
    shards.begin(session, claim, PIECES, TERMS)
    session.refresh(job)
    return job, claim


def helps(session: Session, job_id: str, now: datetime, worker_id: str = "w2") -> ShardClaim | None:
    return shards.claim_to_help(session, job_id, worker_id=worker_id, max_tries=3, lease_seconds=20, now=now)


def holds(session: Session, claim: Claim, now: datetime) -> ShardClaim | None:
    return shards.claim(session, claim, worker_id="w1", max_tries=3, lease_seconds=20, now=now)


def made(session: Session, claim: ShardClaim | None, now: datetime) -> None:
    assert claim is not None
    shards.made(session, claim, key=claim.part_name, bytes=10, facts={"a": 1}, now=now)


def stands(session: Session, job_id: str, now: datetime) -> shards.Standing:
    return shards.standing(session, job_id, max_tries=3, now=now)


def test_a_job_is_shared_and_every_shard_is_taken_once(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, claim = a_shared_job(session, now)
        assert job.split == TERMS
        first, second = helps(session, job.id, now), holds(session, claim, now)
        assert first == ShardClaim(job.id, 0, 1, PIECES[0])
        assert second == ShardClaim(job.id, 1, 1, PIECES[1])
        assert helps(session, job.id, now) is None
        assert holds(session, claim, now) is None
        assert (first.part_name, second.part_name) == ("0000-1.part", "0001-1.part")

        shards.progress(session, first, tiles_done=3, tiles_total=5, bands_done=1, lease_seconds=20, now=now)
        standing = stands(session, job.id, now)
        assert (standing.shards, standing.shards_made, standing.all_made) == (2, 0, False)
        assert (standing.tiles_done, standing.tiles_total) == (3, 7)
        assert (standing.bands_done, standing.bands_total) == (1, 3)
        assert shards.standing(session, job.id, max_tries=3, now=now, without=first).tiles_done == 0

        # A key that has one missing above it is not to be joined yet.
        made(session, second, now)
        assert [shards.keys_from(session, job.id, position) for position in (0, 1)] == [[], ["0001-1.part"]]
        made(session, first, now)
        assert shards.keys_from(session, job.id, 0) == ["0000-1.part", "0001-1.part"]
        assert stands(session, job.id, now).all_made
        assert [row.key for row in shards.of_job(session, job.id)] == ["0000-1.part", "0001-1.part"]


def test_workers_go_on_below_what_they_have_made_and_part_what_is_left(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job = a_job(session, a_key(session, now), now)
        claim = a_claim(session, job.id, now)
        shards.begin(session, claim, [[[TILE]]] * 8, TERMS)

        def taken(below: int | None = None) -> int | None:
            found = shards.claim_to_help(
                session, job.id, worker_id="w", max_tries=3, lease_seconds=20, now=now, below=below
            )
            if found is not None and below is not None:
                # What was above is made by now.
                session.get_one(Shard, (job.id, below)).finished_at = now
                session.flush()
            return None if found is None else found.position

        # The first comes from the top; the second takes the lower half of what is left to it.
        assert [taken(), taken()] == [0, 4]
        assert [taken(0), taken(4), taken(5), taken(6)] == [1, 5, 6, 7]
        # Under the last there is nothing: it helps above, behind whoever comes down there.
        assert taken(7) == 3
        assert [taken(1), taken(3)] == [2, None]


def test_a_late_worker_can_neither_finish_nor_touch_the_shard_of_its_successor(
    database: Database, now: datetime
) -> None:
    with database.transaction() as session:
        job, _ = a_shared_job(session, now)
        late = helps(session, job.id, now)
        assert late is not None
    with database.transaction() as session:
        successor = helps(session, job.id, now + LATER, "w3")
        assert successor is not None
        assert (successor.position, successor.number) == (0, 2)
        assert successor.part_name != late.part_name
    writes: list[Callable[[Session], None]] = [
        lambda session: made(session, late, now),
        lambda session: shards.give_back(session, late),
        lambda session: shards.progress(
            session, late, tiles_done=1, tiles_total=4, bands_done=0, lease_seconds=20, now=now
        ),
    ]
    for write in writes:
        with database.transaction() as session, pytest.raises(StaleAttempt):
            write(session)
    with database.transaction() as session:
        shards.keep(session, late, lease_seconds=90, now=now)
        (row, *_) = shards.of_job(session, job.id)
        assert (row.lease_until, row.tiles_done) == (now + LATER + timedelta(seconds=20), 0)
        shards.keep(session, successor, lease_seconds=90, now=now)
        (row, *_) = shards.of_job(session, job.id)
        assert (row.lease_until, row.tiles_done) == (now + timedelta(seconds=90), row.tiles_total)
        made(session, successor, now)
        assert shards.of_job(session, job.id)[0].key == successor.part_name
    with database.transaction() as session:
        # What was given back is kept no more.
        given_back = helps(session, job.id, now)
        assert given_back is not None
        shards.give_back(session, given_back)
        shards.keep(session, given_back, lease_seconds=90, now=now)
        assert shards.of_job(session, job.id)[given_back.position].lease_until is None
    # Made is made, also for the one that made it.
    with database.transaction() as session, pytest.raises(StaleAttempt):
        made(session, successor, now)


def test_a_shard_given_back_without_a_fault_has_lost_no_try(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, _ = a_shared_job(session, now)
        for _ in range(5):
            claim = helps(session, job.id, now)
            assert claim is not None
            assert claim.position == 0
            shards.give_back(session, claim)


def test_what_a_helper_fails_at_only_the_attempt_itself_tries(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, claim = a_shared_job(session, now)
        failing = helps(session, job.id, now)
        assert failing is not None
        shards.give_back(session, failing, BadOutput("flat"))
        other = helps(session, job.id, now)
        assert other is not None
        assert other.position == 1
        assert helps(session, job.id, now) is None
        tried = holds(session, claim, now)
        assert tried is not None
        assert (tried.position, tried.number) == (0, 2)


def test_a_shard_that_costs_a_worker_each_time_is_lost(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, claim = a_shared_job(session, now)
        for _ in range(3):
            assert stands(session, job.id, now).lost is None
            taken = helps(session, job.id, now)
            assert taken is not None
            assert taken.position == 0
            now += LATER
        assert stands(session, job.id, now).lost == 0
        other = holds(session, claim, now)
        assert other is not None
        assert other.position == 1


def test_shards_are_worked_on_while_their_job_waits_for_its_next_attempt(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, claim = a_shared_job(session, now)
        mine, theirs = holds(session, claim, now), helps(session, job.id, now)
        made(session, mine, now)
        jobs.fail(session, claim, retryable(), retry_delay_seconds=2, now=now)
        made(session, theirs, now)
        session.refresh(job)
        assert (job.state, job.split) == (JobState.QUEUED, TERMS)
        assert stands(session, job.id, now).all_made


def end_by_cancel(session: Session, job: Job, claim: Claim, now: datetime) -> None:
    jobs.cancel(session, job.id, now=now)


def end_by_acknowledged_cancel(session: Session, job: Job, claim: Claim, now: datetime) -> None:
    jobs.cancel(session, job.id, now=now)
    jobs.acknowledge_cancel(session, claim, now=now)


def end_by_failure(session: Session, job: Job, claim: Claim, now: datetime) -> None:
    jobs.fail(session, claim, InvalidImage("broken"), retry_delay_seconds=1, now=now)


def end_by_success(session: Session, job: Job, claim: Claim, now: datetime) -> None:
    jobs.succeed(session, claim, a_result(claim), now=now)


def end_by_deletion(session: Session, job: Job, claim: Claim, now: datetime) -> None:
    jobs.remove(session, job.id, now=now)


@pytest.mark.parametrize(
    "end", [end_by_cancel, end_by_acknowledged_cancel, end_by_failure, end_by_success, end_by_deletion]
)
def test_a_job_that_ends_takes_its_shards_along(
    database: Database, now: datetime, end: Callable[[Session, Job, Claim, datetime], None]
) -> None:
    with database.transaction() as session:
        job, claim = a_shared_job(session, now)
        taken = helps(session, job.id, now)
        assert taken is not None
        prefix = jobs.parts_prefix(job.blob_prefix)
        job_id = job.id
        end(session, job, claim, now)
    with database.transaction() as session, pytest.raises(StaleAttempt):
        shards.progress(session, taken, tiles_done=1, tiles_total=4, bands_done=0, lease_seconds=20, now=now)
    with database.transaction() as session:
        assert helps(session, job_id, now) is None
        if end is not end_by_cancel:
            assert shards.of_job(session, job_id) == []
            owed = session.execute(select(BlobRemoval.prefix, BlobRemoval.due_at)).all()
            # And once more when a late worker has surely come to its end.
            assert len([row for row in owed if prefix.startswith(row.prefix)]) == 2
            assert max(row.due_at for row in owed) == now + timedelta(seconds=jobs.LATE_WRITER_SECONDS)


def test_a_job_deleted_while_it_waits_for_an_attempt_still_has_helpers(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, claim = a_shared_job(session, now)
        jobs.fail(session, claim, retryable(), retry_delay_seconds=2, now=now)
        jobs.remove(session, job.id, now=now)
        due = session.scalars(select(BlobRemoval.due_at).order_by(BlobRemoval.due_at)).all()
        assert due == [now, now + timedelta(seconds=jobs.LATE_WRITER_SECONDS)]


def test_a_retried_job_starts_unshared(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, claim = a_shared_job(session, now)
        end_by_failure(session, job, claim, now)
        jobs.retry(session, job.id, now=now)
        claim = a_claim(session, job.id, now)
        session.refresh(job)
        assert job.split is None
        shards.begin(session, claim, PIECES, TERMS)
        assert len(shards.of_job(session, job.id)) == 2


def test_nobody_helps_from_a_paused_queue_or_a_drained_worker(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, claim = a_shared_job(session, now)
        workers.enlist(session, WorkerFacts("w2", "images", "host", 1), now=now)
        workers.drain(session, "w2", now=now)
        assert helps(session, job.id, now) is None
        jobs.pause_queue(session, job.queue, now=now)
        assert helps(session, job.id, now, "w3") is None
        assert shards.due(session, max_tries=3, resend_after_seconds=60, now=now) == []
        assert holds(session, claim, now) is not None, "what runs goes on"
        jobs.resume_queue(session, job.queue)
        assert helps(session, job.id, now, "w3") is not None


def test_all_is_begun_again_on_other_terms(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, claim = a_shared_job(session, now)
        made(session, holds(session, claim, now), now)
        late = helps(session, job.id, now)
        shards.begin_again(session, claim, {**TERMS, "precise": False})
        session.refresh(job)
        assert job.split == {**TERMS, "precise": False}
        assert stands(session, job.id, now).shards_made == 0
        with pytest.raises(StaleAttempt):
            made(session, late, now)
        again = holds(session, claim, now)
        assert again is not None
        assert (again.position, again.number) == (0, 3)


def test_only_the_attempt_that_holds_the_job_shares_it(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job = a_job(session, a_key(session, now), now)
        claim = a_claim(session, job.id, now)
        jobs.fail(session, claim, retryable(), retry_delay_seconds=2, now=now)
        with pytest.raises(StaleAttempt):
            shards.begin(session, claim, PIECES, TERMS)


# --- messages -------------------------------------------------------------------------------------------------------


def test_a_message_is_sent_for_each_free_shard_and_again_for_one_that_was_lost(
    sqlite_database: Database, settings: Settings, redis_url: str
) -> None:
    broker = Broker(settings)

    def relay() -> int:
        return outbox.relay_due(sqlite_database, broker, settings, stopping=lambda: False)

    with sqlite_database.transaction() as session:
        now = clock(session)
        job, claim = a_shared_job(session, now)
        holds(session, claim, now)
    assert relay() == 1
    assert [(each["task"], each["args"]) for each in messages(redis_url, "cpu.interactive")] == [
        (outbox.HELP_JOB, [job.id])
    ]
    assert relay() == 0, "it is on its way"
    with sqlite_database.transaction() as session:
        shard = session.get_one(Shard, (job.id, 0))
        shard.lease_until = now - timedelta(seconds=1)
    assert relay() == 1, "whoever had it is lost"
    with sqlite_database.transaction() as session:
        session.get_one(Shard, (job.id, 1)).published_at = now - timedelta(seconds=61)
    assert relay() == 1, "nothing came of it"
    for _ in range(2):
        with sqlite_database.transaction() as session:
            shards.give_message_back(session, job.id)
        assert relay() == 1, "for one that was given back one is sent"
    with sqlite_database.transaction() as session:
        jobs.cancel(session, job.id, now=now)
        shards.give_message_back(session, job.id)
    assert relay() == 0
    broker.close()


def test_a_message_that_was_refused_is_sent_at_the_next_look(sqlite_database: Database, settings: Settings) -> None:
    broker = Broker(settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{closed_port()}/0"}))
    with sqlite_database.transaction() as session:
        now = clock(session)
        a_shared_job(session, now)
        due = shards.due(session, max_tries=3, resend_after_seconds=60, now=now)
        assert len(due) == 2
        shards.not_sent(session, due[1:])
        assert [row.position for row in shards.due(session, max_tries=3, resend_after_seconds=60, now=now)] == [1]
    with pytest.raises(BrokerUnavailable):
        outbox.relay_due(sqlite_database, broker, settings, stopping=lambda: False)
    broker.close()


def test_a_clock_that_is_set_takes_no_shard_from_a_living_worker(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, _ = a_shared_job(session, now)
        claim = helps(session, job.id, now)
        shards.due(session, max_tries=3, resend_after_seconds=60, now=now)
        for moved in (timedelta(hours=1), timedelta(hours=-1)):
            shards.clock_jumped(session, lease_seconds=20, now=now + moved)
            rows = shards.of_job(session, job.id)
            assert rows[0].lease_until == now + moved + timedelta(seconds=20)
        assert rows[1].published_at is None, "when it was sent is not known any more"
        made(session, claim, now)


def test_many_that_come_at_once_take_one_shard_each(postgresql_database: Database, now: datetime) -> None:
    with postgresql_database.transaction() as session:
        job = a_job(session, a_key(session, now), now)
        shards.begin(session, a_claim(session, job.id, now), PIECES[:1] * 8, TERMS)

    def take(number: int) -> ShardClaim | None:
        with postgresql_database.transaction() as session:
            return helps(session, job.id, now, f"w{number}")

    with ThreadPoolExecutor(8) as pool:
        taken = [claim for claim in pool.map(take, range(8)) if claim is not None]
    assert sorted(claim.position for claim in taken) == list(range(8))
