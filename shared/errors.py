"""Every error Enlarger raises on purpose, in one tree.

    EnlargerError
    ├── UploadRejected              the picture handed in cannot be taken
    │   ├── InvalidImage            invalid-image
    │   ├── UnsupportedFormat       unsupported-format
    │   ├── BodyTooLarge            input-too-large   (bytes)
    │   ├── TooManyPixels           input-too-large   (pixels)
    │   ├── OutputTooLarge          output-too-large
    │   ├── FormatCannotHoldSize    format-cannot-hold-size
    │   ├── FormatCannotHoldDetail  format-cannot-hold-size   (known at the end)
    │   ├── BlockedUrl              blocked-url
    │   └── FetchFailed             fetch-failed
    ├── RequestRefused              the request cannot be carried out
    │   ├── InvalidRequest          invalid-request
    │   ├── Unauthorized            unauthorized
    │   ├── Forbidden               forbidden
    │   ├── NotFound                not-found
    │   ├── Gone                    gone
    │   ├── JobNotCancelable        job-not-cancelable
    │   ├── JobNotRetryable         job-not-retryable
    │   ├── JobNotFinished          job-not-finished
    │   ├── JobHasNoResult          job-has-no-result
    │   ├── RenditionNotMade        rendition-not-made
    │   ├── IdempotencyMismatch     idempotency-mismatch
    │   ├── IdempotencyInProgress   idempotency-in-progress
    │   ├── QueueFull               queue-full
    │   └── RateLimited             rate-limited
    ├── AttemptError                an attempt went wrong
    │   ├── ModelUnavailable        model-unavailable
    │   ├── DeadlineExceeded        deadline-exceeded
    │   ├── OutOfMemory             out-of-memory
    │   ├── BadOutput               bad-output
    │   ├── WorkerLost              worker-lost
    │   └── InternalError           internal
    │       └── DeviceBroken        internal          (the process must end)
    ├── StaleAttempt                another attempt owns the job now: stop quietly
    ├── StartFailed                 start-failed: a server or process of the embedded stack did not start
    └── Unavailable                 a server we depend on does not answer
        ├── StorageUnavailable      storage-unavailable
        │   └── BlobMissing         blob-missing (never retryable)
        ├── BrokerUnavailable       broker-unavailable
        ├── DatabaseUnavailable     database-unavailable
        ├── DiskFull                disk-full
        └── TooManyStreams          too-many-streams

Each class has a stable `code` (the contract's), says whether trying the same again can help (`retryable`), and
carries facts as keyword arguments (`limit_px`, `width_px`, ...) that become members of the problem+json body.
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar


class EnlargerError(Exception):
    """Root of the tree. `detail` is one sentence for a person; `facts` are JSON values for a program."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str, **facts: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.facts = facts


class UploadRejected(EnlargerError):
    """The picture handed in cannot be taken; the same bytes will be refused again."""

    code = "invalid-image"


class InvalidImage(UploadRejected):
    code = "invalid-image"


class UnsupportedFormat(UploadRejected):
    code = "unsupported-format"


class BodyTooLarge(UploadRejected):
    code = "input-too-large"


class TooManyPixels(UploadRejected):
    code = "input-too-large"

    def __init__(self, width_px: int, height_px: int, limit_px: int) -> None:
        super().__init__(
            f"The picture is {width_px} x {height_px} px; at most {limit_px:,} px in all are taken.",
            width_px=width_px,
            height_px=height_px,
            limit_px=limit_px,
        )


class OutputTooLarge(UploadRejected):
    code = "output-too-large"

    def __init__(self, width_px: int, height_px: int, limit_px: int) -> None:
        super().__init__(
            f"The result would be {width_px} x {height_px} px; at most {limit_px:,} px in all are made. "
            "Ask for a smaller scale.",
            width_px=width_px,
            height_px=height_px,
            limit_px=limit_px,
        )


class FormatCannotHoldSize(UploadRejected):
    code = "format-cannot-hold-size"

    def __init__(self, format: str, width_px: int, height_px: int, limit_px: int) -> None:
        super().__init__(
            f"{format.upper()} holds at most {limit_px:,} px a side; the result would be {width_px} x {height_px} px. "
            "Ask for png or tiff, or a smaller scale.",
            format=format,
            width_px=width_px,
            height_px=height_px,
            limit_px=limit_px,
        )


class FormatCannotHoldDetail(UploadRejected):
    """The size alone would do. Lossy WebP has a fixed room for how its blocks are predicted, and whether that does is
    known when the picture is encoded."""

    code = "format-cannot-hold-size"

    def __init__(self, format: str, width_px: int, height_px: int) -> None:
        super().__init__(
            f"{format.upper()} cannot hold that much detail in {width_px} x {height_px} px. "
            "Ask for png, tiff or jpeg, or a smaller scale.",
            format=format,
            width_px=width_px,
            height_px=height_px,
        )


class BlockedUrl(UploadRejected):
    """The URL leads to an address Enlarger does not connect to (private, loopback, link-local, ...)."""

    code = "blocked-url"


class FetchFailed(UploadRejected):
    code = "fetch-failed"
    retryable = True


class RequestRefused(EnlargerError):
    """The request is understood and cannot be carried out."""

    code = "invalid-request"


class InvalidRequest(RequestRefused):
    code = "invalid-request"


class Unauthorized(RequestRefused):
    code = "unauthorized"


class Forbidden(RequestRefused):
    code = "forbidden"


class NotFound(RequestRefused):
    code = "not-found"


class Gone(RequestRefused):
    """It was there and has been swept."""

    code = "gone"


class JobNotCancelable(RequestRefused):
    code = "job-not-cancelable"


class JobNotRetryable(RequestRefused):
    code = "job-not-retryable"


class JobNotFinished(RequestRefused):
    code = "job-not-finished"
    retryable = True


class JobHasNoResult(RequestRefused):
    """The job has ended without a picture (failed, canceled or expired)."""

    code = "job-has-no-result"


class RenditionNotMade(RequestRefused):
    """It is owed and has not been made yet, or could not be."""

    code = "rendition-not-made"
    retryable = True


class IdempotencyMismatch(RequestRefused):
    code = "idempotency-mismatch"


class IdempotencyInProgress(RequestRefused):
    code = "idempotency-in-progress"
    retryable = True


class QueueFull(RequestRefused):
    code = "queue-full"
    retryable = True


class RateLimited(RequestRefused):
    code = "rate-limited"
    retryable = True


class AttemptError(EnlargerError):
    """An attempt at a job went wrong. `retryable` decides between another attempt and FAILED."""

    code = "internal"


class ModelUnavailable(AttemptError):
    code = "model-unavailable"


class DeadlineExceeded(AttemptError):
    code = "deadline-exceeded"


class OutOfMemory(AttemptError):
    """The smallest tile does not fit this device; another device may hold it."""

    code = "out-of-memory"
    retryable = True


class BadOutput(AttemptError):
    """The network answered NaN, infinity or a flat picture, also after a rerun in float32."""

    code = "bad-output"
    retryable = True


class WorkerLost(AttemptError):
    """The lease passed without progress: the worker died, hung or was cut off."""

    code = "worker-lost"
    retryable = True


class InternalError(AttemptError):
    """Something we did not foresee. The log has the traceback, the customer has the job id."""

    code = "internal"
    retryable = True


class DeviceBroken(InternalError):
    """The GPU failed other than by running out of memory, and every later call in this process will fail too.

    The process records the attempt and ends; its successor starts on a clean device. Of attempts side by side the fact
    `only_waited` tells those that had given the device nothing to do at that moment.
    """


class StaleAttempt(EnlargerError):
    """A write named an attempt that no longer owns the job. Nothing was changed; the worker stops quietly."""

    code = "stale-attempt"


class StartFailed(EnlargerError):
    """A server or process of the embedded stack is not installed, or did not start."""

    code = "start-failed"


class Unavailable(EnlargerError):
    """A server Enlarger depends on does not answer. `retry_after_seconds` is a fact where it is known."""

    code = "unavailable"
    retryable = True


class StorageUnavailable(Unavailable):
    code = "storage-unavailable"


class BlobMissing(StorageUnavailable):
    """Object storage answered: there is nothing under this key."""

    code = "blob-missing"
    retryable = False


class BrokerUnavailable(Unavailable):
    code = "broker-unavailable"


class DatabaseUnavailable(Unavailable):
    code = "database-unavailable"


class DiskFull(Unavailable):
    """This host has no room for a file; another host may have."""

    code = "disk-full"
    ERRNOS: ClassVar[frozenset[int]] = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
    """What the system calls it: a full file system, a used up quota, a limit on the size of files."""

    def __init__(self) -> None:
        super().__init__("The disk of this host has no room left.", retry_after_seconds=10)


class TooManyStreams(Unavailable):
    """Every thread that may be held by an event stream is; the others are kept for short requests."""

    code = "too-many-streams"
