"""Who calls: keys are stored hashed, carry scopes, and end when they should; sign-in links are worth their key."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from itsdangerous import URLSafeTimedSerializer
from itsdangerous.timed import TimestampSigner

from shared import keys
from shared.db import Database
from shared.errors import InvalidRequest, NotFound, Unauthorized
from shared.models import ApiKey, PageSession

SECRET_KEY = "the deployment's secret"


def test_a_key_authenticates_and_its_secret_is_stored_nowhere(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session:
        key, secret = keys.create(session, name="ci", scopes=["jobs"], now=now)
        stored = [str(getattr(key, column.name)) for column in ApiKey.__table__.columns]
        assert keys.authenticate(session, secret, now=now).id == key.id
    assert secret.startswith("enl_")
    assert len(secret) == len("enl_") + 32
    assert not any(secret in value or secret.removeprefix("enl_") in value for value in stored)


def test_two_keys_never_share_a_secret(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session:
        secrets = {keys.create(session, name="x", scopes=["jobs"], now=now)[1] for _ in range(50)}
    assert len(secrets) == 50


@pytest.mark.parametrize("scopes", [[], ["job"], ["jobs", "root"]])
def test_a_key_has_only_scopes_that_exist(sqlite_database: Database, now: datetime, scopes: list[str]) -> None:
    with sqlite_database.transaction() as session, pytest.raises(InvalidRequest, match="scopes"):
        keys.create(session, name="x", scopes=scopes, now=now)


@pytest.mark.parametrize("secret", ["enl_short", "a-long-secret-without-the-prefix", ""])
def test_a_given_secret_must_look_like_a_key(sqlite_database: Database, now: datetime, secret: str) -> None:
    with sqlite_database.transaction() as session, pytest.raises(InvalidRequest, match="enl_"):
        keys.create(session, name="x", scopes=["jobs"], now=now, secret=secret)


def test_unknown_expired_and_revoked_keys_are_refused_alike(database: Database, now: datetime) -> None:
    hour = timedelta(hours=1)
    with database.transaction() as session:
        _, expiring = keys.create(session, name="x", scopes=["jobs"], now=now, expires_at=now + hour)
        revoked_key, revoked = keys.create(session, name="x", scopes=["jobs"], now=now)
        keys.revoke(session, revoked_key.id, now=now)
    said = set()
    with database.reading() as session:
        keys.authenticate(session, expiring, now=now + hour - timedelta(microseconds=1))
        for secret in (expiring, revoked, "enl_unknown", ""):
            with pytest.raises(Unauthorized) as refused:
                keys.authenticate(session, secret, now=now + hour)
            said.add(refused.value.detail)
    assert len(said) == 1, "the answer must not tell a revoked key from one that never was"


def test_revoking_twice_keeps_the_first_moment(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session:
        key, _ = keys.create(session, name="x", scopes=["jobs"], now=now)
        keys.revoke(session, key.id, now=now)
        keys.revoke(session, key.id, now=now + timedelta(days=1))
        session.refresh(key)
        assert key.revoked_at == now


def test_revoking_a_key_that_is_not_there_says_so(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session, pytest.raises(NotFound):
        keys.revoke(session, "key_nobody", now=now)


def test_a_secret_from_settings_is_one_key_however_often_it_is_ensured(
    sqlite_database: Database, now: datetime
) -> None:
    secret = "enl_" + "a" * 32
    made = []
    for _ in range(2):
        with sqlite_database.transaction() as session:
            made.append(keys.ensure(session, secret, name="bootstrap", scopes=["jobs", "admin"], now=now).id)
    with sqlite_database.reading() as session:
        assert [key.id for key in keys.every(session)] == [made[0]]
        assert keys.authenticate(session, secret, now=now).scopes == ["jobs", "admin"]
    assert made[0] == made[1]


def test_a_signed_in_page_loses_its_key_when_the_key_ends(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session:
        key, _ = keys.create(session, name="x", scopes=["jobs"], now=now)
        assert keys.by_id(session, key.id, now=now) is key
        keys.revoke(session, key.id, now=now)
        session.refresh(key)
        with pytest.raises(Unauthorized):
            keys.by_id(session, key.id, now=now)
        with pytest.raises(Unauthorized):
            keys.by_id(session, "key_nobody", now=now)


def test_rotation_leaves_two_secrets_live_and_never_three(database: Database, now: datetime) -> None:
    hour = timedelta(hours=1)

    def who(secret: str, at: datetime) -> str | None:
        with database.reading() as session:
            try:
                return keys.authenticate(session, secret, now=at).id
            except Unauthorized:
                return None

    with database.transaction() as session:
        key, first = keys.create(session, name="x", scopes=["jobs"], now=now)
    with database.transaction() as session:
        rotated, second = keys.rotate(session, key.id, overlap_seconds=3600, now=now)
        stored = [str(getattr(rotated, column.name)) for column in ApiKey.__table__.columns]
        assert not any(secret in value for value in stored for secret in (first, second))
    assert rotated.id == key.id
    assert [who(secret, now + hour - timedelta(microseconds=1)) for secret in (first, second)] == [key.id, key.id]
    assert [who(secret, now + hour) for secret in (first, second)] == [None, key.id]
    with database.transaction() as session:
        _, third = keys.rotate(session, key.id, overlap_seconds=3600, now=now)
    assert [who(secret, now) for secret in (first, second, third)] == [None, key.id, key.id]
    with database.transaction() as session:
        _, fourth = keys.rotate(session, key.id, overlap_seconds=0, now=now)
    assert [who(secret, now) for secret in (first, second, third, fourth)] == [None, None, None, key.id]
    with database.transaction() as session:
        keys.revoke(session, key.id, now=now)
        with pytest.raises(InvalidRequest, match="has ended"):
            keys.rotate(session, key.id, overlap_seconds=0, now=now)
        with pytest.raises(NotFound):
            keys.rotate(session, "key_nobody", overlap_seconds=0, now=now)
    assert who(fourth, now) is None


def test_a_rotated_key_of_the_settings_is_not_made_anew(sqlite_database: Database, now: datetime) -> None:
    secret = "enl_" + "a" * 32
    with sqlite_database.transaction() as session:
        made = keys.ensure(session, secret, name="bootstrap", scopes=["admin"], now=now)
        keys.rotate(session, made.id, overlap_seconds=0, now=now)
        assert keys.ensure(session, secret, name="bootstrap", scopes=["admin"], now=now).id == made.id
        with pytest.raises(Unauthorized):
            keys.authenticate(session, secret, now=now)


def test_a_session_is_stored_hashed_and_ends_in_every_way_it_can(database: Database, now: datetime) -> None:
    def who(token: str, at: datetime = now) -> str | None:
        with database.reading() as session:
            try:
                return keys.by_session(session, token, now=at).id
            except Unauthorized:
                return None

    with database.transaction() as session:
        key, _ = keys.create(session, name="x", scopes=["jobs"], now=now, expires_at=now + timedelta(hours=2))
        tokens = [keys.begin_session(session, key.id, seconds=3600, now=now) for _ in range(3)]
        assert not set(tokens) & {row.token_sha256 for row in session.query(PageSession)}
    assert [who(token) for token in tokens] == [key.id] * 3
    assert who(tokens[0], now + timedelta(hours=1)) is None
    with database.transaction() as session:
        keys.end_session(session, tokens[0])
    assert [who(token) for token in tokens] == [None, key.id, key.id]
    with database.transaction() as session:
        keys.forget_sessions(session, now=now + timedelta(minutes=59))
        assert session.query(PageSession).count() == 2
        # A rotation without overlap is for a secret that has leaked: whoever signed in with it is out.
        keys.rotate(session, key.id, overlap_seconds=60, now=now)
        assert session.query(PageSession).count() == 2
        keys.rotate(session, key.id, overlap_seconds=0, now=now)
        assert session.query(PageSession).count() == 0
    assert who("") is None


def test_a_sign_in_link_names_its_key() -> None:
    token = keys.sign_in_token(SECRET_KEY, "key_1")
    assert keys.read_sign_in_token(SECRET_KEY, token) == "key_1"


@pytest.mark.parametrize(
    "forge",
    [
        # Not the last sign: some of its bits are padding.
        lambda token: token[:-5] + ("A" if token[-5] != "A" else "B") + token[-4:],
        lambda token: "x" + token,
        lambda _: keys.sign_in_token("another deployment's secret", "key_1"),
        lambda _: URLSafeTimedSerializer(SECRET_KEY, salt="something else").dumps("key_1"),
        lambda _: "",
        lambda _: "..",
        lambda _: "\u00e9.\u00e9.\u00e9",
    ],
)
def test_a_forged_sign_in_link_is_refused(forge: Callable[[str], str]) -> None:
    with pytest.raises(Unauthorized):
        keys.read_sign_in_token(SECRET_KEY, forge(keys.sign_in_token(SECRET_KEY, "key_1")))


def test_a_sign_in_link_is_good_for_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    token = keys.sign_in_token(SECRET_KEY, "key_1")
    signed_at = TimestampSigner(SECRET_KEY).get_timestamp()
    monkeypatch.setattr(TimestampSigner, "get_timestamp", lambda _: signed_at + 86400 - 5)
    assert keys.read_sign_in_token(SECRET_KEY, token) == "key_1"
    monkeypatch.setattr(TimestampSigner, "get_timestamp", lambda _: signed_at + 86400 + 5)
    with pytest.raises(Unauthorized, match="too old"):
        keys.read_sign_in_token(SECRET_KEY, token)
