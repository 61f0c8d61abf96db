"""API keys, sign-in links and the sessions of pages: who is calling.

A key is `enl_` and 160 random bits in base32; shown once, stored as its SHA-256. It carries scopes and may end. It may
be rotated: the new secret is good at once, the old one for a while longer, and jobs and sessions stay the key's.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta

from itsdangerous import BadSignature, URLSafeTimedSerializer
from sqlalchemy import Select, bindparam, delete, func, literal, or_, select, update
from sqlalchemy.orm import Session

from shared.db import UtcDateTime, new_id
from shared.errors import InvalidRequest, NotFound, Unauthorized
from shared.models import ApiKey, PageSession

SCOPES = ("jobs", "viewer", "operator", "admin")
"""What a key may do: its own jobs; look at the operator's pages; act there; all of it, and keys."""
EVERYTHING = ("jobs", "admin")
KEY_PREFIX = "enl_"
SIGN_IN_LINK_SECONDS = 86400
ROTATION_OVERLAP_SECONDS = 86400


def create(
    session: Session,
    *,
    name: str,
    scopes: Sequence[str],
    now: datetime,
    expires_at: datetime | None = None,
    secret: str | None = None,
) -> tuple[ApiKey, str]:
    """Makes a key; returns its row and the secret, which cannot be had again.

    `secret` sets it instead of drawing one (`ENLARGER_BOOTSTRAP_ADMIN_KEY`). Raises InvalidRequest for a scope there
    is not, or a secret that is not `enl_` and at least 20 characters.
    """
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise InvalidRequest(f"A key's scopes are one or more of {', '.join(SCOPES)}.", scopes=list(scopes))
    if secret is None:
        secret = _new_secret()
    elif not secret.startswith(KEY_PREFIX) or len(secret) < len(KEY_PREFIX) + 20:
        raise InvalidRequest("A key is `enl_` and at least 20 characters nobody can guess.")
    key = ApiKey(
        id=new_id("key", now),
        name=name,
        scopes=list(scopes),
        secret_sha256=_sha256(secret),
        created_at=now,
        expires_at=expires_at,
    )
    session.add(key)
    session.flush()
    return key, secret


def ensure(session: Session, secret: str, *, name: str, scopes: Sequence[str], now: datetime) -> ApiKey:
    """The key with this secret, made where it is missing: for secrets that come from settings."""
    found = session.scalar(_by_secret(), {"digest": _sha256(secret)})
    return found or create(session, name=name, scopes=scopes, now=now, secret=secret)[0]


def authenticate(session: Session, secret: str, *, now: datetime) -> ApiKey:
    """The live key with this secret. Raises Unauthorized, the same for unknown, revoked and expired ones.

    The look-up compares hashes in an index: what its timing could tell is about the hash, which gives nothing away.
    """
    digest = _sha256(secret)
    key = session.scalar(_by_secret(), {"digest": digest})
    if key is None:
        raise _unknown()
    is_present = hmac.compare_digest(key.secret_sha256, digest)
    is_previous = hmac.compare_digest(key.previous_sha256 or "", digest)
    overlaps = key.previous_ends_at is not None and now < key.previous_ends_at
    if not is_present and not (is_previous and overlaps):
        raise _unknown()
    return _live(key, now)


def rotate(session: Session, key_id: str, *, overlap_seconds: float, now: datetime) -> tuple[ApiKey, str]:
    """Gives the key another secret and returns both; the old one is good for `overlap_seconds` more.

    Two secrets are live at most: one that is still running out from an earlier rotation ends now. With no overlap the
    key's sessions end too. Raises NotFound, and InvalidRequest for a key that has ended.
    """
    key = session.scalar(select(ApiKey).where(ApiKey.id == key_id).with_for_update())
    if key is None:
        raise NotFound(f"There is no key {key_id}.")
    try:
        _live(key, now)
    except Unauthorized as error:
        raise InvalidRequest(f"The key {key_id} has ended; create another.") from error
    secret = _new_secret()
    key.previous_sha256, key.previous_ends_at = key.secret_sha256, now + timedelta(seconds=overlap_seconds)
    key.secret_sha256 = _sha256(secret)
    if overlap_seconds <= 0:
        _end_sessions(session, key_id)
    session.flush()
    return key, secret


def by_id(session: Session, key_id: str, *, now: datetime) -> ApiKey:
    """The live key of that id. Raises Unauthorized."""
    key = session.get(ApiKey, key_id)
    if key is None:
        raise _unknown()
    return _live(key, now)


def begin_session(session: Session, key_id: str, *, seconds: float, now: datetime) -> str:
    """Signs a page in for the key; returns the token that its cookie is to carry, which is stored hashed."""
    token = secrets.token_urlsafe(32)
    session.add(
        PageSession(
            token_sha256=_sha256(token), key_id=key_id, created_at=now, expires_at=now + timedelta(seconds=seconds)
        )
    )
    session.flush()
    return token


def by_session(session: Session, token: str, *, now: datetime) -> ApiKey:
    """The live key of a signed-in page, by the token of its cookie. Raises Unauthorized. One SELECT."""
    key = session.scalar(
        select(ApiKey)
        .join(PageSession, PageSession.key_id == ApiKey.id)
        .where(PageSession.token_sha256 == _sha256(token), PageSession.expires_at > now)
    )
    if key is None:
        raise Unauthorized("The session has ended; sign in again.")
    return _live(key, now)


def end_session(session: Session, token: str) -> None:
    """Signs a page out: its cookie, and every copy of it, is worth nothing from now on."""
    session.execute(delete(PageSession).where(PageSession.token_sha256 == _sha256(token)))


def forget_sessions(session: Session, *, now: datetime) -> None:
    """Deletes the rows of sessions that have run out."""
    session.execute(delete(PageSession).where(PageSession.expires_at <= now))


def revoke(session: Session, key_id: str, *, now: datetime) -> None:
    """Ends a key from `now` on, both its secrets and its sessions. Revoking twice keeps the first moment. Raises
    NotFound."""
    found = session.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id)
        .values(revoked_at=func.coalesce(ApiKey.revoked_at, literal(now, UtcDateTime)))
        .returning(ApiKey.id)
    )
    if found.one_or_none() is None:
        raise NotFound(f"There is no key {key_id}.")
    _end_sessions(session, key_id)


def every(session: Session) -> Sequence[ApiKey]:
    """All keys, newest first; their secrets are not known to anybody any more."""
    return session.scalars(select(ApiKey).order_by(ApiKey.created_at.desc())).all()


def sign_in_token(secret_key: str, key_id: str) -> str:
    """A token for a sign-in link (`/sign-in?token=...`): signed, good for a day, worth no more than its key."""
    return _links(secret_key).dumps(key_id)


def read_sign_in_token(secret_key: str, token: str) -> str:
    """The id of the key a sign-in link stands for. Raises Unauthorized."""
    try:
        return str(_links(secret_key).loads(token, max_age=SIGN_IN_LINK_SECONDS))
    except BadSignature as error:
        raise Unauthorized("The sign-in link is too old or not ours; `enlarger sign-in` prints a fresh one.") from error


def _links(secret_key: str) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(secret_key, salt="enlarger-sign-in")


def _live(key: ApiKey, now: datetime) -> ApiKey:
    if key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= now):
        raise _unknown()
    return key


def _unknown() -> Unauthorized:
    return Unauthorized("The API key is not known, or no longer valid.")


@functools.cache
def _by_secret() -> Select[ApiKey]:
    # Put together once: it is asked at every request.
    return select(ApiKey).where(
        or_(ApiKey.secret_sha256 == bindparam("digest"), ApiKey.previous_sha256 == bindparam("digest"))
    )


def _end_sessions(session: Session, key_id: str) -> None:
    session.execute(delete(PageSession).where(PageSession.key_id == key_id))


def _new_secret() -> str:
    return KEY_PREFIX + base64.b32encode(secrets.token_bytes(20)).decode().lower()


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
