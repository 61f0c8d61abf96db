"""The rows. What may happen to them is in `shared.jobs` and `shared.deliveries`; nothing else writes their state."""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from shared.db import Row, UtcDateTime


class JobState(enum.StrEnum):
    """Where a job stands. Every arrow between states is one function of `shared.jobs`."""

    QUEUED = "queued"
    """Waits for a worker; not before `run_after`. With `attempt` > 0 it is being retried."""
    RUNNING = "running"
    """An attempt holds the lease. With `cancel_requested_at` set it stops at its next band."""
    SUCCEEDED = "succeeded"
    """The result is stored. Final."""
    FAILED = "failed"
    """Cannot be done, or three attempts did not do it; `error_code` says why. Final, can be retried by hand."""
    CANCELED = "canceled"
    """The customer took it back. Final, can be retried by hand."""
    EXPIRED = "expired"
    """Its deadline passed before a worker could start it. Final, can be retried by hand."""


TERMINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELED, JobState.EXPIRED})


class DeliveryState(enum.StrEnum):
    PENDING = "pending"
    """Owed; tried at `due_at`."""
    DELIVERED = "delivered"
    """The receiver answered 2xx. Final."""
    ABANDONED = "abandoned"
    """Every try failed, or the endpoint is off. Final, can be resent by hand."""


class ApiKey(Row):
    """Who calls. Jobs belong to a key."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    scopes: Mapped[list[str]] = mapped_column(JSON)
    secret_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    """Hash of the key. The key has 160 random bits, so a plain hash suffices and a slow one would only cost time."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    previous_sha256: Mapped[str | None] = mapped_column(String(64), index=True, unique=True)
    """Hash of the secret before the last rotation, which is good until `previous_ends_at`."""
    previous_ends_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class PageSession(Row):
    """Somebody signed in to the pages. The cookie holds a token; this row decides whether it is worth anything."""

    __tablename__ = "page_sessions"

    token_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class Job(Row):
    """What a customer asked for: one row, one final answer."""

    __tablename__ = "jobs"
    __table_args__ = (
        # A customer's list and queue cap; the relay's and the rescuer's looks; the dashboard's newest of a state.
        Index("ix_jobs_owner_key_id_id", "owner_key_id", "id"),
        Index("ix_jobs_owner_key_id_state_queue_start_tag_px", "owner_key_id", "state", "queue", "start_tag_px"),
        # The other jobs of the same picture: what a result is compared with.
        Index("ix_jobs_owner_key_id_input_sha256", "owner_key_id", "input_sha256"),
        # Who is next, and how many are before whom.
        Index("ix_jobs_state_queue_start_tag_px_id", "state", "queue", "start_tag_px", "id"),
        # The same of the jobs that have one need: workers that cannot run what is next pass over any number of them.
        Index("ix_jobs_state_queue_needs_start_tag_px_id", "state", "queue", "needs", "start_tag_px", "id"),
        Index("ix_jobs_state_lease_until", "state", "lease_until"),
        Index("ix_jobs_state_finished_at", "state", "finished_at"),
        Index("ix_jobs_state_id", "state", "id"),
        Index("ix_jobs_expires_at", "expires_at"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner_key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    batch_id: Mapped[str | None] = mapped_column(ForeignKey("batches.id"), index=True)
    external_id: Mapped[str | None] = mapped_column(String(255), index=True)

    # What is asked for.
    model: Mapped[str] = mapped_column(String(100))
    """The card that runs. `auto` until a worker has seen the picture; `preview` for a job of several cards."""
    routing_reason: Mapped[str] = mapped_column(Text)
    scale: Mapped[int]
    classify: Mapped[bool]
    format: Mapped[str] = mapped_column(String(10))
    """Of the result; `auto` has been resolved."""
    quality: Mapped[int]
    lossless: Mapped[bool]
    metadata_policy: Mapped[str] = mapped_column(String(10))
    alpha: Mapped[str] = mapped_column(String(10))
    background: Mapped[str] = mapped_column(String(10))
    device: Mapped[str] = mapped_column(String(10))
    """Asked for: auto, gpu or cpu."""
    priority: Mapped[str] = mapped_column(String(12))
    queue: Mapped[str] = mapped_column(String(40))
    """The image queue its message goes to; changed where memory runs out on a GPU, or where no GPU is left."""
    needs: Mapped[str] = mapped_column(String(100), server_default="", default="")
    """The model that its worker must have and not every worker has: one of one's own, or one that some worker was
    found to lack. Empty where any worker will do."""
    output_px: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """Of the result as it was asked for: what a key's share of the workers is measured in."""
    start_tag_px: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """Its place among those that wait in its queue, the least first: `jobs.next_due`."""
    deadline_seconds: Mapped[int | None]
    deadline_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    ttl_seconds: Mapped[int]
    webhook_url: Mapped[str | None] = mapped_column(Text)
    webhook_events: Mapped[list[str]] = mapped_column(JSON)
    traceparent: Mapped[str | None] = mapped_column(String(60))
    expected_seconds: Mapped[float]
    """Of upscaling, guessed from the card and the size at submit; time limits are multiples of it."""

    preview: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    """Of a preview: `crop` (x, y, width, height in px of the input) and `models`; once made, `cells` too."""

    # What was handed in.
    blob_prefix: Mapped[str] = mapped_column(String(120))
    """Every blob of the job lies under this key; it carries 128 random bits."""
    input_key: Mapped[str] = mapped_column(String(200))
    input_width: Mapped[int]
    input_height: Mapped[int]
    input_format: Mapped[str] = mapped_column(String(10))
    input_bytes: Mapped[int] = mapped_column(BigInteger)
    input_sha256: Mapped[str] = mapped_column(String(64))
    input_name: Mapped[str | None] = mapped_column(String(255))
    """File name the customer gave, without folders."""

    # Its life.
    state: Mapped[JobState] = mapped_column(String(12))
    version: Mapped[int] = mapped_column(default=1)
    """Grows with every change a customer can see: the event id of streams."""
    attempt: Mapped[int] = mapped_column(default=0)
    """Number of the newest attempt: the fence. Never goes down."""
    tries_used: Mapped[int] = mapped_column(default=0)
    """Attempts that count against `max_attempts`; a retry by hand starts again at 0."""
    max_attempts: Mapped[int]
    run_after: Mapped[datetime | None] = mapped_column(UtcDateTime)
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    cancel_requested_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    queued_at: Mapped[datetime] = mapped_column(UtcDateTime)
    """When it last entered QUEUED: waits are measured from here."""
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When its pictures are swept; set when it ends."""
    swept_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    running_device: Mapped[str | None] = mapped_column(String(10))
    worker_id: Mapped[str | None] = mapped_column(String(100))

    # Its message.
    published_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    published_count: Mapped[int] = mapped_column(default=0)
    """Copies sent to the Redis of `published_generation`."""
    published_generation: Mapped[str | None] = mapped_column(String(40))

    # Progress.
    phase: Mapped[str] = mapped_column(String(12), default="queued")
    fraction: Mapped[float] = mapped_column(default=0.0)
    bands_done: Mapped[int] = mapped_column(default=0)
    bands_total: Mapped[int] = mapped_column(default=0)
    eta_seconds: Mapped[float | None]

    # What it came to.
    result_key: Mapped[str | None] = mapped_column(String(200))
    result_width: Mapped[int | None]
    result_height: Mapped[int | None]
    result_bytes: Mapped[int | None] = mapped_column(BigInteger)
    result_sha256: Mapped[str | None] = mapped_column(String(64))
    labels: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON)
    timings: Mapped[dict[str, float] | None] = mapped_column(JSON)
    warnings: Mapped[list[str]] = mapped_column(JSON, default=list)
    report: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    """How true the result is to the input: `worker.fidelity`."""
    split: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    """Of a job under way that many workers share: what holds for all its shards. None of every other job."""
    error_code: Mapped[str | None] = mapped_column(String(40))
    error_detail: Mapped[str | None] = mapped_column(Text)
    error_retryable: Mapped[bool | None]


class Attempt(Row):
    """One worker's numbered try at a job: the history behind the job's present state."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    worker_id: Mapped[str] = mapped_column(String(100))
    device: Mapped[str] = mapped_column(String(10))
    started_at: Mapped[datetime] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    outcome: Mapped[str | None] = mapped_column(String(12))
    """succeeded, retryable, fatal, canceled, released (given back uncounted) or lost; None while it runs."""
    error_code: Mapped[str | None] = mapped_column(String(40))
    error_detail: Mapped[str | None] = mapped_column(Text)
    timings: Mapped[dict[str, float] | None] = mapped_column(JSON)
    trace: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    """When each phase began, how long each band took, how memory went: `worker.trace` writes it, in bounded size."""


class Shard(Row):
    """Some neighbouring bands of a large picture, which one worker makes by itself; there only while its job lives.

    It has no column for its state: it is made when `finished_at` is set, somebody works on it while `lease_until` is
    to come, and anybody may take it otherwise.
    """

    __tablename__ = "shards"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    """0 is at the top of the picture."""
    bands: Mapped[list[list[list[int]]]] = mapped_column(JSON)
    """What is to be computed, to the px: of each band its tiles, of each tile what it keeps and what it reads."""
    number: Mapped[int] = mapped_column(default=0)
    """Number of the newest try: the fence, as `Job.attempt` is."""
    tries_used: Mapped[int] = mapped_column(default=0)
    """Tries that count, those in which a worker was lost or failed."""
    worker_id: Mapped[str | None] = mapped_column(String(100))
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    published_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    tiles_done: Mapped[int] = mapped_column(default=0)
    tiles_total: Mapped[int]
    bands_done: Mapped[int] = mapped_column(default=0)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    key: Mapped[str | None] = mapped_column(String(200))
    bytes: Mapped[int | None] = mapped_column(BigInteger)
    facts: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    """What the joiner has to know of the stored part, and what was measured while it was made."""
    error_code: Mapped[str | None] = mapped_column(String(40))
    """Of a helper's try that failed: the attempt at the job itself then tries, and its error is the job's."""


class Rendition(Row):
    """A job's stored result in another form, made when somebody asks: another format, or a pyramid of tiles.

    It has no column for its state: it is made when `key` is set, has failed when `error_code` is, and is owed while
    neither is.
    """

    __tablename__ = "renditions"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(10), primary_key=True)
    """A format's name, or `zoom`."""
    asked_at: Mapped[datetime] = mapped_column(UtcDateTime)
    published_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    number: Mapped[int] = mapped_column(default=0)
    """Number of the newest try: the fence, as `Job.attempt` is."""
    tries_used: Mapped[int] = mapped_column(default=0)
    """Tries that count; asking again after a failure starts again at 0."""
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)
    key: Mapped[str | None] = mapped_column(String(200))
    bytes: Mapped[int | None] = mapped_column(BigInteger)
    error_code: Mapped[str | None] = mapped_column(String(40))
    error_detail: Mapped[str | None] = mapped_column(Text)


class Batch(Row):
    """Many jobs handed in together."""

    __tablename__ = "batches"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner_key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    total: Mapped[int]
    remaining: Mapped[int]
    """Jobs not ended yet. Counted down in the transaction that ends one, so exactly one of them sees 0."""
    webhook_url: Mapped[str | None] = mapped_column(Text)


class Endpoint(Row):
    """A standing webhook address. Its secret is derived (`deliveries.signing_secret`), never stored."""

    __tablename__ = "endpoints"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner_key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), index=True)
    url: Mapped[str] = mapped_column(Text)
    events: Mapped[list[str]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    disabled_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    disabled_reason: Mapped[str | None] = mapped_column(Text)


class Delivery(Row):
    """One event owed to one address."""

    __tablename__ = "deliveries"
    __table_args__ = (Index("ix_deliveries_state_due_at", "state", "due_at"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    """The `webhook-id` header: the same over all tries."""
    owner_key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), index=True)
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"), index=True)
    batch_id: Mapped[str | None] = mapped_column(ForeignKey("batches.id", ondelete="SET NULL"))
    endpoint_id: Mapped[str | None] = mapped_column(ForeignKey("endpoints.id", ondelete="SET NULL"))
    url: Mapped[str] = mapped_column(Text)
    secret_id: Mapped[str] = mapped_column(String(40))
    """Whose secret signs it: the endpoint's id, or the key's for a job's own address."""
    type: Mapped[str] = mapped_column(String(40))
    payload: Mapped[dict[str, Any]] = mapped_column(JSON)
    """The body, as things stood when the event happened."""
    state: Mapped[DeliveryState] = mapped_column(String(12))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    due_at: Mapped[datetime] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    number: Mapped[int] = mapped_column(default=0)
    """Number of the newest try: the fence, as `Job.attempt` is."""
    tries_used: Mapped[int] = mapped_column(default=0)
    """Tries that count against the schedule; a resend by hand starts again at 0."""
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    published_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When its message was last sent; the relay sends another where nothing came of it."""
    tries: Mapped[list[dict[str, Any]]] = mapped_column(JSON, default=list)
    """The log: one entry a try, oldest first: at, status, error, seconds."""


class Upload(Row):
    """A presigned address handed out, until a job takes what was put there."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner_key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    blob_key: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class IdempotencyRecord(Row):
    """The first answer to an Idempotency-Key, or the fact that it is being worked out."""

    __tablename__ = "idempotency_records"
    __table_args__ = (UniqueConstraint("owner_key_id", "key"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner_key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    key: Mapped[str] = mapped_column(String(255))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    request_sha256: Mapped[str | None] = mapped_column(String(64))
    """Hash of what was asked; None while the first request is in flight."""
    status: Mapped[int | None]
    body: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    location: Mapped[str | None] = mapped_column(Text)


class BlobRemoval(Row):
    """Blobs to delete: written in the transaction that lets go of them, carried out by the chores worker."""

    __tablename__ = "blob_removals"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    prefix: Mapped[str] = mapped_column(String(200))
    due_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class Worker(Row):
    """A worker process as it last spoke. Who is alive decides where `auto` jobs go."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(100), primary_key=True)
    kind: Mapped[str] = mapped_column(String(12))
    """images, chores, relay or api."""
    host: Mapped[str] = mapped_column(String(100))
    pid: Mapped[int]
    device: Mapped[str | None] = mapped_column(String(10))
    """cpu or gpu, of image workers."""
    device_name: Mapped[str | None] = mapped_column(String(200))
    queues: Mapped[list[str]] = mapped_column(JSON)
    models_loaded: Mapped[list[str]] = mapped_column(JSON)
    current_job_id: Mapped[str | None] = mapped_column(String(40))
    started_at: Mapped[datetime] = mapped_column(UtcDateTime)
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    stopped_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    drained_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """Since when an operator wants it to take no more jobs; what it runs it finishes."""
    usage: Mapped[dict[str, float] | None] = mapped_column(JSON)
    """As it last beat: `cpu_share` (1.0 is one core), `memory_bytes`, `gpu_share`, `vram_bytes`, `vram_total_bytes`."""
    models: Mapped[list[str] | None] = mapped_column(JSON)
    """Of an image worker: every model that it can run. None where it has not said: whatever is asked for."""
    speeds: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    """Of an image worker, for each network it holds: the `runtime` that was measured to be the fastest on its host, and
    the input px that it does a second (`pixels_per_second`)."""
    tallies: Mapped[list[Any] | None] = mapped_column(JSON)
    """What it has counted (`telemetry.Samples`), as of `seen_at`."""


class QueuePause(Row):
    """An image queue from which nothing is claimed until an operator resumes it: one row while it is paused."""

    __tablename__ = "queue_pauses"

    queue: Mapped[str] = mapped_column(String(40), primary_key=True)
    paused_at: Mapped[datetime] = mapped_column(UtcDateTime)


class HourOfJobs(Row):
    """What ended within one hour that is over: `shared.figures` keeps it, so that no chart reads a week of jobs."""

    __tablename__ = "hours_of_jobs"

    start: Mapped[datetime] = mapped_column(UtcDateTime, primary_key=True)
    ended: Mapped[dict[str, int]] = mapped_column(JSON)
    """Jobs by final state."""
    output_px: Mapped[int] = mapped_column(BigInteger)
    waits: Mapped[dict[str, int]] = mapped_column(JSON)
    """Waits before the first start: jobs by bucket of their seconds. `runs` likewise, of jobs that succeeded."""
    runs: Mapped[dict[str, int]] = mapped_column(JSON)


class AuditEntry(Row):
    """Something an operator did."""

    __tablename__ = "audit_entries"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    key_id: Mapped[str | None] = mapped_column(String(40))
    """Whose session did it; None where it was a command on the service's own machine."""
    key_name: Mapped[str] = mapped_column(String(100))
    """As the key was called then."""
    action: Mapped[str] = mapped_column(String(40))
    """Noun and verb: `job.cancel`, `queue.pause`, `key.create`."""
    subject: Mapped[str] = mapped_column(Text)
    """What it was done to: an id, a queue's name, or in words how many."""
    detail: Mapped[dict[str, Any]] = mapped_column(JSON)


class WorkerModel(Row):
    """A model of one's own that a worker has, as it found the file when it started. Goes with the worker's row."""

    __tablename__ = "worker_models"

    worker_id: Mapped[str] = mapped_column(ForeignKey("workers.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), primary_key=True, index=True)
    sha256: Mapped[str] = mapped_column(String(64))
    """Of the file: hosts may have different ones of the same name."""
    card: Mapped[dict[str, Any]] = mapped_column(JSON)


class OwnModel(Row):
    """A model of one's own as workers up to revision 0008 write it down: while such are alive, and for no longer."""

    __tablename__ = "own_models"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    card: Mapped[dict[str, Any]] = mapped_column(JSON)
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime)
