"""Makes the crops that the page shows beside each model: one detail of one photograph, as every card enlarges it.

    python -m worker.samples        (or `make samples`; after a model has come, gone or changed)

The photograph is the demo's (`api/demo_photo/ORIGIN.md`, CC0). The crops are small files of the page and are committed.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from shared import catalog
from shared.settings import Settings
from worker import upscale
from worker.enlarging import Engine, Wanted

ROOT = Path(__file__).resolve().parent.parent
PHOTO = ROOT / "api" / "demo_photo" / "cat.png"
TARGET = ROOT / "api" / "static" / "samples"
SCALE = 4
# The cat's right eye, in px of the photograph.
LEFT, TOP, SIDE = 54, 38, 36
# Around it, so that the networks see what lies beside: the whole photograph would take the large ones minutes.
MARGIN = 24


def main() -> int:
    upscale.prepare_process(0)
    engine = Engine.of(Settings(), "cpu")
    TARGET.mkdir(exist_ok=True)
    side = SIDE * SCALE
    with Image.open(PHOTO) as photo:
        box = (LEFT, TOP, LEFT + SIDE, TOP + SIDE)
        _save(photo.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, box=box), "before")
        part = io.BytesIO()
        photo.crop((LEFT - MARGIN, TOP - MARGIN, LEFT + SIDE + MARGIN, TOP + SIDE + MARGIN)).save(part, "PNG")
    with tempfile.TemporaryDirectory() as folder:
        for card in catalog.CARDS:
            made = Path(folder, f"{card.name}.png")
            engine.enlarge_file(part, made, Wanted(scale=SCALE, model=card.name))
            with Image.open(made) as image:
                edge = MARGIN * SCALE
                _save(image.convert("RGB").crop((edge, edge, edge + side, edge + side)), card.name)
    return 0


def _save(crop: Image.Image, name: str) -> None:
    crop.save(TARGET / f"{name}.webp", "WEBP", quality=85, method=6)


if __name__ == "__main__":
    sys.exit(main())
