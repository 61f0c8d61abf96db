"""What the pages are to whoever is not a browser: who may see and do what, and what no page may contain."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from api import words
from api.web import own_path
from shared import jobs, keys
from shared.db import clock
from shared.models import JobState
from tests.factories import a_job

API = Path(__file__).resolve().parent.parent.parent / "api"
TEMPLATES = sorted((API / "templates").rglob("*.html"))
SHEET = (API / "static" / "app.css").read_text()


@pytest.fixture
def signed_in(api: Any) -> FlaskClient:
    """A browser's client, signed in as an operator."""
    client: FlaskClient = api.app.test_client()
    sign_in(client, api, "admin")
    return client


def sign_in(client: FlaskClient, api: Any, *scopes: str) -> str:
    """Through the link, as a person does. Returns the key's id."""
    with api.database.transaction() as session:
        key, _ = keys.create(session, name="person", scopes=scopes, now=clock(session))
    token = keys.sign_in_token(api.context.settings.secret_key, key.id)
    assert client.get(f"/sign-in?token={token}").status_code == 303
    return key.id


def csrf_token(client: FlaskClient) -> str:
    found = re.search(r'<meta name="csrf-token" content="([^"]+)">', client.get("/").text)
    assert found is not None
    return found.group(1)


def a_queued_job(api: Any, key_id: str) -> str:
    with api.database.transaction() as session:
        return a_job(session, key_id, clock(session)).id


def state_of(api: Any, job_id: str) -> JobState:
    with api.database.reading() as session:
        return JobState(session.get_one(jobs.Job, job_id).state)


# --- who may ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/admin", "/admin/jobs/job_1", "/admin?status=failed"])
def test_whoever_is_not_signed_in_is_led_to_the_door_and_back(api: Any, path: str) -> None:
    answer = api.app.test_client().get(path)
    assert answer.status_code == 303
    where = answer.headers["Location"]
    assert where == "/sign-in" if path == "/" else where.startswith("/sign-in?next=%2Fadmin")


def test_a_script_that_is_not_signed_in_gets_a_problem_and_no_page(api: Any) -> None:
    answer = api.app.test_client().get("/admin/events", headers={"Accept": "application/json"})
    assert (answer.status_code, answer.json["code"]) == (401, "unauthorized")


def test_the_operators_pages_need_a_scope_of_their_own(api: Any) -> None:
    client = api.app.test_client()
    key_id = sign_in(client, api, "jobs")
    job_id = a_queued_job(api, key_id)
    token = csrf_token(client)
    for path in ("/admin", "/admin/events", f"/admin/jobs/{job_id}", f"/admin/jobs/{job_id}/thumbnail/input"):
        assert client.get(path).status_code == 403
    assert client.post(f"/admin/jobs/{job_id}/cancel", data={"csrf_token": token}).status_code == 403
    assert state_of(api, job_id) == JobState.QUEUED


@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_form_without_the_sessions_token_changes_nothing(api: Any, signed_in: FlaskClient, token: str | None) -> None:
    job_id = a_queued_job(api, sign_in(signed_in, api, "admin"))
    form = {} if token is None else {"csrf_token": token}
    assert signed_in.post(f"/admin/jobs/{job_id}/cancel", data=form).status_code == 403
    assert signed_in.post("/sign-out", data=form).status_code == 403
    assert state_of(api, job_id) == JobState.QUEUED


def test_an_old_or_forged_sign_in_link_is_refused_in_words(api: Any) -> None:
    answer = api.app.test_client().get("/sign-in?token=nonsense")
    assert answer.status_code == 401
    assert "too old or not ours" in answer.text


def test_a_link_of_a_revoked_key_does_not_sign_in(api: Any) -> None:
    with api.database.transaction() as session:
        key, _ = keys.create(session, name="gone", scopes=["jobs"], now=clock(session))
        keys.revoke(session, key.id, now=clock(session))
    token = keys.sign_in_token(api.context.settings.secret_key, key.id)
    assert api.app.test_client().get(f"/sign-in?token={token}").status_code == 401


def test_another_site_cannot_sign_a_person_in(api: Any) -> None:
    caller = api.caller("jobs")
    client = api.app.test_client()
    form = {"key": caller.secret, "csrf_token": forms_token(client.get("/sign-in").text)}
    assert client.post("/sign-in", data=form, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert client.get("/v1/key").status_code == 401
    assert client.post("/sign-in", data=form, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 303
    assert client.get("/v1/key").json["id"] == caller.key_id


def forms_token(page: str) -> str:
    found = re.search(r'name="csrf_token" value="([^"]+)"', page)
    assert found is not None
    return found.group(1)


def test_the_sign_in_form_brings_its_own_token_back_or_is_shown_again(api: Any) -> None:
    caller = api.caller("jobs")
    client = api.app.test_client()
    token = forms_token(client.get("/sign-in").text)
    # Another browser's token is none; an old browser sends no Sec-Fetch-Site.
    for sent in ("", "x", forms_token(api.app.test_client().get("/sign-in").text)):
        refused = client.post("/sign-in", data={"key": caller.secret, "csrf_token": sent, "next": "/admin"})
        assert refused.status_code == 403
        assert "try again" in refused.text
        assert 'value="/admin"' in refused.text
    assert client.get("/v1/key").status_code == 401
    assert client.post("/sign-in", data={"key": caller.secret, "csrf_token": token}).status_code == 303
    assert client.post("/sign-in", data={"key": "enl_wrong", "csrf_token": token}).status_code == 403


def test_another_sites_link_signs_a_person_in_only_when_they_say_so(api: Any) -> None:
    caller = api.caller("jobs", name="somebody else's key")
    client = api.app.test_client()
    token = keys.sign_in_token(api.context.settings.secret_key, caller.key_id)
    page = client.get(f"/sign-in?token={token}&next=/admin", headers={"Sec-Fetch-Site": "cross-site"})
    assert page.status_code == 200
    assert "somebody else&#39;s key" in page.text
    assert client.get("/v1/key").status_code == 401
    form = {"token": token, "csrf_token": forms_token(page.text), "next": "/admin"}
    answer = client.post("/sign-in", data=form, headers={"Sec-Fetch-Site": "same-origin"})
    assert (answer.status_code, answer.headers["Location"]) == (303, "/admin")
    assert client.get("/v1/key").json["id"] == caller.key_id
    form["token"] = "nonsense"
    form["csrf_token"] = csrf_token(client)
    assert client.post("/sign-in", data=form).status_code == 401


@pytest.mark.parametrize(
    "path",
    ["https://evil.example", "//evil.example", "/\\evil.example", "/\t/evil.example", "javascript:alert(1)", "", None],
)
def test_a_link_never_leads_to_another_site(path: str | None) -> None:
    assert own_path(path, "/") == "/"


def test_a_link_leads_to_a_page_of_ours() -> None:
    assert own_path("/admin?status=failed", "/") == "/admin?status=failed"


# --- what they say ---------------------------------------------------------------------------------------------------


def test_a_job_that_is_not_there_is_told_on_a_page(signed_in: FlaskClient) -> None:
    answer = signed_in.get("/admin/jobs/job_nothing", headers={"Accept": "text/html"})
    assert (answer.status_code, answer.mimetype) == (404, "text/html")
    assert "There is no such job." in answer.text


def test_a_cursor_that_is_not_ours_is_told_on_the_page(signed_in: FlaskClient) -> None:
    assert "The cursor is not one this list gave out" in signed_in.get("/admin/jobs?cursor=%%%").text
    answer = signed_in.get("/admin/webhooks?cursor=%%%", headers={"Accept": "text/html"})
    assert (answer.status_code, answer.mimetype) == (422, "text/html")


def test_what_cannot_be_canceled_any_more_is_said_and_not_an_error(api: Any, signed_in: FlaskClient) -> None:
    job_id = a_queued_job(api, sign_in(signed_in, api, "admin"))
    form = {"csrf_token": csrf_token(signed_in), "back": f"/admin/jobs/{job_id}"}
    for said in ("is canceled.", "canceled already"):
        answer = signed_in.post(f"/admin/jobs/{job_id}/cancel", data=form)
        assert (answer.status_code, answer.headers["Location"]) == (303, f"/admin/jobs/{job_id}")
        assert said in signed_in.get(f"/admin/jobs/{job_id}").text


PAGES = ("/admin", "/admin/jobs", "/admin/workers", "/admin/webhooks", "/admin/keys", "/admin/audit")


def first_parts(client: FlaskClient, path: str) -> dict[str, str]:
    """What the page's stream says first."""
    answer = client.get(path)
    assert (answer.status_code, answer.mimetype) == (200, "text/event-stream")
    said = iter(answer.response)
    assert b"retry: " in next(said)
    event = next(said)
    answer.close()
    lines = (event if isinstance(event, str) else event.decode()).splitlines()
    assert lines[0] == "event: parts"
    parts: dict[str, str] = json.loads(lines[1].removeprefix("data: "))
    return parts


def test_the_stream_of_a_page_names_its_very_parts(api: Any, signed_in: FlaskClient) -> None:
    job_id = a_queued_job(api, sign_in(signed_in, api, "admin"))
    for path in (*PAGES, f"/admin/jobs/{job_id}"):
        named = set(re.findall(r'data-live="(\w+)"', signed_in.get(path).text))
        assert named == set(first_parts(signed_in, f"{path}/events"))


def test_a_buttons_way_back_is_the_page_also_when_a_part_was_drawn_anew(api: Any, signed_in: FlaskClient) -> None:
    a_queued_job(api, sign_in(signed_in, api, "admin"))
    part = first_parts(signed_in, "/admin/jobs/events?q=status:queued")["jobs"]
    assert 'name="back" value="/admin/jobs?q=status:queued"' in part


def test_a_stream_holds_a_seat_and_gives_it_back(api: Any, signed_in: FlaskClient) -> None:
    sign_in(signed_in, api, "admin")
    taken = []
    while (give_back := api.context.seats.take()) is not None:
        taken.append(give_back)
    full = signed_in.get("/admin/events", headers={"Accept": "application/json"})
    assert (full.status_code, full.json["code"]) == (503, "too-many-streams")
    taken.pop()()
    for _ in range(3):
        first_parts(signed_in, "/admin/events")
    for give_back in taken:
        give_back()


def test_names_that_customers_give_are_shown_and_not_run(api: Any, signed_in: FlaskClient) -> None:
    key_id = sign_in(signed_in, api, "admin")
    with api.database.transaction() as session:
        job = a_job(session, key_id, clock(session), name="<script>alert(1)</script>.png", external_id='"><b>')
    for page in (signed_in.get("/admin/jobs").text, signed_in.get(f"/admin/jobs/{job.id}").text):
        assert "&lt;script&gt;alert(1)&lt;/script&gt;.png" in page
        assert "<script>alert" not in page
        assert '"><b>' not in page


def test_pages_allow_pictures_of_storage_and_no_inline_script(api: Any, signed_in: FlaskClient) -> None:
    policy = signed_in.get("/").headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert "default-src 'self'" in policy
    assert api.context.settings.storage_endpoint_url in policy
    assert "blob:" in policy


# --- what no page may contain ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: str(path.relative_to(API / "templates")))
def test_templates_have_no_inline_script_or_style_and_load_nothing_from_elsewhere(template: Path) -> None:
    text = template.read_text()
    assert re.findall(r"<script(?![^>]*\ssrc=)", text) == []
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=|javascript:", text) == []
    assert re.findall(r"(?:src|href)=\"(?:https?:)?//", text) == []


def test_every_field_has_a_label() -> None:
    for template in TEMPLATES:
        text = template.read_text()
        # What lies inside a label, or is not seen, needs no other.
        outside = re.sub(r"<label\b(?![^>]*\bfor=).*?</label>", "", text, flags=re.DOTALL)
        for tag in re.findall(r"<(?:input|select|textarea)\b[^>]*>", outside):
            if 'type="hidden"' in tag:
                continue
            if "aria-label=" in tag:
                continue
            name = re.search(r'\sid="([^"]+)"', tag)
            assert name is not None, f"{template.name}: {tag}"
            assert f'for="{name.group(1)}"' in text, f"{template.name}: {tag}"


def colours(block: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance of an sRGB colour."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def palettes() -> Iterator[tuple[str, dict[str, str]]]:
    light, dark = re.findall(r":root \{(.*?)\}", SHEET, flags=re.DOTALL)
    yield "light", colours(light)
    yield "dark", colours(light) | colours(dark)


TEXT_ON_GROUND = [
    *((text, ground) for text in ("ink", "ink-quiet") for ground in ("ground", "surface", "sunken", "stage")),
    *((text, ground) for text in ("accent", "accent-hover") for ground in ("ground", "surface")),
    *((f"{kind}", f"{kind}-soft") for kind in ("good", "bad", "warn", "busy")),
    *(("ink", f"{kind}-soft") for kind in ("good", "bad", "warn", "accent")),
    ("ink-quiet", "accent-soft"),
    ("on-accent", "accent"),
    ("on-accent", "accent-hover"),
    ("bad", "surface"),
    ("surface", "ink"),
]


@pytest.mark.parametrize(("scheme", "palette"), list(palettes()), ids=["light", "dark"])
def test_text_is_readable_on_its_ground(scheme: str, palette: dict[str, str]) -> None:
    poor = {
        f"{text} on {ground}": round(contrast(palette[text], palette[ground]), 2)
        for text, ground in TEXT_ON_GROUND
        if contrast(palette[text], palette[ground]) < 4.5
    }
    assert poor == {}, f"WCAG AA asks for 4.5 : 1 ({scheme})"
    # Borders of fields, and the focus, are to be seen: 3 : 1.
    assert contrast(palette["line-strong"], palette["surface"]) >= 3
    assert contrast(palette["accent"], palette["ground"]) >= 3


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (None, "–"),
        (0.0, "0 ms"),
        (0.21, "210 ms"),
        (0.9999, "1.0 s"),
        (2.44, "2.4 s"),
        (9.96, "10 s"),
        (89.9, "90 s"),
        (90, "2 min"),
        (5400, "2 h"),
        (7 * 86400, "7 d"),
    ],
)
def test_seconds_are_said_to_two_figures_or_so(count: float | None, said: str) -> None:
    assert words.seconds(count) == said


def test_moments_are_said_from_now() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert words.ago(now - timedelta(minutes=3), now) == "3 min ago"
    assert words.ago(now, now) == "now"
    assert words.ago(now + timedelta(minutes=3), now) == "in 3 min"


@pytest.mark.parametrize(
    ("count", "said"),
    [(None, "–"), (0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (51_234, "51 kB"), (999_600, "1.0 MB"),
     (100_000_000, "100 MB"), (2_500_000_000, "2.5 GB")],
)  # fmt: skip
def test_sizes_of_files_are_said_in_decimal_units(count: int | None, said: str) -> None:
    assert words.size_of_file(count) == said


@pytest.mark.parametrize(
    ("width", "said"), [(900, "0.0009 MP"), (110_592, "0.11 MP"), (1_770_000, "1.8 MP"), (50_000_000, "50 MP")]
)
def test_areas_are_said_in_megapixels(width: int, said: str) -> None:
    assert words.megapixels(width, 1) == said
