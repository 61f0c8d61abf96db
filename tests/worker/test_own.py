"""Models of one's own: files that work, files that do not, and files that would like to do something else."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from spandrel.architectures.Compact import Compact as SRVGGNetCompact

from shared.catalog import EXACT, OwnFile
from shared.errors import InvalidRequest, ModelUnavailable
from tests.factories import a_png
from worker import networks
from worker.enlarging import Engine, Wanted
from worker.networks import load, own
from worker.networks.fsrcnn import Fsrcnn


def a_network(scale: int = 2) -> dict[str, torch.Tensor]:
    """The weights of a very small network that spandrel knows."""
    torch.manual_seed(1)
    return SRVGGNetCompact(num_feat=8, num_conv=2, upscale=scale).state_dict()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "models"
    made.mkdir()
    safetensors.torch.save_file(a_network(), made / "mine.safetensors")
    torch.save({"params_ema": a_network(4)}, made / "hers.pth")
    (made / "readme.txt").write_text("Not looked at.")
    return made


def test_every_file_that_spandrel_reads_is_a_card(folder: Path) -> None:
    cards, faults = own.scan(folder)
    assert faults == []
    hers, mine = cards
    assert (hers.name, hers.scale, mine.name, mine.scale) == ("hers", 4, "mine", 2)
    assert mine.architecture == "RealESRGAN Compact"
    assert isinstance(mine.weights, OwnFile)
    assert len(mine.weights.sha256) == 64
    # The network's own three convolutions, and little else.
    assert mine.megaflops_per_input_px == pytest.approx(2 * 9 * (3 * 8 + 2 * 8 * 8 + 8 * 12) / 1e6, rel=0.01)


def test_what_enlarger_train_made_is_a_model_like_any_other_and_exact(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    # What it shipped with came out of that command.
    shipped = Path(networks.__file__).parent / "fsrcnn-x3.safetensors"
    shutil.copy(shipped, folder / "family.safetensors")
    [card], faults = own.scan(folder)
    assert (faults, card.name, card.architecture, card.scale) == ([], "family", "fsrcnn", 3)
    assert (card.halo_px, card.guarantee) == (Fsrcnn(3).reach_px, EXACT)
    engine = Engine("cpu", max_input_px=10_000, max_output_px=1_000_000, own=[card])
    made = engine.enlarge_file(io.BytesIO(a_png(12, 9)), tmp_path / "result.png", Wanted(model="family", scale=3))
    assert (made.width, made.height, made.model) == (36, 27, "family")


def test_a_picture_is_enlarged_by_ones_own_model_as_by_spandrel_itself(folder: Path, tmp_path: Path) -> None:
    cards, _ = own.scan(folder)
    engine = Engine("cpu", max_input_px=10_000, max_output_px=1_000_000, own=cards)
    pixels = np.random.default_rng(2).integers(90, 160, (14, 18, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    file.seek(0)
    made = engine.enlarge_file(file, tmp_path / "result.png", Wanted(model="mine", scale=2))
    network = SRVGGNetCompact(num_feat=8, num_conv=2, upscale=2)
    network.load_state_dict(a_network())
    with torch.inference_mode():
        expected = network(torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    levels = np.abs(np.asarray(Image.open(tmp_path / "result.png")).astype(int) - (expected.numpy() * 255).round())
    assert (made.width, made.height, made.model) == (36, 28, "mine")
    assert levels.max() <= 1
    assert engine.models_loaded == ("mine",)


class Evil:
    """Unpickled by anything that trusts it, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", ["zip", "bare"])
def test_a_file_that_holds_a_program_is_refused_and_not_run(folder: Path, tmp_path: Path, protocol: str) -> None:
    mark = tmp_path / "mark"
    if protocol == "zip":
        torch.save({"weights": Evil(mark)}, folder / "evil.pth")
    else:
        (folder / "evil.pth").write_bytes(pickle.dumps(Evil(mark)))
    cards, (fault,) = own.scan(folder)
    assert [card.name for card in cards] == ["hers", "mine"]
    assert Path(fault.path).name == "evil.pth"
    assert "weights_only" in fault.reason
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("noise.safetensors", b"\x08\0\0\0\0\0\0\0nonsense", "Neither safetensors"),
        ("empty.pth", b"", "Neither safetensors"),
        ("cut.pth", b"PK\x03\x04 and no more", "damaged"),
        ("srgan.safetensors", b"", "Rename the file: srgan is the name of a model of the catalogue"),
        ("auto.pth", b"", "Rename the file"),
        ("with a space.pth", b"", "Rename the file"),
        (
            "unknown.safetensors",
            safetensors.torch.save({"nobody.weight": torch.zeros(3)}),
            "Not a network that spandrel knows",
        ),
        ("mine.pth", None, "There is another file named mine"),
    ],
)
def test_a_broken_file_is_named_with_a_reason_and_leaves_the_rest(
    folder: Path, name: str, content: bytes | None, reason: str
) -> None:
    if content is None:
        torch.save(a_network(), folder / name)
    else:
        (folder / name).write_bytes(content)
    cards, (fault,) = own.scan(folder)
    assert [card.name for card in cards] == ["hers", "mine"]
    assert reason in fault.reason
    assert Path(fault.path).parent == folder


def test_a_folder_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    cards, (fault,) = own.scan(tmp_path / "none")
    assert cards == []
    assert "names no folder" in fault.reason


def test_a_file_that_changes_under_a_running_worker_is_not_used(folder: Path) -> None:
    cards, _ = own.scan(folder)
    safetensors.torch.save_file(a_network(4), folder / "mine.safetensors")
    with pytest.raises(ModelUnavailable, match=r"mine.safetensors has changed since this worker started"):
        load(cards[1], "cpu")
    (folder / "hers.pth").unlink()
    with pytest.raises(ModelUnavailable, match=r"hers.pth in ENLARGER_MODELS_DIR cannot be read"):
        load(cards[0], "cpu")


def test_a_network_that_enlarges_nothing_is_offered_at_scale_1_only(folder: Path) -> None:
    safetensors.torch.save_file(a_network(1), folder / "clean.safetensors")
    clean = own.scan(folder)[0][0]
    assert (clean.name, clean.scale) == ("clean", 1)
    assert clean.passes(1) == (clean,)
    with pytest.raises(InvalidRequest, match="The scale of clean is 1, not 2"):
        clean.passes(2)


def test_a_call_that_takes_long_gives_signs_of_life(folder: Path) -> None:
    network = load(own.scan(folder)[0][1], "cpu")
    steps: list[int] = []
    network.on_step = lambda: steps.append(1)
    network(torch.zeros(1, 3, 8, 8))
    # Each layer that it is made of.
    assert len(steps) >= 5
    network(torch.zeros(1, 3, 8, 8), half=True)
    assert len(steps) >= 10


def test_what_is_found_can_be_asked_for_from_a_process_without_torch(folder: Path) -> None:
    (folder / "bad.pth").write_bytes(b"no")
    ran = subprocess.run(
        [sys.executable, "-m", "worker.networks.own", str(folder)], capture_output=True, text=True, check=True
    )
    found = json.loads(ran.stdout)
    assert [model["name"] for model in found["models"]] == ["hers", "mine"]
    assert [Path(fault["path"]).name for fault in found["faults"]] == ["bad.pth"]
