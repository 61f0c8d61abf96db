"""Where the thumbnails of a job lie: what the worker writes and the API reads. They go with the job's other blobs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from shared.errors import BlobMissing
from shared.models import Job, JobState
from shared.storage import BlobFacts, Storage

Side = Literal["input", "result"]
SIDES: tuple[Side, ...] = ("input", "result")
MIME_TYPE = "image/webp"
LONGEST_SIDE_PX = 256


def key(blob_prefix: str, side: Side, attempt: int) -> str:
    """The input looks the same to every attempt; a result's thumbnail names its attempt, as the result does."""
    return (
        f"{blob_prefix}/thumbnail-input.webp" if side == "input" else f"{blob_prefix}/thumbnail-result-{attempt}.webp"
    )


def expected(job: Job) -> tuple[Side, ...]:
    """The thumbnails that are likely to be there: none before a worker has begun, nor after the pictures were swept."""
    if job.swept_at is not None or job.attempt == 0:
        return ()
    return SIDES if job.state == JobState.SUCCEEDED else ("input",)


def stream(storage: Storage, job: Job, side: Side) -> tuple[BlobFacts, Iterator[bytes]] | None:
    """The thumbnail's facts and bytes; None where there is none (yet, or any more). Raises StorageUnavailable."""
    try:
        return storage.stream(key(job.blob_prefix, side, job.attempt))
    except BlobMissing:
        return None
