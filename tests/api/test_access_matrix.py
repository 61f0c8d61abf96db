"""Every route x every caller: nobody, the owner and a stranger, each with each scope, by key and by a page's session.

The routes come from the application itself. What is expected of one follows from its path where that decides it: all
under /admin is the operator's, and a path that names something owned is its owner's. Every other route stands in
EXPECTED; one that is nowhere fails the first test here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from io import BytesIO
from itertools import product
from typing import Any, Literal

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from api import dashboard
from shared import keys
from tests.api.conftest import Api
from tests.factories import a_png

Kind = Literal["public", "any key", "jobs", "owned", "admin", "session"]

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
SCOPES = (("jobs",), ("admin",), ("jobs", "admin"))
OWNED_PARAMETERS = {"job_id", "batch_id", "endpoint_id", "delivery_id"}

EXPECTED: dict[tuple[str, str], Kind] = {
    ("GET", "/"): "jobs",
    ("GET", "/compat/replicate/outputs/<token>/<name>"): "public",  # by a signed link; another is none of ours
    ("POST", "/compat/replicate/v1/files"): "jobs",
    ("GET", "/compat/replicate/v1/models"): "jobs",
    ("GET", "/compat/replicate/v1/models/<owner>/<name>"): "jobs",
    ("POST", "/compat/replicate/v1/models/<owner>/<name>/predictions"): "jobs",
    ("GET", "/compat/replicate/v1/models/<owner>/<name>/versions"): "jobs",
    ("GET", "/compat/replicate/v1/models/<owner>/<name>/versions/<version>"): "jobs",
    ("GET", "/compat/replicate/v1/predictions"): "jobs",
    ("POST", "/compat/replicate/v1/predictions"): "jobs",
    ("GET", "/docs"): "public",
    ("GET", "/livez"): "public",
    ("GET", "/metrics"): "admin",
    ("GET", "/openapi.json"): "public",
    ("GET", "/problems/<code>"): "public",
    ("GET", "/readyz"): "public",
    ("GET", "/sign-in"): "public",
    ("POST", "/sign-in"): "session",
    ("POST", "/sign-out"): "session",
    ("GET", "/static/<path:filename>"): "public",
    ("POST", "/v1/batches"): "jobs",
    ("POST", "/v1/estimates"): "jobs",
    ("GET", "/v1/jobs"): "jobs",
    ("POST", "/v1/jobs"): "jobs",
    ("GET", "/v1/key"): "any key",
    ("GET", "/v1/models"): "jobs",
    ("GET", "/v1/models/<name>"): "jobs",
    ("POST", "/v1/previews"): "jobs",
    ("POST", "/v1/uploads"): "jobs",
    ("GET", "/v1/webhook-deliveries"): "jobs",
    ("GET", "/v1/webhook-endpoints"): "jobs",
    ("POST", "/v1/webhook-endpoints"): "jobs",
}


@pytest.fixture(autouse=True)
def _live_pages_that_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator's live streams end by themselves after minutes; here they are read to their end."""
    monkeypatch.setattr(dashboard, "LONGEST_STREAM_SECONDS", 0.0)


def kind_of(method: str, rule: str) -> Kind | None:
    if (method, rule) in EXPECTED:
        return EXPECTED[method, rule]
    if rule == "/admin" or rule.startswith("/admin/"):
        return "admin"
    if rule.startswith(("/v1/", "/compat/")) and set(re.findall("<(?:.*?:)?(.*?)>", rule)) & OWNED_PARAMETERS:
        return "owned"
    return None


def every_route(api: Api) -> list[tuple[str, str]]:
    return [
        (method, rule.rule) for rule in api.app.url_map.iter_rules() for method in METHODS if method in rule.methods
    ]


def test_every_route_has_an_expectation_and_every_expectation_a_route(api: Api) -> None:
    routes = every_route(api)
    assert [route for route in routes if kind_of(*route) is None] == [], "say in EXPECTED who may ask for it"
    assert set(EXPECTED) <= set(routes)
    assert {kind_of(*route) for route in routes} == {"public", "any key", "jobs", "owned", "admin", "session"}
    assert all(rule.startswith(("/v1/", "/admin", "/compat/")) or (m, rule) in EXPECTED for m, rule in routes)


@dataclass(frozen=True)
class Asker:
    """Somebody at the door: with a key, with a page's session, or with nothing."""

    http: FlaskClient
    headers: dict[str, str]
    key_id: str = ""

    def ask(self, method: str, path: str) -> TestResponse:
        more: dict[str, Any] = {}
        if method in ("POST", "PUT", "PATCH"):
            # Not a picture, not a URL: what gets past the door is refused for what it is.
            more = {"data": {"back": "/admin"}} if path.startswith(("/admin", "/sign")) else {"json": {}}
        headers = {**self.headers, "Accept": "application/json"}
        # A page's stream has no end: that it was opened is the answer.
        answer = self.http.open(path, method=method, headers=headers, buffered=not path.endswith("/events"), **more)
        if answer.mimetype == "text/event-stream":
            answer.close()
        return answer


def with_key(api: Api, scopes: tuple[str, ...]) -> Asker:
    caller = api.caller(*scopes)
    http = api.app.test_client(use_cookies=False)
    return Asker(http, {"Authorization": f"Bearer {caller.secret}"}, caller.key_id)


def with_session(api: Api, key_id: str) -> Asker:
    http = api.app.test_client()
    token = keys.sign_in_token(api.context.settings.secret_key, key_id)
    assert http.get(f"/sign-in?token={token}").status_code == 303
    with http.session_transaction() as session:
        return Asker(http, {"X-CSRF-Token": session["csrf"]}, key_id)


def belongings(api: Api, asker: Asker) -> dict[str, str]:
    """One of everything that can belong to this key, by the name its id has in paths."""

    def made(path: str, **more: Any) -> Any:
        answer = asker.http.post(path, headers=asker.headers, **more)
        assert answer.status_code in (201, 202), answer.text
        return answer.json

    job = made("/v1/jobs", data={"image": (BytesIO(a_png()), "a.png"), "external_id": f"plan-of-{asker.key_id}"})
    api.succeed(job["id"])
    batch = made("/v1/batches", data={"image": [(BytesIO(a_png()), "a.png")]})
    endpoint = made("/v1/webhook-endpoints", json={"url": f"https://1.1.1.1/hook-of-{asker.key_id}"})
    delivery = made(f"/v1/webhook-endpoints/{endpoint['id']}/test")
    return {
        "job_id": job["id"],
        "batch_id": batch["id"],
        "endpoint_id": endpoint["id"],
        "delivery_id": delivery["id"],
    }


def filled(rule: str, ids: dict[str, str]) -> str:
    others = {"name": "srgan", "code": "not-found", "filename": "app.css"}
    # Of a choice the first.
    rule = re.sub(r"<any\((\w+)[^>]*>", r"\1", rule)
    return re.sub("<(?:.*?:)?(.*?)>", lambda found: {**others, **ids}.get(found[1], "nothing"), rule)


def made_up(ids: dict[str, str]) -> dict[str, str]:
    """Ids of the same shape that nothing has."""
    return {name: value[:-8] + "zzzzzzzz" for name, value in ids.items()}


def said(answer: TestResponse) -> tuple[int, dict[str, Any]]:
    """What an answer says, without what is different each time."""
    body = dict(answer.json) if isinstance(answer.json, dict) else {}
    body.pop("request_id", None)
    return answer.status_code, body


def test_nobody_gets_further_than_the_door(api: Api) -> None:
    nobody = Asker(api.app.test_client(), {})
    for method, rule in every_route(api):
        answer = nobody.ask(method, filled(rule, dict.fromkeys(OWNED_PARAMETERS, "job_1")))
        if kind_of(method, rule) == "public":
            assert answer.status_code not in (401, 403), (method, rule)
        elif rule == "/sign-in":
            assert answer.status_code == 403, "the form's own token is missing"
        else:
            assert (answer.status_code, answer.json["code"]) == (401, "unauthorized"), (method, rule)


@pytest.mark.parametrize(("scopes", "way"), list(product(SCOPES, ("key", "session"))))
def test_each_caller_gets_what_is_theirs_and_nothing_else(api: Api, scopes: tuple[str, ...], way: str) -> None:
    # Given somebody with one of everything, and a stranger of each kind with nothing
    owner = with_key(api, scopes)
    ids = belongings(api, owner)
    strangers = [with_key(api, each) for each in SCOPES]
    if way == "session":
        owner = with_session(api, owner.key_id)
        strangers = [with_session(api, stranger.key_id) for stranger in strangers]
    # What deletes or ends comes last.
    routes = sorted(every_route(api), key=lambda route: (route[0] == "DELETE", route[1] == "/sign-out", route[1]))
    for stranger, its_scopes in zip(strangers, SCOPES, strict=True):
        for method, rule in routes:
            kind = kind_of(method, rule)
            if kind in ("public", "session"):
                continue
            where = (method, rule, its_scopes)
            may_operate = kind == "admin" and "admin" in its_scopes
            # An operator acts on everybody's: here on nothing, lest what they make of it is taken for theirs.
            answer = stranger.ask(method, filled(rule, made_up(ids) if may_operate else ids))
            if kind == "admin":
                if may_operate:
                    assert answer.status_code not in (401, 403), where
                    continue
                assert said(answer)[0] == 403, where
                assert answer.json["code"] == "forbidden", where
            elif kind == "owned":
                # It cannot be told from what is not there at all.
                assert said(answer)[0] == 404, (where, answer.text)
                assert said(answer) == said(stranger.ask(method, filled(rule, made_up(ids)))), where
            else:
                assert answer.status_code not in (401, 403), where
            for mine in (*ids.values(), f"plan-of-{owner.key_id}", f"hook-of-{owner.key_id}"):
                assert mine not in answer.text, where
    for method, rule in routes:
        if kind_of(method, rule) == "owned":
            answer = owner.ask(method, filled(rule, ids))
            assert answer.status_code not in (401, 403), (method, rule, answer.text)
            assert said(answer) != said(owner.ask(method, filled(rule, made_up(ids)))), (method, rule)
        elif kind_of(method, rule) == "admin":
            refused = owner.ask(method, filled(rule, made_up(ids))).status_code == 403
            assert refused == ("admin" not in scopes), (method, rule)
    lists = {"/v1/jobs": "job_id", "/v1/webhook-endpoints": "endpoint_id", "/v1/webhook-deliveries": "delivery_id"}
    another = with_key(api, scopes)
    mine = belongings(api, another)
    for path, name in lists.items():
        assert mine[name] in another.ask("GET", path).text
        assert not any(theirs in another.ask("GET", path).text for theirs in ids.values())


@pytest.mark.parametrize("scope", ["viewer", "operator"])
def test_who_only_runs_the_queue_gets_nothing_of_v1(api: Api, scope: str) -> None:
    """What such a key may do under /admin is tested form by form (`test_operations.py`)."""
    ids = belongings(api, with_key(api, ("jobs",)))
    asker = with_key(api, (scope,))
    for method, rule in every_route(api):
        if kind_of(method, rule) in ("jobs", "owned") and rule != "/":
            answer = asker.ask(method, filled(rule, ids))
            assert (answer.status_code, answer.json["code"]) == (403, "forbidden"), (method, rule)


@pytest.mark.parametrize("scopes", SCOPES)
def test_by_session_every_change_needs_the_sessions_token(api: Api, scopes: tuple[str, ...]) -> None:
    owner = with_key(api, scopes)
    ids = belongings(api, owner)
    signed_in = with_session(api, owner.key_id)
    tokens: tuple[dict[str, str], ...] = ({}, {"X-CSRF-Token": ""}, {"X-CSRF-Token": "x" * 32}, {"X-CSRF-Token": "é"})
    changing = [(method, rule) for method, rule in every_route(api) if method != "GET"]
    assert len(changing) >= 15
    for (method, rule), headers in product(changing, tokens):
        answer = Asker(signed_in.http, headers).ask(method, filled(rule, ids))
        assert answer.status_code == 403, (method, rule, headers)
    assert owner.ask("GET", f"/v1/jobs/{ids['job_id']}").json["status"] == "succeeded"


def test_every_answer_is_safe_to_show(api: Api) -> None:
    """No page runs what stands inline, none is framed, no answer is guessed to be something else."""
    operator = with_key(api, ("admin",))
    ids = belongings(api, operator)
    signed_in = with_session(api, operator.key_id)
    pages = 0
    for method, rule in every_route(api):
        if method != "GET" or rule.endswith("/events"):
            continue
        signed_in.http.get("/")
        answer = signed_in.http.get(filled(rule, ids), headers={"Accept": "text/html,*/*"}, buffered=True)
        assert answer.headers["X-Content-Type-Options"] == "nosniff", rule
        if rule.startswith("/static"):
            continue
        policy = answer.headers["Content-Security-Policy"]
        assert "unsafe" not in policy, rule
        assert "frame-ancestors 'none'" in policy, rule
        assert "'self'" in policy or "default-src 'none'" in policy, rule
        if answer.mimetype == "text/html" and answer.status_code == 200:
            pages += 1
            assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", answer.text), rule
    assert pages >= 4


@pytest.mark.parametrize("delivery", ["redirect", "stream"])
def test_no_picture_is_shown_inline_from_the_apis_own_origin(api: Api, delivery: str) -> None:
    object.__setattr__(api.context, "settings", api.context.settings.model_copy(update={"result_delivery": delivery}))
    owner = with_key(api, ("jobs",))
    ids = belongings(api, owner)
    for part in ("input", "result"):
        answer = owner.ask("GET", f"/v1/jobs/{ids['job_id']}/{part}")
        if delivery == "redirect":
            assert answer.status_code == 302
            assert not answer.headers["Location"].startswith("/")
            assert "response-content-disposition=attachment" in answer.headers["Location"]
        else:
            assert answer.status_code == 200
            assert answer.headers["Content-Disposition"].startswith("attachment")
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
