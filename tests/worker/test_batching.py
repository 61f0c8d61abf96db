"""Tiles of several bands and of several pictures in one call: the same pixels, and whoever shares a call shares nothing
else. Real torch on a CPU, which goes a GPU's way; what a GPU alone would do is played by fakes of its calls."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from shared.catalog import card
from shared.errors import BadOutput, DeviceBroken, OutOfMemory
from tests.conftest import wait_until
from tests.worker.test_upscale import (
    OUT_OF_MEMORY,
    Stop,
    assert_same_picture,
    not_a_number,
    picture,
    small_module,
    tiled,
    whole,
)
from worker import batching as batching_module
from worker import upscale as upscale_module
from worker.batching import Asked, Batcher
from worker.networks import Network, load
from worker.networks.architecture import Keep
from worker.tiling import evened, plan
from worker.upscale import Repairs, enlarge, plan_work, upscale

MEMORY_BYTES = 10**9


class Noting(Network):
    """Notes how many tiles each call had, and may be told to go wrong. With `holds` a call waits to be let go."""

    def __init__(self, *, half: bool = False) -> None:
        module = small_module()
        super().__init__(replace(card("srgan"), halo_px=module.reach_px, weights=None), "cpu", module)
        self.calls: list[int] = []
        self.shapes: list[tuple[int, ...]] = []
        self._prefers_half = half
        self.before_call: Callable[[Tensor, bool], None] = lambda tile, half: None
        self.spoil: Callable[[Tensor, Tensor, bool], Tensor] = lambda tile, answer, half: answer

    @property
    def prefers_half(self) -> bool:
        return self._prefers_half

    def __call__(self, tile: Tensor, *, keep: Keep | None = None, half: bool = False) -> Tensor:
        self.calls.append(tile.shape[0])
        self.shapes.append(tuple(tile.shape))
        self.before_call(tile, half)
        # In float32 all the same: what is off by a rounding must not hide what is wrong.
        return self.spoil(tile, super().__call__(tile, keep=keep), half)


class Gate:
    """Holds the first call until it is opened: what comes meanwhile waits for the next one."""

    def __init__(self, network: Noting) -> None:
        self.is_held, self.open = threading.Event(), threading.Event()
        network.before_call = self._before_call

    def _before_call(self, tile: Tensor, half: bool) -> None:
        if not self.is_held.is_set():
            self.is_held.set()
            assert self.open.wait(30)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Each thread that makes a call would bring a team of its own, and they would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class OneFirst(Batcher):
    """Its first call has one tile, however many have come by then: which call has which is then no matter of luck."""

    def _most(self, asked: Asked) -> int:
        return 1 if self.calls == 0 else super()._most(asked)


@contextmanager
def batching(memory_bytes: int) -> Iterator[Batcher]:
    made = OneFirst(memory_bytes)
    yield made
    made.close()


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    with batching(MEMORY_BYTES) as made:
        yield made


@contextmanager
def side_by_side(count: int) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(count) as pool:
        yield pool


def waiting(batcher: Batcher) -> int:
    with batcher._changed:
        return sum(len(lane.waiting) for lane in batcher._lanes)


def holding(batcher: Batcher, tiles: int) -> None:
    wait_until(lambda: waiting(batcher) >= tiles, seconds=30, what=f"{tiles} tiles to wait")


# --- networks take several tiles --------------------------------------------------------------------------------------


EACH_ARCHITECTURE = (
    "srgan", "real-esrgan-anime", "real-esrgan-video", "fsrcnn", "srcnn", "bicubic", "lanczos",
)  # fmt: skip


@pytest.mark.parametrize("keep", [None, (3, 2, 6, 5)], ids=["all", "part"])
@pytest.mark.parametrize("name", EACH_ARCHITECTURE)
def test_tiles_of_one_call_come_out_as_by_themselves(name: str, keep: Keep | None) -> None:
    network = load(card(name), "cpu")
    tiles = torch.rand((3, 3, 9, 12), generator=torch.Generator().manual_seed(1))
    together = network(tiles, keep=keep)
    # In float32 oneDNN may choose another method for three: all but that is seen in float64.
    exact = copy.deepcopy(network.module).double()
    with torch.inference_mode():
        exactly_together = exact.enlarge(tiles.double(), keep)
        for index in range(3):
            one = tiles[index : index + 1]
            assert (together[index] - network(one, keep=keep)[0]).abs().max() * 255 < 0.01
            assert (exactly_together[index] - exact.enlarge(one.double(), keep)[0]).abs().max() < 1e-6


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 30), st.integers(0, 30))
def test_tiles_made_even_keep_what_they_kept_and_read_their_halo(
    width: int, height: int, tile_px: int, halo_px: int
) -> None:
    planned = plan(width, height, halo_px=halo_px, tile_px=tile_px)
    tiles = [tile for band in planned.bands for tile in band.tiles]
    widest, highest = max(tile.keep.width for tile in tiles), max(tile.keep.height for tile in tiles)
    for tile, even in zip(tiles, evened(planned, tiles, widest, highest), strict=True):
        assert (even.keep.width, even.keep.height) == (widest, highest)
        assert even.keep.contains(tile.keep)
        assert even.read == even.keep.grown(halo_px, width, height)
        assert even.keep.area_px <= (tile.keep.width + 1) * (tile.keep.height + 1)


# --- one picture ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 70), st.integers(1, 70), st.integers(7, 40))
@settings(max_examples=30, deadline=None)
def test_a_picture_in_batches_is_the_whole_picture(width: int, height: int, tile_px: int) -> None:
    network = Noting()
    image = picture(width, height, seed=width * 100 + height)
    with batching(MEMORY_BYTES) as batcher:
        assert_same_picture(tiled(network, image, tile_px=tile_px, batcher=batcher), whole(network, image))


@pytest.mark.parametrize("scale", [3, 4, 6])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_any_scale_and_kind_of_result_comes_out_of_batches(batcher: Batcher, scale: int, dtype: Any) -> None:
    network = Noting()
    image = picture(21, 34, dtype=np.uint16)
    work = plan_work(network, 21, 34, scale, tile_px=10)
    made = [
        np.concatenate([rows.pixels for rows in enlarge(network, image, scale, work=work, dtype=dtype, batcher=each)])
        for each in (None, batcher)
    ]
    assert made[0].dtype == made[1].dtype == dtype
    full = 1 if dtype == np.float32 else np.iinfo(dtype).max
    assert_same_picture(*(each / np.float32(full) for each in made))


def test_bands_come_in_order_and_tiles_of_the_next_ones_are_in_the_same_call(batcher: Batcher) -> None:
    network = Noting()
    gate = Gate(network)
    image = picture(60, 90)
    planned = plan(60, 90, halo_px=network.halo_px, tile_px=10)
    told: list[tuple[int, int]] = []
    bands = upscale(
        network, image, plan=planned, batcher=batcher, on_tile=lambda done, total: told.append((done, total))
    )
    threading.Thread(target=lambda: (holding(batcher, 53), gate.open.set()), daemon=True).start()
    made = list(bands)
    assert [band.band for band in made] == list(planned.bands)
    assert told == [(done, 54) for done in range(1, 55)]
    assert_same_picture(np.concatenate([band.pixels for band in made]), whole(network, image))
    # 54 tiles, of which those at the rims read less: nine kinds.
    assert sum(network.calls) == 54
    assert len(network.calls) < 20


BAND_BYTES = 20 * 10 * 16 * 3 * 4


@pytest.mark.parametrize(("bound_bytes", "ahead"), [(1, 1), (BAND_BYTES, 1), (3 * BAND_BYTES, 3)])
def test_no_more_bands_are_begun_ahead_than_memory_is_for(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch, bound_bytes: int, ahead: int
) -> None:
    monkeypatch.setattr(upscale_module, "BAND_RESULT_BYTES", bound_bytes)
    network = Noting()
    gate = Gate(network)
    begun = 2 * (1 + ahead)
    with side_by_side(1) as pool:
        # Kept: a generator that nobody holds takes its tiles back.
        planned = plan(20, 60, halo_px=network.halo_px, tile_px=10)
        bands = upscale(network, picture(20, 60), plan=planned, batcher=batcher)
        first = pool.submit(next, bands)
        assert gate.is_held.wait(30)
        wait_until(lambda: waiting(batcher) + network.calls[-1] >= begun, seconds=30, what="all that is begun")
        gate.open.set()
        first.result(30)
    # The first band has come, and nothing was begun beyond those.
    wait_until(lambda: sum(network.calls) == begun, seconds=30, what="all that is begun to be computed")


def test_what_on_tile_raises_withdraws_what_waits(batcher: Batcher) -> None:
    network = Noting()
    gate = Gate(network)

    def stop(done: int, total: int) -> None:
        raise Stop("out of memory")

    with side_by_side(1) as pool:
        made = pool.submit(tiled, network, picture(20, 60), tile_px=10, batcher=batcher, on_tile=stop)
        holding(batcher, 7)
        gate.open.set()
        with pytest.raises(Stop):
            made.result(30)
    wait_until(lambda: not batcher._under_way, seconds=30, what="the call under way")
    assert waiting(batcher) == 0
    assert sum(network.calls) < 12


def test_who_waits_is_told_that_the_work_goes_on_in_its_own_thread(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching_module, "TELL_SECONDS", 0.01)
    network = Noting()
    told: list[tuple[str, int]] = []
    heard = threading.Event()

    def on_tile(done: int, total: int) -> None:
        told.append((threading.current_thread().name, done))
        heard.set()

    def long(tile: Tensor, half: bool) -> None:
        wait_until(lambda: network.on_step() or heard.is_set(), seconds=30, what="a sign of life to be heard")

    network.before_call = long
    tiled(network, picture(10, 10), tile_px=10, batcher=batcher, on_tile=on_tile)
    assert told[0] == (threading.current_thread().name, 0)
    assert told[-1] == (threading.current_thread().name, 1)


# --- several pictures -------------------------------------------------------------------------------------------------


def test_tiles_of_several_pictures_go_together_and_each_comes_out_as_by_itself(batcher: Batcher) -> None:
    network = Noting()
    gate = Gate(network)
    images = [picture(20, 30, seed=seed) for seed in range(3)]
    with side_by_side(3) as pool:
        made = [pool.submit(tiled, network, images[0], tile_px=40, batcher=batcher)]
        assert gate.is_held.wait(30)
        made += [pool.submit(tiled, network, image, tile_px=40, batcher=batcher) for image in images[1:]]
        holding(batcher, 2)
        gate.open.set()
        for image, each in zip(images, made, strict=True):
            assert_same_picture(each.result(30), whole(network, image))
    assert network.calls == [1, 2], "while one was computed two came, and went together"


def test_a_tile_that_goes_with_none_that_wait_goes_by_itself(batcher: Batcher) -> None:
    networks = Noting(), Noting()
    gate = Gate(networks[0])
    kinds = [(networks[0], 20), (networks[0], 20), (networks[0], 21), (networks[1], 20), (networks[0], 20)]
    with side_by_side(5) as pool:
        made = []
        for net, side in kinds:
            made.append(pool.submit(tiled, net, picture(side, 20), tile_px=40, batcher=batcher))
            assert gate.is_held.wait(30)
        holding(batcher, 4)
        gate.open.set()
        for (net, side), each in zip(kinds, made, strict=True):
            assert_same_picture(each.result(30), whole(net, picture(side, 20)))
    assert sorted(networks[0].calls) == [1, 1, 2]
    assert networks[1].calls == [1]


def test_pictures_are_served_in_turns_however_many_tiles_one_has(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Noting()
    gate = Gate(network)
    image = picture(300, 10)
    # One tile to a call.
    with batching(1) as batcher, side_by_side(2) as pool:
        many = pool.submit(tiled, network, image, tile_px=10, batcher=batcher)
        assert gate.is_held.wait(30)
        holding(batcher, 29)
        one = pool.submit(tiled, network, picture(13, 13), tile_px=20, batcher=batcher)
        holding(batcher, 30)
        gate.open.set()
        one.result(30)
        many.result(30)
    assert network.shapes.index((1, 3, 13, 13)) <= 2


@pytest.mark.parametrize(("memory_bytes", "px_per_second", "most"), [(1, 1e9, 1), (10**9, 1e9, 32), (10**9, 900, 2)])
def test_a_call_is_bounded_by_memory_by_time_and_by_number(
    monkeypatch: pytest.MonkeyPatch, memory_bytes: int, px_per_second: float, most: int
) -> None:
    monkeypatch.setattr(Noting, "pixels_per_second", lambda self: px_per_second)
    network = Noting()
    network._runtime = "torch"
    gate = Gate(network)
    with batching(memory_bytes) as batcher, side_by_side(40) as pool:
        made = []
        for _ in range(40):
            made.append(pool.submit(tiled, network, picture(20, 20), tile_px=20, batcher=batcher))
            assert gate.is_held.wait(30)
        holding(batcher, 39)
        gate.open.set()
        for each in made:
            each.result(30)
    assert max(network.calls) == most


# --- what goes wrong --------------------------------------------------------------------------------------------------


def held_together(
    network: Noting, batcher: Batcher, images: list[NDArray[Any]], **options: Any
) -> list[NDArray[Any] | BaseException]:
    """What becomes of pictures whose tiles, one each but for the first picture's call, go together."""
    gate, then = Gate(network), network.before_call

    def before(tile: Tensor, half: bool) -> None:
        if gate.is_held.is_set():
            then_also(tile, half)
        then(tile, half)

    then, then_also = network.before_call, options.pop("before", lambda tile, half: None)
    network.before_call = before

    def one(number: int) -> NDArray[Any] | BaseException:
        try:
            return tiled(network, images[number], tile_px=40, batcher=batcher)
        except Exception as error:  # noqa: BLE001 - what it is, the test looks at
            return error

    with side_by_side(len(images) + 1) as pool:
        blocking = pool.submit(tiled, network, picture(17, 17), tile_px=40, batcher=batcher)
        assert gate.is_held.wait(30)
        made = []
        for number in range(len(images)):
            made.append(pool.submit(one, number))
            holding(batcher, number + 1)
        gate.open.set()
        with suppress(DeviceBroken):
            blocking.result(30)
        return [each.result(30) for each in made]


IMAGES = [picture(20, 30, seed=seed) for seed in range(6)]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_call_too_large_for_the_memory_is_halved_and_what_fits_is_remembered(batcher: Batcher, most: int) -> None:
    network = Noting()

    def full(tile: Tensor, half: bool) -> None:
        if tile.shape[0] > most:
            raise OUT_OF_MEMORY[0]

    for _ in range(2):
        made = held_together(network, batcher, IMAGES, before=full)
        for image, each in zip(IMAGES, made, strict=True):
            assert isinstance(each, np.ndarray)
            assert_same_picture(each, whole(network, image))
        network.calls, before = [], network.calls
    assert max(before) <= most < max([6, *before])
    assert all(shape[2:] != (15, 20) for shape in network.shapes), "no picture was cut smaller for others' sake"


def test_a_tile_too_large_by_itself_is_cut_smaller_and_no_other_picture_is(batcher: Batcher) -> None:
    network = Noting()
    large, *small = [picture(40, 40), picture(30, 12), picture(30, 12, seed=1)]

    def full(tile: Tensor, half: bool) -> None:
        if tile.shape[2] * tile.shape[3] > 1500:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    for image, each in zip([large, *small], held_together(network, batcher, [large, *small], before=full), strict=True):
        assert isinstance(each, np.ndarray)
        assert_same_picture(each, whole(network, image))
    assert (2, 3, 12, 30) in network.shapes


def test_memory_that_never_suffices_fails_whom_it_does_not_suffice(batcher: Batcher) -> None:
    network = Noting()

    def full(tile: Tensor, half: bool) -> None:
        if tile.shape[3] != 30:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    made = held_together(network, batcher, [picture(20, 20), picture(30, 12)], before=full)
    assert isinstance(made[0], OutOfMemory)
    assert isinstance(made[1], np.ndarray)


def test_a_tile_that_is_not_finite_in_half_precision_is_done_again_by_its_owner_alone(batcher: Batcher) -> None:
    network = Noting(half=True)
    marked = IMAGES[1].copy()
    marked[0, 0] = (255, 0, 255)

    def spoil(tile: Tensor, answer: Tensor, half: bool) -> Tensor:
        for index in range(tile.shape[0]):
            if half and tile[index, :, 0, 0].tolist() == [1, 0, 1]:
                answer = answer.clone()
                answer[index : index + 1] = not_a_number(answer[index : index + 1])
        return answer

    network.spoil = spoil
    images = [IMAGES[0], marked, IMAGES[2]]
    for image, each in zip(images, held_together(network, batcher, images), strict=True):
        assert isinstance(each, np.ndarray)
        assert_same_picture(each, whole(network, image))
    assert network.calls == [1, 3, 1]
    # In float32 too it is an error, of that picture.
    network.spoil = lambda tile, answer, half: spoil(tile, answer, True)
    made = held_together(network, batcher, images)
    assert [type(each) for each in made] == [np.ndarray, BadOutput, np.ndarray]


def test_real_half_precision_that_overflows_is_mended_tile_by_tile(batcher: Batcher) -> None:
    module = small_module()
    # Beyond what float16 holds where the picture is bright, and taken back by the next layer.
    module.head.weight.data.mul_(60_000)
    module.merge.weight.data.div_(60_000)
    for block in module.blocks:
        for conv in (block.first, block.second):
            conv.weight.data.zero_()
            conv.bias.data.zero_()
    network = HalfOnCpu(replace(card("srgan"), halo_px=module.reach_px, weights=None), "cpu", module)
    bright, dark = picture(20, 30), np.zeros((30, 20, 3), np.uint8)
    work = plan_work(network, 20, 30, 4, tile_px=40)
    repairs = Repairs(), Repairs()

    def made(image: NDArray[np.uint8], mended: Repairs) -> NDArray[Any]:
        return np.concatenate(
            [rows.pixels for rows in enlarge(network, image, 4, work=work, batcher=batcher, repairs=mended)]
        )

    with side_by_side(2) as pool:
        for image, each in [
            (image, pool.submit(made, image, mended)) for image, mended in zip((bright, dark), repairs, strict=True)
        ]:
            assert_same_picture(each.result(30), whole(network, image), most_levels=2)
    assert repairs[0].bands_done_again >= 1
    assert repairs[1].bands_done_again == 0


class HalfOnCpu(Network):
    """Half precision for real, which a CPU can do too."""

    @property
    def prefers_half(self) -> bool:
        return True


def test_a_fault_of_ours_in_one_picture_is_not_the_others(batcher: Batcher) -> None:
    network = Noting()
    marked = IMAGES[1].copy()
    marked[0, 0] = (255, 0, 255)

    def fault(tile: Tensor, half: bool) -> None:
        if any(each[:, 0, 0].tolist() == [1, 0, 1] for each in tile):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    made = held_together(network, batcher, [IMAGES[0], marked, IMAGES[2]], before=fault)
    assert [type(each) for each in made] == [np.ndarray, RuntimeError, np.ndarray]
    # The three together, then each by itself; and the first one of all.
    assert sorted(network.calls) == [1, 1, 1, 1, 3]


def test_a_broken_device_is_everybodys_error_and_stays_one(batcher: Batcher) -> None:
    network = Noting()
    error = torch.AcceleratorError("an illegal memory access was encountered")

    def broken(tile: Tensor, half: bool) -> None:
        raise error

    made = held_together(network, batcher, [*IMAGES[:2], picture(21, 21)], before=broken)
    assert [type(each) for each in made] == [DeviceBroken] * 3
    assert len({id(each) for each in made}) == 3
    assert all(isinstance(each, DeviceBroken) and each.__cause__ is error for each in made)
    with pytest.raises(DeviceBroken, match="illegal memory access"):
        tiled(network, IMAGES[0], tile_px=40, batcher=batcher)


def test_one_of_three_that_is_stopped_harms_no_other(batcher: Batcher) -> None:
    network = Noting()
    gate = Gate(network)

    def stop(done: int, total: int) -> None:
        raise Stop

    with side_by_side(3) as pool:
        made = [
            pool.submit(tiled, network, image, tile_px=10, batcher=batcher, on_tile=stop if number == 1 else None)
            for number, image in enumerate(IMAGES[:3])
        ]
        holding(batcher, 17)
        gate.open.set()
        for number in (0, 2):
            assert_same_picture(made[number].result(30), whole(network, IMAGES[number]))
        with pytest.raises(Stop):
            made[1].result(30)


def test_what_was_withdrawn_from_a_call_that_did_not_fit_is_not_computed(batcher: Batcher) -> None:
    network = Noting()
    gate = Gate(network)
    hold = network.before_call
    stopped = threading.Event()

    def full(tile: Tensor, half: bool) -> None:
        hold(tile, half)
        if tile.shape[0] > 1:
            assert stopped.wait(30)
            raise OUT_OF_MEMORY[0]

    network.before_call = full
    staged = torch.from_numpy(np.float32(IMAGES[0]) / 255).permute(2, 0, 1)
    with batcher.lane() as mine:
        first = mine.ask(network, staged, (0, 0, 20, 30), half=False, dtype=np.dtype(np.uint8))
        assert gate.is_held.wait(30)
        with batcher.lane() as gone:
            asked = [
                lane.ask(network, staged, (0, 0, 20, 30), half=False, dtype=np.dtype(np.uint8))
                for lane in (mine, mine, gone, gone)
            ]
            # Of another size: it stays where it is when the others are put back.
            other = mine.ask(network, staged[:, :20], (0, 0, 20, 20), half=False, dtype=np.dtype(np.uint8))
            gate.open.set()
            wait_until(lambda: 4 in network.calls, seconds=30, what="the call")
        stopped.set()
        for each in (first, *asked[:2], other):
            assert each.result(lambda: None).pixels.dtype == np.uint8
    assert network.calls == [1, 4, 2, 1, 1, 1]


def test_no_memory_on_the_host_for_what_is_ahead_is_not_this_bands_trouble(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Noting()
    staged = upscale_module._staged
    failures = iter([None, None, MemoryError(), None, MemoryError()])

    def little_memory(*positional: Any) -> Any:
        if error := next(failures, None):
            raise error
        return staged(*positional)

    monkeypatch.setattr(upscale_module, "_staged", little_memory)
    image = picture(40, 80)
    assert_same_picture(tiled(network, image, tile_px=20, batcher=batcher), whole(network, image))
    assert next(failures, None) is None

    def fault(*positional: Any) -> Any:
        raise RuntimeError("mat1 and mat2")

    monkeypatch.setattr(upscale_module, "_staged", fault)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        tiled(network, image, tile_px=20, batcher=batcher)


# --- what only a GPU does ---------------------------------------------------------------------------------------------


class Event:
    """Of a copy to the host: the results may be looked at after `synchronize`."""

    log: list[str] = []  # noqa: RUF012 - emptied by each test

    def record(self, stream: object) -> None:
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("synchronize")


class Stream:
    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        Event.log.append("wait for the call")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA has, in plain memory. The network says that it is on a GPU and computes on the CPU."""
    empty = torch.empty

    def host_empty(*shape: Any, pin_memory: bool = False, device: Any = None, **options: Any) -> Tensor:
        if pin_memory:
            Event.log.append("pinned")
        return empty(*shape, **options)

    monkeypatch.setattr(Event, "log", [])
    monkeypatch.setattr(torch, "empty", host_empty)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: Event.log.append("emptied"))
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(Network, "__call__", on_the_cpu)


def on_the_cpu(network: Network, tile: Tensor, *, keep: Keep | None = None, half: bool = False) -> Tensor:
    with torch.inference_mode():
        return network.module.enlarge(tile, keep)


@pytest.mark.usefixtures("no_gpu")
def test_on_a_gpu_results_are_copied_to_pinned_memory_behind_the_next_call(batcher: Batcher) -> None:
    network = Noting()
    network.device = torch.device("cuda:0")
    assert_same_picture(tiled(network, IMAGES[0], tile_px=40, batcher=batcher), whole(network, IMAGES[0]))
    # The tile and its bounds.
    assert Event.log == ["wait for the call", "pinned", "pinned", "record", "synchronize"]

    def full(tile: Tensor, half: bool) -> None:
        if tile.shape[0] > 1:
            raise OUT_OF_MEMORY[0]

    held_together(network, batcher, IMAGES[:2], before=full)
    assert Event.log.count("emptied") == 1


@pytest.mark.usefixtures("no_gpu")
def test_on_a_gpu_what_fails_after_its_call_reaches_everybody(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Noting()
    network.device = torch.device("cuda:0")

    def broken(event: Event) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Event, "synchronize", broken)
    made = held_together(network, batcher, IMAGES[:3])
    assert [type(each) for each in made] == [DeviceBroken] * 3


def test_the_benchmark_of_a_gpu_runs_on_a_cpu_and_says_that_its_figures_are_none_of_a_gpu() -> None:
    from tests.benchmarks import gpu

    measured = gpu.measure("cpu", side=8, batch=2, rounds=1, pictures=3, attempts=2, product_side=16)
    assert measured["figures"] == gpu.OF_A_CPU
    assert set(measured["forms"]) == {gpu.OWN, gpu.FLOAT32, gpu.FLOAT16}
    assert measured["not_measured"] == [gpu.GRAPH, gpu.COMPILED]
    assert 0 < measured["levels"]["within"] < 2
    assert measured["end_to_end"]["1 at once"]["calls"] == 3
    assert 1 < measured["end_to_end"]["2 at once"]["calls"] <= 3
    gpu.report(measured)
