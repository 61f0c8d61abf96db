"""A contact sheet: one crop of a picture through several models, side by side, to choose from by looking."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from shared.catalog import PREVIEW
from shared.errors import BadOutput, InvalidRequest, ModelUnavailable
from worker import upscale
from worker.codec.decode import flatten
from worker.enlarging import Engine, Enlarged, Onlooker, Progress, Watch
from worker.networks import Network

LABEL_PX = 28
GAP_PX = 8
FONT_PX = 16
PAPER, INK, FAINT = (246, 246, 244), (24, 24, 24), (120, 120, 120)


@dataclass(frozen=True)
class Cell:
    """Where one model's answer lies on the sheet; `error` where it has none."""

    model: str
    x: int
    y: int
    width: int
    height: int
    seconds: float
    error: str | None


def make(
    engine: Engine,
    source: BinaryIO,
    target: Path,
    *,
    crop: Mapping[str, int],
    models: Sequence[str],
    scale: int,
    watch: Watch,
    onlookers: Sequence[Onlooker] = (),
) -> Enlarged:
    """Writes the sheet to `target` as a PNG.

    `crop`: x, y, width and height in px of the picture as it is seen, inside it. A model that cannot be run leaves a
    cell that says so, and the others come all the same. Raises UploadRejected for a picture that cannot be taken,
    OutOfMemory or DeviceBroken where the device fails, and whatever `watch` raises.
    """
    started = time.perf_counter()
    picture = engine.decode(source, watch)
    if picture.has_alpha:
        picture = flatten(picture, "#ffffff")
    seen = picture.rgb[crop["y"] : crop["y"] + crop["height"], crop["x"] : crop["x"] + crop["width"]]
    seen = np.ascontiguousarray(seen if seen.dtype == np.uint8 else seen >> 8, dtype=np.uint8)

    columns = math.ceil(math.sqrt(len(models)))
    width, height = seen.shape[1] * scale, seen.shape[0] * scale
    step_x, step_y = width + GAP_PX, height + LABEL_PX + GAP_PX
    rows = math.ceil(len(models) / columns)
    sheet = Image.new("RGB", (columns * step_x + GAP_PX, rows * step_y + GAP_PX), PAPER)
    draw = ImageDraw.Draw(sheet)
    cells: list[Cell] = []
    watch.begins("upscale")
    for number, model in enumerate(models):
        x, y = GAP_PX + number % columns * step_x, GAP_PX + number // columns * step_y + LABEL_PX
        begun = time.perf_counter()
        error = None
        try:
            network = engine.ready(model, watch, phase="upscale")
            # Loading it and learning its speed is not what the next picture will wait for.
            begun = time.perf_counter()
            made = _enlarged(engine, network, seen, scale, watch, number, len(models))
            sheet.paste(Image.fromarray(made), (x, y))
        except (ModelUnavailable, BadOutput, InvalidRequest) as problem:
            error = problem.detail
            draw.multiline_text((x + 4, y + 4), _wrapped(error, width), FAINT, font=_font())
        seconds = time.perf_counter() - begun
        told = model if error else f"{model}, {seconds:.1f} s"
        draw.text((x, y - LABEL_PX + 4), _cut(told, width), INK, font=_font())
        cells.append(Cell(model, x, y, width, height, round(seconds, 3), error))
    sheet.save(target, "PNG")
    for onlooker in onlookers:
        onlooker.begins(picture.rgb, *sheet.size)
        onlooker.made(np.asarray(sheet))
    return Enlarged(
        *sheet.size,
        bytes=target.stat().st_size,
        labels=None,
        warnings=picture.warnings,
        timings={"upscale_seconds": time.perf_counter() - started},
        model=PREVIEW,
        cells=[asdict(cell) for cell in cells],
    )


def _enlarged(
    engine: Engine, network: Network, seen: NDArray[np.uint8], scale: int, watch: Watch, number: int, of: int
) -> NDArray[np.uint8]:
    def on_tile(done: int, total: int) -> None:
        # Every model counts alike, whatever its work: a bar that moves is all that is needed.
        watch.progressed(Progress(number * total + done, of * total, number, of, None))

    rows = upscale.enlarge(network, seen, scale, on_tile=on_tile, dtype=np.uint8, batcher=engine.batcher)
    return np.concatenate([each.pixels for each in rows])


def _font() -> Any:
    return ImageFont.load_default(FONT_PX)


def _cut(text: str, width: int) -> str:
    """As much of the text as fits."""
    while len(text) > 1 and _font().getlength(text) > width:
        text = text[:-2] + "…"
    return text


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _font().getlength(longer) <= width - 8:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
