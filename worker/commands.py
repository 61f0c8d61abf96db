"""Commands of `enlarger` that need the networks and no service: upscale, classify, evaluate, train; and bench.

Loaded by name, through the entry points `enlarger.commands`, and cheap to import: torch comes when a command runs. They
go the worker's own way through a picture (`worker.enlarging`), so they make the same pictures as the service.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from shared.catalog import ModelCard
    from shared.settings import Settings
    from worker.enlarging import Engine, Progress
    from worker.metrics import Table
    from worker.training import Check, Plan, Pupil

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
    from worker import upscale as engine
    from worker.classify import Classifier
    from worker.codec.decode import decode, flatten

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
                    picture = decode(file, max_input_px=settings.max_input_px)
            except UploadRejected as error:
                entry["error"] = {"code": error.code, "detail": error.detail}
            else:
                if picture.has_alpha:
                    picture = flatten(picture, "#ffffff")
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
    help="Folder of true pictures, in it or in HR, beside an LRx4 or not; or a folder of such folders.",
)
@click.option(
    "--models",
    default="all",
    show_default=True,
    help="Names with commas between; bicubic-matlab, the papers' baseline, is one. all: that and every card.",
)
@click.option("--scale", type=click.IntRange(1, 16), help="Enlargement.  [default: that of LRx..., else 4]")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, allow_dash=True), help="Write it here too; - only."
)
@click.option("--html", "html_path", type=click.Path(dir_okay=False, path_type=Path), help="Write a report here.")
@click.option(
    "--sheet",
    "sheet_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a picture here: a crop of the first picture by every model.",
)
@click.option("--markdown", is_flag=True, help="Print one table for a document, with licences and origins.")
@click.option(
    "--y",
    "y_convention",
    type=click.Choice(["rounded", "exact"]),
    default="rounded",
    show_default=True,
    help="Y as MATLAB gives it for 8-bit pictures, or as the formula does: 0.02 dB more.",
)
@device_option
def evaluate(
    data: Path,
    models: str,
    scale: int | None,
    json_path: str | None,
    html_path: Path | None,
    sheet_path: Path | None,
    markdown: bool,
    y_convention: str,
    device: str,
) -> None:
    """Score models on pictures whose true enlargement is known: fidelity, looks, speed and memory.

    PSNR and SSIM are of Y, as papers give them, without a border as wide as the scale. Where there are true pictures
    only, the small ones are made from them by MATLAB's bicubic. The perceptual score is a distance in features of
    EfficientNet-Lite0, made like LPIPS; NIQE is the original's.

    With `--json FILE` the figures are written there as well; `--json -` prints them, and nothing else.
    """
    from shared import catalog
    from shared.terminal import bars, print_table
    from worker import metrics
    from worker import upscale as engine
    from worker.comparison import COLUMNS, LEGEND, Comparison
    from worker.comparison import markdown as comparison_table

    every = [metrics.BICUBIC, *(card.name for card in catalog.CARDS)]
    names = every if models == "all" else list(dict.fromkeys(name.strip() for name in models.split(",")))
    folders = metrics.benchmarks(data)
    if not folders:
        raise click.BadParameter("no pictures there, in no folder HR either", param_hint="--data")
    settings = _settings()
    threads = engine.prepare_process(settings.torch_threads)
    device = engine.choose_device(device)
    comparison = Comparison()
    tables: dict[str, Table] = {}
    with bars() as shown:
        for folder in folders:
            name = folder.resolve().name
            task = shown.add_task(name, total=None, note="")
            try:
                tables[name] = metrics.evaluate(
                    folder,
                    names,
                    scale=scale,
                    device=device,
                    rounded=y_convention == "rounded",
                    on_picture=partial(comparison.add, name),
                    on_progress=partial(_count, shown, task),
                )
            except ValueError as error:
                raise click.BadParameter(str(error), param_hint="--data") from error
    conditions = [_condition(name, table, y_convention) for name, table in tables.items()]
    machine = f"Measured on {device} with {threads} threads, one picture after the other."
    if html_path:
        html_path.write_text(comparison.page(tables, [*conditions, machine]))
    if sheet_path:
        comparison.sheet().save(sheet_path)
    # JSON has no infinity: equal pictures have no PSNR there.
    document = json.dumps(_finite({name: asdict(table) for name, table in tables.items()}), indent=2)
    if json_path == "-":
        click.echo(document)
        return
    if json_path:
        Path(json_path).write_text(document + "\n")
    if markdown:
        click.echo(comparison_table(tables, catalog.CARDS))
        return
    for condition, table in zip(conditions, tables.values(), strict=True):
        click.echo(condition)
        rows = [[mean.model, *(column.written(mean) for column in COLUMNS)] for mean in table.means]
        print_table(["model", *(column.name for column in COLUMNS)], rows)
        click.echo()
    for line in (machine, *LEGEND):
        click.echo(line)


@click.command()
@click.argument("network", type=click.Choice(["srcnn", "fsrcnn", "srgan"]))
@click.option(
    "--data",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of photographs, also in folders below it; one in twelve is held out to judge by.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of this training; one that is in it is gone on with.  [default: training/NETWORK-xSCALE]",
)
@click.option("--scale", type=click.IntRange(2, 4), default=4, show_default=True, help="srgan: 4 only.")
@click.option("--steps", type=click.IntRange(1), help="Batches to learn from.  [default: as fits the network]")
@click.option("--batch", type=click.IntRange(1), help="Patches a step.  [default: 16]")
@click.option("--patch", "patch_px", type=click.IntRange(4), help="Side of a patch in px of the small picture.")
@click.option("--rate", "learning_rate", type=click.FloatRange(0, min_open=True), help="Adam's, at its highest.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--init",
    help="What to begin from: srresnet or srgan for srgan, and for all a .safetensors file made by this command.  "
    "[default: srresnet for srgan, nothing for the others]",
)
@click.option("--vgg", type=existing_file, help="srgan: torchvision's VGG19 weights, in place of EfficientNet-Lite0.")
@click.option("--check-every", type=click.IntRange(1), default=250, show_default=True, help="Steps between scorings.")
@device_option
def train(
    network: str,
    data: Path,
    output: Path | None,
    scale: int,
    init: str | None,
    vgg: Path | None,
    check_every: int,
    device: str,
    **asked: Any,
) -> None:
    """Train NETWORK on a folder of photographs, or go on where a training was stopped.

    srcnn and fsrcnn learn from nothing, or from another scale; srgan is fine-tuned. ^C stops after the step at hand,
    and the same command goes on from there. The folder gets checkpoint.pt, curve.json, curve.png and, at the end, the
    weights: put that file into ENLARGER_MODELS_DIR to offer it.
    """
    from dataclasses import replace

    from shared.terminal import bars, sparkline
    from worker import training
    from worker import upscale as engine
    from worker.networks import trained

    plan = training.PLANS[network]
    plan = replace(plan, scale=scale, init=init or plan.init, **{k: v for k, v in asked.items() if v is not None})
    output = output or Path("training") / f"{network}-x{scale}"
    settings = _settings()
    engine.prepare_process(settings.torch_threads)
    try:
        pupil = _pupil(plan, engine.choose_device(device), vgg)
        photographs = training.Photographs(data, plan.scale, pupil.patch_px, plan.seed)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if photographs.skipped:
        click.echo(f"Left out, no picture or too small: {', '.join(photographs.skipped)}", err=True)
    with _until_interrupted() as should_stop, bars() as shown:
        task = shown.add_task(f"{network} x{scale}", total=plan.steps, note="reading photographs")

        def on_step(step: int, check: Check | None) -> None:
            shown.update(task, completed=step)
            if check is not None:
                told = [f"{name} {value:.4g}" for name, value in (check.losses | check.scores).items()]
                shown.update(task, note=", ".join(told))
                if not shown.console.is_terminal:
                    click.echo(f"step {step} of {plan.steps}, {check.seconds:.0f} s: {', '.join(told)}")

        try:
            curve = training.train(
                pupil,
                photographs,
                plan,
                output,
                check_every=check_every,
                on_step=on_step,
                should_stop=should_stop,
            )
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    if not curve or curve[-1].step < plan.steps:
        click.echo(f"Stopped; what was learnt is in {output}. The same command goes on from there.")
        return
    best = training.best_of(pupil, curve)
    weights = output / f"{network}-x{scale}.safetensors"
    trained.write(
        weights,
        pupil.result(),
        "srresnet" if network == "srgan" else network,
        scale,
        {
            **{name: value for name, value in asdict(plan).items() if name not in ("network", "scale", "init")},
            # A file's name and not its folder, which is nobody else's business.
            "init": plan.init and Path(plan.init).name,
            "photographs": len(photographs),
            "data": data.resolve().name,
            "best_step": best.step,
            "held_out": best.scores,
        },
    )
    for name in (*best.losses, *best.scores):
        values = [(check.losses | check.scores)[name] for check in curve]
        click.echo(f"{name:>12}  {sparkline(values)}  {values[0]:.4g} to {values[-1]:.4g}")
    told = ", ".join(f"{name} {value:.4g}" for name, value in best.scores.items())
    click.echo(f"{weights}: the weights of step {best.step}, best over the photographs held out ({told})")


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Repetitions of each form.")
@click.option("--side", "side_px", type=click.IntRange(8, 2048), default=256, show_default=True, help="Of the picture.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there.")
def bench(rounds: int, side_px: int, json_path: Path | None) -> None:
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
    if json_path:
        json_path.write_text(json.dumps(measured, indent=2) + "\n")
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
    click.echo(f"  work done over work needed: {waste}")


def _pupil(plan: Plan, device: str, vgg: Path | None) -> Pupil:
    """What is to be trained, begun from what `plan.init` names. Raises ValueError for what cannot be."""
    from worker import adversarial, training
    from worker.networks import trained

    if plan.network == "srgan":
        if plan.scale != 4:
            raise ValueError("srgan is trained for x4 only; leave --scale out.")
        return adversarial.SrganPupil(plan, device, vgg)
    init = None
    if plan.init is not None:
        init = trained.read_file(Path(plan.init), plan.network)
    return training.LumaPupil(trained.LUMA_NETWORKS[plan.network](plan.scale), plan, device, init)


@contextmanager
def _until_interrupted() -> Iterator[Callable[[], bool]]:
    """Gives a question: has ^C or SIGTERM come since? A second ^C ends the process at once, as without this."""
    came = threading.Event()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        came.set()
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _condition(name: str, table: Table, y_convention: str) -> str:
    """What was scored, in one line above its table."""
    count = sum(row.model == table.rows[0].model for row in table.rows)
    small = "made small by MATLAB's bicubic" if table.made_small else f"small ones from LRx{table.scale}"
    truth = "" if table.truth_niqe is None else f", NIQE of the true pictures {table.truth_niqe:.2f}"
    return f"{name}: {count} pictures, x{table.scale}, {small}, Y {y_convention}{truth}"


def _finite(value: Any) -> Any:
    """The same with None for every number that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
