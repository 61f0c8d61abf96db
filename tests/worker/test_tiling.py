from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.tiling import SMALLEST_TILE_PX, Band, Plan, Region, Tile, choose_plan, plan, smaller

sides = st.integers(1, 90)
halos = st.integers(0, 45)


def times_kept(planned: Plan) -> Counter[tuple[int, int]]:
    kept: Counter[tuple[int, int]] = Counter()
    for band in planned.bands:
        for tile in band.tiles:
            assert band.region.contains(tile.keep)
            kept.update(
                (x, y) for x in range(tile.keep.x, tile.keep.right) for y in range(tile.keep.y, tile.keep.bottom)
            )
    return kept


def every_px_once(width: int, height: int) -> Counter[tuple[int, int]]:
    return Counter((x, y) for x in range(width) for y in range(height))


@given(sides, sides, halos, st.integers(1, 100))
@settings(max_examples=150, deadline=None)
def test_every_pixel_is_kept_once_and_bands_follow_from_the_top(
    width: int, height: int, halo_px: int, tile_px: int
) -> None:
    planned = plan(width, height, halo_px=halo_px, tile_px=tile_px)
    assert times_kept(planned) == every_px_once(width, height)
    y = 0
    for index, band in enumerate(planned.bands):
        assert (band.index, band.region.x, band.region.y, band.region.width) == (index, 0, y, width)
        y = band.region.bottom
    assert y == height


@given(sides, sides, halos, st.integers(1, 100))
@settings(max_examples=100, deadline=None)
def test_a_tile_reads_its_halo_and_nothing_outside_the_picture(
    width: int, height: int, halo_px: int, tile_px: int
) -> None:
    planned = plan(width, height, halo_px=halo_px, tile_px=tile_px)
    for tile in (tile for band in planned.bands for tile in band.tiles):
        assert tile.read.x == max(0, tile.keep.x - halo_px)
        assert tile.read.y == max(0, tile.keep.y - halo_px)
        assert tile.read.right == min(width, tile.keep.right + halo_px)
        assert tile.read.bottom == min(height, tile.keep.bottom + halo_px)


@given(sides, sides, st.integers(1, 100))
@settings(max_examples=100, deadline=None)
def test_tiles_are_balanced_and_no_longer_than_asked(width: int, height: int, tile_px: int) -> None:
    planned = plan(width, height, halo_px=3, tile_px=tile_px)
    tiles = [tile.keep for band in planned.bands for tile in band.tiles]
    for lengths in ({tile.width for tile in tiles}, {tile.height for tile in tiles}):
        assert max(lengths) <= tile_px
        assert max(lengths) - min(lengths) <= 1
    assert planned.tile_px == max(max(tile.width, tile.height) for tile in tiles)


@given(sides, sides, halos, st.integers(1, 100), st.integers(1, 100), st.data())
@settings(max_examples=100, deadline=None)
def test_a_band_planned_again_covers_the_same_region_with_tiles_no_larger(
    width: int, height: int, halo_px: int, tile_px: int, smaller_px: int, data: st.DataObject
) -> None:
    planned = plan(width, height, halo_px=halo_px, tile_px=tile_px)
    band = data.draw(st.sampled_from(planned.bands))
    again = smaller(planned, band, smaller_px)
    assert (again.index, again.region) == (band.index, band.region)
    bands = tuple(again if each is band else each for each in planned.bands)
    assert times_kept(Plan(width, height, halo_px, tile_px, bands)) == every_px_once(width, height)
    for tile in again.tiles:
        assert max(tile.keep.width, tile.keep.height) <= smaller_px
        assert tile.read == tile.keep.grown(halo_px, width, height)


@given(st.integers(1, 500), st.integers(1, 500), halos, st.integers(1, 90_000), st.none() | st.integers(1, 90_000))
@settings(max_examples=150, deadline=None)
def test_a_chosen_plan_keeps_to_its_budget_unless_the_smallest_tile_breaks_it(
    width: int, height: int, halo_px: int, most_read_px: int, most_band_px: int | None
) -> None:
    chosen = choose_plan(width, height, halo_px=halo_px, most_read_px=most_read_px, most_band_px=most_band_px)
    largest_px = max(tile.read.area_px for band in chosen.bands for tile in band.tiles)
    assert largest_px <= most_read_px or chosen.tile_px <= SMALLEST_TILE_PX
    if most_band_px is not None:
        for band in chosen.bands:
            assert band.region.area_px <= most_band_px or band.region.height <= SMALLEST_TILE_PX


def test_a_picture_within_the_budget_is_one_tile() -> None:
    chosen = choose_plan(256, 256, halo_px=40, most_read_px=256 * 256)
    assert [len(band.tiles) for band in chosen.bands] == [1]
    assert chosen.waste == 1.0


def test_a_chosen_plan_wastes_least_of_all_cuts_that_fit() -> None:
    width, height, halo_px, most_read_px = 700, 430, 40, 60_000
    fitting = []
    for columns in range(1, 15):
        for rows in range(1, 15):
            tile_px, band_height_px = math.ceil(width / columns), math.ceil(height / rows)
            cut = plan(width, height, halo_px=halo_px, tile_px=tile_px, band_height_px=band_height_px)
            if max(tile.read.area_px for band in cut.bands for tile in band.tiles) <= most_read_px:
                fitting.append(cut.waste)
    chosen = choose_plan(width, height, halo_px=halo_px, most_read_px=most_read_px)
    # The search counts clipped halos as if the cut were symmetric: it may be a px or two a tile from the best.
    assert chosen.waste <= min(fitting) * 1.01


def test_where_nothing_fits_the_smallest_tiles_are_planned() -> None:
    chosen = choose_plan(100, 100, halo_px=40, most_read_px=10)
    assert chosen.tile_px <= SMALLEST_TILE_PX


def test_waste_is_what_is_read_for_each_px_kept() -> None:
    planned = plan(100, 50, halo_px=10, tile_px=50)
    assert planned.tile_count == 2
    assert planned.read_px == 2 * 60 * 50
    assert planned.waste == pytest.approx(1.2)


@pytest.mark.parametrize(("x", "y", "width", "height"), [(-1, 0, 1, 1), (0, -1, 1, 1), (0, 0, 0, 1), (0, 0, 1, 0)])
def test_an_impossible_region_cannot_be_built(x: int, y: int, width: int, height: int) -> None:
    with pytest.raises(ValueError, match="There is no region"):
        Region(x, y, width, height)


def test_a_tile_cannot_keep_what_it_does_not_read() -> None:
    with pytest.raises(ValueError, match="must read what it keeps"):
        Tile(keep=Region(0, 0, 5, 5), read=Region(1, 0, 5, 5))


def test_a_band_cannot_have_gaps_overlaps_or_tiles_outside() -> None:
    left, right = Region(0, 0, 5, 4), Region(5, 0, 5, 4)
    below = Region(5, 4, 5, 4)
    with pytest.raises(ValueError, match="Band 0 is 40 px; its 1 tiles keep 20 px"):
        Band(0, Region(0, 0, 10, 4), (Tile(left, left),))
    with pytest.raises(ValueError, match="some outside it"):
        Band(0, Region(0, 0, 10, 4), (Tile(left, left), Tile(below, below)))
    assert Band(0, Region(0, 0, 10, 4), (Tile(left, left), Tile(right, right))).index == 0


@pytest.mark.parametrize(
    ("width", "height", "halo_px", "tile_px", "message"),
    [
        (0, 5, 4, 8, "no region"),
        (5, 0, 4, 8, "no region"),
        (5, 5, -1, 8, "halo is at least 0"),
        (5, 5, 4, 0, "side is at least 1"),
    ],
)
def test_an_impossible_plan_is_refused(width: int, height: int, halo_px: int, tile_px: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(width, height, halo_px=halo_px, tile_px=tile_px)
