"""What operators may do, who may do which of it, what is written down about it, and what it costs a customer."""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from PIL import Image

from api import operations
from shared import audit, deliveries, jobs, keys, shards, thumbnails, workers
from shared.db import clock
from shared.errors import InvalidImage
from shared.models import ApiKey, Delivery, DeliveryState, Endpoint, Job, JobState, QueuePause, Worker
from shared.workers import WorkerFacts
from tests.api.conftest import running
from tests.api.test_pages import csrf_token, sign_in, state_of
from tests.factories import a_claim, a_job, a_job_in, a_png, an_endpoint


class Hands:
    """Somebody signed in, and the forms of the pages."""

    def __init__(self, api: Any, *scopes: str) -> None:
        self.api = api
        self.client: FlaskClient = api.app.test_client()
        self.key_id = sign_in(self.client, api, *scopes)
        found = re.search(r'<meta name="csrf-token" content="([^"]+)">', self.client.get("/admin/jobs").text)
        self.token = found.group(1) if found else csrf_token(self.client)

    def post(self, path: str, **form: Any) -> Any:
        return self.client.post(path, data={"csrf_token": self.token, **form})

    def done(self, path: str, **form: Any) -> str:
        """Posts, follows, and returns what is said on the page that follows."""
        answer = self.post(path, **form)
        assert answer.status_code == 303, answer.text
        page = self.client.get(answer.headers["Location"]).text
        return " ".join(re.findall(r'<p class="note (?:good|bad)" role="status">(.*?)</p>', page))


@pytest.fixture
def operator(api: Any) -> Hands:
    return Hands(api, "operator")


def log(api: Any) -> list[tuple[str, str]]:
    """(action, subject), newest first."""
    with api.database.reading() as session:
        return [(entry.action, entry.subject) for entry in audit.entries(session)]


def make_jobs(api: Any, count: int, state: JobState = JobState.QUEUED, **asked: Any) -> list[str]:
    with api.database.transaction() as session:
        now = clock(session)
        key = keys.create(session, name="the shop", scopes=["jobs"], now=now)[0]
        return [a_job_in(state, session, key, now, **asked)[0].id for _ in range(count)]


# --- who may ---------------------------------------------------------------------------------------------------------


def every_action(api: Any) -> dict[str, dict[str, Any]]:
    """Every form of the pages, from the application's own table of routes, with what each needs filled in."""
    [job_id] = make_jobs(api, 1)
    names = {"job_id": job_id, "queue": "cpu.bulk", "worker_id": "w1", "delivery_id": "d", "endpoint_id": "e"}
    found = {}
    for rule in api.app.url_map.iter_rules():
        if rule.rule.startswith("/admin") and "POST" in rule.methods:
            path = re.sub(r"<(\w+)>", lambda name: names.get(name[1], "resume"), rule.rule)
            found[path] = {"id": job_id, "action": "cancel"}
    assert len(found) >= 11
    return found


@pytest.mark.parametrize("scope", ["jobs", "viewer"])
def test_whoever_may_only_look_can_press_nothing(api: Any, scope: str) -> None:
    hands = Hands(api, scope)
    for path, form in every_action(api).items():
        assert hands.post(path, **form).status_code == 403, path
    assert log(api) == []
    with api.database.reading() as session:
        assert session.query(QueuePause).count() == 0


def test_a_viewer_sees_every_page_and_no_button(api: Any) -> None:
    [job_id] = make_jobs(api, 1, JobState.FAILED)
    hands = Hands(api, "viewer")
    for path in ("", "/jobs", f"/jobs/{job_id}", "/workers", "/webhooks", "/keys", "/audit"):
        answer = hands.client.get(f"/admin{path}")
        assert answer.status_code == 200
        forms = re.findall(r'<form[^>]*action="(/admin[^"]*)"', answer.text)
        assert set(forms) <= {"/admin/jobs", "/admin/jobs/review"}, path
        assert 'name="action"' not in answer.text
    assert hands.client.get("/").headers["Location"] == "/admin", "the page for customers is not for this key"


def test_an_operator_has_no_hand_in_keys(api: Any, operator: Hands) -> None:
    assert operator.post("/admin/keys", name="mine", scope="admin").status_code == 403
    assert operator.post(f"/admin/keys/{operator.key_id}/revoke").status_code == 403
    assert "A new key" not in operator.client.get("/admin/keys").text


def test_a_read_only_service_shows_everything_and_changes_nothing(api: Any) -> None:
    settings = api.context.settings.model_copy(update={"admin_read_only": True})
    with running(settings) as read_only:
        hands = Hands(read_only, "admin")
        page = hands.client.get("/admin/workers").text
        assert "Read-only" in page
        assert "Pause" not in page
        for path, form in every_action(read_only).items():
            assert hands.post(path, **form).status_code == 403, path
        assert log(read_only) == []


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_a_shared_job_shows_who_makes_what_of_it(api: Any) -> None:
    [job_id] = make_jobs(api, 1)
    tile = [0, 0, 8, 8, 0, 0, 8, 8]
    with api.database.transaction() as session:
        now = clock(session)
        shards.begin(session, a_claim(session, job_id, now), [[[tile]], [[tile], [tile]]], {})
        shards.claim_to_help(session, job_id, worker_id="a-helper", max_tries=3, lease_seconds=20, now=now)
    page = Hands(api, "viewer").client.get(f"/admin/jobs/{job_id}").text
    shown = page[page.index("<h3>Shards</h3>") :]
    assert "0 of 2 made, 1 under way" in shown
    assert re.findall(r'<rect class="(\w+)"', shown)[:2] == ["track", "busy"]
    assert "shard 1 of 2: under way, 0 of 1 bands" in shown
    assert "a-helper" in shown


def test_each_change_to_a_job_is_written_down_with_who_made_it(api: Any, operator: Hands) -> None:
    [job_id] = make_jobs(api, 1)
    assert "is canceled" in operator.done(f"/admin/jobs/{job_id}/cancel")
    assert "is queued again" in operator.done(f"/admin/jobs/{job_id}/retry")
    assert log(api) == [("job.retry", job_id), ("job.cancel", job_id)]
    with api.database.reading() as session:
        assert {(entry.key_id, entry.key_name) for entry in audit.entries(session)} == {(operator.key_id, "person")}
    page = operator.client.get("/admin/audit").text
    assert "job.cancel" in page
    assert job_id in page


def test_what_was_refused_was_not_done_and_is_not_written_down(api: Any, operator: Hands) -> None:
    [job_id] = make_jobs(api, 1, JobState.SUCCEEDED)
    assert "only queued and running jobs" in operator.done(f"/admin/jobs/{job_id}/cancel")
    assert log(api) == []


def test_a_confirmation_says_how_many_and_changes_nothing(api: Any, operator: Hands) -> None:
    queued = make_jobs(api, 3)
    ended = make_jobs(api, 2, JobState.SUCCEEDED)
    page = operator.post("/admin/jobs/review", action="cancel", id=[*queued, *ended]).text
    assert "Cancel 3 jobs?" in page
    assert "5 were chosen; 2 stay as they are" in page
    assert {state_of(api, job_id) for job_id in queued} == {JobState.QUEUED}
    page = operator.post("/admin/jobs/review", action="delete", id=queued[0]).text
    assert "Delete 1 job?" in page
    assert "cannot be undone" in page
    assert "Nothing was chosen" in operator.done("/admin/jobs/review", action="delete")
    assert operator.post("/admin/jobs/review", action="explode", id=queued).status_code == 422


def test_chosen_jobs_are_canceled_retried_and_deleted_and_no_others(api: Any, operator: Hands) -> None:
    mine, others = make_jobs(api, 3), make_jobs(api, 2)
    assert operator.done("/admin/jobs/many", action="cancel", id=mine) == "3 jobs canceled."
    assert {state_of(api, job_id) for job_id in mine} == {JobState.CANCELED}
    assert operator.done("/admin/jobs/many", action="retry", id=mine[:2]) == "2 jobs queued again."
    assert operator.done("/admin/jobs/many", action="delete", id=mine) == "3 jobs deleted."
    with api.database.reading() as session:
        assert {job.id for job in session.query(Job)} == set(others)
        [deleted, retried, canceled] = audit.entries(session)
    assert (deleted.action, deleted.subject, deleted.detail) == ("job.delete", "3 jobs", {"ids": sorted(mine)})
    assert (retried.action, canceled.action) == ("job.retry", "job.cancel")
    assert {state_of(api, job_id) for job_id in others} == {JobState.QUEUED}


def test_all_that_match_are_taken_over_many_transactions_but_none_that_came_in_since(
    api: Any, operator: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "JOBS_AT_ONCE", 4)
    failed = make_jobs(api, 11, JobState.FAILED)
    queued = make_jobs(api, 2)
    page = operator.client.get("/admin/jobs?q=status:failed").text
    newest = re.search(r'name="newest" value="(\w+)"', page)
    assert newest is not None
    later = make_jobs(api, 1, JobState.FAILED)
    form = {"all": "1", "q": "status:failed", "newest": newest.group(1)}
    assert "Delete 11 jobs?" in operator.post("/admin/jobs/review", action="delete", **form).text
    assert operator.done("/admin/jobs/many", action="delete", **form) == "11 jobs deleted."
    with api.database.reading() as session:
        assert {job.id for job in session.query(Job)} == {*queued, *later}
        entries = audit.entries(session)
    assert [entry.subject for entry in entries] == ["3 jobs", "4 jobs", "4 jobs"]
    assert sorted(job_id for entry in entries for job_id in entry.detail["ids"]) == sorted(failed)
    assert {entry.detail["filter"] for entry in entries} == {"status:failed"}


def test_more_than_one_press_can_do_is_said_and_the_next_goes_on(
    api: Any, operator: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "JOBS_AT_ONCE", 3)
    monkeypatch.setattr(operations, "MANY_JOBS_SECONDS", 0.0)
    make_jobs(api, 5)
    assert "0 jobs canceled. 5 jobs left" in operator.done("/admin/jobs/many", action="cancel", all="1", newest="job_z")
    monkeypatch.setattr(operations, "MANY_JOBS_SECONDS", 60.0)
    assert operator.done("/admin/jobs/many", action="cancel", all="1", newest="job_z") == "5 jobs canceled."


def test_a_job_that_moves_on_meanwhile_is_left_out(api: Any, operator: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    [first, second] = make_jobs(api, 2)

    def cancel_late(session: Any, job_id: str, *, now: datetime) -> Job:
        if job_id == first:
            jobs.cancel(session, first, now=now)
        return jobs.cancel(session, job_id, now=now)

    verb = operations.VERBS["cancel"]
    late = operations.Verb(verb.name, verb.done, verb.states, verb.is_final, cancel_late)
    monkeypatch.setitem(operations.VERBS, "cancel", late)
    assert operator.done("/admin/jobs/many", action="cancel", id=[first, second]) == "1 job canceled."


def test_a_job_is_run_again_as_the_operators_own_and_the_customer_hears_nothing(api: Any, operator: Hands) -> None:
    shop = api.caller("jobs", name="the shop")
    asked = {"scale": "2", "classify": "true", "quality": "80", "format": "webp", "external_id": "order-7"}
    first = shop.job(**asked, ttl_seconds="500")
    api.succeed(first)
    assert "Handed in again" in operator.done(f"/admin/jobs/{first}/again")
    with api.database.reading() as session:
        [made] = [job for job in session.query(Job) if job.id != first]
        job = session.get_one(Job, first)
        same = ("model", "scale", "classify", "quality", "format", "ttl_seconds", "input_sha256", "input_name")
        assert {name: getattr(made, name) for name in same} == {name: getattr(job, name) for name in same}
        assert (made.owner_key_id, made.state) == (operator.key_id, JobState.QUEUED)
        assert (made.external_id, made.webhook_url) == (None, None)
        assert made.blob_prefix != job.blob_prefix
    one, other = io.BytesIO(), io.BytesIO()
    api.context.storage.get(job.input_key, one)
    api.context.storage.get(made.input_key, other)
    assert one.getvalue() == other.getvalue() == a_png()
    assert log(api) == [("job.again", first)]
    assert shop.get(f"/v1/jobs/{made.id}").status_code == 404

    with api.database.transaction() as session:
        jobs.sweep_expired(session, now=clock(session) + timedelta(days=30))
    assert "has been swept" in operator.done(f"/admin/jobs/{first}/again")


# --- queues, workers, webhooks ---------------------------------------------------------------------------------------


def test_a_queue_is_paused_and_resumed(api: Any, operator: Hands) -> None:
    [job_id] = make_jobs(api, 1)
    assert "is paused" in operator.done("/admin/queues/cpu.interactive/pause", back="/admin")
    assert "is paused" in operator.done("/admin/queues/cpu.interactive/pause"), "twice is harmless"
    with api.database.transaction() as session:
        taken = jobs.claim(session, job_id, worker_id="w", device="cpu", lease_seconds=9, now=clock(session))
        assert taken is None
    assert "paused" in operator.client.get("/admin/workers").text
    assert "is open again" in operator.done("/admin/queues/cpu.interactive/resume")
    assert log(api) == [("queue.resume", "cpu.interactive"), ("queue.pause", "cpu.interactive")]
    assert operator.post("/admin/queues/no.such/pause").status_code == 404


def test_a_worker_is_drained_and_resumed(api: Any, operator: Hands) -> None:
    with api.database.transaction() as session:
        facts = WorkerFacts("w1", "images", "box", 1, ("cpu.interactive",), "cpu", "a processor")
        workers.enlist(session, facts, now=clock(session))
    assert "takes no more jobs" in operator.done("/admin/workers/w1/drain")
    assert "drained" in operator.client.get("/admin/workers").text
    with api.database.reading() as session:
        assert session.get_one(Worker, "w1").drained_at is not None
    assert "takes jobs again" in operator.done("/admin/workers/w1/resume")
    assert log(api) == [("worker.resume", "w1"), ("worker.drain", "w1")]
    assert "There is no such worker" in operator.done("/admin/workers/w2/drain")


def test_a_delivery_is_resent_and_an_endpoint_tested_and_turned_on(api: Any, operator: Hands) -> None:
    with api.database.transaction() as session:
        now = clock(session)
        key = keys.create(session, name="the shop", scopes=["jobs"], now=now)[0]
        endpoint = an_endpoint(session, key, now, url="https://shop.example/hook", events=("job.failed",))
        job = a_job(session, key, now)
        jobs.fail(session, a_claim(session, job.id, now), InvalidImage("x"), retry_delay_seconds=1, now=now)
        [delivery_id] = deliveries.due(session, resend_after_seconds=60, now=now)
        claim = deliveries.claim(session, delivery_id, lease_seconds=9, now=now)
        assert claim is not None
        deliveries.turn_off_endpoint(session, claim, reason="the receiver answered 410 Gone", now=now)
        deliveries.abandon(session, claim, error="HTTP 410", status=410, now=now)
    page = operator.client.get("/admin/webhooks?state=abandoned").text
    assert "answered 410" in page
    assert "410 Gone" in page
    assert "goes out" in operator.done(f"/admin/deliveries/{delivery_id}/resend")
    assert "is told of events again" in operator.done(f"/admin/endpoints/{endpoint.id}/turn_on")
    assert "A test event goes out" in operator.done(f"/admin/endpoints/{endpoint.id}/test")
    with api.database.reading() as session:
        assert session.get_one(Delivery, delivery_id).state == DeliveryState.PENDING
        assert session.get_one(Endpoint, endpoint.id).disabled_at is None
        assert session.query(Delivery).filter_by(type="endpoint.test").count() == 1
    assert [action for action, _ in log(api)] == ["endpoint.test", "endpoint.turn_on", "delivery.resend"]
    assert "There is no such endpoint" in operator.done("/admin/endpoints/none/turn_on")


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_is_shown_once_works_at_once_and_stops_when_it_is_revoked(api: Any) -> None:
    hands = Hands(api, "admin")
    answer = hands.post("/admin/keys", name="the shop", scope=["jobs", "viewer"], days="30")
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    [secret] = re.findall(r"enl_[a-z2-7]{32}", answer.text)
    assert "Set-Cookie" not in answer.headers or secret not in answer.headers["Set-Cookie"]
    assert secret not in hands.client.get("/admin/keys").text + hands.client.get("/admin/audit").text
    calls = {"headers": {"Authorization": f"Bearer {secret}"}}
    assert hands.api.app.test_client().get("/v1/jobs", **calls).status_code == 200
    with api.database.reading() as session:
        key = session.query(ApiKey).filter_by(name="the shop").one()
        assert key.expires_at is not None
        assert timedelta(days=29) < key.expires_at - datetime.now(UTC) <= timedelta(days=30)
    assert "is revoked" in hands.done(f"/admin/keys/{key.id}/revoke")
    assert hands.api.app.test_client().get("/v1/jobs", **calls).status_code == 401
    assert [action for action, _ in log(api)] == ["key.revoke", "key.create"]


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"name": "", "scope": "jobs"}, "needs a name"),
        ({"name": "x", "scope": "jobs", "days": "soon"}, "whole number of days"),
        ({"name": "x"}, "scopes are one or more of"),
    ],
)
def test_a_key_that_cannot_be_made_is_told_in_words(api: Any, form: dict[str, str], said: str) -> None:
    assert said in Hands(api, "admin").done("/admin/keys", **form)
    assert log(api) == []


def test_nobody_saws_off_the_branch_they_sit_on(api: Any) -> None:
    hands = Hands(api, "admin")
    assert "the key you are signed in with" in hands.done(f"/admin/keys/{hands.key_id}/revoke")


# --- thumbnails ------------------------------------------------------------------------------------------------------


def with_thumbnail(api: Any, job_id: str, side: thumbnails.Side) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(file, "WEBP")
    with api.database.reading() as session:
        job = session.get_one(Job, job_id)
    key = thumbnails.key(job.blob_prefix, side, job.attempt)
    api.context.storage.put(key, io.BytesIO(file.getvalue()), thumbnails.MIME_TYPE)
    return file.getvalue()


def test_a_thumbnail_is_its_owners_and_the_operators(api: Any) -> None:
    owner, stranger, viewer = api.caller("jobs"), api.caller("jobs"), Hands(api, "viewer")
    job_id = owner.job()
    api.succeed(job_id)
    path = f"/v1/jobs/{job_id}/thumbnail"
    missing = owner.get(path)
    assert (missing.status_code, missing.json["code"]) == (404, "not-found")
    stored = with_thumbnail(api, job_id, "result")
    with_thumbnail(api, job_id, "input")
    for answer in (
        owner.get(path),
        owner.get(f"{path}?of=input"),
        viewer.client.get(f"/admin/jobs/{job_id}/thumbnail/result"),
    ):
        assert (answer.status_code, answer.mimetype, answer.data) == (200, "image/webp", stored)
        assert answer.headers["Cache-Control"].startswith("private, max-age=")
    assert owner.get(f"{path}?of=everything").status_code == 422
    assert stranger.get(path).status_code == 404
    assert api.app.test_client().get(f"/admin/jobs/{job_id}/thumbnail/input").status_code == 303


def test_where_there_is_no_thumbnail_the_page_shows_a_sign(api: Any, operator: Hands) -> None:
    [job_id] = make_jobs(api, 1)
    answer = operator.client.get(f"/admin/jobs/{job_id}/thumbnail/input")
    assert (answer.status_code, answer.headers["Location"]) == (302, "/static/no-picture.svg")
    assert (Path(operations.__file__).parent / "static" / "no-picture.svg").exists()
