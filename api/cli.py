"""The `enlarger` command. What speaks HTTP to a service is here; what runs on this machine is plugged in by name.

Commands of the other rooms (`up`, `upscale`, `demo`, ...) come through the entry points `enlarger.commands`, so that
this module knows the wire contract alone, and an installation without the worker's packages has all commands but its
own.
Exit status: 0 done, 1 the job or check failed, 2 wrong use. With --json, one JSON document on standard output and
nothing else there; progress and complaints go to standard error.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import click

from shared.errors import EnlargerError, InvalidRequest

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from api.client import Client, Job, JobOptions

COMMANDS_GROUP = "enlarger.commands"
# Pictures sent at once, and pictures followed at once: each holds a connection to the service.
SENDERS, FOLLOWERS = 4, 8
# A queue that is full empties at the pace of the workers: submitting many pictures waits for it.
SUBMIT_PATIENCE_SECONDS = 3600.0
# Bars of finished pictures make room for others where there are more than this.
BARS_KEPT = 12

P = ParamSpec("P")
T = TypeVar("T")


class Commands(click.Group):
    """Our own commands and those that entry points name; turns what they raise into sentences and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(entry.name for entry in entry_points(group=COMMANDS_GROUP))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        for entry in entry_points(group=COMMANDS_GROUP, name=cmd_name):
            return cast(click.Command, entry.load())
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            from difflib import get_close_matches

            near = get_close_matches(args[0], self.list_commands(ctx), n=1)
            ctx.fail(f"There is no command {args[0]!r}." + (f" Did you mean {near[0]!r}?" if near else ""))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InvalidRequest as error:
            raise click.UsageError(error.detail) from error
        except EnlargerError as error:
            raise click.ClickException(f"{error.detail}{_code_of(error)}") from error
        except ModuleNotFoundError as error:
            from shared.doctor import EXTRAS

            package = (error.name or "").partition(".")[0]
            extra = next((name for name, packages in EXTRAS.items() if package in packages), None)
            if extra is None:
                raise
            raise click.ClickException(
                f"This command needs {package}, which is not installed here: pip install 'enlarger[{extra}]'"
            ) from error


def _code_of(error: EnlargerError) -> str:
    """After the sentence, the stable code of a problem the service answered with: what to search the documents for."""
    code = getattr(error, "problem_code", "")
    return f" [{code}]" if code else ""


def _error_view(error: EnlargerError) -> dict[str, Any]:
    return {"code": getattr(error, "problem_code", "") or error.code, "detail": error.detail}


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="enlarger", message="%(prog)s %(version)s")
def main() -> None:
    """Enlarge pictures by super-resolution: run the service, use it from a terminal, or work without it.

    Commands that speak to a service find it through ENLARGER_URL and ENLARGER_API_KEY, else through what `enlarger up`
    left in ENLARGER_DATA_DIR (.enlarger).
    """


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")


def options_of_a_job(command: Callable[P, T]) -> Callable[P, T]:
    """How a picture is to be enlarged; names and choices are the contract's."""
    chosen = click.Choice
    options = (
        click.option("--model", help="A name of `enlarger models`, or auto.  [default: srgan]"),
        click.option("--scale", type=click.IntRange(1, 16), help="Enlargement of each side.  [default: the model's]"),
        click.option("--classify", is_flag=True, default=None, help="Also say what the picture shows."),
        click.option("--format", type=chosen(["auto", "png", "jpeg", "webp", "tiff", "avif"]), help="Of the result."),
        click.option("--quality", type=click.IntRange(1, 100), help="Of lossy formats.  [default: 95]"),
        click.option("--lossless", is_flag=True, default=None, help="WebP and AVIF without loss."),
        click.option("--metadata", type=chosen(["safe", "keep", "strip"]), help="What to keep of EXIF, XMP, IPTC."),
        click.option("--alpha", type=chosen(["model", "lanczos", "flatten"]), help="How transparency is enlarged."),
        click.option("--background", help="Colour under --alpha flatten, as #rrggbb."),
        click.option("--device", type=chosen(["auto", "gpu", "cpu"]), help="Where it is to run."),
        click.option("--priority", type=chosen(["interactive", "bulk"]), help="bulk runs when nothing else waits."),
        click.option("--deadline-seconds", type=click.IntRange(1), help="Expire unless started by then."),
        click.option("--ttl-seconds", type=click.IntRange(1), help="Keep the pictures this long after the end."),
        click.option("--external-id", help="Your own name for the job."),
        click.option("--webhook-url", help="Address that is told of the job's events."),
        click.option("--webhook-events", multiple=True, default=None, help="Which events; can be given repeatedly."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.argument("pictures", metavar="PICTURE...", nargs=-1, required=True)
@click.option("--wait", is_flag=True, help="Wait until the pictures have been enlarged.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Save the result here: a file for one picture, a folder for more. Waits as --wait does.",
)
@options_of_a_job
@as_json
def submit(pictures: tuple[str, ...], wait: bool, output: Path | None, as_json: bool, **options: Any) -> None:
    """Hand in pictures, files or http(s) addresses, and print their job ids.

    With --wait or -o, follows them to the end; exits with 1 where one of them failed.
    """
    sources = [_source(picture) for picture in pictures]
    asked = cast("JobOptions", {name: value for name, value in options.items() if value is not None})
    targets = None if output is None else _Targets(output, many=len(pictures) > 1)
    with _client(patience_seconds=SUBMIT_PATIENCE_SECONDS if len(pictures) > 1 else 60.0) as client, _bars() as bars:
        errand = _Errand(client, asked, bars)
        runs = errand.run(sources, wait=wait or targets is not None, targets=targets)
    if as_json:
        views = [run.view() for run in runs]
        _print_json(views if len(views) > 1 else views[0])
    else:
        for run in runs:
            click.echo(run.line(), err=run.failed)
    sys.exit(1 if any(run.failed for run in runs) else 0)


@main.command()
@click.argument("job_id")
@as_json
def status(job_id: str, as_json: bool) -> None:
    """Show a job."""
    with _client() as client:
        job = client.job(job_id)
    if as_json:
        _print_json(job.view)
    else:
        for name, value in _facts(job):
            click.echo(f"{name:<10} {value}")


@main.command()
@click.argument("job_id")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="File, or folder, to save it in.")
@click.option("--input", "of_input", is_flag=True, help="Fetch the picture that was handed in, not the result.")
@click.option("--wait", is_flag=True, help="Wait for the job to finish first.")
@as_json
def fetch(job_id: str, output: Path, of_input: bool, wait: bool, as_json: bool) -> None:
    """Save the result of a job."""
    with _client() as client, _bars() as bars:
        task = bars.add_task(job_id, total=None, note="")
        job = client.wait(job_id, on_progress=partial(_show, bars, task)) if wait else client.job(job_id)
        facts = job.view["input"] if of_input else job.result
        name = Path(str(job.view["input"].get("name") or job_id))
        into_folder = output.is_dir() or not output.suffix
        target = _name_in(output, name, job, str((facts or {}).get("format", ""))) if into_folder else output
        target.parent.mkdir(parents=True, exist_ok=True)
        client.fetch(
            job_id,
            target,
            what="input" if of_input else "result",
            on_bytes=lambda done, total: bars.update(task, completed=done, total=total, note="fetching"),
        )
    if as_json:
        _print_json({"job_id": job_id, "path": str(target), "bytes": target.stat().st_size})
    else:
        click.echo(str(target))


@main.command()
@click.argument("picture")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Save the sheet here.  [default: beside PICTURE]")
@click.option("--models", help="Names with commas between.  [default: all of `enlarger models`]")
@click.option("--crop", help="x,y,width,height in px, 256 a side at most.  [default: the middle]")
@click.option("--scale", type=click.IntRange(1, 8), help="Enlargement of each side.  [default: 4]")
@click.option("--device", type=click.Choice(["auto", "gpu", "cpu"]), help="Where it is to run.")
@as_json
def preview(
    picture: str, output: Path | None, models: str | None, crop: str | None, as_json: bool, **options: Any
) -> None:
    """See one crop of PICTURE through every model, side by side in one PNG: choose by looking, then submit."""
    source = _source(picture)
    asked: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if models:
        asked["models"] = models.split(",")
    if crop:
        try:
            asked["crop"] = [int(part) for part in crop.split(",")]
        except ValueError as error:
            raise click.BadParameter("four whole numbers with commas between", param_hint="--crop") from error
    target = output or Path(f"{source.name.stem}-preview.png")
    if target.is_dir():
        target = target / f"{source.name.stem}-preview.png"
    with _client() as client, _bars() as bars:
        task = bars.add_task(source.name.name, total=None, note="sending")
        job = (
            client.preview(image_url=source.word, **asked)
            if source.path is None
            else client.preview(source.path, **asked)
        )
        job = client.wait(job.id, on_progress=partial(_show, bars, task))
        if job.succeeded:
            target.parent.mkdir(parents=True, exist_ok=True)
            client.fetch(job.id, target)
    if as_json:
        _print_json({"job": job.view, "path": str(target) if job.succeeded else None})
    elif job.error is not None:
        click.echo(f"{picture}: {job.id} {job.status}: {job.error['detail']}", err=True)
    else:
        for cell in job.view["preview"]["cells"]:
            click.echo(f"{cell['model']:<20} {cell['error'] or format(cell['seconds'], '.1f') + ' s'}")
        click.echo(str(target))
    sys.exit(0 if job.succeeded else 1)


@main.command()
@click.argument("job_id")
@as_json
def report(job_id: str, as_json: bool) -> None:
    """Say how true the result of a job is to its input."""
    with _client() as client:
        found = client.report(job_id)
    if as_json:
        _print_json(found)
        return
    for name, value in found.items():
        click.echo(f"{name.replace('_', ' '):<20} {'-' if value is None else value}")


@main.command()
@click.argument("job_ids", metavar="JOB_ID...", nargs=-1, required=True)
@as_json
def cancel(job_ids: tuple[str, ...], as_json: bool) -> None:
    """Cancel jobs: queued ones at once, running ones at their next band."""
    _act(job_ids, lambda client, job_id: client.cancel(job_id).view, "asked to cancel", as_json)


@main.command()
@click.argument("job_ids", metavar="JOB_ID...", nargs=-1, required=True)
@as_json
def retry(job_ids: tuple[str, ...], as_json: bool) -> None:
    """Queue failed, canceled or expired jobs again."""
    _act(job_ids, lambda client, job_id: client.retry(job_id).view, "queued again", as_json)


@main.command()
@click.argument("job_ids", metavar="JOB_ID...", nargs=-1, required=True)
@as_json
def delete(job_ids: tuple[str, ...], as_json: bool) -> None:
    """Delete jobs with all their pictures."""

    def carry_out(client: Client, job_id: str) -> Mapping[str, Any]:
        client.delete(job_id)
        return {"id": job_id, "deleted": True}

    _act(job_ids, carry_out, "deleted", as_json)


@main.command()
@click.option("--status", help="Only those queued, running, succeeded, failed, canceled or expired.")
@click.option("--model", help="Only those of this model.")
@click.option("--external-id", help="Only those of this name of yours.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="At most so many.")
@as_json
def jobs(status: str | None, model: str | None, external_id: str | None, limit: int, as_json: bool) -> None:
    """List your jobs, newest first."""
    from itertools import islice

    with _client() as client:
        found = list(islice(client.jobs(status=status, model=model, external_id=external_id), limit))
    if as_json:
        _print_json([job.view for job in found])
        return
    _print_table(
        ("id", "status", "done", "model", "input", "result", "made", "name"),
        (
            (
                job.id,
                job.status,
                f"{job.fraction:.0%}",
                f"{job.view['model']} x{job.view['scale']}",
                _size(job.view["input"]),
                _size(job.result),
                str(job.view["created_at"])[:19].replace("T", " "),
                str(job.view.get("external_id") or job.view["input"].get("name") or ""),
            )
            for job in found
        ),
    )


@main.command()
@as_json
def models(as_json: bool) -> None:
    """List the models the service offers."""
    with _client() as client:
        found = client.models()
    if as_json:
        _print_json(found)
        return
    _print_table(
        ("name", "scale", "licence", "loaded on", "what it is"),
        (
            (m["name"], _scales(m), m["licence"], ", ".join(m.get("loaded_on") or ()) or "-", m["summary"])
            for m in found
        ),
    )


def _scales(model: Mapping[str, Any]) -> str:
    """`x4`; `x2 x3 x4`; `x1 to x16` where there is a network, or none is needed, for each."""
    scales = model.get("scales") or [model["scale"]]
    return f"x{scales[0]} to x{scales[-1]}" if len(scales) > 4 else " ".join(f"x{scale}" for scale in scales)


# --- handing in pictures --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A picture to hand in: a file or an address."""

    word: str
    path: Path | None

    @property
    def name(self) -> Path:
        return self.path or Path(self.word.partition("?")[0].rstrip("/").rpartition("/")[2] or "picture")


def _source(word: str) -> _Source:
    if word.startswith(("http://", "https://")):
        return _Source(word, None)
    path = Path(word)
    if not path.is_file():
        raise click.BadParameter(f"there is no file {word}", param_hint="PICTURE")
    return _Source(word, path)


@dataclass
class _Run:
    """What became of one picture handed in."""

    source: _Source
    job: Job | None = None
    path: Path | None = None
    error: EnlargerError | None = None

    @property
    def failed(self) -> bool:
        return self.error is not None or (self.job is not None and self.job.is_finished and not self.job.succeeded)

    def view(self) -> dict[str, Any]:
        error = None if self.error is None else _error_view(self.error)
        return {
            "picture": self.source.word,
            "job": None if self.job is None else self.job.view,
            "path": None if self.path is None else str(self.path),
            "error": error,
        }

    def line(self) -> str:
        if self.error is not None:
            return f"{self.source.word}: {self.error.detail}{_code_of(self.error)}"
        assert self.job is not None
        if not self.job.is_finished:
            return self.job.id
        if self.job.error is not None:
            return f"{self.source.word}: {self.job.id} {self.job.status}: {self.job.error['detail']}"
        words = [f"{self.source.word}: {self.job.id} {self.job.status}"]
        if self.job.result is not None:
            words.append(f"{_size(self.job.view['input'])} -> {_size(self.job.result)}")
        if self.path is not None:
            words.append(str(self.path))
        labels = self.job.view.get("labels") or []
        words += [f"{label['label']} {label['probability']:.0%}" for label in labels[:2]]
        return ", ".join(words)


class _Targets:
    """Where results are saved. Names are given out once, so that two pictures of one name do not overwrite another."""

    def __init__(self, output: Path, *, many: bool) -> None:
        self._is_folder = many or output.is_dir() or not output.suffix
        if many and output.is_file():
            raise click.BadParameter(f"{output} is a file; name a folder for many pictures", param_hint="-o")
        self._output = output
        self._taken: set[Path] = set()
        self._lock = threading.Lock()

    def path(self, source: _Source, job: Job) -> Path:
        if not self._is_folder:
            self._output.parent.mkdir(parents=True, exist_ok=True)
            return self._output
        self._output.mkdir(parents=True, exist_ok=True)
        first = _name_in(self._output, source.name, job, str((job.result or {})["format"]))
        with self._lock:
            path, number = first, 1
            while path in self._taken:
                number += 1
                path = first.with_stem(f"{first.stem}-{number}")
            self._taken.add(path)
            return path


def _name_in(folder: Path, name: Path, job: Job, format: str) -> Path:
    """A name that says what was done, so that a result saved beside its input never replaces it."""
    extension = {"jpeg": "jpg"}.get(format, format) or "bin"
    return folder / f"{name.stem}-{job.view['model']}-x{job.view['scale']}.{extension}"


class _Errand:
    """Hands in pictures side by side and follows them, a bar for each."""

    def __init__(self, client: Client, options: JobOptions, bars: Progress) -> None:
        self._client, self._options, self._bars = client, options, bars

    def run(self, sources: Sequence[_Source], *, wait: bool, targets: _Targets | None) -> list[_Run]:
        """What became of each, in the order given. One that fails leaves the others alone."""
        every = self._bars.add_task("all", total=len(sources), visible=len(sources) > 1, note="")
        tasks = [self._bars.add_task(source.name.name, total=None, start=False, note="waiting") for source in sources]
        runs = [_Run(source) for source in sources]

        def hand_in(run: _Run, task: TaskID) -> None:
            self._bars.start_task(task)
            try:
                run.job = self._submit(run.source, task)
            except EnlargerError as error:
                run.error = error
            if not wait or run.error is not None:
                self._end(run, task, every, many=len(runs) > BARS_KEPT)

        def follow(run: _Run, task: TaskID) -> None:
            if run.job is None:
                return
            try:
                run.job = self._client.wait(run.job.id, on_progress=partial(_show, self._bars, task))
                if targets is not None and run.job.succeeded:
                    path = targets.path(run.source, run.job)
                    run.path = self._client.fetch(run.job.id, path)
            except EnlargerError as error:
                run.error = error
            self._end(run, task, every, many=len(runs) > BARS_KEPT)

        with ThreadPoolExecutor(SENDERS) as senders:
            list(senders.map(hand_in, runs, tasks))
        if wait:
            with ThreadPoolExecutor(FOLLOWERS) as followers:
                list(followers.map(follow, runs, tasks))
        return runs

    def _submit(self, source: _Source, task: TaskID) -> Job:
        if source.path is None:
            return self._client.submit(image_url=source.word, **self._options)
        return self._client.submit(
            source.path,
            on_sent=lambda done, total: self._bars.update(task, completed=done, total=total, note="sending"),
            **self._options,
        )

    def _end(self, run: _Run, task: TaskID, every: TaskID, *, many: bool) -> None:
        note = "failed" if run.failed else run.job.status if run.job is not None else ""
        # A bar without a total would go on pretending to work.
        self._bars.update(task, total=1, completed=0 if run.failed else 1, note=note, visible=not many)
        self._bars.stop_task(task)
        self._bars.advance(every)


def _show(bars: Progress, task: TaskID, job: Job) -> None:
    progress = job.view["progress"]
    note = str(progress["phase"]) if job.status == "running" else job.status
    if job.status == "queued" and job.view.get("queue_position"):
        note = f"queued, {job.view['queue_position']} in line"
    elif progress.get("eta_seconds"):
        note += f", {progress['eta_seconds']:.0f} s left"
    bars.update(task, completed=job.fraction, total=1.0, note=note)


# --- what all commands share ----------------------------------------------------------------------------------------


def _client(*, patience_seconds: float = 60.0) -> Client:
    from api.client import Client

    return Client.from_environment(patience_seconds=patience_seconds)


def _bars() -> Progress:
    from shared.terminal import bars

    return bars()


def _act(
    job_ids: Iterable[str], carry_out: Callable[[Client, str], Mapping[str, Any]], done: str, as_json: bool
) -> None:
    """Does something to each job; one that is refused leaves the others alone, and makes the exit status 1."""
    answers: list[Mapping[str, Any]] = []
    refused = False
    with _client() as client:
        for job_id in job_ids:
            try:
                answers.append(carry_out(client, job_id))
            except EnlargerError as error:
                refused = True
                answers.append({"id": job_id, "error": _error_view(error)})
                click.echo(f"{job_id}: {error.detail}{_code_of(error)}", err=True)
                continue
            if not as_json:
                click.echo(f"{job_id} {done}")
    if as_json:
        _print_json(answers if len(answers) > 1 else answers[0])
    sys.exit(1 if refused else 0)


def _facts(job: Job) -> list[tuple[str, str]]:
    """A job in words, one fact a line."""
    view, progress = job.view, job.view["progress"]
    facts = [
        ("id", job.id),
        ("status", job.status),
        ("model", f"{view['model']} x{view['scale']} on {view['device']}, attempt {view['attempt']}"),
        ("chosen", str((view.get("routing") or {}).get("reason", ""))),
        (
            "progress",
            f"{job.fraction:.0%}, {progress['phase']}, {progress['bands_done']}/{progress['bands_total']} bands",
        ),
        ("input", f"{_size(view['input'])} {view['input']['format']}, {view['input']['bytes']:,} bytes"),
    ]
    if view.get("queue_position"):
        facts.append(("in line", str(view["queue_position"])))
    if view.get("waits_for"):
        facts.append(("waits for", str(view["waits_for"])))
    if job.result is not None:
        facts.append(("result", f"{_size(job.result)} {job.result['format']}, {job.result['bytes']:,} bytes"))
    facts += [("shows", f"{label['label']} {label['probability']:.1%}") for label in view.get("labels") or ()]
    facts += [("warning", str(warning)) for warning in view.get("warnings") or ()]
    seconds = {k.removesuffix("_seconds"): v for k, v in (view.get("timings") or {}).items() if k.endswith("_seconds")}
    if seconds:
        facts.append(("seconds", ", ".join(f"{phase} {value:.2f}" for phase, value in seconds.items())))
    if job.error is not None:
        facts.append(("error", f"{job.error['detail']} [{job.error['code']}]"))
    return facts


def _size(picture: Mapping[str, Any] | None) -> str:
    return "-" if picture is None else f"{picture['width']} x {picture['height']}"


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from shared.terminal import print_table

    print_table(header, rows)
