"""The commands that need no service, on real networks and small pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import api
from shared.errors import UnsupportedFormat
from shared.stack import Stack
from worker import bench, commands

PHOTO = Path(api.__file__).parent / "demo_photo" / "cat.png"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """24 x 16 px of the photograph."""
    path = tmp_path / "small.png"
    with Image.open(PHOTO) as photo:
        photo.crop((60, 60, 84, 76)).save(path)
    return path


def run(command: Any, *words: str | Path) -> Any:
    return CliRunner().invoke(command, [str(word) for word in words])


def test_a_picture_is_enlarged_without_a_service(small: Path, tmp_path: Path) -> None:
    ran = run(commands.upscale, small, "-o", tmp_path / "large.png", "--json")
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    assert (told["width"], told["height"], told["format"], told["model"]) == (96, 64, "png", "srgan")
    assert told["bytes"] == (tmp_path / "large.png").stat().st_size
    with Image.open(tmp_path / "large.png") as result:
        assert result.size == (96, 64)


def test_tiles_change_nothing_that_can_be_seen(small: Path, tmp_path: Path) -> None:
    for name, words in (("whole", []), ("tiled", ["--tile", "9"])):
        assert run(commands.upscale, small, "-o", tmp_path / f"{name}.png", *words).exit_code == 0
    whole, tiled = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("whole", "tiled"))
    difference = np.abs(whole - tiled)
    assert difference.max() <= 1, f"max {difference.max()} mean {difference.mean():.3f}"


@pytest.mark.parametrize(("name", "format"), [("a.jpg", "JPEG"), ("a.tiff", "TIFF"), ("a.webp", "WEBP")])
def test_the_name_of_the_result_chooses_its_format(small: Path, tmp_path: Path, name: str, format: str) -> None:
    assert run(commands.upscale, small, "-o", tmp_path / name, "--scale", "1").exit_code == 0
    with Image.open(tmp_path / name) as result:
        assert (result.format, result.size) == (format, (24, 16))


def test_an_option_chooses_the_format_before_the_name_does(small: Path, tmp_path: Path) -> None:
    assert run(commands.upscale, small, "-o", tmp_path / "a.jpg", "--format", "png", "--scale", "1").exit_code == 0
    with Image.open(tmp_path / "a.jpg") as result:
        assert result.format == "PNG"


def test_a_folder_gets_a_name_that_says_what_was_done(small: Path, tmp_path: Path) -> None:
    ran = run(commands.upscale, small, "-o", tmp_path / "out", "--scale", "2", "--classify")
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "out" / "small-srgan-x2.png").exists()
    assert ran.stdout.count("%") == 5


def test_the_result_never_replaces_the_picture(small: Path) -> None:
    before = small.read_bytes()
    ran = run(commands.upscale, small, "-o", small)
    assert ran.exit_code == 2
    assert small.read_bytes() == before


def test_what_is_no_picture_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture at all")
    ran = run(commands.upscale, tmp_path / "bad.png", "-o", tmp_path / "out" / "a.png")
    assert isinstance(ran.exception, UnsupportedFormat)
    assert not (tmp_path / "out").exists()


def test_the_cat_is_classified_as_a_cat() -> None:
    ran = run(commands.classify, PHOTO, "--json")
    assert ran.exit_code == 0, ran.output
    (found,) = json.loads(ran.stdout)
    assert found["picture"] == str(PHOTO)
    # ImageNet's cats: tabby, tiger cat, Persian, Siamese, Egyptian.
    assert 281 <= found["labels"][0]["index"] <= 285
    assert sum(label["probability"] for label in found["labels"]) > 0.8


def test_one_bad_file_does_not_keep_others_from_being_classified(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture at all")
    sixteen_bits = Image.fromarray(np.full((30, 40), 40_000, np.uint16))
    sixteen_bits.save(tmp_path / "gray16.png")
    with Image.open(PHOTO) as photo:
        photo.convert("RGBA").save(tmp_path / "alpha.png")
    names = ("bad.png", "gray16.png", "alpha.png")
    ran = run(commands.classify, *(tmp_path / name for name in names), "--json")
    assert ran.exit_code == 1
    bad, gray, alpha = json.loads(ran.stdout)
    assert bad["error"]["code"] == "unsupported-format"
    assert len(gray["labels"]) == len(alpha["labels"]) == 5


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """A folder of benchmarks with one of two tiny pairs."""
    folder = tmp_path / "benchmarks" / "tiny"
    for name in ("HR", "LRx4"):
        (folder / name).mkdir(parents=True)
    with Image.open(PHOTO) as photo:
        for number in range(2):
            truth = photo.crop((40 * number, 60, 40 * number + 48, 108))
            truth.save(folder / "HR" / f"{number}.png")
            truth.resize((12, 12), Image.Resampling.BICUBIC).save(folder / "LRx4" / f"{number}.png")
    return folder.parent


def test_models_are_scored_on_every_benchmark_of_a_folder(benchmark: Path, tmp_path: Path) -> None:
    ran = run(
        commands.evaluate, "--data", benchmark, "--models", "bicubic,srresnet", "--json", tmp_path / "scores.json"
    )
    assert ran.exit_code == 0, ran.output
    assert "tiny: 2 pictures, x4, small ones from LRx4, Y rounded" in ran.stdout
    header = next(line for line in ran.stdout.splitlines() if line.startswith("model"))
    for column in ("PSNR", "SSIM", "perceptual", "NIQE", "s a picture", "MP/s", "peak memory"):
        assert column in header
    scores = json.loads((tmp_path / "scores.json").read_text())
    bicubic, srresnet = scores["tiny"]["means"]
    assert 15 < bicubic["psnr"] < 60
    assert 15 < srresnet["psnr"] < 60
    assert len(scores["tiny"]["rows"]) == 4


def test_the_report_needs_no_other_file_and_shows_every_model_beside_the_true_picture(
    benchmark: Path, tmp_path: Path
) -> None:
    words = ("--data", benchmark, "--models", "bicubic-matlab,lanczos")
    ran = run(commands.evaluate, *words, "--html", tmp_path / "report.html", "--sheet", tmp_path / "sheet.png")
    assert ran.exit_code == 0, ran.output
    page = (tmp_path / "report.html").read_text()
    for picture in ("0", "1"):
        assert f"<h3>{picture}</h3>" in page
    for shown in ("true picture", "bicubic-matlab", "lanczos"):
        assert page.count(f'<img alt="{shown}" src="data:image/png;base64,') == 2
    assert "http" not in page
    assert 'src="' not in page.replace('src="data:', "")
    # Two columns of figures have a better one, of each row.
    assert page.count("class=best") >= 4
    with Image.open(tmp_path / "sheet.png") as sheet:
        # One row: the first picture's crop, three times.
        assert sheet.size == (3 * 204 + 12, 232 + 12)


def test_equal_pictures_have_no_psnr_in_json(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (9, 99, 199)).save(tmp_path / "flat.png")
    ran = run(commands.evaluate, "--data", tmp_path, "--models", "bicubic-matlab", "--json", "-")
    (score,) = json.loads(ran.stdout)[tmp_path.name]["means"]
    assert (score["psnr"], score["ssim"], score["niqe"]) == (None, 1.0, None)


def test_scores_alone_are_printed_on_request(benchmark: Path) -> None:
    ran = run(commands.evaluate, "--data", benchmark / "tiny", "--models", "bicubic", "--json", "-")
    assert list(json.loads(ran.stdout)) == ["tiny"]


def test_y_is_taken_in_either_convention_of_the_papers(benchmark: Path) -> None:
    def psnr(*options: str) -> float:
        ran = run(commands.evaluate, "--data", benchmark / "tiny", "--models", "bicubic", "--json", "-", *options)
        return float(json.loads(ran.stdout)["tiny"]["means"][0]["psnr"])

    assert psnr() == psnr("--y", "rounded")
    assert psnr() != psnr("--y", "exact") == pytest.approx(psnr(), abs=0.5)


def test_a_folder_that_is_no_benchmark_is_wrong_use(tmp_path: Path) -> None:
    assert run(commands.evaluate, "--data", tmp_path).exit_code == 2
    (tmp_path / "LRx4").mkdir()
    assert run(commands.evaluate, "--data", tmp_path).exit_code == 2


def test_the_bench_compares_a_whole_job_with_the_bare_network(stack: Stack) -> None:
    rounds: list[int] = []
    measured = bench.measure(stack.url, stack.api_key, rounds=2, side_px=16, on_round=rounds.append)
    assert rounds == [1, 2]
    assert measured["bare"]["over_bare"] == 1
    # Beside a network call of some 20 ms everything around it weighs heavily.
    assert measured["job"]["seconds"] > measured["bare"]["seconds"] > 0
    assert measured["job"]["phases_seconds"]["upscale"] > 0
    assert measured["machine"]["threads"] >= 1
    json.dumps(measured)
