from __future__ import annotations

import itertools
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from shared.catalog import card
from shared.errors import BadOutput, DeviceBroken, InvalidRequest, ModelUnavailable, OutOfMemory
from worker import upscale as upscale_module
from worker.networks import Network, load, pages
from worker.networks.srresnet import SrResNet, _ResidualBlock
from worker.tiling import SMALLEST_TILE_PX, Plan, plan
from worker.upscale import (
    Repairs,
    UpscaledBand,
    Work,
    choose_device,
    enlarge,
    plan_work,
    prepare_process,
    upscale,
)

# --- networks, pictures and comparisons -------------------------------------------------------------------------------


def small_module(blocks: int = 1, seed: int = 1) -> SrResNet:
    """The real architecture with few channels and random weights, scaled so that the output has contrast."""
    torch.manual_seed(seed)
    module = SrResNet(channels=4, blocks=blocks)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.mul_(1.7)
    return module.freeze()


def network_of(module: SrResNet) -> Network:
    # No weights of a package: what is measured of it is not remembered as the card's.
    return Network(replace(card("srgan"), halo_px=module.reach_px, weights=None), "cpu", module)


@pytest.fixture
def small() -> Network:
    return network_of(small_module())


def shifting_module(right: int, down: int) -> SrResNet:
    """Adversarial weights for the real depth: every layer looks as far as it can in one direction, and only there.

    An output pixel is then made of the input pixel at the very end of the receptive field (and of one near it, by the
    long shortcut). With trained weights that pixel's influence is real but far below a level of 255, so a halo one px
    short would pass unnoticed; with these it cannot.
    """
    module = SrResNet(channels=8, blocks=16)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.zero_()
            cast(Tensor, layer.bias).data.zero_()
        if isinstance(layer, nn.PReLU):
            layer.weight.data.fill_(1.0)

    def look(conv: nn.Conv2d, target: int, source: int, weight: float = 1.0, *, far: bool = True) -> None:
        middle = conv.kernel_size[0] // 2
        row, column = (middle + middle * down, middle + middle * right) if far else (middle, middle)
        conv.weight.data[target, source, row, column] += weight

    for colour in range(3):
        look(module.head, colour, colour)
        for block in cast(list[_ResidualBlock], module.blocks):
            look(block.first, colour, colour)
            look(block.first, colour + 3, colour, far=False)
            # Takes back what the block's shortcut adds, so that only the far pixel remains.
            look(block.second, colour, colour)
            look(block.second, colour, colour + 3, -1.0, far=False)
        look(module.merge, colour, colour)
        for phase in range(4):
            look(module.up1, 4 * colour + phase, colour)
            look(module.up2, 4 * colour + phase, colour)
        look(module.out, colour, colour, 0.5)
    return module.freeze()


DIRECTIONS = tuple(itertools.product((-1, 1), (-1, 1)))
SHIFTING = {direction: network_of(shifting_module(*direction)) for direction in DIRECTIONS}


def picture(width: int, height: int, seed: int = 0, dtype: Any = np.uint8) -> NDArray[Any]:
    """Noise: every pixel counts, and no error hides in a smooth place."""
    rng = np.random.default_rng(seed)
    if dtype == np.float32:
        return rng.random((height, width, 3), dtype=np.float32)
    return rng.integers(0, np.iinfo(dtype).max, (height, width, 3), dtype, endpoint=True)


def floats(image: NDArray[Any]) -> NDArray[np.float32]:
    full = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1
    return (image / np.float32(full)).astype(np.float32)


def whole(network: Network, image: NDArray[Any]) -> NDArray[np.float32]:
    """The picture in one piece through the network as the paper draws it: no plan, no tiles, no strips.

    What lies beyond black and white is cut off, as for every picture.
    """
    with torch.inference_mode():
        answer: Tensor = network.module(torch.from_numpy(floats(image)).permute(2, 0, 1)[None])
    return answer[0].permute(1, 2, 0).clamp(0, 1).numpy()


def tiled(
    network: Network, image: NDArray[Any], *, tile_px: int, halo_px: int | None = None, **options: Any
) -> NDArray[Any]:
    height, width = image.shape[:2]
    planned = plan(width, height, halo_px=network.halo_px if halo_px is None else halo_px, tile_px=tile_px)
    return np.concatenate([band.pixels for band in upscale(network, image, plan=planned, **options)])


def levels_apart(a: NDArray[np.float32], b: NDArray[np.float32]) -> int:
    """Greatest difference once both are rounded to 8 bits."""
    assert a.shape == b.shape
    return int(np.abs(np.rint(a * 255).astype(int) - np.rint(b * 255).astype(int)).max())


def assert_same_picture(a: NDArray[np.float32], b: NDArray[np.float32], most_levels: int = 1) -> None:
    apart = np.abs(np.rint(a * 255) - np.rint(b * 255))
    where = np.unravel_index(int(apart.argmax()), apart.shape)
    assert apart.max() <= most_levels, f"{apart.max()} levels apart at (y, x, c) {where}, mean {apart.mean()}"


# --- tiled is whole ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 70), st.integers(1, 70), st.integers(7, 64), st.integers(1, 2))
@settings(max_examples=40, deadline=None)
def test_a_tiled_result_is_the_whole_result(width: int, height: int, tile_px: int, blocks: int) -> None:
    network = network_of(small_module(blocks))
    image = picture(width, height, seed=width * 100 + height)
    expected = whole(network, image)
    assert_same_picture(tiled(network, image, tile_px=tile_px), expected)


@st.composite
def affordable_cuts(draw: st.DrawFn) -> tuple[int, int, int]:
    """(width, height, tile_px) up to 70 px whose halos do not make the real network read more than 25,000 px."""
    tile_px = draw(st.integers(8, 64))
    width, height = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    while plan(width, height, halo_px=40, tile_px=tile_px).read_px > 25_000:
        width, height = (width * 3 // 4, height) if width > height else (width, height * 3 // 4)
    return width, height, tile_px


@given(affordable_cuts())
@settings(max_examples=20, deadline=None)
def test_a_tiled_result_of_srgan_is_the_whole_result(cut: tuple[int, int, int]) -> None:
    width, height, tile_px = cut
    network = load(card("srgan"), "cpu")
    image = picture(width, height, seed=width * 100 + height)
    assert_same_picture(tiled(network, image, tile_px=tile_px), whole(network, image))


@pytest.mark.parametrize(("width", "height"), [(1, 70), (70, 1), (1, 1), (2, 3), (3, 57)])
def test_a_thin_picture_tiled_by_srgan_is_the_whole_result(width: int, height: int) -> None:
    network = load(card("srgan"), "cpu")
    image = picture(width, height)
    assert_same_picture(tiled(network, image, tile_px=9), whole(network, image))


# These weights move a picture much smaller than their reach out of its own frame, and a flat result is refused.
@given(st.integers(20, 110), st.integers(20, 110), st.integers(16, 64), st.sampled_from(DIRECTIONS))
@settings(max_examples=25, deadline=None)
def test_the_cards_halo_is_enough_for_the_worst_weights(
    width: int, height: int, tile_px: int, direction: tuple[int, int]
) -> None:
    network = SHIFTING[direction]
    assert network.halo_px == card("srgan").halo_px
    image = picture(width, height)
    assert_same_picture(tiled(network, image, tile_px=tile_px), whole(network, image))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_halo_one_px_short_is_caught(direction: tuple[int, int]) -> None:
    network = SHIFTING[direction]
    image = picture(110, 100)
    expected = whole(network, image)
    assert levels_apart(tiled(network, image, tile_px=50), expected) == 0
    assert levels_apart(tiled(network, image, tile_px=50, halo_px=network.halo_px - 1), expected) > 10


# --- kinds of input and output ----------------------------------------------------------------------------------------


def test_sixteen_bit_pictures_are_read_over_their_full_range(small: Network) -> None:
    image = picture(23, 17, dtype=np.uint16)
    assert_same_picture(tiled(small, image, tile_px=10), whole(small, image))


def test_a_dark_sixteen_bit_picture_stays_dark(small: Network) -> None:
    # All values under 256: an engine that went by the greatest value would take it for 8 bits.
    image = picture(23, 17).astype(np.uint16)
    assert_same_picture(tiled(small, image, tile_px=10), whole(small, np.zeros((17, 23, 3), np.uint8)), most_levels=2)


def test_float_pictures_are_taken_as_they_are(small: Network) -> None:
    image = picture(23, 17, dtype=np.float32)
    assert_same_picture(tiled(small, image, tile_px=10), whole(small, image))
    assert_same_picture(tiled(small, image[::-1, ::2], tile_px=10), whole(small, image[::-1, ::2].copy()))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_read_only_picture_is_taken_as_it_is(small: Network, dtype: Any) -> None:
    image = picture(23, 17, dtype=dtype)
    expected = whole(small, image)
    image.setflags(write=False)
    assert_same_picture(tiled(small, image, tile_px=100), expected)


@pytest.mark.parametrize(("dtype", "full"), [(np.uint8, 255), (np.uint16, 65535)])
def test_results_are_rounded_to_the_dtype_asked_for(small: Network, dtype: Any, full: int) -> None:
    image = picture(23, 17)
    exact = tiled(small, image, tile_px=10)
    rounded = tiled(small, image, tile_px=10, dtype=dtype)
    assert exact.dtype == np.float32
    assert rounded.dtype == dtype
    assert np.abs(rounded - exact.astype(np.float64) * full).max() <= 0.51


def test_bands_come_in_order_and_are_the_callers_to_keep(small: Network) -> None:
    image = picture(20, 33)
    planned = plan(20, 33, halo_px=small.halo_px, tile_px=8)
    bands = list(upscale(small, image, plan=planned))
    assert [band.band for band in bands] == list(planned.bands)
    assert [band.y_px for band in bands] == [4 * band.region.y for band in planned.bands]
    assert_same_picture(np.concatenate([band.pixels for band in bands]), whole(small, image))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((5, 5), np.uint8),
        np.zeros((5, 5, 4), np.uint8),
        np.zeros((5, 5, 3), np.float64),
        np.zeros((5, 5, 3), np.int16),
    ],
)
def test_other_arrays_are_refused(small: Network, image: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="A picture is"):
        list(upscale(small, image, plan=plan(5, 5, halo_px=10, tile_px=8)))


def test_a_plan_for_another_picture_is_refused(small: Network) -> None:
    with pytest.raises(ValueError, match="The plan is for 6 x 5 px; the picture is 5 x 5 px"):
        list(upscale(small, picture(5, 5), plan=plan(6, 5, halo_px=10, tile_px=8)))


# --- progress and cancelling ------------------------------------------------------------------------------------------


def test_progress_is_told_after_every_tile(small: Network) -> None:
    told: list[tuple[int, int]] = []
    tiled(small, picture(20, 30), tile_px=10, on_tile=lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]


class Stop(RuntimeError):
    """A RuntimeError with the words of an out-of-memory error: what a caller raises must not be taken for torch's."""


def test_what_the_caller_raises_passes_through_and_nothing_more_is_computed() -> None:
    network = Recording(small_module())

    def stop_at_the_second(done: int, total: int) -> None:
        if done == 2:
            raise Stop("out of memory")

    with pytest.raises(Stop):
        tiled(network, picture(20, 30), tile_px=10, on_tile=stop_at_the_second)
    assert len(network.calls) == 2


# --- what goes wrong on a device --------------------------------------------------------------------------------------


class Recording(Network):
    """A Network that notes each call, and may be told to answer it otherwise.

    `answers` is consulted before each call, in order, with the call's number: an exception is raised, a function is
    given the true answer and gives another.
    """

    def __init__(self, module: SrResNet) -> None:
        super().__init__(replace(card("srgan"), halo_px=module.reach_px), "cpu", module)
        self.calls: list[tuple[int, int, bool]] = []
        self.misbehave: Callable[[int, Tensor, bool], Exception | Callable[[Tensor], Tensor] | None] = (
            lambda number, tile, half: None
        )

    def __call__(self, tile: Tensor, *, keep: tuple[int, int, int, int] | None = None, half: bool = False) -> Tensor:
        assert keep is not None
        self.calls.append((keep[2], keep[3], half))
        trouble = self.misbehave(len(self.calls), tile, half)
        if isinstance(trouble, Exception):
            raise trouble
        # The true answer is always that of float32: half precision is only asked for here, on no GPU.
        answer = super().__call__(tile, keep=keep)
        return trouble(answer) if trouble else answer


class HalfRecording(Recording):
    """As on a GPU: half precision is tried first."""

    @property
    def prefers_half(self) -> bool:
        return True


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99999 bytes. Error code 12"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    MemoryError(),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:30])
def test_only_the_band_that_ran_out_of_memory_is_done_again_with_smaller_tiles(error: Exception) -> None:
    network = Recording(small_module())
    # The fourth call is the second tile of the second band.
    network.misbehave = lambda number, tile, half: error if number == 4 else None
    image = picture(80, 120)
    told: list[tuple[int, int]] = []
    result = tiled(network, image, tile_px=40, on_tile=lambda done, total: told.append((done, total)))
    assert_same_picture(result, whole(network, image))
    sizes = [(width, height) for width, height, _ in network.calls]
    assert sizes == [(40, 40)] * 4 + [(20, 20)] * 8 + [(40, 40)] * 2
    # Three tiles were done before; the band's eight smaller ones come on top of the one that was in vain.
    assert told == [(done, 6) for done in (1, 2, 3)] + [(done, 13) for done in range(4, 14)]


def test_tiles_are_halved_until_they_fit() -> None:
    network = Recording(small_module())
    network.misbehave = lambda number, tile, half: OUT_OF_MEMORY[0] if tile.shape[2] * tile.shape[3] > 45 * 45 else None
    image = picture(100, 100)
    result = tiled(network, image, tile_px=100)
    assert_same_picture(result, whole(network, image))
    assert [width for width, _, _ in network.calls[:3]] == [100, 50, 25]
    assert len(network.calls) == 2 + 16


def test_memory_that_cannot_hold_the_smallest_tile_is_an_error_with_facts() -> None:
    network = Recording(small_module())
    network.misbehave = lambda number, tile, half: OUT_OF_MEMORY[0]
    with pytest.raises(OutOfMemory, match="Not even tiles of 16 px fit in the memory of cpu") as caught:
        tiled(network, picture(64, 60), tile_px=64)
    assert caught.value.facts == {"device": "cpu", "tile_px": SMALLEST_TILE_PX}
    assert [max(width, height) for width, height, _ in network.calls] == [64, 32, 16]


def test_no_memory_for_a_bands_result_is_an_error_at_once() -> None:
    # 2.9 PB: more than any address space gives.
    side = 1 << 22
    image = np.broadcast_to(np.zeros(3, np.uint8), (side, side, 3))
    network = Recording(small_module())
    one_band = plan(side, side, halo_px=0, tile_px=side)
    with pytest.raises(OutOfMemory, match="There is no memory for 16777216 x 16777216 px"):
        next(upscale(network, image, plan=one_band))
    assert network.calls == []


def not_a_number(answer: Tensor) -> Tensor:
    answer = answer.clone()
    answer[0, 1, -1, -1] = float("nan")
    return answer


def infinite(answer: Tensor) -> Tensor:
    answer = answer.clone()
    answer[0, 0, 0, 0] = float("inf")
    return answer


def flat(answer: Tensor) -> Tensor:
    return torch.full_like(answer, 0.5)


@pytest.mark.parametrize("spoil", [not_a_number, infinite])
def test_a_band_that_is_not_finite_in_half_precision_is_done_again_in_full(spoil: Callable[[Tensor], Tensor]) -> None:
    network = HalfRecording(small_module())
    network.misbehave = lambda number, tile, half: spoil if number == 4 else None
    image = picture(20, 30)
    told: list[tuple[int, int]] = []
    result = tiled(network, image, tile_px=10, on_tile=lambda done, total: told.append((done, total)))
    assert_same_picture(result, whole(network, image))
    # Six tiles in three bands; the second band's again; the third band tries half precision afresh.
    assert [half for _, _, half in network.calls] == [True] * 4 + [False] * 2 + [True] * 2
    assert told[-1] == (7, 7)


def test_a_flat_band_in_half_precision_is_done_again_in_full() -> None:
    network = HalfRecording(small_module())
    network.misbehave = lambda number, tile, half: flat if half else None
    image = picture(20, 10)
    assert_same_picture(tiled(network, image, tile_px=10), whole(network, image))
    assert [half for _, _, half in network.calls] == [True, True, False, False]


def test_what_was_mended_is_counted() -> None:
    network = HalfRecording(small_module())
    wrong = {2: not_a_number, 5: flat, 6: flat}
    network.misbehave = lambda number, tile, half: wrong.get(number)
    repairs = Repairs()
    rows = list(enlarge(network, picture(20, 20), 4, work=plan_work(network, 20, 20, 4, tile_px=10), repairs=repairs))
    assert sum(len(each.pixels) for each in rows) == 80
    # The first band's second tile, then the whole second band.
    assert repairs == Repairs(tiles_not_finite=1, bands_flat=1, bands_done_again=2)


def test_full_precision_can_be_asked_for_where_half_would_do() -> None:
    network = HalfRecording(small_module())
    list(enlarge(network, picture(20, 10), 4, work=plan_work(network, 20, 10, 4, tile_px=10), precise=True))
    assert [half for _, _, half in network.calls] == [False, False]


def test_a_tile_that_takes_long_tells_that_the_work_goes_on() -> None:
    network = Recording(small_module())
    told: list[tuple[int, int]] = []

    def step(number: int, tile: Tensor, half: bool) -> None:
        network.on_step()

    network.misbehave = step
    tiled(network, picture(20, 10), tile_px=10, on_tile=lambda done, total: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize(("spoil", "message"), [(not_a_number, "NaN or infinity"), (flat, "rows 0 to 10 is flat")])
def test_a_result_that_full_precision_spoils_too_is_an_error(spoil: Callable[[Tensor], Tensor], message: str) -> None:
    network = Recording(small_module())
    network.misbehave = lambda number, tile, half: spoil
    with pytest.raises(BadOutput, match=message) as caught:
        tiled(network, picture(20, 20), tile_px=10)
    assert caught.value.facts == {"model": "srgan", "device": "cpu"}


@pytest.mark.parametrize(("dtype", "full"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1)])
def test_a_picture_of_one_colour_may_have_a_flat_result(dtype: Any, full: float) -> None:
    network = Recording(small_module())
    network.misbehave = lambda number, tile, half: flat
    red = np.zeros((20, 20, 3), dtype)
    red[:, :, 0] = full
    assert tiled(network, red, tile_px=10).shape == (80, 80, 3)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
    ids=["accelerator", "cuda", "cudnn"],
)
def test_any_other_error_of_the_gpu_ends_the_process(error: Exception) -> None:
    network = Recording(small_module())
    network.misbehave = lambda number, tile, half: error
    with pytest.raises(DeviceBroken, match="cpu failed") as caught:
        tiled(network, picture(20, 20), tile_px=10)
    assert caught.value.__cause__ is error
    assert len(network.calls) == 1


def test_a_fault_of_our_own_is_not_blamed_on_the_device() -> None:
    network = Recording(small_module())
    network.misbehave = lambda number, tile, half: RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        tiled(network, picture(20, 20), tile_px=10)
    assert type(caught.value) is RuntimeError


def test_on_a_gpu_tiles_are_pinned_and_the_cache_is_emptied_before_a_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    # No GPU here: the network says it is on one and computes on the CPU; the two calls to CUDA are recorded.
    network = HalfRecording(small_module())
    network.device = torch.device("cuda:0")
    pinned: list[Tensor] = []
    emptied: list[int] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(network.calls)))
    monkeypatch.setattr(Network, "__call__", compute_on_the_cpu)
    network.misbehave = lambda number, tile, half: OUT_OF_MEMORY[0] if number == 1 else None
    image = picture(40, 40)
    expected = whole(network, image)
    assert_same_picture(tiled(network, image, tile_px=40), expected)
    assert emptied == [1]
    assert len(pinned) == len(network.calls) == 5


def compute_on_the_cpu(
    network: Network, tile: Tensor, *, keep: tuple[int, int, int, int] | None = None, half: bool = False
) -> Tensor:
    with torch.inference_mode():
        return network.module.enlarge(tile, keep)


# --- any scale --------------------------------------------------------------------------------------------------------


def by_pillow(result: NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
    planes = [Image.fromarray(np.ascontiguousarray(result[:, :, channel])) for channel in range(3)]
    reduced = [np.asarray(plane.resize((width, height), Image.Resampling.LANCZOS)) for plane in planes]
    return np.stack(reduced, axis=2).clip(0, 1)


def enlarged(network: Network, image: NDArray[Any], scale: int, **options: Any) -> NDArray[Any]:
    rows = list(enlarge(network, image, scale, **options))
    y_px = 0
    for each in rows:
        assert each.y_px == y_px
        y_px += len(each.pixels)
    assert rows[-1].bands_done == rows[-1].bands_total
    return np.concatenate([each.pixels for each in rows])


@pytest.mark.parametrize("scale", range(1, 17))
def test_every_scale_gives_exactly_its_size_and_what_the_whole_picture_would(small: Network, scale: int) -> None:
    image = picture(13, 19)
    once = whole(small, image)
    if scale <= 4:
        expected = once if scale == 4 else by_pillow(once, 13 * scale, 19 * scale)
    else:
        twice = whole(small, np.rint(once * 65535).astype(np.uint16))
        expected = twice if scale == 16 else by_pillow(twice, 13 * scale, 19 * scale)
    work = plan_work(small, 13, 19, scale, tile_px=12)
    result = enlarged(small, image, scale, work=work)
    assert result.shape == (19 * scale, 13 * scale, 3)
    assert_same_picture(result, expected)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 3), st.integers(3, 40))
@settings(max_examples=40, deadline=None)
def test_the_step_down_by_bands_is_that_of_the_whole_picture(width: int, height: int, scale: int, tile_px: int) -> None:
    network = network_of(small_module())
    image = picture(width, height, seed=height)
    expected = by_pillow(whole(network, image), width * scale, height * scale)
    work = plan_work(network, width, height, scale, tile_px=tile_px)
    assert_same_picture(enlarged(network, image, scale, work=work), expected)


@pytest.mark.parametrize("scale", [3, 4, 6])
@pytest.mark.parametrize(("dtype", "full"), [(np.uint8, 255), (np.uint16, 65535)])
def test_any_scale_can_be_rounded(small: Network, scale: int, dtype: Any, full: int) -> None:
    image = picture(9, 8)
    exact = enlarged(small, image, scale)
    rounded = enlarged(small, image, scale, dtype=dtype)
    assert rounded.dtype == dtype
    assert np.abs(rounded - exact.astype(np.float64) * full).max() <= 0.51


def test_rows_come_as_soon_as_their_band_is_finished() -> None:
    network = Recording(small_module())
    image = picture(10, 60)
    rows = enlarge(network, image, 4, work=plan_work(network, 10, 60, 4, tile_px=10))
    first = next(rows)
    assert (first.y_px, len(first.pixels), first.bands_done, first.bands_total) == (0, 40, 1, 6)
    assert len(network.calls) == 1
    assert len(list(rows)) == 5


def test_a_step_down_gives_rows_before_the_last_band_and_none_while_it_lacks_context() -> None:
    network = Recording(small_module())
    image = picture(10, 60)
    rows = enlarge(network, image, 1, work=plan_work(network, 10, 60, 1, tile_px=2))
    first = next(rows)
    # The first output row sees 12 rows below its middle, which two bands of 8 rows hold.
    assert (first.y_px, first.bands_done) == (0, 2)
    assert len(network.calls) == 2 * 5


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 6, 7, 12])
def test_a_card_of_several_scales_runs_the_networks_that_reach_it(scale: int) -> None:
    networks = {each.scale: load(each, "cpu") for each in card("real-esrgan-video").at_each_scale}
    image = picture(9, 7)
    passes = [each.scale for each in card("real-esrgan-video").passes(scale)]
    expected = whole(networks[passes[0]], image)
    if len(passes) > 1:
        expected = whole(networks[passes[1]], np.rint(expected * 65535).astype(np.uint16))
    if expected.shape[0] != 7 * scale:
        expected = by_pillow(expected, 9 * scale, 7 * scale)
    work = plan_work(networks[4], 9, 7, scale, tile_px=5)
    assert len(work.plans) == len(passes)
    assert_same_picture(enlarged(networks[4], image, scale, work=work), expected)


def test_progress_counts_the_tiles_of_both_passes(small: Network) -> None:
    work = plan_work(small, 10, 10, 8, tile_px=10)
    assert [len(each.bands) for each in work.plans] == [1, 4]
    told: list[tuple[int, int]] = []
    rows = list(enlarge(small, picture(10, 10), 8, work=work, on_tile=lambda done, total: told.append((done, total))))
    assert told == [(done, 17) for done in range(1, 18)]
    assert [each.bands_total for each in rows] == [5] * len(rows)


def test_work_for_another_picture_or_scale_is_refused(small: Network) -> None:
    work = plan_work(small, 10, 10, 4, tile_px=10)
    with pytest.raises(ValueError, match="planned for 10 x 10 px x 4; the picture is 11 x 10 px and the scale 4"):
        next(enlarge(small, picture(11, 10), 4, work=work))
    with pytest.raises(ValueError, match="the scale 3"):
        next(enlarge(small, picture(10, 10), 3, work=work))


@pytest.mark.parametrize("scale", [0, -1, 17])
def test_scales_that_are_not_offered_are_refused(small: Network, scale: int) -> None:
    with pytest.raises(InvalidRequest, match="The scale of srgan is 1 to 16"):
        plan_work(small, 10, 10, scale)


# --- planning the work ------------------------------------------------------------------------------------------------


class OfKnownSpeed(Network):
    known = 30_000.0
    runtime = "torch"

    def pixels_per_second(self) -> float:
        return self.known


@pytest.fixture
def srgan_of_known_speed() -> OfKnownSpeed:
    return OfKnownSpeed(card("srgan"), "cpu", load(card("srgan"), "cpu").module)


def test_a_256_px_picture_is_one_tile(srgan_of_known_speed: Network) -> None:
    work = plan_work(srgan_of_known_speed, 256, 256, 4)
    assert (work.tile_count, work.band_count, work.waste) == (1, 1, 1.0)
    assert work.multiply_adds_done == work.multiply_adds_needed == 256 * 256 * 2_218_176
    assert work.expected_seconds(30_000) == pytest.approx(256 * 256 / 30_000)


def test_a_picture_stays_whole_up_to_twice_the_time_of_a_tile(srgan_of_known_speed: OfKnownSpeed) -> None:
    whole_in_ten_seconds = 256 * 256 / 10
    srgan_of_known_speed.known = whole_in_ten_seconds + 1
    assert plan_work(srgan_of_known_speed, 256, 256, 4).tile_count == 1
    srgan_of_known_speed.known = whole_in_ten_seconds - 1
    assert plan_work(srgan_of_known_speed, 256, 256, 4).tile_count > 1


def test_a_device_that_seems_very_slow_is_not_given_tiles_that_are_nearly_all_halo(
    srgan_of_known_speed: OfKnownSpeed,
) -> None:
    srgan_of_known_speed.known = 100.0
    work = plan_work(srgan_of_known_speed, 256, 256, 4)
    assert work.tile_count <= 6
    assert work.waste < 3


@pytest.mark.parametrize(("width", "height"), [(1000, 700), (4000, 3000), (20_000, 300)])
def test_no_tile_takes_longer_than_a_lease_can_wait_or_more_than_its_memory(
    srgan_of_known_speed: Network, width: int, height: int
) -> None:
    network = srgan_of_known_speed
    memory_bytes = 200_000_000
    for planned in (
        plan_work(network, width, height, 4),
        plan_work(network, width, height, 4, memory_bytes=memory_bytes),
    ):
        largest_px = max(tile.read.area_px for band in planned.plans[0].bands for tile in band.tiles)
        assert largest_px / 30_000 <= upscale_module.SECONDS_PER_TILE
    assert network.fixed_bytes + largest_px * network.bytes_per_px <= memory_bytes
    assert max(band.region.area_px for band in planned.plans[0].bands) * 16 * 12 <= max(
        memory_bytes, width * 16 * 16 * 12
    )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel tells of no peak")
def test_what_a_tile_takes_is_estimated_within_half_of_it() -> None:
    """Every network of the catalogue; those of one architecture and size once."""
    tiles = [
        ("srgan", 4, 100),
        # As of the other networks of its kind: their blocks come one after another.
        ("real-esrgan-anime", 4, 64),
        ("real-esrgan-video", 4, 160),
        *((name, scale, 128) for name in ("fsrcnn", "srcnn") for scale in (2, 4)),
        *(("lanczos", scale, 600 // scale) for scale in (1, 2, 4, 16)),
        ("bicubic", 4, 150),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.worker.tile_memory"],
        input=json.dumps(tiles),
        # What is freed goes back at once and is no part of the next peak.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = [
        f"{name} x{scale}, {side} px: {taken / 1e6:.1f} MB, estimated {estimated / 1e6:.1f}"
        for (name, scale, side), (taken, estimated) in zip(tiles, json.loads(done.stdout), strict=True)
        if not taken / 1.5 <= estimated <= taken * 1.5
    ]
    assert not told, told


def test_bands_and_tiles_are_no_larger_than_pays() -> None:
    network = load(card("lanczos"), "cpu")
    for width, height in ((4_000, 3_000), (8_000, 6_000)):
        work = plan_work(network, width, height, 4)
        assert work.waste < 1.1
        tiles = [tile.read.area_px for band in work.plans[0].bands for tile in band.tiles]
        assert max(tiles) * network.bytes_per_px < 300_000_000
        assert (
            max(band.region.area_px for band in work.plans[0].bands) * 3 * 16 < 1.1 * upscale_module.BAND_RESULT_BYTES
        )


def test_waste_counts_the_halo_for_the_body_and_less_for_the_tail(srgan_of_known_speed: Network) -> None:
    work = plan_work(srgan_of_known_speed, 100, 100, 4, tile_px=50)
    # Four tiles of 50 x 50 that read 90 x 90; their tails run over 53 x 53.
    module = srgan_of_known_speed.module
    assert work.multiply_adds_done == 4 * (90 * 90 * module.body_multiply_adds + 53 * 53 * module.tail_multiply_adds)
    assert 1 < work.waste < work.plans[0].waste


def test_a_second_pass_is_planned_over_the_first_ones_result(srgan_of_known_speed: Network) -> None:
    work = plan_work(srgan_of_known_speed, 30, 20, 5)
    assert [(each.width, each.height) for each in work.plans] == [(30, 20), (120, 80)]
    assert work.expected_seconds(30_000) == pytest.approx((30 * 20 + 120 * 80) * work.waste / 30_000)


def test_a_plan_made_without_a_speed_measures_it(small: Network) -> None:
    assert plan_work(small, 20, 20, 4).tile_count == 1
    assert small.pixels_per_second() > 0


# --- the process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "has_gpu", "device"),
    [("auto", True, "cuda:0"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("gpu", True, "cuda:0")],
)
def test_a_gpu_is_used_where_there_is_one_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, wanted: str, has_gpu: bool, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert choose_device(wanted) == device


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelUnavailable, match="torch sees none"):
        choose_device("gpu")
    with pytest.raises(ValueError, match="auto, cpu or gpu, not 'tpu'"):
        choose_device("tpu")


@pytest.fixture
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("threads_restored")
def test_threads_are_those_told_or_one_for_each_core() -> None:
    assert prepare_process(1) == torch.get_num_threads() == 1
    assert prepare_process(0) == torch.get_num_threads() >= 1


def test_the_values_that_travel_cannot_be_changed(small: Network) -> None:
    band = next(upscale(small, picture(5, 5), plan=plan(5, 5, halo_px=10, tile_px=8)))
    assert isinstance(band, UpscaledBand)
    with pytest.raises(AttributeError):
        band.y_px = 3  # type: ignore[misc]
    assert isinstance(plan_work(small, 5, 5, 4), Work)
    assert isinstance(plan_work(small, 5, 5, 4).plans[0], Plan)


@pytest.mark.parametrize("rows", [1, 2_000])
def test_a_large_band_has_pages_of_its_own_that_go_with_it(rows: int) -> None:
    pixels = pages.new_rows(rows, 1_000, np.dtype(np.uint8))
    pixels[:] = 7
    owner: object = pixels
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    owner = owner.obj if isinstance(owner, memoryview) else owner
    assert isinstance(owner, mmap.mmap) == (pixels.nbytes >= pages.OWN_PAGES_BYTES)
    assert pixels.shape == (rows, 1_000, 3)
    assert int(pixels.min()) == int(pixels.max()) == 7
