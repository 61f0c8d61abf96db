"""Watching a job: `Prefer: wait` and server-sent events, both by looking at SQL.

SQL and not Redis: a stream then shows exactly what a poll would show, and works while Redis does not. Each look is one
SELECT of a few columns; the whole job is read only when they have changed.

A watcher holds one of the process's threads all the while: take one of the context's seats first.
"""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flask import Response, request

from api.context import Context
from shared import queries
from shared.errors import DatabaseUnavailable, NotFound, TooManyStreams
from shared.queries import Pulse
from shared.views import job_view

# What a browser waits before it opens a broken stream again.
RECONNECT_MILLISECONDS = 2000


def wait(
    context: Context,
    job_id: str,
    owner_key_id: str,
    *,
    seconds: float,
    until: Callable[[Pulse], bool],
    client_left: Callable[[], bool],
) -> None:
    """Returns once `until` holds, the time is over or the client has gone. Raises NotFound where the job goes."""
    ends_at = time.monotonic() + seconds
    while True:
        with context.database.reading() as session:
            if until(queries.pulse(session, job_id, owner_key_id)):
                return
        left_seconds = ends_at - time.monotonic()
        if left_seconds <= 0 or client_left():
            return
        time.sleep(min(context.settings.event_poll_seconds, left_seconds))


def answer(context: Context, said: Callable[[Callable[[], bool]], Iterator[str]], *, refusal: str) -> Response:
    """The request's answer as server-sent events, its head alone to HEAD. `said` makes them, and is given what tells
    whether the client has left. Holds a seat until the answer is closed; raises TooManyStreams, `refusal`, where there
    is none."""
    response = Response(mimetype="text/event-stream")
    # Proxies must pass each event on as it comes.
    response.headers["X-Accel-Buffering"] = "no"
    if request.method == "HEAD":
        return response
    give_back = context.seats.take()
    if give_back is None:
        raise TooManyStreams(refusal, retry_after_seconds=5)
    response.call_on_close(give_back)
    response.response = said(left_by(request.environ))
    return response


def stream(
    context: Context, job_id: str, owner_key_id: str, *, last_event_id: int | None, client_left: Callable[[], bool]
) -> Iterator[str]:
    """The events of a job from now to its end: `status` where it begins and where its status changes, `progress` in
    between, `done` last. The data of each is the job's view, its id the job's version.

    With `last_event_id` nothing is said again but `done`: whoever asks again after it may have missed it.
    A database that goes away ends the stream; the client comes back by itself and resumes.
    """
    settings = context.settings
    seen: Pulse | None = None
    # Sent at once, so that a proxy passes the head of the answer on.
    yield f"retry: {RECONNECT_MILLISECONDS}\n\n"
    spoke_at = time.monotonic()
    try:
        while True:
            with context.database.reading() as session:
                pulse = queries.pulse(session, job_id, owner_key_id)
                known = seen is None and last_event_id is not None and pulse.version <= last_event_id
                changed = pulse != seen and not known
                kinds = ["status" if seen is None or _status(pulse) != _status(seen) else "progress"] if changed else []
                kinds += ["done"] if pulse.is_finished else []
                said = ""
                if kinds:
                    job = queries.owned_job(session, job_id, owner_key_id)
                    waits_for = context.waits_for(session, job)
                    view = job_view(job, queue_position=pulse.queue_position, waits_for=waits_for)
                    said = "".join(_event(kind, pulse.version, view) for kind in kinds)
            if said:
                yield said
                spoke_at = time.monotonic()
            if pulse.is_finished:
                return
            seen = pulse
            if time.monotonic() - spoke_at >= settings.event_ping_seconds:
                yield ": ping\n\n"
                spoke_at = time.monotonic()
            if client_left():
                return
            time.sleep(settings.event_poll_seconds)
    except (DatabaseUnavailable, NotFound):
        return


def left_by(environ: Mapping[str, Any]) -> Callable[[], bool]:
    """Whether the client of this request has closed its connection: found out now, not at the next failing write.

    Asks the socket that gunicorn puts beside the request. Without one, or under TLS, nobody is ever thought gone and
    the next write tells.
    """
    connection = environ.get("gunicorn.socket")
    if not isinstance(connection, socket.socket) or isinstance(connection, ssl.SSLSocket):
        return lambda: False

    def left() -> bool:
        try:
            return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    return left


def _status(pulse: Pulse) -> tuple[str, bool]:
    return str(pulse.state), pulse.is_canceling


def _event(kind: str, version: int, view: Mapping[str, Any]) -> str:
    return f"id: {version}\nevent: {kind}\ndata: {json.dumps(view, separators=(',', ':'))}\n\n"
