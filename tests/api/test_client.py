"""The client against real sockets: what it sends, what it repeats, what it makes of the answers."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from api.client import AsyncClient, Client, Damaged, Job, Refused, TookTooLong, Unreachable
from shared.errors import InvalidRequest
from tests.conftest import Receiver, Reply, closed_port

PICTURE = b"the bytes of a picture"


def view(status: str = "queued", **fields: Any) -> dict[str, Any]:
    finished = "2026-03-04T05:06:07.000Z" if status in ("succeeded", "failed", "canceled", "expired") else None
    return {
        "id": "job_1",
        "status": status,
        "finished_at": finished,
        "progress": {"fraction": 0.5, "phase": status, "bands_done": 0, "bands_total": 0, "eta_seconds": None},
        "input": {"width": 2, "height": 2, "format": "png", "bytes": 3, "sha256": "0" * 64},
        "result": None,
        "error": None,
        **fields,
    }


def answer(body: Any, status: int = 200, **headers: str) -> Reply:
    given = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return Reply(status, given, json.dumps(body).encode())


def problem(status: int, code: str, **headers: str) -> Reply:
    return answer({"title": "No", "status": status, "detail": f"Because of {code}.", "code": code}, status, **headers)


@pytest.fixture
def pauses() -> list[float]:
    """Seconds the client would have slept."""
    return []


@pytest.fixture
def client(receiver: Receiver, pauses: list[float]) -> Iterator[Client]:
    with Client(receiver.url, "enl_secret", timeout_seconds=10, sleep=pauses.append) as made:
        yield made


# --- submitting -----------------------------------------------------------------------------------------------------


def test_a_submit_that_meets_a_busy_service_is_sent_again_whole_and_under_the_same_key(
    client: Client, receiver: Receiver, pauses: list[float], tmp_path: Path
) -> None:
    path = tmp_path / "bird.png"
    path.write_bytes(PICTURE)
    receiver.replies = [
        problem(503, "database-unavailable", Retry_After="7"),
        problem(429, "queue-full"),
        answer(view(), 202),
    ]
    job = client.submit(path, classify=True, scale=2, webhook_events=["job.failed", "job.succeeded"])
    assert job.id == "job_1"
    assert len({request.headers["Idempotency-Key"] for request in receiver.requests}) == 1
    for request in receiver.requests:
        assert PICTURE in request.body
        assert b'filename="bird.png"' in request.body
        assert b'name="classify"\r\n\r\ntrue\r\n' in request.body
        assert b'name="scale"\r\n\r\n2\r\n' in request.body
        assert request.body.count(b'name="webhook_events"') == 2
    # Retry-After is honoured; without one the pause is short.
    assert pauses[0] == 7
    assert 0 < pauses[1] < 2


def test_two_submits_have_two_idempotency_keys(client: Client, receiver: Receiver) -> None:
    receiver.replies = [answer(view(), 202), answer(view(), 202)]
    client.submit(PICTURE)
    client.submit(PICTURE)
    first, second = (request.headers["Idempotency-Key"] for request in receiver.requests)
    assert first != second


def test_a_first_submit_still_in_flight_is_waited_for(client: Client, receiver: Receiver) -> None:
    receiver.replies = [problem(409, "idempotency-in-progress", Retry_After="1"), answer(view(), 202)]
    assert client.submit(PICTURE).id == "job_1"


def test_addresses_and_uploads_are_named_in_json(client: Client, receiver: Receiver) -> None:
    receiver.replies = [answer(view(), 202), answer(view(), 202)]
    client.submit(image_url="https://example.com/a.png", scale=3)
    client.submit(upload_id="upl_1")
    assert receiver.requests[0].json == {"image_url": "https://example.com/a.png", "scale": 3}
    assert receiver.requests[1].json == {"upload_id": "upl_1"}


@pytest.mark.parametrize("sources", [{}, {"image_url": "https://example.com/a.png", "upload_id": "upl_1"}])
def test_exactly_one_source_is_submitted(client: Client, sources: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="one of picture"):
        client.submit(**sources)  # type: ignore[arg-type]


def test_sending_is_followed_to_its_end(client: Client, receiver: Receiver) -> None:
    receiver.replies = [answer(view(), 202)]
    heard: list[tuple[int, int]] = []
    client.submit(PICTURE * 10_000, on_sent=lambda done, total: heard.append((done, total)))
    assert heard[-1] == (len(PICTURE) * 10_000,) * 2
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)


def test_an_upload_goes_to_storage_without_our_key(client: Client, receiver: Receiver, tmp_path: Path) -> None:
    (tmp_path / "large.tif").write_bytes(PICTURE)
    place = {"upload_id": "upl_1", "url": f"{receiver.url}/bucket/key?signature=s", "headers": {"X-Asked": "yes"}}
    receiver.replies = [answer(place, 201), Reply(200)]
    assert client.upload(tmp_path / "large.tif") == "upl_1"
    put = receiver.requests[1]
    assert (put.method, put.path, put.body) == ("PUT", "/bucket/key?signature=s", PICTURE)
    assert put.headers["X-Asked"] == "yes"
    assert "Authorization" not in put.headers


# --- refusals and outages -------------------------------------------------------------------------------------------


def test_a_problem_is_raised_with_its_code_and_facts(client: Client, receiver: Receiver) -> None:
    body = {"detail": "Too many pixels.", "code": "input-too-large", "limit_px": 5}
    receiver.replies = [answer(body, 422)]
    with pytest.raises(Refused, match="Too many pixels") as raised:
        client.submit(PICTURE)
    assert (raised.value.status, raised.value.problem_code) == (422, "input-too-large")
    assert raised.value.problem["limit_px"] == 5


def test_an_answer_that_is_no_problem_is_still_a_refusal(client: Client, receiver: Receiver) -> None:
    receiver.replies = [Reply(404, {"Content-Type": "text/html"}, b"<html>a proxy</html>")]
    with pytest.raises(Refused, match="404"):
        client.job("job_1")


def test_patience_ends(receiver: Receiver, pauses: list[float]) -> None:
    receiver.replies = [problem(503, "storage-unavailable", Retry_After="600")]
    impatient = Client(receiver.url, "enl_secret", patience_seconds=60, sleep=pauses.append)
    with impatient as client, pytest.raises(Refused, match="storage-unavailable"):
        client.submit(PICTURE)
    assert len(receiver.requests) == 1
    assert pauses == []


def test_a_service_that_is_not_there_is_named() -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    with (
        Client(url, "enl_secret", patience_seconds=0) as client,
        pytest.raises(Unreachable, match="enlarger up") as raised,
    ):
        client.models()
    assert raised.value.facts["url"] == url


@pytest.fixture
def hanging_up() -> Iterator[tuple[str, list[bytes]]]:
    """A server that reads each request and closes the connection without a word: its address, and what came."""
    came: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                came.append(connection.recv(65536))

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", came
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def test_what_may_have_been_carried_out_is_repeated_only_where_that_does_no_harm(
    hanging_up: tuple[str, list[bytes]],
) -> None:
    url, came = hanging_up
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    with Client(url, "enl_secret", sleep=sleep) as client:
        for act in (client.cancel, client.retry, client.delete):
            with pytest.raises(Unreachable):
                act("job_1")
        assert len(came) == 3
        with pytest.raises(KeyboardInterrupt):
            client.job("job_1")
        assert len(came) == 6


# --- following ------------------------------------------------------------------------------------------------------


def test_waiting_sees_every_change_and_polls_for_none(client: Client, receiver: Receiver) -> None:
    receiver.replies = [
        answer(view("queued"), ETag='"1"'),
        answer(view("running"), ETag='"2"'),
        Reply(304, {"ETag": '"2"'}),
        answer(view("succeeded"), ETag='"3"'),
    ]
    seen: list[str] = []
    job = client.wait("job_1", on_progress=lambda job: seen.append(job.status))
    assert job.succeeded
    assert seen == ["queued", "running", "succeeded"]
    asked = [(r.headers.get("If-None-Match"), "Prefer" in r.headers) for r in receiver.requests]
    assert asked == [(None, False), ('"1"', True), ('"2"', True), ('"2"', True)]


def test_a_status_never_heard_of_is_not_finished_unless_it_says_when(client: Client, receiver: Receiver) -> None:
    receiver.replies = [answer(view("simmering")), answer(view("shelved", finished_at="2026-01-01T00:00:00Z"))]
    job = client.wait("job_1")
    assert job.status == "shelved"
    assert not job.succeeded


def test_waiting_ends_when_the_callers_time_is_up(client: Client, receiver: Receiver) -> None:
    receiver.pages["/v1/jobs/job_1"] = answer(view("running"))
    with pytest.raises(TookTooLong, match="job_1"):
        client.wait("job_1", timeout_seconds=0)


def test_a_failed_job_is_an_answer_and_not_an_exception(client: Client, receiver: Receiver) -> None:
    receiver.replies = [answer(view("failed", error={"code": "bad-output", "detail": "NaN", "retryable": True}))]
    job = client.wait("job_1")
    assert job.error == {"code": "bad-output", "detail": "NaN", "retryable": True}


# --- fetching -------------------------------------------------------------------------------------------------------


def finished_with(content: bytes) -> dict[str, Any]:
    facts = {"width": 1, "height": 1, "format": "png", "bytes": len(content)}
    return view("succeeded", result={**facts, "sha256": hashlib.sha256(content).hexdigest()})


def test_fetching_follows_the_redirect_without_taking_the_key_along(
    client: Client, receiver: Receiver, tmp_path: Path
) -> None:
    with Receiver() as storage:
        storage.replies = [Reply(200, {}, PICTURE)]
        receiver.replies = [answer(finished_with(PICTURE)), Reply(302, {"Location": f"{storage.url}/blob?signature=s"})]
        heard: list[tuple[int, int]] = []
        client.fetch("job_1", tmp_path / "large.png", on_bytes=lambda done, total: heard.append((done, total)))
        assert "Authorization" in receiver.requests[1].headers
        assert "Authorization" not in storage.requests[0].headers
    assert (tmp_path / "large.png").read_bytes() == PICTURE
    assert heard[-1] == (len(PICTURE), len(PICTURE))
    assert list(tmp_path.iterdir()) == [tmp_path / "large.png"]


def test_a_damaged_result_is_not_kept(client: Client, receiver: Receiver, tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(b"what was there before")
    receiver.replies = [answer(finished_with(PICTURE)), Reply(200, {}, PICTURE[:-1])]
    with pytest.raises(Damaged):
        client.fetch("job_1", tmp_path / "large.png")
    assert (tmp_path / "large.png").read_bytes() == b"what was there before"
    assert len(list(tmp_path.iterdir())) == 1


def test_fetching_what_is_not_finished_is_refused_and_leaves_no_file(
    client: Client, receiver: Receiver, tmp_path: Path
) -> None:
    receiver.replies = [answer(view("running")), problem(409, "job-not-finished")]
    with pytest.raises(Refused, match="job-not-finished"):
        client.fetch("job_1", tmp_path / "large.png")
    assert list(tmp_path.iterdir()) == []


# --- lists and configuration ----------------------------------------------------------------------------------------


def test_lists_are_read_page_after_page_as_they_are_wanted(client: Client, receiver: Receiver) -> None:
    receiver.replies = [
        answer({"data": [view(), view()], "next_cursor": "c2"}),
        answer({"data": [view()], "next_cursor": None}),
    ]
    jobs = client.jobs(status="failed")
    assert isinstance(next(jobs), Job)
    assert len(receiver.requests) == 1
    assert len(list(jobs)) == 2
    assert "status=failed" in receiver.requests[1].path
    assert "cursor=c2" in receiver.requests[1].path


def test_the_service_of_this_machine_is_found_where_up_left_it(receiver: Receiver, tmp_path: Path) -> None:
    service = {"url": receiver.url, "api_key": "enl_local"}
    (tmp_path / "service.json").write_text(json.dumps(service))
    receiver.replies = [answer({"data": [], "next_cursor": None})]
    with Client.from_environment({"ENLARGER_DATA_DIR": str(tmp_path)}) as client:
        client.models()
    assert receiver.requests[0].headers["Authorization"] == "Bearer enl_local"


def test_the_key_on_this_disk_goes_to_no_other_service(tmp_path: Path) -> None:
    (tmp_path / "service.json").write_text(json.dumps({"url": "http://127.0.0.1:8000", "api_key": "enl_local"}))
    environ = {"ENLARGER_DATA_DIR": str(tmp_path), "ENLARGER_URL": "https://elsewhere.example"}
    with pytest.raises(InvalidRequest, match="ENLARGER_API_KEY"):
        Client.from_environment(environ)


def test_without_any_service_it_is_said_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="enlarger up"):
        Client.from_environment({"ENLARGER_DATA_DIR": str(tmp_path)})


# --- the same for asyncio -------------------------------------------------------------------------------------------


def with_async_client(receiver: Receiver, use: Callable[[AsyncClient], Awaitable[Any]], pauses: list[float]) -> Any:
    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    async def run() -> Any:
        async with AsyncClient(receiver.url, "enl_secret", timeout_seconds=10, sleep=sleep) as client:
            return await use(client)

    return asyncio.run(run())


def test_every_call_of_the_client_has_its_like_for_asyncio() -> None:
    def calls(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(value).parameters)
            for name, value in vars(kind).items()
            if callable(value) and not name.startswith("_")
        }

    assert calls(AsyncClient) == calls(Client)


def test_an_async_submit_is_repeated_whole_and_under_the_same_key(
    receiver: Receiver, pauses: list[float], tmp_path: Path
) -> None:
    path = tmp_path / "bird.png"
    path.write_bytes(PICTURE)
    receiver.replies = [problem(503, "database-unavailable", Retry_After="7"), answer(view(), 202), answer(view(), 202)]

    async def use(client: AsyncClient) -> list[Job]:
        return [await client.submit(path, classify=True), await client.submit(image_url="https://example.com/a.png")]

    assert [job.id for job in with_async_client(receiver, use, pauses)] == ["job_1", "job_1"]
    first, again, other = receiver.requests
    assert first.headers["Idempotency-Key"] == again.headers["Idempotency-Key"] != other.headers["Idempotency-Key"]
    assert all(PICTURE in request.body and b'filename="bird.png"' in request.body for request in (first, again))
    assert other.json == {"image_url": "https://example.com/a.png"}
    assert pauses == [7]


def test_an_async_wait_sees_every_change_and_ends_in_time(receiver: Receiver, pauses: list[float]) -> None:
    receiver.replies = [answer(view("queued"), ETag='"1"'), answer(view("succeeded"), ETag='"2"')]
    seen: list[str] = []

    async def use(client: AsyncClient) -> Job:
        return await client.wait("job_1", on_progress=lambda job: seen.append(job.status))

    assert with_async_client(receiver, use, pauses).succeeded
    assert seen == ["queued", "succeeded"]
    assert receiver.requests[1].headers["Prefer"].startswith("wait=")

    async def wait_for_nothing(client: AsyncClient) -> None:
        receiver.pages["/v1/jobs/job_1"] = answer(view("running"))
        await client.wait("job_1", timeout_seconds=0)

    with pytest.raises(TookTooLong):
        with_async_client(receiver, wait_for_nothing, pauses)


def test_async_files_arrive_whole_or_not_at_all(receiver: Receiver, pauses: list[float], tmp_path: Path) -> None:
    target = tmp_path / "large.png"
    receiver.replies = [answer(finished_with(PICTURE)), Reply(200, {}, PICTURE)]

    async def fetch(client: AsyncClient) -> Path:
        return await client.fetch("job_1", target)

    assert with_async_client(receiver, fetch, pauses).read_bytes() == PICTURE
    receiver.replies = [answer(finished_with(PICTURE)), Reply(200, {}, PICTURE[:-1])]
    with pytest.raises(Damaged):
        with_async_client(receiver, fetch, pauses)
    receiver.replies = [answer(view("running")), problem(409, "job-not-finished")]
    with pytest.raises(Refused, match="job-not-finished"):
        with_async_client(receiver, fetch, pauses)
    assert list(tmp_path.iterdir()) == [target]


def test_an_async_upload_and_the_small_calls(receiver: Receiver, pauses: list[float], tmp_path: Path) -> None:
    (tmp_path / "large.tif").write_bytes(PICTURE)
    place = {"upload_id": "upl_1", "url": f"{receiver.url}/bucket/key?signature=s", "headers": {"X-Asked": "yes"}}
    receiver.replies = [
        answer(place, 201),
        Reply(200),
        answer(view("running"), 202),
        answer(view(), 202),
        Reply(204),
        answer({"data": [view()], "next_cursor": "c2"}),
        answer({"data": [view()], "next_cursor": None}),
        answer({"data": [{"name": "srgan"}]}),
        answer({"name": "tester"}),
    ]

    async def use(client: AsyncClient) -> tuple[Any, ...]:
        upload_id = await client.upload(tmp_path / "large.tif")
        canceled, retried = await client.cancel("job_1"), await client.retry("job_1")
        await client.delete("job_1")
        listed = [job.id async for job in client.jobs(status="failed")]
        return upload_id, canceled.status, retried.status, listed, await client.models(), await client.key()

    assert with_async_client(receiver, use, pauses) == (
        "upl_1",
        "running",
        "queued",
        ["job_1", "job_1"],
        [{"name": "srgan"}],
        {"name": "tester"},
    )
    put = receiver.requests[1]
    assert (put.method, put.body, put.headers["X-Asked"]) == ("PUT", PICTURE, "yes")
    assert "Authorization" not in put.headers
    assert "cursor=c2" in receiver.requests[6].path


def test_an_async_client_names_a_service_that_is_not_there() -> None:
    url = f"http://127.0.0.1:{closed_port()}"

    async def run() -> None:
        environ = {"ENLARGER_URL": url, "ENLARGER_API_KEY": "enl_secret"}
        async with AsyncClient.from_environment(environ, patience_seconds=0) as client:
            await client.models()

    with pytest.raises(Unreachable, match="enlarger up"):
        asyncio.run(run())
