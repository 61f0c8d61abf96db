"""What an operator does to the service: one function of `shared` each, with its entry in the audit log beside it.

Every route here is a form of the pages, changes something, and needs the scope `operator` (keys: `admin`) and a service
whose pages are not read-only. What is done to many jobs is done in small transactions, for as long as a request may
last; what is left is said, and the same button goes on with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from flask import Blueprint, flash, redirect, render_template, request
from sqlalchemy import select
from sqlalchemy.orm import Session
from werkzeug.wrappers import Response as AnyResponse

from api import auth, filters
from api.auth import Caller
from api.context import Context
from api.web import as_pages, own_path
from shared import audit, deliveries, jobs, keys, queries, queueing, workers
from shared.db import clock
from shared.errors import EnlargerError, Forbidden, Gone, InvalidRequest, NotFound, RequestRefused
from shared.jobs import JobInput, JobOptions
from shared.models import ApiKey, Job, JobState
from shared.outbox import message_of
from shared.queries import JobFilter
from shared.queueing import IMAGE_QUEUES

JOBS_AT_ONCE = 100
"""In one transaction: SQLite has one writer, and workers wait for it."""
MANY_JOBS_SECONDS = 15.0
"""How long one press of a button may work."""
HURRIED_JOBS = 500
IDS_KEPT = 100
"""Of many jobs, so many are named in the audit log."""


@dataclass(frozen=True)
class Verb:
    """Something that can be done to jobs."""

    name: str
    done: str
    """Past tense, for what is said afterwards."""
    states: tuple[JobState, ...]
    """Those in which it can be done."""
    is_final: bool
    """It cannot be taken back."""
    act: Callable[..., Any]


VERBS = {
    verb.name: verb
    for verb in (
        Verb("retry", "queued again", jobs.RETRYABLE_STATES, False, jobs.retry),
        Verb("cancel", "canceled", (JobState.QUEUED, JobState.RUNNING), False, jobs.cancel),
        Verb("delete", "deleted", tuple(JobState), True, jobs.remove),
    )
}


@dataclass(frozen=True)
class Choice:
    """The jobs that were chosen: by their boxes, or all that the filter lets through."""

    ids: tuple[str, ...]
    typed: str
    """The filter, where all that match were chosen."""
    newest_id: str
    """The newest job when the list was drawn: what has come in since was not chosen."""

    @property
    def is_all(self) -> bool:
        return not self.ids

    def matching(self, now: datetime) -> JobFilter:
        if self.ids:
            return JobFilter(any_of=(("id", self.ids),))
        return replace(filters.read(self.typed, now=now), up_to_id=self.newest_id)


def fitting(wanted: JobFilter, verb: Verb) -> JobFilter:
    """Those of the jobs to which it can be done."""
    return replace(wanted, any_of=(*wanted.any_of, ("state", verb.states)), unswept=verb.name == "retry")


def blueprint(context: Context) -> Blueprint:
    pages = Blueprint("operations", __name__, url_prefix="/admin")
    as_pages(pages)
    settings, database = context.settings, context.database

    @pages.before_request
    def who_may() -> None:
        auth.caller(context, "admin" if request.path.startswith("/admin/keys") else "operator")
        if settings.admin_read_only:
            raise Forbidden("The operator's pages only show things here: ENLARGER_ADMIN_READ_ONLY is set.")

    def noted(session: Session, action: str, subject: str, now: datetime, **detail: Any) -> None:
        caller = auth.caller(context)
        audit.record(
            session,
            key_id=caller.key_id,
            key_name=caller.name,
            action=action,
            subject=subject,
            now=now,
            detail=detail,
        )

    def change(do: Callable[[Session, datetime], str], *, otherwise: str = "/admin") -> AnyResponse:
        """Carries out one change, says what came of it, and leads back to where the button was pressed."""
        try:
            with database.transaction() as session:
                said = do(session, clock(session))
            flash(said, "good")
        except RequestRefused as refused:
            flash(refused.detail, "bad")
        return back(otherwise)

    # --- one job -----------------------------------------------------------------------------------------------------

    @pages.post("/jobs/<job_id>/cancel")
    def cancel(job_id: str) -> AnyResponse:
        def do(session: Session, now: datetime) -> str:
            canceled = jobs.cancel(session, job_id, now=now)
            noted(session, "job.cancel", job_id, now)
            ended = canceled.state == JobState.CANCELED
            return f"{job_id} is canceled." if ended else f"{job_id} stops at its next band."

        return change(do)

    @pages.post("/jobs/<job_id>/retry")
    def retry(job_id: str) -> AnyResponse:
        queued: list[Job] = []

        def do(session: Session, now: datetime) -> str:
            queued.append(jobs.retry(session, job_id, now=now))
            noted(session, "job.retry", job_id, now)
            return f"{job_id} is queued again."

        answer = change(do)
        for job in queued:
            context.hurrier.publish(message_of(job))
        return answer

    @pages.post("/jobs/<job_id>/again")
    def again(job_id: str) -> AnyResponse:
        """The same picture with the same settings, as a job of the operator's own: the customer hears nothing of it."""
        with database.reading() as session:
            job = queries.any_job(session, job_id)
            now = clock(session)
        try:
            made = _run_again(context, auth.caller(context), job, now, noted)
        except RequestRefused as refused:
            flash(refused.detail, "bad")
            return back(f"/admin/jobs/{job_id}")
        context.hurrier.publish(message_of(made))
        flash(f"Handed in again as {made.id}, a job of your own key.", "good")
        return redirect(f"/admin/jobs/{made.id}", 303)

    # --- many jobs ---------------------------------------------------------------------------------------------------

    @pages.post("/jobs/review")
    def review() -> AnyResponse | str:
        """Says how many jobs it would be done to, before anything is."""
        verb, choice = _verb(), _choice()
        if not choice.ids and not request.form.get("all"):
            flash("Nothing was chosen: tick some jobs, or all that match.", "bad")
            return back("/admin/jobs")
        with database.reading() as session:
            matching = choice.matching(clock(session))
            chosen = queries.count_jobs(session, matching)
            fit = queries.count_jobs(session, fitting(matching, verb))
        return render_template(
            "admin/review.html",
            here="jobs",
            verb=verb,
            choice=choice,
            chosen=chosen,
            fit=fit,
            back=own_path(request.form.get("back"), "/admin/jobs"),
        )

    @pages.post("/jobs/many")
    def many() -> AnyResponse:
        verb, choice = _verb(), _choice()
        outcome = _do_to_many(context, verb, choice, noted)
        # The first of them only: the relay sends the others within seconds, and the hurrier's queue is short.
        for job in outcome.queued[:HURRIED_JOBS]:
            context.hurrier.publish(message_of(job))
        said = f"{_jobs(outcome.done)} {verb.done}."
        if outcome.left:
            said += f" {_jobs(outcome.left)} left after {MANY_JOBS_SECONDS:g} s of work: do the same again to go on."
        flash(said, "good" if outcome.done or not outcome.left else "bad")
        return back("/admin/jobs")

    # --- queues and workers ------------------------------------------------------------------------------------------

    @pages.post("/queues/<queue>/<action>")
    def pause_or_resume(queue: str, action: str) -> AnyResponse:
        if queue not in IMAGE_QUEUES or action not in ("pause", "resume"):
            raise NotFound(f"There is no queue {queue}, or nothing like {action!r} to do to it.")

        def do(session: Session, now: datetime) -> str:
            is_pause = action == "pause"
            changed = jobs.pause_queue(session, queue, now=now) if is_pause else jobs.resume_queue(session, queue)
            if changed:
                noted(session, f"queue.{action}", queue, now)
            if is_pause:
                return f"{queue} is paused: what runs goes on, nothing new is begun."
            return f"{queue} is open again."

        return change(do)

    @pages.post("/workers/<worker_id>/<action>")
    def drain_or_resume(worker_id: str, action: str) -> AnyResponse:
        if action not in ("drain", "resume"):
            raise NotFound(f"There is nothing like {action!r} to do to a worker.")

        def do(session: Session, now: datetime) -> str:
            if action == "drain":
                workers.drain(session, worker_id, now=now)
                said = f"{worker_id} takes no more jobs; what it has it finishes."
            else:
                workers.resume(session, worker_id)
                said = f"{worker_id} takes jobs again."
            noted(session, f"worker.{action}", worker_id, now)
            return said

        return change(do, otherwise="/admin/workers")

    # --- webhooks ----------------------------------------------------------------------------------------------------

    @pages.post("/deliveries/<delivery_id>/resend")
    def resend(delivery_id: str) -> AnyResponse:
        def do(session: Session, now: datetime) -> str:
            delivery = deliveries.resend(session, delivery_id, now=now)
            noted(session, "delivery.resend", delivery_id, now, url=delivery.url, type=delivery.type)
            return f"{delivery.type} goes out to {delivery.url} again."

        return change(do, otherwise="/admin/webhooks")

    @pages.post("/endpoints/<endpoint_id>/<action>")
    def endpoint(endpoint_id: str, action: str) -> AnyResponse:
        if action not in ("turn_on", "test"):
            raise NotFound(f"There is nothing like {action!r} to do to an endpoint.")

        def do(session: Session, now: datetime) -> str:
            if action == "turn_on":
                found = deliveries.turn_on_endpoint(session, endpoint_id)
                said = f"{found.url} is told of events again."
            else:
                found = queries.endpoint(session, endpoint_id)
                deliveries.owe_test(session, found, now)
                said = f"A test event goes out to {found.url}."
            noted(session, f"endpoint.{action}", endpoint_id, now, url=found.url)
            return said

        return change(do, otherwise="/admin/webhooks")

    # --- keys --------------------------------------------------------------------------------------------------------

    @pages.post("/keys")
    def create_key() -> AnyResponse | str:
        name = request.form.get("name", "").strip()
        days = request.form.get("days", "").strip()
        try:
            if not 1 <= len(name) <= 100:
                raise InvalidRequest("A key needs a name of 1 to 100 characters, to be known by.")
            if days and not (days.isdigit() and 1 <= int(days) <= 36500):
                raise InvalidRequest("A key ends after a whole number of days, or never.")
            with database.transaction() as session:
                now = clock(session)
                expires_at = now + timedelta(days=int(days)) if days else None
                key, secret = keys.create(
                    session, name=name, scopes=request.form.getlist("scope"), now=now, expires_at=expires_at
                )
                noted(session, "key.create", f"{key.id} ({name})", now, scopes=list(key.scopes))
        except RequestRefused as refused:
            flash(refused.detail, "bad")
            return redirect("/admin/keys", 303)
        # Drawn and not flashed: a message waits in a cookie, and the secret is to be nowhere but on this page.
        return render_template("admin/key_made.html", here="keys", key=key, secret=secret)

    @pages.post("/keys/<key_id>/revoke")
    def revoke_key(key_id: str) -> AnyResponse:
        def do(session: Session, now: datetime) -> str:
            if key_id == auth.caller(context).key_id:
                raise InvalidRequest("This is the key you are signed in with; sign in with another one to revoke it.")
            keys.revoke(session, key_id, now=now)
            name = session.get_one(ApiKey, key_id).name
            noted(session, "key.revoke", f"{key_id} ({name})", now)
            return f"{name} is revoked: nobody can call with it any more."

        return change(do, otherwise="/admin/keys")

    return pages


def back(otherwise: str) -> AnyResponse:
    """To the page on which the button was pressed."""
    return redirect(own_path(request.form.get("back"), otherwise), 303)


def _verb() -> Verb:
    name = request.form.get("action", "")
    if name not in VERBS:
        raise InvalidRequest(f"There is no {name!r} to do; there are {', '.join(VERBS)}.")
    return VERBS[name]


def _choice() -> Choice:
    is_all = bool(request.form.get("all"))
    return Choice(
        ids=() if is_all else tuple(request.form.getlist("id")),
        typed=request.form.get("q", ""),
        newest_id=request.form.get("newest", ""),
    )


def _jobs(count: int) -> str:
    return f"{count:,} {'job' if count == 1 else 'jobs'}"


@dataclass
class _Outcome:
    done: int
    left: int
    queued: list[Job]


def _do_to_many(context: Context, verb: Verb, choice: Choice, noted: Callable[..., None]) -> _Outcome:
    """Goes through the chosen jobs, newest first, JOBS_AT_ONCE in a transaction, each with its entry in the log."""
    ends_at = time.monotonic() + MANY_JOBS_SECONDS
    outcome = _Outcome(0, 0, [])
    with context.database.reading() as session:
        wanted = fitting(choice.matching(clock(session)), verb)
    last_id: str | None = None
    while time.monotonic() < ends_at:
        with context.database.transaction() as session:
            now = clock(session)
            chosen = select(Job.id, Job.batch_id).order_by(Job.id.desc()).limit(JOBS_AT_ONCE)
            rows = session.execute(replace(wanted, before_id=last_id).apply(chosen)).all()
            if not rows:
                return outcome
            last_id = rows[-1].id
            done = []
            # Batches in one order, as everybody takes them who ends many jobs at once.
            for row in sorted(rows, key=lambda row: (row.batch_id or "", row.id)):
                try:
                    made = verb.act(session, row.id, now=now)
                except RequestRefused:
                    # It has moved on since it was counted: nothing was changed.
                    continue
                done.append(row.id)
                if verb.name == "retry":
                    outcome.queued.append(made)
            if done:
                how = {"filter": choice.typed} if choice.is_all else {}
                subject = done[0] if len(done) == 1 else _jobs(len(done))
                noted(session, f"job.{verb.name}", subject, now, ids=sorted(done)[:IDS_KEPT], **how)
        outcome.done += len(done)
    with context.database.reading() as session:
        outcome.left = queries.count_jobs(session, replace(wanted, before_id=last_id))
    return outcome


def _run_again(context: Context, caller: Caller, job: Job, now: datetime, noted: Callable[..., None]) -> Job:
    if job.swept_at is not None:
        raise Gone("The picture handed in has been swept; there is nothing to run again.")
    new_id = jobs.new_job_id(now)
    prefix = jobs.blob_prefix(new_id)
    picture = JobInput(
        job_id=new_id,
        blob_prefix=prefix,
        key=f"{prefix}/input",
        width=job.input_width,
        height=job.input_height,
        format=job.input_format,
        bytes=job.input_bytes,
        sha256=job.input_sha256,
        name=job.input_name,
    )
    context.storage.copy(job.input_key, picture.key)
    settings = context.settings
    try:
        with context.database.transaction() as session:
            now = clock(session)
            gpu_alive = queueing.gpu_is_alive(
                session,
                worker_lost_after_seconds=settings.worker_lost_after_seconds,
                needs=job.needs,
                now=now,
            )
            options = JobOptions(
                model=job.model,
                scale=job.scale,
                format=job.format,
                queue=queueing.image_queue(job.device, job.priority, gpu_alive=gpu_alive),
                needs=job.needs,
                routing_reason="run again by an operator",
                classify=job.classify,
                quality=job.quality,
                lossless=job.lossless,
                metadata_policy=job.metadata_policy,
                alpha=job.alpha,
                background=job.background,
                device=job.device,
                priority=job.priority,
                deadline_seconds=job.deadline_seconds,
                ttl_seconds=job.ttl_seconds,
                expected_seconds=job.expected_seconds,
            )
            made = jobs.submit(
                session,
                owner_key_id=caller.key_id,
                options=options,
                picture=picture,
                max_attempts=settings.max_attempts,
                max_queued_jobs=settings.max_queued_jobs_per_key,
                now=now,
            )
            noted(session, "job.again", job.id, now, made=made.id)
    except EnlargerError:
        with context.database.transaction() as session:
            jobs.owe_blob_removal(session, prefix, now=now)
        raise
    return made
