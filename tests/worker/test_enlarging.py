"""One file in, one file out: samples, channels, depth, alpha and what the watch is told."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from shared.catalog import card
from shared.errors import (
    BadOutput,
    DiskFull,
    FormatCannotHoldSize,
    InvalidImage,
    ModelUnavailable,
    OutOfMemory,
    OutputTooLarge,
    TooManyPixels,
)
from tests.worker import a_network
from worker import enlarging
from worker.codec.encode import Encoder
from worker.enlarging import FIRST_USE_SECONDS, Engine, Enlarged, Progress, Unwatched, Wanted

WIDTH, HEIGHT = 20, 12


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    a_network.install(monkeypatch)
    return Engine("cpu", max_input_px=10_000, max_output_px=1_000_000)


def ramp(*shape: int, top: int = 255) -> NDArray[Any]:
    """Samples that differ from pixel to pixel and use the whole range."""
    values = np.arange(int(np.prod(shape))) * 37 % (top + 1)
    return values.reshape(shape).astype(np.uint8 if top == 255 else np.uint16)


def a_file(image: Image.Image, format: str = "PNG", **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def enlarged(engine: Engine, folder: Path, image: Image.Image, wanted: Wanted) -> tuple[Image.Image, Enlarged]:
    target = folder / "result"
    made = engine.enlarge_file(a_file(image), target, wanted)
    assert target.stat().st_size == made.bytes
    opened = Image.open(target)
    opened.load()
    assert opened.size == (made.width, made.height)
    return opened, made


def repeated(samples: NDArray[Any], scale: int = 4) -> NDArray[Any]:
    return samples.repeat(scale, 0).repeat(scale, 1)


def test_a_color_picture_keeps_every_sample(engine: Engine, tmp_path: Path) -> None:
    samples = ramp(HEIGHT, WIDTH, 3)
    result, made = enlarged(engine, tmp_path, Image.fromarray(samples), Wanted())
    assert result.mode == "RGB"
    assert np.array_equal(np.asarray(result), repeated(samples))
    assert made.labels is None
    assert made.warnings == ()
    assert {"decode_seconds", "load_seconds", "upscale_seconds", "encode_seconds", "tiles", "bands", "waste"} <= set(
        made.timings
    )


def test_gray_stays_gray_where_the_format_holds_it(engine: Engine, tmp_path: Path) -> None:
    samples = ramp(HEIGHT, WIDTH)
    result, _ = enlarged(engine, tmp_path, Image.fromarray(samples), Wanted())
    assert result.mode == "L"
    assert np.array_equal(np.asarray(result), repeated(samples))


def test_gray_becomes_three_equal_channels_where_it_does_not(engine: Engine, tmp_path: Path) -> None:
    samples = ramp(HEIGHT, WIDTH)
    result, _ = enlarged(engine, tmp_path, Image.fromarray(samples), Wanted(format="webp", lossless=True))
    assert result.mode == "RGB"
    assert np.array_equal(np.asarray(result), repeated(samples)[..., None].repeat(3, 2))


@pytest.mark.parametrize("top", [200, 65535])
def test_sixteen_bits_stay_sixteen_also_of_a_dark_picture(engine: Engine, tmp_path: Path, top: int) -> None:
    samples = (ramp(HEIGHT, WIDTH, top=65535).astype(np.uint32) % (top + 1)).astype(np.uint16)
    result, _ = enlarged(engine, tmp_path, Image.fromarray(samples), Wanted())
    assert result.mode == "I;16"
    difference = np.abs(np.asarray(result).astype(int) - repeated(samples))
    assert difference.max() <= 1, f"greatest difference {difference.max()} of 65535"


def test_sixteen_bits_become_eight_where_the_format_holds_no_more(engine: Engine, tmp_path: Path) -> None:
    samples = ramp(HEIGHT, WIDTH, top=65535)
    result, _ = enlarged(engine, tmp_path, Image.fromarray(samples), Wanted(format="webp", lossless=True))
    difference = np.abs(np.asarray(result)[..., 0].astype(int) - np.rint(repeated(samples) / 257))
    assert difference.max() <= 1


def test_alpha_by_the_network_is_alpha_enlarged_as_the_colors_are(engine: Engine, tmp_path: Path) -> None:
    # No pixel is fully transparent: those take the colours around them.
    samples = ramp(HEIGHT, WIDTH, 4)
    samples[..., 3] = np.maximum(samples[..., 3], 1)
    result, _ = enlarged(engine, tmp_path, Image.fromarray(samples), Wanted(alpha="model"))
    assert result.mode == "RGBA"
    assert np.array_equal(np.asarray(result), repeated(samples))


def test_alpha_by_lanczos_is_that_of_the_whole_plane_resized_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a_network.install(monkeypatch)
    # Several bands, so that each must see the rows around it.
    engine = Engine("cpu", max_input_px=10_000, max_output_px=1_000_000, tile_px=5)
    samples = ramp(HEIGHT, WIDTH, 4)
    result, made = enlarged(engine, tmp_path, Image.fromarray(samples), Wanted(alpha="lanczos"))
    assert made.timings["bands"] == 3
    plane = Image.fromarray(samples[..., 3].astype(np.float32))
    whole = np.asarray(plane.resize((WIDTH * 4, HEIGHT * 4), Image.Resampling.LANCZOS))
    difference = np.abs(np.asarray(result)[..., 3] - np.clip(whole, 0, 255))
    assert difference.max() <= 1, f"greatest difference {difference.max()}"


@pytest.mark.parametrize("level", [0, 90, 255])
def test_one_level_of_alpha_everywhere_stays_that_level(engine: Engine, tmp_path: Path, level: int) -> None:
    samples = ramp(HEIGHT, WIDTH, 4)
    samples[..., 3] = level
    result, _ = enlarged(engine, tmp_path, Image.fromarray(samples), Wanted())
    assert np.asarray(result)[..., 3].min() == np.asarray(result)[..., 3].max() == level


def test_alpha_is_laid_on_the_background_when_asked(engine: Engine, tmp_path: Path) -> None:
    clear = Image.new("RGBA", (WIDTH, HEIGHT), (10, 20, 30, 0))
    result, made = enlarged(engine, tmp_path, clear, Wanted(alpha="flatten", background="#ff8000"))
    assert result.mode == "RGB"
    assert np.asarray(result).reshape(-1, 3).tolist() == [[255, 128, 0]] * (WIDTH * HEIGHT * 16)
    assert made.warnings == ()


def test_a_format_without_alpha_says_that_it_lost_it(engine: Engine, tmp_path: Path) -> None:
    clear = Image.new("RGBA", (WIDTH, HEIGHT), (10, 20, 30, 0))
    result, made = enlarged(engine, tmp_path, clear, Wanted(format="jpeg"))
    assert np.asarray(result).min() >= 254
    assert made.warnings == ("JPEG holds no transparency; the picture was laid on #ffffff.",)


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 5, 16])
def test_the_result_has_exactly_the_size_asked_for(engine: Engine, tmp_path: Path, scale: int) -> None:
    samples = ramp(7, 5, 4)
    for alpha in ("model", "lanczos"):
        result, _ = enlarged(engine, tmp_path, Image.fromarray(samples), Wanted(scale=scale, alpha=alpha))  # type: ignore[arg-type]
        assert result.size == (5 * scale, 7 * scale)
        assert result.mode == "RGBA"


def test_labels_are_those_of_the_picture(engine: Engine, tmp_path: Path) -> None:
    for image in (Image.fromarray(ramp(HEIGHT, WIDTH, 3)), Image.fromarray(ramp(HEIGHT, WIDTH, top=65535))):
        _, made = enlarged(engine, tmp_path, image, Wanted(classify=True))
        assert made.labels is not None
        assert len(made.labels) == 5
        assert 0 < sum(label.probability for label in made.labels) <= 1.0001
        assert "classify_seconds" in made.timings


class Listing(Unwatched):
    def __init__(self) -> None:
        self.phases: list[tuple[str, float]] = []
        self.told: list[Progress] = []

    def begins(self, phase: str, *, expected_seconds: float = 0.0) -> None:
        self.phases.append((phase, expected_seconds))

    def progressed(self, progress: Progress) -> None:
        self.told.append(progress)


def test_the_watch_hears_of_phases_tiles_and_bands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a_network.install(monkeypatch)
    engine = Engine("cpu", max_input_px=10_000, max_output_px=1_000_000, tile_px=10)
    watch = Listing()
    image = Image.fromarray(ramp(20, 30, 4))
    engine.enlarge_file(a_file(image), tmp_path / "result.webp", Wanted(format="webp", classify=True), watch)
    assert [phase for phase, _ in watch.phases] == ["decode", "load", "upscale", "classify", "encode"]
    silent = dict(watch.phases)
    # A network is loaded and calibrated once in a process, which may be silent for a minute.
    assert silent["load"] == FIRST_USE_SECONDS
    # WebP is encoded at the end, all at once: that may be silent for long.
    assert silent["encode"] > 0
    # Two bands of three tiles, the alpha's beside the colours'.
    assert (watch.told[0].tiles_done, watch.told[0].tiles_total, watch.told[0].bands_done) == (0, 12, 0)
    assert [p.tiles_done for p in watch.told] == sorted(p.tiles_done for p in watch.told)
    last = watch.told[-1]
    assert (last.tiles_done, last.tiles_total, last.bands_done, last.bands_total) == (12, 12, 2, 2)
    assert last.eta_seconds == 0
    again = Listing()
    engine.enlarge_file(a_file(image), tmp_path / "again.webp", Wanted(format="webp"), again)
    assert [phase for phase, _ in again.phases] == ["decode", "upscale", "encode"]
    assert watch.told[0].eta_seconds is not None


def test_what_the_watch_raises_stops_the_work_and_leaves_no_file(engine: Engine, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    class Stopping(Unwatched):
        def progressed(self, progress: Progress) -> None:
            if progress.tiles_done:
                raise Enough

    with pytest.raises(Enough):
        engine.enlarge_file(a_file(Image.new("RGB", (9, 9))), tmp_path / "result.png", Wanted(), Stopping())
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_fails_while_the_network_runs_ends_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    networks = a_network.install(monkeypatch)
    engine = Engine("cpu", max_input_px=10_000, max_output_px=1_000_000, tile_px=2)

    def full(*_: object) -> None:
        raise DiskFull

    monkeypatch.setattr(enlarging, "HELD_BEHIND_BYTES", 0)
    monkeypatch.setattr(Encoder, "write", full)
    with pytest.raises(DiskFull):
        engine.enlarge_file(a_file(Image.new("RGB", (2, 40))), tmp_path / "result.png", Wanted())
    assert networks["cpu"].calls < 20, "the network does not run on for nothing"
    assert list(tmp_path.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("behind", "encode"))]


def test_what_waits_for_the_encoder_is_dropped_where_the_work_is_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Enough(Exception):
        pass

    written: list[int] = []
    stopped = threading.Event()

    def slow(_encoder: Encoder, rows: NDArray[Any]) -> None:
        written.append(len(rows))
        stopped.wait(20)

    class Stopping(Unwatched):
        def progressed(self, progress: Progress) -> None:
            if progress.bands_done == 18:
                # The encoder is at its first band, and all others wait for it.
                stopped.set()
                raise Enough

    a_network.install(monkeypatch)
    monkeypatch.setattr(Encoder, "write", slow)
    engine = Engine("cpu", max_input_px=10_000, max_output_px=1_000_000, tile_px=2)
    with pytest.raises(Enough):
        engine.enlarge_file(a_file(Image.new("RGB", (2, 40))), tmp_path / "result.png", Wanted(), Stopping())
    assert sum(written) < 9 * 8


class OfHalfPrecision(a_network.Repeating):
    """As a GPU whose float16 answers are another picture."""

    prefers_half = True
    right_in_full = True
    asked: list[bool]

    def __call__(self, tile: Any, *, keep: Any = None, half: bool = False) -> Any:
        self.asked.append(half)
        answer = super().__call__(tile, keep=keep)
        return 1 - answer if half or not self.right_in_full else answer


def test_a_result_that_is_another_picture_is_made_again_in_full_precision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    network = OfHalfPrecision(card("srgan"))
    network.asked = []
    monkeypatch.setattr(enlarging, "load", lambda *_: network)
    engine = Engine("cpu", max_input_px=10_000, max_output_px=1_000_000)
    samples = ramp(HEIGHT, WIDTH, 3)
    result, made = enlarged(engine, tmp_path, Image.fromarray(samples), Wanted())
    assert np.array_equal(np.asarray(result), repeated(samples))
    assert network.asked == [True, False]
    assert made.report is not None
    assert made.report["precision"] == "float32"

    network.right_in_full = False
    with pytest.raises(BadOutput, match="is not the picture handed in") as caught:
        engine.enlarge_file(a_file(Image.fromarray(samples)), tmp_path / "none.png", Wanted())
    assert caught.value.facts["psnr_db"] < 10
    assert not (tmp_path / "none.png").exists()


def test_auto_is_resolved_and_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a_network.install(monkeypatch)
    engine = Engine("cpu", max_input_px=100_000, max_output_px=10_000_000)
    told: list[tuple[str, str]] = []

    class Hearing(Unwatched):
        def routed(self, model: str, reason: str) -> None:
            told.append((model, reason))

    photo = Image.fromarray(ramp(130, 120, 3))
    made = engine.enlarge_file(a_file(photo), tmp_path / "result.png", Wanted(model="auto"), Hearing())
    assert made.model == "srgan"
    assert told == [("srgan", told[0][1])]
    assert "route_seconds" in made.timings
    engine.enlarge_file(a_file(photo), tmp_path / "result.png", Wanted(model="srgan"), Hearing())
    assert len(told) == 1


@pytest.mark.parametrize(
    ("size", "wanted", "error"),
    [
        ((200, 51), Wanted(), TooManyPixels),
        ((90, 90), Wanted(scale=16), OutputTooLarge),
        ((1, 5000), Wanted(format="webp"), FormatCannotHoldSize),
        ((4, 4), Wanted(model="none"), ModelUnavailable),
    ],
)
def test_what_cannot_be_made_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: tuple[int, int], wanted: Wanted, error: type[Exception]
) -> None:
    loaded = a_network.install(monkeypatch)
    engine = Engine("cpu", max_input_px=10_000, max_output_px=1_000_000)
    with pytest.raises(error):
        engine.enlarge_file(a_file(Image.new("RGB", size)), tmp_path / "result", wanted)
    assert all(network.calls == 0 for network in loaded.values())
    assert list(tmp_path.iterdir()) == []


def test_a_format_that_takes_more_memory_than_there_is_is_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(enlarging, "available_bytes", lambda: 14 * 400 * 320)
    photo, cut_out = (Image.fromarray(ramp(80, 100, channels)) for channels in (3, 4))
    for image, wanted, needed in (
        (photo, Wanted(format="webp"), 2.6),
        (cut_out, Wanted(format="webp"), 14),
        (cut_out, Wanted(format="png"), 0),
        (photo, Wanted(format="webp", lossless=True), 17),
        (photo, Wanted(format="avif"), 35),
    ):
        if needed <= 14:
            assert engine.enlarge_file(a_file(image), tmp_path / "result", wanted).bytes
            continue
        with pytest.raises(OutOfMemory, match="PNG, JPEG and TIFF need not be held") as refused:
            engine.enlarge_file(a_file(image), tmp_path / "refused", wanted)
        assert refused.value.facts["needed_bytes"] == needed * 400 * 320
    assert not (tmp_path / "refused").exists()


def test_a_file_that_is_no_picture_is_refused(engine: Engine, tmp_path: Path) -> None:
    whole = a_file(Image.fromarray(ramp(HEIGHT, WIDTH, 3))).getvalue()
    with pytest.raises(InvalidImage):
        engine.enlarge_file(io.BytesIO(whole[: len(whole) // 2]), tmp_path / "result", Wanted())


def test_an_engine_says_which_models_it_has_loaded(engine: Engine) -> None:
    assert engine.models_loaded == ()
    engine.warm_up("srresnet")
    assert engine.models_loaded == ("srresnet",)
