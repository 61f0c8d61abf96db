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
from shared.models import ApiKey

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
