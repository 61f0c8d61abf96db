"""A typed client of the HTTP API: submit a picture, follow it, fetch what became of it.

    with Client("http://127.0.0.1:8000", "enl_...") as client:
        job = client.wait(client.submit(Path("small.png"), classify=True).id)
        client.fetch(job.id, Path("large.png"))

Knows only the wire contract. Calls that can be repeated without harm are repeated where the service is busy, restarting
or away, for as long as `patience_seconds`. Submitting is one of them: each submit carries an Idempotency-Key, so a
repeated one cannot make two jobs.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, TypedDict, Unpack
from urllib.parse import urlsplit

import httpx

from shared.errors import EnlargerError, InvalidRequest, Unavailable

DEFAULT_DATA_DIR = ".enlarger"
# How long one GET of `wait` stays open: shorter than what proxies between us and the service usually allow.
WAIT_AT_ONCE_SECONDS = 20
LONGEST_PAUSE_SECONDS = 30.0
_CHUNK_BYTES = 256 * 1024
_BUSY = frozenset({429, 502, 503, 504})

# (bytes done, bytes in all)
OnBytes = Callable[[int, int], None]


class JobOptions(TypedDict, total=False):
    """How a picture is to be enlarged; what is left out is as the contract says."""

    model: str
    scale: int
    classify: bool
    format: Literal["auto", "png", "jpeg", "webp", "tiff", "avif"]
    quality: int
    lossless: bool
    metadata: Literal["safe", "keep", "strip"]
    alpha: Literal["model", "lanczos", "flatten"]
    background: str
    device: Literal["auto", "gpu", "cpu"]
    priority: Literal["interactive", "bulk"]
    deadline_seconds: int
    ttl_seconds: int
    external_id: str
    webhook_url: str
    webhook_events: Sequence[str]


class Refused(EnlargerError):
    """The service answered with a problem (RFC 9457)."""

    code = "refused"

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        super().__init__(str(problem.get("detail") or problem.get("title") or f"The service answered {status}."))
        self.status = status
        self.problem_code = str(problem.get("code", ""))
        self.problem = problem


class Unreachable(Unavailable):
    """Nothing that speaks HTTP answers at the service's address."""

    code = "service-unreachable"


class Damaged(EnlargerError):
    """What was fetched is not what the service stored: its size or SHA-256 differs. Nothing was kept."""

    code = "damaged"
    retryable = True


class TookTooLong(EnlargerError):
    """The job had not finished when the caller's time was up. It goes on."""

    code = "took-too-long"
    retryable = True


@dataclass(frozen=True)
class Job:
    """A job as the service showed it last. `view` is the whole answer; fields may be added to it."""

    view: Mapping[str, Any]

    @property
    def id(self) -> str:
        return str(self.view["id"])

    @property
    def status(self) -> str:
        return str(self.view["status"])

    @property
    def is_finished(self) -> bool:
        """By `finished_at`, as the contract asks: a status we have never heard of may be either."""
        return self.view.get("finished_at") is not None

    @property
    def succeeded(self) -> bool:
        return self.status == "succeeded"

    @property
    def fraction(self) -> float:
        return float(self.view["progress"]["fraction"])

    @property
    def result(self) -> Mapping[str, Any] | None:
        """Size, format, bytes and sha256 of the result; None where there is none (yet)."""
        return self.view.get("result")

    @property
    def error(self) -> Mapping[str, Any] | None:
        return self.view.get("error")


class Client:
    """One key at one service. Thread-safe. Every method raises Refused, Unreachable."""

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        timeout_seconds: float = 30.0,
        patience_seconds: float = 60.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`timeout_seconds` is the longest silence on a connection; `patience_seconds` bounds all tries of a call."""
        self.url = url.rstrip("/")
        self._patience_seconds = patience_seconds
        self._timeout_seconds = timeout_seconds
        self._sleep = sleep
        host = urlsplit(self.url).hostname or ""
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}", "User-Agent": "enlarger-client"},
            timeout=httpx.Timeout(timeout_seconds, connect=min(5.0, timeout_seconds)),
            # A proxy for the world outside knows nothing of this machine.
            trust_env=host not in ("localhost", "127.0.0.1", "::1"),
            limits=httpx.Limits(max_connections=64),
        )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ, **options: Any) -> Client:
        """The service that ENLARGER_URL and ENLARGER_API_KEY name, else the one `enlarger up` runs on this machine.

        Raises InvalidRequest where there is neither.
        """
        path = Path(environ.get("ENLARGER_DATA_DIR") or DEFAULT_DATA_DIR) / "service.json"
        try:
            local = json.loads(path.read_text())
        except (OSError, ValueError):
            local = {}
        url = environ.get("ENLARGER_URL") or local.get("url")
        # The key on this disk is for the service on this machine and for no other.
        api_key = environ.get("ENLARGER_API_KEY") or (local.get("api_key") if local.get("url") == url else None)
        if not url or not api_key:
            raise InvalidRequest(
                "No service is known here. Start one with `enlarger up`, or set ENLARGER_URL and ENLARGER_API_KEY "
                f"(looked for {path} as well)."
            )
        return cls(url, api_key, **options)

    def submit(
        self,
        picture: Path | bytes | None = None,
        *,
        name: str | None = None,
        image_url: str | None = None,
        upload_id: str | None = None,
        idempotency_key: str | None = None,
        on_sent: OnBytes | None = None,
        **options: Unpack[JobOptions],
    ) -> Job:
        """Hands in one picture: a file, its bytes, an address the service fetches, or an upload.

        `name` is the file name to remember; a path has one. `on_sent` follows the sending.
        """
        if sum(source is not None for source in (picture, image_url, upload_id)) != 1:
            raise ValueError("Give one of picture, image_url and upload_id.")
        headers = {"Idempotency-Key": idempotency_key or secrets.token_urlsafe(24)}
        if picture is None:
            source = {"image_url": image_url} if image_url is not None else {"upload_id": upload_id}
            answer = self._call("POST", "/v1/jobs", headers=headers, json={**source, **options})
            return Job(answer.json())

        def send() -> httpx.Response:
            # Opened for each try: a file that was sent in part must be sent again from its start.
            with _opened(picture) as (file, size_bytes):
                body = _Watched(file, size_bytes, on_sent)
                file_name = name or (picture.name if isinstance(picture, Path) else "picture")
                return self._http.post(
                    "/v1/jobs",
                    headers=headers,
                    data=_form(options),
                    files={"image": (file_name, body, "application/octet-stream")},  # type: ignore[dict-item]
                )

        return Job(self._patiently(send).json())

    def upload(self, path: Path, *, on_sent: OnBytes | None = None) -> str:
        """Puts a file into storage without passing through the API; returns the `upload_id` to submit. For large
        pictures."""
        place = self._call("POST", "/v1/uploads", json={}).json()

        def put() -> httpx.Response:
            with path.open("rb") as file, httpx.Client(timeout=self._timeout_seconds) as storage:
                size_bytes = path.stat().st_size
                headers = {**place["headers"], "Content-Length": str(size_bytes)}
                return storage.put(place["url"], content=_chunks(file, size_bytes, on_sent), headers=headers)

        self._patiently(put)
        return str(place["upload_id"])

    def job(self, job_id: str) -> Job:
        return Job(self._call("GET", f"/v1/jobs/{job_id}").json())

    def wait(
        self,
        job_id: str,
        *,
        on_progress: Callable[[Job], None] | None = None,
        timeout_seconds: float | None = None,
    ) -> Job:
        """The job once it has finished, however it ended. `on_progress` sees each change on the way, and the end.

        One request at a time stays open until something changes: no polling, and a lost connection costs nothing.
        Raises TookTooLong after `timeout_seconds`; the job goes on.
        """
        ends_at = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        headers: dict[str, str] = {}
        while True:
            seconds = WAIT_AT_ONCE_SECONDS
            if ends_at is not None:
                seconds = max(0, min(seconds, int(ends_at - time.monotonic() + 0.999)))
            timeout = httpx.Timeout(self._timeout_seconds + seconds, connect=5.0)
            if headers and seconds:
                headers["Prefer"] = f"wait={seconds}"
            answer = self._call("GET", f"/v1/jobs/{job_id}", headers=headers, timeout=timeout)
            if answer.status_code == 200:
                job = Job(answer.json())
                headers = {"If-None-Match": answer.headers["ETag"]} if "ETag" in answer.headers else {}
                if on_progress is not None:
                    on_progress(job)
                if job.is_finished:
                    return job
            if ends_at is not None and time.monotonic() >= ends_at:
                raise TookTooLong(f"{job_id} has not finished within {timeout_seconds:g} s.")

    def fetch(
        self,
        job_id: str,
        target: Path,
        *,
        what: Literal["result", "input"] = "result",
        on_bytes: OnBytes | None = None,
    ) -> Path:
        """Saves the result (or the picture handed in) as `target`, whole or not at all; compares its SHA-256.

        Raises Damaged where it is not what the service stored.
        """
        facts = self.job(job_id).view.get(what) or {}
        part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")

        def get() -> httpx.Response:
            digest, done = hashlib.sha256(), 0
            # Redirects lead to storage; httpx does not take the key along to another host.
            with (
                part.open("wb") as file,
                self._http.stream("GET", f"/v1/jobs/{job_id}/{what}", follow_redirects=True) as answer,
            ):
                if answer.status_code != 200:
                    answer.read()
                    return answer
                for chunk in answer.iter_bytes(_CHUNK_BYTES):
                    file.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    if on_bytes is not None:
                        on_bytes(done, int(facts.get("bytes") or done))
            if facts and digest.hexdigest() != facts["sha256"]:
                raise Damaged(f"{what} of {job_id} came damaged: {done:,} bytes, {facts['bytes']:,} expected.")
            return answer

        try:
            self._patiently(get)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return target

    def cancel(self, job_id: str) -> Job:
        """A queued job is canceled at once, a running one at its next band. Refused where it has finished."""
        return Job(self._call("POST", f"/v1/jobs/{job_id}/cancel").json())

    def retry(self, job_id: str) -> Job:
        """Queues a failed, canceled or expired job again."""
        return Job(self._call("POST", f"/v1/jobs/{job_id}/retry").json())

    def delete(self, job_id: str) -> None:
        """Removes the job with all its pictures."""
        self._call("DELETE", f"/v1/jobs/{job_id}")

    def jobs(
        self,
        *,
        status: str | None = None,
        model: str | None = None,
        external_id: str | None = None,
        created_after: str | None = None,
    ) -> Iterator[Job]:
        """The key's jobs, newest first, page after page as they are asked for."""
        wanted = {"status": status, "model": model, "external_id": external_id, "created_after": created_after}
        params: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
        while True:
            page = self._call("GET", "/v1/jobs", params={**params, "limit": 100}).json()
            yield from map(Job, page["data"])
            if page["next_cursor"] is None:
                return
            params["cursor"] = page["next_cursor"]

    def models(self) -> list[Mapping[str, Any]]:
        """The catalogue."""
        return list(self._call("GET", "/v1/models").json()["data"])

    def key(self) -> Mapping[str, Any]:
        """The key that calls: its name, scopes, and the secret that signs webhooks of a job's own address."""
        view: Mapping[str, Any] = self._call("GET", "/v1/key").json()
        return view

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: str, path: str, **request: Any) -> httpx.Response:
        # A cancel, retry or delete that was carried out is refused when it comes again: only a lost one comes again.
        repeatable = method == "GET" or path in ("/v1/jobs", "/v1/uploads")
        return self._patiently(lambda: self._http.request(method, path, **request), repeatable=repeatable)

    def _patiently(self, send: Callable[[], httpx.Response], *, repeatable: bool = True) -> httpx.Response:
        """The answer, after as many tries as patience allows where none came or the service was busy."""
        ends_at = time.monotonic() + self._patience_seconds
        tries = 0
        while True:
            tries += 1
            pause_seconds = min(LONGEST_PAUSE_SECONDS, 0.25 * 2**tries) * random.uniform(0.5, 1.0)
            try:
                answer = send()
            except httpx.TransportError as error:
                never_arrived = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
                if not (repeatable or never_arrived) or time.monotonic() + pause_seconds > ends_at:
                    raise Unreachable(
                        f"{self.url} does not answer ({type(error).__name__}). Is the service running? "
                        "`enlarger up` starts one on this machine.",
                        url=self.url,
                    ) from error
            else:
                if answer.status_code < 400:
                    return answer
                refused = Refused(answer.status_code, _problem(answer))
                busy = answer.status_code in _BUSY or refused.problem_code == "idempotency-in-progress"
                pause_seconds = max(pause_seconds, _retry_after(answer))
                if not busy or time.monotonic() + pause_seconds > ends_at:
                    raise refused
            self._sleep(pause_seconds)


def _problem(answer: httpx.Response) -> Mapping[str, Any]:
    try:
        body = answer.json()
    except ValueError:
        body = None
    return body if isinstance(body, dict) else {}


def _retry_after(answer: httpx.Response) -> float:
    value = answer.headers.get("Retry-After", "")
    return float(value) if value.isascii() and value.isdigit() else 0.0


def _form(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as form fields: words for booleans; a list repeats its field."""
    return {
        name: ("true" if value else "false")
        if isinstance(value, bool)
        else [str(item) for item in value]
        if isinstance(value, list | tuple)
        else str(value)
        for name, value in options.items()
    }


@contextmanager
def _opened(picture: Path | bytes) -> Iterator[tuple[BinaryIO, int]]:
    """The picture as a file at its start, and its size in bytes."""
    if isinstance(picture, bytes):
        yield io.BytesIO(picture), len(picture)
    else:
        with picture.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size


class _Watched(io.RawIOBase):
    """A file that tells how far it has been read. httpx reads its parts through `read`, after a `seek` to the start."""

    def __init__(self, file: BinaryIO, size_bytes: int, on_bytes: OnBytes | None) -> None:
        self._file, self._size_bytes, self._on_bytes = file, size_bytes, on_bytes

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(size)
        if self._on_bytes is not None:
            self._on_bytes(self._file.tell(), self._size_bytes)
        return chunk

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _chunks(file: BinaryIO, size_bytes: int, on_sent: OnBytes | None) -> Iterator[bytes]:
    done = 0
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk
        done += len(chunk)
        if on_sent is not None:
            on_sent(done, size_bytes)
