"""What a job came to: result and input, other formats, tiles, the preview. And its picture, taken again."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta

import httpx
import numpy as np
from PIL import Image

from api.schemas import PreviewView, RenditionView
from shared import jobs, renditions
from shared.db import Database, clock
from shared.models import Job
from shared.settings import Settings
from shared.storage import Storage
from tests.api.conftest import Api, Caller, running
from tests.api.test_jobs import fail
from tests.factories import a_png
from worker.previews import Previews
from worker.renditions import make
from worker.thumbnails import Thumbnails

LARGE = (1300, 700)
RESULT = b"an enlarged picture, as far as the API can tell"


def a_result(size: tuple[int, int] = LARGE) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(file, "PNG")
    return file.getvalue()


def finished(api: Api, caller: Caller, result: bytes | None = None) -> str:
    """A succeeded job of 325 x 175 px at 4 x."""
    job_id = caller.job(picture=a_png(LARGE[0] // 4, LARGE[1] // 4))
    api.succeed(job_id, a_result() if result is None else result)
    return job_id


def asked(api: Api, caller: Caller, job_id: str, kind: str) -> RenditionView:
    """Asks for a rendition and makes it, as the relay and the chores worker do."""
    answer = caller.post(f"/v1/jobs/{job_id}/renditions", json={"kind": kind})
    assert answer.status_code == 202, answer.text
    assert answer.headers["Location"] == f"/v1/jobs/{job_id}/renditions/{kind}"
    with api.database.transaction() as session:
        for owed in renditions.due(session, resend_after_seconds=60, now=clock(session)):
            assert owed == (job_id, kind)
    make(api.database, api.context.storage, job_id, kind)
    return RenditionView.model_validate(caller.get(f"/v1/jobs/{job_id}/renditions/{kind}").json)


def swept(api: Api, job_id: str) -> None:
    with api.database.transaction() as session:
        job = session.get_one(Job, job_id)
        job.expires_at = clock(session) - timedelta(seconds=1)
        session.flush()
        assert jobs.sweep_expired(session, now=clock(session)) == [job_id]


def test_the_result_is_a_link_that_works_and_names_the_file(api: Api, caller: Caller) -> None:
    job_id = caller.job(name="bird.png", scale="2")
    unfinished = caller.get(f"/v1/jobs/{job_id}/result")
    assert (unfinished.status_code, unfinished.json["code"]) == (409, "job-not-finished")
    api.succeed(job_id, RESULT)
    answer = caller.get(f"/v1/jobs/{job_id}/result")
    assert answer.status_code == 302
    fetched = httpx.get(answer.headers["Location"])
    assert (fetched.status_code, fetched.content) == (200, RESULT)
    assert fetched.headers["content-type"] == "image/png"
    assert 'attachment; filename="bird-srgan-x2.png"' in fetched.headers["content-disposition"]


def test_the_input_comes_back_as_an_attachment(api: Api, caller: Caller) -> None:
    picture = a_png(13, 4)
    job_id = caller.job(picture=picture, name="katze ä.png")
    fetched = httpx.get(caller.get(f"/v1/jobs/{job_id}/input").headers["Location"])
    assert fetched.content == picture
    assert fetched.headers["content-disposition"].startswith("attachment;")


def test_pictures_are_streamed_where_clients_cannot_reach_storage(
    settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str
) -> None:
    with running(settings.model_copy(update={"result_delivery": "stream"})) as api:
        caller = api.caller()
        job_id = caller.job()
        api.succeed(job_id, RESULT)
        answer = caller.get(f"/v1/jobs/{job_id}/result")
        assert (answer.status_code, answer.data, answer.mimetype) == (200, RESULT, "image/png")
        assert answer.headers["Content-Length"] == str(len(RESULT))
        assert answer.headers["Content-Disposition"].startswith("attachment;")
        with sqlite_database.reading() as session:
            storage.remove(session.get_one(Job, job_id).blob_prefix)
        assert caller.get(f"/v1/jobs/{job_id}/result").status_code == 410


def test_a_job_that_ended_without_a_picture_says_so(api: Api, caller: Caller) -> None:
    job_id = caller.job()
    api.work(job_id, fail)
    answer = caller.get(f"/v1/jobs/{job_id}/result")
    assert (answer.status_code, answer.json["code"]) == (409, "job-has-no-result")


def test_swept_pictures_are_gone(api: Api, caller: Caller) -> None:
    job_id = caller.job(ttl_seconds="1")
    api.succeed(job_id, RESULT)
    with api.database.transaction() as session:
        assert jobs.sweep_expired(session, now=datetime.now(UTC) + timedelta(seconds=2)) == [job_id]
    for what in ("result", "input"):
        answer = caller.get(f"/v1/jobs/{job_id}/{what}")
        assert (answer.status_code, answer.json["code"]) == (410, "gone")
    assert caller.get(f"/v1/jobs/{job_id}").json["status"] == "succeeded"


def test_a_result_is_had_in_another_format(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    job_id = finished(api_on_both, caller)
    pending = caller.post(f"/v1/jobs/{job_id}/renditions", json={"kind": "webp"}).json
    assert (pending["status"], pending["url"]) == ("pending", None)
    early = caller.get(f"/v1/jobs/{job_id}/renditions/webp/file")
    assert (early.status_code, early.json["code"]) == (409, "rendition-not-made")
    assert early.headers["Retry-After"] == "1"
    made = asked(api_on_both, caller, job_id, "webp")
    assert (made.status, made.error) == ("made", None)
    assert made.url is not None
    link = caller.get(made.url)
    assert link.status_code == 302
    assert "bird-srgan-x4.webp" in link.headers["Location"]
    # Asked again, it is there at once.
    assert caller.post(f"/v1/jobs/{job_id}/renditions", json={"kind": "webp"}).json["status"] == "made"


def test_a_result_is_looked_at_tile_by_tile(api: Api, caller: Caller) -> None:
    job_id = finished(api, caller)
    path = f"/v1/jobs/{job_id}"
    assert caller.get(f"{path}/zoom/0/0_0").json["code"] == "not-found"
    view = asked(api, caller, job_id, "zoom")
    assert view.zoom is not None
    assert (view.zoom.width, view.zoom.height, view.zoom.levels, view.zoom.format) == (*LARGE, 12, "jpeg")
    with Image.open(io.BytesIO(a_result())) as whole:
        truth = np.asarray(whole.convert("RGB")).astype(int)
    for column, row in ((0, 0), (2, 1), (1, 0)):
        tile = caller.get(view.zoom.tiles.format(level=11, column=column, row=row))
        assert (tile.status_code, tile.mimetype) == (200, "image/jpeg")
        assert "private" in tile.headers["Cache-Control"]
        with Image.open(io.BytesIO(tile.data)) as image:
            part = truth[row * 512 : (row + 1) * 512, column * 512 : (column + 1) * 512]
            assert image.size == (part.shape[1], part.shape[0])
            error = np.abs(np.asarray(image).astype(int) - part)
            assert error.max() < 12, f"max {error.max()}, mean {error.mean():.2f}"
    for wrong in ("11/3_0", "11/0_2", "12/0_0", "11/0-0", "x/0_0", "999/0_0"):
        answer = caller.get(f"{path}/zoom/{wrong}")
        assert (answer.status_code, answer.json["code"]) == (404, "not-found"), wrong
    assert caller.get(f"{path}/renditions/zoom/file").status_code == 404


def test_what_cannot_be_made_is_refused_when_asked_for(api: Api, caller: Caller) -> None:
    waiting = caller.job()
    path = f"/v1/jobs/{waiting}/renditions"
    assert caller.post(path, json={"kind": "webp"}).json["code"] == "job-not-finished"
    assert caller.get(f"{path}/webp").json["code"] == "not-found"
    caller.post(f"/v1/jobs/{waiting}/cancel")
    assert caller.post(path, json={"kind": "webp"}).json["code"] == "job-has-no-result"

    wide = caller.job(picture=a_png(4200, 2))
    api.succeed(wide, a_result((16800, 8)))
    refused = caller.post(f"/v1/jobs/{wide}/renditions", json={"kind": "webp"})
    assert (refused.status_code, refused.json["code"]) == (422, "format-cannot-hold-size")
    assert caller.post(f"/v1/jobs/{wide}/renditions", json={"kind": "gif"}).json["code"] == "invalid-request"

    job_id = finished(api, caller, b"not a picture")
    made = asked(api, caller, job_id, "webp")
    assert (made.status, made.url) == ("pending", None), "it is tried again"


def test_the_preview_tells_of_each_strip_of_the_newest_attempt(api: Api, caller: Caller) -> None:
    job_id = caller.job(picture=a_png(64, 48))
    path = f"/v1/jobs/{job_id}"
    assert caller.get(f"{path}/preview").json == {"attempt": 0, "strips": []}
    assert caller.get(f"{path}/thumbnail").json["code"] == "not-found"
    claim = api.work(job_id, lambda *_: None)
    with api.database.reading() as session:
        prefix = session.get_one(Job, job_id).blob_prefix
    with Previews(api.context.storage, prefix, claim.attempt) as previews:
        previews.begins(np.zeros((48, 64, 3), np.uint8), 256, 192)
        previews.made(np.zeros((100, 256, 3), np.uint8))
    view = PreviewView.model_validate(caller.get(f"{path}/preview").json)
    (strip,) = view.strips
    assert (view.attempt, strip.y, strip.width, strip.height) == (1, 0, 256, 100)
    picture = caller.get(strip.url)
    assert (picture.status_code, picture.mimetype) == (200, "image/jpeg")
    with Image.open(io.BytesIO(picture.data)) as image:
        assert image.size == (256, 100)
    with Thumbnails(api.context.storage, prefix, claim.attempt) as thumbnails:
        thumbnails.begins(np.zeros((48, 64, 3), np.uint8), 256, 192)
    assert caller.get(f"{path}/thumbnail?of=input").mimetype == "image/webp"
    for wrong in ("1/input", "x/0000000000-1x1-1.jpeg", "2/0000000000-256x100-1.jpeg", f"{10**10}/0-1x1-1.jpeg"):
        assert caller.get(f"{path}/preview/{wrong}").json["code"] == "not-found", wrong
    # A stranger sees nothing of it.
    assert api.caller().get(strip.url).status_code == 404


def test_pictures_that_were_swept_are_gone_in_every_form(api: Api, caller: Caller) -> None:
    job_id = finished(api, caller)
    asked(api, caller, job_id, "zoom")
    swept(api, job_id)
    path = f"/v1/jobs/{job_id}"
    for each in ("thumbnail", "preview", "preview/1/0000000000-1x1-1.jpeg", "renditions/zoom", "zoom/0/0_0"):
        assert caller.get(f"{path}/{each}").status_code == 410, each
    assert caller.post(f"{path}/renditions", json={"kind": "webp"}).status_code == 410
    again = caller.post("/v1/jobs", json={"input_of": job_id})
    assert (again.status_code, again.json["code"]) == (410, "gone")


def test_a_picture_is_taken_again_without_being_sent_again(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    first = finished(api_on_both, caller)
    caller.job(picture=a_png(9, 9))
    answer = caller.post("/v1/jobs", json={"input_of": first, "model": "srresnet", "scale": 2})
    assert answer.status_code == 202, answer.text
    second = answer.json
    one = caller.get(f"/v1/jobs/{first}").json
    assert second["input"] == one["input"]
    assert (second["model"], second["scale"]) == ("srresnet", 2)
    # The two of one picture are found by it.
    found = caller.get("/v1/jobs", query_string={"input_sha256": one["input"]["sha256"]}).json["data"]
    assert [job["id"] for job in found] == [second["id"], first]
    # The copy is its own: the first may go.
    assert caller.delete(f"/v1/jobs/{first}").status_code == 204
    assert caller.get(f"/v1/jobs/{second['id']}/input").status_code == 302
    assert api_on_both.caller().post("/v1/jobs", json={"input_of": second["id"]}).status_code == 404
    both = caller.post("/v1/jobs", json={"input_of": second["id"], "upload_id": "upl_1"})
    assert both.json["code"] == "invalid-request"
