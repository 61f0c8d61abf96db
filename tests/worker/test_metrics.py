from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from shared.errors import ModelUnavailable
from worker.bicubic import imresize
from worker.metrics import BICUBIC, Score, Table, _read, benchmarks, evaluate, luma, psnr, ssim


def noise(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


def test_luma_is_that_of_bt_601() -> None:
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    # 16 + 65.481, 128.553, 24.966 for full red, green, blue.
    assert luma(colours).tolist() == [[16.0, 235.0, 81.0, 145.0, 41.0]]
    assert luma(colours, rounded=False)[0] == pytest.approx([16.0, 235.0, 81.481, 144.553, 40.966])


def test_gray_is_its_own_luma() -> None:
    assert luma(np.array([[0, 7, 255]], np.uint8)).tolist() == [[0.0, 7.0, 255.0]]


def test_psnr_follows_from_the_mean_squared_error() -> None:
    truth = np.full((20, 20), 100, np.uint8)
    assert psnr(truth + np.uint8(5), truth, 4) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr(truth, truth, 4) == math.inf


def test_the_border_does_not_count() -> None:
    truth = noise(40, 40)
    spoiled = truth.copy()
    spoiled[:4], spoiled[-4:], spoiled[:, :4], spoiled[:, -4:] = 0, 0, 0, 0
    assert psnr(spoiled, truth, 4) == math.inf
    assert ssim(spoiled, truth, 4) == pytest.approx(1.0)
    assert psnr(spoiled, truth, 3) < math.inf


def ssim_by_the_book(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Window by window, from the definition of Wang et al. 2004; shares no code with the module."""
    x, y = np.meshgrid(np.arange(-5, 6), np.arange(-5, 6))
    weights = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            p, q = a[top : top + 11, left : left + 11], b[top : top + 11, left : left + 11]
            mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
            var_p, var_q = (weights * (p - mean_p) ** 2).sum(), (weights * (q - mean_q) ** 2).sum()
            both = (weights * (p - mean_p) * (q - mean_q)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            above = (2 * mean_p * mean_q + c1) * (2 * both + c2)
            values.append(above / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2)))
    return float(np.mean(values))


def test_ssim_is_the_definition_window_by_window() -> None:
    truth = noise(24, 19)
    near = np.clip(truth.astype(int) + noise(24, 19, seed=1) // 8, 0, 255).astype(np.uint8)
    assert ssim(near, truth, 2) == pytest.approx(ssim_by_the_book(luma(near)[2:-2, 2:-2], luma(truth)[2:-2, 2:-2]))


@pytest.mark.parametrize(
    ("a", "b", "border_px", "message"),
    [
        (noise(20, 20), noise(21, 20), 0, "one size and kind"),
        (noise(20, 20), noise(20, 20)[:, :, 0], 0, "one size and kind"),
        (noise(20, 20), noise(20, 20), 5, "At least 11 px"),
        (noise(20, 20).astype(np.uint16), noise(20, 20).astype(np.uint16), 0, "Luma is taken from"),
    ],
)
def test_what_cannot_be_compared_is_refused(a: NDArray[Any], b: NDArray[Any], border_px: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssim(a, b, border_px)


def test_a_border_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="At least 1 px"):
        psnr(noise(8, 8), noise(8, 8), 4)


@pytest.fixture
def benchmark_folder(tmp_path: Path) -> Path:
    """A colour and a gray picture, the first no multiple of the scale."""
    tmp_path = tmp_path / "benchmark"
    tmp_path.mkdir()
    for name in ("HR", "LRx4"):
        (tmp_path / name).mkdir()
    smooth = Image.fromarray(noise(6, 5)).resize((82, 61), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "HR" / "colour.png")
    smooth.crop((0, 0, 80, 60)).resize((20, 15), Image.Resampling.BICUBIC).save(tmp_path / "LRx4" / "colour.png")
    gray = smooth.crop((0, 0, 80, 60)).convert("L")
    gray.save(tmp_path / "HR" / "gray.png")
    gray.resize((20, 15), Image.Resampling.BICUBIC).save(tmp_path / "LRx4" / "gray.png")
    return tmp_path


def test_a_folder_is_evaluated_model_by_model_with_means(benchmark_folder: Path) -> None:
    told: list[tuple[int, int]] = []
    table = evaluate(
        benchmark_folder, [BICUBIC, "srresnet"], on_progress=lambda done, total: told.append((done, total))
    )
    assert (table.scale, table.made_small) == (4, False)
    assert [(row.model, row.picture) for row in table.rows] == [
        (BICUBIC, "colour"),
        (BICUBIC, "gray"),
        ("srresnet", "colour"),
        ("srresnet", "gray"),
    ]
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for mean in table.means:
        rows = [row for row in table.rows if row.model == mean.model]
        assert mean.picture == "mean"
        assert mean.psnr == pytest.approx(sum(row.psnr for row in rows) / 2)
        assert mean.ssim == pytest.approx(sum(row.ssim for row in rows) / 2)
        assert mean.seconds == pytest.approx(sum(row.seconds for row in rows) / 2)
        assert mean.perceptual == pytest.approx(sum(row.perceptual for row in rows) / 2)
        assert mean.peak_bytes == max(row.peak_bytes for row in rows) > 50_000_000
        for row in rows:
            side = (80, 60)
            assert row.megapixels_per_second == pytest.approx(side[0] * side[1] / 1e6 / row.seconds)
        # Smooth pictures: any enlargement that is in its place is near. They are too small for NIQE.
        assert mean.psnr > 25
        assert mean.niqe is None is table.truth_niqe


def test_true_pictures_alone_are_made_small_as_the_published_sets_were(benchmark_folder: Path) -> None:
    whole = evaluate(benchmark_folder, [BICUBIC], scale=2)
    assert (whole.scale, whole.made_small) == (2, True)
    expected = _read(benchmark_folder / "HR" / "gray.png")
    again = imresize(imresize(expected, 40, 30), 80, 60)
    assert [row.psnr for row in whole.rows if row.picture == "gray"] == [psnr(again, expected, 2)]
    # The same without a folder HR.
    assert evaluate(benchmark_folder / "HR", [BICUBIC], scale=2).means[0].psnr == whole.means[0].psnr


def test_a_folder_with_several_scales_needs_to_be_told_which(benchmark_folder: Path) -> None:
    (benchmark_folder / "LRx4").rename(benchmark_folder / "LRx3")
    (benchmark_folder / "LRx4").mkdir()
    with pytest.raises(ValueError, match="LRx3, LRx4: say by the scale"):
        evaluate(benchmark_folder, [BICUBIC])


def test_each_picture_is_handed_on_with_its_score(benchmark_folder: Path) -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []

    def on_picture(score: Score, picture: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
        assert score.psnr == psnr(picture, truth, 4)
        seen.append((score.picture, picture.shape))

    evaluate(benchmark_folder, [BICUBIC], on_picture=on_picture)
    assert seen == [("colour", (60, 80, 3)), ("gray", (60, 80))]


def test_an_unknown_model_shows_before_any_work(benchmark_folder: Path) -> None:
    told: list[tuple[int, int]] = []
    with pytest.raises(ModelUnavailable, match="no model named 'none'"):
        evaluate(benchmark_folder, [BICUBIC, "none"], on_progress=lambda done, total: told.append((done, total)))
    assert told == []


def test_a_folder_without_pairs_is_refused(benchmark_folder: Path, tmp_path: Path) -> None:
    (benchmark_folder / "HR" / "gray.png").unlink()
    with pytest.raises(ValueError, match="no true one in HR: \\['gray.png'\\]"):
        evaluate(benchmark_folder, [BICUBIC])
    with pytest.raises(ValueError, match="holds no pictures, and no folder HR"):
        evaluate(tmp_path / "HR" / "none", [BICUBIC])
    (benchmark_folder / "HR" / "colour.png").write_bytes(b"no picture at all")
    with pytest.raises(ValueError, match="colour.png cannot be read as a picture"):
        evaluate(benchmark_folder / "HR", [BICUBIC])


def test_a_folder_is_one_benchmark_or_holds_some(benchmark_folder: Path) -> None:
    assert benchmarks(benchmark_folder) == benchmarks(benchmark_folder.parent) == [benchmark_folder]
    assert benchmarks(benchmark_folder / "HR") == [benchmark_folder / "HR"]
    (benchmark_folder / "none").mkdir()
    assert benchmarks(benchmark_folder / "none") == []


def means(table: Table) -> dict[str, Score]:
    return {mean.model: mean for mean in table.means}


def test_set5_scores_are_those_of_an_independent_port(samples: Path) -> None:
    # That port reports 29.19 and 32.02 dB with Y as the formula gives it; Y rounded to 8 bits costs about 0.02 dB.
    scores = means(evaluate(samples / "sr" / "set5", ["srgan", "srresnet"], rounded=False))
    assert scores["srgan"].psnr >= 29.15
    assert scores["srresnet"].psnr >= 32.0
    assert scores["srgan"].psnr == pytest.approx(29.19, abs=0.01)
    assert scores["srresnet"].psnr == pytest.approx(32.02, abs=0.01)


def test_srgan_is_farther_than_fsrcnn_by_psnr_and_looks_nearer(samples: Path) -> None:
    for folder in ("set5", "set14"):
        scores = means(evaluate(samples / "sr" / folder, ["fsrcnn", "srgan"]))
        assert scores["srgan"].psnr < scores["fsrcnn"].psnr, folder
        assert scores["srgan"].perceptual < scores["fsrcnn"].perceptual, folder
        assert scores["srgan"].niqe < scores["fsrcnn"].niqe, folder


def test_bicubic_scores_are_those_of_the_papers(samples: Path) -> None:
    # To the last digit that they print, also where the small pictures are made here.
    for folder, expected in (("set5", ("28.42", "0.8101")), ("set14", ("25.99", "0.7023"))):
        for path in (samples / "sr" / folder, samples / "sr" / folder / "HR"):
            score = means(evaluate(path, [BICUBIC]))[BICUBIC]
            assert (f"{score.psnr:.2f}", f"{score.ssim:.4f}") == expected, path
