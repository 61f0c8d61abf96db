"""POST /v1/batches: many pictures at once, taken whole or not at all."""

from __future__ import annotations

from io import BytesIO

import httpx

from api.schemas import BatchView
from shared.db import Database
from shared.models import Batch
from shared.settings import Settings
from shared.storage import Storage
from tests.api.conftest import Api, Caller, running
from tests.conftest import Receiver, Reply
from tests.factories import a_png

PUBLIC = "https://1.1.1.1/hook"


def test_a_batch_of_files_has_a_status_per_item_in_order(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    images = [(BytesIO(a_png(4 + number, 4)), f"{number}.png") for number in range(5)]
    answer = caller.post("/v1/batches", data={"image": images, "priority": "bulk", "external_id": "all"})
    assert answer.status_code == 202, answer.text
    view = BatchView.model_validate(answer.json)
    assert answer.headers["Location"] == f"/v1/batches/{view.id}"
    assert (view.status, view.total, view.remaining) == ("running", 5, 5)
    widths = [caller.get(f"/v1/jobs/{item.id}").json["input"]["width"] for item in view.items]
    assert widths == [4, 5, 6, 7, 8]
    first = caller.get(f"/v1/jobs/{view.items[0].id}").json
    assert (first["batch_id"], first["priority"], first["external_id"]) == (view.id, "bulk", "all")
    for item in view.items:
        caller.post(f"/v1/jobs/{item.id}/cancel")
    done = BatchView.model_validate(caller.get(f"/v1/batches/{view.id}").json)
    assert (done.status, done.remaining) == ("completed", 0)


def test_a_batch_in_json_names_each_picture(
    settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str, receiver: Receiver
) -> None:
    receiver.pages["/1.png"] = Reply(200, body=a_png(9, 9))
    with running(settings.model_copy(update={"allow_private_addresses": ("127.0.0.0/8",)})) as api:
        caller = api.caller()
        upload = caller.post("/v1/uploads").json
        httpx.put(upload["url"], content=a_png(7, 7)).raise_for_status()
        items = [
            {"image_url": f"{receiver.url}/1.png", "external_id": "one"},
            {"upload_id": upload["upload_id"], "external_id": "two"},
        ]
        settings_block = {"scale": 2, "webhook_url": f"{receiver.url}/hook"}
        answer = caller.post("/v1/batches", json={"items": items, "settings": settings_block})
        assert answer.status_code == 202, answer.text
        assert [item["external_id"] for item in answer.json["items"]] == ["one", "two"]
        for item in answer.json["items"]:
            caller.post(f"/v1/jobs/{item['id']}/cancel")
        listed = caller.get("/v1/webhook-deliveries").json["data"]
        assert sorted(delivery["type"] for delivery in listed) == ["batch.completed", "job.canceled", "job.canceled"]


def test_a_batch_is_taken_whole_or_not_at_all(api: Api, caller: Caller) -> None:
    images = [(BytesIO(a_png()), "0.png"), (BytesIO(b"no picture"), "1.png"), (BytesIO(a_png()), "2.png")]
    answer = caller.post("/v1/batches", data={"image": images})
    assert (answer.status_code, answer.json["code"], answer.json["item"]) == (415, "unsupported-format", 1)
    assert caller.get("/v1/jobs").json["data"] == []
    assert api.context.storage.keys() == []
    with api.database.reading() as session:
        assert session.query(Batch).count() == 0


def test_a_batch_that_is_no_batch_is_refused(
    settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str
) -> None:
    with running(settings.model_copy(update={"max_batch_items": 2})) as api:
        caller = api.caller()
        for body in (
            {},
            {"items": []},
            {"items": [{}]},
            {"items": [{"upload_id": "upl_1", "image_url": PUBLIC}]},
            {"items": [{"upload_id": "upl_1"}] * 3},
            {"items": [{"upload_id": "upl_1"}], "settings": {"image_url": PUBLIC}},
        ):
            answer = caller.post("/v1/batches", json=body)
            assert (answer.status_code, answer.json["code"]) == (422, "invalid-request"), body
        assert caller.post("/v1/batches", data={"scale": "2"}, content_type="multipart/form-data").status_code == 422
