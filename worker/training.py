"""Trains SRCNN and FSRCNN, and fine-tunes SRGAN, from a folder of photographs.

A training lives in a folder of its own: `checkpoint.pt` (all that is needed to go on), `curve.json` and `curve.png`
(what it has come to), and the finished weights as safetensors whose metadata say where they come from. Stopped at any
moment and started again it goes on from its last checkpoint and sees what it would have seen: what a step is trained
with is drawn from the seed and the step's number.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, UnidentifiedImageError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from worker.bicubic import imresize
from worker.metrics import psnr
from worker.networks.luma import LUMA, LumaNetwork

PHOTOGRAPHS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
SHRINKS = (1.0, 0.8, 0.6)
"""Each photograph is also taken made smaller, as FSRCNN's authors do: what is soft at its full size is sharp there."""
HELD_OUT_EVERY = 12
"""One photograph in so many, by name, is never trained on: weights are judged by those."""
HELD_OUT_PX = 256
POOL_PICTURES = 160
"""Photographs held in memory at once; of a larger folder one is exchanged every STEPS_PER_PICTURE steps."""
STEPS_PER_PICTURE = 4
CANDIDATES = 2
"""Of so many places drawn the one with most to see is taken: sky teaches nothing."""

AVERAGE_DECAY = 0.999
WARM_UP_STEPS = 100
SHARE_ALONE = 0.25
"""Of a training for another scale, the part in which only the last layer is trained."""

CHECKPOINT, CURVE, CURVE_PICTURE = "checkpoint.pt", "curve.json", "curve.png"


@dataclass(frozen=True)
class Plan:
    """All that decides what a training comes to, beside the photographs. A checkpoint goes on under its own plan."""

    network: str
    """srcnn, fsrcnn or srgan."""
    scale: int
    steps: int
    batch: int
    patch_px: int
    """Side, in px of the small picture, of what one patch is judged by."""
    learning_rate: float
    seed: int
    init: str | None = None
    """What it began from, in words; None is from nothing."""


PLANS = {
    "srcnn": Plan("srcnn", 4, steps=3_000, batch=16, patch_px=16, learning_rate=1e-3, seed=0),
    "fsrcnn": Plan("fsrcnn", 4, steps=16_000, batch=16, patch_px=26, learning_rate=2e-3, seed=0),
    "srgan": Plan("srgan", 4, steps=100_000, batch=16, patch_px=24, learning_rate=1e-4, seed=0),
}
"""What is done where nothing else is asked for."""


@dataclass(frozen=True)
class Check:
    """What a training had come to at one step: a point of its curve."""

    step: int
    losses: dict[str, float]
    """Means since the check before, by name."""
    scores: dict[str, float]
    """Of the averaged weights, over the photographs held out; `psnr`, in dB, is always there."""
    seconds: float
    """Spent on the training so far, in all its sittings."""


@dataclass(frozen=True)
class Pair:
    """A photograph and what shrinking leaves of it. small: (h, w, 3), truth: (h * scale, w * scale, 3), both uint8."""

    small: NDArray[np.uint8]
    truth: NDArray[np.uint8]


class Pupil(Protocol):
    """What is trained: a network of luma, or SRGAN's generator together with what judges it."""

    @property
    def patch_px(self) -> int:
        """Side of a small patch, with the context the network needs around what it is judged by."""

    def learn(self, small: NDArray[np.uint8], truth: NDArray[np.uint8], step: int, share: float) -> dict[str, float]:
        """Step number `step` on a batch, with `share` (0 to 1) of the training done. Returns its losses by name."""

    def judge(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """The scores of the averaged weights."""

    def better(self, scores: dict[str, float], than: dict[str, float]) -> bool:
        """Whether weights with these scores are to be kept in place of others."""

    def result(self) -> nn.Module:
        """The network with the averaged weights."""

    def state(self) -> dict[str, Any]:
        """All of it, as torch.load reads it with `weights_only`."""

    def restore(self, state: dict[str, Any]) -> None:
        """Becomes what `state` was taken of."""


class Photographs:
    """The folder's pictures: pairs held out, and batches of patches of the others.

    Raises ValueError if fewer than two are large enough for a patch.
    """

    def __init__(self, folder: Path, scale: int, patch_px: int, seed: int) -> None:
        self._scale, self._patch_px, self._seed = scale, patch_px, seed
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTOGRAPHS)
        usable = [path for path in paths if self._usable(path)]
        self.skipped = [path.name for path in paths if path not in set(usable)]
        """Files that are no picture, or too small for a patch."""
        if len(usable) < 2:
            raise ValueError(
                f"{folder} holds {len(usable)} photographs of {scale * patch_px} px a side or more (of {len(paths)} "
                "files that may be some); it takes two: one to train on and one to judge by."
            )
        self._held_out = usable[::HELD_OUT_EVERY]
        self._trained_on = [(path, shrink) for path in usable if path not in self._held_out for shrink in SHRINKS]
        np.random.default_rng(seed).shuffle(self._trained_on)
        self._pool: dict[int, Pair] = {}

    def __len__(self) -> int:
        return len(self._held_out) + len(self._trained_on) // len(SHRINKS)

    def held_out(self) -> list[Pair]:
        """The middle of each photograph that is never trained on."""
        return [_pair(_middle(_read(path)), self._scale) for path in self._held_out]

    def batch(self, step: int, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """(size, patch, patch, 3) small and (size, patch * scale, patch * scale, 3) true uint8, for that step."""
        chance = np.random.default_rng((self._seed, step))
        pool = self._pool_at(step)
        small: list[NDArray[np.uint8]] = []
        truth: list[NDArray[np.uint8]] = []
        for _ in range(size):
            pair = pool[chance.integers(len(pool))]
            places = [self._place(pair, chance) for _ in range(CANDIDATES)]
            details = [float(_cut(pair.small, *place, self._patch_px).std()) for place in places]
            top, left = places[int(np.argmax(details))]
            turns, mirrored = int(chance.integers(4)), bool(chance.integers(2))
            for patches, source, unit in ((small, pair.small, 1), (truth, pair.truth, self._scale)):
                patch = np.rot90(_cut(source, top * unit, left * unit, self._patch_px * unit), turns)
                patches.append(patch[:, ::-1] if mirrored else patch)
        return np.stack(small), np.stack(truth)

    def _place(self, pair: Pair, chance: np.random.Generator) -> tuple[int, int]:
        height, width = pair.small.shape[:2]
        return int(chance.integers(height - self._patch_px + 1)), int(chance.integers(width - self._patch_px + 1))

    def _pool_at(self, step: int) -> list[Pair]:
        count = len(self._trained_on)
        first = step // STEPS_PER_PICTURE if count > POOL_PICTURES else 0
        wanted = [(first + offset) % count for offset in range(min(count, POOL_PICTURES))]
        for index in set(self._pool) - set(wanted):
            del self._pool[index]
        least_px = self._scale * self._patch_px
        for index in wanted:
            if index not in self._pool:
                path, shrink = self._trained_on[index]
                picture = _read(path)
                height, width = (max(least_px, round(length * shrink)) for length in picture.shape[:2])
                self._pool[index] = _pair(imresize(picture, width, height), self._scale)
        return [self._pool[index] for index in wanted]

    def _usable(self, path: Path) -> bool:
        try:
            with Image.open(path) as picture:
                return min(picture.size) >= self._scale * self._patch_px
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
            return False


def train(
    pupil: Pupil,
    photographs: Photographs,
    plan: Plan,
    folder: Path,
    *,
    check_every: int,
    on_step: Callable[[int, Check | None], None],
    should_stop: Callable[[], bool],
) -> list[Check]:
    """Trains until `plan.steps` are done or `should_stop` says so; returns the curve so far.

    Goes on from `folder`'s checkpoint if there is one. Every `check_every` steps, and at the end, the held-out
    photographs are scored and the checkpoint and the curve are written; a training that is killed loses what came
    after. `on_step` hears each finished step, and the check it ended with. When all is done the pupil holds the best
    weights there were. Raises ValueError if the checkpoint is of another plan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held_out = photographs.held_out()
    curve: list[Check] = []
    best: dict[str, Any] | None = None
    step, seconds = 0, 0.0
    if (folder / CHECKPOINT).is_file():
        found = _checkpoint(folder, plan)
        pupil.restore(found["pupil"])
        curve = [Check(**each) for each in found["curve"]]
        best, step, seconds = found["best"], found["step"], found["seconds"]
    since: list[dict[str, float]] = []
    started = time.monotonic() - seconds
    while step < plan.steps and not should_stop():
        small, truth = photographs.batch(step, plan.batch)
        since.append(pupil.learn(small, truth, step, step / plan.steps))
        step += 1
        check = None
        if step % check_every == 0 or step == plan.steps:
            losses = {name: fmean(each[name] for each in since) for name in since[0]}
            check = Check(step, losses, pupil.judge(held_out), time.monotonic() - started)
            curve.append(check)
            since.clear()
            if best is None or pupil.better(check.scores, best["scores"]):
                weights = {name: each.clone() for name, each in pupil.result().state_dict().items()}
                best = {"scores": check.scores, "step": step, "weights": weights}
            _keep(folder, plan, pupil, curve, best, step, check.seconds)
        on_step(step, check)
    if since:
        # Stopped between two checks: what was learnt since the last one is kept, unscored.
        _keep(folder, plan, pupil, curve, best, step, time.monotonic() - started)
    if step >= plan.steps and best is not None:
        pupil.result().load_state_dict(best["weights"])
    return curve


def best_of(pupil: Pupil, curve: Sequence[Check]) -> Check:
    """The check whose weights are kept."""
    best = curve[0]
    for check in curve[1:]:
        if pupil.better(check.scores, best.scores):
            best = check
    return best


def _checkpoint(folder: Path, plan: Plan) -> dict[str, Any]:
    found = cast(dict[str, Any], torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True))
    # More steps, or fewer, are the same training with another end.
    differing = [
        f"{name} {found['plan'][name]} there, {wanted} asked for"
        for name, wanted in asdict(plan).items()
        if name != "steps" and found["plan"][name] != wanted
    ]
    if differing:
        raise ValueError(
            f"{folder} holds another training ({'; '.join(differing)}). Ask for the same, or choose another folder."
        )
    return found


def _keep(
    folder: Path, plan: Plan, pupil: Pupil, curve: list[Check], best: dict[str, Any] | None, step: int, seconds: float
) -> None:
    checks = [asdict(check) for check in curve]
    beside = folder / f"{CHECKPOINT}.new"
    torch.save(
        {
            "plan": asdict(plan),
            "pupil": pupil.state(),
            "curve": checks,
            "best": best,
            "step": step,
            "seconds": seconds,
        },
        beside,
    )
    # Never half a checkpoint, whatever happens meanwhile.
    os.replace(beside, folder / CHECKPOINT)
    (folder / CURVE).write_text(json.dumps({"plan": asdict(plan), "checks": checks}, indent=2) + "\n")
    if len(curve) > 1:
        draw_curve(curve).save(folder / CURVE_PICTURE)


class LumaPupil:
    """SRCNN or FSRCNN, by the mean squared error of luma as both papers have it; Adam and a cosine in place of SGD.

    With `init`, a trained network of the same kind for any scale, it begins as that. The deconvolution of FSRCNN
    belongs to a scale, and all before it serves any: for another scale it is trained alone first (Dong et al. 2016).
    """

    def __init__(self, network: LumaNetwork, plan: Plan, device: str, init: LumaNetwork | None = None) -> None:
        self._network, self._plan, self._device = network, plan, torch.device(device)
        network.begin(torch.Generator().manual_seed(plan.seed))
        self._alone = network.take_over(init) if init is not None else []
        network.to(self._device).to(memory_format=torch.channels_last)
        self._average = averaged(network)
        self._adam = torch.optim.Adam(network.parameters(), lr=plan.learning_rate)

    @property
    def patch_px(self) -> int:
        return self._plan.patch_px + 2 * self._network.reach_px

    def learn(self, small: NDArray[np.uint8], truth: NDArray[np.uint8], step: int, share: float) -> dict[str, float]:
        set_rate(self._adam, self._plan.learning_rate, step, share)
        for name, parameter in self._network.named_parameters():
            parameter.requires_grad_(not self._alone or share >= SHARE_ALONE or name in self._alone)
        border_px = self._network.reach_px * self._network.scale
        wanted = _luma(truth, self._device)[:, :, border_px:-border_px, border_px:-border_px]
        loss = F.mse_loss(self._network.valid(_luma(small, self._device)), wanted)
        self._adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._adam.step()
        self._average.update_parameters(self._network)
        return {"mse": loss.item()}

    def judge(self, pairs: Sequence[Pair]) -> dict[str, float]:
        return {"psnr": mean_psnr(self.result(), pairs)}

    def better(self, scores: dict[str, float], than: dict[str, float]) -> bool:
        return scores["psnr"] > than["psnr"]

    def result(self) -> nn.Module:
        return self._average.module

    def state(self) -> dict[str, Any]:
        return {
            "network": self._network.state_dict(),
            "average": self._average.state_dict(),
            "adam": self._adam.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._network.load_state_dict(state["network"])
        self._average.load_state_dict(state["average"])
        self._adam.load_state_dict(state["adam"])


def mean_psnr(network: nn.Module, pairs: Sequence[Pair]) -> float:
    """Mean over the pairs of PSNR of Y as `enlarger evaluate` takes it, of the network's 8-bit answers."""
    values = []
    with torch.inference_mode():
        for pair in pairs:
            answer = network(tensor_of(pair.small[None], next(network.parameters()).device))[0]
            picture = (answer.clamp(0, 1) * 255).round_().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            values.append(psnr(picture, pair.truth, len(pair.truth) // len(pair.small)))
    return fmean(values)


def tensor_of(pictures: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [0, 1], channels_last."""
    return torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2).float() / 255


def _luma(pictures: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 1, H, W) float32 in [0, 1]."""
    return torch.from_numpy(pictures @ (np.array(LUMA, np.float32) / 255)).to(device)[:, None]


def averaged(network: nn.Module) -> AveragedModel:
    """A copy that follows the network slowly: what is judged and kept. Its noise is a fraction of the network's."""

    def follow(average: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        # At first it follows faster: what it begins as is not worth remembering for a thousand steps.
        return average.lerp(current, 1 - min(AVERAGE_DECAY, (1 + int(count)) / (10 + int(count))))

    return AveragedModel(network, avg_fn=follow)


def set_rate(optimizer: torch.optim.Optimizer, rate: float, step: int, share: float) -> None:
    """A short warm-up, then half a cosine down to nothing."""
    for group in optimizer.param_groups:
        group["lr"] = rate * min(1.0, (step + 1) / WARM_UP_STEPS) * (1 + math.cos(math.pi * share)) / 2


def _read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def _pair(picture: NDArray[np.uint8], scale: int) -> Pair:
    height, width = (length // scale for length in picture.shape[:2])
    truth = picture[: height * scale, : width * scale]
    return Pair(imresize(truth, width, height), truth)


def _middle(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    top, left = (max(0, (length - HELD_OUT_PX) // 2) for length in picture.shape[:2])
    return picture[top : top + HELD_OUT_PX, left : left + HELD_OUT_PX]


def _cut(picture: NDArray[np.uint8], top: int, left: int, side_px: int) -> NDArray[np.uint8]:
    return picture[top : top + side_px, left : left + side_px]


def draw_curve(curve: Sequence[Check]) -> Image.Image:
    """Each loss and each score over the steps, one line under the other, each over its own range."""
    names = [("loss", name) for name in curve[0].losses] + [("score", name) for name in curve[0].scores]
    width, height, margin = 640, 140, 24
    drawn = Image.new("RGB", (width, height * len(names)), "white")
    pen = ImageDraw.Draw(drawn)
    for row, (kind, name) in enumerate(names):
        values = [(check.losses if kind == "loss" else check.scores)[name] for check in curve]
        low, high = min(values), max(values)
        top = row * height
        points = [
            (
                margin + (width - 2 * margin) * check.step / curve[-1].step,
                top + height - margin - (height - 2 * margin) * ((value - low) / (high - low) if high > low else 0.5),
            )
            for check, value in zip(curve, values, strict=True)
        ]
        pen.line([(margin, top + height - margin), (width - margin, top + height - margin)], fill="#bbbbbb")
        pen.line(points, fill="#a33b20" if kind == "loss" else "#1f6f54", width=2)
        pen.text(
            (margin, top + 4), f"{kind} {name}: {values[0]:.4g} to {values[-1]:.4g} at step {curve[-1].step}", "black"
        )
        pen.text((margin, top + height - margin + 4), "0", "#777777")
    return drawn
