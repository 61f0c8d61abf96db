"""Replicate's own Python client, as it is, against the application behind a real socket. The worker is played."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import replicate
from replicate.exceptions import ModelError, ReplicateError
from replicate.pagination import paginate
from sqlalchemy import select

from shared import catalog, jobs
from shared.db import clock
from shared.errors import InvalidImage
from shared.models import Job, JobState
from tests.api.conftest import Api, served
from tests.factories import a_claim, a_png

RESULT = b"the enlarged picture"
SRGAN = catalog.card("srgan")


@dataclass
class Door:
    api: Api
    url: str
    client: replicate.Client
    stop: threading.Event

    def jobs(self) -> list[Job]:
        with self.api.database.reading() as session:
            return list(session.scalars(select(Job).order_by(Job.id)))


@pytest.fixture
def door(api: Api, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    monkeypatch.setenv("REPLICATE_POLL_INTERVAL", "0.02")
    with served(api.app) as url:
        secret = api.caller().secret
        client = replicate.Client(api_token=secret, base_url=f"{url}/compat/replicate", trust_env=False)
        yield Door(api, url, client, threading.Event())
        client._client.close()


@pytest.fixture
def worker(door: Door) -> Iterator[None]:
    """Finishes every job there is with RESULT, as soon as it is there."""

    def work() -> None:
        while not door.stop.wait(0.02):
            for job in door.jobs():
                if job.state == JobState.QUEUED:
                    door.api.succeed(job.id, RESULT, timings={"queued_seconds": 1.0, "upscale_seconds": 2.5})

    thread = threading.Thread(target=work)
    thread.start()
    yield
    door.stop.set()
    thread.join()


def content_of(output: Any) -> bytes:
    """As a program reads it: where the service speaks https the client makes a file of the address."""
    assert isinstance(output, str)
    return httpx.get(output, trust_env=False).raise_for_status().content


@pytest.mark.usefixtures("worker")
def test_run_takes_an_open_file_and_gives_the_output(door: Door, tmp_path: Path) -> None:
    path = tmp_path / "bird.png"
    path.write_bytes(a_png())
    with path.open("rb") as file:
        output = door.client.run("enlarger/srgan", input={"image": file, "scale": 2, "output_format": "jpg"})
    assert content_of(output) == RESULT
    [job] = door.jobs()
    assert (job.model, job.scale, job.format, job.input_width) == ("srgan", 2, "jpeg", 16)


@pytest.mark.usefixtures("worker")
def test_a_file_of_https_is_read_by_the_client_with_its_own_key(door: Door) -> None:
    output = door.client.run("somebody/srgan", input={"image": io.BytesIO(a_png())})
    # What FileOutput.read does: no redirect is followed, and the key goes along.
    with door.client._client.stream("GET", output) as response:
        response.raise_for_status()
        assert response.read() == RESULT


@pytest.mark.usefixtures("worker")
def test_run_takes_a_data_uri_a_version_and_works_without_waiting(door: Door) -> None:
    uri = f"data:image/png;base64,{base64.b64encode(a_png()).decode()}"
    reference = f"enlarger/srgan:{SRGAN.weights.sha256}"
    assert content_of(door.client.run(reference, input={"image": uri}, wait=False)) == RESULT
    assert content_of(door.client.run(reference, input={"image": uri}, wait=5)) == RESULT
    assert (
        content_of(door.client.run("enlarger/srgan", input={"image": uri}, file_encoding_strategy="base64")) == RESULT
    )


@pytest.mark.usefixtures("worker")
def test_the_async_client_runs_too(door: Door) -> None:
    async def run() -> Any:
        output = await door.client.async_run("enlarger/srgan", input={"image": io.BytesIO(a_png())})
        await door.client._async_client.aclose()
        return output

    assert content_of(asyncio.run(run())) == RESULT


def test_a_prediction_is_followed_to_its_end(door: Door) -> None:
    model = door.client.models.get("enlarger/srgan")
    file = door.client.files.create(io.BytesIO(a_png()))
    assert file.checksums["sha256"]
    made = door.client.predictions.create(version=model.latest_version, input={"image": file.urls["get"]})
    assert made.status == "starting"
    assert (made.model, made.version, made.output) == ("enlarger/srgan", SRGAN.weights.sha256, None)
    with door.api.database.transaction() as session:
        now = clock(session)
        claim = a_claim(session, made.id, now)
        jobs.progress(
            session,
            claim,
            phase="upscale",
            fraction=0.5,
            bands_done=3,
            bands_total=6,
            eta_seconds=1.0,
            lease_seconds=20,
            now=now,
        )
    made.reload()
    assert made.status == "processing"
    assert made.progress is not None
    assert (made.progress.percentage, made.progress.current, made.progress.total) == (0.5, 3, 6)
    with door.api.database.transaction() as session:
        jobs.fail(session, claim, InvalidImage("It is no picture."), retry_delay_seconds=1, now=clock(session))
    made.wait()
    assert (made.status, made.error) == ("failed", "It is no picture.")
    # A file may be handed in again: it is not used up.
    again = door.client.predictions.create(version=model.latest_version, input={"image": file.urls["get"]})
    assert [each.id for each in door.client.predictions.list()] == [again.id, made.id]


def test_a_failed_run_raises_what_the_client_raises(door: Door) -> None:
    def fail() -> None:
        while not door.stop.wait(0.02):
            for job in door.jobs():
                if job.state == JobState.QUEUED:
                    door.api.work(
                        job.id,
                        lambda session, claim, now: jobs.fail(
                            session, claim, InvalidImage("It is no picture."), retry_delay_seconds=1, now=now
                        ),
                    )

    thread = threading.Thread(target=fail)
    thread.start()
    try:
        with pytest.raises(ModelError, match="no picture"):
            door.client.run("enlarger/srgan", input={"image": io.BytesIO(a_png())})
    finally:
        door.stop.set()
        thread.join()


def test_a_prediction_can_be_canceled_and_canceling_twice_does_no_harm(door: Door) -> None:
    made = door.client.predictions.create(version="enlarger/srgan", input={"image": io.BytesIO(a_png())})
    made.cancel()
    assert made.status == "canceled"
    made.cancel()
    assert made.status == "canceled"


def test_pages_of_predictions_lead_to_one_another(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.compat.PAGE", 2)
    ids = [
        door.client.predictions.create(version="enlarger/srgan", input={"image": io.BytesIO(a_png())}).id
        for _ in range(3)
    ]
    pages = [[each.id for each in page] for page in paginate(door.client.predictions.list)]
    assert pages == [ids[:0:-1], ids[:1]]


def test_models_are_listed_with_what_their_input_may_hold(door: Door) -> None:
    names = [model.name for model in door.client.models.list()]
    assert names == [card.name for card in catalog.CARDS]
    version = door.client.models.get("enlarger/srgan").versions.get(SRGAN.weights.sha256)
    assert {"image", "scale", "classify"} <= set(version.openapi_schema["components"]["schemas"]["Input"]["properties"])


@pytest.mark.parametrize(
    ("reference", "input", "status", "said"),
    [
        ("enlarger/nothing", {"image": "https://example.com/a.png"}, 404, "nothing"),
        ("enlarger/srgan", {}, 422, "input.image"),
        ("enlarger/srgan", {"image": "data:image/png;base64,???"}, 422, "base64"),
        ("enlarger/srgan", {"image": "data:image/png;base64,AAAA"}, 415, "picture"),
        ("enlarger/srgan", {"image": "http://127.0.0.1:1/a.png"}, 422, "address"),
        ("enlarger/srgan", {"image": "https://example.com/a.png", "scale": 99}, 422, "scale"),
    ],
)
def test_what_cannot_be_done_is_refused_as_the_client_expects(
    door: Door, reference: str, input: dict[str, Any], status: int, said: str
) -> None:
    with pytest.raises(ReplicateError) as raised:
        door.client.run(reference, input=input)
    assert raised.value.status == status
    assert said in str(raised.value)
    assert door.jobs() == []


def test_a_version_of_elsewhere_is_refused_with_those_there_are(door: Door) -> None:
    elsewhere = "nightmareai/real-esrgan:42fed1c4974146d4d2414e2be2c5277c7fcf05fcc3a73abf41610695738c1d7b"
    with pytest.raises(ReplicateError, match="No model here has that version"):
        door.client.run(elsewhere, input={"image": io.BytesIO(a_png())})


def test_an_input_that_means_nothing_here_is_named_in_the_logs(door: Door) -> None:
    made = door.client.predictions.create(
        version="enlarger/srgan", input={"image": io.BytesIO(a_png()), "face_enhance": False}
    )
    assert made.logs == "Left out: face_enhance is nothing that Enlarger knows."


def test_webhooks_of_the_other_shape_are_refused(door: Door) -> None:
    with pytest.raises(ReplicateError, match="webhook-endpoints"):
        door.client.predictions.create(
            version="enlarger/srgan", input={"image": io.BytesIO(a_png())}, webhook="https://example.com/hook"
        )


def test_strangers_see_nothing(door: Door) -> None:
    made = door.client.predictions.create(version="enlarger/srgan", input={"image": io.BytesIO(a_png())})
    file = door.client.files.create(io.BytesIO(a_png()))
    stranger = replicate.Client(
        api_token=door.api.caller(name="stranger").secret, base_url=f"{door.url}/compat/replicate", trust_env=False
    )
    for ask in (
        lambda: stranger.predictions.get(made.id),
        lambda: stranger.predictions.cancel(made.id),
        lambda: stranger.predictions.create(version="enlarger/srgan", input={"image": file.urls["get"]}),
    ):
        with pytest.raises(ReplicateError) as raised:
            ask()
        assert raised.value.status == 404
    assert list(stranger.predictions.list()) == []
    stranger._client.close()
    assert httpx.get(f"{door.url}/compat/replicate/outputs/{made.id}/output.png", trust_env=False).status_code == 404
    assert httpx.get(f"{door.url}/compat/replicate/v1/predictions", trust_env=False).status_code == 401
