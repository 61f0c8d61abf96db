"""What every answer carries, and what is answered where nothing is."""

from __future__ import annotations

import gzip

import pytest
from flask import request

from shared.db import Database
from shared.settings import Settings
from shared.storage import Storage
from tests.api.conftest import Api, Caller, running


def test_every_answer_carries_an_id_and_harmless_headers(api: Api, caller: Caller) -> None:
    for path in ("/v1/jobs", "/livez", "/v1/nothing", "/docs", "/"):
        answer = caller.get(path, headers={"X-Request-Id": "mine-1"})
        assert answer.headers["X-Request-Id"] == "mine-1", path
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"]
        assert "unsafe-inline" not in answer.headers["Content-Security-Policy"]
    assert caller.get("/v1/nothing", headers={"X-Request-Id": "mine-1"}).json["request_id"] == "mine-1"
    for harmful in ("a b", "x" * 200, "<script>"):
        fresh = caller.get("/livez", headers={"X-Request-Id": harmful}).headers["X-Request-Id"]
        assert fresh != harmful
        assert len(fresh) == 32


def test_a_method_that_is_not_taken_is_a_problem(caller: Caller) -> None:
    answer = caller.send("PUT", "/v1/jobs")
    assert (answer.status_code, answer.json["code"]) == (405, "method-not-allowed")
    assert "POST" in answer.headers["Allow"]


@pytest.mark.parametrize("path", ["/v1/jobs/x/result", "/v1/nothing", "/nothing"])
def test_every_unknown_address_is_a_problem(caller: Caller, path: str) -> None:
    answer = caller.get(path)
    assert (answer.status_code, answer.mimetype, answer.json["code"]) == (404, "application/problem+json", "not-found")


def test_what_nobody_foresaw_is_logged_and_told_without_its_insides(
    api: Api, caller: Caller, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_down(*_: object, **__: object) -> None:
        raise ZeroDivisionError("the insides")

    monkeypatch.setattr("shared.queries.page_of_jobs", break_down)
    answer = caller.get("/v1/jobs")
    assert (answer.status_code, answer.mimetype, answer.json["code"]) == (500, "application/problem+json", "internal")
    assert "insides" not in answer.text
    assert answer.json["request_id"] == answer.headers["X-Request-Id"]
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_the_key_and_the_links_are_never_logged(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    caller = api.caller()
    job_id = caller.job(webhook_url="https://1.1.1.1/hook?token=canary")
    api.succeed(job_id)
    link = caller.get(f"/v1/jobs/{job_id}/result").headers["Location"]
    caller.get("/v1/jobs?external_id=canary")
    api.app.test_client().get("/v1/jobs", headers={"Authorization": "Bearer enl_canary"})
    logged = "".join(capsys.readouterr())
    assert "http.answered" in logged
    for secret in (caller.secret, link, "canary", "Signature"):
        assert secret not in logged


def test_proxies_are_believed_only_where_a_setting_says_so(
    settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str
) -> None:
    forwarded = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "enlarger.example"}
    for proxies, expected in ((0, "http://localhost/"), (1, "https://enlarger.example/")):
        with running(settings.model_copy(update={"trusted_proxies": proxies})) as api:
            seen: list[str] = []
            api.app.before_request_funcs[None].append(lambda seen=seen: seen.append(request.url_root))
            api.app.test_client().get("/livez", headers=forwarded)
            assert seen == [expected]


def test_scripts_and_style_sheets_come_compressed_and_nothing_else_does(api: Api) -> None:
    caller = api.caller()
    script = "/static/openseadragon/openseadragon.min.js"
    plain = caller.get(script)
    packed = caller.get(script, headers={"Accept-Encoding": "gzip, br"})
    assert "Content-Encoding" not in plain.headers
    assert packed.headers["Content-Encoding"] == "gzip"
    assert "Accept-Encoding" in packed.headers["Vary"]
    assert gzip.decompress(packed.data) == plain.data
    assert len(packed.data) * 3 < len(plain.data)
    assert caller.get(script, headers={"If-None-Match": packed.headers["ETag"]}).status_code == 304
    for other in ("/static/favicon.svg", "/openapi.json"):
        answer = caller.get(other, headers={"Accept-Encoding": "gzip"})
        assert "Content-Encoding" not in answer.headers, other
