"""Someone with a picture: hands it in, watches, compares, takes it away."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect

from shared import jobs
from shared.db import clock
from shared.errors import InvalidImage
from shared.models import JobState
from tests.browser.conftest import SERVICE_AWAY, Site, Watched
from tests.browser.looking import PICTURES
from tests.conftest import wait_until
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

    # How long it will take is told, and what that is founded on.
    expect(page.locator("#estimate")).to_contain_text("a guess, since this model has made nothing here yet")
    expect(page.locator("#estimate")).to_contain_text("No worker is running just now")

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
    expect(page.locator("#split")).to_be_visible()
    expect(page.locator("#mine li .badge")).to_have_text("Done")

    with page.expect_download() as started:
        page.locator("#download").click()
    assert started.value.path().read_bytes() == result


# --- looking ----------------------------------------------------------------------------------------------------------


# The colour on screen at a share of the frame's width and height: what is really drawn, whoever draws it.
def colour_at(page: Page, x: float, y: float) -> tuple[int, int, int]:
    with Image.open(io.BytesIO(page.locator(".frame").screenshot())) as shot:
        red, green, blue = shot.convert("RGB").getpixel((int(shot.width * x), int(shot.height * y)))  # type: ignore[misc]
    return red, green, blue


def wait_for_colour(page: Page, x: float, y: float, wanted: tuple[int, int, int]) -> None:
    def is_there() -> bool:
        return max(abs(a - b) for a, b in zip(colour_at(page, x, y), wanted, strict=True)) < 24

    wait_until(is_there, seconds=20, what=f"{wanted} at {x:.0%} {y:.0%} of the frame")


BLUE, GRAY, RED = (20, 40, 220), (128, 128, 128), (220, 40, 20)


def a_plain(colour: tuple[int, int, int], width: int = 60, height: int = 45, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, format)
    return file.getvalue()


def plain(colour: tuple[int, int, int], name: str = "plain.png", **size: int) -> dict[str, Any]:
    return {"name": name, "mimeType": "image/png", "buffer": a_plain(colour, **size)}


def test_the_result_appears_band_by_band_over_the_picture_handed_in(
    site: Site, open_page: Callable[..., Watched]
) -> None:
    key_id, _ = site.key("jobs")
    watched = open_page(key_id)
    page = watched.page
    hand_in(page, plain(BLUE))
    expect(page.locator("#job-step")).to_contain_text("Waiting")
    job = site.newest_job()
    wait_for_colour(page, 0.5, 0.5, BLUE)
    # A worker that makes red of blue, so that it can be seen which is which.
    claim = site.claim(job.id)
    site.storage.put(job.input_key, io.BytesIO(a_plain(RED)), "image/png")
    site.make_bands(claim, 1, 3)
    wait_for_colour(page, 0.5, 0.16, RED)
    assert max(colour_at(page, 0.5, 0.5)) == colour_at(page, 0.5, 0.5)[2], "the second band is not there yet"
    watched.look("page-running")

    # A reload shows what was there; the rest comes.
    page.reload()
    wait_for_colour(page, 0.5, 0.16, RED)
    site.make_bands(claim, 2, 3)
    wait_for_colour(page, 0.5, 0.5, RED)

    # Done: both are under the cut, and the strips have given way to the result.
    site.succeed(claim)
    expect(page.locator("#split")).to_be_visible()
    wait_for_colour(page, 0.75, 0.9, RED)


def test_another_attempt_begins_at_the_top(site: Site, open_page: Callable[..., Watched]) -> None:
    key_id, _ = site.key("jobs")
    page = open_page(key_id).page
    hand_in(page, plain(BLUE))
    expect(page.locator("#job-step")).to_contain_text("Waiting")
    job = site.newest_job()
    wait_for_colour(page, 0.5, 0.5, BLUE)
    claim = site.claim(job.id)
    site.storage.put(job.input_key, io.BytesIO(a_plain(RED)), "image/png")
    site.make_bands(claim, 2, 3)
    wait_for_colour(page, 0.5, 0.5, RED)
    with site.database.transaction() as session:
        jobs.release(session, claim, now=clock(session))
    second = site.claim(job.id)
    site.make_bands(second, 1, 3)
    # Below the first band there is again what was handed in.
    wait_for_colour(page, 0.5, 0.5, BLUE)


def shown(page: Page) -> dict[str, float]:
    """Where the cut is, as a share of the frame's width, and how large the result is on screen, in percent."""
    share: float = page.evaluate(
        """() => {
            const box = selector => document.querySelector(selector).getBoundingClientRect();
            const [frame, cut] = [box('.frame'), box('.cut')];
            return (cut.left + cut.width / 2 - frame.left) / frame.width;
        }"""
    )
    return {"cut": share, "percent": float(page.locator(".zoomed").inner_text().removesuffix("%"))}


def test_the_cut_is_moved_by_keyboard_and_pointer_and_pixels_are_shown_true(
    site: Site, open_page: Callable[..., Watched]
) -> None:
    key_id, _ = site.key("jobs")
    watched = open_page(key_id)
    page = watched.page
    hand_in(page, plain(BLUE, "wide.png", width=400, height=200))
    expect(page.locator("#job-step")).to_contain_text("Waiting")
    wait_for_colour(page, 0.5, 0.5, BLUE)
    job = site.newest_job()
    site.storage.put(job.input_key, io.BytesIO(a_plain(RED, 400, 200)), "image/png")
    site.succeed(site.claim(job.id))
    slider = page.locator("#split")
    expect(slider).to_be_visible()
    # Before is what the browser had loaded; after is red.
    wait_for_colour(page, 0.75, 0.9, RED)
    wait_for_colour(page, 0.25, 0.9, BLUE)

    assert shown(page)["cut"] == pytest.approx(0.5, abs=0.01)
    slider.focus()
    slider.press("Home")
    assert shown(page)["cut"] == pytest.approx(0, abs=0.01)
    wait_for_colour(page, 0.1, 0.9, RED)
    slider.press("ArrowRight")
    assert shown(page)["cut"] == pytest.approx(0.01, abs=0.005)
    slider.press("End")
    assert shown(page)["cut"] == pytest.approx(1, abs=0.01)
    wait_for_colour(page, 0.9, 0.9, BLUE)

    box = page.locator(".frame").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] / 2)
    page.mouse.up()
    assert shown(page)["cut"] == pytest.approx(0.25, abs=0.01)
    assert slider.input_value() == "25"

    # 1:1: a pixel of the result is a pixel of the screen; both sides are zoomed together.
    expect(page.locator("#fit")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="1 : 1").click()
    expect(page.locator("#real")).to_have_attribute("aria-pressed", "true")
    assert shown(page)["percent"] == 100
    wait_for_colour(page, 0.2, 0.9, BLUE)
    wait_for_colour(page, 0.3, 0.9, RED)
    page.get_by_role("button", name="Larger").click()
    expect(page.locator(".zoomed")).to_have_text("150 %")
    # The keys of the picture: 0 shows all of it.
    page.locator(".openseadragon-canvas").first.focus()
    page.keyboard.press("0")
    expect(page.locator("#fit")).to_have_attribute("aria-pressed", "true")

    # The lens: before and after of one place, side by side.
    page.keyboard.press("l")
    lens = page.locator(".lens")
    expect(lens).to_be_visible()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.5)
    wait_for_colour(page, 0.58, 0.5, BLUE)
    wait_for_colour(page, 0.62, 0.5, RED)
    watched.look("page-lens")
    page.get_by_role("button", name="Lens").click()
    expect(lens).to_be_hidden()

    page.get_by_role("button", name="Full screen").click()
    page.wait_for_function("document.fullscreenElement?.id === 'compare'")
    # Seen whole before, it is seen whole now.
    expect(page.locator("#fit")).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".zoomed")).to_have_text("79 %")
    watched.look("page-full-screen")
    page.get_by_role("button", name="Full screen").click()
    page.wait_for_function("document.fullscreenElement === null")


def test_a_large_result_is_looked_at_part_by_part(site: Site, open_page: Callable[..., Watched]) -> None:
    key_id, _ = site.key("jobs")
    watched = open_page(key_id)
    page = watched.page
    fetched: list[str] = []
    page.on("request", lambda request: fetched.append(request.url))
    hand_in(page, plain(RED, "large.png", width=2000, height=1600))
    expect(page.locator("#job-step")).to_contain_text("Waiting")
    job = site.newest_job()
    site.succeed(site.claim(job.id))
    expect(page.locator("[data-part=told]")).to_contain_text("The parts are being prepared")
    site.make_renditions()
    expect(page.locator("[data-part=told]")).not_to_contain_text("being prepared")
    expect(page.locator("#split")).to_be_visible()
    wait_for_colour(page, 0.75, 0.9, RED)
    page.get_by_role("button", name="1 : 1").click()
    expect(page.locator("#real")).to_have_attribute("aria-pressed", "true")
    wait_for_colour(page, 0.75, 0.9, RED)
    page.wait_for_load_state("networkidle")
    tiles = [url for url in fetched if "/zoom/13/" in url]
    # 51 megapixels are 208 tiles of the last level; a screen at 1:1 needs a few.
    assert 1 <= len(tiles) < 40
    assert not any(url.endswith(f"/{job.id}/result") or "result-1" in url for url in fetched)
    watched.look("page-large")


def test_other_models_stand_beside_it_and_the_picture_is_not_sent_again(
    site: Site, open_page: Callable[..., Watched]
) -> None:
    key_id, _ = site.key("jobs")
    watched = open_page(key_id)
    page = watched.page
    hand_in(page, PICTURE)
    expect(page.locator("#job-step")).to_contain_text("Waiting")
    first = site.newest_job()
    claim = site.claim(first.id)
    site.make_bands(claim, 2, 3)
    site.succeed(claim)
    expect(page.locator("#split")).to_be_visible()
    expect(page.locator("#mine li .thumb img")).to_be_visible()

    page.get_by_role("button", name="Again with other settings", exact=True).click()
    expect(page.locator("#tray li")).to_contain_text("bird.png")
    expect(page.get_by_label("srgan", exact=False).first).to_be_focused()
    page.get_by_label("srresnet", exact=False).first.check()
    page.select_option("#scale", "2")
    page.get_by_role("button", name="Enlarge", exact=True).click()
    expect(page.locator("#job-line")).to_contain_text("srresnet · 2 ×")
    second = site.newest_job()
    assert second.id != first.id
    assert (second.input_sha256, second.input_name) == (first.input_sha256, "bird.png")
    site.succeed(site.claim(second.id))
    expect(page.locator("#beside")).to_be_visible()
    page.get_by_label("Left").select_option(label="srgan, 4 ×")
    expect(page.locator(".tag.left")).to_have_text("srgan, 4 ×")
    expect(page.locator(".tag.right")).to_have_text("srresnet, 2 ×")
    watched.look("page-beside")


def test_the_result_is_downloaded_in_another_format_without_enlarging_again(
    site: Site, open_page: Callable[..., Watched]
) -> None:
    key_id, _ = site.key("jobs")
    page = open_page(key_id).page
    hand_in(page, plain(RED))
    expect(page.locator("#job-step")).to_contain_text("Waiting")
    job = site.newest_job()
    site.succeed(site.claim(job.id))
    expect(page.locator("#split")).to_be_visible()
    page.get_by_label("Download as").select_option("webp")
    with page.expect_download(timeout=60_000) as started:
        page.locator("#download").click()
        expect(page.locator("#download-told")).to_contain_text("Making a WEBP of the result")
        site.make_renditions()
    assert started.value.suggested_filename == "plain-srgan-x4.webp"
    with Image.open(started.value.path()) as image:
        assert (image.format, image.size) == ("WEBP", (240, 180))
    expect(page.locator("#download-told")).to_contain_text("Download it again")
    assert site.job(job.id).attempt == 1


def test_what_the_browser_cannot_show_is_shown_all_the_same(site: Site, open_page: Callable[..., Watched]) -> None:
    key_id, _ = site.key("jobs")
    page = open_page(key_id).page
    tiff = {"name": "scan.tif", "mimeType": "image/tiff", "buffer": a_plain(BLUE, 400, 300, "TIFF")}
    hand_in(page, tiff)
    expect(page.locator("[data-part=told]")).to_contain_text("Browsers cannot show TIFF")
    claim = site.claim(site.newest_job().id)
    site.make_bands(claim, 1, 3)
    wait_for_colour(page, 0.5, 0.16, BLUE)


def test_the_fidelity_report_is_a_badge_that_opens(site: Site, open_page: Callable[..., Watched]) -> None:
    key_id, _ = site.key("jobs")
    page = open_page(key_id).page
    report = {
        "psnr_db": 34.21,
        "ssim": 0.951,
        "colour_difference": 0.42,
        "seam_score": None,
        "seams": 0,
        "tiles": 1,
        "tiles_not_finite": 0,
        "bands_flat": 0,
        "bands_done_again": 0,
        "precision": "float32",
        "compare_seconds": 0.002,
    }
    hand_in(page, PICTURE)
    expect(page.locator("#job-step")).to_contain_text("Waiting")
    site.succeed(site.claim(site.newest_job().id), report=report)
    badge = page.locator("#report")
    expect(badge).to_contain_text("34.2 dB when made small again, colours ΔE 0.42")
    expect(badge.locator("dl")).to_be_hidden()
    badge.locator("summary").press("Enter")
    expect(badge.locator("dl")).to_contain_text("0.951")
    expect(badge.locator("dl")).not_to_contain_text("seams")


# --- what comes between -----------------------------------------------------------------------------------------------


def test_a_lost_connection_is_told_and_mends_itself(site: Site, open_page: Callable[..., Watched]) -> None:
    key_id, _ = site.key("jobs")
    watched = open_page(key_id)
    # The service is away for a moment.
    watched.expected = [
        *SERVICE_AWAY,
        # Where it goes in the midst of a picture of the list.
        "ERR_CONTENT_LENGTH_MISMATCH",
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


def test_a_picture_of_the_list_that_did_not_come_is_asked_for_again(
    site: Site, open_page: Callable[..., Watched]
) -> None:
    key_id, _ = site.key("jobs")
    watched = open_page(key_id)
    watched.expected = ["ERR_CONNECTION_RESET"]
    page = watched.page
    asked: list[str] = []

    def lost_once(route: Route) -> None:
        asked.append(route.request.url)
        if len(asked) == 1:
            route.abort("connectionreset")
        else:
            route.continue_()

    page.route("**/thumbnail?of=input", lost_once)
    hand_in(page)
    expect(page.locator("#job-step")).to_contain_text("Waiting")
    claim = site.claim(site.newest_job().id)
    site.progress(claim, 1, 3)
    expect(page.locator("#mine li .thumb img")).to_be_visible()
    assert len(asked) == 2


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

    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator("#job-status")).to_have_text("Canceled")
    assert site.job(job_id).state == JobState.CANCELED

    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#job-status")).to_have_text("Waiting")
    claim = site.claim(job_id)
    expect(page.locator("#job-status")).to_have_text("Working")
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator("#job-status")).to_have_text("Stopping")
    site.cancel_acknowledged(claim)
    expect(page.locator("#job-status")).to_have_text("Canceled")

    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete", exact=True).click()
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


@pytest.mark.parametrize("width", [390, 1366, 3840])
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_the_page_fits_every_screen_and_keeps_nobody_from_using_it(
    site: Site, open_page: Callable[..., Watched], width: int, colours: str
) -> None:
    key_id, _ = site.key("jobs")
    size = {390: (390, 844), 1366: (1366, 900), 3840: (3840, 2160)}[width]
    name = f"page-{width}-{colours}"
    watched = open_page(key_id, viewport={"width": size[0], "height": size[1]}, color_scheme=colours)
    page = watched.page
    page.wait_for_load_state("networkidle")
    watched.look(f"{name}-empty")
    page.set_input_files("#choose", [PICTURE])
    page.get_by_text("Say what the picture shows").click()
    expect(page.locator("#estimate")).to_be_visible()
    watched.look(f"{name}-chosen")
    page.locator("#submit").click()
    expect(page.locator("#job-step")).to_contain_text("Waiting")
    claim = site.claim(site.newest_job().id)
    site.make_bands(claim, 2, 3)
    expect(page.locator("#job-step")).to_contain_text("strip 3 of 3")
    site.succeed(claim)
    expect(page.locator("#job-status")).to_have_text("Done")
    expect(page.locator("#split")).to_be_visible()
    failed = site.hand_in(key_id, "broken.png")
    site.fail(site.claim(failed), InvalidImage("The picture ends in the middle."))
    page.evaluate("scrollTo(0, 0)")
    watched.look(f"{name}-done", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    levels = [int(level) for level in re.findall(r"\d+", ground)]
    assert max(levels) < 64 if colours == "dark" else min(levels) > 192
    page.goto(f"{site.url}/#{failed}")
    expect(page.locator("#job-error")).to_contain_text("Open it in a picture editor")
    watched.look(f"{name}-failed")


def test_the_page_is_light_and_paints_at_once(site: Site, open_page: Callable[..., Watched]) -> None:
    key_id, _ = site.key("jobs")
    page = open_page(key_id).page
    # Once warm: what is measured is the page, not the first request of a process.
    page.reload()
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    hand_in(page, plain(RED))
    expect(page.locator("#job-step")).to_contain_text("Waiting")
    site.succeed(site.claim(site.newest_job().id))
    expect(page.locator("#split")).to_be_visible()
    asked: list[str] = page.evaluate(
        """["navigation", "resource"].flatMap(type => performance.getEntriesByType(type))
            .filter(entry => !["img", "css"].includes(entry.initiatorType) && entry.name.startsWith(location.origin))
            .map(entry => entry.name.replace(/#.*/, "")).filter(name => !name.endsWith("/events"))"""
    )
    sent: dict[str, int] = {}
    for url in asked:
        answer = page.context.request.get(url, headers={"Accept-Encoding": "gzip"})
        sent[url.removeprefix(site.url)] = int(answer.headers["content-length"])
    viewer = sent["/static/openseadragon/openseadragon.min.js"]
    assert 50_000 < viewer < 120_000, "it comes compressed"
    assert sum(sent.values()) - viewer < 100_000
    # Kept with the pictures; the bound of 300 ms is for a machine that does not run other tests meanwhile.
    PICTURES.mkdir(parents=True, exist_ok=True)
    told = (
        f"first paint after {painted:.0f} ms; {sum(sent.values()):,} bytes without pictures, {viewer:,} of the viewer\n"
    )
    (PICTURES / "page.txt").write_text(told)
    assert painted < 3000
