"""Alembic's entry: runs the revisions over `shared.models`' metadata, on SQLite and PostgreSQL alike."""

from __future__ import annotations

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext

import shared.models  # noqa: F401  (importing it fills the metadata that revisions are compared with)
from shared.db import Database, Row, UtcDateTime


def _render(kind: str, item: Any, _context: AutogenContext) -> str | Literal[False]:
    # A revision must mean the same for ever, so it names SQLAlchemy's own type and not ours.
    return "sa.DateTime(timezone=True)" if kind == "type" and isinstance(item, UtcDateTime) else False


def run() -> None:
    url = context.config.get_main_option("sqlalchemy.url")
    assert url is not None
    database = Database(url)
    with database.engine.connect() as connection:
        # batch mode: SQLite cannot alter a table in place, so Alembic copies it.
        context.configure(
            connection=connection,
            target_metadata=Row.metadata,
            render_as_batch=True,
            compare_type=True,
            render_item=_render,
        )
        with context.begin_transaction():
            if not database.is_sqlite:
                # Two migrating hosts take turns; the second then finds nothing to do.
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7240519)")
            context.run_migrations()
        if connection.in_transaction():
            connection.commit()
    database.close()


run()
