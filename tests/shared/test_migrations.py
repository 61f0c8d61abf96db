"""The migrations make the very schema that the models describe, from nothing, on both databases, and can be undone."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime
from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect

import migrations
from shared.db import Database, Row
from shared.models import Job, JobState
from shared.servers import Server
from tests.conftest import new_postgresql_database
from tests.factories import a_job, a_key

ROOT = Path(__file__).resolve().parents[2]


def differences(url: str) -> list[object]:
    """What autogenerate would put into a new revision: nothing, where the schema is the models'."""
    database = Database(url)
    try:
        with database.engine.connect() as connection:
            context = MigrationContext.configure(
                connection, opts={"compare_type": True, "target_metadata": Row.metadata, "render_as_batch": True}
            )
            found: list[object] = compare_metadata(context, Row.metadata)
            return found
    finally:
        database.close()


def tables(url: str) -> set[str]:
    database = Database(url)
    try:
        return set(inspect(database.engine).get_table_names())
    finally:
        database.close()


def test_the_schema_is_made_from_nothing_and_is_that_of_the_models(empty_database_url: str) -> None:
    assert tables(empty_database_url) == set()
    assert len(differences(empty_database_url)) > 0, "the comparison must be able to see a difference"
    migrations.upgrade(empty_database_url)
    assert differences(empty_database_url) == []
    assert tables(empty_database_url) == {*Row.metadata.tables, "alembic_version"}


def test_upgrading_twice_changes_nothing_and_keeps_the_rows(empty_database_url: str, now: datetime) -> None:
    migrations.upgrade(empty_database_url)
    database = Database(empty_database_url)
    with database.transaction() as session:
        job_id = a_job(session, a_key(session, now), now).id
    migrations.upgrade(empty_database_url)
    with database.reading() as session:
        assert session.get_one(Job, job_id).state == JobState.QUEUED
    database.close()


def test_every_revision_can_be_undone_and_done_again(empty_database_url: str) -> None:
    scripts = ScriptDirectory.from_config(migrations.config(empty_database_url))
    revisions = [script.revision for script in scripts.walk_revisions()][::-1]
    assert scripts.get_heads() == [migrations.newest()], "the history has one end"
    for revision in revisions:
        migrations.upgrade(empty_database_url, revision)
        command.downgrade(migrations.config(empty_database_url), "-1")
        migrations.upgrade(empty_database_url, revision)
    assert differences(empty_database_url) == []
    command.downgrade(migrations.config(empty_database_url), "base")
    assert tables(empty_database_url) == {"alembic_version"}
    migrations.upgrade(empty_database_url)
    assert differences(empty_database_url) == []


def test_two_hosts_that_migrate_at_once_take_turns(postgresql_server: Server) -> None:
    program = "import sys, migrations; migrations.upgrade(sys.argv[1])"
    with new_postgresql_database(postgresql_server.url, "enlarger_turns") as url:
        hosts = [
            subprocess.Popen([sys.executable, "-c", program, url], cwd=ROOT, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        said = [host.communicate(timeout=60)[1] for host in hosts]
        assert [host.returncode for host in hosts] == [0, 0], said
        assert differences(url) == []


def test_a_password_with_a_percent_sign_reaches_the_database(now: datetime) -> None:
    url = "postgresql+psycopg://u:50%25off@h/n"
    assert migrations.config(url).get_main_option("sqlalchemy.url") == url
