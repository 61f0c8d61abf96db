"""POST /v1/estimates: what a job would come to."""

from __future__ import annotations

import pytest

from api.schemas import EstimateView
from tests.api.conftest import Api, Caller
from tests.factories import a_png


def test_an_estimate_comes_from_the_card_until_there_is_a_history(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    asked = {"width": 1000, "height": 500, "input_format": "jpeg"}
    answer = caller.post("/v1/estimates", json=asked)
    assert answer.status_code == 200, answer.text
    view = EstimateView.model_validate(answer.json)
    assert (view.basis, view.history_jobs, view.accepted, view.format_can_hold) == ("model-cost", 0, True, True)
    assert (view.output.width, view.output.height, view.output.megapixels) == (4000, 2000, 8.0)
    assert (view.output.format, view.queue, view.queue_wait_seconds) == ("jpeg", "cpu.interactive", 0.0)
    # 4.44 megaflops for each of half a million pixels, at 60 GFLOP/s, and 0.3 s for the rest.
    assert view.expected_seconds.p50 == pytest.approx(4.44e6 * 500_000 / 60e9 + 0.3, rel=0.01)
    beyond = caller.post("/v1/estimates", json={**asked, "scale": 8}).json["expected_seconds"]["p50"]
    assert beyond > 10 * view.expected_seconds.p50
    for seconds in (1.0, 2.0, 3.0, 4.0):
        timings = {"upscale_seconds": seconds, "queued_seconds": 99.0}
        job_id = caller.job(picture=a_png(250, 250))
        api_on_both.succeed(job_id, timings=timings)
    learned = EstimateView.model_validate(caller.post("/v1/estimates", json=asked).json)
    assert (learned.basis, learned.history_jobs) == ("history", 4)
    # One megapixel took 1 to 4 s; this is eight.
    assert 8 <= learned.expected_seconds.p50 <= 32
    assert learned.expected_seconds.p95 == pytest.approx(32)
    # At scale 2 the network does the same work, and a step down.
    halved = caller.post("/v1/estimates", json={**asked, "scale": 2}).json["expected_seconds"]
    assert halved["p95"] == pytest.approx(32)
    # What a CPU took says nothing of a GPU.
    assert caller.post("/v1/estimates", json={**asked, "device": "gpu"}).json["basis"] == "model-cost"


def test_an_estimate_tells_what_would_be_refused(caller: Caller) -> None:
    for asked, code, holds in [
        ({"width": 20000, "height": 100, "format": "webp", "scale": 1}, "format-cannot-hold-size", False),
        ({"width": 9000, "height": 9000}, "input-too-large", True),
        ({"width": 7000, "height": 7000, "scale": 8}, "output-too-large", True),
    ]:
        view = EstimateView.model_validate(caller.post("/v1/estimates", json=asked).json)
        assert view.refusal is not None
        assert (view.accepted, view.refusal.code, view.format_can_hold) == (False, code, holds)
    assert caller.post("/v1/estimates", json={"width": 0, "height": 1}).status_code == 422
    assert (
        caller.post("/v1/estimates", json={"width": 1, "height": 1, "model": "x"}).json["code"] == "model-unavailable"
    )
