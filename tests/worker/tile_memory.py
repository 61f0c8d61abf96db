"""What one tile of each network really takes, in a process of its own: `tests/worker/test_upscale.py` runs it.

Standard input: JSON, [[card's name, scale, side in px], ...]. Output: JSON, [[measured bytes, estimated bytes], ...].
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import numpy as np

from shared.catalog import CARDS
from worker.networks import Network, load
from worker.tiling import Region, Tile
from worker.upscale import _one_tile, prepare_process


def measured(network: Network, side: int) -> int:
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    whole = Region(0, 0, side, side)
    corner = Region(0, 0, 16, 16)
    # What a first call loads is no tile's.
    _one_tile(network, image, Tile(corner, corner), False, np.dtype(np.uint8))
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    _one_tile(network, image, Tile(whole, whole), False, np.dtype(np.uint8))
    return status("VmHWM") - before


def status(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def main() -> None:
    prepare_process(0)
    found = []
    for name, scale, side in json.load(sys.stdin):
        card = next(each for card in CARDS for each in card.at_each_scale if (each.name, each.scale) == (name, scale))
        network = load(card, "cpu")
        found.append((measured(network, side), network.fixed_bytes + network.bytes_per_px * side**2))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
