"""Any order of all verbs, by customers, workers, late workers, the relay and time, against a model of what must hold.

The model knows the rules in its own words; the product is asked after every step. Run on both databases.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared import deliveries, jobs
from shared.db import Database, Row
from shared.errors import (
    EnlargerError,
    Gone,
    InvalidImage,
    JobNotCancelable,
    JobNotRetryable,
    NotFound,
    OutOfMemory,
    StaleAttempt,
)
from shared.jobs import Claim
from shared.models import Attempt, Batch, Delivery, Job, JobState
from tests.factories import LEASE_SECONDS, a_batch, a_job, a_key, a_result, an_endpoint, retryable

HOOK = "https://receiver.example/hook"
RETRY_DELAY_SECONDS = 2.0
TTL_SECONDS = 600
TERMINAL = {"succeeded", "failed", "canceled", "expired"}
ARROWS = {
    ("queued", "running"),
    ("queued", "canceled"),
    ("queued", "expired"),
    ("running", "queued"),
    *(("running", end) for end in ("succeeded", "failed", "canceled")),
    *((end, "queued") for end in ("failed", "canceled", "expired")),
}


@dataclass
class Model:
    """A job as the rules say it must be."""

    id: str
    max_attempts: int
    deadline_seconds: int | None
    deadline_at: datetime | None
    batch: str | None
    state: str = "queued"
    attempt: int = 0
    tries_used: int = 0
    run_after: datetime | None = None
    lease_until: datetime | None = None
    cancel_requested: bool = False
    expires_at: datetime | None = None
    swept: bool = False
    result_of: int | None = None
    """The attempt whose result the job has."""
    ended: Counter[str] = field(default_factory=Counter)
    """How often it came to each end: as many events must be owed."""
    started: int = 0

    def is_held_by(self, claim: Claim) -> bool:
        return self.state == "running" and self.attempt == claim.attempt

    def is_due(self, now: datetime) -> bool:
        return (
            self.state == "queued"
            and self.tries_used < self.max_attempts
            and (self.run_after is None or self.run_after <= now)
            and (self.deadline_at is None or self.deadline_at > now)
        )

    def end(self, state: str, now: datetime) -> None:
        self.state, self.lease_until, self.run_after = state, None, None
        self.expires_at = now + timedelta(seconds=TTL_SECONDS)
        self.ended[state] += 1

    def requeue(self, run_after: datetime | None) -> None:
        self.state, self.lease_until, self.run_after = "queued", None, run_after


MOST_JOBS = 3

# One rule draws from these, the weightier ones oftener. As rules of their own Hypothesis would leave out about half of
# them in each example, and hardly any example would see a second attempt.
VERBS = (
    *("remove", "heartbeat", "progress", "acknowledge_cancel", "expire_overdue", "sweep", "cancel", "succeed"),
    *("submit", "retry", "retry", "fail", "release", "rescue_lost") * 2,
    *("claim", "time_passes") * 3,
    *("claim_next",) * 2,
)


class JobsMachine(RuleBasedStateMachine):
    database: Database
    reached: Counter[str]
    """How often the machine came where it is meant to come: a machine that never gets anywhere breaks no rule."""

    @initialize()
    def begin(self) -> None:
        self.now = datetime.fromisoformat("2026-03-04T05:06:07+00:00")
        self.models: dict[str, Model] = {}
        self.ids: list[str] = []
        self.claims: list[Claim] = []
        self.completed: Counter[str] = Counter()
        self.seen: dict[str, tuple[str, int, int]] = {}
        with self.database.transaction() as session:
            for table in reversed(Row.metadata.sorted_tables):
                session.execute(table.delete())
            key = a_key(session, self.now)
            an_endpoint(session, key, self.now, url=HOOK, events=deliveries.EVENT_TYPES)
            self.key_id = key.id
            self.batches = [a_batch(session, key, self.now, total=0).id for _ in range(2)]
        self.remaining = dict.fromkeys(self.batches, 0)
        self.submit(0, 2)

    def job_id(self, which: int, fit: Callable[[Model], bool]) -> str:
        """Mostly one that the verb fits; else any, now and then one that was removed."""
        fitting = [model.id for model in self.models.values() if fit(model)] if which < 4 else []
        there = fitting or (self.ids if which == 5 or not self.models else list(self.models))
        return there[which % len(there)]

    def taken(self, which: int) -> Claim | None:
        """A claim that was once given: mostly one that still holds its job, else a late worker's."""
        holding = [claim for claim in self.claims if self.held(claim)]
        choice = holding if holding and which < 4 else self.claims[-6:]
        return choice[which % len(choice)] if choice else None

    @contextmanager
    def step(self, refused: type[EnlargerError] | None = None) -> Iterator[Session]:
        """One transaction. `refused` is what the product must raise, having changed nothing."""
        self.reached["refused" if refused else "allowed"] += 1
        if refused is None:
            with self.database.transaction() as session:
                yield session
            return
        self.reached[refused.__name__] += 1
        with pytest.raises(refused) as raised, self.database.transaction() as session:
            yield session
        assert raised.type is refused

    def model(self, claim: Claim) -> Model | None:
        return self.models.get(claim.job_id)

    def held(self, claim: Claim) -> Model | None:
        """The model, where this claim still owns the job."""
        model = self.model(claim)
        return model if model is not None and model.is_held_by(claim) else None

    def finish(self, model: Model, state: str) -> None:
        model.end(state, self.now)
        self.reached[state] += 1
        if model.batch is not None:
            self.count_down(model.batch)

    def count_down(self, batch: str) -> None:
        self.remaining[batch] -= 1
        if self.remaining[batch] == 0:
            self.completed[batch] += 1

    @rule(verb=st.sampled_from(VERBS), which=st.integers(0, 5), how=st.integers(0, 5))
    def act(self, verb: str, which: int, how: int) -> None:
        """`which` job or claim the verb is about, and `how`, are taken modulo what there is to choose from."""
        getattr(self, verb)(which, how)

    # --- customers ---

    def submit(self, which: int, how: int) -> None:
        if len(self.models) == MOST_JOBS:
            return
        max_attempts, batch_id = 1 + how % 3, [None, *self.batches][which % 3]
        deadline_seconds = [None, 1, 30, None, None, None][(which + how) % 6]
        with self.step() as session:
            if batch_id is not None:
                row = session.get_one(Batch, batch_id)
                row.total, row.remaining = row.total + 1, row.remaining + 1
                self.remaining[batch_id] += 1
            job_id = a_job(
                session,
                self.key_id,
                self.now,
                max_attempts=max_attempts,
                deadline_seconds=deadline_seconds,
                batch_id=batch_id,
                ttl_seconds=TTL_SECONDS,
            ).id
        deadline_at = None if deadline_seconds is None else self.now + timedelta(seconds=deadline_seconds)
        self.models[job_id] = Model(job_id, max_attempts, deadline_seconds, deadline_at, batch_id)
        self.ids.append(job_id)

    def cancel(self, which: int, _how: int) -> None:
        job_id = self.job_id(which, lambda model: model.state == "running")
        model = self.models.get(job_id)
        if model is None:
            with self.step(NotFound) as session:
                jobs.cancel(session, job_id, now=self.now)
        elif model.state in TERMINAL:
            with self.step(JobNotCancelable) as session:
                jobs.cancel(session, job_id, now=self.now)
        else:
            with self.step() as session:
                jobs.cancel(session, job_id, now=self.now)
            if model.state == "queued":
                self.finish(model, "canceled")
            else:
                model.cancel_requested = True

    def retry(self, which: int, _how: int) -> None:
        job_id = self.job_id(which, lambda model: model.state in TERMINAL and not model.swept)
        model = self.models.get(job_id)
        if model is None:
            refused: type[EnlargerError] | None = NotFound
        elif model.state not in ("failed", "canceled", "expired"):
            refused = JobNotRetryable
        else:
            refused = Gone if model.swept else None
        with self.step(refused) as session:
            jobs.retry(session, job_id, now=self.now)
        if model is not None and refused is None:
            model.requeue(None)
            model.tries_used, model.cancel_requested, model.expires_at = 0, False, None
            seconds = model.deadline_seconds
            model.deadline_at = None if seconds is None else self.now + timedelta(seconds=seconds)
            if model.batch is not None:
                self.remaining[model.batch] += 1

    def remove(self, which: int, _how: int) -> None:
        job_id = self.job_id(which, lambda model: model.swept)
        model = self.models.pop(job_id, None)
        with self.step(NotFound if model is None else None) as session:
            jobs.remove(session, job_id, now=self.now)
        if model is not None:
            self.seen.pop(job_id, None)
            if model.batch is not None and model.state not in TERMINAL:
                self.count_down(model.batch)

    # --- workers, in time or late: `claims` never forgets an old one ---

    def claim(self, which: int, how: int) -> None:
        self.claim_job(self.job_id(which, lambda model: model.is_due(self.now)), how)

    def claim_job(self, job_id: str, how: int) -> None:
        with self.step() as session:
            claim = jobs.claim(
                session, job_id, worker_id=f"w{how % 2}", device="cpu", lease_seconds=LEASE_SECONDS, now=self.now
            )
        model = self.models.get(job_id)
        if model is None or not model.is_due(self.now):
            assert claim is None, "what is not due was claimed"
            return
        model.state, model.attempt, model.tries_used = "running", model.attempt + 1, model.tries_used + 1
        model.lease_until = self.now + timedelta(seconds=LEASE_SECONDS)
        model.started += 1
        assert claim == Claim(job_id, model.attempt, announces_progress=True)
        self.claims.append(claim)
        self.reached["second attempts"] += claim.attempt > 1

    def claim_next(self, _which: int, how: int) -> None:
        """By a message that may be any job's: there is a job for it as long as one is due."""
        with self.step() as session:
            job_id = jobs.next_due(session, ("cpu.interactive", "cpu.bulk"), now=self.now)
        due = [model.id for model in self.models.values() if model.is_due(self.now)]
        assert (job_id in due) if due else job_id is None
        if job_id is not None:
            self.claim_job(job_id, how)

    def touch(self, claim: Claim, act: Callable[[Session], bool]) -> None:
        model = self.held(claim)
        with self.step(None if model else StaleAttempt) as session:
            canceling = act(session)
        if model is not None:
            assert canceling == model.cancel_requested, "the worker must learn of a cancel at once"
            model.lease_until = self.now + timedelta(seconds=LEASE_SECONDS)

    def heartbeat(self, which: int, _how: int) -> None:
        if (claim := self.taken(which)) is None:
            return
        self.touch(claim, lambda s: jobs.heartbeat(s, claim, lease_seconds=LEASE_SECONDS, now=self.now))

    def progress(self, which: int, how: int) -> None:
        if (claim := self.taken(which)) is None:
            return
        self.touch(
            claim,
            lambda s: jobs.progress(
                s,
                claim,
                phase="upscale",
                fraction=how / 6,
                bands_done=1,
                bands_total=4,
                eta_seconds=1.0,
                lease_seconds=LEASE_SECONDS,
                now=self.now,
                announce=how % 2 == 0,
            ),
        )

    def succeed(self, which: int, _how: int) -> None:
        if (claim := self.taken(which)) is None:
            return
        model = self.held(claim)
        wins = model is not None and not model.cancel_requested
        with self.step(None if wins else StaleAttempt) as session:
            jobs.succeed(session, claim, a_result(claim), now=self.now)
        if model is not None and wins:
            self.finish(model, "succeeded")
            model.result_of = claim.attempt

    def fail(self, which: int, how: int) -> None:
        if (claim := self.taken(which)) is None:
            return
        model = self.held(claim)
        error: EnlargerError = [retryable(), InvalidImage("no"), OutOfMemory("no")][how % 3]
        queue = "cpu.bulk" if how % 3 == 2 else None
        state = None
        with self.step(None if model else StaleAttempt) as session:
            state = jobs.fail(session, claim, error, retry_delay_seconds=RETRY_DELAY_SECONDS, now=self.now, queue=queue)
        if model is None:
            return
        if model.cancel_requested:
            self.finish(model, "canceled")
        elif not error.retryable or (queue is None and model.tries_used >= model.max_attempts):
            self.finish(model, "failed")
        elif queue is None:
            model.requeue(self.now + timedelta(seconds=RETRY_DELAY_SECONDS * 2 ** (model.tries_used - 1)))
        else:
            model.requeue(self.now)
            model.tries_used -= 1
        assert state == model.state

    def release(self, which: int, _how: int) -> None:
        if (claim := self.taken(which)) is None:
            return
        model = self.held(claim)
        with self.step(None if model else StaleAttempt) as session:
            jobs.release(session, claim, now=self.now)
        if model is None:
            return
        if model.cancel_requested:
            self.finish(model, "canceled")
        else:
            model.requeue(None)
            model.tries_used -= 1

    def acknowledge_cancel(self, which: int, _how: int) -> None:
        if (claim := self.taken(which)) is None:
            return
        model = self.held(claim)
        asked = model is not None and model.cancel_requested
        with self.step(None if asked else StaleAttempt) as session:
            jobs.acknowledge_cancel(session, claim, now=self.now)
        if model is not None and asked:
            self.finish(model, "canceled")

    # --- the relay, and time ---

    def rescue_lost(self, _which: int, _how: int) -> None:
        with self.step() as session:
            rescued = jobs.rescue_lost(session, retry_delay_seconds=RETRY_DELAY_SECONDS, now=self.now)
        lost = [m for m in self.models.values() if m.state == "running" and m.lease_until and m.lease_until < self.now]
        assert sorted(rescued) == sorted(model.id for model in lost)
        for model in sorted(lost, key=lambda m: (m.batch or "", m.id)):
            if model.cancel_requested:
                self.finish(model, "canceled")
            elif model.tries_used >= model.max_attempts:
                self.finish(model, "failed")
            else:
                delay = 0.0 if model.tries_used == 1 else RETRY_DELAY_SECONDS
                model.requeue(self.now + timedelta(seconds=delay))

    def expire_overdue(self, _which: int, _how: int) -> None:
        with self.step() as session:
            expired = jobs.expire_overdue(session, now=self.now)
        overdue = [
            m for m in self.models.values() if m.state == "queued" and m.deadline_at and m.deadline_at <= self.now
        ]
        assert sorted(expired) == sorted(model.id for model in overdue)
        for model in overdue:
            self.finish(model, "expired")

    def sweep(self, _which: int, _how: int) -> None:
        with self.step() as session:
            swept = jobs.sweep_expired(session, now=self.now)
        stale = [
            m
            for m in self.models.values()
            if m.state in TERMINAL and not m.swept and m.expires_at is not None and m.expires_at <= self.now
        ]
        assert sorted(swept) == sorted(model.id for model in stale)
        for model in stale:
            model.swept = True

    def time_passes(self, _which: int, how: int) -> None:
        self.now += timedelta(seconds=[1, 1, 3, 3, LEASE_SECONDS + 1, TTL_SECONDS][how])

    # --- what must hold after every step ---

    @invariant()
    def the_rows_are_what_the_model_says(self) -> None:
        if not hasattr(self, "models"):
            return
        with self.database.reading() as session:
            rows = {job.id: job for job in session.scalars(select(Job))}
            owed: dict[str | None, Counter[str]] = {}
            for delivery in session.execute(select(Delivery.job_id, Delivery.type)):
                owed.setdefault(delivery.job_id, Counter())[delivery.type] += 1
            batches = {batch.id: batch.remaining for batch in session.scalars(select(Batch))}
            completed = Counter(session.scalars(select(Delivery.batch_id).where(Delivery.type == "batch.completed")))
            open_attempts = {
                (row.job_id, row.number)
                for row in session.execute(select(Attempt.job_id, Attempt.number).where(Attempt.outcome.is_(None)))
            }
        assert set(rows) == set(self.models)
        for job_id, model in self.models.items():
            job = rows[job_id]
            assert (job.state, job.attempt, job.tries_used) == (model.state, model.attempt, model.tries_used)
            assert (job.run_after, job.lease_until) == (model.run_after, model.lease_until)
            assert (job.expires_at, job.swept_at is not None) == (model.expires_at, model.swept)
            assert (job.cancel_requested_at is not None) == model.cancel_requested
            assert 0 <= job.tries_used <= job.max_attempts

            # Exactly one terminal event for each end, and one `started` for each attempt.
            events = owed.get(job_id, Counter())
            assert {state: events[f"job.{state}"] for state in TERMINAL} == {s: model.ended[s] for s in TERMINAL}
            assert events["job.started"] == model.started == model.attempt

            # A result is there exactly when it succeeded, and it is the winner's: none appears after a cancel.
            expected = a_result(Claim(job_id, model.result_of)).key if model.result_of is not None else None
            assert job.result_key == expected
            assert (job.result_key is not None) == (job.state == JobState.SUCCEEDED)

            # The newest attempt is open exactly while the job runs, and no other is.
            assert ((job_id, job.attempt) in open_attempts) == (job.state == JobState.RUNNING)

            # State moved along an arrow, the fence only forward, and every move has a new version.
            state, attempt, version = self.seen.get(job_id, ("queued", 0, 1))
            assert attempt <= job.attempt
            assert version <= job.version
            if state != job.state:
                assert (state, str(job.state)) in ARROWS
                assert job.version > version
            self.seen[job_id] = (str(job.state), job.attempt, job.version)
        assert {job_id for job_id, _ in open_attempts} <= set(self.models), "attempts of removed jobs are left"
        assert batches == self.remaining
        assert completed == self.completed


def machine_on(database: Database) -> type[JobsMachine]:
    class Machine(JobsMachine):
        pass

    Machine.database, Machine.reached = database, Counter()
    return Machine


def explore(database: Database, *, examples: int, steps: int) -> None:
    """Hypothesis looks for short stories that break a rule, and shortens what it finds."""
    profile = hypothesis_settings(max_examples=examples, stateful_step_count=steps)
    run_state_machine_as_test(machine_on(database), settings=profile)


def wander(database: Database, *, seed: int, steps: int) -> None:
    """One long story by chance alone: it comes to far places that short ones do not reach, and shows that it did."""
    kind, chance = machine_on(database), random.Random(seed)
    machine = kind()
    machine.begin()
    for step in range(steps):
        verb, which, how = chance.choice(VERBS), chance.randrange(6), chance.randrange(6)
        try:
            machine.act(verb, which, how)
            machine.the_rows_are_what_the_model_says()
        except AssertionError as broken:
            broken.add_note(f"seed {seed}, step {step}: {verb}({which}, {how})")
            raise
    refusals = (StaleAttempt, NotFound, JobNotCancelable, JobNotRetryable)
    places = {*TERMINAL, "second attempts", *(error.__name__ for error in refusals)}
    assert places <= set(kind.reached), kind.reached
    assert kind.reached["second attempts"] > steps / 50, kind.reached


def test_no_short_story_breaks_a_rule_on_sqlite(sqlite_database: Database) -> None:
    explore(sqlite_database, examples=30, steps=30)


def test_no_short_story_breaks_a_rule_on_postgresql(postgresql_database: Database) -> None:
    explore(postgresql_database, examples=10, steps=30)


@pytest.mark.parametrize("seed", [1, 2])
def test_no_long_story_breaks_a_rule_on_sqlite(sqlite_database: Database, seed: int) -> None:
    wander(sqlite_database, seed=seed, steps=800)


def test_no_long_story_breaks_a_rule_on_postgresql(postgresql_database: Database) -> None:
    wander(postgresql_database, seed=3, steps=700)
