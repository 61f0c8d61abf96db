from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

import api
from worker.metrics import luma
from worker.perception import PerceptualDistance, niqe

PHOTO = Path(api.__file__).parent / "demo_photo" / "cat.png"


@pytest.fixture
def photo() -> Image.Image:
    with Image.open(PHOTO) as opened:
        return opened.convert("RGB")


def pixels(picture: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(picture)


def blurred(photo: Image.Image, radius_px: float) -> NDArray[np.uint8]:
    return pixels(photo.filter(ImageFilter.GaussianBlur(radius_px)))


def test_equal_pictures_are_at_no_distance(photo: Image.Image) -> None:
    assert PerceptualDistance("cpu")(pixels(photo), pixels(photo), 4) == 0


def test_the_more_a_picture_is_blurred_the_farther_it_is(photo: Image.Image) -> None:
    distance = PerceptualDistance("cpu")
    values = [distance(blurred(photo, radius), pixels(photo), 4) for radius in (0.5, 1, 2, 4)]
    assert values == sorted(values)
    assert values[0] > 0.01


def test_the_border_does_not_count(photo: Image.Image) -> None:
    spoiled = pixels(photo).copy()
    spoiled[:4] = 0
    assert PerceptualDistance("cpu")(spoiled, pixels(photo), 4) == 0


def test_gray_is_compared_as_three_equal_colours(photo: Image.Image) -> None:
    gray, soft = pixels(photo.convert("L")), blurred(photo.convert("L"), 2)
    colours = (np.repeat(each[:, :, None], 3, axis=2) for each in (soft, gray))
    distance = PerceptualDistance("cpu")
    assert distance(soft, gray, 4) == distance(*colours, 4) > 0


def test_gradients_flow_back_to_the_pictures() -> None:
    made = torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    PerceptualDistance("cpu").between(made, torch.full_like(made, 0.5)).backward()
    assert made.grad is not None
    assert made.grad.abs().sum() > 0


def test_niqe_is_better_for_the_photograph_than_for_what_was_done_to_it(photo: Image.Image) -> None:
    noisy = pixels(photo) + np.random.default_rng(0).normal(0, 25, (192, 192, 3))
    values = [niqe(luma(each)) for each in (pixels(photo), blurred(photo, 3), noisy.clip(0, 255).astype(np.uint8))]
    assert None not in values
    assert values[0] == min(values)


@pytest.mark.parametrize(("height", "width"), [(95, 400), (191, 191), (20, 20)])
def test_niqe_of_fewer_than_two_blocks_is_not_told(height: int, width: int) -> None:
    assert niqe(np.random.default_rng(0).uniform(0, 255, (height, width))) is None


def test_niqe_of_one_colour_is_not_told() -> None:
    assert niqe(np.full((192, 192), 100.0)) is None


def test_niqe_is_the_originals(samples: Path) -> None:
    # 5.72957338 by the authors' MATLAB code, as the tests of BasicSR have it for this picture.
    with Image.open(samples / "sr" / "set14" / "HR" / "baboon.png") as picture:
        assert niqe(luma(np.asarray(picture))) == pytest.approx(5.72957, abs=0.0005)
