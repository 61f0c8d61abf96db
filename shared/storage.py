"""Object storage through S3 (boto3), embedded or real. Vendor errors are translated here and nowhere else.

Keys: `jobs/<id>/<128 random bits>/input`, `.../result-<attempt>.<ext>`, and `uploads/<id>/<128 random bits>`.
The attempt in a result's key keeps a late worker from overwriting the winner's; so does the try in those of the parts
of a shared job, `.../parts/<shard>-<try>` (`shared.shards`). What is made for looking lies beside
them: thumbnails (`shared.thumbnails`), `.../preview-<attempt>/*` (`shared.previews`), `.../rendition-<n>.<ext>` and
`.../zoom-<n>.zip` (`shared.renditions`).
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote, urlsplit

from shared.errors import BlobMissing, DiskFull, StorageUnavailable
from shared.settings import Settings
from shared.telemetry import tallies

if TYPE_CHECKING:
    import boto3
    from boto3.s3.transfer import TransferConfig
    from urllib3 import PoolManager

# Below this one PUT; above, a multipart upload whose parts go up while the next is read.
MULTIPART_BYTES = 16 * 1024 * 1024
# Up to this a blob is read whole and sent at once: most of the pictures that are handed in, and many results.
ONE_GULP_BYTES = 8 * 1024 * 1024
LEAST_PART_BYTES = 5 * 1024 * 1024
"""S3 takes no smaller part of a multipart upload, but for the last."""
STREAM_CHUNK_BYTES = 256 * 1024
POOLED_CONNECTIONS = 50
_QUICK_LINK_SECONDS = 60
_MAKING = threading.Lock()
"""Held while a client is made: boto3's sessions are not for two threads at once, and its clients are."""
_THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "::1"})
_MISSING_CODES = frozenset({"404", "NoSuchKey", "NotFound"})


@dataclass(frozen=True)
class BlobFacts:
    bytes: int
    content_type: str
    etag: str


class Storage:
    """One bucket. Thread-safe; make one per process, after a fork another.

    Every method raises StorageUnavailable where storage does not answer or refuses, BlobMissing where there is no
    such key.
    """

    def __init__(self, settings: Settings, *, silence_seconds: float | None = None, tries: int = 3) -> None:
        """`silence_seconds` (None: the setting) ends a try, and `tries` are made: how long a caller can be held."""
        self.bucket = settings.storage_bucket
        self._settings, self._tries = settings, tries
        self._silence_seconds = silence_seconds or settings.storage_timeout_seconds
        self._connect_seconds = min(3.0, self._silence_seconds)

    def warm_up(self) -> None:
        """Loads what the first request would, a third of a second's work; connects to nothing."""
        _ = self._client, self._signer, self._quick, self._transfer

    @cached_property
    def _client(self) -> Any:
        client = self._made(self._settings.storage_endpoint_url)
        events = client.meta.events
        events.register("before-call.s3", _request_begins)
        events.register("after-call.s3", _request_ends)
        return client

    @cached_property
    def _signer(self) -> Any:
        """Signatures cover the host, so links are signed by a client that believes in the address clients use."""
        settings = self._settings
        public_url = settings.storage_public_url or settings.storage_endpoint_url
        return self._client if public_url == settings.storage_endpoint_url else self._made(public_url)

    def _made(self, endpoint_url: str) -> Any:
        # Not at the top, here and below: a process that starts need not wait for it.
        from botocore.config import Config

        settings = self._settings
        config = Config(
            connect_timeout=self._connect_seconds,
            read_timeout=self._silence_seconds,
            retries={"mode": "standard", "total_max_attempts": self._tries},
            max_pool_connections=POOLED_CONNECTIONS,
            # boto3's own is put together anew for each request, which takes longer than to sign it.
            user_agent="enlarger",
            signature_version="s3v4",
            # Path style: an embedded or self-hosted server has no wildcard DNS for its buckets.
            s3={"addressing_style": "path"} if settings.storage_endpoint_url else {},
            # Other servers than AWS do not all know the newer trailing checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # A proxy for the world outside knows nothing of this machine; None is what the environment says.
            proxies={} if self._is_here else None,
        )
        with _MAKING:
            return _sdk().client(
                "s3",
                aws_access_key_id=settings.storage_access_key or None,
                aws_secret_access_key=settings.storage_secret_key or None,
                region_name=settings.storage_region,
                config=config,
                endpoint_url=endpoint_url or None,
            )

    @property
    def _is_here(self) -> bool:
        return urlsplit(self._settings.storage_endpoint_url).hostname in _THIS_MACHINE

    @cached_property
    def _quick(self) -> PoolManager | None:
        """For a plain server close by; certificates and proxies are boto3's affair."""
        from botocore.utils import get_environ_proxies
        from urllib3 import PoolManager, Timeout

        url = self._settings.storage_endpoint_url
        if not url.startswith("http://") or (not self._is_here and get_environ_proxies(url)):
            return None
        timeout = Timeout(connect=self._connect_seconds, read=self._silence_seconds)
        return PoolManager(maxsize=POOLED_CONNECTIONS, timeout=timeout, retries=False)

    @cached_property
    def _transfer(self) -> TransferConfig:
        from boto3.s3.transfer import TransferConfig

        # By the thread that asks. boto3's own are new ones for each blob, and what they read into stayed with the
        # allocator: a hundred MB in the course of a shared picture, whose parts go to storage one after the other.
        return TransferConfig(
            multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES, use_threads=False
        )

    def ensure_bucket(self) -> None:
        """Makes the bucket where it is missing."""
        from botocore.exceptions import ClientError

        with _translated():
            try:
                self._client.head_bucket(Bucket=self.bucket)
            except ClientError as error:
                if error.response["Error"]["Code"] not in {*_MISSING_CODES, "NoSuchBucket"}:
                    raise
                self._client.create_bucket(Bucket=self.bucket)

    def ping(self) -> None:
        """One request that reads the bucket."""
        with _translated():
            self._client.head_bucket(Bucket=self.bucket)

    def put(
        self, key: str, file: BinaryIO, content_type: str, *, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        """Stores what `file` holds from where it stands, and leaves it open.

        `on_bytes` hears of what was sent: of a small blob at its end, of a large one as it goes.
        """
        with _translated(key):
            began = file.tell()
            file.seek(0, os.SEEK_END)
            size = file.tell() - began
            file.seek(began)
            if size <= ONE_GULP_BYTES:
                # Handing it to boto3's transfers costs more than the request itself.
                whole = file.read()
                if not self._put_quickly(key, whole, content_type):
                    self._client.put_object(Bucket=self.bucket, Key=key, Body=whole, ContentType=content_type)
                if on_bytes is not None:
                    on_bytes(size)
                return
            self._client.upload_fileobj(
                _LeftOpen(file),
                self.bucket,
                key,
                ExtraArgs={"ContentType": content_type},
                Callback=on_bytes,
                Config=self._transfer,
            )

    def _put_quickly(self, key: str, body: bytes, content_type: str) -> bool:
        """One PUT to a presigned address, for half of the processor time that boto3's way takes. Whether it was stored;
        what went wrong is boto3's to try again and to name."""
        from urllib3.exceptions import HTTPError

        if self._quick is None:
            return False
        began_at = time.perf_counter()
        address = self._quick_link("put_object", Key=key, ContentType=content_type)
        try:
            answer = self._quick.request("PUT", address, body=body, headers={"Content-Type": content_type})
        except HTTPError:
            return False
        tallies.observe("enlarger_storage_seconds", time.perf_counter() - began_at, operation="PutObject")
        return answer.status == 200

    def _got_quickly(self, key: str) -> bytes | None:
        """A small blob, by one GET from a presigned address. None where it is larger, or anything went wrong: boto3's
        to fetch, to try again and to name."""
        from urllib3.exceptions import HTTPError

        if self._quick is None:
            return None
        began_at = time.perf_counter()
        headers = {"Range": f"bytes=0-{ONE_GULP_BYTES - 1}"}
        try:
            answer = self._quick.request(
                "GET", self._quick_link("get_object", Key=key), headers=headers, preload_content=False
            )
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if answer.status != 206 or not total.isdigit() or int(total) > ONE_GULP_BYTES:
                # Nothing of it is read: the connection goes with it.
                answer.close()
                return None
            body = answer.read()
            answer.release_conn()
        except HTTPError:
            return None
        tallies.observe("enlarger_storage_seconds", time.perf_counter() - began_at, operation="GetObject")
        return body if len(body) == int(total) else None

    def _quick_link(self, method: str, **blob: str) -> str:
        params = {"Bucket": self.bucket, **blob}
        address: str = self._client.generate_presigned_url(method, Params=params, ExpiresIn=_QUICK_LINK_SECONDS)
        return address

    def begin(self, key: str, content_type: str) -> Upload:
        """A blob that is sent in parts while it is still being made. Nobody sees it before `Upload.complete`."""
        with _translated(key):
            answer = self._client.create_multipart_upload(Bucket=self.bucket, Key=key, ContentType=content_type)
        return Upload(self._client, self.bucket, key, answer["UploadId"])

    def get(self, key: str, file: BinaryIO) -> None:
        """Writes the blob to `file`."""
        with _translated(key):
            # boto3's way asks for the size first.
            small = self._got_quickly(key)
            if small is not None:
                file.write(small)
                return
            self._client.download_fileobj(self.bucket, key, file, Config=self._transfer)

    def stream(self, key: str) -> tuple[BlobFacts, Iterator[bytes]]:
        """The blob's facts and its bytes in chunks of at most 256 KiB."""
        with _translated(key):
            answer = self._client.get_object(Bucket=self.bucket, Key=key)
        facts = BlobFacts(answer["ContentLength"], answer["ContentType"], answer["ETag"])

        def chunks() -> Iterator[bytes]:
            with _translated(key):
                yield from answer["Body"].iter_chunks(STREAM_CHUNK_BYTES)

        return facts, chunks()

    def copy(self, key: str, new_key: str) -> None:
        """Stores the same bytes once more, within storage."""
        with _translated(key):
            self._client.copy({"Bucket": self.bucket, "Key": key}, self.bucket, new_key, Config=self._transfer)

    def part(self, key: str, start: int, length: int) -> bytes:
        """At most `length` bytes of the blob from `start` on; `length` is at least 1."""
        with _translated(key):
            answer = self._client.get_object(Bucket=self.bucket, Key=key, Range=f"bytes={start}-{start + length - 1}")
            body: bytes = answer["Body"].read()
        return body

    def facts(self, key: str) -> BlobFacts:
        with _translated(key):
            answer = self._client.head_object(Bucket=self.bucket, Key=key)
        return BlobFacts(answer["ContentLength"], answer.get("ContentType", ""), answer["ETag"])

    def join(
        self,
        key: str,
        pieces: Iterable[bytes | str],
        content_type: str,
        *,
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> tuple[int, str]:
        """Stores one blob made of `pieces`, each given as bytes or as the key of a blob. Returns its size and SHA-256.
        `pieces` may be an iterator that waits for the next.

        Large blobs are copied within storage; all are read, for the hash. `on_bytes` hears of each chunk read.
        """
        digest, size = hashlib.sha256(), 0
        held = bytearray()
        upload = self.begin(key, content_type)
        try:
            for piece in pieces:
                if isinstance(piece, bytes):
                    digest.update(piece)
                    size += len(piece)
                    held += piece
                    continue
                facts, chunks = self.stream(piece)
                # What is held must become a part before another can be copied: it takes the blob's beginning along.
                lead = max(0, LEAST_PART_BYTES - len(held)) if held else 0
                is_copied = facts.bytes - lead >= LEAST_PART_BYTES
                read = 0
                for chunk in chunks:
                    digest.update(chunk)
                    on_bytes(len(chunk))
                    held += chunk[: max(0, lead - read)] if is_copied else chunk
                    read += len(chunk)
                    if not is_copied and len(held) >= MULTIPART_BYTES:
                        upload.send(held)
                        held.clear()
                size += read
                if is_copied:
                    if held:
                        upload.send(held)
                        held.clear()
                    upload.copy(piece, lead, read - lead)
            if held or not size:
                upload.send(held)
            upload.complete()
        except BaseException:
            with suppress(StorageUnavailable):
                upload.abort()
            raise
        return size, digest.hexdigest()

    def remove(self, prefix: str) -> int:
        """Deletes every blob whose key begins with `prefix`. Returns how many there were; none is no error."""
        removed = 0
        with _translated(prefix):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
                # One by one: not every server answers DeleteObjects, and a job has a handful of blobs.
                for entry in page.get("Contents", ()):
                    self._client.delete_object(Bucket=self.bucket, Key=entry["Key"])
                    removed += 1
        return removed

    def keys(self, prefix: str = "") -> list[str]:
        """Every key that begins with `prefix`, in order."""
        with _translated(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def page(self, prefix: str, *, after: str, limit: int) -> list[str]:
        """The first `limit` keys that begin with `prefix` and come behind `after`, in order. One request."""
        with _translated(prefix):
            found = self._client.list_objects_v2(
                Bucket=self.bucket, Prefix=prefix, StartAfter=after, MaxKeys=min(limit, 1000)
            )
        return [entry["Key"] for entry in found.get("Contents", ())]

    def abort_uploads(self, *, begun_before: datetime) -> int:
        """Throws away the parts of multipart uploads that were never completed: their sender was killed. How many."""
        aborted = 0
        with _translated():
            found = self._client.list_multipart_uploads(Bucket=self.bucket)
            for upload in found.get("Uploads", ()):
                if upload["Initiated"] < begun_before:
                    self._client.abort_multipart_upload(
                        Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )
                    aborted += 1
        return aborted

    def link(self, key: str, *, file_name: str, content_type: str, inline: bool = False) -> str:
        """A presigned GET address, good for `presigned_link_seconds`. No request is made."""
        disposition = "inline" if inline else "attachment"
        return str(
            self._signer.generate_presigned_url(
                "get_object",
                Params={
                    "Bucket": self.bucket,
                    "Key": key,
                    "ResponseContentDisposition": content_disposition(disposition, file_name),
                    "ResponseContentType": content_type,
                },
                ExpiresIn=self._settings.presigned_link_seconds,
            )
        )

    def upload_link(self, key: str, *, seconds: int) -> str:
        """A presigned PUT address, good for `seconds`. It has no size cap: check what was put before using it."""
        return str(
            self._signer.generate_presigned_url(
                "put_object", Params={"Bucket": self.bucket, "Key": key}, ExpiresIn=seconds
            )
        )

    def close(self) -> None:
        for name in ("_client", "_signer"):
            if name in self.__dict__:
                getattr(self, name).close()
        if (quick := self.__dict__.get("_quick")) is not None:
            quick.clear()


class Upload:
    """A multipart upload under way. One thread at a time; every method raises StorageUnavailable.

    One that is neither completed nor aborted leaves its parts behind, which `Storage.abort_uploads` finds.
    """

    def __init__(self, client: Any, bucket: str, key: str, upload_id: str) -> None:
        self._client = client
        self._where = {"Bucket": bucket, "Key": key, "UploadId": upload_id}
        self._etags: list[str] = []

    def send(self, part: bytes | bytearray) -> None:
        """The next part: LEAST_PART_BYTES or more, unless it is the last."""
        with _translated(self._where["Key"]):
            answer = self._client.upload_part(**self._where, PartNumber=len(self._etags) + 1, Body=part)
        self._etags.append(answer["ETag"])

    def copy(self, source_key: str, start: int, length: int) -> None:
        """The next part: these bytes of another blob, copied within storage; LEAST_PART_BYTES or more, unless last."""
        with _translated(source_key):
            answer = self._client.upload_part_copy(
                **self._where,
                PartNumber=len(self._etags) + 1,
                CopySource={"Bucket": self._where["Bucket"], "Key": source_key},
                CopySourceRange=f"bytes={start}-{start + length - 1}",
            )
        self._etags.append(answer["CopyPartResult"]["ETag"])

    def complete(self) -> None:
        """The parts become the blob, at once and whole."""
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(self._etags, 1)]
        with _translated(self._where["Key"]):
            self._client.complete_multipart_upload(**self._where, MultipartUpload={"Parts": parts})

    def abort(self) -> None:
        """The parts go."""
        with _translated(self._where["Key"]):
            self._client.abort_multipart_upload(**self._where)


class _LeftOpen:
    """A file that boto3 cannot close, as it does with what it has sent: the file is the caller's."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def close(self) -> None:
        """Does nothing."""


def content_disposition(disposition: str, file_name: str) -> str:
    """RFC 6266: an ASCII name for old clients and the true one, percent-encoded, for all others."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._- ") else "_" for c in file_name) or "picture"
    return f"{disposition}; filename=\"{plain}\"; filename*=UTF-8''{quote(file_name, safe='')}"


def load_sdk() -> None:
    """Loads boto3 and its description of S3, which all clients share from then on, those of forked processes too: a
    sixth of a second's work. Connects to nothing."""
    # Keys that are given are not looked for: a session would ask the cloud for them, and keep them for its forks.
    _sdk().client("s3", region_name="us-east-1", aws_access_key_id="none", aws_secret_access_key="none")


@cache
def _sdk() -> boto3.session.Session:
    """Each of boto3's sessions reads its descriptions of services anew, 0.1 s: one for all clients of the process."""
    import boto3

    return boto3.session.Session()


def _request_begins(context: dict[str, Any], **_: Any) -> None:
    context["enlarger_began_at"] = time.perf_counter()


def _request_ends(context: dict[str, Any], model: Any, **_: Any) -> None:
    tallies.observe(
        "enlarger_storage_seconds", time.perf_counter() - context["enlarger_began_at"], operation=str(model.name)
    )


@contextmanager
def _translated(key: str = "") -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from s3transfer.exceptions import RetriesExceededError

    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in _MISSING_CODES:
            raise BlobMissing("There is no such blob.", key=key) from error
        raise StorageUnavailable(f"Object storage refused: {code}.", retry_after_seconds=5) from error
    except (BotoCoreError, Boto3Error, RetriesExceededError, OSError) as error:
        # What is fetched is written to a file of this host.
        if isinstance(error, OSError) and error.errno in DiskFull.ERRNOS:
            raise DiskFull from error
        raise StorageUnavailable("Object storage does not answer.", retry_after_seconds=5) from error
