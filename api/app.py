"""The API process: the one place where its parts are put together."""

from __future__ import annotations

import atexit
import re
import secrets
import threading
import time
from datetime import timedelta
from urllib.parse import urlsplit

from flask import Flask, Response, g, request
from werkzeug.middleware.proxy_fix import ProxyFix

from api import asked, compat, dashboard, health, openapi, operations, problems, uploads, v1, web
from api.context import Context, Seats
from api.limits import RateLimits
from api.zooms import Zooms
from shared import settings as settings_module
from shared import workers
from shared.db import Database
from shared.outbox import Broker, Hurrier
from shared.outgoing import GuardedClient
from shared.sandbox import Sandbox
from shared.settings import Settings
from shared.storage import Storage
from shared.telemetry import begin_lines, configure_logs, log, tallies
from shared.traces import Span, Traces
from shared.workers import Presence

# What a form has around its picture: part headers and the other fields.
FORM_OVERHEAD_BYTES = 1024 * 1024
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Asked every few seconds by machines: their answers would bury the log.
_UNLOGGED = frozenset({"health.livez", "health.readyz", "health.metrics", "static"})


def create_app(settings: Settings | None = None) -> Flask:
    """The WSGI application. Connects to nothing until the first request; `app.extensions["enlarger"]` is its Context.

    Raises ValueError where there is no secret key: sessions and webhook signatures would be anybody's to forge.
    """
    sandbox = Sandbox("shared.pictures")
    is_own_process = settings is None
    if settings is None:
        settings = settings_module.load()
        configure_logs(settings.log_level, settings.log_format)
    if not settings.secret_key:
        raise ValueError("ENLARGER_SECRET_KEY is not set; any 32 random characters will do, the same on every host.")
    database = Database(settings.sqlalchemy_url)
    broker = Broker(settings)
    # A request must not hang on frozen storage: two tries of 3 s and a pause, then an honest 503 within 10 s.
    storage = Storage(settings, silence_seconds=min(3.0, settings.storage_timeout_seconds), tries=2)
    context = Context(
        settings=settings,
        database=database,
        storage=storage,
        broker=broker,
        hurrier=Hurrier(broker, database),
        outgoing=GuardedClient(settings.allow_private_addresses),
        seats=Seats(settings.api_threads),
        limits=RateLimits(settings),
        sandbox=sandbox,
        traces=Traces(settings.traces_url, "api"),
        zooms=Zooms(storage),
    )
    if is_own_process:
        # What it counts reaches `/metrics` through its row: the next question may come to another process.
        presence = Presence(
            database, workers.this_process("api"), interval_seconds=settings.worker_lost_after_seconds / 3
        )
        presence.start(at_once=False)
        atexit.register(context.traces.close)
        atexit.register(presence.stop)
    app = Flask("api")
    app.request_class = uploads.Request
    app.config.update(
        SECRET_KEY=settings.secret_key,
        # A batch sends each picture as a part, and a few fields beside them.
        MAX_FORM_PARTS=settings.max_batch_items + 100,
        MAX_CONTENT_LENGTH=settings.max_upload_bytes + FORM_OVERHEAD_BYTES,
        # The prefix has the browser see to it that the cookie came over TLS and from this very host.
        SESSION_COOKIE_NAME="__Host-enlarger" if settings.cookie_secure else "enlarger",
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_COOKIE_SECURE=settings.cookie_secure,
        PERMANENT_SESSION_LIFETIME=timedelta(seconds=settings.session_seconds),
    )
    app.json.sort_keys = False  # type: ignore[attr-defined]  # the provider Flask makes has it
    app.extensions["enlarger"] = context
    problems.install(app)
    app.before_request(lambda: _begin(context.traces))
    app.after_request(_Finish(settings))
    # One for both who ask: its threads are what a server that hangs may hold.
    servers = health.Servers(context)
    app.register_blueprint(v1.blueprint(context))
    app.register_blueprint(compat.blueprint(context))
    app.register_blueprint(health.blueprint(context, servers))
    app.register_blueprint(openapi.blueprint(v1.HANDLERS))
    app.register_blueprint(web.blueprint(context))
    app.register_blueprint(dashboard.blueprint(context, servers))
    app.register_blueprint(operations.blueprint(context))
    if settings.trusted_proxies:
        hops = settings.trusted_proxies
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops, x_host=hops)  # type: ignore[method-assign]
    if is_own_process:
        # Last: until here it would only make this thread slower, which is all that a process that starts waits for.
        threading.Thread(target=context.warm_up, name="warm-up", daemon=True).start()
    return app


def _begin(traces: Traces) -> None:
    """Names the request, by the id the client sent, where it is harmless, else by a fresh one; and its trace."""
    sent = request.headers.get("X-Request-Id", "")
    g.request_id = sent if _REQUEST_ID.fullmatch(sent) else secrets.token_hex(16)
    g.began_at = time.perf_counter()
    parent = asked.traceparent()
    g.span = Span(parent) if request.endpoint in _UNLOGGED else traces.begin(_span_name(), parent)
    begin_lines(request_id=g.request_id, traceparent=g.span.traceparent)


def _span_name() -> str:
    # By the route's pattern and not by the path: ids in names would make every request a kind of its own.
    return f"{request.method} {request.url_rule.rule if request.url_rule else '(no route)'}"


class _Finish:
    """Headers of every answer, and its line in the log."""

    def __init__(self, settings: Settings) -> None:
        # Pictures come from storage, by redirect: another origin, as the browser sees it.
        address = urlsplit(settings.storage_public_url or settings.storage_endpoint_url)
        storage = f" {address.scheme}://{address.netloc}" if address.netloc else " https:"
        self._page_policy = "; ".join(
            (
                "default-src 'self'",
                f"img-src 'self' data: blob:{storage}",
                f"connect-src 'self'{storage}",
                "object-src 'none'",
                "base-uri 'none'",
                "form-action 'self'",
                "frame-ancestors 'none'",
            )
        )

    def __call__(self, response: Response) -> Response:
        headers = response.headers
        headers["X-Request-Id"] = g.get("request_id", "")
        headers["X-Content-Type-Options"] = "nosniff"
        headers.setdefault("Referrer-Policy", "same-origin")
        if request.endpoint == "static":
            web.compressed(response)
        is_page = response.mimetype == "text/html"
        if request.endpoint != "static":
            strict = "default-src 'none'; frame-ancestors 'none'"
            headers.setdefault("Content-Security-Policy", self._page_policy if is_page else strict)
            headers.setdefault("Cache-Control", "no-store")
        allowance = g.get("allowance")
        if allowance is not None:
            headers.update(allowance.headers())
        seconds = time.perf_counter() - g.began_at if "began_at" in g else 0.0
        if request.endpoint not in _UNLOGGED:
            tallies.observe(
                "enlarger_http_seconds", seconds, route=request.endpoint or "none", status=str(response.status_code)
            )
            caller = g.get("caller")
            log.info(
                "http.answered",
                method=request.method,
                path=request.path,
                status=response.status_code,
                seconds=round(seconds, 4),
                key_id=None if caller is None else caller.key_id,
            )
        if "span" in g:
            g.span.end(**{"http.response.status_code": response.status_code})
        return response
