"""Which pixels are computed together: pure geometry, decided before any pixel is touched.

A picture is cut into Bands, a Band into Tiles. Each Tile keeps its own Region and reads a halo of `halo_px` around it,
clipped to the picture: a network whose reach is at most the halo then gives the same pixels as for the whole picture,
since its zero padding counts only where the picture really ends. All numbers are integers in input px. Standard library
only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SMALLEST_TILE_PX = 16
"""Below this side a tile is nearly all halo; a device that cannot hold it cannot do the work."""


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of input px, never empty. Raises ValueError for a negative corner or a side below 1."""

    x: int
    y: int
    width: int
    height: int

    def __post_init__(self) -> None:
        if self.x < 0 or self.y < 0 or self.width < 1 or self.height < 1:
            raise ValueError(
                f"There is no region of {self.width} x {self.height} px at ({self.x}, {self.y}): "
                "a corner is at least 0 and a side at least 1."
            )

    @property
    def right(self) -> int:
        """First column past the region."""
        return self.x + self.width

    @property
    def bottom(self) -> int:
        """First row past the region."""
        return self.y + self.height

    @property
    def area_px(self) -> int:
        return self.width * self.height

    def contains(self, other: Region) -> bool:
        return self.x <= other.x and self.y <= other.y and self.right >= other.right and self.bottom >= other.bottom

    def grown(self, by_px: int, width: int, height: int) -> Region:
        """This region with `by_px` more on each side, clipped to a picture of `width` x `height`."""
        x, y = max(0, self.x - by_px), max(0, self.y - by_px)
        return Region(x, y, min(width, self.right + by_px) - x, min(height, self.bottom + by_px) - y)


@dataclass(frozen=True, slots=True)
class Tile:
    """One call of the network. Raises ValueError if `read` does not contain `keep`."""

    keep: Region
    """What the call is for: only this part of the output is used."""
    read: Region
    """What the call sees: `keep` and its halo, clipped to the picture."""

    def __post_init__(self) -> None:
        if not self.read.contains(self.keep):
            raise ValueError(f"A tile must read what it keeps: it keeps {self.keep} and reads {self.read}.")


@dataclass(frozen=True, slots=True)
class Band:
    """A full-width strip: the unit of memory, retry, progress, cancel and encoding.

    Raises ValueError unless the tiles lie inside the region and their areas add up to its area.
    """

    index: int
    region: Region
    tiles: tuple[Tile, ...]

    def __post_init__(self) -> None:
        inside = all(self.region.contains(tile.keep) for tile in self.tiles)
        covered_px = sum(tile.keep.area_px for tile in self.tiles)
        if not inside or covered_px != self.region.area_px:
            raise ValueError(
                f"Band {self.index} is {self.region.area_px} px; its {len(self.tiles)} tiles keep {covered_px} px"
                f"{'' if inside else ', some outside it'}."
            )


@dataclass(frozen=True, slots=True)
class Plan:
    """All bands of one pass over a picture of `width` x `height`, from the top down. They partition it."""

    width: int
    height: int
    halo_px: int
    tile_px: int
    """Longest side of what any tile keeps."""
    bands: tuple[Band, ...]
    in_strips: bool = False
    """The network goes over the picture once from top to bottom, and computes no row twice."""

    @property
    def tile_count(self) -> int:
        return sum(len(band.tiles) for band in self.bands)

    @property
    def read_px(self) -> int:
        """Pixels the network is given in all, halos included."""
        return sum(tile.read.area_px for band in self.bands for tile in band.tiles)

    @property
    def waste(self) -> float:
        """Pixels read for each pixel kept: 1.0 is no waste, 1.5 is half as much work again for the halos."""
        return self.read_px / (self.width * self.height)


def plan(width: int, height: int, *, halo_px: int, tile_px: int, band_height_px: int | None = None) -> Plan:
    """Bands and tiles of a picture of `width` x `height`, none of whose tiles keeps more than `tile_px` a side.

    `band_height_px` makes the bands lower (or higher) than `tile_px`. The sides are balanced, so that no sliver is left
    over: 100 px in tiles of at most 33 are cut 25, 25, 25, 25. Raises ValueError for a picture, halo or tile that
    cannot be.
    """
    if halo_px < 0:
        raise ValueError(f"A halo is at least 0 px, not {halo_px}.")
    whole = Region(0, 0, width, height)
    band_height_px = tile_px if band_height_px is None else band_height_px
    bands = []
    for index, (y, band_height) in enumerate(_cut(height, band_height_px)):
        region = Region(0, y, whole.width, band_height)
        tiles = _tiles(region, width, height, halo_px, tile_px, band_height_px)
        bands.append(Band(index, region, tuple(tiles)))
    longest_px = max(max(tile.keep.width, tile.keep.height) for band in bands for tile in band.tiles)
    return Plan(width, height, halo_px, longest_px, tuple(bands))


def plan_strips(width: int, height: int, *, band_px: int, columns: Sequence[tuple[slice, slice]]) -> Plan:
    """A plan for a network that runs in strips from top to bottom, with no halo above and below: bands of about
    `band_px` px. `columns`: for each part of the width those that it keeps and those that it reads."""
    bands = []
    for index, (y, band_height) in enumerate(_cut(height, max(1, band_px // width))):
        region = Region(0, y, width, band_height)
        tiles = (
            Tile(*(Region(span.start, y, span.stop - span.start, band_height) for span in part)) for part in columns
        )
        bands.append(Band(index, region, tuple(tiles)))
    longest_px = max(max(tile.keep.width, tile.keep.height) for band in bands for tile in band.tiles)
    return Plan(width, height, 0, longest_px, tuple(bands), in_strips=True)


def smaller(whole: Plan, band: Band, tile_px: int) -> Band:
    """The same band, cut into tiles of at most `tile_px` a side: what is done when the first cut did not fit in memory.

    Only this band is planned again; its region, and so its place in the result, stays as it was.
    """
    tiles = _tiles(band.region, whole.width, whole.height, whole.halo_px, tile_px, tile_px)
    return Band(band.index, band.region, tuple(tiles))


def evened(whole: Plan, tiles: Sequence[Tile], width: int, height: int) -> Iterator[Tile]:
    """The same tiles, each keeping `width` x `height` px, what it kept among them: what goes together in one call of a
    network has one size, and those of a balanced cut differ by a px.

    No tile may keep more than that now, and the picture must be as large.
    """
    for tile in tiles:
        x, y = min(tile.keep.x, whole.width - width), min(tile.keep.y, whole.height - height)
        keep = Region(x, y, width, height)
        assert keep.contains(tile.keep)
        yield Tile(keep, keep.grown(whole.halo_px, whole.width, whole.height))


def choose_plan(width: int, height: int, *, halo_px: int, most_read_px: int, most_band_px: int | None = None) -> Plan:
    """The plan with the least waste of all whose tiles read at most `most_read_px` each.

    `most_read_px` is what memory and time allow for one call of the network, `most_band_px` what memory allows for one
    band's result (both in input px). Where even tiles of SMALLEST_TILE_PX read more, those are planned: the budget is
    an estimate, and what really does not fit is found out by trying.
    """
    best: tuple[int, int, int] | None = None
    # A band is never cut lower than the smallest tile, however wide the picture.
    most_height_px = height if most_band_px is None else max(SMALLEST_TILE_PX, most_band_px // width)
    for columns in range(1, math.ceil(width / SMALLEST_TILE_PX) + 1):
        widest_px = _most_read(width, columns, halo_px)
        rows = _fewest_pieces(height, halo_px, most_read_px // widest_px, most_height_px)
        if rows is None:
            continue
        read_px = _all_read(width, columns, halo_px) * _all_read(height, rows, halo_px)
        if best is None or read_px < best[0]:
            best = (read_px, columns, rows)
    if best is None:
        return plan(width, height, halo_px=halo_px, tile_px=SMALLEST_TILE_PX)
    _, columns, rows = best
    tile_width_px, band_height_px = math.ceil(width / columns), math.ceil(height / rows)
    return plan(width, height, halo_px=halo_px, tile_px=tile_width_px, band_height_px=band_height_px)


def _cut(length: int, most: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the fewest pieces of at most `most`, whose lengths differ by at most 1."""
    if most < 1:
        raise ValueError(f"A tile's side is at least 1 px, not {most}.")
    pieces = math.ceil(length / most)
    for index in range(pieces):
        start = index * length // pieces
        yield start, (index + 1) * length // pieces - start


def _tiles(
    region: Region, width: int, height: int, halo_px: int, tile_width_px: int, tile_height_px: int
) -> Iterator[Tile]:
    for y, tile_height in _cut(region.height, tile_height_px):
        for x, tile_width in _cut(region.width, tile_width_px):
            keep = Region(region.x + x, region.y + y, tile_width, tile_height)
            yield Tile(keep, keep.grown(halo_px, width, height))


def _most_read(length: int, pieces: int, halo_px: int) -> int:
    """A bound, along one side, on what one of `pieces` balanced pieces reads; exact where no two halos are clipped."""
    return min(length, math.ceil(length / pieces) + min(2, pieces - 1) * halo_px)


def _all_read(length: int, pieces: int, halo_px: int) -> int:
    """What `pieces` balanced pieces read together along one side: a plan's read_px is the product of both sides'."""
    read = length + 2 * halo_px * pieces
    # Halos are clipped only near the two ends; the cut is taken as symmetric, which is at most 1 px out.
    for index in range(pieces):
        clipped = halo_px - index * length // pieces
        if clipped <= 0:
            break
        read -= 2 * clipped
    return read


def _fewest_pieces(length: int, halo_px: int, most_read_px: int, most_keep_px: int) -> int | None:
    """Fewest balanced pieces of which none reads or keeps more than that; None if the smallest tile still does."""
    for pieces in range(1, math.ceil(length / SMALLEST_TILE_PX) + 1):
        if math.ceil(length / pieces) <= most_keep_px and _most_read(length, pieces, halo_px) <= most_read_px:
            return pieces
    return None
