"""Commands of `enlarger` that run the service or look after it: up, serve, alive, migrate, keys, sign-in, doctor.

Loaded by name, through the entry points `enlarger.commands`, and cheap to import: what a command needs it imports when
it runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from types import FrameType

    from sqlalchemy.orm import Session

    from shared.models import ApiKey
    from shared.settings import Settings
    from shared.stack import Stack

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the service.  [default: 8000, or any free one]")
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of everything it keeps.  [default: ENLARGER_DATA_DIR, or .enlarger]",
)
@click.option("--workers", type=click.IntRange(1), help="Pictures enlarged at once.  [default: 1]")
def up(port: int | None, data_dir: Path | None, workers: int | None) -> None:
    """Run the whole service on this machine until ^C.

    Starts Redis, S3 storage, the API, an image worker, a chores worker and the relay, with SQLite; prints the address,
    an API key and a sign-in link. Redis, storage or SQL that the environment names (ENLARGER_REDIS_URL,
    ENLARGER_STORAGE_ENDPOINT_URL, ENLARGER_DATABASE_URL) are used instead of its own. Jobs and pictures are there
    again the next time.
    """
    from shared.stack import Stack

    stack = Stack(_settings(data_dir=data_dir, worker_concurrency=workers), port=port, tell=click.echo)
    click.echo(f"Starting; data and logs are in {stack.settings.data_dir.absolute()}")
    with stopped_by_signals(stack):
        stack.start()
        click.echo(
            f"\n    Enlarger runs at   {stack.url}\n"
            f"    Sign in            {stack.sign_in_url}\n"
            f"    API key            {stack.api_key}\n\n"
            "Stop it with ^C. From another terminal: enlarger submit PICTURE --wait -o LARGER\n"
        )
        stack.wait()


@contextlib.contextmanager
def stopped_by_signals(stack: Stack) -> Iterator[None]:
    """Runs the block until it ends or ^C, SIGTERM or SIGHUP comes, and stops the stack. A second signal kills it."""
    told = False

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal told
        if told:
            stack.kill()
        else:
            told = True
            raise KeyboardInterrupt

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
        if told:
            click.echo("Stopping; what is being enlarged goes on the next time.")
    finally:
        # A signal from here on is the second one.
        told = True
        stack.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


@click.command()
@click.argument("process", type=click.Choice(["api", "images", "chores", "relay", "migrate"]))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address the API listens on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535), help="Port of the API.")
@click.option(
    "--processes", default=2, show_default=True, type=click.IntRange(1), help="Processes of the API on this host."
)
def serve(process: str, host: str, port: int, processes: int) -> None:
    """Become one process of the service: for containers and service managers.

    Settings come from the environment. `migrate` brings SQL to the newest schema, makes the bucket and the bootstrap
    key, and ends.
    """
    from shared import stack

    settings = _settings()
    if process == "migrate":
        stack.prepare(settings)
    else:
        stack.serve(process, settings, host=host, port=port, processes=processes)


@click.command()
@click.option(
    "--within", "seconds", default=60.0, show_default=True, help="How long ago the last beat may be, in seconds."
)
def alive(seconds: float) -> None:
    """Say whether the worker, chores and relay processes of this host live: for health checks of containers.

    Each leaves a beat on this host's disk as long as it does not hang in its work; no server is asked. Exits with 1
    where one is silent for too long, or none has begun.
    """
    from shared import workers

    silent = workers.silent_for_seconds()
    hanging = {pid: since for pid, since in silent.items() if since > seconds}
    for pid, since in sorted(hanging.items()):
        click.echo(f"Process {pid} has been silent for {since:.0f} s.", err=True)
    if not silent:
        click.echo("No worker, chores or relay process has begun on this host.", err=True)
    sys.exit(1 if hanging or not silent else 0)


@click.command()
def migrate() -> None:
    """Bring the database to the newest schema.

    Also makes the storage bucket, where storage is configured, and the key of ENLARGER_BOOTSTRAP_ADMIN_KEY.
    """
    from shared import stack

    settings = _settings()
    if "storage_endpoint_url" in settings.model_fields_set:
        stack.prepare(settings)
    else:
        stack.prepare_sql(settings)
    click.echo(f"{_shown_url(settings)} has the newest schema.")


@click.group()
def keys() -> None:
    """Create, list, rotate and revoke API keys."""


@keys.command("create")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["jobs", "viewer", "operator", "admin"]),
    help="What it may do; can be given again. viewer and operator are for the pages under /admin.  [default: jobs]",
)
@click.option("--days", type=click.IntRange(1), help="How long it is good for.  [default: for ever]")
@as_json
def create_key(name: str, scopes: tuple[str, ...], days: int | None, as_json: bool) -> None:
    """Make a key called NAME and print it. It cannot be shown again."""
    from datetime import timedelta

    from shared import keys

    with _transaction() as (session, now):
        expires_at = None if days is None else now + timedelta(days=days)
        key, secret = keys.create(session, name=name, scopes=scopes or ("jobs",), now=now, expires_at=expires_at)
        _audit(session, "key.create", f"{key.id} ({name})", now, {"scopes": list(key.scopes)})
        view = {**_key_view(key), "api_key": secret}
    if as_json:
        click.echo(json.dumps(view, indent=2))
    else:
        click.echo(f"{secret}\n\n{key.id} ({name}; {', '.join(key.scopes)}). Keep it: it cannot be shown again.")


@keys.command("list")
@as_json
def list_keys(as_json: bool) -> None:
    """List the keys there are."""
    from shared import keys

    with _transaction() as (session, now):
        found = [_key_view(key) for key in keys.every(session)]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from shared.terminal import print_table

    def state(view: dict[str, Any]) -> str:
        expired = view["expires_at"] is not None and view["expires_at"] <= now.isoformat()
        return "revoked" if view["revoked_at"] else "expired" if expired else "good"

    print_table(
        ("id", "name", "scopes", "made", "state"),
        ((v["id"], v["name"], ", ".join(v["scopes"]), v["created_at"][:10], state(v)) for v in found),
    )


@keys.command("rotate")
@click.argument("key_id")
@click.option(
    "--hours",
    type=click.FloatRange(0),
    default=24.0,
    show_default=True,
    help="How long the old secret works on; 0 ends it, and the key's sessions, at once.",
)
@as_json
def rotate_key(key_id: str, hours: float, as_json: bool) -> None:
    """Give the key KEY_ID another secret and print it. It cannot be shown again.

    The key stays what it was: its jobs, webhooks and scopes are those of the new secret too.
    """
    from shared import keys

    with _transaction() as (session, now):
        key, secret = keys.rotate(session, key_id, overlap_seconds=hours * 3600, now=now)
        view = {**_key_view(key), "api_key": secret}
    if as_json:
        click.echo(json.dumps(view, indent=2))
    else:
        old = f"The old one works until {key.previous_ends_at:%Y-%m-%d %H:%M} UTC." if hours else "The old one is dead."
        click.echo(f"{secret}\n\n{key.id} ({key.name}) has this secret now. Keep it: it cannot be shown again. {old}")


@keys.command("revoke")
@click.argument("key_id")
def revoke_key(key_id: str) -> None:
    """End a key and its sessions at once. Its jobs go on; nobody can ask for them any more."""
    from shared import keys

    with _transaction() as (session, now):
        keys.revoke(session, key_id, now=now)
        _audit(session, "key.revoke", key_id, now, {})
    click.echo(f"{key_id} is revoked.")


@click.command("sign-in")
@click.option("--key", "key_id", help="Id of the key to sign in as.  [default: this machine's own administrator]")
@as_json
def sign_in(key_id: str | None, as_json: bool) -> None:
    """Print a fresh sign-in link for the pages, good for a day."""
    from shared import keys
    from shared.errors import StartFailed, Unauthorized

    settings = _settings()
    secret_key = settings.secret_key or _file_in(settings, "secret_key")
    if not secret_key:
        raise StartFailed("No secret key is known here: set ENLARGER_SECRET_KEY to the service's own.")
    with _transaction() as (session, now):
        if key_id is None:
            own_key = settings.bootstrap_admin_key or _file_in(settings, "admin_key")
            if not own_key:
                raise click.UsageError("This machine has no administrator key of its own: name one with --key.")
            key = keys.authenticate(session, own_key, now=now)
        else:
            with contextlib.suppress(Unauthorized):
                key = keys.by_id(session, key_id, now=now)
                key_id = None
            if key_id is not None:
                raise click.UsageError(f"There is no good key {key_id}; `enlarger keys list` shows those there are.")
        token = keys.sign_in_token(secret_key, key.id)
    url = f"{_service_url(settings)}/sign-in?token={token}"
    click.echo(json.dumps({"sign_in_url": url}) if as_json else url)


@click.command()
@as_json
def doctor(as_json: bool) -> None:
    """Say what is missing on this machine, and how to get it.

    Exits with 1 where something that Enlarger needs is missing or does not answer.
    """
    from shared import doctor

    settings = _settings()
    findings = []
    for finding in doctor.examine(settings):
        findings.append(finding)
        if not as_json:
            _print_finding(finding)
    well = not any(finding.is_fault for finding in findings)
    if as_json:
        click.echo(json.dumps({"ok": well, "findings": [finding.view() for finding in findings]}, indent=2))
    else:
        click.echo("\nAll that is needed is here." if well else "\nSomething that is needed is missing.")
    sys.exit(0 if well else 1)


_MARKS = {"ok": ("ok", "green"), "missing": ("MISSING", "red"), "optional": ("-", "yellow")}


def _print_finding(finding: Any) -> None:
    mark, color = _MARKS[finding.state]
    click.echo(f"{click.style(f'{mark:>7}', fg=color)}  {finding.name:<22} {finding.detail}")
    if finding.remedy:
        click.echo(f"{'':9}{'':<22} -> {finding.remedy}")


def _settings(**given: Any) -> Settings:
    """Settings from the environment, with what an option gives in place of them. Raises click.UsageError."""
    from pydantic import ValidationError

    from shared.settings import load

    try:
        settings = load()
    except ValidationError as error:
        wrong = "\n".join(f"  ENLARGER_{str(e['loc'][0]).upper()}: {e['msg']}" for e in error.errors())
        raise click.UsageError(f"These settings of the environment are wrong:\n{wrong}") from error
    except OSError as error:
        raise click.UsageError(f"A setting names a file that cannot be read: {error}") from error
    return settings.model_copy(update={name: value for name, value in given.items() if value is not None})


@contextlib.contextmanager
def _transaction() -> Iterator[tuple[Session, datetime]]:
    """A transaction on the database of the settings, and its present moment. Raises StartFailed where there is none."""
    from shared.db import Database, clock
    from shared.errors import StartFailed

    settings = _settings()
    if not settings.database_url and not (settings.data_dir / "enlarger.db").exists():
        raise StartFailed(
            f"There is no database in {settings.data_dir.absolute()}. `enlarger up` makes one; or name the service's "
            "own with ENLARGER_DATA_DIR or ENLARGER_DATABASE_URL."
        )
    database = Database(settings.sqlalchemy_url)
    try:
        with database.transaction() as session:
            yield session, clock(session)
    finally:
        database.close()


def _key_view(key: ApiKey) -> dict[str, Any]:
    moments = {name: getattr(key, name) for name in ("created_at", "expires_at", "revoked_at", "previous_ends_at")}
    return {
        "id": key.id,
        "name": key.name,
        "scopes": list(key.scopes),
        **{name: None if moment is None else moment.isoformat() for name, moment in moments.items()},
    }


def _audit(session: Session, action: str, subject: str, now: datetime, detail: dict[str, Any]) -> None:
    """In the log of what operators did, beside what they do on the pages."""
    from shared import audit

    audit.record(
        session, key_id=None, key_name=audit.COMMAND_LINE, action=action, subject=subject, now=now, detail=detail
    )


def _file_in(settings: Settings, name: str) -> str:
    path = settings.data_dir / name
    return path.read_text().strip() if path.exists() else ""


def _shown_url(settings: Settings) -> str:
    from sqlalchemy.engine import make_url

    return make_url(settings.sqlalchemy_url).render_as_string(hide_password=True)


def _service_url(settings: Settings) -> str:
    """Where the pages are: as the environment says, else what runs on this folder, else the usual address."""
    from shared.stack import USUAL_PORT, running_service

    service = running_service(settings.data_dir) or {}
    return os.environ.get("ENLARGER_URL") or service.get("url") or f"http://127.0.0.1:{USUAL_PORT}"
