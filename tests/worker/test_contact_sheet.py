"""A contact sheet: where each model's answer lies, and what is there when one has none."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.errors import ModelUnavailable
from tests.worker import a_network
from tests.worker.test_enlarging import Listing, a_file, ramp
from worker import contact_sheet
from worker.enlarging import FIRST_USE_SECONDS, Engine, Enlarged, Unwatched

CROP = {"x": 3, "y": 2, "width": 10, "height": 8}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    a_network.install(monkeypatch)
    return Engine("cpu", max_input_px=10_000, max_output_px=1_000_000)


def sheet(
    engine: Engine, folder: Path, file: io.BytesIO, models: tuple[str, ...], scale: int = 4, watch: Any = None
) -> tuple[Image.Image, Enlarged]:
    target = folder / "sheet.png"
    made = contact_sheet.make(engine, file, target, crop=CROP, models=models, scale=scale, watch=watch or Unwatched())
    with Image.open(target) as opened:
        picture = opened.copy()
    assert picture.size == (made.width, made.height)
    assert target.stat().st_size == made.bytes
    return picture, made


@pytest.mark.parametrize("scale", [1, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_models_answer_lies_where_its_cell_says(engine: Engine, tmp_path: Path, count: int, scale: int) -> None:
    samples = ramp(20, 30, 3)
    models = ("srgan", "srresnet", "esrgan", "real-esrgan", "real-esrgan-anime")[:count]
    picture, made = sheet(engine, tmp_path, a_file(Image.fromarray(samples)), models, scale)
    assert made.cells is not None
    assert [cell["model"] for cell in made.cells] == list(models)
    for cell in made.cells:
        box = (cell["x"], cell["y"], cell["x"] + cell["width"], cell["y"] + cell["height"])
        seen = np.asarray(picture.crop(box))
        assert seen.shape == (8 * scale, 10 * scale, 3)
        if scale == 4:
            assert np.array_equal(seen, samples[2:10, 3:13].repeat(4, 0).repeat(4, 1))
        assert cell["error"] is None


def test_sixteen_bits_and_transparency_are_shown_as_they_are_seen(engine: Engine, tmp_path: Path) -> None:
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    picture, made = sheet(engine, tmp_path, a_file(clear), ("srgan",))
    assert made.cells is not None
    assert picture.getpixel((made.cells[0]["x"], made.cells[0]["y"])) == (255, 255, 255)
    deep = Image.fromarray(np.full((20, 20), 0x80FF, np.uint16))
    picture, made = sheet(engine, tmp_path, a_file(deep), ("srgan",))
    assert picture.getpixel((made.cells[0]["x"], made.cells[0]["y"])) == (128, 128, 128)  # type: ignore[index]


def test_a_model_that_cannot_be_run_leaves_the_others_alone(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = engine.network

    def without_one(model: str) -> Any:
        if model == "esrgan":
            raise ModelUnavailable("Its weights are not those of the catalogue.")
        return network(model)

    monkeypatch.setattr(engine, "network", without_one)
    _, made = sheet(engine, tmp_path, a_file(Image.fromarray(ramp(20, 30, 3))), ("srgan", "esrgan", "srresnet"))
    assert made.cells is not None
    assert [cell["error"] for cell in made.cells] == [None, "Its weights are not those of the catalogue.", None]


def test_progress_never_falls_and_ends_at_all(engine: Engine, tmp_path: Path) -> None:
    watch = Listing()
    sheet(engine, tmp_path, a_file(Image.fromarray(ramp(20, 30, 3))), ("srgan", "srresnet"), watch=watch)
    shares = [each.tiles_done / each.tiles_total for each in watch.told]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    # Two networks are used for the first time, and may be silent.
    assert [phase for phase, _ in watch.phases] == ["decode", "upscale", "upscale", "upscale"]
    assert [seconds for _, seconds in watch.phases][2:] == [FIRST_USE_SECONDS] * 2
