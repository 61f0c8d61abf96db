"""`enlarger demo`: the main job on a real photograph, from submit to verified webhook, through the public HTTP API.

Everything is real: the service is started as `enlarger up` starts it, the client is anybody's, and the webhook arrives
over a socket and is checked with the public library.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from api.client import Client, Job

PHOTO = Path(__file__).parent / "demo_photo" / "cat.png"
# The relay looks each second, and a receiver that stumbles is tried again after 5 s.
WEBHOOK_TIMEOUT_SECONDS = 30.0
LONGEST_BODY_BYTES = 1_000_000


@click.command()
@click.option(
    "--output",
    default="demo-output",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the pictures it makes; the service keeps its data and logs in .stack below it.",
)
def demo(output: Path) -> None:
    """Enlarge a real photograph through the whole service, and stop everything again.

    Starts the service on free ports, submits the photograph with a webhook, follows it, verifies the webhook, and saves
    the photograph, the result and a bicubic enlargement to compare it with.
    """
    from api.client import Client
    from shared.commands import stopped_by_signals
    from shared.servers import free_port
    from shared.settings import Settings
    from shared.stack import Stack

    began = time.monotonic()
    finished = False
    output.mkdir(parents=True, exist_ok=True)
    # Webhooks to this machine are refused unless an operator allows them; here operator and receiver are one.
    settings = Settings(data_dir=output / ".stack", allow_private_addresses=("127.0.0.1/32",))
    stack = Stack(settings, port=free_port(), tell=click.echo)
    click.echo("Starting Enlarger: Redis, storage, SQL, API, image worker, chores worker, relay.")
    with stopped_by_signals(stack):
        stack.start()
        with Client(stack.url, stack.api_key) as client, _receiver(str(client.key()["webhook_secret"])) as receiver:
            click.echo(f"Submitting {PHOTO.name} to {stack.url}/v1/jobs")
            job = _enlarge(client, receiver.url)
            if not job.succeeded:
                raise click.ClickException(f"The job is {job.status}: {(job.error or {}).get('detail')}")
            result = client.fetch(job.id, output / f"result.{(job.result or {})['format']}")
            event = receiver.wait_for_event(job.id)
        pictures = [shutil.copyfile(PHOTO, output / "input.png"), result, *_to_compare(result, output)]
        finished = True
    if not finished:
        click.echo("Stopped before the end.", err=True)
        sys.exit(1)
    _print_report(job, event, pictures)
    click.echo(f"\nEverything is stopped again, after {time.monotonic() - began:.1f} s. `make up` keeps it running.")


def _enlarge(client: Client, webhook_url: str) -> Job:
    from shared.terminal import bars

    with bars() as shown:
        task = shown.add_task(PHOTO.name, total=1.0, note="sending")

        def follow(job: Job) -> None:
            shown.update(task, completed=job.fraction, note=str(job.view["progress"]["phase"]))

        job = client.submit(PHOTO, classify=True, external_id="demo", webhook_url=webhook_url)
        return client.wait(job.id, on_progress=follow)


def _to_compare(result: Path, output: Path) -> list[Path]:
    """The photograph enlarged by bicubic interpolation, and one picture of both: bicubic left, the result right."""
    from PIL import Image

    with Image.open(result) as enlarged, Image.open(PHOTO) as photo:
        plain = photo.convert("RGB").resize(enlarged.size, Image.Resampling.BICUBIC)
        both = enlarged.convert("RGB")
        half = both.width // 2
        both.paste(plain.crop((0, 0, half, both.height)), (0, 0))
        both.paste((255, 255, 255), (half - 1, 0, half + 1, both.height))
    paths = [output / "bicubic.png", output / "comparison.png"]
    for picture, path in zip((plain, both), paths, strict=True):
        picture.save(path)
    return paths


def _print_report(job: Job, event: str, pictures: list[Path]) -> None:
    from shared.terminal import print_table

    view = job.view
    seconds = {k.removesuffix("_seconds"): v for k, v in view["timings"].items() if k.endswith("_seconds")}
    size, larger = view["input"], view["result"]
    labels = [(f"{label['probability']:.0%}", label["label"]) for label in view["labels"][:3]]
    what = ("the photograph", f"{view['model']} x{view['scale']}", "bicubic, to compare", "left bicubic, right result")
    click.echo()
    print_table(
        ("", ""),
        [
            ("size", f"{size['width']} x {size['height']} -> {larger['width']} x {larger['height']} px"),
            ("seconds", ", ".join(f"{phase} {value:.2f}" for phase, value in seconds.items() if value >= 0.005)),
            ("shows", ", ".join(f"{name} {share}" for share, name in labels)),
            ("webhook", f"{event}, signature verified"),
            *((str(path), words) for path, words in zip(pictures, what, strict=True)),
        ],
    )


class _Receiver(ThreadingHTTPServer):
    """A webhook receiver as anybody would write one: verifies the signature, remembers the events."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, secret: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.secret = secret
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"
        self._events: list[dict[str, Any]] = []
        self._came = threading.Condition()

    def take(self, event: dict[str, Any]) -> None:
        with self._came:
            self._events.append(event)
            self._came.notify_all()

    def wait_for_event(self, job_id: str) -> str:
        """The type of the verified event about the job. Raises click.ClickException where none comes."""

        def found() -> str | None:
            return next((str(event["type"]) for event in self._events if event["data"]["id"] == job_id), None)

        with self._came:
            event = self._came.wait_for(found, WEBHOOK_TIMEOUT_SECONDS)
        if event is None:
            raise click.ClickException(f"No signed webhook came within {WEBHOOK_TIMEOUT_SECONDS:g} s.")
        return event


class _Handler(BaseHTTPRequestHandler):
    server: _Receiver

    def do_POST(self) -> None:
        from standardwebhooks import Webhook, WebhookVerificationError

        body = self.rfile.read(min(LONGEST_BODY_BYTES, int(self.headers.get("Content-Length", 0))))
        try:
            event = Webhook(self.server.secret).verify(body, {k.lower(): v for k, v in self.headers.items()})
        except WebhookVerificationError:
            self.send_response(401)
        else:
            self.server.take(event)
            self.send_response(204)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Requests are not worth a line each."""


@contextmanager
def _receiver(secret: str) -> Iterator[_Receiver]:
    with _Receiver(secret) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="webhook-receiver")
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
