"""Who may do what: keys, scopes, sessions, ownership over every route, and how often."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pytest
from flask.testing import FlaskClient

from api import limits
from api.context import THREADS_KEPT_FREE, Seats
from api.schemas import KeyView
from shared import keys
from shared.db import Database
from shared.models import ApiKey, PageSession
from shared.settings import Settings
from shared.storage import Storage
from tests.api.conftest import Api, Caller, running


def routes(api: Api) -> list[tuple[str, str]]:
    """(method, rule) of everything under /v1, from the app itself."""
    return [
        (method, rule.rule)
        for rule in api.app.url_map.iter_rules()
        if rule.rule.startswith("/v1/")
        for method in sorted(rule.methods & {"GET", "POST", "DELETE"})
    ]


def test_nobody_is_answered_without_a_key(api: Api) -> None:
    http = api.app.test_client()
    revoked = api.caller()
    with api.database.transaction() as session:
        keys.revoke(session, revoked.key_id, now=datetime.now(UTC))
        _, expired = keys.create(
            session, name="old", scopes=["jobs"], now=datetime.now(UTC), expires_at=datetime.now(UTC)
        )
    for header in (None, "Bearer", "Bearer ", "Basic abc", "Bearer enl_nobody", f"Bearer {expired}", "Bearer é"):
        headers = {} if header is None else {"Authorization": header}
        for method, rule in routes(api):
            answer = http.open(re.sub("<.*?>", "job_1", rule), method=method, headers=headers)
            assert (answer.status_code, answer.json["code"]) == (401, "unauthorized"), (method, rule, header)
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert revoked.get("/v1/jobs").status_code == 401


def test_admin_includes_jobs_and_jobs_does_not_include_admin(api: Api) -> None:
    admin, plain = api.caller("admin"), api.caller("jobs")
    assert admin.submit().status_code == 202
    assert admin.get("/metrics").status_code == 200
    refused = plain.get("/metrics")
    assert (refused.status_code, refused.json["code"], refused.json["scope"]) == (403, "forbidden", "admin")
    assert plain.get("/v1/key").json["scopes"] == ["jobs"]


def test_the_key_tells_what_it_is(caller: Caller) -> None:
    view = KeyView.model_validate(caller.get("/v1/key").json)
    assert (view.id, view.name, view.scopes) == (caller.key_id, "tester", ["jobs"])


def test_a_keys_own_view_names_its_webhook_secret_and_not_itself(api: Api, caller: Caller) -> None:
    answer = caller.get("/v1/key")
    assert answer.json["webhook_secret"].startswith("whsec_")
    assert caller.secret not in answer.text
    assert api.caller().get("/v1/key").json["webhook_secret"] != answer.json["webhook_secret"]


def _signed_in(api: Api, caller: Caller) -> tuple[FlaskClient, str]:
    http = api.app.test_client()
    token = keys.sign_in_token(api.context.settings.secret_key, caller.key_id)
    assert http.get(f"/sign-in?token={token}").status_code in (302, 303)
    with http.session_transaction() as session:
        return http, session["csrf"]


def test_a_pages_session_sees_what_its_key_sees(api: Api, caller: Caller) -> None:
    job_id = caller.job()
    http, _ = _signed_in(api, caller)
    assert http.get(f"/v1/jobs/{job_id}").status_code == 200
    assert http.get(f"/v1/jobs/{api.caller().job()}").status_code == 404
    with api.database.transaction() as session:
        keys.revoke(session, caller.key_id, now=datetime.now(UTC))
    assert http.get(f"/v1/jobs/{job_id}").status_code == 401


def test_a_change_by_cookie_needs_the_sessions_token(api: Api, caller: Caller) -> None:
    job_id = caller.job()
    http, token = _signed_in(api, caller)
    for headers in ({}, {"X-CSRF-Token": "x"}, {"X-CSRF-Token": ""}):
        answer = http.post(f"/v1/jobs/{job_id}/cancel", headers=headers)
        assert (answer.status_code, answer.json["code"]) == (403, "forbidden")
    assert http.delete(f"/v1/jobs/{job_id}").status_code == 403
    assert http.post(f"/v1/jobs/{job_id}/cancel", headers={"X-CSRF-Token": token}).status_code == 202


def test_the_sessions_cookie_is_for_this_site_and_not_for_scripts(api: Api, caller: Caller) -> None:
    token = keys.sign_in_token(api.context.settings.secret_key, caller.key_id)
    cookie = api.app.test_client().get(f"/sign-in?token={token}").headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert cookie.startswith("enlarger=")
    assert "Secure" not in cookie
    assert caller.secret not in cookie


def test_the_cookie_is_secure_where_the_setting_says_so(
    settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str
) -> None:
    with running(settings.model_copy(update={"cookie_secure": True})) as api:
        token = keys.sign_in_token(settings.secret_key, api.caller().key_id)
        answer = api.app.test_client().get(f"/sign-in?token={token}", base_url="https://localhost")
        cookie = answer.headers["Set-Cookie"]
        # The three that browsers ask of a cookie with this prefix.
        assert cookie.startswith("__Host-enlarger=")
        assert "; Secure" in cookie
        assert "; Path=/" in cookie
        assert "Domain" not in cookie


def test_signing_in_begins_another_session_and_ends_the_one_before(api: Api, caller: Caller) -> None:
    http, token = _signed_in(api, caller)
    kept = http.get_cookie("enlarger")
    assert kept is not None
    other = api.caller()
    link = keys.sign_in_token(api.context.settings.secret_key, other.key_id)
    assert http.get(f"/sign-in?token={link}").status_code == 303
    assert http.get("/v1/key").json["id"] == other.key_id
    with http.session_transaction() as session:
        assert session["csrf"] != token
    # A copy of the first cookie, kept or planted, is worth nothing.
    http.set_cookie("enlarger", kept.value)
    assert http.get("/v1/key").status_code == 401


def test_after_signing_out_a_copy_of_the_cookie_is_worth_nothing(api: Api, caller: Caller) -> None:
    http, token = _signed_in(api, caller)
    kept = http.get_cookie("enlarger")
    assert kept is not None
    assert http.post("/sign-out", data={"csrf_token": token}).status_code == 303
    http.set_cookie("enlarger", kept.value)
    assert http.get("/v1/key").status_code == 401


def test_a_session_ends_with_its_time_its_key_and_the_deployments_secret(api: Api, caller: Caller) -> None:
    http, _ = _signed_in(api, caller)
    with api.database.transaction() as session:
        (row,) = session.query(PageSession).all()
        assert abs((row.expires_at - datetime.now(UTC)).total_seconds() - 7 * 86400) < 60
        row.expires_at = datetime.now(UTC)
    assert http.get("/v1/key").status_code == 401
    http, _ = _signed_in(api, caller)
    cookie = http.get_cookie("enlarger")
    assert cookie is not None
    with running(api.context.settings.model_copy(update={"secret_key": "another secret"})) as other:
        stranger = other.app.test_client()
        stranger.set_cookie("enlarger", cookie.value)
        assert stranger.get("/v1/key").status_code == 401
    with api.database.transaction() as session:
        keys.revoke(session, caller.key_id, now=datetime.now(UTC))
        assert session.query(PageSession).count() == 0
    assert http.get("/v1/key").status_code == 401


def test_a_rotated_key_has_two_secrets_for_a_while_and_the_same_jobs(api: Api, caller: Caller) -> None:
    job_id = caller.job()
    with api.database.transaction() as session:
        _, fresh = keys.rotate(session, caller.key_id, overlap_seconds=3600, now=datetime.now(UTC))
    renewed = Caller(caller.key_id, fresh, caller.http)
    for one in (caller, renewed):
        assert one.get(f"/v1/jobs/{job_id}").status_code == 200
    with api.database.transaction() as session:
        session.get_one(ApiKey, caller.key_id).previous_ends_at = datetime.now(UTC)
    assert caller.get(f"/v1/jobs/{job_id}").status_code == 401
    assert renewed.get(f"/v1/jobs/{job_id}").status_code == 200


def test_no_app_is_made_without_a_secret_key(settings: Settings) -> None:
    with (
        pytest.raises(ValueError, match="ENLARGER_SECRET_KEY"),
        running(settings.model_copy(update={"secret_key": ""})),
    ):
        pass


def test_requests_over_the_limit_are_told_when_to_come_back(
    settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str
) -> None:
    few = settings.model_copy(update={"rate_limit_per_minute": 3})
    with running(few) as api:
        caller = api.caller()
        for left in (2, 1, 0):
            answer = caller.get("/v1/models")
            assert answer.status_code == 200
            assert "Retry-After" not in answer.headers
            assert answer.headers["RateLimit-Policy"] == '"key";q=3;w=60'
            assert re.fullmatch(rf'"key";r={left};t=\d+', answer.headers["RateLimit"])
            assert answer.headers["X-RateLimit-Limit"] == "3"
            assert answer.headers["X-RateLimit-Remaining"] == str(left)
            assert int(answer.headers["X-RateLimit-Reset"]) > 1_700_000_000
        over = caller.get("/v1/models")
        assert (over.status_code, over.json["code"]) == (429, "rate-limited")
        assert 1 <= int(over.headers["Retry-After"]) <= 60
        assert api.caller().get("/v1/models").status_code == 200
        # Another process of the API counts in the same Redis.
        with running(few) as other:
            twin = Caller(caller.key_id, caller.secret, other.app.test_client())
            assert twin.get("/v1/models").status_code == 429


def test_the_limit_holds_in_the_process_while_redis_is_dead_and_redis_is_asked_again_later(
    settings: Settings, sqlite_database: Database, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    with running(settings.model_copy(update={"rate_limit_per_minute": 3})) as api:
        counter = api.context.limits
        real = limits.RateLimits._ask
        monkeypatch.setattr(
            limits.RateLimits,
            "_ask",
            lambda self, limiter, key_id: (
                asked.append("redis" if limiter is counter._shared else "here"),
                real(self, limiter, key_id),
            )[1],
        )
        caller = api.caller()
        assert [caller.get("/v1/models").status_code for _ in range(4)] == [200, 200, 200, 429]
        assert asked == ["redis", "here", "here", "here", "here"]
        counter._redis_rests_until = 1e-9
        caller.get("/v1/models")
        assert asked[5:] == ["redis", "here"]


def test_some_threads_are_never_held_by_watchers() -> None:
    seats = Seats(THREADS_KEPT_FREE + 2)
    assert [seats.take() is not None for _ in range(3)] == [True, True, False]
    assert Seats(1).take() is not None


def test_a_sign_in_link_stops_working_when_it_is_old_or_forged(api: Api, caller: Caller) -> None:
    http = api.app.test_client()
    forged = keys.sign_in_token("another secret", caller.key_id)
    assert http.get(f"/sign-in?token={forged}").status_code == 401
    assert http.get("/v1/jobs").status_code == 401
