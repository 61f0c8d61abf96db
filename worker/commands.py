"""Commands of `enlarger` that need the networks and no service: upscale, classify, evaluate; and bench.

Loaded by name, through the entry points `enlarger.commands`, and cheap to import: torch comes when a command runs. They
go the worker's own way through a picture (`worker.enlarging`), so they make the same pictures as the service.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from shared.catalog import ModelCard
    from shared.settings import Settings
    from worker.enlarging import Engine, Progress
    from worker.metrics import Table

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "gpu"]), default="auto", show_default=True, help="Where to run it."
)
existing_file = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("picture", type=existing_file)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="File, or folder, of the result.")
@click.option("--model", default="srgan", show_default=True, help="The network, or auto.")
@click.option("--scale", type=click.IntRange(1, 16), help="Enlargement of each side.  [default: the model's]")
@click.option("--classify", is_flag=True, help="Also say what the picture shows.")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["auto", "png", "jpeg", "webp", "tiff", "avif"]),
    help="Of the result.  [default: as the name after -o says, else auto]",
)
@click.option("--quality", type=click.IntRange(1, 100), default=95, show_default=True, help="Of lossy formats.")
@click.option("--lossless", is_flag=True, help="WebP and AVIF without loss.")
@click.option("--metadata", type=click.Choice(["safe", "keep", "strip"]), default="safe", show_default=True)
@click.option("--alpha", type=click.Choice(["model", "lanczos", "flatten"]), default="model", show_default=True)
@click.option("--background", default="#ffffff", show_default=True, help="Colour under --alpha flatten.")
@click.option("--tile", "tile_px", type=click.IntRange(1), help="Longest side of a tile in px.  [default: as fits]")
@device_option
@as_json
def upscale(
    picture: Path,
    output: Path,
    model: str,
    scale: int | None,
    classify: bool,
    format_name: str | None,
    quality: int,
    lossless: bool,
    metadata: Any,
    alpha: Any,
    background: str,
    tile_px: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Enlarge PICTURE in this process; no service is needed."""
    from shared import catalog, pictures
    from shared.terminal import bars
    from worker.enlarging import Wanted

    settings = _settings(tile_px=tile_px)
    own_cards = _own_models(settings)
    card = catalog.card(catalog.AUTO_PLANNED_AS if model == catalog.AUTO else model, own_cards)
    scale = scale or card.scale
    card.passes(scale)
    with picture.open("rb") as source:
        facts = pictures.inspect(source)
        width, height = pictures.check_size(
            facts,
            scale,
            "auto",
            max_input_px=settings.max_input_px,
            max_output_px=settings.max_output_px,
        )
        format = pictures.output_format(
            format_name or _format_of(output) or "auto", facts.format, width, height, lossless=lossless
        )
        if output.is_dir() or not output.suffix:
            output = output / f"{picture.stem}-{model}-x{scale}{pictures.format_named(format).extension}"
        if output.exists() and output.samefile(picture):
            raise click.BadParameter("the result would replace the picture itself", param_hint="-o")
        output.parent.mkdir(parents=True, exist_ok=True)
        wanted = Wanted(
            scale=scale,
            model=model,
            format=format,
            classify=classify,
            quality=quality,
            lossless=lossless,
            metadata_policy=metadata,
            alpha=alpha,
            background=background,
        )
        started = time.monotonic()
        with bars() as shown:
            engine = _engine(settings, device, own_cards)
            source.seek(0)
            enlarged = engine.enlarge_file(source, output, wanted, _BarWatch(shown, picture.name))
        seconds = time.monotonic() - started
    if as_json:
        facts_of_result = {**asdict(enlarged), "path": str(output), "format": format}
        click.echo(
            json.dumps({**facts_of_result, "scale": scale, "device": engine.device, "seconds": seconds}, indent=2)
        )
        return
    click.echo(
        f"{output}: {facts.width} x {facts.height} -> {enlarged.width} x {enlarged.height} px, "
        f"{enlarged.bytes:,} bytes, {seconds:.1f} s on {engine.device}"
    )
    for label in enlarged.labels or ():
        click.echo(f"  {label.probability:6.1%}  {label.label}")
    for warning in enlarged.warnings:
        click.echo(f"Note: {warning}", err=True)


@click.command()
@click.argument("pictures", metavar="PICTURE...", nargs=-1, required=True, type=existing_file)
@device_option
@as_json
def classify(pictures: tuple[Path, ...], device: str, as_json: bool) -> None:
    """Say what pictures show: five labels each, with probabilities."""
    import numpy as np

    from shared.errors import UploadRejected
    from shared.terminal import bars
    from worker import codec
    from worker import upscale as engine
    from worker.classify import Classifier

    settings = _settings()
    engine.prepare_process(settings.torch_threads)
    found: list[dict[str, Any]] = []
    with bars() as shown:
        task = shown.add_task("classifying", total=len(pictures), note="")
        classifier = Classifier.load(engine.choose_device(device))
        for path in pictures:
            shown.update(task, note=path.name)
            entry: dict[str, Any] = {"picture": str(path), "labels": None, "error": None}
            try:
                with path.open("rb") as file:
                    picture = codec.decode(file, max_input_px=settings.max_input_px)
            except UploadRejected as error:
                entry["error"] = {"code": error.code, "detail": error.detail}
            else:
                if picture.has_alpha:
                    picture = codec.flatten(picture, "#ffffff")
                rgb = picture.rgb if picture.rgb.dtype == np.uint8 else (picture.rgb >> 8).astype(np.uint8)
                entry["labels"] = [asdict(label) for label in classifier.classify(rgb)]
            found.append(entry)
            shown.advance(task)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        for entry in found:
            for label in entry["labels"] or ():
                click.echo(f"{entry['picture']}: {label['probability']:6.1%}  {label['label']}")
            if entry["error"]:
                click.echo(f"{entry['picture']}: {entry['error']['detail']} [{entry['error']['code']}]", err=True)
    sys.exit(1 if any(entry["error"] for entry in found) else 0)


@click.command()
@click.option(
    "--data",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with HR/*.png and LRx4/*.png of the same names, or a folder of such folders.",
)
@click.option("--models", help="Names with commas between; bicubic is one.  [default: bicubic and all]")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, allow_dash=True), help="Write it here too; - only."
)
@click.option(
    "--y",
    "y_convention",
    type=click.Choice(["rounded", "exact"]),
    default="rounded",
    show_default=True,
    help="Y as MATLAB gives it for 8-bit pictures, or as the formula does: 0.02 dB more.",
)
@device_option
def evaluate(data: Path, models: str | None, json_path: str | None, y_convention: str, device: str) -> None:
    """Score models on a benchmark: PSNR and SSIM of Y, as papers give them, without a border as wide as the scale.

    With `--json FILE` the figures are written there as well; `--json -` prints them, and nothing else.
    """
    from shared import catalog
    from shared.terminal import bars
    from worker import metrics
    from worker import upscale as engine

    names = models.split(",") if models else ["bicubic", *(card.name for card in catalog.CARDS)]
    folders = [data] if any(data.glob("LRx*")) else sorted({path.parent for path in data.glob("*/LRx*")})
    if not folders:
        raise click.BadParameter("no folder LRx<scale> of small pictures there", param_hint="--data")
    settings = _settings()
    engine.prepare_process(settings.torch_threads)
    tables: dict[str, Table] = {}
    with bars() as shown:
        for folder in folders:
            task = shown.add_task(folder.name, total=None, note="")
            try:
                tables[folder.name] = metrics.evaluate(
                    folder,
                    names,
                    device=engine.choose_device(device),
                    rounded=y_convention == "rounded",
                    on_progress=partial(_count, shown, task),
                )
            except ValueError as error:
                raise click.BadParameter(str(error), param_hint="--data") from error
    document = json.dumps({name: asdict(table) for name, table in tables.items()}, indent=2)
    if json_path == "-":
        click.echo(document)
        return
    if json_path:
        Path(json_path).write_text(document + "\n")
    for name, table in tables.items():
        click.echo(
            f"{name}, {sum(1 for row in table.rows if row.model == table.rows[0].model)} pictures, Y {y_convention}"
        )
        for mean in table.means:
            click.echo(f"  {mean.model:<18} {mean.psnr:6.2f} dB  SSIM {mean.ssim:.4f}  {mean.seconds:7.2f} s a picture")


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Repetitions of each form.")
@click.option("--side", "side_px", type=click.IntRange(8, 2048), default=256, show_default=True, help="Of the picture.")
@as_json
def bench(rounds: int, side_px: int, as_json: bool) -> None:
    """Measure a whole job against the bare network on this machine.

    Runs the service, and in turns the network alone in its fastest plain form and the same picture from submit to
    stored result. Ratios are what to read: seconds are this machine's at this moment.
    """
    from shared.commands import stopped_by_signals
    from shared.servers import free_port
    from shared.settings import Settings
    from shared.stack import Stack
    from shared.terminal import bars
    from worker import bench

    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="enlarger-bench-") as folder, bars() as shown:
        task = shown.add_task("bench", total=rounds, note="starting the service")
        stack = Stack(Settings(data_dir=Path(folder), worker_device="cpu"), port=free_port())
        with stopped_by_signals(stack):
            stack.start()
            measured = bench.measure(
                stack.url,
                stack.api_key,
                rounds=rounds,
                side_px=side_px,
                on_round=lambda done: shown.update(task, completed=done, note=f"round {done}"),
            )
    if not measured:
        sys.exit(1)
    if as_json:
        click.echo(json.dumps(measured, indent=2))
        return
    machine = measured["machine"]
    click.echo(
        f"srgan, {side_px} x {side_px} px, {rounds} rounds, medians; {machine['cpu']}, {machine['threads']} threads"
    )
    for name in ("bare", "engine", "job"):
        form = measured[name]
        click.echo(f"  {form['what']:<46} {form['seconds']:7.3f} s   {form['over_bare']:5.2f} x bare")
    phases = ", ".join(f"{phase} {seconds * 1000:.0f}" for phase, seconds in measured["job"]["phases_seconds"].items())
    click.echo(f"  of the job, in ms: {phases}")
    waste = ", ".join(f"{size} {factor:.2f}" for size, factor in measured["waste"].items())
    click.echo(f"  work done over work needed, tiled: {waste}")


def _count(shown: Bars, task: TaskID, done: int, total: int) -> None:
    shown.update(task, completed=done, total=total)


class _BarWatch:
    """A `worker.enlarging.Watch` that draws a bar. The phases before and after the network have no measure of their
    own, so they are words beside it."""

    def __init__(self, bars: Bars, name: str) -> None:
        self._bars = bars
        self._task = bars.add_task(name, total=None, note="")

    def begins(self, phase: str, *, expected_seconds: float = 0.0) -> None:  # noqa: ARG002  (the protocol's)
        self._bars.update(self._task, note=phase)

    def routed(self, model: str, reason: str) -> None:
        self._bars.console.print(f"{model}: {reason}")

    def progressed(self, progress: Progress) -> None:
        self._bars.update(
            self._task,
            completed=progress.tiles_done,
            total=progress.tiles_total,
            note=f"upscale, {progress.eta_seconds:.0f} s left",
        )


def _own_models(settings: Settings) -> list[ModelCard]:
    """What lies in `models_dir`; what cannot be used is told."""
    if not settings.models_dir:
        return []
    from worker.networks import own

    cards, faults = own.scan(Path(settings.models_dir))
    for fault in faults:
        click.echo(f"{fault.path}: {fault.reason}", err=True)
    return cards


def _engine(settings: Settings, device: str, own_cards: Sequence[ModelCard] = ()) -> Engine:
    from worker import upscale
    from worker.enlarging import Engine

    upscale.prepare_process(settings.torch_threads)
    return Engine.of(settings, upscale.choose_device(device), own=own_cards)


def _settings(*, tile_px: int | None = None) -> Settings:
    from shared.settings import load

    settings = load()
    return settings if tile_px is None else settings.model_copy(update={"tile_px": tile_px})


def _format_of(output: Path) -> str | None:
    """The format that a file name asks for by its extension; None where it has none."""
    from shared.pictures import FORMATS

    extension = {".jpeg": ".jpg", ".tiff": ".tif"}.get(output.suffix.lower(), output.suffix.lower())
    return next((format.name for format in FORMATS if format.written and format.extension == extension), None)
