"""What an attempt looked like from within: when its phases began, how long each band took, how memory went.

For people who look at the job afterwards, or while it runs; nothing else depends on it. Of bounded size, however large
the picture: many bands share an entry, and when there are too many samples of memory every second one goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from worker.enlarging import Progress

MOST_BANDS = 200
MOST_SAMPLES = 120
SAMPLE_SECONDS = 0.2
"""Between two samples of memory, at first; doubles each time there would be too many."""


class Trace:
    """Of one attempt. Times are seconds since it began, as the caller's clock says."""

    def __init__(self, *, memory: Callable[[], tuple[int, int | None]]) -> None:
        """`memory` gives the bytes this process holds now, and those its GPU does (None without one)."""
        self._memory = memory
        self._phases: list[tuple[str, float]] = []
        self._bands_each = 1
        self._band_seconds: list[float] = []
        self._tiles_redone: list[int] = []
        self._last_band_at = 0.0
        self._last = Progress(0, 0, 0, 0, None)
        self._samples: list[tuple[float, int, int | None]] = []
        self._sample_seconds = SAMPLE_SECONDS

    def begins(self, phase: str, at_seconds: float) -> None:
        self._phases.append((phase, at_seconds))
        self._last_band_at = at_seconds
        self._sample(at_seconds)

    def progressed(self, progress: Progress, at_seconds: float) -> None:
        last, self._last = self._last, progress
        if last.tiles_total == 0:
            self._bands_each = max(1, -(-progress.bands_total // MOST_BANDS))
            last = progress
        ended = progress.bands_done - last.bands_done
        # A band that is done again adds its tiles to the total. That is told within the band, before its end.
        redone = progress.tiles_total - last.tiles_total
        if redone:
            self._entry(progress.bands_done - ended, 0.0, redone)
        if ended:
            each_seconds = (at_seconds - self._last_band_at) / ended
            for band in range(progress.bands_done - ended, progress.bands_done):
                self._entry(band, each_seconds, 0)
            self._last_band_at = at_seconds
        self._sample(at_seconds)

    def view(self, at_seconds: float) -> dict[str, Any]:
        """As it stands, in JSON values."""
        done = -(-self._last.bands_done // self._bands_each)
        return {
            "phases": [[phase, round(at, 3)] for phase, at in self._phases],
            "seconds": round(at_seconds, 3),
            "bands_total": self._last.bands_total,
            "bands_each": self._bands_each,
            "band_seconds": [round(seconds, 3) for seconds in self._band_seconds[:done]],
            "tiles_redone": self._tiles_redone[:done],
            "memory": [[round(at, 2), bytes, vram] for at, bytes, vram in self._samples],
        }

    def _entry(self, band: int, seconds: float, redone: int) -> None:
        number = band // self._bands_each
        while len(self._band_seconds) <= number:
            self._band_seconds.append(0.0)
            self._tiles_redone.append(0)
        self._band_seconds[number] += seconds
        self._tiles_redone[number] += redone

    def _sample(self, at_seconds: float) -> None:
        if self._samples and at_seconds - self._samples[-1][0] < self._sample_seconds:
            return
        if len(self._samples) == MOST_SAMPLES:
            # Of two the larger: a peak must not vanish.
            self._samples = [max(self._samples[i : i + 2], key=lambda s: s[1]) for i in range(0, MOST_SAMPLES, 2)]
            self._sample_seconds *= 2
        self._samples.append((at_seconds, *self._memory()))
