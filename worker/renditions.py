"""Makes one rendition: the stored result, read back, in another format or as a pyramid of tiles."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

from shared import renditions
from shared.db import Database, clock
from shared.errors import BlobMissing, EnlargerError, Gone, InternalError, StaleAttempt
from shared.models import Job
from shared.pictures import format_named
from shared.renditions import RenditionClaim
from shared.storage import Storage
from shared.telemetry import log
from worker.codec.convert import convert, write_pyramid
from worker.usage import available_bytes


def make(database: Database, storage: Storage, job_id: str, kind: str) -> None:
    """One try at an owed rendition; nothing where it is not owed. Raises DatabaseUnavailable and StaleAttempt; what
    else goes wrong is written down."""
    with database.transaction() as session:
        claim = renditions.claim(session, job_id, kind, now=clock(session))
        if claim is None:
            return
        job = session.get_one(Job, job_id)
    try:
        key, size_bytes = _make(storage, job, claim)
    except BlobMissing as error:
        _failed(database, claim, Gone("The result is not in storage any more."), error)
        return
    except EnlargerError as error:
        _failed(database, claim, error, error)
        return
    except MemoryError as error:
        _failed(database, claim, InternalError("The chores worker ran out of memory."), error)
        return
    try:
        with database.transaction() as session:
            renditions.made(session, claim, key=key, bytes=size_bytes, now=clock(session))
    except StaleAttempt:
        # The job has been deleted meanwhile, and the sweep of its blobs is over.
        storage.remove(key)
        raise
    log.info("rendition.made", job_id=job_id, kind=kind, bytes=size_bytes)


def _make(storage: Storage, job: Job, claim: RenditionClaim) -> tuple[str, int]:
    """The key under which it lies in storage, and its size."""
    assert job.result_key is not None
    is_zoom = claim.kind == renditions.ZOOM
    # Named as the folders of attempts are: an image worker that starts here sweeps those of dead processes.
    prefix = f"enlarger-{socket.gethostname()}-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix) as name:
        source, target = Path(name, "result"), Path(name, "zoom.zip" if is_zoom else "rendition")
        with source.open("wb") as file:
            storage.get(job.result_key, file)
        if is_zoom:
            size_bytes = write_pyramid(source, target, tile_px=renditions.TILE_PX)
            key, mime_type = f"{job.blob_prefix}/zoom-{claim.number}.zip", "application/zip"
        else:
            size_bytes = convert(
                source,
                target,
                claim.kind,
                quality=job.quality,
                lossless=job.lossless and format_named(claim.kind).lossless == "on request",
                background=job.background,
                available_bytes=available_bytes(),
            )
            format = format_named(claim.kind)
            key, mime_type = f"{job.blob_prefix}/rendition-{claim.number}{format.extension}", format.mime_type
        with target.open("rb") as file:
            storage.put(key, file, mime_type)
    return key, size_bytes


def _failed(database: Database, claim: RenditionClaim, error: EnlargerError, cause: BaseException) -> None:
    with database.transaction() as session:
        renditions.failed(session, claim, error, now=clock(session))
    log.warning("rendition.failed", job_id=claim.job_id, kind=claim.kind, code=error.code, exc_info=cause)
