"""What scores do not show: the same piece of every picture by every model, side by side.

Collected while `worker.metrics.evaluate` runs, since no result is kept; then an HTML page that needs no other file, or
one sheet for a document.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from shared.catalog import ModelCard
from worker.metrics import Score, Table

CROP_PX = 96
SHOWN_PX = 192
"""Side at which a crop is shown: each of its px as a square of two."""
TRUE = "true picture"


@dataclass(frozen=True)
class Column:
    """One figure of a score: how it is named and written, and which end is good."""

    name: str
    written: Callable[[Score], str]
    value: Callable[[Score], float | None]
    higher_is_better: bool


COLUMNS = (
    Column("PSNR", lambda s: f"{s.psnr:.2f} dB", lambda s: s.psnr, True),
    Column("SSIM", lambda s: f"{s.ssim:.4f}", lambda s: s.ssim, True),
    Column("perceptual", lambda s: f"{s.perceptual:.3f}", lambda s: s.perceptual, False),
    Column("NIQE", lambda s: "-" if s.niqe is None else f"{s.niqe:.2f}", lambda s: s.niqe, False),
    Column("s a picture", lambda s: f"{s.seconds:.2f}", lambda s: s.seconds, False),
    Column("MP/s", lambda s: f"{s.megapixels_per_second:.3g}", lambda s: s.megapixels_per_second, True),
    Column("peak memory", lambda s: f"{s.peak_bytes / 1e6:,.0f} MB", lambda s: s.peak_bytes, False),
)

LEGEND = (
    "PSNR and SSIM: of Y, without a border as wide as the scale; higher is nearer to the true picture.",
    "Perceptual: distance in features of EfficientNet-Lite0; lower looks nearer. It is made like LPIPS, whose weights "
    "no package carries, and is not to be set beside published LPIPS.",
    "NIQE: needs no true picture; lower is more like an undisturbed photograph.",
    "MP/s: of the result. Peak memory: of the whole process, on a GPU of the device; the greatest of all pictures.",
)


class Comparison:
    """The crops of one evaluation."""

    def __init__(self) -> None:
        self._places: dict[tuple[str, str], tuple[int, int]] = {}
        self._crops: dict[tuple[str, str], dict[str, tuple[Score | None, Image.Image]]] = {}

    def add(self, benchmark: str, score: Score, picture: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
        """Keeps the piece of the picture where the true one has most to see."""
        key = (benchmark, score.picture)
        if key not in self._places:
            self._places[key] = _busiest(truth)
            self._crops[key] = {TRUE: (None, _cut(truth, self._places[key]))}
        self._crops[key][score.model] = (score, _cut(picture, self._places[key]))

    def page(self, tables: Mapping[str, Table], conditions: Sequence[str]) -> str:
        """The report as one HTML document; `conditions` say how it was measured."""
        parts = _notes(conditions)
        for name, table in tables.items():
            parts.append(f"<h2>{html.escape(name)}</h2>{_table(table)}")
            for (benchmark, picture), crops in self._crops.items():
                if benchmark == name:
                    figures = "".join(_figure(model, *crop) for model, crop in crops.items())
                    parts.append(f"<h3>{html.escape(picture)}</h3><div class=crops>{figures}</div>")
        parts += ["<h2>How to read it</h2>", *_notes(LEGEND)]
        return PAGE.replace("{parts}", "\n".join(parts))

    def sheet(self) -> Image.Image:
        """One picture: the first picture of each benchmark, a row or more of crops with names and scores."""
        first: dict[str, dict[str, tuple[Score | None, Image.Image]]] = {}
        for (benchmark, _), crops in self._crops.items():
            first.setdefault(benchmark, crops)
        cells = [(model, *crop) for crops in first.values() for model, crop in crops.items()]
        columns = min(len(cells), 5)
        gap, text_px = 12, 40
        width, height = SHOWN_PX + gap, SHOWN_PX + text_px
        sheet = Image.new("RGB", (columns * width + gap, -(-len(cells) // columns) * height + gap), "white")
        pen, bold, plain = ImageDraw.Draw(sheet), ImageFont.load_default(15), ImageFont.load_default(12)
        for index, (model, score, crop) in enumerate(cells):
            left, top = gap + index % columns * width, gap + index // columns * height
            sheet.paste(crop.resize((SHOWN_PX, SHOWN_PX), Image.Resampling.NEAREST), (left, top))
            pen.text((left, top + SHOWN_PX + 2), model, "#111111", bold)
            pen.text((left, top + SHOWN_PX + 19), _in_short(score), "#555555", plain)
        return sheet


def markdown(tables: Mapping[str, Table], cards: Sequence[ModelCard]) -> str:
    """A table for a document: every model with its licence, where it comes from, its speed and its scores."""
    header = ["model", "scales", "licence", "origin", "MP/s", *(f"{name}: PSNR / SSIM / perceptual" for name in tables)]
    lines = [header, ["---"] * len(header)]
    of_model = {card.name: card for card in cards}
    for means in zip(*(table.means for table in tables.values()), strict=True):
        card = of_model.get(means[0].model)
        told = ["any", "", "MATLAB's `imresize`, as in published tables"] if card is None else _told(card)
        speed = f"{fmean(mean.megapixels_per_second for mean in means):.2g}"
        scores = [f"{mean.psnr:.2f} / {mean.ssim:.4f} / {mean.perceptual:.2f}" for mean in means]
        lines.append([f"`{means[0].model}`", *told, speed, *scores])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _told(card: ModelCard) -> list[str]:
    scales = [each.scale for each in card.at_each_scale]
    shown = "any" if len(scales) > 4 else ", ".join(f"x{scale}" for scale in scales)
    address = card.source_url.removeprefix("https://").partition("#")[0].removesuffix("/")
    return [shown, card.licence, f"[{address}]({card.source_url})" if address else ""]


def _notes(lines: Sequence[str]) -> list[str]:
    return [f"<p class=note>{html.escape(line)}</p>" for line in lines]


def _in_short(score: Score | None) -> str:
    return "" if score is None else f"{score.psnr:.2f} dB, perceptual {score.perceptual:.2f}"


def _busiest(truth: NDArray[np.uint8]) -> tuple[int, int]:
    """(top, left) of the crop in which neighbouring px differ most."""
    gray = truth.astype(np.float64) if truth.ndim == 2 else truth.mean(axis=2)
    steps = np.abs(np.diff(gray, axis=0))[:, :-1] + np.abs(np.diff(gray, axis=1))[:-1]
    sums = np.pad(steps.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    height, width = (max(1, min(length, CROP_PX - 1)) for length in steps.shape)
    within = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    top, left = np.unravel_index(int(within.argmax()), within.shape)
    return int(top), int(left)


def _cut(picture: NDArray[np.uint8], place: tuple[int, int]) -> Image.Image:
    top, left = place
    return Image.fromarray(picture[top : top + CROP_PX, left : left + CROP_PX]).convert("RGB")


def _table(table: Table) -> str:
    header = "".join(f"<th>{column.name}</th>" for column in COLUMNS)
    rows = []
    for mean in table.means:
        cells = []
        for column in COLUMNS:
            told = [value for value in map(column.value, table.means) if value is not None]
            best = (max if column.higher_is_better else min)(told) if told else None
            mark = " class=best" if len(told) > 1 and column.value(mean) == best else ""
            cells.append(f"<td{mark}>{column.written(mean)}</td>")
        rows.append(f"<tr><th>{html.escape(mean.model)}</th>{''.join(cells)}</tr>")
    return f"<div class=wide><table><tr><th>model</th>{header}</tr>{''.join(rows)}</table></div>"


def _figure(model: str, score: Score | None, crop: Image.Image) -> str:
    encoded = io.BytesIO()
    crop.save(encoded, "PNG")
    source = base64.b64encode(encoded.getvalue()).decode()
    caption = f"<b>{html.escape(model)}</b><br>{_in_short(score) or '&nbsp;'}"
    image = f'<img alt="{html.escape(model)}" src="data:image/png;base64,{source}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Enlarger: models compared</title>
<style>
  :root { color-scheme: light dark; --soft: #666; --line: #ddd; --best: #1f6f54; }
  @media (prefers-color-scheme: dark) { :root { --soft: #aaa; --line: #444; --best: #6fd0ab; } }
  body { font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.5rem; } h2 { margin-top: 2.5rem; } h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
  .note { color: var(--soft); max-width: 46rem; margin: .4rem 0; }
  .wide { overflow-x: auto; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { padding: .3rem .8rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
  tr th:first-child { text-align: left; }
  td.best { color: var(--best); font-weight: 600; }
  .crops { display: flex; flex-wrap: wrap; gap: .8rem; }
  figure { margin: 0; width: 192px; }
  figure img { display: block; width: 192px; height: auto; image-rendering: pixelated; }
  figcaption { font-size: .8rem; color: var(--soft); } figcaption b { color: CanvasText; }
</style>
<h1>Models compared</h1>
{parts}
</html>
"""
