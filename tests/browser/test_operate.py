"""The operator: sees what waits and what went wrong, and puts it right."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from shared import jobs, workers
from shared.db import clock
from shared.errors import InvalidImage
from shared.models import Delivery, DeliveryState, Job, JobState
from tests.browser.conftest import SERVICE_AWAY, Site, Watched
from tests.browser.looking import PICTURES, SCREENS, bytes_loaded, first_paint_ms, keep_picture, serious_faults
from tests.browser.operated import Day, fill

OpenPage = Callable[..., Watched]

MOST_BYTES = 300_000
MOST_FIRST_PAINT_MS = 300
"""On a quiet machine; the test is content with ten times that, and writes down what it was beside the pictures."""


@pytest.fixture
def day(site: Site) -> Day:
    return fill(site, history=60)


def pages_of(day: Day) -> dict[str, str]:
    return {
        "overview": "/admin",
        "jobs": "/admin/jobs",
        "job": f"/admin/jobs/{day.done}",
        "shared": f"/admin/jobs/{day.shared}",
        "workers": "/admin/workers",
        "webhooks": "/admin/webhooks",
        "keys": "/admin/keys",
        "audit": "/admin/audit",
    }


def beat(site: Site) -> None:
    """The workers are heard of now."""
    with site.database.transaction() as session:
        for worker in session.query(workers.Worker):
            if worker.device != "gpu":
                worker.seen_at = clock(session)


# --- how it looks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "other_screen"), [("light", "phone"), ("dark", "4k")])
def test_every_page_fits_every_screen_and_hinders_nobody(
    site: Site, day: Day, open_page: OpenPage, scheme: str, other_screen: str
) -> None:
    page = open_page(day.operator, "/admin", color_scheme=scheme).page
    told = []
    for name, path in pages_of(day).items():
        beat(site)
        for screen in ("laptop", other_screen):
            size = SCREENS[screen]
            page.set_viewport_size(size)
            page.goto(site.url + path)
            expect(page.locator("#pulse")).to_have_text("live")
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= size["width"], f"{name} is {width} px wide on a {screen}"
            # A whole page of a 4K screen takes seconds to put down, and what is below looks as it does on a laptop.
            keep_picture(page, f"{name}-{screen}-{scheme}", full_page=screen != "4k")
            if screen == "laptop":
                assert serious_faults(page) == [], name
                paint_ms, weight = first_paint_ms(page), bytes_loaded(page)
                told.append(f"    {name:<10} first paint {paint_ms:5.0f} ms, {weight / 1000:4.0f} kB")
                assert weight < MOST_BYTES, name
                assert paint_ms < 10 * MOST_FIRST_PAINT_MS, name
    (PICTURES / f"figures-{scheme}.txt").write_text("\n".join((*told, "")))


def test_the_pages_can_be_used_without_a_mouse(site: Site, day: Day, open_page: OpenPage) -> None:
    page = open_page(day.operator, "/admin/jobs").page
    expect(page.locator("#pulse")).to_have_text("live")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the page")).to_be_focused()
    page.get_by_label("Filter jobs").focus()
    page.keyboard.type("status:failed")
    page.keyboard.press("Enter")
    page.wait_for_url("**/admin/jobs?q=status*failed")
    box = page.get_by_role("checkbox", name="Choose poster-front.webp")
    box.focus()
    page.keyboard.press("Space")
    expect(box).to_be_checked()
    page.get_by_role("button", name="Delete …").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Delete 1 job?")).to_be_visible()


# --- what is seen, live ----------------------------------------------------------------------------------------------


def test_the_operator_sees_the_queue_move_without_reloading(site: Site, open_page: OpenPage) -> None:
    key_id, _ = site.key("admin", name="operator")
    waiting = site.hand_in(key_id, "waiting.png")
    page = open_page(key_id, "/admin").page
    for server in ("SQL", "Redis", "Storage"):
        expect(page.locator(".health")).to_contain_text(f"{server}: answers")
    expect(page.locator("[data-live=queues]")).to_contain_text("No worker serves cpu.interactive.")

    site.enlist_worker()
    expect(page.locator("[data-live=queues]")).not_to_contain_text("No worker serves")
    page.goto(f"{site.url}/admin/jobs")
    site.progress(site.claim(waiting), 1, 2)
    row = page.get_by_role("row").filter(has_text="waiting.png")
    expect(row).to_contain_text("running")
    expect(row.locator("progress")).to_have_attribute("value", "0.5")


def test_a_page_has_one_stream_and_none_while_it_is_hidden(site: Site, open_page: OpenPage) -> None:
    key_id, _ = site.key("admin")
    page = open_page(key_id, "/admin/jobs").page
    expect(page.locator("#pulse")).to_have_text("live")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/events" in request.url else None)

    def hide(hidden: bool) -> None:
        page.evaluate(
            """(hidden) => {
                Object.defineProperty(document, "hidden", {configurable: true, get: () => hidden});
                document.dispatchEvent(new Event("visibilitychange"));
            }""",
            hidden,
        )

    hide(True)
    expect(page.locator("#pulse")).to_have_text("paused")
    site.hand_in(key_id, "unseen.png")
    page.wait_for_timeout(2500)
    assert asked == []
    expect(page.locator("[data-live=jobs]")).not_to_contain_text("unseen.png")
    hide(False)
    expect(page.locator("[data-live=jobs]")).to_contain_text("unseen.png")
    assert len(asked) == 1


def test_what_is_ticked_and_unfolded_stays_so_when_the_page_is_drawn_anew(site: Site, open_page: OpenPage) -> None:
    key_id, _ = site.key("admin")
    site.hand_in(key_id, "first.png")
    page = open_page(key_id, "/admin/jobs").page
    page.get_by_role("checkbox", name="Choose first.png").check()
    site.hand_in(key_id, "second.png")
    expect(page.locator("[data-live=jobs]")).to_contain_text("second.png")
    expect(page.get_by_role("checkbox", name="Choose first.png")).to_be_checked()
    expect(page.get_by_role("checkbox", name="Choose second.png")).not_to_be_checked()


def test_a_service_that_goes_away_is_told_and_comes_back(site: Site, open_page: OpenPage) -> None:
    key_id, _ = site.key("admin")
    watched = open_page(key_id, "/admin")
    watched.expected = [*SERVICE_AWAY]
    expect(watched.page.locator("#pulse")).to_have_text("live")
    site.stop()
    expect(watched.page.locator("#stale")).to_be_visible()
    site.start()
    expect(watched.page.locator("#stale")).to_be_hidden()
    expect(watched.page.locator("#pulse")).to_have_text("live")


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_the_filter_stands_in_the_address_and_says_what_it_does_not_know(site: Site, open_page: OpenPage) -> None:
    admin, _ = site.key("admin")
    customer, _ = site.key("jobs", name="customer")
    failed = site.hand_in(customer, "failed.png", external_id="order-1")
    site.hand_in(customer, "queued.png")
    site.fail(site.claim(failed), InvalidImage("The picture ends in the middle."))
    page = open_page(admin, "/admin/jobs").page
    rows = page.locator("[data-live=jobs] tbody tr")
    expect(rows).to_have_count(2)

    page.get_by_label("Filter jobs").fill("status:failed key:customer")
    page.get_by_role("button", name="Filter").click()
    assert "q=status%3Afailed+key%3Acustomer" in page.url
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("invalid-image")
    expect(page.get_by_label("Filter jobs")).to_have_value("status:failed key:customer")

    page.get_by_label("Filter jobs").fill("statsu:failed")
    page.get_by_role("button", name="Filter").click()
    expect(page.get_by_role("alert")).to_contain_text("There is no filter `statsu:`. There are status:")
    page.get_by_role("link", name="Clear").click()
    expect(rows).to_have_count(2)
    page.get_by_role("link", name="1 failed").click()
    expect(rows).to_have_count(1)


def test_older_jobs_are_a_page_further(site: Site, open_page: OpenPage) -> None:
    key_id, _ = site.key("admin")
    for number in range(30):
        site.hand_in(key_id, f"picture-{number}.png")
    page = open_page(key_id, "/admin/jobs").page
    rows = page.locator("[data-live=jobs] tbody tr")
    expect(rows).to_have_count(25)
    page.get_by_role("link", name="Older").click()
    expect(rows).to_have_count(5)
    page.get_by_role("link", name="Newest").click()
    expect(rows).to_have_count(25)


def test_all_that_match_are_canceled_after_a_confirmation_that_says_how_many(site: Site, open_page: OpenPage) -> None:
    key_id, _ = site.key("operator", name="operator")
    for number in range(30):
        site.hand_in(key_id, f"cat-{number}.png")
    dog = site.hand_in(key_id, "dog.png")
    page = open_page(key_id, "/admin/jobs?q=cat").page
    page.get_by_label("All 30 that match").check()
    page.get_by_role("button", name="Cancel …").click()
    expect(page.get_by_role("heading", name="Cancel 30 jobs?")).to_be_visible()
    assert serious_faults(page) == []
    keep_picture(page, "review-laptop-light")
    page.get_by_role("button", name="Cancel 30 jobs").click()
    expect(page.get_by_role("status").filter(has_text="30 jobs canceled.")).to_be_visible()
    assert page.url.endswith("/admin/jobs?q=cat"), "back to where it was chosen"
    with site.database.reading() as session:
        assert {job.id for job in session.query(Job).filter_by(state=JobState.QUEUED)} == {dog}

    # All that are shown, by one box; and changing one's mind.
    page.get_by_label("All that are shown").check()
    expect(page.get_by_role("checkbox", name="Choose cat-29.png")).to_be_checked()
    page.get_by_role("button", name="Delete …").click()
    expect(page.get_by_role("heading", name="Delete 25 jobs?")).to_be_visible()
    page.get_by_role("link", name="Leave them as they are").click()
    expect(page.locator("[data-live=jobs] tbody tr")).to_have_count(25)


def test_a_job_shows_its_attempts_bands_memory_and_deliveries(site: Site, day: Day, open_page: OpenPage) -> None:
    page = open_page(day.operator, "/admin/jobs").page
    page.get_by_role("link", name="chelsea.png").click()
    expect(page.get_by_role("heading", name="chelsea.png")).to_be_visible()
    expect(page.get_by_alt_text("The result, small")).to_be_visible()
    for side in ("input", "result"):
        drawn = page.get_by_alt_text(f"The {side}, small")
        assert drawn.evaluate("image => image.complete && image.naturalWidth") == 192 if side == "input" else 256

    attempts = page.locator("[data-live=attempts]")
    expect(attempts.get_by_role("heading", name="Attempt 2")).to_be_visible()
    expect(attempts).to_contain_text("the attempt went wrong")
    newest = attempts.locator("li").first
    expect(newest.get_by_role("img", name=re.compile("Phases: fetch .*, upscale .*, store"))).to_be_visible()
    bands = newest.get_by_role("img", name=re.compile(r"9 of 9 bands done, the slowest in .* 1 done again"))
    expect(bands.locator("rect")).to_have_count(10)
    expect(bands.locator("rect.again title")).to_have_text(re.compile("band 6 of 9: .* 6 tiles more than planned"))
    expect(newest.get_by_role("img", name=re.compile(r"Memory over time, at most 1\.\d GB"))).to_be_visible()

    deliveries = page.locator("[data-live=deliveries]")
    deliveries.get_by_text("2, last answered 503").click()
    expect(deliveries).to_contain_text("HTTP 503")
    deliveries.get_by_role("button", name="Resend job.succeeded").click()
    expect(page.get_by_role("status").filter(has_text="goes out to")).to_be_visible()
    with site.database.reading() as session:
        [delivery] = session.query(Delivery).filter_by(job_id=day.done)
        assert (delivery.state, delivery.tries_used) == (DeliveryState.PENDING, 0)

    expect(page.locator("#curl")).to_contain_text("--form-string external_id=order-1042")
    page.get_by_role("button", name="Run again with these settings").click()
    expect(page.get_by_role("status").filter(has_text="Handed in again")).to_be_visible()
    expect(page.locator("[data-live=job_head]")).to_contain_text("run again by an operator")


def test_a_failed_job_is_retried_and_a_job_that_is_deleted_is_gone(site: Site, day: Day, open_page: OpenPage) -> None:
    watched = open_page(day.operator, f"/admin/jobs/{day.failed}")
    watched.expected = [f"{day.failed}/events (404|410)", "console: .* 404 "]
    page = watched.page
    expect(page.locator("[data-live=job_head]")).to_contain_text("31 of 480 rows could be read.")
    expect(page.locator("[data-live=job_head]")).to_contain_text("Trying the same again cannot help.")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator("[data-live=job_head]")).to_contain_text("retrying")
    # Whoever has it open while another deletes it is told.
    expect(page.locator("#pulse")).to_have_text("live")
    with site.database.transaction() as session:
        jobs.remove(session, day.failed, now=clock(session))
    expect(page.locator("#pulse")).to_have_text("deleted")


# --- workers, queues, keys, audit ------------------------------------------------------------------------------------


def test_a_queue_is_paused_and_a_worker_drained_and_both_resumed(site: Site, open_page: OpenPage) -> None:
    key_id, _ = site.key("operator", name="night shift")
    site.enlist_worker()
    page = open_page(key_id, "/admin/workers").page
    processes, queues = page.locator("[data-live=workers]"), page.locator("[data-live=pauses]")
    expect(processes).to_contain_text("alive")
    page.get_by_role("button", name="Pause cpu.interactive").click()
    expect(queues.get_by_role("row", name="cpu.interactive")).to_contain_text("paused")
    page.get_by_role("button", name="Drain process 1").click()
    expect(processes).to_contain_text("drained")
    page.get_by_role("button", name="Resume cpu.interactive").click()
    page.get_by_role("button", name="Resume process 1").click()
    expect(processes).to_contain_text("alive")
    expect(queues).not_to_contain_text("paused")
    page.get_by_role("link", name="Audit").click()
    rows = page.locator("[data-live=audit] tbody tr")
    expect(rows).to_have_count(4)
    expect(rows.first).to_contain_text("night shift")
    expect(rows.first).to_contain_text("worker.resume")


def test_a_key_is_created_shown_once_and_revoked(site: Site, open_page: OpenPage) -> None:
    key_id, _ = site.key("admin", name="operator")
    page = open_page(key_id, "/admin/keys").page
    page.get_by_label("Name").fill("the shop")
    page.get_by_label("Ends after days").fill("30")
    page.get_by_role("button", name="Create").click()
    expect(page.locator("#secret")).to_have_text(re.compile("^enl_[a-z2-7]{32}$"))
    assert serious_faults(page) == []
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name=re.compile("Copied|Selected"))).to_be_visible()
    page.get_by_role("link", name="All keys").click()
    row = page.get_by_role("row").filter(has_text="the shop")
    expect(row).to_contain_text("good")
    row.get_by_text("Revoke …").click()
    row.get_by_role("button", name="Revoke the shop").click()
    expect(row).to_contain_text("revoked")


def test_a_viewer_sees_and_cannot_touch(site: Site, day: Day, open_page: OpenPage) -> None:
    key_id, _ = site.key("viewer", name="visitor")
    page = open_page(key_id, "/").page
    page.wait_for_url("**/admin")
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()
    for path in pages_of(day).values():
        page.goto(site.url + path)
        expect(page.locator("#pulse")).to_have_text("live")
        expect(page.locator("main button:not([data-copy])").filter(has_not_text="Filter")).to_have_count(0)


# --- the door --------------------------------------------------------------------------------------------------------


def test_a_key_without_the_scope_is_told_so(site: Site, open_page: OpenPage) -> None:
    key_id, _ = site.key("jobs")
    watched = open_page(key_id, "/admin")
    watched.expected = ["/admin 403", "console: .* 403 "]
    expect(watched.page.locator("main")).to_contain_text("This key may not do that")


def test_signing_in_with_a_key_leads_to_where_one_was_going(site: Site, open_page: OpenPage) -> None:
    _, secret = site.key("admin")
    watched = open_page(None, "/admin/jobs?q=status:failed")
    watched.expected = ["/sign-in 401", "console: .* 401 "]
    page = watched.page
    expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_label("API key").fill("enl_not_a_key_at_all_really")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("not known")
    page.get_by_label("API key").fill(secret)
    page.keyboard.press("Enter")
    page.wait_for_url("**/admin/jobs?q=status:failed")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("status")).to_have_text("You are signed out.")
    page.goto(f"{site.url}/admin")
    expect(page.get_by_label("API key")).to_be_visible()
