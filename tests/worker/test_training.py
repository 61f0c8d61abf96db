"""Trainings so small that they take seconds, on pieces of the one photograph that comes along."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner, Result
from PIL import Image
from torch import nn

import api
from shared.catalog import WeightsSource, card
from shared.errors import ModelUnavailable
from worker import commands, networks, training
from worker.adversarial import Discriminator, SrganPupil, vgg_content
from worker.bicubic import imresize
from worker.networks import trained
from worker.networks.fsrcnn import Fsrcnn
from worker.networks.srcnn import Srcnn
from worker.training import Check, LumaPupil, Photographs, Plan, best_of, draw_curve, train

PHOTO = Path(api.__file__).parent / "demo_photo" / "cat.png"
FSRCNN = Plan("fsrcnn", 2, steps=12, batch=2, patch_px=8, learning_rate=2e-3, seed=0)
SRGAN = Plan("srgan", 4, steps=6, batch=2, patch_px=8, learning_rate=1e-4, seed=0)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several wait for each other at every one of these small layers."""
    monkeypatch.setenv("ENLARGER_TORCH_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pieces of the photograph, 96 px a side; the first and no other is held out."""
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    with Image.open(PHOTO) as photo:
        for number, (left, top) in enumerate([(48, 48), (0, 0), (96, 0), (0, 96), (96, 96)]):
            photo.convert("RGB").crop((left, top, left + 96, top + 96)).save(photographs / f"{number}.png")
    return photographs


def luma_pupil(plan: Plan = FSRCNN) -> LumaPupil:
    return LumaPupil(Fsrcnn(plan.scale), plan, "cpu")


def trained_in(
    output: Path,
    folder: Path,
    plan: Plan = FSRCNN,
    pupil: training.Pupil | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    check_every: int = 4,
) -> tuple[training.Pupil, list[Check]]:
    pupil = pupil or luma_pupil(plan)
    photographs = Photographs(folder, plan.scale, pupil.patch_px, plan.seed)
    curve = train(
        pupil,
        photographs,
        plan,
        output,
        check_every=check_every,
        on_step=lambda step, check: None,
        should_stop=should_stop,
    )
    return pupil, curve


def weights_of(pupil: training.Pupil) -> dict[str, torch.Tensor]:
    return dict(pupil.result().state_dict())


# --- What is learnt from ---------------------------------------------------------------------------------------------


def test_small_patches_are_what_matlabs_bicubic_leaves_of_the_true_ones(folder: Path) -> None:
    # Patches as large as the smallest photograph may become: each batch shows whole pictures, turned or mirrored.
    photographs = Photographs(folder, 4, 24, seed=0)
    small, truth = photographs.batch(0, 6)
    assert (small.shape, truth.shape) == ((6, 24, 24, 3), (6, 96, 96, 3))
    for one, of in zip(small, truth, strict=True):
        assert np.abs(one.astype(int) - imresize(np.ascontiguousarray(of), 24, 24)).max() <= 1


def test_batches_depend_on_seed_and_step_alone(folder: Path) -> None:
    one, same, other = (Photographs(folder, 2, 10, seed) for seed in (0, 0, 1))
    one.batch(3, 2)
    assert np.array_equal(one.batch(7, 4)[1], same.batch(7, 4)[1])
    assert not np.array_equal(one.batch(7, 4)[1], one.batch(8, 4)[1])
    assert not np.array_equal(one.batch(7, 4)[1], other.batch(7, 4)[1])


def test_what_is_held_out_is_never_trained_on(folder: Path) -> None:
    red = Image.new("RGB", (96, 96), (255, 0, 0))
    red.save(folder / "0.png")
    photographs = Photographs(folder, 2, 10, seed=0)
    assert len(photographs) == 5
    (held_out,) = photographs.held_out()
    assert np.array_equal(held_out.truth, np.asarray(red))
    for step in range(20):
        assert not (photographs.batch(step, 4)[1] == (255, 0, 0)).all(axis=(1, 2, 3)).any()


def test_of_a_large_folder_a_part_is_held_in_memory_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "POOL_PICTURES", 5)
    photographs = Photographs(folder, 2, 10, seed=0)
    for step in range(40):
        photographs.batch(step, 1)
        assert len(photographs._pool) == 5
    # Started again in the middle it sees the same.
    assert np.array_equal(Photographs(folder, 2, 10, seed=0).batch(33, 4)[0], photographs.batch(33, 4)[0])


def test_files_that_are_no_picture_or_too_small_are_left_out_and_named(folder: Path) -> None:
    (folder / "broken.jpg").write_bytes(b"no picture at all")
    Image.new("RGB", (19, 400)).save(folder / "narrow.png")
    (folder / "notes.txt").write_text("not looked at")
    photographs = Photographs(folder, 2, 10, seed=0)
    assert photographs.skipped == ["broken.jpg", "narrow.png"]
    assert len(photographs) == 5


def test_one_photograph_is_too_few(folder: Path) -> None:
    for number in range(1, 5):
        (folder / f"{number}.png").unlink()
    with pytest.raises(ValueError, match="holds 1 photographs of 20 px a side or more"):
        Photographs(folder, 2, 10, seed=0)


# --- How it goes -----------------------------------------------------------------------------------------------------


def test_the_loss_falls(folder: Path, tmp_path: Path) -> None:
    plan = replace(FSRCNN, steps=40)
    _, curve = trained_in(tmp_path / "out", folder, plan, check_every=20)
    assert [check.step for check in curve] == [20, 40]
    assert curve[-1].losses["mse"] < 0.9 * curve[0].losses["mse"]
    assert curve[-1].scores["psnr"] > 25


def test_stopped_and_gone_on_with_it_comes_to_the_same_weights(folder: Path, tmp_path: Path) -> None:
    whole, whole_curve = trained_in(tmp_path / "whole", folder)
    steps = iter(range(100))
    first, cut = trained_in(tmp_path / "cut", folder, should_stop=lambda: next(steps) >= 6)
    assert [check.step for check in cut] == [4]
    second, curve = trained_in(tmp_path / "cut", folder)
    assert [check.step for check in curve] == [4, 8, 12]
    assert curve[-1].scores == whole_curve[-1].scores
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(second)[name]), name
    assert not all(torch.equal(weight, weights_of(first)[name]) for name, weight in weights_of(second).items())


def test_killed_between_two_checks_it_goes_on_from_the_first(folder: Path, tmp_path: Path) -> None:
    class Killed(Exception): ...

    def dies_at_6(step: int, _check: Check | None) -> None:
        if step == 6:
            raise Killed

    pupil = luma_pupil()
    photographs = Photographs(folder, FSRCNN.scale, pupil.patch_px, FSRCNN.seed)
    with pytest.raises(Killed):
        train(pupil, photographs, FSRCNN, tmp_path, check_every=4, on_step=dies_at_6, should_stop=lambda: False)
    assert torch.load(tmp_path / training.CHECKPOINT, weights_only=True)["step"] == 4
    whole, _ = trained_in(tmp_path / "whole", folder)
    second, _ = trained_in(tmp_path, folder)
    assert all(torch.equal(weight, weights_of(second)[name]) for name, weight in weights_of(whole).items())


def test_a_folder_with_another_training_is_refused(folder: Path, tmp_path: Path) -> None:
    trained_in(tmp_path / "out", folder)
    with pytest.raises(ValueError, match="holds another training \\(batch 2 there, 3 asked for\\)"):
        trained_in(tmp_path / "out", folder, replace(FSRCNN, batch=3))


def test_a_training_may_be_given_more_steps(folder: Path, tmp_path: Path) -> None:
    trained_in(tmp_path / "out", folder)
    _, curve = trained_in(tmp_path / "out", folder, replace(FSRCNN, steps=16))
    assert [check.step for check in curve] == [4, 8, 12, 16]


def test_the_best_weights_are_kept_and_not_the_last(folder: Path, tmp_path: Path) -> None:
    pupil = luma_pupil()
    scores = iter([30.0, 32.0, 31.0])
    seen: list[dict[str, torch.Tensor]] = []

    def judge(_pairs: Any) -> dict[str, float]:
        seen.append({name: each.clone() for name, each in pupil.result().state_dict().items()})
        return {"psnr": next(scores)}

    pupil.judge = judge  # type: ignore[method-assign]
    _, curve = trained_in(tmp_path / "out", folder, pupil=pupil)
    assert best_of(pupil, curve).step == 8
    assert all(torch.equal(weight, weights_of(pupil)[name]) for name, weight in seen[1].items())


def test_for_another_scale_only_the_last_layer_is_trained_at_first(folder: Path, tmp_path: Path) -> None:
    source = Fsrcnn(4)
    source.begin(torch.Generator().manual_seed(5))
    pupil = LumaPupil(Fsrcnn(2), FSRCNN, "cpu", source)
    small, truth = Photographs(folder, 2, pupil.patch_px, 0).batch(0, 2)
    begun = {name: each.clone() for name, each in pupil._network.state_dict().items()}

    def changed() -> set[str]:
        return {name for name, each in pupil._network.state_dict().items() if not torch.equal(each, begun[name])}

    pupil.learn(small, truth, 0, share=0.1)
    assert changed() == {"deconvolution", "out_bias"}
    pupil.learn(small, truth, 1, share=0.9)
    assert "features.weight" in changed()


def test_the_curve_is_drawn_and_written(folder: Path, tmp_path: Path) -> None:
    _, curve = trained_in(tmp_path / "out", folder)
    written = json.loads((tmp_path / "out" / training.CURVE).read_text())
    assert written["plan"]["network"] == "fsrcnn"
    assert [Check(**each) for each in written["checks"]] == curve
    with Image.open(tmp_path / "out" / training.CURVE_PICTURE) as drawn:
        # The loss and the score, one under the other, each with a line in its colour.
        assert drawn.size == (640, 280)
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(10_000) or ()}
        assert {(0xA3, 0x3B, 0x20), (0x1F, 0x6F, 0x54)} <= colours


def test_answers_beyond_black_and_white_are_clipped_before_they_are_scored() -> None:
    class TooMuch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.factor * x.repeat_interleave(4, 2).repeat_interleave(4, 3)

    white = training.Pair(np.full((8, 8, 3), 200, np.uint8), np.full((32, 32, 3), 255, np.uint8))
    assert training.mean_psnr(TooMuch(), [white]) == float("inf")


def test_a_curve_that_never_moves_can_be_drawn() -> None:
    assert draw_curve([Check(step, {"mse": 0.0}, {"psnr": 30.0}, 1.0) for step in (1, 2)]).size == (640, 280)


# --- SRGAN -----------------------------------------------------------------------------------------------------------


def test_srgan_learns_resumes_and_loads_as_a_card(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fixed batch: over six steps chance would hide what is learnt.
    photographs = Photographs(folder, 4, 8, 0)
    batch = photographs.batch(0, 2)
    monkeypatch.setattr(Photographs, "batch", lambda *_: batch)
    pupil = SrganPupil(SRGAN, "cpu")
    steps = iter(range(100))
    trained_in(tmp_path / "out", folder, SRGAN, pupil, should_stop=lambda: next(steps) >= 3, check_every=3)
    again = SrganPupil(SRGAN, "cpu")
    _, curve = trained_in(tmp_path / "out", folder, SRGAN, again, check_every=3)
    assert [check.step for check in curve] == [3, 6]
    for loss in ("content", "discriminator"):
        assert curve[-1].losses[loss] < curve[0].losses[loss], loss
    assert set(curve[0].losses) == {"content", "adversarial", "pixel", "discriminator"}
    assert 15 < curve[-1].scores["psnr"] < 50

    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "own_weights"
    package.mkdir()
    (package / "__init__.py").touch()
    trained.write(package / "mine.safetensors", again.result(), "srresnet", 4, {"steps": 6})
    content = (package / "mine.safetensors").read_bytes()
    mine = replace(
        card("srgan"), name="mine", architecture="trained", weights=_source("own_weights", "mine.safetensors", content)
    )
    tile = torch.rand((1, 3, 12, 12), generator=torch.Generator().manual_seed(0))
    levels = (networks.load(mine, "cpu")(tile) - again.result()(tile)).abs() * 255
    assert levels.max() < 0.01
    assert (networks.load(mine, "cpu")(tile) - networks.load(card("srresnet"), "cpu")(tile)).abs().max() * 255 > 0.05


def test_srgan_may_begin_as_srgan_or_as_a_file_of_its_own(tmp_path: Path) -> None:
    pupil = SrganPupil(replace(SRGAN, init="srgan"), "cpu")
    tile = torch.rand((1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    assert (pupil.result()(tile) - networks.load(card("srgan"), "cpu")(tile)).abs().max() * 255 < 0.01
    trained.write(tmp_path / "a.safetensors", pupil.result(), "srresnet", 4, {})
    again = SrganPupil(replace(SRGAN, init=str(tmp_path / "a.safetensors")), "cpu")
    assert torch.equal(again.result()(tile), pupil.result()(tile))
    with pytest.raises(ValueError, match="cannot be read"):
        SrganPupil(replace(SRGAN, init=str(tmp_path / "none.safetensors")), "cpu")


def test_the_discriminator_takes_patches_of_any_side() -> None:
    for side in (32, 50, 96):
        assert Discriminator(side)(torch.rand(2, 3, side, side)).shape == (2,)


def test_content_may_be_vggs(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = torchvision.models.vgg19().features.state_dict()
    chance = torch.Generator().manual_seed(0)
    weights = {f"features.{name}": 0.05 * torch.randn(each.shape, generator=chance) for name, each in shapes.items()}
    torch.save(weights, tmp_path / "vgg.pth")
    content = vgg_content(tmp_path / "vgg.pth", "cpu")
    made, true = torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32)
    content(made, true).backward()
    assert made.grad is not None
    assert made.grad.abs().sum() > 0
    assert content(true, true) == 0


def test_a_file_that_is_no_vgg_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.pth").write_bytes(b"no weights at all")
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "other.pth")
    for name in ("none.pth", "other.pth"):
        with pytest.raises(ValueError, match="holds no weights of torchvision's VGG19"):
            vgg_content(tmp_path / name, "cpu")


# --- The file --------------------------------------------------------------------------------------------------------


def _source(package: str, path: str, content: bytes) -> WeightsSource:
    import hashlib

    return WeightsSource(package, path, hashlib.sha256(content).hexdigest())


def test_weights_come_back_as_they_were_written_with_their_facts(tmp_path: Path) -> None:
    network = Srcnn(3)
    network.begin(torch.Generator().manual_seed(0))
    trained.write(tmp_path / "a.safetensors", network, "srcnn", 3, {"seed": 7, "data": "holidays"})
    content = (tmp_path / "a.safetensors").read_bytes()
    facts = trained.facts_of(content)
    assert (facts["architecture"], facts["scale"], facts["seed"], facts["data"]) == ("srcnn", "3", "7", "holidays")
    read = trained.read(content, 3)
    assert all(torch.equal(weight, read.state_dict()[name]) for name, weight in network.state_dict().items())
    # Tens of kilobytes each: they are shipped.
    assert len(content) < 300_000


def test_files_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    network = Srcnn(3)
    trained.write(tmp_path / "a.safetensors", network, "srcnn", 3, {})
    with pytest.raises(ModelUnavailable, match="for x3, not for x2"):
        trained.read((tmp_path / "a.safetensors").read_bytes(), 2)
    trained.write(tmp_path / "b.safetensors", network, "fsrcnn", 3, {})
    with pytest.raises(ModelUnavailable, match="not those of the fsrcnn"):
        trained.read((tmp_path / "b.safetensors").read_bytes(), 3)
    trained.write(tmp_path / "c.safetensors", network, "vdsr", 3, {})
    with pytest.raises(ModelUnavailable, match="no network 'vdsr' for x3"):
        trained.read((tmp_path / "c.safetensors").read_bytes(), 3)
    trained.write(tmp_path / "d.safetensors", network, "srcnn", 3, {"format": "another-1"})
    with pytest.raises(ModelUnavailable, match="not made by `enlarger train`"):
        trained.read((tmp_path / "d.safetensors").read_bytes(), 3)
    for content in (b"", b"no weights at all, and longer than a header"):
        with pytest.raises(ModelUnavailable, match="not made by"):
            trained.read(content, 3)


# --- The command -----------------------------------------------------------------------------------------------------


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(commands.train, [str(word) for word in words])


TINY = ("--scale", "2", "--steps", "6", "--batch", "2", "--patch", "8", "--check-every", "3")


def test_the_command_trains_and_says_what_it_came_to(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.jpg").write_bytes(b"no picture at all")
    ran = run("fsrcnn", "--data", folder, "-o", tmp_path / "out", *TINY)
    assert ran.exit_code == 0, ran.output
    assert "step 3 of 6" in ran.output
    assert "broken.jpg" in ran.stderr
    weights = tmp_path / "out" / "fsrcnn-x2.safetensors"
    assert str(weights) in ran.output
    facts = trained.facts_of(weights.read_bytes())
    assert (facts["steps"], facts["photographs"], facts["data"], facts["seed"]) == ("6", "5", "photographs", "0")
    assert json.loads(facts["held_out"])["psnr"] > 20

    # The same again changes nothing, and another scale begins from what there is.
    assert run("fsrcnn", "--data", folder, "-o", tmp_path / "out", *TINY).exit_code == 0
    ran = run("fsrcnn", "--data", folder, "-o", tmp_path / "x3", *TINY, "--scale", "3", "--init", weights)
    assert ran.exit_code == 0, ran.output
    assert trained.facts_of((tmp_path / "x3" / "fsrcnn-x3.safetensors").read_bytes())["init"] == "fsrcnn-x2.safetensors"


def test_a_signal_stops_it_after_the_step_at_hand(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Photographs.batch

    def interrupted(self: Photographs, step: int, size: int) -> Any:
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(self, step, size)

    monkeypatch.setattr(Photographs, "batch", interrupted)
    ran = run("fsrcnn", "--data", folder, "-o", tmp_path / "out", *TINY)
    assert ran.exit_code == 0, ran.output
    assert "The same command goes on from there" in ran.output
    assert torch.load(tmp_path / "out" / training.CHECKPOINT, weights_only=True)["step"] == 5
    assert not (tmp_path / "out" / "fsrcnn-x2.safetensors").exists()
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ran = run("fsrcnn", "--data", folder, "-o", tmp_path / "out", *TINY)
    assert (tmp_path / "out" / "fsrcnn-x2.safetensors").exists(), ran.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("srgan", "--scale", "2"), "srgan is trained for x4 only"),
        (("srcnn", "--init", "none.safetensors"), "cannot be read"),
        (("srcnn", "--patch", "64"), "photographs of"),
        (("vdsr",), "is not one of"),
    ],
)
def test_what_cannot_be_trained_is_wrong_use(folder: Path, words: tuple[str, ...], told: str) -> None:
    ran = run(*words, "--data", folder)
    assert ran.exit_code == 2
    assert told in ran.output


def test_the_plan_is_what_a_checkpoint_is_known_by(folder: Path, tmp_path: Path) -> None:
    trained_in(tmp_path / "out", folder)
    found = torch.load(tmp_path / "out" / training.CHECKPOINT, weights_only=True)
    assert Plan(**found["plan"]) == FSRCNN
    assert found["plan"] == asdict(FSRCNN)
