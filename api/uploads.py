"""A body, a URL or a presigned upload -> a checked blob under the job's own key. Everything refused here costs no job.

The order is that of cost: bytes are counted as they come, the format is read from the first of them, the size from the
header, in a child (`shared.sandbox`), and pixels are never decoded for it. What is stored is what was hashed: a
presigned upload is copied to a key that nobody outside can write to.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from io import BufferedIOBase, BytesIO
from typing import IO, Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

import flask
from sqlalchemy import delete, select
from sqlalchemy.orm import Session
from werkzeug.datastructures import FileStorage
from werkzeug.formparser import FormDataParser

from api.context import Context
from shared import jobs, pictures, queries
from shared.db import new_id
from shared.errors import BlobMissing, BodyTooLarge, Gone, InvalidRequest, NotFound, StorageUnavailable
from shared.jobs import JobInput
from shared.models import Upload
from shared.telemetry import log
from shared.views import iso

# A picture up to this size is kept in memory on its way to storage.
SPOOL_BYTES = 4 * 1024 * 1024
LONGEST_NAME = 255
# A form up to this size is kept in memory while it is read.
FORM_IN_MEMORY_BYTES = 500 * 1024
_FORM_CHUNK_BYTES = 16 * 1024


class _InChunks:
    """A body that is read in smaller pieces than Werkzeug would. In the piece that holds the end of a part it looks at
    every byte by a pattern: with its 64 kB, for half of the time that a picture's form takes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def read(self, size: int) -> bytes:
        return self._stream.read(min(size, _FORM_CHUNK_BYTES))


class _Form(FormDataParser):
    def parse(self, stream: IO[bytes], mimetype: str, *more: Any, **named: Any) -> Any:
        if mimetype == "multipart/form-data":
            stream = cast(IO[bytes], _InChunks(stream))
        return super().parse(stream, mimetype, *more, **named)


class Request(flask.Request):
    """Flask's, with forms read as suits pictures of the usual size."""

    form_data_parser_class = _Form

    def _get_file_stream(
        self,
        total_content_length: int | None,
        content_type: str | None,
        filename: str | None = None,
        content_length: int | None = None,
    ) -> IO[bytes]:
        # Werkzeug's own goes to disk as soon as somebody asks for its descriptor, which the sandbox does.
        if total_content_length is not None and total_content_length <= FORM_IN_MEMORY_BYTES:
            return BytesIO()
        return super()._get_file_stream(total_content_length, content_type, filename, content_length)


@dataclass(frozen=True)
class Source:
    """Where a picture comes from: exactly one of the four is set."""

    body: FileStorage | None = None
    image_url: str | None = None
    upload_id: str | None = None
    input_of: str | None = None
    """A job of the caller's own."""


@dataclass(frozen=True)
class Aim:
    """What the picture is to become, as far as it decides whether the picture can be taken."""

    scale: int
    format: str
    """Concrete or `auto`."""
    lossless: bool


@dataclass(frozen=True)
class Stored:
    """A picture that was checked and lies in storage, owned by no row yet: submit it or `discard` it."""

    picture: JobInput
    facts: pictures.PictureFacts
    format: str
    """Of the result, concrete."""
    upload_id: str | None


def sha256_of(file: IO[bytes]) -> str:
    """Hash of all that a seekable file holds, in hexadecimal; it stands at its start afterwards."""
    file.seek(0)
    # Its type asks for `readinto`, which every file here has and IO[bytes] does not name.
    digest = hashlib.file_digest(cast(BufferedIOBase, file), "sha256").hexdigest()
    file.seek(0)
    return digest


def store(context: Context, owner_key_id: str, source: Source, aim: Aim, *, now: datetime) -> Stored:
    """Reads, checks, hashes and stores one picture under a fresh job's prefix.

    Raises an UploadRejected for a picture that cannot be taken, InvalidRequest for an upload nothing was put at,
    NotFound for another key's, Gone for a job's that has been swept, StorageUnavailable.
    """
    settings = context.settings
    with _read(context, owner_key_id, source, now=now) as (file, name):
        facts = pictures.inspect_in(context.sandbox, file, max_px=settings.max_input_px, owner=owner_key_id)
        width, height = pictures.check_size(
            facts,
            aim.scale,
            aim.format,
            max_input_px=settings.max_input_px,
            max_output_px=settings.max_output_px,
            lossless=aim.lossless,
        )
        format = pictures.output_format(aim.format, facts.format, width, height, lossless=aim.lossless)
        size = file.seek(0, 2)
        sha256 = sha256_of(file)
        job_id = jobs.new_job_id(now)
        prefix = jobs.blob_prefix(job_id)
        picture = JobInput(
            job_id=job_id,
            blob_prefix=prefix,
            key=f"{prefix}/input",
            width=facts.width,
            height=facts.height,
            format=facts.format,
            bytes=size,
            sha256=sha256,
            name=name,
        )
        context.storage.put(picture.key, file, pictures.format_named(facts.format).mime_type)
    return Stored(picture, facts, format, source.upload_id)


def take_upload(session: Session, stored: Stored, owner_key_id: str, *, now: datetime) -> None:
    """In the transaction that submits the job: the presigned upload is used up, its blob is owed to the sweep.

    Raises NotFound where another request has used it in the meantime.
    """
    if stored.upload_id is None:
        return
    taken = session.execute(
        delete(Upload)
        .where(Upload.id == stored.upload_id, Upload.owner_key_id == owner_key_id)
        .returning(Upload.blob_key)
    ).one_or_none()
    if taken is None:
        raise NotFound("There is no such upload, or another job has taken it.", upload_id=stored.upload_id)
    jobs.owe_blob_removal(session, taken.blob_key, now=now)


def discard(context: Context, stored: Stored) -> None:
    """Removes a stored picture that no job took. Best effort: what stays is named in the log."""
    try:
        context.storage.remove(stored.picture.blob_prefix)
    except StorageUnavailable:
        log.warning("upload.orphaned", prefix=stored.picture.blob_prefix)


def hand_out(session: Session, owner_key_id: str, *, now: datetime, expires_at: datetime) -> Upload:
    """Writes the row of a presigned upload; its blob's key carries 128 random bits."""
    upload_id = new_id("upl", now)
    upload = Upload(
        id=upload_id,
        owner_key_id=owner_key_id,
        blob_key=jobs.blob_prefix(upload_id).replace("jobs/", "uploads/", 1),
        created_at=now,
        expires_at=expires_at,
    )
    session.add(upload)
    return upload


@contextmanager
def _read(
    context: Context, owner_key_id: str, source: Source, *, now: datetime
) -> Iterator[tuple[BinaryIO, str | None]]:
    """The picture's bytes in a seekable file, at its start, no longer than the cap; and the name it was given."""
    limit_bytes = context.settings.max_upload_bytes
    if source.body is not None:
        file = cast(BinaryIO, source.body.stream)
        size = file.seek(0, 2)
        file.seek(0)
        if size > limit_bytes:
            raise _too_large(limit_bytes)
        yield file, _plain_name(source.body.filename)
        return
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spooled:
        if source.image_url is not None:
            context.outgoing.fetch(
                source.image_url,
                cast(BinaryIO, spooled),
                limit_bytes=limit_bytes,
                timeout_seconds=context.settings.fetch_timeout_seconds,
            )
            name = _plain_name(unquote(urlsplit(source.image_url).path))
        elif source.input_of is not None:
            name = _copy(context, owner_key_id, source.input_of, spooled)
        else:
            assert source.upload_id is not None
            download(context, owner_key_id, source.upload_id, spooled, limit_bytes, now=now)
            name = None
        spooled.seek(0)
        yield cast(BinaryIO, spooled), name


def download(
    context: Context, owner_key_id: str, upload_id: str, file: IO[bytes], limit_bytes: int, *, now: datetime
) -> None:
    """The bytes of a presigned upload. Its address takes any size and stays open: sizes are checked while reading."""
    with context.database.reading() as session:
        key = session.scalar(
            select(Upload.blob_key).where(
                Upload.id == upload_id, Upload.owner_key_id == owner_key_id, Upload.expires_at > now
            )
        )
    if key is None:
        raise NotFound("There is no such upload, or it has expired.", upload_id=upload_id)
    try:
        if context.storage.facts(key).bytes > limit_bytes:
            raise _too_large(limit_bytes)
        total = 0
        for chunk in context.storage.stream(key)[1]:
            total += len(chunk)
            if total > limit_bytes:
                raise _too_large(limit_bytes)
            file.write(chunk)
    except BlobMissing as error:
        raise InvalidRequest(
            "Nothing has been put at the upload's address yet.",
            errors=[{"field": "upload_id", "message": "PUT the picture first"}],
        ) from error


def _copy(context: Context, owner_key_id: str, job_id: str, file: IO[bytes]) -> str | None:
    """The picture of another job, which was checked when it came; and its name."""
    with context.database.reading() as session:
        job = queries.owned_job(session, job_id, owner_key_id)
    if job.swept_at is not None:
        raise Gone("That job's picture has been swept; hand the picture in again.", swept_at=iso(job.swept_at))
    for chunk in context.storage.stream(job.input_key)[1]:
        file.write(chunk)
    return job.input_name


def _plain_name(name: str | None) -> str | None:
    """A file name without folders and control characters, or None."""
    if not name:
        return None
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    kept = "".join(c for c in last if c.isprintable()).encode("utf-8", "ignore").decode()
    return kept[:LONGEST_NAME] or None


def _too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The picture's file is larger than {limit_bytes:,} bytes.", limit_bytes=limit_bytes)
