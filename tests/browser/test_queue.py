"""The operator: sees what waits and what went wrong, and puts it right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from shared import deliveries
from shared.db import clock
from shared.errors import InvalidImage
from shared.models import Delivery, DeliveryState, JobState
from tests.browser.conftest import Site, Watched


def test_the_operator_sees_the_queue_move_without_reloading(site: Site, open_page: Callable[..., Watched]) -> None:
    key_id, _ = site.key("admin", name="operator")
    waiting = site.hand_in(key_id, "waiting.png")
    page = open_page(key_id, "/admin").page
    for server in ("SQL", "Redis", "Storage"):
        expect(page.locator(".health")).to_contain_text(f"{server}: answers")
    expect(page.locator("[data-live=queues]")).to_contain_text("No worker serves cpu.interactive.")
    expect(page.locator("[data-live=workers]")).to_contain_text("No worker is at work.")

    site.enlist_worker()
    expect(page.locator("[data-live=queues]")).not_to_contain_text("No worker serves")
    expect(page.locator("[data-live=workers]")).to_contain_text("alive")
    site.progress(site.claim(waiting), 1, 2)
    row = page.get_by_role("row").filter(has_text="waiting.png")
    expect(row).to_contain_text("running")
    expect(row.locator("progress")).to_have_attribute("value", "0.5")


def test_the_filter_stands_in_the_address_and_buttons_lead_back_to_it(
    site: Site, open_page: Callable[..., Watched]
) -> None:
    admin, _ = site.key("admin")
    customer, _ = site.key("jobs", name="customer")
    failed = site.hand_in(customer, "failed.png", external_id="order-1")
    queued = site.hand_in(customer, "queued.png")
    site.fail(site.claim(failed), InvalidImage("The picture ends in the middle."))
    page = open_page(admin, "/admin").page
    rows = page.locator("[data-live=jobs] tbody tr")
    expect(rows).to_have_count(2)

    page.get_by_label("Status", exact=True).select_option("failed")
    page.get_by_role("button", name="Filter").click()
    assert "status=failed" in page.url
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("invalid-image")
    expect(rows).to_contain_text("customer")

    # Retry: the job leaves the list of failed ones, the filter stays.
    rows.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("status").filter(has_text="is queued again")).to_be_visible()
    assert "status=failed" in page.url
    expect(page.locator("[data-live=jobs]")).to_contain_text("No such job.")
    assert site.job(failed).state == JobState.QUEUED

    page.get_by_role("link", name="Clear").click()
    page.get_by_label("External id").fill("order-1")
    page.get_by_role("button", name="Filter").click()
    expect(rows).to_have_count(1)

    page.goto(f"{site.url}/admin?id={queued}")
    rows.get_by_role("button", name="Cancel").click()
    expect(rows).to_contain_text("canceled")
    assert site.job(queued).state == JobState.CANCELED


def test_older_jobs_are_a_page_further(site: Site, open_page: Callable[..., Watched]) -> None:
    key_id, _ = site.key("admin")
    for number in range(30):
        site.hand_in(key_id, f"picture-{number}.png")
    page = open_page(key_id, "/admin").page
    rows = page.locator("[data-live=jobs] tbody tr")
    expect(rows).to_have_count(25)
    page.get_by_role("link", name="Older").click()
    expect(rows).to_have_count(5)
    page.get_by_role("link", name="Newest").click()
    expect(rows).to_have_count(25)


def test_a_job_has_a_page_with_its_attempts_and_deliveries_and_resend(
    site: Site, open_page: Callable[..., Watched]
) -> None:
    key_id, _ = site.key("admin")
    job_id = site.hand_in(key_id, "failed.png", webhook_url="https://example.com/hook")
    site.fail(site.claim(job_id), InvalidImage("The picture ends in the middle."))
    with site.database.transaction() as session:
        now = clock(session)
        [delivery_id] = deliveries.due(session, resend_after_seconds=60, now=now)
        claim = deliveries.claim(session, delivery_id, lease_seconds=5, now=now)
        assert claim is not None
        deliveries.abandon(session, claim, status=404, error="HTTP 404", now=now)

    page = open_page(key_id, "/admin").page
    page.get_by_role("link", name="failed.png").click()
    expect(page.get_by_role("heading", name="failed.png")).to_be_visible()
    expect(page.locator("[data-live=attempts]")).to_contain_text("fatal")
    expect(page.locator("[data-live=attempts]")).to_contain_text("The picture ends in the middle.")
    expect(page.locator("[data-live=deliveries]")).to_contain_text("abandoned")
    expect(page.locator("[data-live=deliveries]")).to_contain_text("answered 404")
    page.get_by_role("button", name="Resend").click()
    expect(page.locator("[data-live=deliveries]")).to_contain_text("pending")
    with site.database.reading() as session:
        assert session.get_one(Delivery, delivery_id).state == DeliveryState.PENDING
    page.get_by_role("button", name="Retry").click()
    expect(page.locator("[data-live=job_head]")).to_contain_text("retrying")


def test_a_service_that_goes_away_is_told_and_comes_back(site: Site, open_page: Callable[..., Watched]) -> None:
    key_id, _ = site.key("admin")
    watched = open_page(key_id, "/admin")
    watched.expected = ["ERR_(CONNECTION_REFUSED|CONNECTION_RESET|EMPTY_RESPONSE)"]
    site.stop()
    expect(watched.page.locator("#stale")).to_be_visible()
    site.start()
    expect(watched.page.locator("#stale")).to_be_hidden()


def test_a_key_without_the_scope_is_told_so(site: Site, open_page: Callable[..., Watched]) -> None:
    key_id, _ = site.key("jobs")
    watched = open_page(key_id, "/admin")
    watched.expected = ["/admin 403", "console: .* 403 "]
    expect(watched.page.locator("main")).to_contain_text("This key may not do that")


def test_signing_in_with_a_key_leads_to_where_one_was_going(site: Site, open_page: Callable[..., Watched]) -> None:
    _, secret = site.key("admin")
    watched = open_page(None, "/admin?status=failed")
    watched.expected = ["/sign-in 401", "console: .* 401 "]
    page = watched.page
    expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_label("API key").fill("enl_not_a_key_at_all_really")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("not known")
    page.get_by_label("API key").fill(secret)
    page.keyboard.press("Enter")
    page.wait_for_url("**/admin?status=failed")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("status")).to_have_text("You are signed out.")
    page.goto(f"{site.url}/admin")
    expect(page.get_by_label("API key")).to_be_visible()


@pytest.mark.parametrize("width", [360, 3840])
def test_the_queue_fits_a_phone_and_a_large_screen(site: Site, open_page: Callable[..., Watched], width: int) -> None:
    key_id, _ = site.key("admin")
    site.enlist_worker()
    failed = site.hand_in(key_id, "a picture with a very long name indeed, as cameras and people give them.png")
    site.fail(site.claim(failed), InvalidImage("The picture ends in the middle."))
    page = open_page(key_id, "/admin", viewport={"width": width, "height": 900}).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.goto(f"{site.url}/admin/jobs/{failed}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
