"""The trace of an attempt: what a person sees of it afterwards, in bounded size."""

from __future__ import annotations

import itertools
import json

from worker.enlarging import Progress
from worker.trace import MOST_BANDS, MOST_SAMPLES, Trace


def a_trace(memory: int = 1000) -> Trace:
    return Trace(memory=lambda: (memory, None))


def test_a_band_has_the_seconds_it_took_and_the_tiles_that_were_done_again() -> None:
    trace = a_trace()
    trace.begins("decode", 0.0)
    trace.begins("upscale", 1.0)
    # Two bands of two tiles each; the second does not fit and is done again in four.
    for at, (tiles, total, bands) in {
        1.0: (0, 4, 0),
        2.0: (2, 4, 0),
        2.5: (2, 4, 1),
        3.0: (3, 8, 1),
        6.5: (8, 8, 2),
    }.items():
        trace.progressed(Progress(tiles, total, bands, 2, None), at)
    seen = trace.view(7.0)
    assert seen["phases"] == [["decode", 0.0], ["upscale", 1.0]]
    assert (seen["bands_total"], seen["bands_each"], seen["seconds"]) == (2, 1, 7.0)
    assert seen["band_seconds"] == [1.5, 4.0]
    assert seen["tiles_redone"] == [0, 4]


def test_before_a_band_is_done_there_is_none_to_show() -> None:
    trace = a_trace()
    trace.progressed(Progress(0, 4, 0, 2, None), 0.5)
    assert trace.view(0.6)["band_seconds"] == []


def test_bands_that_end_together_share_their_time() -> None:
    trace = a_trace()
    trace.progressed(Progress(0, 4, 0, 4, None), 0.0)
    trace.progressed(Progress(4, 4, 4, 4, None), 2.0)
    assert trace.view(2.0)["band_seconds"] == [0.5] * 4


def test_the_largest_picture_makes_no_larger_trace_and_keeps_its_peak() -> None:
    memory = itertools.chain([10**9] * 50, [5 * 10**9], itertools.repeat(2 * 10**9))
    trace = Trace(memory=lambda: (next(memory), 10**9))
    trace.begins("upscale", 0.0)
    bands = 7 * MOST_BANDS
    for band in range(bands + 1):
        for step in range(5):
            trace.progressed(Progress(band, bands, band, bands, None), band + step / 5)
    seen = trace.view(float(bands))
    assert len(seen["band_seconds"]) == MOST_BANDS
    assert seen["bands_each"] == 7
    assert len(seen["memory"]) <= MOST_SAMPLES
    assert max(bytes for _, bytes, _ in seen["memory"]) == 5 * 10**9
    assert len(json.dumps(seen)) < 8000
