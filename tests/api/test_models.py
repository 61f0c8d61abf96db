"""Models, those of one's own too, `auto`, previews and reports, as a customer meets them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import BytesIO
from typing import Any

import pytest
from sqlalchemy import insert, select

from api.schemas import JobView, ModelPage, ModelView, ReportView
from shared import catalog, jobs, own_models, workers
from shared.catalog import OwnFile
from shared.db import Database, new_id
from shared.models import Job, Worker
from shared.workers import WorkerFacts
from tests.api.conftest import Api, Caller
from tests.api.test_pages import sign_in
from tests.factories import a_png

MINE = catalog.ModelCard(
    name="mine",
    architecture="Compact",
    scale=2,
    halo_px=32,
    summary="Your own: mine.pth (Compact).",
    guarantee="None.",
    licence="as its author says",
    source_url="",
    origin="The file mine.pth in ENLARGER_MODELS_DIR.",
    weights=OwnFile("/models/mine.pth", "ef" * 32),
    megaflops_per_input_px=1.0,
)
CLEAN = replace(MINE, name="clean", scale=1, largest_scale=1)
REPORT = {
    "psnr_db": 31.5,
    "ssim": 0.97,
    "colour_difference": 0.6,
    "seam_score": 1.02,
    "seams": 3,
    "tiles": 4,
    "tiles_not_finite": 0,
    "bands_flat": 0,
    "bands_done_again": 0,
    "precision": "float32",
    "compare_seconds": 0.002,
}


def offer(database: Database, *cards: catalog.ModelCard, host: str = "host-1") -> None:
    """A worker on that host has just come, with these and all of the catalogue."""
    now = datetime.now(UTC)
    facts = WorkerFacts(
        new_id("images", now),
        "images",
        host,
        1,
        ("cpu.interactive", "cpu.bulk"),
        "cpu",
        models=(*catalog.runnable(), *(card.name for card in cards)),
    )
    with database.transaction() as session:
        workers.enlist(session, facts, samples=[], now=now)
        own_models.offer(session, facts.id, cards, worker_lost_after_seconds=30, now=now)


# --- models of one's own --------------------------------------------------------------------------------------------


def test_a_model_of_ones_own_is_listed_estimated_and_asked_for_by_name(api: Api, caller: Caller) -> None:
    assert caller.submit(model="mine").json["code"] == "model-unavailable"
    offer(api.database, MINE)
    assert "mine" in [model["name"] for model in caller.get("/v1/models").json["data"]]
    view = ModelView.model_validate(caller.get("/v1/models/mine").json)
    assert (view.scale, view.scales, view.architecture, view.sha256) == (2, [2], "Compact", "ef" * 32)
    assert (view.workers, view.loaded_on) == (1, [])
    assert "/models" not in caller.get("/v1/models/mine").text
    assert caller.post("/v1/estimates", json={"width": 9, "height": 9, "model": "mine"}).json["output"]["width"] == 18
    job = caller.submit(model="mine").json
    assert (job["model"], job["scale"], job["routing"]["reason"]) == ("mine", 2, "asked for by name")
    assert job["waits_for"] is None


def test_a_job_whose_model_went_away_with_its_host_says_so(api: Api, caller: Caller) -> None:
    offer(api.database, MINE)
    offer(api.database, host="host-2")
    job_id = caller.submit(model="mine").json["id"]
    address = f"/v1/jobs/{job_id}"
    before = caller.get(address)
    assert before.json["waits_for"] is None
    with api.database.transaction() as session:
        gone = session.scalars(select(Worker).where(Worker.host == "host-1")).one()
        gone.seen_at -= timedelta(seconds=100)
    # It is news to who knows the job as it was, and none to who has heard it.
    after = caller.get(address, headers={"If-None-Match": before.headers["ETag"]})
    assert (
        after.json["waits_for"] == "No live worker of cpu.interactive has the model mine: the job waits until one does."
    )
    assert caller.get(address, headers={"If-None-Match": after.headers["ETag"]}).status_code == 304
    waiting = {"If-None-Match": after.headers["ETag"], "Prefer": "wait=1"}
    assert caller.get(address, headers=waiting).status_code == 304
    JobView.model_validate(after.json)
    # While workers are replaced jobs are taken all the same, also over and over: the model was there lately.
    assert caller.get("/v1/models/mine").json["workers"] == 0
    assert caller.submit(model="mine").json["waits_for"] == after.json["waits_for"]
    metrics = api.caller("admin").get("/metrics").text
    assert 'enlarger_forsaken_jobs{model="mine",queue="cpu.interactive"} 2.0' in metrics


def test_operators_see_what_hosts_have_and_where_it_differs(api: Api, caller: Caller) -> None:
    offer(api.database, MINE)
    offer(api.database, replace(MINE, weights=OwnFile("/models/mine.pth", "ab" * 32)), host="host-2")
    with api.database.transaction() as session:
        for worker, (runtime, speed) in zip(
            session.scalars(select(Worker).order_by(Worker.host)),
            (("ncnn", 1_234_000), ("torch", 560_000)),
            strict=True,
        ):
            worker.models_loaded = ["srgan"]
            worker.speeds = {"srgan": {"runtime": runtime, "pixels_per_second": speed}}
    client = api.app.test_client()
    sign_in(client, api, "operator")
    page = client.get("/admin/workers").text
    assert "Hosts have different models named mine." in page
    assert "abababababab on host-2; efefefefefef on host-1" in page
    assert "ncnn, 1.23 MP/s in" in page
    assert "torch, 0.56 MP/s in" in page
    assert page.count("its own: mine") == 2
    # One that nobody has any more: on the overview, and on the page of the job that waits for it.
    job_id = caller.submit(model="mine").json["id"]
    with api.database.transaction() as session:
        for worker in session.scalars(select(Worker)):
            worker.models = ["srgan"]
    assert "No live worker of cpu.interactive has the model mine." in client.get("/admin").text
    assert (
        "No live worker of cpu.interactive has the model mine: the job waits"
        in client.get(f"/admin/jobs/{job_id}").text
    )


def test_a_network_that_enlarges_nothing_is_not_asked_to(api: Api, caller: Caller) -> None:
    offer(api.database, CLEAN)
    assert caller.submit(model="clean").status_code == 202
    refused = caller.submit(model="clean", scale=2)
    assert (refused.status_code, refused.json["code"]) == (422, "invalid-request")
    assert refused.json["errors"][0]["field"] == "scale"


@pytest.mark.parametrize("card", catalog.CARDS, ids=lambda card: card.name)
def test_every_card_says_where_it_comes_from_and_under_what_licence(api: Api, card: catalog.ModelCard) -> None:
    view = ModelView.model_validate(api.caller().get(f"/v1/models/{card.name}").json)
    assert view.origin
    assert view.licence
    assert view.source_url.startswith("https://")
    assert (view.sha256 is None) == (card.weights is None)
    assert view.scale in view.scales
    assert view.on_gpu.startswith("Unmeasured")


# --- where they are loaded, and jobs go -------------------------------------------------------------------------------


def a_worker(api: Api, *, device: str, models: list[str], seen_seconds_ago: float = 0.0) -> None:
    now = datetime.now(UTC)
    with api.database.transaction() as session:
        session.execute(
            insert(Worker).values(
                id=f"images-{device}-{seen_seconds_ago}",
                kind="images",
                host="here",
                pid=1,
                device=device,
                queues=[f"{device}.interactive", f"{device}.bulk"],
                models_loaded=models,
                started_at=now,
                seen_at=now - timedelta(seconds=seen_seconds_ago),
            )
        )


def test_models_tell_their_cards_and_where_they_are_loaded(api: Api, caller: Caller) -> None:
    a_worker(api, device="gpu", models=["srgan"])
    a_worker(api, device="cpu", models=["srgan"], seen_seconds_ago=3600)
    page = ModelPage.model_validate(caller.get("/v1/models").json)
    assert [model.name for model in page.data] == [card.name for card in catalog.CARDS]
    loaded = {model.name: model.loaded_on for model in page.data}
    assert loaded["srgan"] == ["gpu"]
    assert loaded["srresnet"] == []
    one = caller.get("/v1/models/srgan").json
    assert (one["is_default"], len(one["sha256"]), one["scale"]) == (True, 64, 4)
    missing = caller.get("/v1/models/dalle")
    assert (missing.status_code, missing.json["code"]) == (404, "not-found")


def test_auto_jobs_go_where_a_gpu_is_alive(api: Api, caller: Caller) -> None:
    def queue_of(**fields: str) -> str:
        with api.database.reading() as session:
            return session.get_one(Job, caller.job(**fields)).queue

    assert queue_of() == "cpu.interactive"
    a_worker(api, device="gpu", models=[], seen_seconds_ago=3600)
    assert queue_of() == "cpu.interactive"
    a_worker(api, device="gpu", models=[])
    assert queue_of(priority="bulk") == "gpu.bulk"
    assert queue_of(device="cpu") == "cpu.interactive"


# --- auto -----------------------------------------------------------------------------------------------------------


def test_auto_stays_open_until_a_worker_has_seen_the_picture(api: Api, caller: Caller) -> None:
    job = caller.submit(model="auto").json
    assert (job["model"], job["scale"]) == ("auto", 4)
    assert "when a worker has seen the picture" in job["routing"]["reason"]

    def route(session: Any, claim: jobs.Claim, _now: datetime) -> None:
        jobs.route(session, claim, model="srresnet", reason="auto: like text")

    api.work(job["id"], route)
    view = JobView.model_validate(caller.get(f"/v1/jobs/{job['id']}").json)
    assert (view.model, view.routing.model, view.routing.reason) == ("srresnet", "srresnet", "auto: like text")


# --- previews -------------------------------------------------------------------------------------------------------


def preview(caller: Caller, **fields: Any) -> Any:
    return caller.post("/v1/previews", data={"image": (BytesIO(a_png(200, 150)), "bird.png"), **fields})


def test_a_preview_is_a_job_of_the_middle_through_every_model(api: Api, caller: Caller) -> None:
    answer = preview(caller)
    assert answer.status_code == 202, answer.text
    view = JobView.model_validate(answer.json)
    assert answer.headers["Location"] == f"/v1/jobs/{view.id}"
    assert (view.model, view.scale, view.status) == ("preview", 4, "queued")
    assert view.preview is not None
    assert view.preview.models == [card.name for card in catalog.CARDS]
    assert view.preview.crop.model_dump() == {"x": 52, "y": 27, "width": 96, "height": 96}
    assert view.preview.cells is None
    with api.database.reading() as session:
        job = session.get_one(Job, view.id)
        assert job.expected_seconds > 1
        assert job.format == "png"


def test_a_preview_takes_models_and_a_crop_in_a_form_and_in_json(api: Api, caller: Caller) -> None:
    offer(api.database, MINE)
    made = preview(caller, models="srgan,mine,srgan", crop="10,20,30,40", scale="2").json
    asked = made["preview"]
    with api.database.reading() as session:
        assert session.get_one(Job, made["id"]).needs == "mine"
    assert asked["models"] == ["srgan", "mine"]
    assert asked["crop"] == {"x": 10, "y": 20, "width": 30, "height": 40}
    headers = {"Idempotency-Key": "one"}
    first = caller.post("/v1/previews", data={"image": (BytesIO(a_png()), "a.png")}, headers=headers)
    again = caller.post("/v1/previews", data={"image": (BytesIO(a_png()), "a.png")}, headers=headers)
    assert again.json == first.json
    assert again.headers["Idempotent-Replayed"] == "true"


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"crop": "0,0,300,10"}, "256"),
        ({"crop": "0,0,10"}, "crop"),
        ({"crop": "-1,0,10,10"}, "crop"),
        ({"crop": "190,0,20,10"}, "reaches beyond the picture, which is 200 x 150 px"),
        ({"models": "srgan,nobody"}, "nobody"),
        ({"scale": "9"}, "scale"),
    ],
)
def test_a_preview_that_cannot_be_made_is_refused(caller: Caller, fields: dict[str, str], word: str) -> None:
    refused = preview(caller, **fields)
    assert refused.status_code in (422, 404), refused.text
    assert word in refused.text


def test_an_own_network_of_scale_1_is_left_out_of_a_preview_of_all(api: Api, caller: Caller) -> None:
    offer(api.database, CLEAN, MINE)
    models = preview(caller).json["preview"]["models"]
    assert "mine" in models
    assert "clean" not in models


# --- reports --------------------------------------------------------------------------------------------------------


def test_a_finished_job_has_a_report(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    job_id = caller.job()
    waiting = caller.get(f"/v1/jobs/{job_id}/report")
    assert (waiting.status_code, waiting.json["code"]) == (409, "job-not-finished")
    api_on_both.succeed(job_id, report=REPORT)
    view = ReportView.model_validate(caller.get(f"/v1/jobs/{job_id}/report").json)
    assert view.model_dump() == {"job_id": job_id, "model": "srgan", "scale": 4, **REPORT}
    assert api_on_both.caller(name="stranger").get(f"/v1/jobs/{job_id}/report").status_code == 404


def test_what_was_not_delivered_has_no_report(api: Api, caller: Caller) -> None:
    job_id = caller.job()
    assert caller.post(f"/v1/jobs/{job_id}/cancel").status_code == 202
    answer = caller.get(f"/v1/jobs/{job_id}/report")
    assert (answer.status_code, answer.json["code"]) == (409, "job-has-no-result")
