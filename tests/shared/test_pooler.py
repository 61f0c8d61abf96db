"""PgBouncer between processes and PostgreSQL, in transaction mode: what a large fleet needs, which has more processes
than the server has connections. Every transaction may be on another one."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

import migrations
from shared import jobs
from shared.db import POSTGRESQL_OPTIONS, Database, clock
from shared.errors import DatabaseUnavailable
from shared.servers import Server, free_port
from tests.conftest import new_postgresql_database, wait_until
from tests.factories import a_claim, a_job, a_key, a_result

CONNECTIONS = 2
PROCESSES = 6
CONFIGURATION = """
[databases]
* = host={host} port={server_port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {users}
pool_mode = transaction
default_pool_size = {connections}
"""


@pytest.fixture
def pooled_url(postgresql_server: Server) -> Iterator[str]:
    """An address of PgBouncer's, which has CONNECTIONS connections to a database."""
    program = shutil.which("pgbouncer") or shutil.which("/usr/sbin/pgbouncer")
    if program is None:
        pytest.skip("there is no PgBouncer here (Debian's package `pgbouncer` has it)")
    with (
        # Not pytest's, into which nobody else may look.
        tempfile.TemporaryDirectory() as name,
        new_postgresql_database(postgresql_server.url, "enlarger_pooled") as url,
    ):
        server, folder = make_url(url), Path(name)
        users, file, port = folder / "users.txt", folder / "pgbouncer.ini", free_port()
        users.write_text(f'"{server.username}" "{server.password}"\n')
        file.write_text(
            CONFIGURATION.format(
                host=server.host, server_port=server.port, port=port, users=users, connections=CONNECTIONS
            )
        )
        words = [program, str(file)]
        if os.geteuid() == 0:
            # It runs as anybody but root, and must be able to read its files.
            folder.chmod(0o755)
            words[1:1] = ["--user=nobody"]
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        try:
            pooled = server.set(port=port).render_as_string(hide_password=False)

            def answers() -> bool:
                with closing(Database(f"{pooled}?pooled=transaction")) as database:
                    try:
                        database.ping()
                    except DatabaseUnavailable:
                        return False
                    return True

            wait_until(answers, seconds=30, what="PgBouncer to answer")
            migrations.upgrade(f"{pooled}?pooled=transaction")
            yield pooled
        finally:
            process.terminate()
            process.wait(30)


def test_more_processes_than_connections_take_and_finish_jobs_through_pgbouncer(pooled_url: str, now: datetime) -> None:
    # As many processes, each with its own connections to the pool.
    databases = [Database(f"{pooled_url}?pooled=transaction") for _ in range(PROCESSES)]
    failed: list[BaseException] = []
    done: list[str] = []

    def work(database: Database) -> None:
        try:
            with database.transaction() as session:
                key = a_key(session, now).id
            # More often than psycopg would have a statement be prepared.
            for _ in range(8):
                with database.transaction() as session:
                    job_id = a_job(session, key, clock(session)).id
                with database.transaction() as session:
                    claim = a_claim(session, job_id, clock(session))
                with database.transaction() as session:
                    jobs.succeed(session, claim, a_result(claim), now=clock(session))
                done.append(job_id)
        except Exception as error:  # noqa: BLE001  (whatever it is, the test says it)
            failed.append(error)

    threads = [threading.Thread(target=work, args=(database,)) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    assert len(done) == len(set(done)) == 8 * PROCESSES
    # And what guards a connection elsewhere guards each transaction here, and no other that comes after it.
    with databases[0].reading() as session:
        told = {name: session.scalar(text(f"SHOW {name}")) for name in POSTGRESQL_OPTIONS}
        used = session.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"))
    assert told == POSTGRESQL_OPTIONS
    assert used is not None
    assert used <= CONNECTIONS
    for database in databases:
        database.close()


def test_without_a_word_of_the_pool_it_is_refused(pooled_url: str) -> None:
    with closing(Database(pooled_url)) as database, pytest.raises(DatabaseUnavailable):
        database.ping()
