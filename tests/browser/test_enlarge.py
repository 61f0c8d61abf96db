"""Someone with a picture: hands it in, watches, compares, takes it away."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from shared import jobs
from shared.db import clock
from shared.errors import InvalidImage
from shared.models import JobState
from tests.browser.conftest import Site, Watched
from tests.factories import a_png

PICTURE = {"name": "bird.png", "mimeType": "image/png", "buffer": a_png(64, 48)}


def hand_in(page: Page, *pictures: dict[str, Any]) -> None:
    page.set_input_files("#choose", list(pictures or (PICTURE,)))
    page.locator("#submit").click()


def test_a_picture_is_handed_in_watched_compared_and_downloaded(site: Site, open_page: Callable[..., Watched]) -> None:
    key_id, _ = site.key("jobs", name="Ada")
    page = open_page(key_id).page
    expect(page.locator(".who")).to_contain_text("Ada")
    # Who may not operate the queue is not led to it.
    expect(page.get_by_role("link", name="Operate")).to_have_count(0)

    # Chosen: its size now and after are told at once.
    page.set_input_files("#choose", [PICTURE])
    tray = page.locator("#tray li")
    expect(tray).to_contain_text("64 × 48 px")
    expect(tray).to_contain_text("256 × 192 px")
    expect(tray.locator("img")).to_be_visible()
    page.select_option("#scale", "2")
    expect(tray).to_contain_text("128 × 96 px")
    page.select_option("#scale", "4")
    page.get_by_text("Say what the picture shows").click()

    # Handed in: it waits, and the address names it.
    page.get_by_role("button", name="Enlarge", exact=True).click()
    expect(page.locator("#job-name")).to_have_text("bird.png")
    expect(page.locator("#job-step")).to_have_text("Waiting: next in the queue")
    expect(tray).to_have_count(0)
    job = site.newest_job()
    assert page.url.endswith(f"#{job.id}")
    assert (job.model, job.scale, job.classify, job.owner_key_id) == ("srgan", 4, True, key_id)

    # A worker takes it; the page follows, and a reload comes back to it.
    claim = site.claim(job.id)
    site.progress(claim, 1, 4)
    expect(page.locator("#job-step")).to_have_text("Enlarging, strip 2 of 4 · about 3.0 s left")
    page.reload()
    expect(page.locator("#job-step")).to_contain_text("strip 2 of 4")
    site.progress(claim, 3, 4)
    expect(page.locator("#job-step")).to_contain_text("strip 4 of 4")
    expect(page.locator("#job-live")).to_have_text("Enlarging, 75 %")

    # Done: before and after on one canvas, labels, times, sizes.
    result = site.succeed(claim)
    expect(page.locator("#job-status")).to_have_text("Done")
    expect(page.locator("#job-progress")).to_be_hidden()
    expect(page.locator("#labels")).to_contain_text("goldfinch")
    expect(page.locator("#labels")).to_contain_text("93 %")
    expect(page.locator("#sizes")).to_contain_text("256 × 192")
    expect(page.locator("#times")).to_contain_text("2.5 s")
    page.wait_for_function("['.before', '.after'].every(s => document.querySelector(s).naturalWidth > 0)")
    expect(page.locator("#mine li .badge")).to_have_text("Done")

    with page.expect_download() as started:
        page.locator("#download").click()
    assert started.value.path().read_bytes() == result


def test_the_compare_slider_is_moved_by_keyboard_and_pointer_and_shows_true_pixels(
    site: Site, open_page: Callable[..., Watched]
) -> None:
    key_id, _ = site.key("jobs")
    page = open_page(key_id).page
    hand_in(page, {"name": "wide.png", "mimeType": "image/png", "buffer": a_png(400, 40)})
    expect(page.locator("#job-step")).to_contain_text("Waiting")
    site.succeed(site.claim(site.newest_job().id))
    canvas, slider = page.locator(".canvas"), page.locator("#split")
    expect(slider).to_be_visible()

    def cut_at() -> float:
        """Where the cut is, as a share of what is visible of the picture."""
        return float(
            page.evaluate(
                """() => {
                    const box = selector => document.querySelector(selector).getBoundingClientRect();
                    const [canvas, frame, cut] = [box('.canvas'), box('.viewport'), box('.cut')];
                    const left = Math.max(canvas.left, frame.left), right = Math.min(canvas.right, frame.right);
                    return (cut.left + cut.width / 2 - left) / (right - left);
                }"""
            )
        )

    assert cut_at() == pytest.approx(0.5, abs=0.01)
    slider.focus()
    slider.press("Home")
    assert cut_at() == pytest.approx(0, abs=0.01)
    slider.press("ArrowRight")
    assert cut_at() == pytest.approx(0.01, abs=0.005)
    slider.press("End")
    assert cut_at() == pytest.approx(1, abs=0.01)

    box = page.locator(".viewport").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] / 2)
    page.mouse.up()
    assert cut_at() == pytest.approx(0.25, abs=0.01)
    assert slider.input_value() == "25"

    # 1:1: a pixel of the result is a pixel of the screen; dragging pulls the picture under the cut.
    page.get_by_role("button", name="1 : 1").click()
    assert canvas.evaluate("canvas => canvas.clientWidth") == 1600
    before = page.locator(".viewport").evaluate("frame => frame.scrollLeft")
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 - 100, box["y"] + box["height"] / 2)
    page.mouse.up()
    assert page.locator(".viewport").evaluate("frame => frame.scrollLeft") == pytest.approx(before + 100, abs=1)
    assert cut_at() == pytest.approx(0.25, abs=0.01)
    page.get_by_role("button", name="Fit").click()
    assert canvas.evaluate("canvas => canvas.clientWidth") <= box["width"]


def test_a_lost_connection_is_told_and_mends_itself(site: Site, open_page: Callable[..., Watched]) -> None:
    key_id, _ = site.key("jobs")
    watched = open_page(key_id)
    # The service is away for a moment.
    watched.expected = [
        "ERR_CONNECTION_REFUSED",
        "ERR_INCOMPLETE_CHUNKED",
        "ERR_EMPTY_RESPONSE",
        "ERR_CONNECTION_RESET",
    ]
    page = watched.page
    hand_in(page)
    expect(page.locator("#job-step")).to_contain_text("Waiting")
    claim = site.claim(site.newest_job().id)
    site.progress(claim, 1, 3)
    expect(page.locator("#job-step")).to_contain_text("strip 2 of 3")

    site.stop()
    expect(page.locator("#job-connection")).to_have_text("Connection lost; trying again")
    site.progress(claim, 2, 3)
    site.start()

    expect(page.locator("#job-step")).to_contain_text("strip 3 of 3")
    expect(page.locator("#job-connection")).to_have_text("")
    site.succeed(claim)
    expect(page.locator("#job-status")).to_have_text("Done")


def test_pictures_are_dropped_and_pasted_and_each_becomes_a_job(site: Site, open_page: Callable[..., Watched]) -> None:
    key_id, _ = site.key("jobs")
    page = open_page(key_id).page
    for event in ("drop", "paste"):
        page.evaluate(
            """([event, name, bytes]) => {
                const carried = new DataTransfer();
                carried.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
                const carrier = event === "drop" ? {dataTransfer: carried} : {clipboardData: carried};
                const kind = event === "drop" ? DragEvent : ClipboardEvent;
                document.body.dispatchEvent(new kind(event, {bubbles: true, cancelable: true, ...carrier}));
            }""",
            [event, f"{event}.png", list(a_png(20, 10, seed=len(event)))],
        )
    expect(page.locator("#tray li")).to_have_count(2)
    page.get_by_role("button", name="Enlarge 2 pictures").click()
    expect(page.locator("#mine li")).to_have_count(2)
    expect(page.locator("#tray li")).to_have_count(0)
    # The first one is open; the list leads to the other.
    expect(page.locator("#job-name")).to_have_text("drop.png")
    page.get_by_role("link", name="paste.png").click()
    expect(page.locator("#job-name")).to_have_text("paste.png")
    page.go_back()
    expect(page.locator("#job-name")).to_have_text("drop.png")


def test_a_picture_that_is_refused_stays_and_says_what_to_do(site: Site, open_page: Callable[..., Watched]) -> None:
    key_id, _ = site.key("jobs")
    watched = open_page(key_id)
    watched.expected = [r"POST .*/v1/jobs 4\d\d", r"console: .* 4\d\d "]
    page = watched.page
    hand_in(page, {"name": "broken.png", "mimeType": "image/png", "buffer": b"not a picture at all" * 20})
    note = page.locator("#tray li .note")
    expect(note).to_contain_text("Save it as PNG, JPEG, WebP or TIFF and hand it in again.")
    expect(page.locator("#mine li")).to_have_count(0)
    # What the page can know itself is not even sent.
    page.get_by_role("button", name="Remove broken.png").click()
    page.set_input_files("#choose", [{"name": "none.png", "mimeType": "image/png", "buffer": b""}])
    expect(note).to_have_text("The file is empty. Choose another one.")
    expect(page.locator("#submit")).to_be_disabled()


def test_a_job_is_canceled_tried_again_and_deleted(site: Site, open_page: Callable[..., Watched]) -> None:
    key_id, _ = site.key("jobs")
    page = open_page(key_id).page
    hand_in(page)
    expect(page.locator("#job-step")).to_contain_text("Waiting")
    job_id = site.newest_job().id

    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#job-status")).to_have_text("Canceled")
    assert site.job(job_id).state == JobState.CANCELED

    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#job-status")).to_have_text("Waiting")
    claim = site.claim(job_id)
    expect(page.locator("#job-status")).to_have_text("Working")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#job-status")).to_have_text("Stopping")
    site.cancel_acknowledged(claim)
    expect(page.locator("#job-status")).to_have_text("Canceled")

    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#mine li")).to_have_count(0)
    expect(page.locator("#job")).to_be_hidden()
    assert page.url == f"{site.url}/"


def test_a_failed_job_says_why_and_what_next(site: Site, open_page: Callable[..., Watched]) -> None:
    key_id, _ = site.key("jobs")
    page = open_page(key_id).page
    hand_in(page)
    expect(page.locator("#job-step")).to_contain_text("Waiting")
    site.fail(site.claim(site.newest_job().id), InvalidImage("The picture ends in the middle."))
    expect(page.locator("#job-status")).to_have_text("Failed")
    expect(page.locator("#job-error")).to_contain_text("The picture ends in the middle.")
    expect(page.locator("#job-error")).to_contain_text("Open it in a picture editor and save it again")


def test_pictures_that_are_not_kept_any_more_are_not_asked_for(site: Site, open_page: Callable[..., Watched]) -> None:
    key_id, _ = site.key("jobs")
    job_id = site.hand_in(key_id, "old.png", ttl_seconds=1)
    job = site.job(job_id)
    site.succeed(site.claim(job_id), at=job.created_at - timedelta(days=1))
    with site.database.transaction() as session:
        jobs.sweep_expired(session, now=clock(session))
    site.storage.remove(job.blob_prefix)
    # A 410 for any picture would fail the test at its end.
    page = open_page(key_id, f"/#{job_id}").page
    expect(page.locator("#compare")).to_contain_text("not kept any more")
    expect(page.locator("#download")).to_be_hidden()
    expect(page.locator("#mine li .thumb")).to_have_text("png")


def test_somebody_elses_job_cannot_be_opened(site: Site, open_page: Callable[..., Watched]) -> None:
    mine, theirs = site.key("jobs")[0], site.key("jobs")[0]
    hand_in(open_page(mine).page)
    watched = open_page(theirs)
    watched.expected = [r"GET .*/v1/jobs/job_\w+ 404", "console: .* 404 "]
    watched.page.wait_for_load_state("networkidle")
    watched.page.evaluate("id => { location.hash = id }", site.newest_job().id)
    expect(watched.page.locator("#problem")).to_contain_text("There is no such job.")
    expect(watched.page.locator("#job")).to_be_hidden()


@pytest.mark.parametrize(("width", "colours"), [(360, "dark"), (3840, "light")])
def test_the_page_fits_a_phone_and_a_large_screen(
    site: Site, open_page: Callable[..., Watched], width: int, colours: str
) -> None:
    key_id, _ = site.key("jobs")
    size = {"width": width, "height": round(width * 0.6)}
    page = open_page(key_id, viewport=size, color_scheme=colours).page
    hand_in(page)
    expect(page.locator("#job-step")).to_contain_text("Waiting")
    site.succeed(site.claim(site.newest_job().id))
    expect(page.locator("#job-status")).to_have_text("Done")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    levels = [int(level) for level in re.findall(r"\d+", ground)]
    assert max(levels) < 64 if colours == "dark" else min(levels) > 192
