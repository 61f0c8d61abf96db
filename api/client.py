"""A typed client of the HTTP API: submit a picture, follow it, fetch what became of it.

    with Client("http://127.0.0.1:8000", "enl_...") as client:
        job = client.wait(client.submit(Path("small.png"), classify=True).id)
        client.fetch(job.id, Path("large.png"))

    async with AsyncClient("http://127.0.0.1:8000", "enl_...") as client:
        jobs = await asyncio.gather(*(client.submit(path) for path in paths))

Knows only the wire contract. Calls that can be repeated without harm are repeated where the service is busy, restarting
or away, for as long as `patience_seconds`. Submitting is one of them: each submit carries an Idempotency-Key, so a
repeated one cannot make two jobs.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
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


class PreviewOptions(TypedDict, total=False):
    """Fields of a preview, as `POST /v1/previews` takes them."""

    models: Sequence[str]
    crop: Sequence[int]
    """x, y, width, height in px of the picture."""
    scale: int
    device: str
    priority: str
    ttl_seconds: int
    external_id: str
    webhook_url: str


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
        self._http = httpx.Client(**_connection(self.url, api_key, timeout_seconds))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ, **options: Any) -> Client:
        """The service that ENLARGER_URL and ENLARGER_API_KEY name, else the one `enlarger up` runs on this machine.

        Raises InvalidRequest where there is neither.
        """
        return cls(*_known_service(environ), **options)

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
        return self._hand_in("/v1/jobs", picture, name, image_url, upload_id, idempotency_key, on_sent, options)

    def preview(
        self,
        picture: Path | bytes | None = None,
        *,
        name: str | None = None,
        image_url: str | None = None,
        upload_id: str | None = None,
        idempotency_key: str | None = None,
        on_sent: OnBytes | None = None,
        **options: Unpack[PreviewOptions],
    ) -> Job:
        """Hands in one picture to see a crop of it through several models, all there are without `models`. The job's
        result is one PNG; `view["preview"]["cells"]` says where each model's answer lies."""
        return self._hand_in("/v1/previews", picture, name, image_url, upload_id, idempotency_key, on_sent, options)

    def report(self, job_id: str) -> Mapping[str, Any]:
        """How true the job's result is to its input. Refused where there is none."""
        report: Mapping[str, Any] = self._call("GET", f"/v1/jobs/{job_id}/report").json()
        return report

    def _hand_in(
        self,
        path: str,
        picture: Path | bytes | None,
        name: str | None,
        image_url: str | None,
        upload_id: str | None,
        idempotency_key: str | None,
        on_sent: OnBytes | None,
        options: Mapping[str, Any],
    ) -> Job:
        source = _one_source(picture, image_url, upload_id)
        headers = {"Idempotency-Key": idempotency_key or secrets.token_urlsafe(24)}
        if picture is None:
            answer = self._call("POST", path, headers=headers, json={**source, **options})
            return Job(answer.json())

        def send() -> httpx.Response:
            # Opened for each try: a file that was sent in part must be sent again from its start.
            with _as_form(picture, name, options, on_sent) as form:
                return self._http.post(path, headers=headers, **form)

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
        watch = _Watch(job_id, timeout_seconds, self._timeout_seconds, on_progress)
        while True:
            finished = watch.saw(self._call("GET", f"/v1/jobs/{job_id}", **watch.next_request()))
            if finished is not None:
                return finished

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
        with _whole_or_not(target) as part:

            def get() -> httpx.Response:
                # Redirects lead to storage; httpx does not take the key along to another host.
                with (
                    _Received(part, facts, f"{what} of {job_id}", on_bytes) as received,
                    self._http.stream("GET", f"/v1/jobs/{job_id}/{what}", follow_redirects=True) as answer,
                ):
                    if answer.status_code != 200:
                        answer.read()
                        return answer
                    for chunk in answer.iter_bytes(_CHUNK_BYTES):
                        received.write(chunk)
                    received.check()
                return answer

            self._patiently(get)
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
        params = _filter(status, model, external_id, created_after)
        while True:
            page = self._call("GET", "/v1/jobs", params=params).json()
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
        return self._patiently(
            lambda: self._http.request(method, path, **request), repeatable=_is_repeatable(method, path)
        )

    def _patiently(self, send: Callable[[], httpx.Response], *, repeatable: bool = True) -> httpx.Response:
        """The answer, after as many tries as patience allows where none came or the service was busy."""
        tries = _Tries(self.url, self._patience_seconds, repeatable=repeatable)
        while True:
            try:
                answer = send()
            except httpx.TransportError as error:
                pause_seconds = tries.after_error(error)
            else:
                if answer.status_code < 400:
                    return answer
                pause_seconds = tries.after_refusal(answer)
            self._sleep(pause_seconds)


class AsyncClient:
    """One key at one service, for asyncio: what `Client` does, word for word. Every method raises Refused, Unreachable.

    Many jobs can be waited for at once: each wait is one open request and no thread. Files are read and written between
    awaits, a chunk at a time.
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        timeout_seconds: float = 30.0,
        patience_seconds: float = 60.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """As `Client`'s."""
        self.url = url.rstrip("/")
        self._patience_seconds = patience_seconds
        self._timeout_seconds = timeout_seconds
        self._sleep = sleep
        self._http = httpx.AsyncClient(**_connection(self.url, api_key, timeout_seconds))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ, **options: Any) -> AsyncClient:
        """As `Client.from_environment`. Raises InvalidRequest where no service is known."""
        return cls(*_known_service(environ), **options)

    async def submit(
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
        """Hands in one picture: a file, its bytes, an address the service fetches, or an upload."""
        return await self._hand_in("/v1/jobs", picture, name, image_url, upload_id, idempotency_key, on_sent, options)

    async def preview(
        self,
        picture: Path | bytes | None = None,
        *,
        name: str | None = None,
        image_url: str | None = None,
        upload_id: str | None = None,
        idempotency_key: str | None = None,
        on_sent: OnBytes | None = None,
        **options: Unpack[PreviewOptions],
    ) -> Job:
        """Hands in one picture to see a crop of it through several models."""
        path = "/v1/previews"
        return await self._hand_in(path, picture, name, image_url, upload_id, idempotency_key, on_sent, options)

    async def report(self, job_id: str) -> Mapping[str, Any]:
        """How true the job's result is to its input."""
        report: Mapping[str, Any] = (await self._call("GET", f"/v1/jobs/{job_id}/report")).json()
        return report

    async def _hand_in(
        self,
        path: str,
        picture: Path | bytes | None,
        name: str | None,
        image_url: str | None,
        upload_id: str | None,
        idempotency_key: str | None,
        on_sent: OnBytes | None,
        options: Mapping[str, Any],
    ) -> Job:
        source = _one_source(picture, image_url, upload_id)
        headers = {"Idempotency-Key": idempotency_key or secrets.token_urlsafe(24)}
        if picture is None:
            answer = await self._call("POST", path, headers=headers, json={**source, **options})
            return Job(answer.json())

        async def send() -> httpx.Response:
            with _as_form(picture, name, options, on_sent) as form:
                return await self._http.post(path, headers=headers, **form)

        return Job((await self._patiently(send)).json())

    async def upload(self, path: Path, *, on_sent: OnBytes | None = None) -> str:
        """Puts a file into storage without passing through the API; returns the `upload_id` to submit."""
        place = (await self._call("POST", "/v1/uploads", json={})).json()

        async def put() -> httpx.Response:
            size_bytes = path.stat().st_size

            async def body(file: BinaryIO) -> AsyncIterator[bytes]:
                for chunk in _chunks(file, size_bytes, on_sent):
                    yield chunk

            headers = {**place["headers"], "Content-Length": str(size_bytes)}
            with path.open("rb") as file:
                async with httpx.AsyncClient(timeout=self._timeout_seconds) as storage:
                    return await storage.put(place["url"], content=body(file), headers=headers)

        await self._patiently(put)
        return str(place["upload_id"])

    async def job(self, job_id: str) -> Job:
        return Job((await self._call("GET", f"/v1/jobs/{job_id}")).json())

    async def wait(
        self,
        job_id: str,
        *,
        on_progress: Callable[[Job], None] | None = None,
        timeout_seconds: float | None = None,
    ) -> Job:
        """The job once it has finished, however it ended. Raises TookTooLong after `timeout_seconds`; it goes on."""
        watch = _Watch(job_id, timeout_seconds, self._timeout_seconds, on_progress)
        while True:
            finished = watch.saw(await self._call("GET", f"/v1/jobs/{job_id}", **watch.next_request()))
            if finished is not None:
                return finished

    async def fetch(
        self,
        job_id: str,
        target: Path,
        *,
        what: Literal["result", "input"] = "result",
        on_bytes: OnBytes | None = None,
    ) -> Path:
        """Saves the result (or the picture handed in) as `target`, whole or not at all. Raises Damaged."""
        facts = (await self.job(job_id)).view.get(what) or {}
        with _whole_or_not(target) as part:

            async def get() -> httpx.Response:
                with _Received(part, facts, f"{what} of {job_id}", on_bytes) as received:
                    async with self._http.stream("GET", f"/v1/jobs/{job_id}/{what}", follow_redirects=True) as answer:
                        if answer.status_code != 200:
                            await answer.aread()
                            return answer
                        async for chunk in answer.aiter_bytes(_CHUNK_BYTES):
                            received.write(chunk)
                        received.check()
                return answer

            await self._patiently(get)
        return target

    async def cancel(self, job_id: str) -> Job:
        return Job((await self._call("POST", f"/v1/jobs/{job_id}/cancel")).json())

    async def retry(self, job_id: str) -> Job:
        return Job((await self._call("POST", f"/v1/jobs/{job_id}/retry")).json())

    async def delete(self, job_id: str) -> None:
        await self._call("DELETE", f"/v1/jobs/{job_id}")

    async def jobs(
        self,
        *,
        status: str | None = None,
        model: str | None = None,
        external_id: str | None = None,
        created_after: str | None = None,
    ) -> AsyncIterator[Job]:
        """The key's jobs, newest first, page after page as they are asked for."""
        params = _filter(status, model, external_id, created_after)
        while True:
            page = (await self._call("GET", "/v1/jobs", params=params)).json()
            for view in page["data"]:
                yield Job(view)
            if page["next_cursor"] is None:
                return
            params["cursor"] = page["next_cursor"]

    async def models(self) -> list[Mapping[str, Any]]:
        return list((await self._call("GET", "/v1/models")).json()["data"])

    async def key(self) -> Mapping[str, Any]:
        view: Mapping[str, Any] = (await self._call("GET", "/v1/key")).json()
        return view

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: str, path: str, **request: Any) -> httpx.Response:
        return await self._patiently(
            lambda: self._http.request(method, path, **request), repeatable=_is_repeatable(method, path)
        )

    async def _patiently(
        self, send: Callable[[], Awaitable[httpx.Response]], *, repeatable: bool = True
    ) -> httpx.Response:
        tries = _Tries(self.url, self._patience_seconds, repeatable=repeatable)
        while True:
            try:
                answer = await send()
            except httpx.TransportError as error:
                pause_seconds = tries.after_error(error)
            else:
                if answer.status_code < 400:
                    return answer
                pause_seconds = tries.after_refusal(answer)
            await self._sleep(pause_seconds)


# --- what both clients decide alike, without sending or sleeping ----------------------------------------------------


class _Tries:
    """After each failed try of one call: how long to pause before the next, or the error that ends them."""

    def __init__(self, url: str, patience_seconds: float, *, repeatable: bool) -> None:
        self._url, self._repeatable = url, repeatable
        self._ends_at = time.monotonic() + patience_seconds
        self._made = 0

    def after_error(self, error: httpx.TransportError) -> float:
        """No answer came. Raises Unreachable."""
        never_arrived = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
        pause_seconds = self._pause_seconds()
        if not (self._repeatable or never_arrived) or time.monotonic() + pause_seconds > self._ends_at:
            raise Unreachable(
                f"{self._url} does not answer ({type(error).__name__}). Is the service running? "
                "`enlarger up` starts one on this machine.",
                url=self._url,
            ) from error
        return pause_seconds

    def after_refusal(self, answer: httpx.Response) -> float:
        """The answer was a problem. Raises Refused."""
        refused = Refused(answer.status_code, _problem(answer))
        busy = answer.status_code in _BUSY or refused.problem_code == "idempotency-in-progress"
        pause_seconds = max(self._pause_seconds(), _retry_after(answer))
        if not busy or time.monotonic() + pause_seconds > self._ends_at:
            raise refused
        return pause_seconds

    def _pause_seconds(self) -> float:
        self._made += 1
        longest: float = min(LONGEST_PAUSE_SECONDS, 0.25 * 2**self._made)
        return longest * random.uniform(0.5, 1.0)


class _Watch:
    """A wait for the end of a job: what each request asks, and what its answer means."""

    def __init__(
        self,
        job_id: str,
        seconds: float | None,
        silence_seconds: float,
        on_progress: Callable[[Job], None] | None,
    ) -> None:
        self._job_id, self._seconds, self._silence_seconds = job_id, seconds, silence_seconds
        self._on_progress = on_progress
        self._ends_at = None if seconds is None else time.monotonic() + seconds
        self._seen: str | None = None

    def next_request(self) -> dict[str, Any]:
        seconds = WAIT_AT_ONCE_SECONDS
        if self._ends_at is not None:
            seconds = max(0, min(seconds, int(self._ends_at - time.monotonic() + 0.999)))
        headers = {}
        if self._seen is not None:
            headers = {"If-None-Match": self._seen, **({"Prefer": f"wait={seconds}"} if seconds else {})}
        return {"headers": headers, "timeout": httpx.Timeout(self._silence_seconds + seconds, connect=5.0)}

    def saw(self, answer: httpx.Response) -> Job | None:
        """The job, where it has finished. Raises TookTooLong."""
        if answer.status_code == 200:
            job = Job(answer.json())
            self._seen = answer.headers.get("ETag")
            if self._on_progress is not None:
                self._on_progress(job)
            if job.is_finished:
                return job
        if self._ends_at is not None and time.monotonic() >= self._ends_at:
            raise TookTooLong(f"{self._job_id} has not finished within {self._seconds:g} s.")
        return None


class _Received:
    """A file on its way in: written, hashed and told of as it comes."""

    def __init__(self, part: Path, facts: Mapping[str, Any], what: str, on_bytes: OnBytes | None) -> None:
        self._facts, self._what, self._on_bytes = facts, what, on_bytes
        self._file = part.open("wb")
        self._digest, self._done = hashlib.sha256(), 0

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._digest.update(chunk)
        self._done += len(chunk)
        if self._on_bytes is not None:
            self._on_bytes(self._done, int(self._facts.get("bytes") or self._done))

    def check(self) -> None:
        """Raises Damaged where it is not what the service stored."""
        if self._facts and self._digest.hexdigest() != self._facts["sha256"]:
            raise Damaged(f"{self._what} came damaged: {self._done:,} bytes, {self._facts['bytes']:,} expected.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextmanager
def _whole_or_not(target: Path) -> Iterator[Path]:
    """A name to write to beside `target`: it becomes `target` where the block ends well, else it is gone."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _connection(url: str, api_key: str, timeout_seconds: float) -> dict[str, Any]:
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {api_key}", "User-Agent": "enlarger-client"},
        "timeout": httpx.Timeout(timeout_seconds, connect=min(5.0, timeout_seconds)),
        # A proxy for the world outside knows nothing of this machine.
        "trust_env": urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1"),
        "limits": httpx.Limits(max_connections=64),
    }


def _is_repeatable(method: str, path: str) -> bool:
    # A cancel, retry or delete that was carried out is refused when it comes again: only a lost one comes again.
    return method == "GET" or path in ("/v1/jobs", "/v1/uploads")


def _one_source(picture: Path | bytes | None, image_url: str | None, upload_id: str | None) -> dict[str, str]:
    """What JSON names the source by; empty where the picture itself is sent. Raises ValueError unless there is one."""
    if sum(source is not None for source in (picture, image_url, upload_id)) != 1:
        raise ValueError("Give one of picture, image_url and upload_id.")
    named = {"image_url": image_url, "upload_id": upload_id}
    return {name: value for name, value in named.items() if value is not None}


@contextmanager
def _as_form(
    picture: Path | bytes, name: str | None, options: Mapping[str, Any], on_sent: OnBytes | None
) -> Iterator[dict[str, Any]]:
    """The picture and its options as httpx sends a form."""
    with _opened(picture) as (file, size_bytes):
        file_name = name or (picture.name if isinstance(picture, Path) else "picture")
        part = (file_name, _Watched(file, size_bytes, on_sent), "application/octet-stream")
        yield {"data": _form(options), "files": {"image": part}}


def _filter(
    status: str | None, model: str | None, external_id: str | None, created_after: str | None
) -> dict[str, Any]:
    wanted = {"status": status, "model": model, "external_id": external_id, "created_after": created_after}
    return {**{name: value for name, value in wanted.items() if value is not None}, "limit": 100}


def _known_service(environ: Mapping[str, str]) -> tuple[str, str]:
    """(address, key) of the service that the environment, or `enlarger up` on this machine, names."""
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
    return url, api_key


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
