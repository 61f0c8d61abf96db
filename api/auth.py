"""Who is calling: a Bearer key or a page's session becomes a Caller, with what it may do.

Scopes: `jobs` is everything under /v1 but the operator's; `viewer` looks at the pages under `/admin`, `operator` also
acts there; `admin` includes all of these and adds `/metrics`, and on the pages keys.
Neither opens another key's jobs through /v1: those answer 404 to everybody but their owner (`queries.owned_job`).
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass
from datetime import datetime

from flask import g, request, session

from api.context import Context
from shared import keys
from shared.db import clock
from shared.errors import Forbidden, Unauthorized
from shared.models import ApiKey

CSRF_HEADER = "X-CSRF-Token"
CSRF_FIELD = "csrf_token"
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_SESSION_TOKEN = "token"
_SESSION_CSRF = "csrf"


@dataclass(frozen=True)
class Caller:
    """Whose request this is."""

    key_id: str
    name: str
    scopes: frozenset[str]
    expires_at: datetime | None
    by_session: bool
    """Signed in through a page, by cookie; otherwise by Bearer key."""

    def may(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes or (scope == "viewer" and "operator" in self.scopes)


def caller(context: Context, scope: str | None = None) -> Caller:
    """The caller of the present request, looked up once per request (one SELECT).

    A request that changes something and comes by cookie must carry the session's CSRF token, or any other site could
    send it in the person's name. Raises Unauthorized (nobody), Forbidden (without `scope`, or without the token).
    """
    known: Caller | None = g.get("caller")
    if known is None:
        known = _identify(context)
        g.caller = known
    if scope is not None and not known.may(scope):
        raise Forbidden(f"This needs a key with the scope {scope!r}.", scope=scope, scopes=sorted(known.scopes))
    return known


def known_caller() -> Caller | None:
    """The caller of this request, where somebody has asked who it is."""
    known: Caller | None = g.get("caller")
    return known


def sign_in(context: Context, key_id: str) -> None:
    """Begins a page's session for this key, always another one than before: what somebody may have planted or kept of
    an earlier one is worth nothing. The caller has checked the key or the sign-in link. Raises Unauthorized where the
    key has ended."""
    with context.database.transaction() as writing:
        now = clock(writing)
        keys.by_id(writing, key_id, now=now)
        keys.end_session(writing, session.get(_SESSION_TOKEN, ""))
        token = keys.begin_session(writing, key_id, seconds=context.settings.session_seconds, now=now)
    session.clear()
    session.permanent = True
    session[_SESSION_TOKEN] = token
    session[_SESSION_CSRF] = secrets.token_urlsafe(24)


def sign_out(context: Context) -> None:
    """Ends the session on the server: a copy of its cookie is worth nothing either."""
    with context.database.transaction() as writing:
        keys.end_session(writing, session.get(_SESSION_TOKEN, ""))
    session.clear()


def begin_form() -> None:
    """Before anybody is signed in: gives the browser a token that the sign-in form has to bring back."""
    if not csrf_token():
        session[_SESSION_CSRF] = secrets.token_urlsafe(24)


def csrf_token() -> str:
    """The session's token, for the X-CSRF-Token header of scripts and the `csrf_token` field of forms; "" before
    there is one."""
    return str(session.get(_SESSION_CSRF, ""))


def _identify(context: Context) -> Caller:
    header = request.headers.get("Authorization")
    if header is not None:
        kind, _, secret = header.partition(" ")
        if kind.lower() != "bearer" or not secret.strip():
            raise Unauthorized("The Authorization header must be `Bearer <key>`.")
        with context.database.reading() as reading:
            return _caller_of(keys.authenticate(reading, secret.strip(), now=clock(reading)), by_session=False)
    token = session.get(_SESSION_TOKEN)
    if not isinstance(token, str):
        raise Unauthorized("Send an API key as `Authorization: Bearer <key>`.")
    if request.method not in _SAFE_METHODS:
        check_csrf()
    with context.database.reading() as reading:
        return _caller_of(keys.by_session(reading, token, now=clock(reading)), by_session=True)


def check_csrf() -> None:
    """Raises Forbidden where a request that changes something does not carry the session's token."""
    sent = request.headers.get(CSRF_HEADER)
    # A form's field is looked for in small forms only: an upload must not be read to learn whether it may be read.
    if sent is None and request.mimetype == "application/x-www-form-urlencoded":
        sent = request.form.get(CSRF_FIELD)
    expected = csrf_token()
    if not expected or sent is None or not hmac.compare_digest(sent.encode(), expected.encode()):
        raise Forbidden(f"A change by a page's session needs its token in {CSRF_HEADER}; reload the page.")


def _caller_of(key: ApiKey, *, by_session: bool) -> Caller:
    return Caller(key.id, key.name, frozenset(key.scopes), key.expires_at, by_session)
