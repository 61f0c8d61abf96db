from __future__ import annotations

import gc
import math
import threading
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.catalog import card
from shared.errors import BadOutput, OutOfMemory
from worker import upscale
from worker.networks import Network, pages, rowwise, strips
from worker.networks.architecture import Architecture
from worker.networks.compact import Compact
from worker.networks.lanes import Lanes
from worker.networks.pool import Pool
from worker.networks.rrdb import Rrdb
from worker.networks.srresnet import SrResNet
from worker.networks.strips import Graph, Promised, Strips
from worker.tiling import plan_strips
from worker.upscale import Descent, Repairs, enlarge, plan_work

HALF_A_LEVEL = 0.5 / 255


@pytest.fixture(autouse=True)
def _as_with_one_thread_to_a_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    # Strips are as high as a test says, whatever machine it runs on.
    monkeypatch.setattr(rowwise, "STRIP_THREADS", 1)


def with_contrast(module: Architecture, gain: float) -> Architecture:
    torch.manual_seed(1)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            layer.weight.data.mul_(gain)
        if isinstance(layer, nn.PReLU):
            nn.init.uniform_(layer.weight, 0.05, 0.4)
    return module


def srresnet() -> Architecture:
    return cast(SrResNet, with_contrast(SrResNet(channels=16, blocks=2), 0.8)).freeze()


def network_of(module: Architecture) -> Network:
    network = Network(replace(card("srgan"), halo_px=module.reach_px, scale=module.scale, weights=None), "cpu", module)
    network._runtime = "ncnn"
    return network


def picture(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


def pieces(image: NDArray[np.uint8], rows: int) -> Iterator[NDArray[np.float32]]:
    for y in range(0, len(image), rows):
        yield (image[y : y + rows] / np.float32(255)).transpose(2, 0, 1)


def whole(module: Architecture, image: NDArray[np.uint8]) -> Tensor:
    with torch.inference_mode():
        x = torch.from_numpy(image / np.float32(255)).permute(2, 0, 1)[None]
        return cast(Tensor, module(x)[0]).clamp(0, 1)


# --- every network that can be drawn ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(srresnet(), id="srresnet"),
        pytest.param(with_contrast(Compact(4), 0.9), id="compact"),
        pytest.param(with_contrast(Rrdb(1), 0.9), id="rrdb"),
    ],
)
@pytest.mark.parametrize(
    ("height", "width", "strip_px"), [(1, 1, 64), (7, 150, 64), (97, 33, 33 * 12), (160, 20, 20 * 30)]
)
def test_in_strips_a_network_answers_as_it_does_whole(
    monkeypatch: pytest.MonkeyPatch, module: Architecture, height: int, width: int, strip_px: int
) -> None:
    monkeypatch.setattr(rowwise, "STRIP_PX", strip_px)
    image = picture(height, width)
    made = torch.cat(list(network_of(module).rows(pieces(image, 7))), dim=1)
    expected = whole(module, image)
    assert made.shape == expected.shape
    assert expected.std() > 0.005
    assert float((made - expected).abs().max()) < HALF_A_LEVEL / 10


@settings(max_examples=20)
@given(
    height=st.integers(1, 120),
    width=st.integers(1, 40),
    fed=st.integers(1, 50),
    strip_px=st.integers(1, 2000),
    later_strip_px=st.integers(1, 1000),
    lanes=st.integers(1, 5),
)
def test_any_picture_in_any_strips_and_lanes_is_the_whole_one(
    height: int, width: int, fed: int, strip_px: int, later_strip_px: int, lanes: int
) -> None:
    module = srresnet()
    image = picture(height, width)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rowwise, "STRIP_PX", strip_px)
        patched.setattr(rowwise, "LATER_STRIP_PX", later_strip_px)
        patched.setattr(rowwise, "lane_count", lambda: lanes)
        made = torch.cat(list(network_of(module).rows(pieces(image, fed))), dim=1)
    assert float((made - whole(module, image)).abs().max()) < HALF_A_LEVEL


def test_a_wide_picture_is_cut_into_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise, "STRIP_COLUMNS", 17)
    module, image = srresnet(), picture(60, 50)
    work = plan_work(network_of(module), 50, 60, 4)
    assert work.tile_count == 3 * work.band_count
    assert 1 < work.waste < 3
    made = torch.cat(list(network_of(module).rows(pieces(image, 16))), dim=1)
    assert float((made - whole(module, image)).abs().max()) < HALF_A_LEVEL


def test_parts_that_wait_hold_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise, "STRIP_COLUMNS", 50)
    module = srresnet()
    columns, rows = 50 + 2 * module.reach_px, 60
    monkeypatch.setattr(rowwise, "STRIP_PX", columns * rows)
    monkeypatch.setattr(rowwise, "LATER_STRIP_PX", columns * 6)
    monkeypatch.setattr(rowwise, "lane_count", lambda: 1)
    network, image = network_of(module), picture(300, 400)
    assert len(network.columns(400)) == 8
    # Between the graphs and behind them, of one strip of one part.
    turn_bytes = 4 * (16 + 4 * 48) * rows * columns
    held = []
    tracemalloc.start()
    try:
        for made in network.rows(pieces(image, 16), lambda floats: floats.mul(255).to(torch.uint8)):
            held.append(tracemalloc.get_traced_memory()[0])
            assert made.dtype == torch.uint8
    finally:
        tracemalloc.stop()
    assert len(held) > 3
    # Of all eight parts it would be eight times that.
    assert max(held) < 4 * turn_bytes


def test_what_a_strip_makes_lies_in_the_pool() -> None:
    graph, output = srresnet().draw()[0]
    body = Strips(graph, output, threads=1)
    lanes = Lanes(1)
    try:
        promised = list(
            body.passage(40, rows=12, lanes=lanes).feed(map(Promised.of, pieces(picture(60, 40), 16)), is_last=True)
        )
        made = [each.values.result() for each in promised]
    finally:
        lanes.close()
    gc.collect()
    # And not in blocks of the process's own allocator, between which holes would stay.
    assert len(made) > 2
    assert body.pool.in_use_bytes >= sum(each.nbytes for each in made) > 0
    del promised, made
    gc.collect()
    assert body.pool.in_use_bytes == 0


def test_the_x2_and_x3_of_the_compact_network_cannot_be_drawn() -> None:
    assert Compact(2).draw() == []


# --- graphs -----------------------------------------------------------------------------------------------------------


def test_layers_that_see_differently_far_meet_in_the_same_row() -> None:
    graph = Graph()
    x = graph.input(8)
    kernels = [torch.randn(8, 8, size, size) / size for size in (5, 3)]
    far, near = (graph.conv(x, kernel, torch.ones(8)) for kernel in kernels)
    output = graph.add(graph.concat(far, x), graph.concat(x, near), times=0.5)
    values = np.random.default_rng(0).random((8, 50, 9), np.float32)
    lanes = Lanes(2)
    passage = Strips(graph, output, threads=1).passage(9, rows=6, lanes=lanes)
    promised = list(passage.feed(map(Promised.of, np.array_split(values, 5, axis=1)), is_last=True))
    made = np.concatenate([each.values.result() for each in promised], axis=1)
    lanes.close()
    assert [each.rows for each in promised] == [each.values.result().shape[1] for each in promised]
    given_ = torch.from_numpy(values)[None]
    far_, near_ = (F.conv2d(given_, kernel, torch.ones(8), padding="same") for kernel in kernels)
    expected = 0.5 * torch.cat([far_, given_], 1) + torch.cat([given_, near_], 1)
    assert np.abs(made - expected[0].numpy()).max() < 1e-4


def test_a_kernel_for_other_channels_is_refused() -> None:
    graph = Graph()
    with pytest.raises(ValueError, match="takes 4 channels, and there are 3"):
        graph.conv(graph.input(3), torch.ones(8, 4, 3, 3), torch.ones(8))


def test_without_ncnn_there_are_no_strips_and_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "ncnn", None)
    graph = Graph()
    with pytest.raises(ModuleNotFoundError, match="ncnn is not installed"):
        Strips(graph, graph.conv(graph.input(3), torch.ones(8, 3, 3, 3), torch.ones(8)), threads=1)
    network = network_of(srresnet())
    network._runtime = None
    assert network.runtime == "torch"


def test_ncnn_without_memory_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Empty:
        def input(self, name: str, values: object) -> None:
            pass

        def extract(self, name: str, kind: int) -> tuple[int, None]:
            return -100, None

    network = network_of(srresnet())
    for each in network._rowwise.strips():
        monkeypatch.setattr(each, "_to_the_end", type("Net", (), {"create_extractor": lambda self: Empty()})())
    with pytest.raises(OutOfMemory, match="no memory for a strip"):
        list(network.rows(pieces(picture(8, 8), 8)))


def test_no_memory_for_the_rows_of_a_strip_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of(srresnet())
    network._rowwise.strips()
    monkeypatch.setattr(Pool, "fastMalloc", lambda self, size: None)
    with pytest.raises(OutOfMemory, match="no memory for a strip"):
        list(network.rows(pieces(picture(8, 8), 8)))


# --- pictures in strips -----------------------------------------------------------------------------------------------


def test_what_strips_do_is_what_tiles_do_and_nothing_is_computed_twice() -> None:
    network = network_of(srresnet())
    image = picture(150, 60)
    work = plan_work(network, 60, 150, 4)
    assert work.plans[0].in_strips
    assert work.waste == 1.0
    told: list[tuple[int, int]] = []
    made = np.concatenate(
        [
            rows.pixels
            for rows in enlarge(network, image, 4, work=work, dtype=np.uint8, on_tile=lambda *n: told.append(n))
        ]
    )
    assert told[-1] == (work.tile_count, work.tile_count)
    # More often than bands end: a sign of life, and a place to stop.
    assert len(told) > work.tile_count
    tiles = plan_work(network, 60, 150, 4, tile_px=40)
    assert not tiles.plans[0].in_strips
    by_tiles = np.concatenate([rows.pixels for rows in enlarge(network, image, 4, work=tiles, dtype=np.uint8)])
    assert np.abs(made.astype(int) - by_tiles).max() <= 1


@pytest.mark.parametrize("columns", [24, 13], ids=["one-part", "two-parts"])
@pytest.mark.parametrize(
    "module",
    [pytest.param(srresnet(), id="srresnet"), pytest.param(with_contrast(Compact(4), 0.9), id="compact")],
)
def test_a_shard_in_strips_is_what_it_is_in_the_whole_to_one_level(
    monkeypatch: pytest.MonkeyPatch, module: Architecture, columns: int
) -> None:
    width = 24
    monkeypatch.setattr(rowwise, "STRIP_PX", width * 12)
    monkeypatch.setattr(rowwise, "STRIP_COLUMNS", columns)
    network = network_of(module)
    height = network.reach_px + 90
    image = picture(height, width)
    spans = network.columns(width)
    whole_plan = plan_strips(width, height, band_px=width * 10, columns=spans)
    work = replace(plan_work(network, width, height, network.scale), plans=(whole_plan,))
    rows_of_all = enlarge(network, image, network.scale, work=work, dtype=np.uint8)
    whole = np.concatenate([rows.pixels for rows in rows_of_all]).astype(int)
    for first, last in ((1, 3), (len(whole_plan.bands) - 4, len(whole_plan.bands) - 2), (-2, None)):
        bands = whole_plan.bands[first:last]
        part = replace(work, plans=(replace(whole_plan, bands=bands),))
        made = list(enlarge(network, image, network.scale, work=part, dtype=np.uint8))
        top = bands[0].region.y * network.scale
        assert made[0].y_px == top
        pixels = np.concatenate([rows.pixels for rows in made])
        assert len(pixels) == sum(band.region.height for band in bands) * network.scale
        difference = np.abs(pixels - whole[top : top + len(pixels)])
        assert difference.max() <= 1, f"{difference.max()}, mean {difference.mean()}, in bands {first} to {last}"
    assert bands[0].region.y > network.reach_px, "the last part was not begun at the top"

    # Who goes on with the part below computes no row twice, and makes it to the bit.
    descent, calls = Descent(), list[int]()
    plain_rows = network.rows

    def counted(given: Iterable[NDArray[np.float32]], convert: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        calls.append(1)
        return plain_rows(given, convert)

    monkeypatch.setattr(network, "rows", counted)
    pieces = []
    for first, last in ((0, 3), (3, 4), (4, None)):
        part = replace(work, plans=(replace(whole_plan, bands=whole_plan.bands[first:last]),))
        pieces += [
            rows.pixels for rows in enlarge(network, image, network.scale, work=part, dtype=np.uint8, descent=descent)
        ]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert len(calls) == 1

    # What breaks off a part leaves nothing to go on with.
    part = replace(work, plans=(replace(whole_plan, bands=whole_plan.bands[:2]),))

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(enlarge(network, image, network.scale, work=part, dtype=np.uint8, on_tile=stop, descent=descent))
    made = list(enlarge(network, image, network.scale, work=part, dtype=np.uint8, descent=descent))
    pixels = np.concatenate([rows.pixels for rows in made])
    assert np.array_equal(pixels, whole[: len(pixels)])


def test_what_watches_can_stop_within_a_strip() -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        list(enlarge(network_of(srresnet()), picture(150, 60), 4, on_tile=stop))


def test_who_stops_leaves_no_lane_and_no_memory_in_use() -> None:
    network = network_of(srresnet())
    rows = network.rows(pieces(picture(600, 60), 16))
    before = threading.enumerate()
    next(rows)
    running = [each for each in threading.enumerate() if each not in before]
    assert len(running) == rowwise.lane_count()
    rows.close()
    assert not any(each.is_alive() for each in running)
    (pool,) = {each.pool for each in network._rowwise.strips()}
    # What a strip had ready for the one below that never came goes with them.
    gc.collect()
    assert pool.in_use_bytes == 0


@pytest.mark.parametrize(
    ("threads", "lanes", "each"), [(1, 1, 1), (2, 2, 1), (4, 4, 1), (5, 2, 2), (6, 3, 2), (16, 4, 4)]
)
def test_threads_are_spread_over_lanes(monkeypatch: pytest.MonkeyPatch, threads: int, lanes: int, each: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert (rowwise.lane_count(), rowwise.lane_threads()) == (lanes, each)


def test_a_picture_too_wide_for_the_memory_is_cut_into_tiles() -> None:
    network = network_of(srresnet())
    enough = math.ceil(network.strips_bytes(3000) / upscale.STRIPS_MEMORY)
    assert plan_work(network, 3000, 200, 4, memory_bytes=enough).plans[0].in_strips
    assert not plan_work(network, 3000, 200, 4, memory_bytes=enough - 1).plans[0].in_strips


def test_what_parts_of_a_result_are_put_into_is_what_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise, "STRIP_COLUMNS", 17)
    taken: list[NDArray[Any]] = []

    def new_rows(*asked: Any) -> NDArray[Any]:
        taken.append(pages.new_rows(*asked))
        return taken[-1]

    monkeypatch.setattr(rowwise, "new_rows", new_rows)
    made = list(network_of(srresnet()).rows(pieces(picture(60, 50), 16)))
    # No copy, which would lie in the allocator's heap.
    assert [rows.data_ptr() for rows in made] == [rows.ctypes.data for rows in taken]


@pytest.mark.parametrize("module", [srresnet(), Compact(4), Rrdb(1)], ids=["srresnet", "compact", "rrdb"])
@pytest.mark.parametrize("columns", [400, 200], ids=["one-part", "two-parts"])
@pytest.mark.parametrize("lanes", [1, 2])
def test_memory_in_strips_is_as_estimated(
    monkeypatch: pytest.MonkeyPatch, module: Architecture, columns: int, lanes: int
) -> None:
    monkeypatch.setattr(rowwise, "STRIP_COLUMNS", columns)
    monkeypatch.setattr(rowwise, "STRIP_PX", 12 * columns)
    monkeypatch.setattr(rowwise, "LATER_STRIP_PX", 6 * columns)
    monkeypatch.setattr(rowwise, "lane_count", lambda: lanes)
    network, width, height = network_of(module), 400, 60
    (pool,) = {each.pool for each in network._rowwise.strips()}
    for _ in network.rows(pieces(picture(height, width), 16)):
        pass
    estimated = network.strips_bytes(width)
    # Two lanes need not take their most at the same moment.
    assert estimated / lanes / 1.5 < pool.most_held_bytes < estimated * 1.5, (
        f"{pool.most_held_bytes / 1e6:.1f} MB, estimated {estimated / 1e6:.1f}"
    )


def test_the_parts_of_a_very_wide_picture_are_narrower_but_waste_little() -> None:
    network = network_of(srresnet())
    two_parts = network.strips_bytes(2 * rowwise.STRIP_COLUMNS)
    for width in (5_657, 8_000, 16_375, 30_000):
        spans = network.columns(width)
        assert sum(read.stop - read.start for _, read in spans) <= 1.10 * width
        plan = plan_work(network, width, 1_000, 4).plans[0]
        assert plan.in_strips
        assert plan.waste <= 1.10
    # What grows beside the strips has room.
    assert network.strips_bytes(8_000) <= rowwise.WIDE_MEMORY * two_parts
    # Of 12 and of 48 megapixels.
    assert network.strips_bytes(8_000) <= 1.2 * network.strips_bytes(4_000)
    assert network.strips_bytes(5_657) <= 1.05 * two_parts


@pytest.mark.parametrize(("answer", "counted"), [(float("nan"), (1, 0)), (0.5, (0, 1))])
def test_an_answer_that_cannot_be_right_is_refused(
    monkeypatch: pytest.MonkeyPatch, answer: float, counted: tuple[int, int]
) -> None:
    network = network_of(srresnet())

    def rows(_pieces: Any, convert: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        yield convert(torch.full((3, 4 * 30, 4 * 20), answer))

    monkeypatch.setattr(network, "rows", rows)
    repairs = Repairs()
    with pytest.raises(BadOutput):
        list(enlarge(network, picture(30, 20), 4, repairs=repairs))
    assert (repairs.tiles_not_finite, repairs.bands_flat) == counted


def test_bands_of_a_plan_in_strips_are_about_as_large_as_asked() -> None:
    made = plan_strips(100, 1000, band_px=5_000, columns=rowwise.strip_columns(100, 1, 9))
    assert [band.region.height for band in made.bands] == [50] * 20
    assert (made.halo_px, made.tile_px, made.waste) == (0, 100, 1.0)
    wide = plan_strips(8000, 3, band_px=5_000, columns=rowwise.strip_columns(8000, 4, 40))
    assert [band.region.height for band in wide.bands] == [1, 1, 1]
    assert [(tile.keep.width, tile.read.width) for tile in wide.bands[0].tiles] == [
        (2000, 2040),
        (2000, 2080),
        (2000, 2080),
        (2000, 2040),
    ]
