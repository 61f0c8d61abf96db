"""What `auto` makes of pictures: made ones always, sample photographs where ENLARGER_SAMPLES names them."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from shared.catalog import AUTO_PLANNED_AS, card
from worker.routing import TINY_PX, choose


def pixels(image: Image.Image) -> NDArray[Any]:
    return np.asarray(image.convert("RGB"))


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def a_page(font_px: int = 14, paper: str = "white", ink: str = "black") -> Image.Image:
    page = Image.new("RGB", (400, 300), paper)
    draw = ImageDraw.Draw(page)
    for top in range(0, 300, font_px + 5):
        words = "The quick brown fox jumps over the lazy dog. " * 3
        draw.text((8, top), words, fill=ink, font=ImageFont.load_default(font_px))
    return page


def a_drawing(seed: int) -> Image.Image:
    """Flat colours within dark outlines, smooth at the edges as a painting program leaves them."""
    chance = np.random.default_rng(seed)
    large = Image.new("RGB", (1200, 900), (250, 240, 220))
    draw = ImageDraw.Draw(large)
    for _ in range(14):
        x, y, radius = (int(value) for value in chance.integers((0, 0, 60), (1200, 900, 300)))
        fill = tuple(int(value) for value in chance.integers(0, 255, 3))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline="black", width=8)
    return large.resize((400, 300), Image.Resampling.LANCZOS)


@pytest.mark.parametrize(
    "page",
    [a_page(), a_page(10), a_page(28), a_page(paper="#e6e6f0", ink="#141478"), a_page(paper="#1e1e1e", ink="#e6e6e6")],
)
def test_letters_go_to_the_network_that_invents_nothing(page: Image.Image) -> None:
    for picture in (page, as_jpeg(page, 90), as_jpeg(page, 60)):
        route = choose(pixels(picture))
        assert route.model == "srresnet", route.reason
        assert "like text" in route.reason


@pytest.mark.parametrize("seed", range(5))
def test_flat_colours_go_to_the_network_for_drawings(seed: int) -> None:
    for picture in (a_drawing(seed), as_jpeg(a_drawing(seed), 90)):
        route = choose(pixels(picture))
        assert route.model == "real-esrgan-anime", route.reason
        assert "like a drawing" in route.reason


def test_a_photograph_goes_to_srgan_at_8_and_at_16_bits() -> None:
    cat = Image.open(Path(__file__).resolve().parents[2] / "api" / "demo_photo" / "cat.png")
    route = choose(pixels(cat))
    assert route.model == "srgan"
    assert "like a photograph" in route.reason
    assert choose(pixels(cat).astype(np.uint16) * 257) == route


def test_a_tiny_picture_is_told_by_its_size_alone() -> None:
    assert choose(np.zeros((TINY_PX, 20, 3), np.uint8)).model == "real-esrgan"
    assert choose(np.zeros((TINY_PX + 1, 20, 3), np.uint8)).model != "real-esrgan"
    assert "96 px" in choose(np.zeros((TINY_PX, TINY_PX, 3), np.uint8)).reason


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 500, 3), (500, 1, 3)])
def test_a_picture_of_one_line_has_a_route_too(shape: tuple[int, int, int]) -> None:
    assert choose(np.zeros(shape, np.uint8)).reason


def test_whatever_auto_comes_to_has_the_scale_that_was_planned_with() -> None:
    pictures = [np.zeros((9, 9, 3), np.uint8), pixels(a_page()), pixels(a_drawing(0)), pixels(a_page().rotate(3))]
    routes = {choose(picture).model for picture in pictures} | {"srgan"}
    assert len(routes) == 4
    for model in routes:
        assert card(model).scale == card(AUTO_PLANNED_AS).scale


def test_sample_photographs_are_taken_for_photographs(samples: Path) -> None:
    wrong: list[str] = []
    found: Counter[str] = Counter()
    for folder in ("classify", "photos/train", "sr/set5/HR", "sr/set14/HR"):
        for path in sorted((samples / folder).rglob("*")):
            # A slide with letters on it is the one that is none.
            if path.suffix.lower() not in (".png", ".jpg", ".jpeg") or path.stem == "ppt3":
                continue
            with Image.open(path) as image:
                route = choose(pixels(image))
            found[route.model] += 1
            if route.model != "srgan":
                wrong.append(f"{path.name}: {route.reason}")
    assert found.total() > 100
    assert found["srgan"] >= 0.97 * found.total(), wrong


def test_the_sample_slide_is_taken_for_text(samples: Path) -> None:
    with Image.open(samples / "sr" / "set14" / "HR" / "ppt3.png") as image:
        assert choose(pixels(image)).model == "srresnet"
