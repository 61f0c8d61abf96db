"""SQL: the engine, two kinds of transaction, the database's clock, and types every row uses.

SQLite (the default, one host) and PostgreSQL (production) are treated alike by everything above this module.
"""

from __future__ import annotations

import fcntl
import functools
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, DateTime, Dialect, MetaData, bindparam, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.types import TypeDecorator

from shared.errors import DatabaseUnavailable
from shared.telemetry import tallies

if TYPE_CHECKING:
    import psycopg

# Named constraints, so that migrations can drop what they made on either database.
NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

# How long a writer waits for SQLite's one write lock before the API answers 503.
SQLITE_BUSY_TIMEOUT_SECONDS = 15
# For its turn among the processes of this host; then it goes the way it would without turns. Whoever has the turn, or
# is next, writes within milliseconds, unless it is frozen.
SQLITE_TURN_PATIENCE_SECONDS = 2
SQLITE_TURN_LOOK_SECONDS = 0.0005
POSTGRESQL_CONNECT_TIMEOUT_SECONDS = 5
# A statement that runs longer than this is ended by PostgreSQL: an honest error instead of a hung request.
POSTGRESQL_STATEMENT_TIMEOUT_SECONDS = 10
# A server that says nothing at all (frozen, or gone without a word) can end no statement, so this side stops waiting:
# a relay that waited for ever would rescue nobody any more.
POSTGRESQL_SILENCE_SECONDS = 12
# A worker that freezes between its UPDATE and its COMMIT holds its job's row, and rescue passes over held rows. The
# server lets go of it before the lease that this very UPDATE has renewed (20 s) can pass.
POSTGRESQL_IDLE_TRANSACTION_SECONDS = 10
POSTGRESQL_OPTIONS = {
    "statement_timeout": f"{POSTGRESQL_STATEMENT_TIMEOUT_SECONDS}s",
    "lock_timeout": f"{POSTGRESQL_STATEMENT_TIMEOUT_SECONDS}s",
    "idle_in_transaction_session_timeout": f"{POSTGRESQL_IDLE_TRANSACTION_SECONDS}s",
    "timezone": "UTC",
}


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC, to the microsecond. Naive values are refused: they hide a time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"naive datetime {value!r}: give it a time zone")
        value = value.astimezone(UTC)
        # SQLite has no time zones; all its rows are UTC by this very line.
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


NOW = bindparam("now", type_=UtcDateTime)
"""The present, in statements that are put together once and run with `{"now": ...}`."""


class Row(DeclarativeBase):
    """What every mapped class of `shared.models` derives from."""

    metadata = MetaData(naming_convention=NAMING_CONVENTION)


class Database:
    """One engine and its two kinds of transaction. Make one per process, in `app.py`; after a fork, make another."""

    def __init__(self, url: str) -> None:
        """`url` may end in `?pooled=transaction` where PgBouncer, or a pool like it, gives each transaction another
        connection to the server: then nothing is kept in a connection that must be there in the next transaction."""
        given = make_url(url)
        self.url = given.difference_update_query(["pooled"])
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            self.engine = create_engine(
                self.url, connect_args={"timeout": SQLITE_BUSY_TIMEOUT_SECONDS, "check_same_thread": False}
            )
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        else:
            is_pooled = given.query.get("pooled") == "transaction"
            # A pool refuses options, and statements that are prepared in one connection are missed in the next.
            of_connection = (
                {"prepare_threshold": None}
                if is_pooled
                else {"options": " ".join(f"-c {name}={value}" for name, value in POSTGRESQL_OPTIONS.items())}
            )
            self.engine = create_engine(
                self.url,
                pool_pre_ping=True,
                pool_size=10,
                max_overflow=40,
                connect_args={"connect_timeout": POSTGRESQL_CONNECT_TIMEOUT_SECONDS, **of_connection},
            )
            event.listen(self.engine, "do_connect", _connect_impatiently)
            if is_pooled:
                event.listen(self.engine, "begin", _begin_pooled)
        event.listen(self.engine, "before_cursor_execute", _statement_begins)
        event.listen(self.engine, "after_cursor_execute", _statement_ends)
        self._is_closed = False
        event.listen(self.engine, "checkin", self._end_late_comer)
        self._reading_engine = self.engine.execution_options(enlarger_reading=True)
        self._passing_engine = self.engine.execution_options(enlarger_passing=True)
        # Reentrant: a transaction within another one is SQLite's to refuse, as it always has been.
        self._writing = threading.RLock() if self.is_sqlite else None
        self._turns = _Turns(self.url.database) if self.is_sqlite else None

    @contextmanager
    def transaction(self, *, passing: bool = False) -> Iterator[Session]:
        """A session that may write: committed when the block ends, rolled back when it raises.

        `passing`: what it writes is soon out of date by itself, so it need not survive a power cut; SQLite then does
        not wait for the disk. Later commits take it along.

        Raises DatabaseUnavailable where the server cannot be reached or stays locked.
        """
        engine = self._passing_engine if passing else self.engine
        with (
            self._turn_to_write(),
            _translated(),
            Session(engine, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    @contextmanager
    def _turn_to_write(self) -> Iterator[None]:
        """SQLite's one write lock, queued for within this process, then among those of this host. SQLite itself has
        waiters sleep and look again, ever longer: with eight threads that write, one in a hundred waited for seconds,
        and with two processes for half of one."""
        if self._writing is None or self._turns is None:
            yield
            return
        if not self._writing.acquire(timeout=SQLITE_BUSY_TIMEOUT_SECONDS):
            raise DatabaseUnavailable("The database is busy writing.", retry_after_seconds=2)
        try:
            with self._turns.one():
                yield
        finally:
            self._writing.release()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that only reads. On SQLite it takes no write lock, so that polls never wait for writers.

        What was read can be used after the block: closing the session rolls back without emptying its rows, which an
        explicit rollback would do.
        """
        with _translated(), Session(self._reading_engine, expire_on_commit=False) as session:
            yield session

    def ping(self) -> None:
        """One trivial statement. Raises DatabaseUnavailable."""
        with self.reading() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        """Ends every connection; one that a thread still uses, when it comes back."""
        self._is_closed = True
        self.engine.dispose()
        # Where a thread still writes, two descriptors stay until the process ends: none may name another file under it.
        if self._turns is not None and self._writing is not None and self._writing.acquire(blocking=False):
            self._turns.close()
            self._writing.release()

    def _end_late_comer(self, _connection: Any, record: ConnectionPoolEntry) -> None:
        if self._is_closed:
            # SQLAlchemy would keep it in a pool that nobody has any more.
            record.invalidate()


class _Turns:
    """Whose turn it is to write one SQLite file, among the processes of this host; of one process, one thread at a time
    asks.

    Two files beside the database are locked by `flock`, which the kernel takes back from whoever dies. `-queue` belongs
    to the one that comes next, while it waits for `-turn`, which belongs to the one that writes. With one file alone a
    process of many threads would take the turn again and again, before any other has looked. Nothing depends on it:
    whoever writes without a turn is SQLite's to hold back.
    """

    def __init__(self, path: str | None) -> None:
        # In memory, or named by a URI: nobody else writes there, or nobody knows where it lies.
        self._path = path if path and not path.startswith((":memory:", "file:")) else None
        self._fds: tuple[int, int] | None = None
        self._held = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Has the turn within the block, or has waited for it as long as one should."""
        is_first = self._held == 0
        has_it = is_first and self._take()
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if has_it and self._fds is not None:
                fcntl.flock(self._fds[1], fcntl.LOCK_UN)

    def close(self) -> None:
        if self._held:
            return
        fds, self._fds = self._fds, None
        for fd in fds or ():
            os.close(fd)

    def _take(self) -> bool:
        if self._path is None:
            return False
        if self._fds is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            try:
                queue = os.open(f"{self._path}-queue", flags, 0o644)
                self._fds = queue, os.open(f"{self._path}-turn", flags, 0o644)
            except OSError:
                # Whatever it is (no such folder, no room), SQLite will meet it and say so.
                return False
        queue, turn = self._fds
        patient_until = time.monotonic() + SQLITE_TURN_PATIENCE_SECONDS
        is_next = _lock_until(queue, patient_until)
        has_it = is_next and _lock_until(turn, patient_until)
        if is_next:
            fcntl.flock(queue, fcntl.LOCK_UN)
        return has_it


def _lock_until(fd: int, moment: float) -> bool:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            # The kernel's own waiting has no end, and a frozen process must not freeze the others.
            if time.monotonic() >= moment:
                return False
            time.sleep(SQLITE_TURN_LOOK_SECONDS)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    # PoolTimeoutError: every connection of this process is in use, and none came back in time.
    except (OperationalError, InterfaceError, PoolTimeoutError) as error:
        raise DatabaseUnavailable("The database does not answer.", retry_after_seconds=2) from error
    except DBAPIError as error:
        # PostgreSQL calls some ends of a connection (an idle transaction's) by other names.
        if not error.connection_invalidated:
            raise
        raise DatabaseUnavailable("The database has ended the connection.", retry_after_seconds=2) from error


def _connect_impatiently(_dialect: Dialect, _record: ConnectionPoolEntry, words: Any, named: Any) -> Any:
    return _impatient().connect(*words, **named)


@functools.cache
def _impatient() -> type[psycopg.Connection[Any]]:
    # Not at the top: on SQLite nobody needs it.
    import psycopg

    class Impatient(psycopg.Connection[Any]):
        """A connection that closes itself where the server says nothing for POSTGRESQL_SILENCE_SECONDS."""

        def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
            silence_seconds = POSTGRESQL_SILENCE_SECONDS if timeout is None else timeout
            try:
                return super().wait(gen, interval, silence_seconds)
            except psycopg.errors._WaitTimeout:
                # What it was in the middle of is unknown: closed, it is taken out of the pool.
                self.pgconn.finish()
                raise

    return Impatient


def _statement_begins(connection: Connection, *_: Any) -> None:
    connection.info["began_at"] = time.perf_counter()


def _statement_ends(connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
    seconds = time.perf_counter() - connection.info["began_at"]
    tallies.observe("enlarger_sql_seconds", seconds, statement=statement.split(None, 1)[0].upper())


def _prepare_sqlite(connection: Any, _record: ConnectionPoolEntry) -> None:
    # sqlite3 must not open transactions by itself: `_begin_sqlite` does, with the lock we want.
    connection.isolation_level = None
    cursor = connection.cursor()
    # WAL: readers do not wait for the writer.
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA busy_timeout={SQLITE_BUSY_TIMEOUT_SECONDS * 1000}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # IMMEDIATE takes the write lock at once: a transaction that reads first and writes later would otherwise fail
    # with "database is locked", which no busy timeout can wait for.
    options = connection.get_execution_options()
    if options.get("enlarger_reading", False):
        connection.exec_driver_sql("BEGIN")
        return
    # NORMAL: a power cut may cost the last transactions of WAL, a crash of the process none. FULL makes the 202 survive
    # a power cut as well, for one fsync a commit.
    synchronous = "NORMAL" if options.get("enlarger_passing", False) else "FULL"
    if connection.info.get("synchronous") != synchronous:
        connection.exec_driver_sql(f"PRAGMA synchronous={synchronous}")
        connection.info["synchronous"] = synchronous
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _begin_pooled(connection: Connection) -> None:
    # In one statement, and for this transaction alone.
    told = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in POSTGRESQL_OPTIONS.items())
    connection.exec_driver_sql(f"SELECT {told}")


def clock(session: Session) -> datetime:
    """The database's present moment, UTC: leases of many hosts are compared by one clock.

    On SQLite the database is this host, so no statement is sent.
    """
    if session.get_bind().dialect.name == "sqlite":
        return datetime.now(UTC)
    moment: datetime = session.execute(text("SELECT clock_timestamp()")).scalar_one()
    return moment.astimezone(UTC)


_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"


def new_id(prefix: str, now: datetime) -> str:
    """`prefix_` and a ULID in lower case: sorts by time, 80 random bits, cannot be guessed."""
    number = (int(now.timestamp() * 1000) << 80) | secrets.randbits(80)
    digits = []
    for _ in range(26):
        number, digit = divmod(number, 32)
        digits.append(_CROCKFORD[digit])
    return f"{prefix}_{''.join(reversed(digits))}"


def moment_of(id: str) -> datetime | None:
    """When an id was made, to the millisecond; None where it is none of `new_id`."""
    digits = id.rpartition("_")[2]
    if len(digits) != 26 or not set(digits) <= set(_CROCKFORD):
        return None
    number = 0
    for digit in digits:
        number = number * 32 + _CROCKFORD.index(digit)
    milliseconds = number >> 80
    # The year 9999: beyond it there are no datetimes.
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds < 253_402_300_800_000 else None
